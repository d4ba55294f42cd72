"""Records that occur twice, ids given twice, and held-out images that are trained on too."""

import hashlib
import json
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_sft.data.conversation import Conversation, ImageSource, TextPart


@dataclass(frozen=True)
class Repeat:
    """One kind of repetition that was found.

    Attributes:
        what: For people, with the number of cases.
        first: The first case: two records by file and number, counted from 1.
    """

    what: str
    first: str

    def __str__(self) -> str:
        return f"{self.what}; first: {self.first}"


class Repeats:
    """Notes every record in eight bytes a property, and says at the end what occurred twice.

    Records are alike if their images' bytes, their roles and their texts are.
    """

    def __init__(self) -> None:
        self._train, self._held_out = _Side(), _Side()

    def begin(self, file: str, *, held_out: bool) -> None:
        """The records that come now are of this file."""
        side = self._held_out if held_out else self._train
        side.begin(file)
        self._side = side

    def add(self, record: Conversation | None) -> None:
        """The file's next record; None if it cannot be used."""
        self._side.add(record)

    def found(self) -> list[Repeat]:
        """Every kind of repetition that there is."""
        sides = (("training", self._train), ("held-out", self._held_out))
        repeats = [repeat for name, side in sides for repeat in side.repeats(name)]
        return [*repeats, *self._in_both()]

    @property
    def has_held_out(self) -> bool:
        """Whether there was anything to compare the training records with."""
        return len(self._held_out) > 0

    def _in_both(self) -> list[Repeat]:
        kinds = {
            "held-out records show an image that is trained on too": "images",
            "held-out records without an image are trained on too": "texts",
        }
        found = []
        for words, kind in kinds.items():
            trained, held_out = self._train.noted(kind), self._held_out.noted(kind)
            both = np.isin(held_out.digests, trained.digests)
            if both.any():
                at = int(np.flatnonzero(both)[0])
                other = int(np.flatnonzero(trained.digests == held_out.digests[at])[0])
                pair = (
                    f"{self._held_out.name(int(held_out.owners[at]))} and "
                    f"{self._train.name(int(trained.owners[other]))}"
                )
                found.append(Repeat(f"{len(set(held_out.owners[both])):,} {words}", pair))
        return found


@dataclass(frozen=True)
class _Noted:
    """Digests `[n]` uint64 and the record that each belongs to, `[n]` int64."""

    digests: NDArray[np.uint64]
    owners: NDArray[np.int64]


class _Side:
    """The records of one side, training or held out."""

    def __init__(self) -> None:
        self._files: list[tuple[str, int]] = []
        self._count = 0
        kinds = ("ids", "records", "images", "texts")
        self._digests = {kind: array("Q") for kind in kinds}
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
        self._note("ids", number, _digest(record.id.encode()))
        whole = text + b"".join(d.to_bytes(8, "little") for d in images)
        self._note("records", number, _digest(whole))
        for image in images:
            self._note("images", number, image)
        if not images:
            self._note("texts", number, _digest(text))

    def _note(self, kind: str, number: int, digest: int) -> None:
        self._digests[kind].append(digest)
        self._owners[kind].append(number)

    def noted(self, kind: str) -> _Noted:
        return _Noted(
            np.array(self._digests[kind], dtype=np.uint64),
            np.array(self._owners[kind], dtype=np.int64),
        )

    def name(self, number: int) -> str:
        """`record 3 of train.json`."""
        file, start = next(f for f in reversed(self._files) if f[1] <= number)
        return f"record {number - start + 1:,} of {file}"

    def repeats(self, name: str) -> list[Repeat]:
        """Ids and whole records that occur more than once on this side."""
        words = {
            "ids": f"{name} records have an id that an earlier one has",
            "records": f"{name} records repeat an earlier one, images and words",
        }
        found = []
        for kind, what in words.items():
            noted = self.noted(kind)
            _, first, which = np.unique(noted.digests, return_index=True, return_inverse=True)
            again = np.flatnonzero(first[which] != np.arange(len(which)))
            if len(again):
                earlier, later = first[which[again[0]]], again[0]
                pair = f"{self.name(int(noted.owners[earlier]))} and "
                pair += self.name(int(noted.owners[later]))
                found.append(Repeat(f"{len(again):,} {what}", pair))
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
        return _digest(source.read_bytes())
    except OSError:  # it was there a moment ago; who opens it next will tell
        return _digest(str(source).encode())


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
