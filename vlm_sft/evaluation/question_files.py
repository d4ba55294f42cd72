"""Read questions with known answers: vlm_sft's format, POPE's, and LLaVA's with answers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from vlm_sft.errors import UserError
from vlm_sft.evaluation.json_rows import read_values
from vlm_sft.utils.escape import shortened

FORMAT: Final = (
    '{"id": "1", "image": "a.jpg", "question": "Is there a dog?", "answer": "yes", "kind": '
    '"existence"}, or POPE\'s {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", '
    '"label": "yes"}'
)
"""Examples of rows, for messages."""

_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "id": ("id", "question_id"),
    "image": ("image",),
    "question": ("question", "text"),
    "answer": ("answer", "label"),
    "kind": ("kind", "category"),
}
"""Names of a value: those of vlm_sft first, then those of POPE and of LLaVA's files."""

_ANY_CASE: Final = ("yes", "no")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a JSON list or JSON Lines of questions.

    Returns:
        Rows with the keys `id`, `image`, `question`, `answer` and `kind`. The default `kind` is the
        name of the file.

    Raises:
        UserError: The file is missing or a row is malformed; the message names the row.
    """
    rows = [_row(path, where, value) for where, value in _values(path)]
    if not rows:
        raise UserError(
            f"{path}: expected at least one question, found none; a question is {FORMAT}",
            code="data_file_unreadable",
        )
    return rows


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield every question with its position; some files have them in a list `questions`."""
    missing = "; data_tools.build_coco writes files of questions"
    for where, value in read_values(path, missing=missing, expected=f"; a question is {FORMAT}"):
        if where == "" and isinstance(value, dict) and isinstance(value.get("questions"), list):
            yield from ((f"[{index}]", row) for index, row in enumerate(value["questions"]))
        else:
            yield where, value


def _row(path: Path, where: str, value: Any) -> dict[str, str]:
    place = f"{path}{where}"
    if not isinstance(value, dict):
        _refuse(place, f"found {shortened(repr(value), 80)}, which is not a question")
    row = {"kind": path.stem}
    for name, aliases in _NAMES.items():
        found = next((value[alias] for alias in aliases if alias in value), None)
        if name == "id" and isinstance(found, int) and not isinstance(found, bool):
            found = str(found)
        if isinstance(found, str):
            row[name] = found
        elif name != "kind" or found is not None:
            extra = ""
            if name == "answer" and found is None:
                extra = " (a file without answers, such as LLaVA's, cannot be evaluated)"
            _refuse(place, f"{name!r} is missing or not text{extra}")
    if row["answer"].lower() in _ANY_CASE:
        row["answer"] = row["answer"].lower()
    return row


def _refuse(place: str, what: str) -> NoReturn:
    raise UserError(f"{place}: {what}; expected {FORMAT}", code="data_file_unreadable")
