"""Read files of answers and of true answers in the formats of the field's benchmarks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlm_sft.errors import UserError
from vlm_sft.evaluation.json_rows import read_values
from vlm_sft.utils.escape import shortened

ID_KEYS: Final = ("question_id", "id", "image_id")
ANSWER_KEYS: Final = ("answer", "text", "caption", "prediction", "response", "output")
QUESTION_KEYS: Final = ("question", "prompt")


@dataclass(frozen=True)
class Row:
    """A JSON object of a file, and its position for messages: `answers.jsonl:3`."""

    place: str
    values: Mapping[str, Any]

    def get(self, *names: str) -> Any:
        """Return the value of the first of these keys that the row has, or None."""
        return next((self.values[name] for name in names if name in self.values), None)

    def require(self, *names: str) -> Any:
        """Return the value of the first of these keys that the row has.

        Raises:
            UserError: It has none of them.
        """
        if (value := self.get(*names)) is None:
            raise self.refusal(f"has none of the keys {', '.join(names)}")
        return value

    def text(self, *names: str) -> str:
        """Return a text or number as text; raises as `require`."""
        value = self.require(*names)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.refusal(f"{names[0]!r} is not text: {shortened(repr(value), 60)}")
        return str(value)

    def require_one_value(self, names: Sequence[str]) -> None:
        """Refuse a row with different values under keys that mean the same.

        Raises:
            UserError: Two of the keys have different values.
        """
        found = {name: str(self.values[name]) for name in names if name in self.values}
        if len(set(found.values())) > 1:
            raise self.refusal(f"{' and '.join(map(repr, found))} have different values; keep one")

    def refusal(self, what: str) -> UserError:
        """Return the error that names this row."""
        return UserError(f"{self.place}: {what}", code="data_file_unreadable")


@dataclass(frozen=True)
class Answers:
    """Answers by question id.

    Attributes:
        path: The file.
        by_id: The answers.
        place: Position of each answer in the file.
    """

    path: Path
    by_id: dict[str, str]
    place: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Coverage:
    """How the ids of the answers and of the questions fit together.

    Attributes:
        questions: Number of questions.
        unanswered: Questions without an answer; they count as wrong.
        extra: Answers to other questions, which are not used.
    """

    questions: int
    unanswered: tuple[str, ...]
    extra: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return counts for JSON, with up to five ids of each kind."""
        return {
            "questions": self.questions,
            "unanswered": len(self.unanswered),
            "unanswered_ids": list(self.unanswered[:5]),
            "extra_answers": len(self.extra),
            "extra_ids": list(self.extra[:5]),
        }


def read_rows(path: Path, list_keys: Sequence[str] = ()) -> list[Row]:
    """Read the objects of a JSON list, of JSON Lines, or of a list inside an object.

    Args:
        path: The file.
        list_keys: Keys of an object that hold the list, e.g. `annotations` in COCO's files. An
            object without them whose values are objects is read as rows by id.

    Raises:
        UserError: The file is missing, empty or not of this form.
    """
    rows = [Row(f"{path}{place}", value) for place, value in _objects(path, list_keys)]
    if not rows:
        raise UserError(f"{path}: has no rows", code="data_file_unreadable")
    return rows


def read_answers(path: Path) -> Answers:
    """Read answers: an id (`question_id`, `id`, `image_id`) and a text (`answer`, `text`, ...).

    Also reads an object of answers by id, `{"1": "a dog"}`, and conversations (`turns`, or
    FastChat's `choices`), whose answers get the ids `1-1`, `1-2`, ... A row without an id has its
    position as its id.

    Raises:
        UserError: An id appears twice, or a row has no answer.
    """
    by_id: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, row in enumerate(read_rows(path)):
        row.require_one_value(ID_KEYS[:2])
        row.require_one_value(ANSWER_KEYS)
        name = row.get(*ID_KEYS)
        name = str(number if name is None else name)
        for answer_id, text in _answers_of(row, name):
            if answer_id in by_id:
                raise row.refusal(
                    f"a second answer to {answer_id} (the first is at {places[answer_id]})"
                )
            by_id[answer_id], places[answer_id] = text, row.place
    return Answers(path, by_id, places)


def _answers_of(row: Row, name: str) -> list[tuple[str, str]]:
    """Return the answers of a row by id: one, or one for each turn of a conversation."""
    turns, choices = row.get("turns"), row.get("choices")
    if turns is None and isinstance(choices, list) and len(choices) == 1:
        turns = choices[0].get("turns") if isinstance(choices[0], dict) else None
    if turns is None:
        return [(name, row.text(*ANSWER_KEYS))]
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise row.refusal("'turns' is not a list of texts")
    return [(f"{name}-{number}", text) for number, text in enumerate(turns, 1)]


def match(answers: Answers, questions: Sequence[str]) -> Coverage:
    """Return which questions are answered.

    Args:
        answers: The answers.
        questions: Ids of the questions.

    Raises:
        UserError: Not one answer belongs to a question.
    """
    known = set(questions)
    coverage = Coverage(
        len(questions),
        tuple(name for name in questions if name not in answers.by_id),
        tuple(name for name in answers.by_id if name not in known),
    )
    if len(coverage.unanswered) == len(questions):
        raise UserError(
            f"{answers.path}: no answer belongs to a question: ids are "
            f"{', '.join(list(answers.by_id)[:3])} here and {', '.join(list(questions)[:3])} in "
            "--truth; give answers with the questions' ids (question_id, id or image_id)",
            code="data_file_unreadable",
        )
    return coverage


def unique_ids(rows: Sequence[Row], *names: str) -> dict[str, Row]:
    """Return rows by id; a row without one of the keys `names` has its position as its id.

    Raises:
        UserError: An id appears twice.
    """
    by_id: dict[str, Row] = {}
    for number, row in enumerate(rows):
        value = row.get(*names)
        name = str(number if value is None else value)
        if name in by_id:
            raise row.refusal(f"the id {name} appears twice (first at {by_id[name].place})")
        by_id[name] = row
    return by_id


def _objects(path: Path, list_keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, value in read_values(path):
        if place == "" and isinstance(value, dict):
            yield from _objects_of_dict(path, value, list_keys)
        else:
            yield place, _object(path, place, value)


def _objects_of_dict(
    path: Path, value: dict[str, Any], list_keys: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    found = next((key for key in list_keys if isinstance(value.get(key), list)), None)
    if found is not None:
        for index, item in enumerate(value[found]):
            yield f": {found}[{index}]", _object(path, f": {found}[{index}]", item)
    elif any(key in value for key in (*ID_KEYS, *ANSWER_KEYS)):
        yield "", value
    else:
        for name, item in value.items():
            row = item if isinstance(item, dict) else {"answer": item}
            yield f": {shortened(name, 40)!r}", {"question_id": name, **row}


def _object(path: Path, place: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UserError(
        f"{path}{place}: expected a JSON object, found {shortened(repr(value), 60)}",
        code="data_file_unreadable",
    )
