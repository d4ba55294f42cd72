"""Record files to a data set of examples; all records are tokenized and filtered at the start."""

import dataclasses
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm_sft.config.schema import DataConfig, DataFile
from vlm_sft.data.conversation import Conversation, ImageSource
from vlm_sft.data.feature_store import FeatureStore
from vlm_sft.data.filtering import FilterResult, RecordFilter
from vlm_sft.data.image_layout import ImageLayout, LayoutRule, Size, num_crops
from vlm_sft.data.images import ImageCrops, ImageSpec, read_crops
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.record_store import RecordStore
from vlm_sft.data.records import open_records
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.data.tokenize_cache import CachedChatTokenizer
from vlm_sft.errors import ImageError, RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from vlm_sft.utils.progress import track
from vlm_sft.utils.tar_index import file_size


@dataclass(frozen=True)
class Example:
    """One record, ready for a batch.

    Attributes:
        record_id: The record's id.
        input_ids: [T] int64; `IMAGE_TOKEN_ID` once per image token.
        labels: [T] int64, not shifted; `IGNORE_INDEX` where there is no loss, always on images.
        pixel_values: [n, 3, H, W] uint8, the crops of the images in reading order; n can be 0.
        image_features: [n, tokens, width], cached vision features; `pixel_values` is then empty.
        layouts: Layout of each image of `pixel_values` or `image_features`; None: every image is
            one crop.
        shared_prefix_length: Leading tokens, the first image's included, that repeat those of the
            example before this one in its batch. If it is not 0, the first image is not loaded
            again.
    """

    record_id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    image_features: Tensor | None = None
    layouts: tuple[ImageLayout, ...] | None = None
    shared_prefix_length: int = 0


