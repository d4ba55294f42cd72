"""What is kept of every sample while all of them are looked at: a few numbers, never its text."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean import texts
from data_tools.instruct.clean.choices import VALUES, Categories, choice_of, group_of
from data_tools.instruct.clean.near import Signatures
from data_tools.instruct.config import CleanConfig
from data_tools.instruct.schema import Sample, SampleType, Turn

TYPES: Final[tuple[SampleType, ...]] = get_args(SampleType)

NO_GROUP: Final = -1


class Reader:
    """Reads samples again by their number in the file."""

    def __init__(self, path: Path, offsets: NDArray[np.int64]) -> None:
        self._file = path.open("rb")
        self._offsets = offsets

    def sample(self, number: int) -> Sample:
        """The sample; it was valid when the file was read."""
        self._file.seek(self._offsets[number])
        return Sample.model_validate_json(self._file.readline())

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


@dataclass(frozen=True)
class Table:
    """Columns over samples `[n]` and over turns `[m]`, in the order of the file.

    Attributes:
        offsets: Byte at which each sample begins in the file.
        images: Image id.
        types: Place in `TYPES`.
        sizes: Number of shingles of the compared text.
        orders: A random number of each sample that depends on the seed and its id alone.
        first_turns: Place of each sample's first turn `[n + 1]`.
        signatures: Of those samples that are compared across images.
        questions: Digest of image and question.
        openings: Digest of the answer's opening; 0 for short answers.
        groups: Place in `group_names`, `NO_GROUP` for open questions.
        values: The answer's place among its family's.
        leans: Whether the question refers back.
        turn_orders: As `orders`.
        group_names: Family, kind and categories of each group.
        sample_codes, turn_codes: Places in `codes.CODES`; changed as decisions fall.
        causes: The sample that one repeats, -1 for none.
        likeness: How much, from 0 to 1.
    """

    offsets: NDArray[np.int64]
    images: NDArray[np.int64]
    types: NDArray[np.uint8]
    sizes: NDArray[np.uint32]
    orders: NDArray[np.uint64]
    first_turns: NDArray[np.int64]
    signatures: Signatures | None
    questions: NDArray[np.uint64]
    openings: NDArray[np.uint64]
    groups: NDArray[np.int32]
    values: NDArray[np.uint8]
    leans: NDArray[np.bool_]
    turn_orders: NDArray[np.uint64]
    group_names: tuple[tuple[str, str, str], ...]
    sample_codes: NDArray[np.uint8]
    turn_codes: NDArray[np.uint8]
    causes: NDArray[np.int32]
    turn_causes: NDArray[np.int32]
    likeness: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def owners(self) -> NDArray[np.int32]:
        """The sample that each turn belongs to."""
        counts = np.diff(self.first_turns)
        return np.repeat(np.arange(len(self), dtype=np.int32), counts)

    def live_turns(self) -> NDArray[np.bool_]:
        """Turns that nothing has set aside yet."""
        return (self.turn_codes == 0) & (self.sample_codes[self.owners] == 0)

    def live_samples(self) -> NDArray[np.bool_]:
        """Samples with at least one such turn."""
        live = np.zeros(len(self), dtype=np.bool_)
        live[self.owners[self.live_turns()]] = True
        return live

    def bytes(self) -> int:
        """Memory of all columns."""
        columns = [value for value in vars(self).values() if isinstance(value, np.ndarray)]
        more = self.signatures.bytes() if self.signatures else 0
        return sum(column.nbytes for column in columns) + more


class TableBuilder:
    """Takes the samples one by one; `finished` gives the table."""

    def __init__(self, config: CleanConfig, categories: Categories, seed: int) -> None:
        self._config, self._categories, self._seed = config, categories, seed
        self._groups: dict[tuple[str, str, str], int] = {}
        self._families = {str(family) for family in config.answers.families}
        near = config.near_duplicates
        self._signatures = Signatures(near.threshold) if near else None
        self._samples = {name: array(code) for name, code in _SAMPLE_COLUMNS.items()}
        self._turns = {name: array(code) for name, code in _TURN_COLUMNS.items()}
        self._first_turns = array("q", [0])

    def add(self, sample: Sample, offset: int) -> None:
        """The file's next sample, which begins at this byte."""
        columns = self._samples
        columns["offsets"].append(offset)
        columns["images"].append(sample.image.id)
        columns["types"].append(TYPES.index(sample.type))
        columns["orders"].append(texts.digest(self._seed, "sample", sample.id))
        columns["sizes"].append(self._sign(sample))
        for number, turn in enumerate(sample.turns):
            self._add_turn(sample, number, turn)
        self._first_turns.append(len(self._turns["questions"]))

    def _sign(self, sample: Sample) -> int:
        near = self._config.near_duplicates
        if near is None or self._signatures is None:
            return 0
        words = texts.words(texts.compared(sample.turns, sample.type))
        if sample.origin in near.across_origins and len(words) >= near.across_words:
            number = len(self._samples["offsets"]) - 1
            self._signatures.add(number, words, near.shingle_words)
        return len(texts.shingles(words, near.shingle_words))

    def _add_turn(self, sample: Sample, number: int, turn: Turn) -> None:
        columns, openings = self._turns, self._config.openings
        question = " ".join(texts.words(turn.question))
        opening = texts.opening(turn.answer, openings.min_words) if openings else None
        group, value = self._choice(turn)
        columns["questions"].append(texts.digest(sample.image.id, question))
        columns["openings"].append(texts.digest(opening) | 1 if opening else 0)
        columns["groups"].append(group)
        columns["values"].append(value)
        columns["leans"].append(number > 0 and texts.refers_back(turn.question))
        columns["turn_orders"].append(texts.digest(self._seed, "turn", sample.id, number))

    def _choice(self, turn: Turn) -> tuple[int, int]:
        choice = choice_of(turn)
        if choice is None or choice.family not in self._families:
            return NO_GROUP, 0
        name = group_of(turn, choice, self._categories)
        return self._groups.setdefault(name, len(self._groups)), choice.value

    def finished(self) -> Table:
        """The table, with nothing set aside yet."""
        num_samples, num_turns = len(self._samples["offsets"]), len(self._turns["questions"])
        samples = {name: _array(column) for name, column in self._samples.items()}
        turns = {name: _array(column) for name, column in self._turns.items()}
        turns["leans"] = turns["leans"].astype(np.bool_)
        return Table(
            **samples,
            **turns,
            first_turns=_array(self._first_turns),
            signatures=self._signatures,
            group_names=tuple(self._groups),
            sample_codes=np.zeros(num_samples, np.uint8),
            turn_codes=np.zeros(num_turns, np.uint8),
            causes=np.full(num_samples, -1, np.int32),
            turn_causes=np.full(num_turns, -1, np.int32),
            likeness=np.zeros(num_samples, np.float32),
        )


_SAMPLE_COLUMNS: Final = {
    "offsets": "q",
    "images": "q",
    "types": "B",
    "sizes": "I",
    "orders": "Q",
}
_TURN_COLUMNS: Final = {
    "questions": "Q",
    "openings": "Q",
    "groups": "i",
    "values": "B",
    "leans": "B",
    "turn_orders": "Q",
}


def _array(column: "array[int]") -> Any:
    return np.array(column)


def family_values(family: str) -> tuple[str, ...]:
    """The answers of a group's family, `option_of_3` included."""
    if family.startswith("option_of_"):
        return VALUES["option"][: int(family.removeprefix("option_of_"))]
    return VALUES[family]  # type: ignore[index]


def line_offsets(path: Path) -> Iterator[int]:
    """The byte at which each line begins."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset
            offset += len(line)
