"""Things outside the annotated categories: supported by captions, or unknown."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final

from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.describing import (
    attribute_words,
    noun_name,
    parts,
    subject_before,
)
from data_tools.instruct.verify.flags import INTRODUCES, STANCE
from data_tools.instruct.verify.grammar import (
    BE,
    FUNCTION_WORDS,
    is_plural,
    last_of_phrase,
    word_set,
)
from data_tools.instruct.verify.knowledge import evidence
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence
from data_tools.instruct.verify.stances import FRAME_WORDS

SHOWN: Final = 5
"""At most this many things are named in the finding."""


def check(case: Case) -> Iterator[Check]:
    """Yield one finding for what neither categories nor captions know; none if there is nothing.

    It never rejects: boxes cannot refute what nobody was asked to box.
    """
    known = case.knowledge.nouns
    unknown: dict[str, tuple[Sentence, int, int]] = {}
    families, no_things = attribute_words(), _no_things()
    for sentence in case.answer_reading.sentences:
        hits = sentence.hits(INTRODUCES)
        if not hits:
            continue
        words, end = sentence.words, len(sentence.words)
        inside = {i for m in sentence.mentions for i in range(m.first, m.last + 1)}
        for index in hits:
            word = words[index]
            last = last_of_phrase(words, index + 1, end)
            if word in ("a", "an") and is_plural(words[last]):
                last -= 1  # `a candle burns`
            if last <= index or last in inside:
                continue
            noun = noun_name(words[last])
            if noun in known or noun in unknown or noun in no_things:
                continue
            if words[last] in families or words[last] in FUNCTION_WORDS:
                continue
            if sentence.asserts(index, last):
                unknown[noun] = (sentence, index, last)
    reading = case.answer_reading
    if reading.bits & STANCE and not _CUES.isdisjoint(reading.vocabulary):
        yield from _denied(case)
        yield from _denied_of_one(case)
    yield from _deserted(case)
    yield from _denied_when_asked(case)
    if unknown:
        claim = f"outside the categories and captions: {', '.join(list(unknown)[:SHOWN])}"
        where, first, last = next(iter(unknown.values()))
        span = where.span(first, last)
        yield case.check("other_object", "unknown", None, "answer", span, claim)


@cache
def _no_things() -> frozenset[str]:
    return _NOT_THINGS | parts()


def _denied(case: Case) -> Iterator[Check]:
    """Yield what the answer denies (`no mirror`) although two captions name it."""
    for sentence in case.answer_reading.sentences:
        words = sentence.words
        for index in sentence.hits(STANCE):
            if words[index] not in _DENYING:
                continue
            if words[index : index + 2] == ["no", "one"] or words[index] == "nobody":
                yield from _nobody(case, sentence, index)
                continue
            start = index + 1
            while start < len(words) and words[start] in _BETWEEN:
                start += 1
            last = last_of_phrase(words, start, len(words))
            if last < start or (
                noun_name(words[last]) != "crowd"
                and any(m.first <= last <= m.last for m in sentence.mentions)
            ):
                continue
            ids = case.knowledge.names(words[last])
            if len(ids) > 1 and (
                sentence.stances.of(start, last) == "denied"
                or _is_of_everything(words, index, start, last)
            ):
                span, claim = sentence.span(start, last), f"no {words[last]}"
                yield case.check(
                    "absence", "contradicted", "OBJECT_DENIED", "answer", span, claim, ids
                )


def _denied_of_one(case: Case) -> Iterator[Check]:
    """Judge `The kitchen lacks an island.` and `None of them has a bag.`, which two captions name.

    `There are no buses on the apron` is wrong where a caption has buses and an apron.
    """
    for sentence in case.answer_reading.sentences:
        for index in sentence.hits(STANCE):
            start = _denied_noun(sentence.words, index)
            last = last_of_phrase(sentence.words, start, len(sentence.words)) if start else -1
            if start == 0 or last < start or sentence.words[last + 1 : last + 2] == ["of"]:
                continue
            mention = next((m for m in sentence.mentions if m.first <= last <= m.last), None)
            ids = _naming(case, sentence.words[last], mention)
            least = 2
            if sentence.words[index] == "no" and sentence.words[index - 1] in BE:
                after = sentence.words[last + 1 :]
                places = {noun_name(word) for word in after[1:5]} - _NOT_THINGS
                if after[:1] not in (["on"], ["in"], ["at"]):
                    continue
                ids = tuple(
                    caption.id
                    for caption in case.knowledge.captions
                    if caption.id in ids
                    and any(
                        noun_name(word) in places
                        for word in caption.reading.words
                        if word not in FUNCTION_WORDS
                    )
                )
                least = 1
            if len(ids) >= least:
                span, claim = sentence.span(index, last), f"no {sentence.words[last]}"
                yield case.check(
                    "absence", "contradicted", "OBJECT_DENIED", "answer", span, claim, ids
                )
                return


def _denied_noun(words: Sequence[str], cue: int) -> int:
    """Return where the noun begins of which the subject has none (`lacks an island`); 0: none."""
    reach = words if words[cue] == "without" else words[:cue]
    if not (_SUPPOSING.isdisjoint(reach) and _SOME_OF_THEM.isdisjoint(words[:cue])):
        return 0
    start = cue + 1
    if words[cue] == "no":
        if words[cue - 1 : cue] not in (["has"], ["have"], ["is"], ["are"]):
            return 0
    elif words[cue] in _NONE_HAS:
        any_ = (i for i in range(cue + 1, min(cue + 7, len(words))) if words[i] in _ANY)
        start = next(any_, 0)
    elif words[cue] not in ("lack", "lacks", "lacking", "without"):
        return 0
    if start and words[cue] != "no" and words[start : start + 1] and words[start] not in _ANY:
        if not is_plural(words[start]) or words[cue] == "without":
            return 0
        return start
    while 0 < start < len(words) and words[start] in _ANY:
        start += 1
    return start if start < len(words) else 0


def _naming(case: Case, word: str, mention: Mention | None) -> tuple[int, ...]:
    """Return the captions that name a thing, by its categories if it has any; not people."""
    if mention is None or not mention.entry.categories:
        return case.knowledge.names(word)
    if "person" in mention.entry.categories:
        return ()
    named = case.knowledge.perhaps_named
    return tuple(sorted({n for c in mention.entry.categories for n in named.get(c, ()) if n}))


def _is_of_everything(words: Sequence[str], cue: int, start: int, last: int) -> bool:
    """Return whether nothing of the kind is said to be there: `without any snow`.

    `There is not a single cloud in the sky` is as well.
    """
    between = words[cue + 1 : start]
    if words[cue] == "without":
        return "any" in between or "single" in between
    after = words[last + 1 : last + 4]
    return (words[cue] == "no" or "single" in between) and after == ["in", "the", "sky"]


def _nobody(case: Case, sentence: Sentence, index: int) -> Iterator[Check]:
    """Judge `There is nobody in the image.` and `No one can be seen.`"""
    last = index + (sentence.words[index] == "no")
    _, end = sentence.clause(index)
    known = case.knowledge
    people = known.boxes_of(("person",))
    named = known.named.get("person", ())
    if (people or named) and all(word in FRAME_WORDS for word in sentence.words[last + 1 : end]):
        span, ids = sentence.span(index, last), evidence(people, named)
        yield case.check("absence", "contradicted", "OBJECT_DENIED", "answer", span, "nobody", ids)


def _deserted(case: Case) -> Iterator[Check]:
    """Judge `The stadium is empty.` where captions have a crowd, or many people are boxed."""
    reading, known = case.answer_reading, case.knowledge
    if _DESERTED.isdisjoint(reading.vocabulary):
        return
    crowd = known.names("crowd")
    people = known.boxes_of(("person",))
    for sentence in reading.sentences:
        words = sentence.words
        for index, word in enumerate(words):
            if word not in _DESERTED or not sentence.asserts(index, index):
                continue
            if not _PARTIAL.isdisjoint(words[max(0, index - 7) : index]):
                continue  # `many seats on the left are empty`
            last = last_of_phrase(words, index + 1, len(words))
            subject = subject_before(sentence, _linking_before(words, index))
            place = noun_name(words[last]) if last > index else subject[0] if subject else ""
            watched = place in _WATCHED and crowd
            if watched or (place in _PUBLIC and (len(people) > MANY or (crowd and people))):
                span, ids = sentence.span(index, index), evidence(people, crowd)
                yield case.check(
                    "absence",
                    "contradicted",
                    "OBJECT_DENIED",
                    "answer",
                    span,
                    f"{word} {place}",
                    ids,
                )
                return


def _linking_before(words: Sequence[str], index: int) -> int:
    """Return the index of the `is` that a word at `index` follows, adverbs between."""
    before = index - 1
    while before > 0 and words[before] not in BE and index - before < 3:
        before -= 1
    return max(before, 0)


def _denied_when_asked(case: Case) -> Iterator[Check]:
    """Judge `Is there a mirror in the room?` `No.`"""
    question, sentence = case.question, case.question.sentence
    if sentence is None or question.polarity != "no":
        return
    words = sentence.words
    has = not _HAVING.isdisjoint(words[2:])
    if words[1:2] != ["there"] and "see" not in words[:4] and not has:
        return
    begin = next((i for i, word in enumerate(words) if word in _HAVING), 0) if has else 0
    start = next((i + 1 for i in range(begin, len(words)) if words[i] in ("a", "an", "any")), 0)
    last = last_of_phrase(words, start, len(words))
    if any(m.first <= last <= m.last for m in sentence.mentions):
        return  # `objects` says whether it is there
    ids = case.knowledge.names(words[last]) if 0 < start <= last else ()
    if ids and all(word in FRAME_WORDS for word in words[last + 1 :]):
        span, claim = sentence.span(start, last), f"no {words[last]}"
        yield case.check("absence", "contradicted", "OBJECT_DENIED", "question", span, claim, ids)


MANY: Final = 4
"""With more people than this, no street is deserted."""
_DESERTED: Final = word_set("empty deserted abandoned")
_PARTIAL: Final = word_set("many some several few most half partly other both certain one two")
_WATCHED: Final = word_set("stadium stand arena bleachers grandstand row seat chair tribune")
_PUBLIC: Final = word_set("street beach road sidewalk square plaza park station market restaurant")
_DENYING: Final = word_set("nobody no not isn't aren't don't can't cannot doesn't without")
_NONE_HAS: Final = word_set("none nobody")
_ANY: Final = word_set("any a an single")
_SUPPOSING: Final = word_set("would could might may if should can will must perhaps probably")
_SOME_OF_THEM: Final = word_set("one other another second third left right some half most few")
_CUES: Final = _DENYING | _NONE_HAS | word_set("lack lacks lacking")
_HAVING: Final = word_set("have has wear wearing")
_BETWEEN: Final = word_set("any a an see show contain have be seen visible the single")
_NOT_THINGS: Final = word_set(
    "image picture photo photograph scene shot view background foreground middle center centre "
    "left right corner distance camera viewer moment time day night way lot variety number group "
    "sense atmosphere mood feeling impression setting place area space position direction "
    "viewpoint air sky light ground color colour shape size style activity event situation reason "
    "fact "
    "possibility chance result effect contrast focus attention arrangement collection row pair "
    "series line expression pose look interest level amount thing object item detail one other"
)
