"""Things that captions hardly leave out (a rabbit, a helicopter), real ones for statues, and awake
ones for sleepers: contradicted where several captions say nothing of them, or the other.
"""

from collections.abc import Iterator
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case, Part
from data_tools.instruct.verify.flags import SIGHT
from data_tools.instruct.verify.grammar import FUNCTION_WORDS, singular, word_set
from data_tools.instruct.verify.reading import Sentence

CAPTIONS: Final = 4
"""How many captions an image needs before their silence about a thing counts against it."""


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for the first striking thing that no caption has, and for sleepers."""
    known = case.knowledge
    if case.answer_reading.bits & SIGHT and len(known.captions) >= CAPTIONS:
        yield from _check_unseen(case)


def check_yes_no(case: Case) -> Iterator[Check]:
    """Judge `Is there a fountain?` `Yes.`"""
    question, sentence = case.question, case.question.sentence
    if question.polarity != "yes" or sentence is None or len(case.knowledge.captions) < CAPTIONS:
        return
    for index in sentence.hits(SIGHT):
        if _is_unseen(case, sentence, index):
            yield _finding(case, sentence, index, "question")
            return


def _check_unseen(case: Case) -> Iterator[Check]:
    for sentence in case.answer_reading.sentences:
        for index in sentence.hits(SIGHT):
            if sentence.asserts(index, index) and _is_unseen(case, sentence, index):
                yield _finding(case, sentence, index, "answer")
                return


def _is_unseen(case: Case, sentence: Sentence, index: int) -> bool:
    words, known = sentence.words, case.knowledge
    name = singular(words[index])
    after = words[index + 1] if index + 1 < len(words) else ""
    modifies = after and after[0].isalpha() and after not in FUNCTION_WORDS and (
        not after.endswith(("s", "ing", "ed"))
    )  # fmt: skip
    if modifies or not _SHAPED.isdisjoint(words[max(0, index - 5) : index]):
        return False
    if any(m.first <= index <= m.last and m.entry.categories for m in sentence.mentions):
        return False  # `objects` knows it
    alike = _groups().get(name, frozenset({name}))
    if not alike.isdisjoint(known.nouns) or known.shows_toys:
        return False
    if case.sample_type == "reasoning":
        # what is not pointed to may be thought of only
        return words[max(0, index - 3) : index] != [] and not _INTRODUCING.isdisjoint(
            words[max(0, index - 3) : index]
        )
    return True


def _finding(case: Case, sentence: Sentence, index: int, where: Part) -> Check:
    span, claim = sentence.span(index, index), sentence.words[index]
    return case.check(
        "other_object", "contradicted", "OBJECT_NOT_FOUND", where, span, claim
    )  # fmt: skip


@cache
def _groups() -> dict[str, frozenset[str]]:
    """Return for a word the names by which others may have called the thing."""
    return {
        word: frozenset(group)
        for group in wording.load("facts")["striking_alike"]
        for word in group
    }


_INTRODUCING: Final = word_set("the this that")
_SHAPED: Final = word_set(
    "shape shaped pattern print printed cartoon logo like stuffed plush toy costume picture poster "
    "image drawing sticker decorated decoration statue sculpture painting figurine model photo"
)
