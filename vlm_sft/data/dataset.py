"""Files of records to examples; every record is rendered, measured and accounted for at start."""

import dataclasses
import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlm_sft.config import DataConfig, DataFile
from vlm_sft.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from vlm_sft.data.admission import Admission, Outcome, RecordRenderer, Rendering
from vlm_sft.data.conversation import (
    Conversation,
    ImagePart,
    ImageSource,
    TextPart,
    Turn,
)
from vlm_sft.data.formats import open_records
from vlm_sft.data.images import ImageSpec, open_image, to_pixels
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.spool import Spool, SpoolRef
from vlm_sft.errors import ImageError, RecordError, UserError
from vlm_sft.progress import track


@dataclass(frozen=True)
class Example:
    """One record, ready for a batch.

    Attributes:
        record_id: The record's id.
        input_ids: [T] int64; `IMAGE_TOKEN_ID` once for each image feature.
        labels: [T] int64, unshifted; `IGNORE_INDEX` where there is no loss, always on pictures.
        pixel_values: [n, 3, H, W] float32, the pictures in reading order; n may be 0.
    """

    record_id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor


@dataclass(frozen=True)
class FileContent:
    """What one file gave to train on.

    Attributes:
        records: How many records.
        sha256: Over their ids, labels and pictures' places below the picture folder (or bytes), in
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
            "pictures or what is supervised of them changed"
        )
    return "nothing differs"


class SupervisedDataset(Dataset[Example]):
    """All usable records of some files as `Example`s.

    Construction reads and renders every record once and looks for its pictures' files; ids and
    labels stay in compact arrays, texts and embedded pictures in a temporary file. Pictures are
    opened by indexing.

    Args:
        files: What to read, in order.
        renderer: Makes ids and labels; its RecordErrors are handled like the reader's.
        image_spec: What the tower wants.
        num_image_tokens: Features the tower gives for a picture.
        config: Length limit and policy, what to do with faulty records, picture aspect.
        ledger: Gets one entry for every record of the files.

    Raises:
        RecordError: With `on_error: stop`, the first record that cannot be used.
        UserError: A file cannot be read, or no record is left.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        renderer: RecordRenderer,
        image_spec: ImageSpec,
        *,
        num_image_tokens: int,
        config: DataConfig,
        ledger: Ledger,
    ) -> None:
        self.num_input_records = 0
        self.record_ids: list[str] = []
        self.lengths: list[int] = []
        """Tokens of each record, image tokens included."""
        self.weights: list[float] = []
        """How often each record is seen in an epoch."""
        self.has_image: list[bool] = []
        self.num_pictures = array("i")
        self.prefix_keys = array("q")
        """The same number for records that begin alike up to and with their first picture, none of
        that supervised; -1 where there is no such beginning."""
        self.prefix_lengths = array("i")
        """Tokens of that beginning."""
        self._prefixes: dict[bytes, int] = {}  # their digests, while reading
        self._renderer, self._image_spec = renderer, image_spec
        self._num_image_tokens, self._config, self._ledger = num_image_tokens, config, ledger
        self._wheres: list[str] = []
        self._pictures: list[tuple[str | SpoolRef, ...]] = []
        self._sizes = array("q")  # of all picture files, in bytes
        self._first_sizes = array("q")  # where each record's sizes begin
        self._turns: list[SpoolRef] = []
        self._spool = Spool()
        self._entries = array("q")  # where in the ledger each record stands
        self.contents: list[FileContent] = []
        """What each file gave, in order."""
        self._read(files)

    def __len__(self) -> int:
        return len(self.record_ids)

    def __getitem__(self, index: int) -> Example:
        """The example; raises RecordError naming record and file if a picture is broken."""
        return self.example(index)

    def example(self, index: int, *, first_picture: int = 0) -> Example:
        """As by indexing, but with the pixels of its pictures only from that number on."""
        ids, labels = self._expanded(index)
        return Example(
            record_id=self.record_ids[index],
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            pixel_values=self._pixels(index, first_picture),
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker needs, which is neither tokenizer nor ledger."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_renderer", "_ledger")}

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

    def conversation(self, index: int) -> Conversation:
        """The record as it is trained on, after turns were dropped."""
        turns = tuple(map(_turn_from_json, json.loads(self._spool.read(self._turns[index]))))
        images = tuple(self._source(picture) for picture in self._pictures[index])
        return Conversation(self.record_ids[index], turns, images, self._wheres[index])

    def broken_pictures(self) -> list[RecordError]:
        """Open every picture in full; an error for each record that has a broken one."""
        errors = []
        for index in track(range(len(self)), description="opening pictures"):
            try:
                for number in range(len(self._pictures[index])):
                    self._open(index, number)
            except RecordError as error:
                errors.append(error)
        return errors

    # --- reading

    def _read(self, files: Sequence[DataFile]) -> None:
        admission = Admission(
            self._renderer, num_image_tokens=self._num_image_tokens, config=self._config
        )
        ids, flags, starts = array("i"), array("b"), array("q", [0])
        entries = len(self._ledger.entries)
        for file in files:
            records, digest, first = open_records(file), hashlib.sha256(), len(self.record_ids)
            root = file.image_root or str(Path(file.path).parent)
            description = f"reading {Path(file.path).name}"
            tracked = track(records.conversations, records.total, description)
            for outcome in admission.decide_all(tracked):
                self.num_input_records += 1
                fitted = self._admitted(outcome)
                if fitted is not None:
                    self._keep(*fitted, file.weight)
                    digest.update(_identity(*fitted, root))
                    ids.extend(fitted[1].input_ids)
                    flags.extend(label != IGNORE_INDEX for label in fitted[1].labels)
                    starts.append(len(ids))
            self.contents.append(FileContent(len(self.record_ids) - first, digest.hexdigest()))
        self._prefixes.clear()
        self._spool.flush()
        self._ids = np.array(ids, dtype=np.int32)
        self._supervised = np.array(flags, dtype=np.bool_)
        self._starts = np.array(starts, dtype=np.int64)
        self._ledger.add_up(entries + self.num_input_records)
        if not self.record_ids:
            names = ", ".join(file.path for file in files)
            raise UserError(
                f"{names}: no record to train on; {self._ledger.summary()}", code="no_records"
            )

    def _admitted(self, outcome: Outcome) -> tuple[Conversation, Rendering] | None:
        """The record as it will be trained on; None if it is not. Makes its ledger entry."""
        if outcome.error is not None and self._config.on_error == "stop":
            raise outcome.error
        self._ledger.entries.append(outcome.entry)
        if outcome.kept is None or outcome.rendering is None:
            return None
        return outcome.kept, outcome.rendering

    def _keep(self, record: Conversation, rendering: Rendering, weight: float) -> None:
        self._first_sizes.append(len(self._sizes))
        self._sizes.extend(map(_size, record.images))
        self._entries.append(len(self._ledger.entries) - 1)
        self.record_ids.append(record.id)
        self.lengths.append(rendering.length)
        self.weights.append(weight)
        self.has_image.append(bool(record.images))
        self.num_pictures.append(len(record.images))
        self._note_prefix(record, rendering)
        self._wheres.append(record.where)
        self._turns.append(self._spool.append(_turns_to_json(record.turns)))
        self._pictures.append(
            tuple(
                self._spool.append(source) if isinstance(source, bytes) else str(source)
                for source in record.images
            )
        )

    def _note_prefix(self, record: Conversation, rendering: Rendering) -> None:
        """Whether other records can share what comes up to and with the first picture."""
        key, length = -1, 0
        if record.images:
            end = rendering.input_ids.index(IMAGE_TOKEN_ID) + 1
            unsupervised = all(label == IGNORE_INDEX for label in rendering.labels[:end])
            if unsupervised and end < len(rendering.input_ids):
                digest = _prefix_digest(rendering.input_ids[:end], record.images[0])
                key = self._prefixes.setdefault(digest, len(self._prefixes))
                length = end - 1 + self._num_image_tokens
        self.prefix_keys.append(key)
        self.prefix_lengths.append(length)

    # --- looking

    def _expanded(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, each placeholder repeated for its picture's features."""
        part = slice(self._starts[index], self._starts[index + 1])
        ids = self._ids[part].astype(np.int64)
        is_image = ids == IMAGE_TOKEN_ID
        labels = np.where(self._supervised[part] & ~is_image, ids, IGNORE_INDEX)
        times = np.where(is_image, self._num_image_tokens, 1)
        return np.repeat(ids, times), np.repeat(labels, times)

    def _pixels(self, index: int, first: int) -> Tensor:
        spec, aspect = self._image_spec, self._config.image_aspect
        count = len(self._pictures[index])
        if first >= count:
            return torch.empty(0, 3, spec.size, spec.size)
        images = (self._open(index, number) for number in range(first, count))
        return torch.stack([to_pixels(image, spec, aspect) for image in images])

    def _open(self, index: int, number: int) -> Image.Image:
        """A record's picture of that number."""
        source = self._source(self._pictures[index][number])
        try:
            _require_size(source, self._sizes[self._first_sizes[index] + number])
            return open_image(source)
        except ImageError as error:
            record_id, where = self.record_ids[index], self._wheres[index]
            raise RecordError(error.reason, str(error), record_id=record_id, where=where) from None

    def _source(self, picture: str | SpoolRef) -> ImageSource:
        return self._spool.read(picture) if isinstance(picture, SpoolRef) else Path(picture)


def _size(source: ImageSource) -> int:
    """Bytes of a picture; -1 of a file that cannot be asked, which opening it will tell."""
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


def _prefix_digest(ids: Sequence[int], picture: ImageSource) -> bytes:
    name = b"bytes" + picture if isinstance(picture, bytes) else b"file" + os.fsencode(picture)
    return hashlib.sha256(array("q", ids).tobytes() + name).digest()[:16]


def _identity(record: Conversation, rendering: Rendering, root: str) -> bytes:
    """What of a record a training run depends on."""
    places = (
        s if isinstance(s, bytes) else os.path.relpath(str(s), root).encode("utf-8", "replace")
        for s in record.images
    )
    pictures = [hashlib.sha256(place).hexdigest() for place in places]
    head = json.dumps([len(rendering.input_ids), pictures]).encode()
    return head + b"".join(
        array("i", ids).tobytes() for ids in (rendering.input_ids, rendering.labels)
    )


def _turns_to_json(turns: Sequence[Turn]) -> bytes:
    plain = [
        [t.role, t.supervised, [p.text if isinstance(p, TextPart) else p.index for p in t.parts]]
        for t in turns
    ]
    return json.dumps(plain).encode()


def _turn_from_json(plain: list[Any]) -> Turn:
    role, supervised, parts = plain
    made = (TextPart(part) if isinstance(part, str) else ImagePart(part) for part in parts)
    return Turn(role, tuple(made), supervised)
