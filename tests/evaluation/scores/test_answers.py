"""Yes/no, VQA, multiple choice, counts and boxes against the definitions restated here."""

import random
from pathlib import Path

import pytest

from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.exact import (
    read_box,
    read_choice,
    read_count,
    score_counting,
    score_gqa,
    score_grounding,
    score_multiple_choice,
)
from vlm_sft.evaluation.scores.files import Answers, Row
from vlm_sft.evaluation.scores.pope import READINGS, binary_scores, score_pope
from vlm_sft.evaluation.scores.results import Options
from vlm_sft.evaluation.scores.vqa import (
    remove_punctuation,
    score_vqa,
    unify_words,
    vqa_accuracy,
)


def rows(*values: dict[str, object]) -> list[Row]:
    return [Row(f"truth:{number}", value) for number, value in enumerate(values, 1)]


def answers(**by_id: str) -> Answers:
    return Answers(Path("answers.jsonl"), {name[1:]: text for name, text in by_id.items()})


@pytest.mark.parametrize(
    ("answer", "strict", "first", "last", "one", "official"),
    [
        ("yes", "yes", "yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no", "no", "no"),
        ("Yes.", "unclear", "yes", "yes", "yes", "yes"),
        ("No, there is not.", "unclear", "no", "no", "no", "no"),
        ("I see a cat, so yes.", "unclear", "unclear", "yes", "yes", "yes"),
        ("I see no dog, so yes", "unclear", "unclear", "yes", "unclear", "no"),
        ("There is one. Not visible", "unclear", "unclear", "unclear", "unclear", "yes"),
        ("None", "unclear", "unclear", "unclear", "unclear", "yes"),
        ("", "unclear", "unclear", "unclear", "unclear", "yes"),
    ],
)
def test_readings_of_a_verdict(
    answer: str, strict: str, first: str, last: str, one: str, official: str
) -> None:
    found = {name: read(answer) for name, read in READINGS.items()}
    assert found == {
        "strict": strict, "first_word": first, "verdict_last": last, "one_verdict": one,
        "pope_official": official,
    }  # fmt: skip


def lmms_eval(said: list[str], labels: list[str]) -> dict[str, float]:
    """POPE as lmms_eval/tasks/pope/utils.py computes it; `unclear` answers are no misses there."""
    pairs = [(text.lower().strip(), label) for text, label in zip(said, labels, strict=True)]
    hits = pairs.count(("yes", "yes"))
    precision = hits / (hits + pairs.count(("yes", "no")))
    recall = hits / (hits + pairs.count(("no", "yes")))
    return {
        "accuracy": sum(a == b for a, b in pairs) / len(pairs), "precision": precision,
        "recall": recall, "yes_share": labels.count("yes") / len(labels),
    }  # fmt: skip


