"""Files of records to examples; every record is tokenized, measured and accounted for at start."""

import dataclasses
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm_sft.config.schema import DataConfig, DataFile
from vlm_sft.data.conversation import (
    Conversation,
    ImageSource,
)
from vlm_sft.data.feature_store import FeatureStore
from vlm_sft.data.filtering import RecordFilter
from vlm_sft.data.images import ImageSpec, read_pixels
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.record_store import RecordStore
from vlm_sft.data.records import open_records
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.data.tokenize_cache import CachedChatTokenizer
from vlm_sft.errors import ImageError, RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from vlm_sft.utils.progress import track


@dataclass(frozen=True)
class Example:
    """One record, ready for a batch.

    Attributes:
        record_id: The record's id.
        input_ids: [T] int64; `IMAGE_TOKEN_ID` once for each image feature.
        labels: [T] int64, unshifted; `IGNORE_INDEX` where there is no loss, always on images.
        pixel_values: [n, 3, H, W] uint8, the images in reading order; n may be 0.
        image_features: [n, tokens, width], what the tower made of the images; then there are no
            `pixel_values`.
        shared_prefix_length: Leading tokens, the first image's included, that repeat those of the
            example before this one in its batch. If it is not 0, the first image is not loaded
            again.
    """

    record_id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    image_features: Tensor | None = None
    shared_prefix_length: int = 0


@dataclass(frozen=True)
class FileContent:
    """What one file gave to train on.

    Attributes:
        records: How many records.
        sha256: Over their ids, labels and images' places below the image folder (or bytes), in
            order; neither a moved folder nor another spelling of the same JSON changes it.
    """

    records: int
    sha256: str


def content_difference(files: Sequence[str], before: Any, now: Sequence[FileContent]) -> str:
    """A sentence about the first file whose content differs from what a manifest says."""
    if len(before) != len(now):
        return f"the run was started with {len(before)} files of records, now there are {len(now)}"
    for path, old, new in zip(files, before, now, strict=True):
        if old["sha256"] == new.sha256:
            continue
        if old["records"] != new.records:
            return f"{path} gave {old['records']:,} records, now it gives {new.records:,}"
        return (
            f"{path} gives {new.records:,} records as before, but their texts, their order, their "
            "images or what is supervised of them changed"
        )
    return "nothing differs"


