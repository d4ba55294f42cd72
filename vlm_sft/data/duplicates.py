"""Find duplicate records and ids, and held-out images that are also trained on."""

import hashlib
import json
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_sft.data.conversation import Conversation, ImageSource, TextPart
from vlm_sft.errors import ImageError
from vlm_sft.utils.tar_index import read_member


@dataclass(frozen=True)
class DuplicateReport:
    """One kind of duplicate that was found.

    Attributes:
        what: A sentence with the number of cases.
        first: The first case: two records by file and number, from 1.
    """

    what: str
    first: str

    def __str__(self) -> str:
        return f"{self.what}; first: {self.first}"


class DuplicateFinder:
    """Collects digests of records and reports at the end which of them occur twice.

    Two records are duplicates if the bytes of their images, their roles and their texts are equal.
    A record takes 16 bytes per id, image and text.
    """

    def __init__(self) -> None:
        self._train, self._held_out = _Side(), _Side()

    def begin(self, file: str, *, held_out: bool) -> None:
        """Start a file: the records added next are from it."""
        side = self._held_out if held_out else self._train
        side.begin(file)
        self._side = side

    def add(self, record: Conversation | None) -> None:
        """Add the next record of the file; None if it cannot be used."""
        self._side.add(record)

    def found(self) -> list[DuplicateReport]:
        """Return a report for each kind of duplicate that occurs."""
        sides = (("training", self._train), ("held-out", self._held_out))
        reports = [report for name, side in sides for report in side.duplicates(name)]
        return [*reports, *self._in_both()]

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out records to compare the training records with."""
        return len(self._held_out) > 0

    def _in_both(self) -> list[DuplicateReport]:
        kinds = {
            "held-out records show an image that is trained on too": "images",
            "held-out records without an image are trained on too": "texts",
        }
        found = []
        for words, kind in kinds.items():
            trained, held_out = self._train.digests(kind), self._held_out.digests(kind)
            both = np.isin(held_out.digests, trained.digests)
            if both.any():
                at = int(np.flatnonzero(both)[0])
                other = int(np.flatnonzero(trained.digests == held_out.digests[at])[0])
                pair = (
                    f"{self._held_out.name(int(held_out.owners[at]))} and "
                    f"{self._train.name(int(trained.owners[other]))}"
                )
                found.append(DuplicateReport(f"{len(set(held_out.owners[both])):,} {words}", pair))
        return found


@dataclass(frozen=True)
class _Digests:
    """Digests `[n]` uint64 and the number of the record of each, `[n]` int64."""

    digests: NDArray[np.uint64]
    owners: NDArray[np.int64]


class _Side:
    """The training records, or the held-out records."""

    def __init__(self) -> None:
        self._files: list[tuple[str, int]] = []
        self._count = 0
        kinds = ("ids", "records", "images", "texts")
        self._values = {kind: array("Q") for kind in kinds}
        self._owners = {kind: array("q") for kind in kinds}

    def __len__(self) -> int:
        return self._count

    def begin(self, file: str) -> None:
        self._files.append((file, self._count))

    def add(self, record: Conversation | None) -> None:
        number = self._count
        self._count += 1
        if record is None:
            return
        images = [_image_digest(source) for source in record.images]
        text = _text(record)
        self._add_digest("ids", number, _digest(record.id.encode()))
        content = text + b"".join(d.to_bytes(8, "little") for d in images)
        self._add_digest("records", number, _digest(content))
        for image in images:
            self._add_digest("images", number, image)
        if not images:
            self._add_digest("texts", number, _digest(text))

    def _add_digest(self, kind: str, number: int, digest: int) -> None:
        self._values[kind].append(digest)
        self._owners[kind].append(number)

    def digests(self, kind: str) -> _Digests:
        return _Digests(
            np.array(self._values[kind], dtype=np.uint64),
            np.array(self._owners[kind], dtype=np.int64),
        )

    def name(self, number: int) -> str:
        """Return a record's number and file, e.g. `record 3 of train.json`."""
        file, start = next(f for f in reversed(self._files) if f[1] <= number)
        return f"record {number - start + 1:,} of {file}"

    def duplicates(self, name: str) -> list[DuplicateReport]:
        """Return reports about ids and records that occur more than once."""
        words = {
            "ids": f"{name} records have an id that an earlier one has",
            "records": f"{name} records repeat an earlier one, images and words",
        }
        found = []
        for kind, what in words.items():
            found_digests = self.digests(kind)
            _, first, which = np.unique(
                found_digests.digests, return_index=True, return_inverse=True
            )
            repeated = np.flatnonzero(first[which] != np.arange(len(which)))
            if len(repeated):
                earlier, later = first[which[repeated[0]]], repeated[0]
                pair = f"{self.name(int(found_digests.owners[earlier]))} and "
                pair += self.name(int(found_digests.owners[later]))
                found.append(DuplicateReport(f"{len(repeated):,} {what}", pair))
        return found


def _text(record: Conversation) -> bytes:
    turns = [
        [turn.role, [p.text if isinstance(p, TextPart) else p.index for p in turn.parts]]
        for turn in record.turns
    ]
    return json.dumps(turns).encode()


def _image_digest(source: ImageSource) -> int:
    if isinstance(source, bytes):
        return _digest(source)
    try:
        inside = read_member(source)
        return _digest(source.read_bytes() if inside is None else inside)
    except (OSError, ImageError):  # deleted since it was looked for; opening it reports the error
        return _digest(str(source).encode())


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
