"""The command `score`: formats, output, errors."""

import json
from pathlib import Path

import pytest

from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.files import Answers, Row, read_answers, read_rows
from vlm_sft.evaluation.scores.registry import KINDS, score
from vlm_sft.score import main

TRUTH = {"label": "yes", "image_id": 1, "caption": "a dog", "answers": ["a", "b"], "answer": "0",
         "choices": ["a", "b"], "box": [0, 0, 1, 1], "objects": ["dog"], "answerable": True,
         "instruction_id_list": ["punctuation:no_comma"]}  # fmt: skip
"""A question of every kind at once."""


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pope(tmp_path: Path) -> list[str]:
    truth = [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "b.jpg", "text": "Is there a cat?", "label": "no"},
    ]
    said = [{"question_id": 1, "text": "Yes"}, {"question_id": 2, "text": "Yes, a cat."}]
    return [
        "--answers", write(tmp_path / "a.jsonl", *said),
        "--truth", write(tmp_path / "t.jsonl", *truth),
    ]  # fmt: skip


def test_json_and_a_file_hold_the_same_scores(
    pope: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    assert main(["pope", *pope, "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["readings"]["first_word"]["accuracy"] == 0.5
    assert found["readings"]["first_word"]["precision"] == 0.5
    written = json.loads(out.read_text())
    assert written.pop("made_by").startswith("vlm_sft score")
    rows = written.pop("rows")
    assert written == found
    assert [(row["id"], row["image"], row["score"]) for row in rows] == [
        ("1", "a.jpg", 1.0), ("2", "b.jpg", 0.0),
    ]  # fmt: skip


def test_the_table_shows_each_reading(pope: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pope", *pope]) == 0
    shown = capsys.readouterr().out
    assert "first_word" in shown and "precision" in shown and "2 questions" in shown


def test_captions_in_cocos_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = {"images": [], "annotations": [
        {"id": 1, "image_id": 7, "caption": "A dog runs."},
        {"id": 2, "image_id": 7, "caption": "The dog is running fast."},
        {"id": 3, "image_id": 8, "caption": "Two cats sleep on a bed."},
    ]}  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    said = [{"image_id": 7, "caption": "A dog runs."}, {"image_id": 8, "caption": "A red bus."}]
    (tmp_path / "said.json").write_text(json.dumps(said))
    files = ["--answers", str(tmp_path / "said.json"), "--truth", str(tmp_path / "truth.json")]
    assert main(["caption", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["questions"], found["references"], found["unanswered"]) == (2, 3, 0)
    assert found["cider_d"] > 0 and 0 < found["bleu_1"] < 1
    assert "Java" in found["meteor"]


def test_answers_by_id_and_single_objects_are_read(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"1": "a dog", "2": "a cat"}')
    assert read_answers(tmp_path / "map.json").by_id == {"1": "a dog", "2": "a cat"}
    (tmp_path / "one.json").write_text('{"question_id": 3, "text": "x"}')
    assert read_answers(tmp_path / "one.json").by_id == {"3": "x"}
    (tmp_path / "positions.jsonl").write_text('{"answer": "x"}\n{"answer": "y"}\n')
    assert read_answers(tmp_path / "positions.jsonl").by_id == {"0": "x", "1": "y"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("[1]", r"\[0\]: expected a JSON object, found 1"),
        ('[{"question_id": 1}]', "has none of the keys answer, text"),
        ('[{"id": 1, "text": "a"}, {"id": 1, "text": "b"}]', "a second answer to 1 .*0"),
        ('[{"id": 1, "text": ["a"]}]', "is not text"),
        ('[{"id": 1, "text": "a", "answer": "b"}]', "'answer' and 'text' have different values"),
        ('{"id": 1, "text": "a"}\n{broken\n', ":2: "),
    ],
)
def test_bad_answers_are_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "answers.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_answers(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "nowhere.json")


def test_an_input_is_never_the_output(pope: list[str], tmp_path: Path) -> None:
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(UserError):
        main(["pope", *pope, "--out", str(tmp_path / "a.jsonl"), "--overwrite"])
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_an_unknown_kind_is_refused_with_the_known_ones(pope: list[str]) -> None:
    with pytest.raises(UserError, match="expected one of pope, caption"):
        main(["zzz", *pope])


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.judged])
def test_every_kind_has_a_scorer(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no answer belongs to a question"):
        score(kind, Answers(tmp_path / "nothing.json", {}), [Row("t", TRUTH | {"id": "1"})])
