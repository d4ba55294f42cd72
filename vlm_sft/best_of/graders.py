"""Grade samples: by the record's own answer, by their length, or by a judge model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from vlm_sft.best_of.questions import Question, last_text
from vlm_sft.evaluation.judges.asking import JudgeOptions, ask, fill, load_prompt, request_for
from vlm_sft.evaluation.scores.exact import plain, read_count, read_whole_count
from vlm_sft.evaluation.scores.judged import read_grade
from vlm_sft.evaluation.scores.pope import verdict_last
from vlm_sft.evaluation.scores.results import Verdict

ScoreName = Literal["verifier", "exact", "judge", "length"]

_FINAL: Final = re.compile(r"\banswer(?:\s+is)?\s*[:\-]?\s+", re.IGNORECASE)
"""What comes before the answer proper, in an answer that begins with its reasons."""
_NO_COUNT: Final = re.compile(
    r"(?<!\w)[-\u2212]\d[\d,.]*|(?:minus|negative)\s+\w+|(?<![\d,])\.\d+"
    r"|[\d,]*\d(?:[:/.-]\d+)+|\d+(?:st|nd|rd|th)\b"
)
"""Numbers in an answer that are not counts: -3, minus 3, .5, 3:45, 7/8, 2-3, 2024-01-01, 2nd."""


@dataclass(frozen=True)
class Candidate:
    """A sample to be graded; equal texts of a question are graded once."""

    question: Question
    text: str
    tokens: int


@dataclass(frozen=True)
class Grade:
    """What a grader says of a sample.

    Attributes:
        value: The higher the better, among the samples of one question.
        acceptable: Whether the sample may be trained on.
        why: A reason, e.g. a code of the verifier; "" if there is none to give.
    """

    value: float
    acceptable: bool
    why: str = ""


Grader = Callable[[Sequence[Candidate]], list[Grade]]
"""Returns a grade for each of the samples of all questions."""


def exact_grader(verdict: Verdict = "first") -> Grader:
    """Return a grader that accepts the samples with the record's answer; see `is_right`."""

    def grade(candidates: Sequence[Candidate]) -> list[Grade]:
        right = [is_right(one.text, one.question.reference, verdict) for one in candidates]
        return [Grade(float(value), value, "" if value else "other_answer") for value in right]

    return grade


def is_right(answer: str, reference: str, verdict: Verdict = "first") -> bool:
    """Return whether an answer equals the true one, without case, final period and reasons.

    Of a text with `answer:` or `answer is`, what follows the last one counts. An answer to yes or
    no is read by its first word, a count by its first number; with `verdict` `last` by its last
    yes, no or number, for answers that give reasons first. Other numbers (times, dates, fractions,
    ordinals, negative ones, decimals) are compared as text.
    """
    said, true = final_answer(answer), final_answer(reference)
    if said == true:
        return True
    if true in ("yes", "no"):
        if verdict == "last":
            return verdict_last(said) == true
        return re.split(r"\W+", said, maxsplit=1)[0] == true
    count = read_whole_count(true)
    return count is not None and read_count(_NO_COUNT.sub(" ", said), verdict) == count


def final_answer(text: str) -> str:
    """Return what a text says after its last `answer:` or `answer is`; else all of it."""
    return plain(_FINAL.split(text)[-1])


def length_grader(*, longest: bool = False) -> Grader:
    """Return a grader that prefers the shortest samples, or the longest; all are acceptable."""

    def grade(candidates: Sequence[Candidate]) -> list[Grade]:
        sign = 1 if longest else -1
        return [Grade(float(sign * one.tokens), True) for one in candidates]

    return grade


def judge_grader(judge: JudgeOptions, least: float) -> Grader:
    """Return a grader that asks a judge model, which sees the record's answer.

    Args:
        judge: The judge, with the log of its replies.
        least: Lowest grade, from 1 to 10, of an acceptable sample.
    """

    def grade(candidates: Sequence[Candidate]) -> list[Grade]:
        prompt = load_prompt("single_reference", judge)
        requests = [
            request_for(
                fill(
                    prompt,
                    {"conversation": _dialogue(one), "reference": one.question.reference},
                ),
                judge,
            )
            for one in candidates
        ]
        asked = ask(requests, judge)
        grades = []
        for request in requests:
            reply = asked.replies.get(request.id)
            value = read_grade(reply.text) if reply else None
            if value is None:
                grades.append(Grade(0.0, False, "not_judged"))
            else:
                grades.append(Grade(value, value >= least, "" if value >= least else "low_grade"))
        return grades

    return grade


def _dialogue(candidate: Candidate) -> str:
    turns = candidate.question.prompt.turns
    said = [f"[{turn.role}]\n{turn.text.strip()}" for turn in turns[:-1]]
    said += [f"[user]\n{last_text(candidate.question)}", f"[assistant]\n{candidate.text}"]
    return "\n\n".join(said)
