"""Files of questions with known answers, in the forms that benchmarks publish."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_sft.errors import UserError
from vlm_sft.evaluation.question_files import read_rows

POPE: dict[str, Any] = {"question_id": 1, "image": "a.jpg", "text": "A dog?", "label": "Yes"}
OURS = {"id": "1", "image": "a.jpg", "question": "A dog?", "answer": "yes", "kind": "existence"}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pope.json"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("count", [1, 3])
def test_popes_lines_are_read(tmp_path: Path, count: int) -> None:
    rows = read_rows(written(tmp_path, (json.dumps(POPE) + "\n") * count))
    assert rows == [{**OURS, "kind": "pope"}] * count


@pytest.mark.parametrize(
    "row",
    [
        OURS,
        {**POPE, "category": "existence"},
        {"question_id": "1", "image": "a.jpg", "question": "A dog?", "answer": "yes"}
        | {"category": "existence"},
    ],
)
def test_a_list_of_any_form_gives_the_same_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read_rows(written(tmp_path, json.dumps([row, row], indent=1))) == [OURS, OURS]
    assert read_rows(written(tmp_path, json.dumps({"questions": [row]}, indent=1))) == [OURS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            json.dumps({k: v for k, v in POPE.items() if k != "label"}),
            "'answer' is missing.*without",
        ),
        (
            json.dumps(POPE) + '\n{"question_id": 2}\n',
            "pope.json:2: 'image' is missing or not text",
        ),
        (json.dumps(POPE) + "\n{broken\n", "pope.json:2: not valid JSON"),
        ("[3]", "found 3, which is not a question"),
        ("[]", "at least one question, found none"),
        ("", "at least one question, found none"),
        ("question,answer\n", "not valid JSON"),
        (json.dumps([{**OURS, "image": None}]), "'image' is missing or not text"),
    ],
)
def test_another_form_is_refused_with_an_example(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_rows(written(tmp_path, text))
    assert "\n" not in str(refused.value)
