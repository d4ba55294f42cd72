"""Score the answers to a suite: every task and condition, and whether the model looks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vlm_sft.evaluation.conditions import SuiteCondition
from vlm_sft.evaluation.intervals import (
    Interval,
    cluster_bootstrap_interval,
    interval_of_differences,
    interval_of_shares,
)
from vlm_sft.evaluation.scores.files import Answers, Row
from vlm_sft.evaluation.scores.registry import score
from vlm_sft.evaluation.scores.results import Options
from vlm_sft.evaluation.suites.answer_log import Answer
from vlm_sft.evaluation.suites.tasks import Key, Task

INTERVALS: Final = "95 %, clustered by image: percentile bootstrap, or Wilson's if all are equal"

MAIN_SCORES: Final = {
    "caption": "cider_d",
    "chair": "chair_s",
    "constraints": "prompt_strict",
    "refusal": "over_refusal",
}
"""The score that stands for a kind where there is room for one; `accuracy` for the others."""

NOT_SHARES: Final = frozenset({"caption"})
"""Kinds whose questions have a score that is no share of 1."""

WITH_TRUE_ANSWERS: Final = frozenset(
    ("pope", "vqa", "gqa", "multiple_choice", "counting", "grounding")
)
"""Kinds whose questions are answered right or wrong, which accuracy over all tasks counts."""

RIGHT: Final = 0.5
"""Least score of a question that counts as answered."""

_WITHOUT_IMAGE: Final[tuple[SuiteCondition, ...]] = ("blank", "shuffled")
_COVERAGE: Final = ("kind", "unanswered", "unanswered_ids", "extra_answers", "extra_ids")


@dataclass(frozen=True)
class QuestionResult:
    """The scores of one question.

    Attributes:
        id: Its id.
        image: Its own image, by which intervals are clustered.
        category: Its category; "" if it has none.
        scores: Its score under each condition, from 0 to 1 (CIDEr-D: to 10).
    """

    id: str
    image: str
    category: str
    scores: dict[str, float]


@dataclass(frozen=True)
class TaskResult:
    """The results of a task.

    Attributes:
        name: Name of the task.
        kind: Its kind.
        scores: The scores of each condition, as `vlm-sft score` has them.
        questions: Every question, in order.
        answers: The answers under each condition, by id.
    """

    name: str
    kind: str
    scores: dict[str, dict[str, Any]]
    questions: list[QuestionResult]
    answers: dict[str, dict[str, str]]

    @property
    def main(self) -> str:
        """Name of the score that stands for the task."""
        return MAIN_SCORES.get(self.kind, "accuracy")

    def as_dict(self, *, seed: int) -> dict[str, Any]:
        """Return values for JSON."""
        return {
            "kind": self.kind,
            "main": self.main,
            "conditions": self.scores,
            "looks": looks([self], seed=seed),
            "by_category": by_category(self, seed=seed),
            "questions": [
                {
                    "id": question.id,
                    "image": question.image,
                    **({"category": question.category} if question.category else {}),
                    "scores": question.scores,
                }
                for question in self.questions
            ],
        }


def score_task(task: Task, answers: Mapping[Key, Answer], *, seed: int) -> TaskResult:
    """Return the results of a task from all answers of the suite.

    Raises:
        UserError: A row of the true answers is malformed.
    """
    config = task.config
    options = Options(seed=seed, **config.scoring.model_dump())
    scores: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, str]] = {}
    values: dict[str, dict[str, float]] = {question.id: {} for question in task.questions}
    categories: dict[str, str] = {}
    for condition in config.conditions:
        found = {
            question.id: answers[Key(config.name, condition, question.id)]
            for question in task.questions
        }
        texts[condition] = {name: answer.answer for name, answer in found.items()}
        given = Answers(Path(config.name), texts[condition])
        scored = score(config.kind, given, _truth(task, condition), options)
        scores[condition] = _plain_scores(scored.scores, config.scoring.reading)
        scores[condition]["without_answer"] = sum(a.problem is not None for a in found.values())
        for row in scored.rows:
            values[row["id"]][condition] = row["score"]
            categories[row["id"]] = row.get("category", "")
    questions = [
        QuestionResult(q.id, q.image or q.id, categories.get(q.id, ""), values[q.id])
        for q in task.questions
        if values[q.id]
    ]
    return TaskResult(config.name, config.kind, scores, questions, texts)


def _truth(task: Task, condition: SuiteCondition) -> list[Row]:
    """Return the true answers under a condition: with a blank image, nothing is answerable."""
    if task.config.kind != "refusal" or condition != "blank":
        return task.truth
    return [replace(row, values={**row.values, "answerable": False}) for row in task.truth]


def looks(
    tasks: Sequence[TaskResult], *, seed: int, other: SuiteCondition = "shuffled"
) -> dict[str, Any] | None:
    """Return the mean score with a question's own image minus that with another question's.

    None if no question was asked with both. A model that does not look has a difference of zero.

    Args:
        tasks: Results of tasks.
        seed: Of the bootstrap.
        other: What the own image is compared with.
    """
    pairs = [
        (question.scores["right"], question.scores[other], question.image)
        for task in tasks
        for question in task.questions
        if question.scores.keys() >= {"right", other}
    ]
    if not pairs:
        return None
    differences = [own - other for own, other, _ in pairs]
    images = [image for _, _, image in pairs]
    return {
        "questions": len(pairs),
        "own_image": sum(own for own, _, _ in pairs) / len(pairs),
        "another_image": sum(other for _, other, _ in pairs) / len(pairs),
        "difference": difference_interval(differences, images, seed=seed).as_dict(),
    }


def without_own_image(
    task: TaskResult, *, seed: int
) -> tuple[SuiteCondition, dict[str, Any]] | None:
    """Return how much higher a task's scores are with the own images than without them.

    Compared is another question's image, or a blank one if the task does not ask with those.

    Returns:
        The condition, and the difference with its interval. None for tasks whose scores need not
        fall without the image, and for fewer than four images, whose intervals always have zero.
    """
    if task.kind not in WITH_TRUE_ANSWERS | NOT_SHARES:
        return None
    for condition in reversed(_WITHOUT_IMAGE):
        found = looks([task], seed=seed, other=condition)
        images = {question.image for question in task.questions if condition in question.scores}
        if found is not None and len(images) >= 4:
            return condition, found["difference"]
    return None


def difference_interval(
    differences: Sequence[float], images: Sequence[str], *, seed: int
) -> Interval:
    """Return the mean of paired differences with an interval clustered by image."""
    if max(map(abs, differences)) > 1:  # CIDEr-D
        return cluster_bootstrap_interval(differences, images, seed=seed)
    return interval_of_differences(differences, images, seed=seed)


def by_category(task: TaskResult, *, seed: int) -> dict[str, Any]:
    """Return the mean score of every category with its own images, largest category first."""
    groups: dict[str, list[QuestionResult]] = {}
    for question in task.questions:
        if question.category and "right" in question.scores:
            groups.setdefault(question.category, []).append(question)
    return {
        name: {
            "questions": len(found),
            "score": _mean_interval(found, seed).as_dict(),
        }
        for name, found in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def _mean_interval(questions: Sequence[QuestionResult], seed: int) -> Interval:
    values = [question.scores["right"] for question in questions]
    images = [question.image for question in questions]
    if all(value in (0.0, 1.0) for value in values):
        return interval_of_shares([value == 1.0 for value in values], images, seed=seed)
    return cluster_bootstrap_interval(values, images, seed=seed)


def with_true_answers(tasks: Sequence[TaskResult]) -> list[TaskResult]:
    """Return the tasks whose questions are answered right or wrong."""
    return [task for task in tasks if task.kind in WITH_TRUE_ANSWERS]


def visual_necessity(tasks: Sequence[TaskResult]) -> Iterator[dict[str, Any]]:
    """Yield for every question whether it is answered without its image, for `necessity.jsonl`.

    `answered_without_image` means right under every one of blank and shuffled that was asked;
    `needs_image` means right with its own image and wrong under all of them. A guess is right by
    chance, so a single question proves nothing: use several models or seeds to filter data.
    """
    for task in with_true_answers(tasks):
        for question in task.questions:
            without = [question.scores[c] for c in _WITHOUT_IMAGE if c in question.scores]
            own = question.scores.get("right")
            if not without or own is None:
                continue
            yield {
                "task": task.name,
                "id": question.id,
                "image": question.image,
                "scores": question.scores,
                "answered_without_image": min(without) >= RIGHT,
                "needs_image": own >= RIGHT and max(without) < RIGHT,
            }


def metrics(tasks: Sequence[TaskResult]) -> dict[str, float | None]:
    """Return every score by name: `TASK.SCORE` with own images, `TASK.CONDITION.SCORE` with others.

    `TASK.looks` is the difference of own and other images. A score that the answers do not have,
    such as the mean error of answers without numbers, is None.
    """
    found: dict[str, float | None] = {}
    for task in tasks:
        for condition, scores in task.scores.items():
            prefix = task.name if condition == "right" else f"{task.name}.{condition}"
            for name, value in scores.items():
                if name in ("questions", "without_answer"):
                    continue
                if value is None or isinstance(value, int | float):
                    found[f"{prefix}.{name}"] = None if value is None else float(value)
        difference = looks([task], seed=0)
        if difference is not None:
            found[f"{task.name}.looks"] = difference["difference"]["estimate"]
    return found


def _plain_scores(scores: Mapping[str, Any], reading: str) -> dict[str, Any]:
    """Return a kind's scores with those of the task's reading on top."""
    found = {key: value for key, value in scores.items() if key not in _COVERAGE}
    if "readings" in found:
        return {"questions": found["questions"], **found["readings"][reading], **found}
    return found
