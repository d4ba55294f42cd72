"""The chosen and the rejected sample of a question, and the outcome of every other one."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.data_tools.coco_files import write_coco
from tests.data_tools.teacher_server import Act, Received, say, served
from vlm_sft.best_of.choosing import Choice, choose
from vlm_sft.best_of.graders import Candidate, Grade, exact_grader, is_right, judge_grader
from vlm_sft.best_of.questions import Question, read_questions
from vlm_sft.best_of.sample_lines import Sample
from vlm_sft.config.schema import DataFile
from vlm_sft.evaluation.judges.asking import JudgeOptions


def asked(tmp_path: Path, *turns: str, image: str | None = None) -> list[Question]:
    roles = ("human", "gpt")
    said = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    if image:
        said[0]["value"] = "<image>\n" + said[0]["value"]
    record = {"id": "q", "conversations": said} | ({"image": image} if image else {})
    (tmp_path / "data.json").write_text(json.dumps([record]))
    return read_questions(DataFile(path=str(tmp_path / "data.json")))[0]


def sampled(question: Question, *texts: str) -> list[Sample]:
    """Samples of these texts; one that ends in `...` was cut."""
    return [
        Sample(question.id, n, text, len(text), not text.endswith("..."))
        for n, text in enumerate(texts)
    ]


def chosen(question: Question, *texts: str) -> Choice:
    (choice,) = choose([question], {question.id: sampled(question, *texts)}, exact_grader())
    return choice


def test_the_most_frequent_right_text_wins_and_the_most_frequent_error_loses(
    tmp_path: Path,
) -> None:
    (question,) = asked(tmp_path, "How many?", "2")
    choice = chosen(question, "3", "Two dogs.", "4", "two", "3", "two", "two...", "")
    assert choice.chosen is not None and choice.chosen.text == "two"
    assert choice.rejected is not None and choice.rejected.text == "3"
    assert choice.receipt() == {
        "id": "q", "outcome": "kept", "sample": 3, "grade": 1.0, "rejected_sample": 0,
        "acceptable": 3, "texts": 4, "duplicates": 2, "cut": 2,
        "why": {"other_answer": 3, "cut": 2},
    }  # fmt: skip


def test_a_question_with_wrong_or_cut_samples_only_keeps_none(tmp_path: Path) -> None:
    (question,) = asked(tmp_path, "How many?", "2")
    choice = chosen(question, "3", "2...")
    assert (choice.outcome, choice.chosen, choice.rejected) == ("none_acceptable", None, None)


def test_every_trained_answer_is_a_question_after_what_was_said_before(tmp_path: Path) -> None:
    first, second = asked(tmp_path, "Color?", "red", "Shape?", "circle", image="a.png")
    assert [first.id, second.id] == ["q/1", "q/2"]
    assert [turn.text.strip() for turn in second.prompt.turns] == ["Color?", "red", "Shape?"]
    assert second.reference == "circle" and len(second.prompt.images) == 1
    assert not second.prompt.turns[1].supervised


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Red.", "red", True),
        ("Yes, there is.", "Yes", True),
        ("Yesterday.", "yes", False),
        ("No.", "yes", False),
        ("There are three cats.", "3", True),
        ("I count 3 and 1 more. The answer is 4.", "4", True),
        ("One here, two there. Answer: three", "So, answer: 3", True),
        ("It is red, so the answer is blue", "red", False),
        ("a red circle", "red", False),
        ("3:45", "3:15", False),
        ("2024-01-01", "2024-12-31", False),
        ("7/8", "7/9", False),
        ("3", "-3", False),
        ("-3", "3", False),
        ("5", ".5", False),
        ("2", "2nd", False),
        ("2", "2 or 3", False),
        ("It ends at 3:45.", "3", False),
        ("3/4 of them", "3", False),
        ("At 3:45 there are two dogs.", "2", True),
        ("I see 21 of them.", "Twenty-one.", True),
        ("There are 1000.", "1,000", True),
    ],
)
def test_what_counts_as_the_record_s_answer(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("I see no dog but a cat, so yes.", "Yes.", True),
        ("I see a cat, so no.", "yes", False),
        ("I see a cat.", "yes", False),
        ("No dog, one cat and two birds, so three animals", "3", True),
        ("Three animals: no dog, one cat and two birds", "3", False),
        ("I see a cat, so no.", "I see a dog, so no.", False),
    ],
)
def test_the_last_verdict_counts_after_reasons(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference, "last") is right


def test_the_verifier_prefers_supported_claims_and_rejects_contradicted_ones(
    tmp_path: Path,
) -> None:
    from data_tools.verify_samples import verifier

    boxes = {1: [("dog", [10, 20, 60, 60], 0), ("cat", [120, 20, 60, 60], 0)]}
    files = write_coco(tmp_path, boxes, {1: ["A dog and a cat."]})
    (question,) = asked(tmp_path, "What is there?", "-", image="images/000000000001.jpg")
    grader = verifier(files["instances"], files["captions"])
    texts = ["There is a bus.", "There is a dog.", "There are a dog and a cat."]
    (choice,) = choose([question], {question.id: sampled(question, *texts)}, grader)
    assert choice.chosen is not None and choice.chosen.text == texts[2]
    assert choice.rejected is not None and choice.rejected.text == texts[0]
    assert choice.right == 2 and sum(choice.why.values()) == 1


def test_the_verifier_keeps_no_sample_of_which_it_supports_nothing(tmp_path: Path) -> None:
    from data_tools.verify_samples import verifier

    files = write_coco(tmp_path, {1: [("dog", [10, 20, 60, 60], 0)]}, {1: ["A dog."]})
    grader = verifier(files["instances"], files["captions"])
    (question,) = asked(tmp_path, "What is there?", "-", image="images/000000000001.jpg")
    (choice,) = choose([question], {question.id: sampled(question, "I see \x1e.")}, grader)
    assert choice.outcome == "none_acceptable" and dict(choice.why) == {"NOTHING_SUPPORTED": 1}
    (question,) = asked(tmp_path, "Is there a dog?", "-", image="images/000000000001.jpg")
    (choice,) = choose([question], {question.id: sampled(question, "Yes.", "No.")}, grader)
    assert choice.chosen is not None and choice.chosen.text == "Yes." and choice.right == 1


def test_a_judge_sees_the_answer_of_the_record_and_its_grade_decides(tmp_path: Path) -> None:
    pytest.importorskip("openai")

    def judge(received: Received) -> Act:
        text = received.body["messages"][0]["content"]
        assert "[reference answer]\na red ball" in text and "What is it?" in text
        grade = "[[9]]" if "crimson" in text else "[[7]]" if "a ball" in text else "no idea"
        return say(grade)

    (question,) = asked(tmp_path, "What is it?", "a red ball")
    with served(judge) as server:
        options = JudgeOptions(server.url, "judge", tmp_path / "judge.jsonl", backoff=0.01)
        texts = ("a ball", "a crimson ball", "blue")
        (choice,) = choose(
            [question], {question.id: sampled(question, *texts)}, judge_grader(options, 8)
        )
    assert choice.chosen is not None and choice.chosen.text == "a crimson ball"
    assert dict(choice.why) == {"low_grade": 1, "not_judged": 1}


def test_texts_are_graded_once_in_one_call(tmp_path: Path) -> None:
    (question,) = asked(tmp_path, "Color?", "red")
    calls: list[list[str]] = []

    def grader(candidates: Sequence[Candidate]) -> list[Grade]:
        calls.append([one.text for one in candidates])
        return [Grade(0.0, True) for _ in candidates]

    choose([question], {question.id: sampled(question, "red", "blue", "red")}, grader)
    assert calls == [["red", "blue"]]
