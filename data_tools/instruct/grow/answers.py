"""Whether an answer says what the parent's says, as far as that can be compared."""

from typing import Final

from data_tools.instruct.clean.choices import choice_of
from data_tools.instruct.grow.novelty import words_of
from data_tools.instruct.schema import Turn
from data_tools.instruct.verify.grammar import word_set
from vlm_sft.best_of.graders import final_answer, is_right
from vlm_sft.evaluation.scores.exact import read_count

FINAL: Final = "answer:"
"""Begins the last sentence of an answer by `steps`."""


def says_the_same(before: Turn, turn: Turn, *, final: bool) -> str | None:
    """Return why an answer cannot be that of the parent's turn; None if nothing speaks against it.

    Compared are yes and no, counts, and the choices of a question (sides, options). Of other text
    only what follows `Answer:` can be compared: every word of it must be in the parent's question
    or answer.

    Args:
        before: The parent's turn.
        turn: The new one, with the same question or one that asks the same.
        final: Whether the answer has to end with `Answer: ...`.
    """
    if final and FINAL not in turn.answer.lower():
        return "no final `Answer: ...`"
    core = _core(before)
    said = final_answer(turn.answer)
    if core is not None:
        same = is_right(said, core)
        if not final:  # in other words: `One can see two dogs.`
            last = read_count(turn.answer, "last")
            same = same or is_right(turn.answer, core) or (last is not None and str(last) == core)
        return None if same else f"{said!r}, the parent: {core!r}"
    chosen = choice_of(before)
    if chosen is not None and chosen.family != "yes_no":
        text = said if final else turn.answer
        again = choice_of(before.model_copy(update={"answer": text}))
        return None if again == chosen else f"{said!r}, the parent: {before.answer!r}"
    if not final:
        return None
    known = {*words_of(before.answer), *words_of(before.question), *_SMALL}
    new = [word for word in words_of(said) if word not in known]
    if not words_of(said):
        return "an empty final answer"
    return f"{' '.join(new)!r} is not in the parent's answer" if new else None


def _core(turn: Turn) -> str | None:
    """Return the yes, no or number that an answer comes down to; None if it is other text."""
    words = words_of(turn.answer)
    if words and words[0] in ("yes", "no"):
        return words[0]
    if turn.kind != "count":
        return None
    count = read_count(final_answer(turn.answer))
    return None if count is None else str(count)


_SMALL: Final = word_set(
    "a an the it its is are was there they he she this that these those one some in on at of to "
    "and with by for from"
)
"""Words that a shortened answer may add."""
