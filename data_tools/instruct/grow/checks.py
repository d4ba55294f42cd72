"""What is wrong with the turns that a teacher wrote about a parent, by the operator."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from data_tools.instruct.grow.answers import says_the_same
from data_tools.instruct.grow.novelty import NOVELTY, QuestionPool, rouge_l, words_of
from data_tools.instruct.grow.operators import Operator
from data_tools.instruct.schema import Check, Sample, Turn
from data_tools.instruct.verify.grammar import word_set

LEAST_WORDS: Final = 3
"""Shorter questions of `self-instruct` are left out, as in the paper."""


class GrowthChecks:
    """Compares grown samples with their parents, and with what was grown before them.

    Args:
        known: Questions of other images and of seed tasks, which `self-instruct` must not repeat.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._of_image: dict[int, QuestionPool] = defaultdict(QuestionPool)
        self._of_all = QuestionPool(known)

    def check(self, operator: Operator, turns: Sequence[Turn], parent: Sample) -> list[Check]:
        """Return what is wrong with the turns that the teacher wrote.

        Args:
            operator: What was asked for.
            turns: The teacher's turns, without those of the parent.
            parent: The sample that they were made from.
        """
        found: list[Check] = []
        for number, turn in enumerate(turns):
            found += _copies_prompt(number, turn)
            if operator.new_questions:
                found += self._not_new(number, turn, parent, operator)
            before = parent.turns[number] if number < len(parent.turns) else None
            if operator.same_questions and (
                before is None or words_of(before.question) != words_of(turn.question)
            ):
                found.append(fault("GROWN_OTHER_QUESTION", turn.question, number, "question"))
            elif operator.same_answers and before is not None:
                why = says_the_same(before, turn, final=operator.final_answer)
                if why is not None:
                    found.append(fault("GROWN_OTHER_ANSWER", why, number, "answer"))
        if (operator.same_answers or operator.same_questions) and len(turns) != len(parent.turns):
            found.append(
                fault("GROWN_OTHER_QUESTION", f"{len(turns)} turns of {len(parent.turns)}")
            )
        same = [(turn.question, turn.answer) for turn in turns]
        if same == [(turn.question, turn.answer) for turn in parent.turns]:
            found.append(fault("GROWN_NOT_NEW", "the parent itself"))
        return found

    def check_new_tasks(self, turns: Sequence[Turn]) -> Iterator[Check]:
        """Yield what is wrong with questions that may be like none of any image or seed task."""
        own = QuestionPool()
        for number, turn in enumerate(turns):
            yield from _copies_prompt(number, turn)
            if len(words_of(turn.question)) < LEAST_WORDS:
                claim = f"{turn.question} (under {LEAST_WORDS} words)"
                yield fault("GROWN_NOT_NEW", claim, number, "question")
            like = self._of_all.like(turn.question) or own.like(turn.question)
            if like is not None:
                claim = f"{turn.question} (like: {like})"
                yield fault("GROWN_NOT_NEW", claim, number, "question")
            own.add(turn.question)

    def keep(self, image: int, turns: Sequence[Turn]) -> None:
        """Remember the questions of an accepted sample; later ones must differ from them."""
        for turn in turns:
            self._of_image[image].add(turn.question)
            self._of_all.add(turn.question)

    def _not_new(
        self, number: int, turn: Turn, parent: Sample, operator: Operator
    ) -> Iterator[Check]:
        asked = {*words_of(turn.question)} - _EMPTY

        def is_like(text: str) -> bool:
            if operator.rewrites:  # harder, so like it, but with something more
                return asked <= {*words_of(text)}
            return rouge_l(text, turn.question) >= NOVELTY

        of_parent = (before.question for before in parent.turns)
        like = next(filter(is_like, of_parent), None)
        like = like or self._of_image[parent.image.id].like(turn.question)
        if like is not None:
            claim = f"{turn.question} (like: {like})"
            yield fault("GROWN_NOT_NEW", claim, number, "question")


def _copies_prompt(number: int, turn: Turn) -> Iterator[Check]:
    """Yield a finding where a text speaks of the task to rewrite something (Evol-Instruct)."""
    for part, text in (("question", turn.question), ("answer", turn.answer)):
        if (match := _PROMPT.search(text)) is not None:
            yield fault("GROWN_COPIES_PROMPT", match[0], number, part)


def fault(code: str, claim: str, turn: int | None = None, part: str | None = None) -> Check:
    """Return a finding that rejects a grown sample."""
    return Check(
        rule="growth", verdict="contradicted", code=code, turn=turn,
        part=part, claim=claim[:200],  # type: ignore[arg-type]
    )  # fmt: skip


def note(claim: str) -> Check:
    """Return a finding that rejects nothing: what was not checked, or was checked elsewhere."""
    return Check(rule="growth", verdict="unknown", claim=claim[:200])


_PROMPT: Final = re.compile(
    r"\b(?:given|original|rewritten|rephrased|harder|new) (?:questions?|prompts?|instructions?|"
    r"versions?|turns?)\b|\bseed tasks?\b|(?-i:\b[qa]\d\b(?= |:|,|\.))",
    re.IGNORECASE,
)
_EMPTY: Final = word_set(
    "a an the is are was were be do does did can could you i we me tell please see there here this "
    "that it its in on at of to and or any some what which who where how many in picture image "
    "photo scene shown seen visible exactly really also just now then actually"
)
"""Words that make a question longer and ask nothing more."""
