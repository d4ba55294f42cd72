"""What a kind of score is computed with, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from vlm_sft.evaluation.scores.files import Answers, Row

if TYPE_CHECKING:
    from vlm_sft.evaluation.judges.asking import JudgeOptions

Reading = Literal["strict", "first_word", "verdict_last", "one_verdict", "pope_official"]

DEFAULT_READING: Final[Reading] = "first_word"

Verdict = Literal["first", "last"]


@dataclass(frozen=True)
class Options:
    """Settings of a kind of score.

    Attributes:
        seed: Seed of the bootstrap intervals, which resample images.
        reading: `pope`: the reading of a verdict that decides the rows; the scores have all.
        verdict: `counting`, `multiple_choice`: which of several numbers or options in an answer
            counts. `last` is for answers that say what they see first.
        iou: `grounding`: the smallest IoU of a box that counts as right.
        meteor: `caption`: also compute METEOR, which needs Java.
        judge: `mt-bench`, `alpaca`, `arena`: who judges.
        name: The name of the model whose answers are scored.
        others: `alpaca`: the answers of the baseline; `arena`: of the other models, by name.
    """

    seed: int = 0
    reading: Reading = DEFAULT_READING
    verdict: Verdict = "first"
    iou: float = 0.5
    meteor: bool = False
    judge: "JudgeOptions | None" = None
    name: str = "model"
    others: Mapping[str, Answers] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The scores of a set of answers.

    Attributes:
        scores: Values for JSON: `kind`, `questions`, `unanswered`, the scores, and for a score
            `NAME` its interval `NAME_interval: [low, high]`.
        rows: One object per question, in the order of the truth: `id`, `image`, `answer` (None if
            there is none), `score` (from 0, wrong, to 1, right; CIDEr-D goes up to 10), and what
            the kind knows about it.
    """

    scores: dict[str, Any]
    rows: list[dict[str, Any]]


def question_row(
    name: str, row: Row, answers: Answers, score: float, **more: Any
) -> dict[str, Any]:
    """Return the result of one question, with its category if the truth has one."""
    category = row.get("category", "type")
    return {
        "id": name,
        "image": image_of(name, row),
        "answer": answers.by_id.get(name),
        "score": float(score),
        **({} if category is None else {"category": str(category)}),
        **more,
    }


def image_of(name: str, row: Row) -> str:
    """Return the image of a question, by which intervals are clustered; its id if it has none."""
    found = row.get("image", "image_id")
    return name if found is None else str(found)


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None if there are no values."""
    return sum(values) / len(values) if values else None