class SupervisedDataset(Dataset[Example]):
    """All usable records of some files as `Example`s.

    Construction reads, tokenizes and filters every record once and checks that its image files
    exist. Ids, labels, texts and embedded images go to a temporary file, so that a record takes a
    few hundred bytes of memory however long it is. Indexing opens the images.

    Args:
        files: The files to read, in order.
        chat_tokenizer: Makes ids and labels.
        image_spec: The input of the vision tower.
        layout_rule: Gives crops and tokens of every image.
        config: Limits and length policy, handling of bad records, image processing.
        ledger: Receives one entry per record of the files.
        size_of: Returns the size of an upright image; None: read from its header.

    Attributes:
        num_input_records: Number of records in the files, used or not.
        record_ids: Id of each used record.
        lengths: Tokens of each record, image tokens included.
        weights: How often each record is seen in an epoch.
        has_image: Whether each record has an image.
        num_images: Images of each record.
        num_crops: Their crops.
        prefix_ids: Equal numbers for records with the same tokens and image up to and including
            their first image, none of them supervised; -1 for records without such a prefix.
        prefix_lengths: Tokens of that prefix.
        prefix_crops: Crops of its image.
        contents: What each file contributed, in order.

    Raises:
        RecordError: The first record that cannot be used, if `on_error` is `stop`.
        UserError: A file cannot be read, or no record is left.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        chat_tokenizer: ChatTokenizer | CachedChatTokenizer,
        image_spec: ImageSpec,
        *,
        layout_rule: LayoutRule,
        config: DataConfig,
        ledger: Ledger,
        size_of: Callable[[ImageSource], Size] | None = None,
    ) -> None:
        self._chat_tokenizer, self._image_spec = chat_tokenizer, image_spec
        self._layout_rule, self._config, self._ledger = layout_rule, config, ledger
        self.num_input_records = 0
        # One entry per record; arrays, because there can be tens of millions of records.
        self.record_ids: list[str] = []
        self.lengths = array("i")
        self.weights: list[float] = []
        self.has_image: list[bool] = []
        self.num_images = array("i")
        self.num_crops = array("i")
        self.prefix_ids = array("q")
        self.prefix_lengths = array("i")
        self.prefix_crops = array("i")
        self._ledger_indices = array("q")
        self._first_images = array("q")  # number of the record's first image in `_image_sizes`
        # One entry per image of all records.
        self._image_sizes = array("q")  # bytes
        # Width and height in pixels, two entries per image; empty if the layouts need no sizes.
        self._image_shapes = array("i")
        self._store = RecordStore()
        self._features: FeatureStore | None = None
        self.contents: list[FileContent] = []
        self._read(files, size_of)

    def __len__(self) -> int:
        return len(self.record_ids)

    def __getitem__(self, index: int) -> Example:
        """Return an example; raise RecordError if one of its images cannot be loaded."""
        return self.example(index)

    def example(self, index: int, *, first_image: int = 0) -> Example:
        """Return an example with the pixels or features of its images from `first_image` on."""
        ids, labels = self._expanded(index)
        features = self._image_features(index, first_image)
        num_images, size = self.num_images[index], self._image_spec.size
        pixels = torch.empty(0, 3, size, size, dtype=torch.uint8)
        if features is None and first_image < num_images:
            numbers = range(first_image, num_images)
            pixels = torch.cat([self.pixels(index, number) for number in numbers])
        return Example(
            record_id=self.record_ids[index],
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            pixel_values=pixels,
            image_features=features,
            layouts=self.layouts(index)[first_image:],
        )

    # --- reading the files

    def _read(
        self, files: Sequence[DataFile], size_of: Callable[[ImageSource], Size] | None
    ) -> None:
        record_filter = RecordFilter(
            self._chat_tokenizer,
            layout_rule=self._layout_rule,
            config=self._config,
            size_of=size_of,
        )
        num_entries_before = len(self._ledger.entries)
        prefixes: dict[bytes, int] = {}
        for file in files:
            records, digest, num_before = open_records(file), hashlib.sha256(), len(self)
            image_root = str(records.image_root)
            description = f"reading {Path(file.path).name}"
            tracked = track(records.conversations, records.total, description)
            for result in record_filter.filter_all(tracked):
                self.num_input_records += 1
                if result.error is not None and self._config.on_error == "stop":
                    raise result.error
                self._ledger.entries.append(result.entry)
                if result.record is not None and result.tokenized is not None:
                    self._append(result, result.record, result.tokenized, prefixes)
                    self.weights.append(file.weight)
                    digest.update(_content_of(result.record, result.tokenized, image_root))
            self.contents.append(FileContent(len(self) - num_before, digest.hexdigest()))
        self._store.finish()
        self._ledger.add_up(num_entries_before + self.num_input_records)
        if not self.record_ids:
            names = ", ".join(file.path for file in files)
            raise UserError(
                f"{names}: no record to train on; {self._ledger.summary()}", code="no_records"
            )

    def _append(
        self,
        result: FilterResult,
        record: Conversation,
        tokenized: TokenizedRecord,
        prefixes: dict[bytes, int],
    ) -> None:
        self._store.append(record, tokenized)
        self.record_ids.append(record.id)
        self.lengths.append(result.length)
        self.has_image.append(bool(record.images))
        self.num_images.append(len(record.images))
        self._ledger_indices.append(len(self._ledger.entries) - 1)
        self._first_images.append(len(self._image_sizes))
        self._image_sizes.extend(map(_num_bytes, record.images))
        self._image_shapes.extend(side for size in result.sizes for side in size)
        self.num_crops.append(num_crops(result.layouts))
        prefix = shared_prefix(record, tokenized, result.layouts)
        digest, length = prefix or (b"", 0)
        self.prefix_ids.append(prefixes.setdefault(digest, len(prefixes)) if digest else -1)
        self.prefix_lengths.append(length)
        self.prefix_crops.append(result.layouts[0].num_crops if digest else 0)

    # --- one record

    def _expanded(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and labels with each image's placeholder repeated for its tokens."""
        ids, supervised = self._store.tokens(index)
        ids = ids.astype(np.int64)
        is_image = ids == IMAGE_TOKEN_ID
        labels = np.where(supervised & ~is_image, ids, IGNORE_INDEX)
        times = np.ones_like(ids)
        times[is_image] = [layout.num_tokens for layout in self.layouts(index)]
        return np.repeat(ids, times), np.repeat(labels, times)

    def token_ids(self, index: int) -> list[int]:
        """Return a record's ids, with `IMAGE_TOKEN_ID` at the positions of images."""
        return [int(token) for token in self._expanded(index)[0]]

    def layouts(self, index: int) -> tuple[ImageLayout, ...]:
        """Return the layout of each image of a record."""
        first, count = self._first_images[index], self.num_images[index]
        shapes: Sequence[int] = self._image_shapes[2 * first : 2 * (first + count)]
        if not self._layout_rule.needs_sizes:
            shapes = [0] * (2 * count)
        return self._layout_rule.layouts(list(zip(shapes[::2], shapes[1::2], strict=True)))

    def conversation(self, index: int) -> Conversation:
        """Return a record as it is trained on, that is, after turns were dropped."""
        return self._store.conversation(index)

    def pixels(self, index: int, number: int) -> Tensor:
        """Return the crops of a record's image, uint8 [crops, 3, H, W]; `number` counts from 0.

        Raises:
            RecordError: The image is missing, broken or changed.
        """
        image = self.image_crops(index, number, num_images=self.num_images[index])
        if image.layout != self.layouts(index)[number]:
            with self._errors_of_record(index):
                raise ImageError(
                    "image_changed",
                    f"{_shown(self._store.image(index, number))}: has another width and height "
                    "than when the run read its records; put the old file back, or start a new run",
                )
        return image.pixels

    def image_crops(self, index: int, number: int, *, num_images: int) -> ImageCrops:
        """Return a record's image as that of a record with `num_images` images.

        Raises:
            RecordError: The image is missing, broken or changed.
        """
        with self._errors_of_record(index):
            return self._read_crops(self._unchanged_image(index, number), num_images)

    def _read_crops(self, source: ImageSource, num_images: int) -> ImageCrops:
        return read_crops(
            source,
            self._layout_rule,
            self._image_spec,
            self._config.image_aspect,
            self._config.image_processing,
            num_images=num_images,
        )

    def quarantine(self, index: int, reason: str, message: str) -> bool:
        """Move a record that cannot be loaded to the quarantined ones in the ledger.

        Returns:
            Whether it was not there before.
        """
        entries, position = self._ledger.entries, self._ledger_indices[index]
        if entries[position].bucket == "quarantined":
            return False
        entries[position] = dataclasses.replace(
            entries[position], bucket="quarantined", reason=reason, message=message
        )
        return True

    def broken_images(self) -> list[RecordError]:
        """Open every image; return an error per record with an image that cannot be loaded."""
        errors = []
        for index in track(range(len(self)), description="opening images"):
            try:
                for number in range(self.num_images[index]):
                    self.pixels(index, number)
            except RecordError as error:
                errors.append(error)
        return errors

    # --- images of all records, and cached features of them

    def images(self) -> Iterator[ImageSource]:
        """Yield every image of every record, in order."""
        for index in range(len(self)):
            for number in range(self.num_images[index]):
                yield self._store.image(index, number)

    def image(self, number: int) -> ImageSource:
        """Return the image with this number in `images()`."""
        index = bisect_right(self._first_images, number) - 1
        return self._store.image(index, number - self._first_images[index])

    def all_layouts(self) -> Iterator[ImageLayout]:
        """Yield the layout of every image, in the order of `images()`."""
        for index in range(len(self)):
            yield from self.layouts(index)

    def crops(self, number: int, data: bytes) -> ImageCrops:
        """Return the crops and the layout of the image with this number in `images()`.

        Args:
            number: Of the image.
            data: Its bytes.

        Raises:
            ImageError: The image is broken.
        """
        index = bisect_right(self._first_images, number) - 1
        return self._read_crops(data, self.num_images[index])

    def use_features(self, store: FeatureStore, digests: Sequence[bytes | None]) -> None:
        """Load cached features from now on, instead of opening images.

        Args:
            store: The cached features.
            digests: Key in the store of each image, in the order of `images()`; None for an image
                without features, whose record then raises as if there were no store.
        """
        self._features = store
        self._has_features = np.array([digest is not None for digest in digests], dtype=np.bool_)
        flat = b"".join(digest or bytes(32) for digest in digests)
        self._digests = np.frombuffer(flat, dtype=np.uint8).reshape(-1, 32)

    def _image_features(self, index: int, first_image: int) -> Tensor | None:
        """Return features [n, tokens, width] from an image on; None if none are used."""
        store, num_images = self._features, self.num_images[index]
        if store is None or first_image >= num_images:
            return None
        numbers = range(first_image, num_images)
        return torch.cat([self._feature(store, index, number) for number in numbers])

    def _feature(self, store: FeatureStore, index: int, number: int) -> Tensor:
        position = self._first_images[index] + number
        with self._errors_of_record(index):
            source = self._unchanged_image(index, number)
            if not self._has_features[position]:
                self.pixels(index, number)  # raises what is wrong with the image
                raise ImageError(
                    "image_changed",
                    f"{source!s}: could not be opened when features were computed, but can be "
                    "now; repeat the command",
                )
        crops = self.layouts(index)[number].num_crops
        return store.read(self._digests[position].tobytes(), crops)

    def _unchanged_image(self, index: int, number: int) -> ImageSource:
        """Return an image whose size in bytes is still that of the start of the run."""
        source = self._store.image(index, number)
        expected, found = self._image_sizes[self._first_images[index] + number], _num_bytes(source)
        if found in (expected, -1):
            return source
        raise ImageError(
            "image_changed",
            f"{source!s}: has {found:,} bytes, but had {expected:,} when the run read its records; "
            "put the old file back, or start a new run",
        )

    @contextmanager
    def _errors_of_record(self, index: int) -> Iterator[None]:
        """Convert an ImageError into a RecordError that names the record and its file."""
        try:
            yield
        except ImageError as error:
            record_id, where = self.record_ids[index], self._store.where(index)
            raise RecordError(error.reason, str(error), record_id=record_id, where=where) from None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a loader process needs, which excludes the tokenizer and the ledger."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_chat_tokenizer", "_ledger")}


