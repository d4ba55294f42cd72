"""The operators: what each makes of a sample, and when its result is not what was asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from data_tools.instruct.schema import Check, Sample, Turn
from vlm_sft.best_of.graders import final_answer, is_right
from vlm_sft.evaluation.scores.captions import common_length

NOVELTY: Final = 0.7
"""ROUGE-L from which on a question is not new (Self-Instruct, arXiv 2212.10560)."""

_MARK: Final = "~"
"""Between the id of a parent and the operator, in the id of a grown sample."""


@dataclass(frozen=True)
class Operator:
    """A way to make a new sample from an accepted one.

    Attributes:
        summary: What it makes, for `--help`.
        new_questions: Its questions must not be like those of the parent, or others it made.
        same_questions: Its questions must be those of the parent.
        same_answers: Its answers must say what the parent's say, as far as that is yes, no, a
            count, or a final `Answer: ...`.
        continues: The new turns follow those of the parent.
        shows_answers: Whether the request has the parent's answers.
    """

    summary: str
    new_questions: bool = False
    same_questions: bool = False
    same_answers: bool = False
    continues: bool = False
    shows_answers: bool = True


OPERATORS: Final[dict[str, Operator]] = {
    "paraphrase": Operator("the same in other words", same_answers=True),
    "deepen": Operator("harder questions (Evol-Instruct, in depth)", new_questions=True),
    "breadth": Operator("questions about other things (in breadth)", new_questions=True),
    "steps": Operator("reasons before the answer", same_questions=True, same_answers=True),
    "continue": Operator("two or three more turns", new_questions=True, continues=True),
    "distill": Operator(
        "the teacher's own answers to the questions", same_questions=True, shows_answers=False
    ),
}
"""By the name of the prompt's file in `prompts/grow`."""


def grown_id(parent: str, operator: str, number: int) -> str:
    """Return the id of a grown sample, from which `parent_of` gets back what it was made from."""
    return f"{parent}{_MARK}{operator}-{number}"


def parent_of(sample_id: str) -> tuple[str, str] | None:
    """Return the parent's id and the operator; None for a sample that was not grown."""
    parent, mark, rest = sample_id.rpartition(_MARK)
    operator = rest.rpartition("-")[0]
    return (parent, operator) if mark and operator in OPERATORS else None


class GrowthChecks:
    """Compares grown samples with their parents, and with what was grown before them."""

    def __init__(self) -> None:
        self._questions: dict[int, list[str]] = {}

    def check(self, operator: Operator, turns: Sequence[Turn], parent: Sample) -> list[Check]:
        """Return what is wrong with the turns that the teacher wrote.

        Args:
            operator: What was asked for.
            turns: The teacher's turns, without those of the parent.
            parent: The sample that they were made from.
        """
        found: list[Check] = []
        for number, turn in enumerate(turns):
            if operator.new_questions:
                found += self._not_new(number, turn, parent)
            before = parent.turns[number] if number < len(parent.turns) else None
            if operator.same_questions and (
                before is None or _words(before.question) != _words(turn.question)
            ):
                found.append(_fault("GROWN_OTHER_QUESTION", number, "question", turn.question))
            elif operator.same_answers and not _says_the_same(before, turn):
                found.append(_fault("GROWN_OTHER_ANSWER", number, "answer", turn.answer))
        if operator.same_answers and len(turns) != len(parent.turns):
            found.append(_fault("GROWN_OTHER_QUESTION", None, None, f"{len(turns)} turns"))
        same = [(turn.question, turn.answer) for turn in turns]
        if same == [(turn.question, turn.answer) for turn in parent.turns]:
            found.append(_fault("GROWN_NOT_NEW", None, None, "the parent itself"))
        return found

    def keep(self, image: int, turns: Sequence[Turn]) -> None:
        """Remember the questions of an accepted sample; later ones about the image must differ."""
        self._questions.setdefault(image, []).extend(turn.question for turn in turns)

    def _not_new(self, number: int, turn: Turn, parent: Sample) -> list[Check]:
        known = [before.question for before in parent.turns]
        known += self._questions.get(parent.image.id, [])
        like = next((text for text in known if rouge_l(text, turn.question) >= NOVELTY), None)
        if like is None:
            return []
        return [_fault("GROWN_NOT_NEW", number, "question", f"{turn.question} (like: {like})")]


def rouge_l(first: str, second: str) -> float:
    """Return the F1 of the longest common subsequence of words, from 0 to 1."""
    a, b = _words(first), _words(second)
    return 2 * common_length(a, b) / (len(a) + len(b)) if a and b else 0.0


def _says_the_same(before: Turn | None, turn: Turn) -> bool:
    """Return whether an answer can be that of the parent's turn; free text cannot be compared."""
    if before is None:
        return False
    core = _core(before)
    if core is None:
        return True
    said = final_answer(turn.answer)
    # A reason, then `Answer: No.`, or an answer in other words, `No, there is none.`
    return is_right(said, core) or is_right(turn.answer, core)


def _core(turn: Turn) -> str | None:
    """Return the yes, no or number that an answer comes down to; None if it is other text."""
    words = _words(turn.answer)
    if words and words[0] in ("yes", "no"):
        return words[0]
    return turn.answer.strip() if turn.kind == "count" and len(words) == 1 else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _fault(code: str, turn: int | None, part: str | None, claim: str) -> Check:
    place = {"question": "question", "answer": "answer"}.get(part or "")
    return Check(
        rule="growth", verdict="contradicted", code=code, turn=turn,
        part=place, claim=claim[:200],  # type: ignore[arg-type]
    )  # fmt: skip
