"""What is said about a model's looking, from the scores of questions."""

import pytest

from vlm_sft.evaluation.intervals import interval_of_differences
from vlm_sft.evaluation.suites.results import (
    QuestionResult,
    TaskResult,
    looks,
    visual_necessity,
    with_true_answers,
)


def task(kind: str, *scores: tuple[float, float, float]) -> TaskResult:
    questions = [
        QuestionResult(str(n), f"{n}.jpg", "", {"right": own, "blank": blank, "shuffled": other})
        for n, (own, blank, other) in enumerate(scores)
    ]
    return TaskResult(kind, kind, {}, questions, {})


def test_a_question_needs_its_image_if_it_is_right_with_it_only() -> None:
    tasks = [task("pope", (1, 0, 0), (1, 1, 1), (0, 0, 1), (1, 0, 1)), task("refusal", (1, 1, 0))]
    found = list(visual_necessity(tasks))
    assert [row["needs_image"] for row in found] == [True, False, False, False]
    assert [row["answered_without_image"] for row in found] == [False, True, False, False]


def test_the_headline_counts_only_questions_with_true_answers() -> None:
    tasks = [task("pope", (1, 0, 0), (1, 0, 1)), task("caption", (9.0, 0.0, 0.5))]
    total = looks(with_true_answers(tasks), seed=0)
    assert total is not None and total["questions"] == 2
    assert (total["own_image"], total["another_image"]) == (1.0, 0.5)
    assert total["difference"]["estimate"] == 0.5
    assert looks([], seed=0) is None


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_equal_differences_have_an_interval_with_a_width(value: float) -> None:
    few = interval_of_differences([value] * 6, list("abcdef"), seed=0)
    many = interval_of_differences([value] * 600, range(600), seed=0)
    assert -1 <= few.low <= value <= few.high <= 1 and few.high - few.low > 0.3
    assert many.high - many.low < 0.05
