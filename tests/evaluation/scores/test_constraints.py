"""Instructions that can be checked, against IFEval's code; refusals."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.constraint_checks import CHECKS, Arguments, count_sentences
from vlm_sft.evaluation.scores.constraints import score_constraints
from vlm_sft.evaluation.scores.files import Answers, Row
from vlm_sft.evaluation.scores.refusal import score_refusal, stance_of
from vlm_sft.evaluation.scores.results import Options

GOLDEN = Path(__file__).parents[2] / "golden" / "scores"


def golden_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(by_id: dict[str, str]) -> Answers:
    return Answers(Path("answers.jsonl"), by_id)


def test_checks_agree_with_ifevals_code_on_random_answers() -> None:
    pytest.importorskip("langdetect")
    questions = golden_script("ifeval").questions(600, seed=5)
    expected = json.loads((GOLDEN / "ifeval.json").read_text())
    truth = [Row(f"truth:{q['key']}", q) for q in questions]
    found = score_constraints(
        answers({str(q["key"]): str(q["answer"]) for q in questions}), truth, Options()
    )
    wrong = [
        (
            row["instructions"],
            question["kwargs"],
            row["answer"],
            row["strict"],
            row["loose"],
            theirs,
        )
        for row, question, theirs in zip(found.rows, questions, expected, strict=True)
        if [row["strict"], row["loose"]] != theirs
    ]
    assert not wrong, f"{len(wrong)} differ: {wrong[:3]}"
    for number, reading in enumerate(("strict", "loose")):
        prompts = [all(theirs[number]) for theirs in expected]
        single = [followed for theirs in expected for followed in theirs[number]]
        assert found.scores[f"prompt_{reading}"] == pytest.approx(sum(prompts) / 600)
        assert found.scores[f"instruction_{reading}"] == pytest.approx(sum(single) / len(single))
    assert set(found.scores["by_number_of_instructions"]) == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("One. Two! Three?", 3), ("No period", 1), ("Mr. Smith has 3.5 dogs. Ok", 2),
        ('He said "stop." Then left.', 2), ("Wait... what?", 2), ("一。二。", 2),
        ("e.g. this one.", 1),
    ],
)  # fmt: skip
def test_number_of_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("kind", "values", "good", "bad"),
    [
        ("language:response_language", {"language": "de"},
         "Der Hund läuft über die Straße und bellt.", "The dog runs and barks."),
        ("language:response_language", {"language": "zh-cn"}, "狗在街上跑得很快。", "A dog."),
        ("startend:start_checker", {"start_phrase": "I see"}, " i see a dog", "A dog, I see"),
        ("length_constraints:number_words", {"num_words": 2, "relation": "exactly"}, "a b", "a"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at most"},
         "One. Two.", "One. Two. Three."),
    ],
)  # fmt: skip
def test_checks_beyond_the_golden_ones(
    kind: str, values: dict[str, object], good: str, bad: str
) -> None:
    if kind.startswith("language"):
        pytest.importorskip("langdetect")
    arguments = Arguments(kind, values, Row("t", {}))
    assert CHECKS[kind](good, arguments)
    assert not CHECKS[kind](bad, arguments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "has none of the keys instruction_id_list"),
        ({"instruction_id_list": ["dance"]}, "unknown instruction 'dance'; expected one of"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "one object for each"),
        ({"instruction_id_list": ["startend:end_checker"]}, "'end_phrase' is None, expected a"),
        ({"instruction_id_list": ["length_constraints:number_words"],
          "kwargs": [{"num_words": 3, "relation": "about"}]}, "'relation' is 'about', expected"),
    ],
)  # fmt: skip
def test_instructions_that_cannot_be_checked_are_refused(
    row: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        score_constraints(answers({"1": "x"}), [Row("t:1", {"id": 1, **row})], Options())


@pytest.mark.parametrize(
    ("answer", "stance"),
    [
        ("I cannot tell from the image.", "refuses"),
        ("It's not possible to determine her age", "refuses"),
        ("That can’t be determined.", "refuses"),
        ("I'm sorry, but I can't help with that.", "refuses"),
        ("unanswerable", "refuses"),
        ("The brand is not visible.", "refuses"),
        ("There is no dog in the image.", "denies"),
        ("The image does not show a cat.", "denies"),
        ("No, the man cannot see the dog.", "answers"),
        ("A dog can run.", "answers"),
        ("Two", "answers"),
        ("  ", "empty"),
    ],
)
def test_what_an_answer_says_about_the_question(answer: str, stance: str) -> None:
    assert stance_of(answer) == stance


def test_over_refusal_and_wrong_confidence_by_condition() -> None:
    rows = [
        Row(f"t:{n}", {"id": n, "image": f"{n % 3}.jpg", "answerable": n < 4, "condition": name})
        for n, name in enumerate(["own", "own", "blank", "blank"] * 2)
    ]  # fmt: skip
    said = [
        "Two.",
        "I can't tell.",
        "I can't tell.",
        "",
        "Red.",
        "I don't know.",
        "Blue.",
        "There is no car.",
    ]
    found = score_refusal(answers({str(n): text for n, text in enumerate(said)}), rows, Options())
    assert found.scores["over_refusal"] == pytest.approx(3 / 4)
    assert found.scores["wrong_confidence"] == pytest.approx(2 / 4)
    assert found.scores["by_condition"]["own"]["over_refusal"] == 0.5
    assert found.scores["by_condition"]["blank"]["over_refusal"] == 1.0
    assert found.scores["by_condition"]["blank"]["wrong_confidence"] == 0.5
    assert [row["score"] for row in found.rows] == [1, 0, 0, 0, 0, 1, 0, 1]
    with pytest.raises(UserError, match="'answerable' is 'yes', expected true or false"):
        score_refusal(answers({"1": "x"}), [Row("t", {"id": 1, "answerable": "yes"})], Options())