def vlmevalkit(said: list[str], labels: list[str]) -> dict[str, float]:
    """POPE as vlmeval/dataset/utils/yorn.py computes it."""
    verdicts = []
    for text in said:
        words = remove_punctuation(text.lower()).split()
        yes, no = "yes" in words, "no" in words
        verdicts.append("yes" if yes and not no else "no" if no and not yes else "unknown")
    pairs = list(zip(verdicts, labels, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision, recall = hits / verdicts.count("yes"), hits / labels.count("yes")
    return {
        "accuracy": sum(a == b for a, b in pairs) / len(pairs), "precision": precision,
        "recall": recall, "f1": 2 * precision * recall / (precision + recall),
    }  # fmt: skip


def test_the_same_answers_under_the_rules_of_lmms_eval_and_vlmevalkit() -> None:
    rng = random.Random(9)
    phrases = ["Yes", "yes", "No", "no ", "Yes.", "No, there is none.", "I see no cat, so yes.",
               "There is a dog.", "", "yes/no", "A dog, yes!"]  # fmt: skip
    said = [rng.choice(phrases) for _ in range(600)]
    labels = [rng.choice(["yes", "no"]) for _ in said]
    truth = rows(*({"question_id": n, "label": label} for n, label in enumerate(labels)))
    found = score_pope(
        Answers(Path("a"), {str(n): text for n, text in enumerate(said)}), truth, Options()
    ).scores["readings"]
    kit = vlmevalkit(said, labels)
    assert {key: found["one_verdict"][key] for key in kit} == pytest.approx(kit)
    harness = lmms_eval(said, labels)
    for key in ("accuracy", "precision"):
        assert found["strict"][key] == pytest.approx(harness[key])
    # lmms-eval leaves unclear answers out of recall, and its yes ratio is that of the labels.
    assert harness["recall"] > found["strict"]["recall"] + 0.2
    assert harness["yes_share"] == found["strict"]["label_yes_share"]


def test_precision_recall_and_f1_are_popes() -> None:
    rng = random.Random(3)
    said = [rng.choice(["yes", "no", "unclear"]) for _ in range(200)]
    true = [rng.choice(["yes", "no"]) for _ in range(200)]
    tp = sum(s == "yes" == t for s, t in zip(said, true, strict=True))
    fp = sum(s == "yes" and t == "no" for s, t in zip(said, true, strict=True))
    fn = sum(s != "yes" and t == "yes" for s, t in zip(said, true, strict=True))
    tn = sum(s == "no" == t for s, t in zip(said, true, strict=True))
    found = binary_scores(said, true, [str(i // 6) for i in range(200)], seed=0)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["accuracy"] == pytest.approx((tp + tn) / 200)
    assert found["yes_share"] == pytest.approx((tp + fp) / 200)
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high


def test_a_missing_answer_is_wrong_and_counted() -> None:
    truth = rows(
        {"question_id": 1, "image": "a.jpg", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "label": "no"},
    )
    found = score_pope(answers(_1="yes", _9="no"), truth, Options()).scores
    assert (found["unanswered"], found["unanswered_ids"]) == (1, ["2"])
    assert (found["extra_answers"], found["extra_ids"]) == (1, ["9"])
    assert found["readings"]["strict"]["accuracy"] == 0.5
    assert found["readings"]["strict"]["unclear"] == 1


def test_answers_to_other_questions_only_are_refused_with_both_ids() -> None:
    with pytest.raises(UserError, match=r"ids are 9 here and 1 in --truth"):
        score_pope(answers(_9="no"), rows({"question_id": 1, "label": "yes"}), Options())
    with pytest.raises(UserError, match="expected 'yes' or 'no'"):
        score_pope(answers(_1="no"), rows({"question_id": 1, "label": "maybe"}), Options())


@pytest.mark.parametrize("matches", range(11))
def test_vqa_accuracy_leaves_out_each_annotator_in_turn(matches: int) -> None:
    humans = ["red"] * matches + ["blue"] * (10 - matches)
    left_out = [
        min(1.0, sum(human == "red" for j, human in enumerate(humans) if j != i) / 3)
        for i in range(10)
    ]
    assert vqa_accuracy("red", humans) == pytest.approx(sum(left_out) / 10)


def test_vqa_accuracy_of_few_matches() -> None:
    found = [vqa_accuracy("red", ["red"] * n + ["blue"] * (10 - n)) for n in range(5)]
    assert found == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("1,000 dogs", "1000 dogs"),
        ("left/right", "left right"),
        ("8.5", "8.5"),
        ("U.S.", "us"),
        ("none", "0"),
        ("hi , there", "hi there"),
    ],
)
def test_vqa_normalization(text: str, normal: str) -> None:
    assert unify_words(remove_punctuation(text)) == normal


def test_equal_human_answers_are_compared_without_normalization() -> None:
    # VQA's code normalizes only if the annotators differ.
    assert vqa_accuracy("Two", ["two"] * 10) == 0.0
    assert vqa_accuracy("Two", ["2"] * 9 + ["3"]) == 1.0


def test_vqa_file_with_groups() -> None:
    truth = rows(
        {"question_id": 1, "image_id": 5, "answers": [{"answer": "red"}] * 10,
         "answer_type": "other"},
        {"question_id": 2, "image_id": 6, "answers": ["yes"] * 9 + ["no"], "answer_type": "yes/no"},
    )  # fmt: skip
    found = score_vqa(answers(_1="red", _2="no"), truth, Options()).scores
    assert found["accuracy"] == pytest.approx((1.0 + 0.3) / 2)
    assert found["by_answer_type"] == {
        "other": {"questions": 1, "accuracy": 1.0},
        "yes/no": {"questions": 1, "accuracy": pytest.approx(0.3)},
    }
    for wrong, message in (
        ("red", "not a list of human answers"),
        (["red"], "use the kind gqa"),
        ([True] * 10, "not text"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            score_vqa(answers(_1="x"), rows({"question_id": 1, "answers": wrong}), Options())


def test_equality_without_case_and_final_period() -> None:
    truth = rows({"id": "1", "answer": "Red car"}, {"id": "2", "answer": "left", "type": "place"})
    found = score_gqa(answers(_1="red  car.", _2="right"), truth, Options()).scores
    assert found["accuracy"] == 0.5
    assert found["by_category"] == {"place": {"questions": 1, "accuracy": 0.0}}


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1), ("(b)", 1), ("b.", 1), ("B. a cat", 1), ("The answer is B.", 1),
        ("Answer: C", 2), ("a cat", 1), ("It is a cat.", 1), ("A dog", 0), ("A", 0),
        ("A bird sits there", 2), ("a dog and a cat", None), ("E", None), ("", None),
        ("Because", None), ("Option B) a cat", 1),
    ],
)  # fmt: skip
def test_the_chosen_option(answer: str, choice: int | None) -> None:
    assert read_choice(answer, ["a dog", "a cat", "a bird"]) == choice


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("I see a dog on the left and a cat on the right, so left.", 0), ("left", 0),
        ("On the left there is nothing, so it must be right", 1), ("B", 1), ("so B.", None),
        ("leftover", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_option_counts_if_the_verdict_is_last(answer: str, choice: int | None) -> None:
    assert read_choice(answer, ["left", "right"], "last") == choice


def test_of_options_that_end_together_the_longest_is_chosen() -> None:
    assert read_choice("a cup, so the red cat", ["cat", "red cat", "cup"], "last") == 1


def test_multiple_choice_shows_the_share_of_each_position() -> None:
    choices = ["a dog", "a cat"]
    truth = rows(
        {"id": "1", "choices": choices, "answer": "A"},
        {"id": "2", "choices": choices, "answer": "a cat"},
        {"id": "3", "choices": ["1", "2"], "answer": 1},
    )
    found = score_multiple_choice(answers(_1="A", _2="A", _3="perhaps"), truth, Options()).scores
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (found["chosen"], found["true"], found["unclear"]) == (
        {"A": 2, "B": 0},
        {"A": 1, "B": 2},
        1,
    )
    with pytest.raises(UserError, match="is not one of the 2 choices"):
        score_multiple_choice(
            answers(_1="A"), rows({"id": 1, "choices": choices, "answer": "C"}), Options()
        )


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("3", 3), ("There are three dogs.", 3), ("I count 12.", 12), ("none", 0),
        ("1,024 birds", 1024), ("many", None), ("", None), ("about 3.5", None),
        ("No dogs", 0), ("twenty-one", 21), ("one hundred and five", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_the_count_in_an_answer(answer: str, count: int | None) -> None:
    assert read_count(answer) == count


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("I see two cats and a boat, so two.", 2), ("3 cats and two dogs, so twenty-one.", 21),
        ("two, no, 3.5", 0), ("one of one hundred", None), ("many", None), ("twenty two", 22),
    ],
)  # fmt: skip
def test_the_last_count_in_an_answer(answer: str, count: int | None) -> None:
    assert read_count(answer, "last") == count


def test_counting_errors() -> None:
    truth = rows(*({"id": i, "answer": n} for i, n in enumerate([2, 3, 4])))
    found = score_counting(answers(_0="two", _1="five", _2="many"), truth, Options()).scores
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (found["mean_absolute_error"], found["mean_error"]) == (1.0, 1.0)
    assert (found["without_number"], found["within_one"]) == (1, pytest.approx(1 / 3))


def test_grounding_by_overlap() -> None:
    truth = rows(
        {"id": "1", "box": [0, 0, 10, 10]},
        {"id": "2", "bbox": [10, 10, 10, 10]},  # left, top, width, height
        {"id": "3", "box": [0, 0, 1, 1]},
    )
    found = score_grounding(
        answers(_1="It is at [0, 0, 10, 5].", _2="(10, 10, 20, 20)", _3="on the left"),
        truth,
        Options(),
    ).scores
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["mean_iou"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert found["without_box"] == 1
    assert read_box("no box") is None
    for box in ([10, 0, 0, 10], [0, 0, 0, 10]):
        with pytest.raises(UserError, match="has no area"):
            score_grounding(answers(_1="[0, 0, 1, 1]"), rows({"id": "1", "box": box}), Options())