def _shown(source: ImageSource) -> str:
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _num_bytes(source: ImageSource) -> int:
    """Return an image's size; -1 for a file without one, for which opening raises the error."""
    try:
        return len(source) if isinstance(source, bytes) else file_size(source)
    except (OSError, ValueError):
        return -1


# --- prefixes that records share


def shared_prefix(
    record: Conversation, tokenized: TokenizedRecord, layouts: Sequence[ImageLayout]
) -> tuple[bytes, int] | None:
    """Return the prefix up to and including the first image, which other records can share.

    Returns:
        A digest of its tokens and image, and its length in tokens. None if there is no image, if
        a token of the prefix is supervised, or if nothing follows it.
    """
    if not record.images:
        return None
    end = tokenized.input_ids.index(IMAGE_TOKEN_ID) + 1
    unsupervised = all(label == IGNORE_INDEX for label in tokenized.labels[:end])
    if not unsupervised or end >= len(tokenized.input_ids):
        return None
    digest = _prefix_digest(tokenized.input_ids[:end], record.images[0], layouts[0])
    return digest, end - 1 + layouts[0].num_tokens


def _prefix_digest(ids: Sequence[int], image: ImageSource, layout: ImageLayout) -> bytes:
    # An image can be divided in one record, and not in another that has several images.
    name = b"bytes" + image if isinstance(image, bytes) else b"file" + os.fsencode(image)
    tokens = f"{layout.num_crops} {layout.num_tokens} ".encode()
    return hashlib.sha256(array("q", ids).tobytes() + tokens + name).digest()[:16]


