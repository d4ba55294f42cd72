"""The operators: what each makes, and what it is made from."""

import re
from dataclasses import dataclass
from typing import Final, Literal

_MARK: Final = "~"
"""Between the id of a parent and the operator, in the id of a grown sample."""

Source = Literal["sample", "image", "several"]


@dataclass(frozen=True)
class Operator:
    """A way to make a new sample.

    Attributes:
        summary: What it makes, for `--help`.
        source: From an accepted sample, from an image of the run, or from several samples.
        new_questions: Its questions must not be like those of the parent, or others it made.
        rewrites: They are questions of the parent made harder, so that they may be like them, but
            not without a new word that means something.
        same_questions: Its questions must be those of the parent.
        same_answers: Its answers must say what the parent's say, as far as that can be compared.
        final_answer: Its answers end with `Answer: ...`, which must be the parent's answer.
        continues: The new turns follow those of the parent.
        shows_answers: Whether the request has the parent's answers.
    """

    summary: str
    source: Source = "sample"
    new_questions: bool = False
    rewrites: bool = False
    same_questions: bool = False
    same_answers: bool = False
    final_answer: bool = False
    continues: bool = False
    shows_answers: bool = True


def _rewrites(summary: str) -> Operator:
    return Operator(summary, new_questions=True, rewrites=True)


OPERATORS: Final[dict[str, Operator]] = {
    "paraphrase": Operator("the same in other words", same_answers=True),
    "deepen": Operator("harder questions", new_questions=True),
    "breadth": Operator("questions about other things", new_questions=True),
    "steps": Operator(
        "reasons before the answer", same_questions=True, same_answers=True, final_answer=True
    ),
    "continue": Operator("two or three more turns", new_questions=True, continues=True),
    "distill": Operator(
        "the teacher's own answers to the questions", same_questions=True, shows_answers=False
    ),
    "constrain": _rewrites("questions with one more condition"),
    "concretize": _rewrites("questions about something more particular"),
    "reason": _rewrites("questions that take several steps"),
    "complicate": _rewrites("questions with more given than what is asked"),
    "rare": Operator("questions about what is seldom asked", new_questions=True),
    "self-instruct": Operator(
        "new questions about images of the run, after seed tasks", source="image"
    ),
    "translate": Operator("the same in another language (--language)"),
    "constraints": Operator("a description in a form with several checked constraints"),
    "multi-image": Operator("a long conversation about two to four images", source="several"),
    "refuse": Operator(
        "questions that the image cannot answer, and look-alikes that it can", source="image"
    ),
}
"""By the name of the prompt's file in `prompts/grow`."""

GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "evolve": ("constrain", "deepen", "concretize", "reason", "complicate", "rare"),
}
"""Names for one of several operators, drawn for each sample: Evol-Instruct's five in depth and
one in breadth (arXiv 2304.12244)."""


def grown_id(parent: str, operator: str, number: int) -> str:
    """Return the id of a grown sample, which names the parent and the operator."""
    return f"{parent}{_MARK}{operator}-{number}"


def slug(text: str) -> str:
    """Return a text as a part of an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
