"""Read what decisions are made by: a few numbers per sample and per turn, never their texts."""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.digests import hashed
from data_tools.instruct.clean import texts
from data_tools.instruct.clean.choices import VALUES, Categories, choice_of, group_of
from data_tools.instruct.clean.codes import KEPT, MEANINGS
from data_tools.instruct.clean.near_duplicates import Signatures
from data_tools.instruct.config import CleanConfig
from data_tools.instruct.schema import Kind, Sample, SampleType

NO_GROUP: Final = -1

_TYPES: Final = get_args(SampleType)
_ORIGINS: Final = get_args(Sample.model_fields["origin"].annotation)
_KINDS: Final = get_args(Kind)
_SAMPLE_COLUMNS: Final = {
    "offset": "q", "image": "q", "type": "b", "origin": "b", "size": "I", "order": "Q",
}  # fmt: skip
_TURN_COLUMNS: Final = {
    "sample": "i", "kind": "b", "question": "Q", "opening": "Q", "group": "i", "value": "b",
    "refers_back": "b", "order": "Q",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Columns over samples and turns, in the order of the file; decisions change them in place.

    Attributes:
        samples: `offset` in the file, `image` id, `type`, `origin`, `size` (shingles of the
            compared text), `order` (random, by seed and id), `code` (`KEPT` or why it is dropped),
            `cause` (number of the sample that it repeats, or -1), `similarity` to that.
        turns: Number of the `sample`, `kind`, `question` (digest of images and question), `opening`
            (digest of the answer's first words; 0 for short answers), `group` (row of `groups`, or
            `NO_GROUP`), `value` (place of the answer in its family), `refers_back`, and `order`,
            `code` and `cause` as above.
        groups: `family`, `kind` and `categories` of multiple-choice questions.
        signatures: Signatures of the samples that are compared across images.
        more_images: Of samples about several images, those after the first one, by number.
    """

    samples: pd.DataFrame
    turns: pd.DataFrame
    groups: pd.DataFrame
    signatures: Signatures | None
    more_images: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def images(self) -> list[int]:
        """Return the ids of all images, each once, in the order of the samples."""
        found: dict[int, None] = {}
        for number, image in enumerate(self.samples["image"].tolist()):
            found.update(dict.fromkeys((image, *self.more_images.get(number, ()))))
        return list(found)

    @property
    def live(self) -> pd.Series:
        """Whether each turn is still kept."""
        dropped = (self.samples["code"] != KEPT).to_numpy()
        return (self.turns["code"] == KEPT) & ~dropped[self.turns["sample"].to_numpy()]

    @property
    def live_samples(self) -> NDArray[np.bool_]:
        """Whether each sample has a turn that is still kept."""
        return self.samples.index.isin(self.turns["sample"][self.live])

    def live_turns(self) -> pd.DataFrame:
        """Return the kept turns with their type, and whether they are `free` to be dropped.

        A turn to which the next kept turn refers back is not free.
        """
        turns = self.turns[self.live].copy()
        after = turns[["sample", "refers_back"]].shift(-1)
        turns["free"] = ~((after["sample"] == turns["sample"]) & (after["refers_back"] == 1))
        turns["type"] = self.samples["type"].array[turns["sample"].to_numpy()]
        return turns

    def num_bytes(self) -> int:
        """Return the memory of all columns."""
        frames = (self.samples, self.turns)
        more = self.signatures.num_bytes() if self.signatures else 0
        return more + sum(int(frame.memory_usage(index=False).sum()) for frame in frames)


def read_table(
    samples: Iterable[tuple[Sample, int]], config: CleanConfig, categories: Categories, seed: int
) -> Table:
    """Read samples, given with their byte offsets in the file."""
    near = config.near_duplicates
    signatures = Signatures(near.threshold) if near else None
    rows = {name: array(code) for name, code in _SAMPLE_COLUMNS.items()}
    turns = {name: array(code) for name, code in _TURN_COLUMNS.items()}
    groups: dict[tuple[str, str, str], int] = {}
    more_images: dict[int, tuple[int, ...]] = {}
    for number, (sample, offset) in enumerate(samples):
        size = 0
        if near is not None and signatures is not None:
            words = texts.words(texts.compared(sample.turns, sample.type))
            size = len(texts.shingles(words, near.shingle_words))
            if sample.origin in near.across_origins and len(words) >= near.across_words:
                signatures.add(number, words, near.shingle_words)
        ids = tuple(image.id for image in sample.images)
        if len(ids) > 1:
            more_images[number] = ids[1:]
        order = hashed(seed, "sample", sample.id)
        _append(
            rows,
            (
                offset,
                sample.image.id,
                _TYPES.index(sample.type),
                _ORIGINS.index(sample.origin),
                size,
                order,
            ),
        )
        for place, turn in enumerate(sample.turns):
            question = " ".join(texts.words(turn.question))
            opening = config.openings and texts.opening(turn.answer, config.openings.min_words)
            group, value = NO_GROUP, 0
            choice = choice_of(turn)
            if choice is not None and choice.family in config.answers.families:
                value = choice.value
                group = groups.setdefault(group_of(turn, choice, categories), len(groups))
            _append(
                turns,
                (
                    number,
                    _KINDS.index(turn.kind),
                    hashed(*ids, question),
                    opening_digest(opening) if opening else 0,
                    group,
                    value,
                    place > 0 and texts.refers_back(turn.question),
                    hashed(seed, "turn", sample.id, place),
                ),
            )
    frames = [_frame(columns) for columns in (rows, turns)]
    frames[0]["type"] = pd.Categorical.from_codes(frames[0]["type"], _TYPES)
    frames[0]["origin"] = pd.Categorical.from_codes(frames[0]["origin"], _ORIGINS)
    frames[0]["similarity"] = np.float32(0)
    frames[1]["kind"] = pd.Categorical.from_codes(frames[1]["kind"], _KINDS)
    names = pd.DataFrame(list(groups), columns=["family", "kind", "categories"])
    return Table(frames[0], frames[1], names, signatures, more_images)


def _append(columns: "dict[str, array[int]]", row: Iterable[int]) -> None:
    for column, value in zip(columns.values(), row, strict=True):
        column.append(value)


def _frame(columns: "dict[str, array[int]]") -> pd.DataFrame:
    # The type by its size: NumPy's type for array("Q") is another one than uint64.
    arrays = {name: np.array(column) for name, column in columns.items()}
    frame = pd.DataFrame({name: a.astype(a.dtype.str) for name, a in arrays.items()})
    codes = np.zeros(len(frame), np.int8)
    frame["code"] = pd.Categorical.from_codes(codes, [KEPT, *MEANINGS])
    frame["cause"] = np.int32(-1)
    return frame


def opening_digest(opening: str) -> int:
    """Return the digest of an opening, which is never 0."""
    return hashed(opening) | 1


def family_values(family: str) -> tuple[str, ...]:
    """Return the answers of a group's family, such as `option_of_3`."""
    if family.startswith("option_of_"):
        return VALUES["option"][: int(family.removeprefix("option_of_"))]
    return VALUES[family]  # type: ignore[index]


class SampleFile:
    """Reads single samples of a file again, by their byte offsets."""

    def __init__(self, path: Path, offsets: Any) -> None:
        self._file = path.open("rb")
        self._offsets = offsets

    def read(self, number: int) -> Sample:
        """Return a sample; it was valid when the table was read."""
        self._file.seek(self._offsets[number])
        return Sample.model_validate_json(self._file.readline())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def line_offsets(path: Path) -> Iterator[int]:
    """Yield the byte offset of each line."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset
            offset += len(line)