# --- the content of files, to be compared when a run resumes


@dataclass(frozen=True)
class FileContent:
    """The content of one file that a training run depends on.

    Attributes:
        records: Number of used records.
        sha256: Digest of their ids, labels and images, in order. Images count by their path below
            the image folder, or by their bytes if they are embedded; a moved folder or another
            JSON formatting does not change the digest.
    """

    records: int
    sha256: str


def _content_of(record: Conversation, tokenized: TokenizedRecord, image_root: str) -> bytes:
    """Return the bytes of a record that its file's digest is taken over."""
    images = [
        image
        if isinstance(image, bytes)
        else os.path.relpath(str(image), image_root).encode("utf-8", "replace")
        for image in record.images
    ]
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    head = json.dumps([len(tokenized.input_ids), digests]).encode()
    return head + b"".join(
        array("i", ids).tobytes() for ids in (tokenized.input_ids, tokenized.labels)
    )


def content_difference(files: Sequence[str], before: Any, now: Sequence[FileContent]) -> str:
    """Return a sentence about the first file whose content differs from a manifest's."""
    if len(before) != len(now):
        return f"the run was started with {len(before)} files of records, now there are {len(now)}"
    for path, old, new in zip(files, before, now, strict=True):
        if old["sha256"] == new.sha256:
            continue
        if old["records"] != new.records:
            return f"{path} gave {old['records']:,} records, now it gives {new.records:,}"
        return (
            f"{path} gives {new.records:,} records as before, but their texts, their order, their "
            "images or their supervised turns changed"
        )
    return "nothing differs"