class SupervisedDataset(Dataset[Example]):
    """All usable records of some files as `Example`s.

    Construction reads and tokenizes every record once and looks for its images' files; ids,
    labels, texts and embedded images go to a temporary file, so that a record takes a few hundred
    bytes of memory however long it is. Images are opened by indexing.

    Args:
        files: What to read, in order.
        chat_tokenizer: Makes ids and labels; its RecordErrors are handled like the reader's.
        image_spec: What the tower wants.
        num_image_tokens: Features the tower gives for an image.
        config: Length limit and policy, what to do with faulty records, image aspect.
        ledger: Gets one entry for every record of the files.

    Raises:
        RecordError: With `on_error: stop`, the first record that cannot be used.
        UserError: A file cannot be read, or no record is left.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        chat_tokenizer: ChatTokenizer | CachedChatTokenizer,
        image_spec: ImageSpec,
        *,
        num_image_tokens: int,
        config: DataConfig,
        ledger: Ledger,
    ) -> None:
        self.num_input_records = 0
        self.record_ids: list[str] = []
        self.lengths = array("i")
        """Tokens of each record, image tokens included."""
        self.weights: list[float] = []
        """How often each record is seen in an epoch."""
        self.has_image: list[bool] = []
        self.num_images = array("i")
        self.prefix_ids = array("q")
        """The same number for records that begin alike up to and with their first image, none of
        that supervised; -1 where there is no such beginning."""
        self.prefix_lengths = array("i")
        """Tokens of that beginning."""
        self._prefixes: dict[bytes, int] = {}  # their digests, while reading
        self._chat_tokenizer, self._image_spec = chat_tokenizer, image_spec
        self._num_image_tokens, self._config, self._ledger = num_image_tokens, config, ledger
        self._sizes = array("q")  # of all image files, in bytes
        self._first_sizes = array("q")  # where each record's sizes begin
        self._store = RecordStore()
        self._features: FeatureStore | None = None
        self._entries = array("q")  # where in the ledger each record stands
        self.contents: list[FileContent] = []
        """What each file gave, in order."""
        self._read(files)

    def __len__(self) -> int:
        return len(self.record_ids)

    def __getitem__(self, index: int) -> Example:
        """The example; raises RecordError naming record and file if an image is broken."""
        return self.example(index)

    def example(self, index: int, *, first_image: int = 0) -> Example:
        """As by indexing, but with the pixels of its images only from that number on."""
        ids, labels = self._expanded(index)
        features = self._kept_features(index, first_image)
        return Example(
            record_id=self.record_ids[index],
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            pixel_values=self._pixels(index, first_image if features is None else None),
            image_features=features,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker needs, which is neither tokenizer nor ledger."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_chat_tokenizer", "_ledger")}

    def quarantine(self, index: int, reason: str, message: str) -> bool:
        """Move a record that cannot be loaded after all to where the ledger says so.

        Returns whether it was not there before.
        """
        entries, place = self._ledger.entries, self._entries[index]
        if entries[place].bucket == "quarantined":
            return False
        entries[place] = dataclasses.replace(
            entries[place], bucket="quarantined", reason=reason, message=message
        )
        return True

    def token_ids(self, index: int) -> list[int]:
        """Return a record's ids, `IMAGE_TOKEN_ID` in the places of image tokens."""
        return [int(i) for i in self._expanded(index)[0]]

    def conversation(self, index: int) -> Conversation:
        """The record as it is trained on, after turns were dropped."""
        return self._store.conversation(index)

    def broken_images(self) -> list[RecordError]:
        """Open every image in full; an error for each record that has a broken one."""
        errors = []
        for index in track(range(len(self)), description="opening images"):
            try:
                self._pixels(index, 0)
            except RecordError as error:
                errors.append(error)
        return errors

    # --- images, numbered over all records

    def images(self) -> Iterator[ImageSource]:
        """Every image of every record, in order."""
        for index in range(len(self)):
            for number in range(self.num_images[index]):
                yield self._store.image(index, number)

    def image(self, number: int) -> ImageSource:
        """The image of that number."""
        index = bisect_right(self._first_sizes, number) - 1
        return self._store.image(index, number - self._first_sizes[index])

    def use_features(self, store: FeatureStore, digests: Sequence[bytes | None]) -> None:
        """Load kept features from now on instead of opening images.

        Args:
            store: Where they are.
            digests: sha256 of each image's bytes, None for one that has no features; such a
                record raises as if there were no store.
        """
        self._features = store
        self._has_features = np.array([digest is not None for digest in digests], dtype=np.bool_)
        plain = b"".join(digest or bytes(32) for digest in digests)
        self._digests = np.frombuffer(plain, dtype=np.uint8).reshape(-1, 32)

    # --- reading

    def _read(self, files: Sequence[DataFile]) -> None:
        record_filter = RecordFilter(
            self._chat_tokenizer, num_image_tokens=self._num_image_tokens, config=self._config
        )
        entries = len(self._ledger.entries)
        for file in files:
            records, digest, first = open_records(file), hashlib.sha256(), len(self.record_ids)
            root = file.image_root or str(Path(file.path).parent)
            description = f"reading {Path(file.path).name}"
            tracked = track(records.conversations, records.total, description)
            for result in record_filter.filter_all(tracked):
                self.num_input_records += 1
                if result.error is not None and self._config.on_error == "stop":
                    raise result.error
                self._ledger.entries.append(result.entry)
                if result.record is not None and result.tokenized is not None:
                    self._keep(result.record, result.tokenized, result.length, file.weight)
                    digest.update(_identity(result.record, result.tokenized, root))
            self.contents.append(FileContent(len(self.record_ids) - first, digest.hexdigest()))
        self._prefixes.clear()
        self._store.finish()
        self._ledger.add_up(entries + self.num_input_records)
        if not self.record_ids:
            names = ", ".join(file.path for file in files)
            raise UserError(
                f"{names}: no record to train on; {self._ledger.summary()}", code="no_records"
            )

    def _keep(
        self, record: Conversation, tokenized: TokenizedRecord, length: int, weight: float
    ) -> None:
        self._first_sizes.append(len(self._sizes))
        self._sizes.extend(map(_size, record.images))
        self._entries.append(len(self._ledger.entries) - 1)
        self.record_ids.append(record.id)
        self.lengths.append(length)
        self.weights.append(weight)
        self.has_image.append(bool(record.images))
        self.num_images.append(len(record.images))
        self._note_prefix(record, tokenized)
        self._store.append(record, tokenized)

    def _note_prefix(self, record: Conversation, tokenized: TokenizedRecord) -> None:
        """Whether other records can share what comes up to and with the first image."""
        found = shared_prefix(record, tokenized, num_image_tokens=self._num_image_tokens)
        digest, length = found or (b"", 0)
        known = self._prefixes.setdefault(digest, len(self._prefixes)) if digest else -1
        self.prefix_ids.append(known)
        self.prefix_lengths.append(length)

    # --- looking

    def _expanded(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, each placeholder repeated for its image's features."""
        ids, supervised = self._store.tokens(index)
        ids = ids.astype(np.int64)
        is_image = ids == IMAGE_TOKEN_ID
        labels = np.where(supervised & ~is_image, ids, IGNORE_INDEX)
        times = np.where(is_image, self._num_image_tokens, 1)
        return np.repeat(ids, times), np.repeat(labels, times)

    def _pixels(self, index: int, first: int | None) -> Tensor:
        """A record's images from that number on, uint8 [n, 3, H, W]; None: none of them."""
        count, size = self.num_images[index], self._image_spec.size
        if first is None or first >= count:
            return torch.empty(0, 3, size, size, dtype=torch.uint8)
        return torch.stack([self.pixels(index, number) for number in range(first, count)])

    def pixels(self, index: int, number: int) -> Tensor:
        """Return a record's image of that number, uint8 [3, H, W].

        Raises:
            RecordError: The image is missing, broken or changed; the record is named.
        """
        spec, config = self._image_spec, self._config
        with self._told_of(index):
            source = self._checked_source(index, number)
            return read_pixels(source, spec, config.image_aspect, config.image_processing)

    def _kept_features(self, index: int, first: int) -> Tensor | None:
        """Features of a record's images [n, tokens, width] from one on; None if there is none."""
        store, count = self._features, self.num_images[index]
        if store is None or first >= count:
            return None
        return torch.stack([self._feature(store, index, number) for number in range(first, count)])

    def _feature(self, store: FeatureStore, index: int, number: int) -> Tensor:
        place = self._first_sizes[index] + number
        with self._told_of(index):
            source = self._checked_source(index, number)
            if not self._has_features[place]:
                self.pixels(index, number)  # tells what is wrong with it
                raise ImageError(
                    "image_changed",
                    f"{source!s}: could not be opened when features were computed, but can be "
                    "now; repeat the command",
                )
        return store.read(self._digests[place].tobytes())

    def _checked_source(self, index: int, number: int) -> ImageSource:
        source = self._store.image(index, number)
        _require_size(source, self._sizes[self._first_sizes[index] + number])
        return source

    @contextmanager
    def _told_of(self, index: int) -> Iterator[None]:
        """While it holds, an image's fault is the record's."""
        try:
            yield
        except ImageError as error:
            record_id, where = self.record_ids[index], self._store.where(index)
            raise RecordError(error.reason, str(error), record_id=record_id, where=where) from None


def _size(source: ImageSource) -> int:
    """Bytes of an image; -1 of a file that cannot be asked, which opening it will tell."""
    try:
        return len(source) if isinstance(source, bytes) else os.stat(source).st_size
    except (OSError, ValueError):
        return -1


def _require_size(source: ImageSource, expected: int) -> None:
    found = _size(source)
    if found != expected and found != -1:
        raise ImageError(
            "image_changed",
            f"{source!s}: has {found:,} bytes, but had {expected:,} when the run read its records; "
            "put the old file back, or start a new run",
        )


def shared_prefix(
    record: Conversation, tokenized: TokenizedRecord, *, num_image_tokens: int
) -> tuple[bytes, int] | None:
    """What other records may begin with too, up to and with the first image.

    Returns:
        A digest of it and its tokens; None where there is no image, something of it is
        supervised, or nothing follows.
    """
    if not record.images:
        return None
    end = tokenized.input_ids.index(IMAGE_TOKEN_ID) + 1
    unsupervised = all(label == IGNORE_INDEX for label in tokenized.labels[:end])
    if not unsupervised or end >= len(tokenized.input_ids):
        return None
    digest = _prefix_digest(tokenized.input_ids[:end], record.images[0])
    return digest, end - 1 + num_image_tokens


def _prefix_digest(ids: Sequence[int], image: ImageSource) -> bytes:
    name = b"bytes" + image if isinstance(image, bytes) else b"file" + os.fsencode(image)
    return hashlib.sha256(array("q", ids).tobytes() + name).digest()[:16]


def _identity(record: Conversation, tokenized: TokenizedRecord, root: str) -> bytes:
    """What of a record a training run depends on."""
    places = (
        s if isinstance(s, bytes) else os.path.relpath(str(s), root).encode("utf-8", "replace")
        for s in record.images
    )
    images = [hashlib.sha256(place).hexdigest() for place in places]
    head = json.dumps([len(tokenized.input_ids), images]).encode()
    return head + b"".join(
        array("i", ids).tobytes() for ids in (tokenized.input_ids, tokenized.labels)
    )
