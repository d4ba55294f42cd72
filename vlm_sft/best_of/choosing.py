"""Choose the best sample of each question, and a worse one for preference training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_sft.best_of.graders import Candidate, Grade, Grader
from vlm_sft.best_of.questions import Question
from vlm_sft.best_of.sample_lines import Sample

Outcome = Literal["kept", "none_acceptable", "not_asked"]


@dataclass(frozen=True)
class Choice:
    """What came of a question.

    Attributes:
        question: The question.
        outcome: `kept`; `none_acceptable`; or `not_asked`, e.g. because its image is missing.
        chosen: The best sample; None unless it was kept.
        rejected: A worse sample with another text; None if there is none.
        grades: The grade of every text.
        counts: How often each text was sampled.
        right: Number of acceptable samples.
        cut: Number of samples without an end, or without text.
        why: Reasons against the samples, and how often.
    """

    question: Question
    outcome: Outcome
    chosen: Sample | None
    rejected: Sample | None
    grades: Mapping[str, Grade]
    counts: Counter[str]
    right: int
    cut: int
    why: Counter[str]

    @property
    def duplicates(self) -> int:
        """Number of samples whose text an earlier sample of the question has."""
        return sum(self.counts.values()) - len(self.counts)

    def receipt(self) -> dict[str, Any]:
        """Return the line of `receipts.jsonl`."""
        return {
            "id": self.question.id,
            "outcome": self.outcome,
            "sample": None if self.chosen is None else self.chosen.sample,
            "grade": None if self.chosen is None else self.grades[self.chosen.text].value,
            "rejected_sample": None if self.rejected is None else self.rejected.sample,
            "acceptable": self.right,
            "texts": len(self.counts),
            "duplicates": self.duplicates,
            "cut": self.cut,
            "why": dict(self.why),
        }


def choose(
    questions: Sequence[Question], samples: Mapping[str, Sequence[Sample]], grader: Grader
) -> list[Choice]:
    """Return the choice of each question.

    Of equal grades, the text that was sampled most often wins, then the shortest, then the first.
    The rejected sample is the opposite: the lowest grade, and of those the most frequent text, an
    error that the model makes often.

    Args:
        questions: The questions.
        samples: All samples of each question by its id, in order.
        grader: Grades the distinct texts of all questions in one call.
    """
    firsts: dict[str, dict[str, Sample]] = {}
    for question in questions:
        firsts[question.id] = {}
        for sample in samples[question.id]:
            if sample.ended and sample.text:
                firsts[question.id].setdefault(sample.text, sample)
    candidates = [
        Candidate(question, text, sample.tokens)
        for question in questions
        for text, sample in firsts[question.id].items()
    ]
    grades: dict[str, dict[str, Grade]] = {question.id: {} for question in questions}
    for candidate, grade in zip(candidates, grader(candidates), strict=True):
        grades[candidate.question.id][candidate.text] = grade
    return [
        _choice(question, samples[question.id], firsts[question.id], grades[question.id])
        for question in questions
    ]


def _choice(
    question: Question,
    samples: Sequence[Sample],
    first: Mapping[str, Sample],
    grades: Mapping[str, Grade],
) -> Choice:
    counts = Counter(sample.text for sample in samples if sample.text in first and sample.ended)
    cut = len(samples) - sum(counts.values())
    right = sum(counts[text] for text, grade in grades.items() if grade.acceptable)
    why: Counter[str] = Counter()
    for text, grade in grades.items():
        if grade.why:
            why[grade.why] += counts[text]
    problems = Counter(sample.problem for sample in samples if sample.problem)
    if problems:
        why.update({str(problem): count for problem, count in problems.items()})
        return Choice(question, "not_asked", None, None, grades, counts, 0, 0, why)
    if cut:
        why["cut"] += cut

    def rank(text: str) -> tuple[bool, float]:
        return grades[text].acceptable, grades[text].value

    order = {text: place for place, text in enumerate(first)}
    best = max(
        first,
        key=lambda text: (*rank(text), counts[text], -first[text].tokens, -order[text]),
        default=None,
    )
    if best is None or not grades[best].acceptable:
        return Choice(question, "none_acceptable", None, None, grades, counts, right, cut, why)
    worse = [text for text in first if rank(text) < rank(best)]
    worst = min(worse, key=lambda text: (*rank(text), -counts[text], order[text]), default=None)
    rejected = None if worst is None else first[worst]
    return Choice(question, "kept", first[best], rejected, grades, counts, right, cut, why)
