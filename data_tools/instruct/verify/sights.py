"""Things that captions hardly leave out (a rabbit, a helicopter), real ones for statues, and awake
ones for sleepers: contradicted where several captions say nothing of them, or the other.
"""

from collections.abc import Iterator
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case, Part
from data_tools.instruct.verify.describing import noun_name
from data_tools.instruct.verify.flags import SIGHT
from data_tools.instruct.verify.grammar import FUNCTION_WORDS, singular, word_set
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence

CAPTIONS: Final = 4
"""How many captions an image needs before their silence about a thing counts against it."""


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for the first striking thing that no caption has, and for sleepers."""
    known = case.knowledge
    if case.answer_reading.bits & SIGHT and len(known.captions) >= CAPTIONS:
        yield from _check_unseen(case)
    if len(known.captions) >= CAPTIONS:
        yield from _check_mishaps(case)
    yield from _check_asleep(case)
    yield from _check_real(case)
    yield from _check_alone(case)


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


def _check_mishaps(case: Case) -> Iterator[Check]:
    """Judge `The bat has snapped in two.` and `It is raining.`, of which no caption has a word."""
    reading, known = case.answer_reading, case.knowledge
    for word in sorted(reading.vocabulary & _mishaps().keys()):
        if known.shows_toys or not _mishaps()[word].isdisjoint(known.words):
            continue
        for sentence in reading.sentences:
            if word not in sentence.words:
                continue
            index = sentence.words.index(word)
            if sentence.asserts(index, index) and sentence.words[index + 1 :][:1] != ["with"]:
                span = sentence.span(index, index)
                yield case.check(
                    "attribute", "contradicted", "ATTRIBUTE_WRONG", "answer", span, word
                )
                return


@cache
def _mishaps() -> dict[str, frozenset[str]]:
    """Return what captions hardly leave out, each with the words that may stand for it."""
    return {
        word: frozenset(group["words"] + group["evidence"])
        for group in wording.load("facts")["mishaps"]
        for word in group["words"]
    }


def _check_asleep(case: Case) -> Iterator[Check]:
    """Judge `The cat is awake.` where captions have it sleep and none lets it look."""
    reading, known = case.answer_reading, case.knowledge
    if _AWAKE.isdisjoint(reading.vocabulary):
        return
    ids = known.actions.get("sleep", ())
    if not ids or known.actions.get("look"):
        return
    for sentence in reading.sentences:
        for index, word in enumerate(sentence.words):
            if word in _AWAKE and sentence.asserts(index, index):
                span, found = sentence.span(index, index), tuple(n for n in ids if n)
                yield case.check(
                    "attribute", "contradicted", "ATTRIBUTE_WRONG", "answer", span, word, found
                )
                return


def _check_real(case: Case) -> Iterator[Check]:
    """Judge living women where three captions have a statue of women, and the answer has none."""
    known, lexicon = case.knowledge, case.policy.lexicon
    found = known.depicted
    if not found:
        return
    read = case.answer_reading.vocabulary | case.question_reading.vocabulary
    if not lexicon.depictions.isdisjoint(read) or not _FIGURES.isdisjoint(read):
        return
    for sentence, mention in case.answer_reading.mentions[:1]:
        ids = found.get(singular(mention.word))
        if ids and mention.stance == "asserted" and _does(sentence, mention):
            span = sentence.span(mention.first, mention.last)
            claim = f"living {mention.word}"
            evidence = tuple(sorted(n for n in ids if n))
            yield case.check("kind", "contradicted", "KIND_WRONG", "answer", span, claim, evidence)


def _does(sentence: Sentence, mention: Mention) -> bool:
    after = sentence.words[mention.last + 1 : mention.last + 3]
    return bool(after) and (
        after[0].endswith("ing") or after[0] in _ACTS or after[0] in ("is", "are")
    )


def _check_alone(case: Case) -> Iterator[Check]:
    """Judge `The banana is the only thing on the plate.` where captions have it with others."""
    reading, known = case.answer_reading, case.knowledge
    if "only" not in reading.vocabulary:
        return
    for sentence in reading.sentences:
        words = sentence.words
        for index in range(len(words) - 3):
            if words[index] != "only" or words[index + 1] not in (
                "thing",
                "food",
                "object",
                "item",
            ):
                continue
            place = noun_name(words[-1])
            thing = next((m for m in sentence.mentions if m.last < index), None)
            if thing is None or words[index + 2] not in ("on", "in"):
                continue
            ids = tuple(
                caption.id
                for caption in known.captions
                if place in {noun_name(w) for w in caption.reading.vocabulary}
                and _is_joined(caption.reading.words, thing.word)
            )
            if ids:
                span, found = sentence.span(index, len(words) - 1), tuple(n for n in ids if n)
                claim = f"only {thing.word} {words[index + 2]} {place}"
                yield case.check(
                    "absence", "contradicted", "OBJECT_DENIED", "answer", span, claim, found
                )
                return


def _is_joined(words: list[str], thing: str) -> bool:
    """Return whether another thing is named with this one: `a banana and pudding`."""
    return any(words[i] == thing and words[i + 1] in ("and", "with") for i in range(len(words) - 2))


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
_ITEMS: Final = word_set("thing food object item")
_AWAKE: Final = word_set("awake wide-awake alert")
_ACTS: Final = word_set(
    "sit sits stand stands walk walks chat chats talk talks wait waits laugh laughs smile smiles "
    "rest rests relax relaxes look looks is are"
)
_FIGURES: Final = word_set("figure figures bronze sculpture sculptures statues cast metal")
