"""In front of, behind, on, under: contradicted where captions have it the other way round."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verify.attributes import asked_noun
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.describing import PRONOUN, Relation, noun_name, relations
from data_tools.instruct.verify.flags import PLACE, RELATION
from data_tools.instruct.verify.grammar import last_of_phrase, singular, word_set
from data_tools.instruct.verify.reading import Sentence


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for each relation that captions have the other way round."""
    if not case.answer_reading.bits & RELATION or not case.knowledge.relations:
        return
    for number, sentence in enumerate(case.answer_reading.sentences):
        for relation in relations(sentence):
            one = relation.one
            if one == PRONOUN:
                one = asked_noun(case) if number == 0 else PRONOUN
            if one == PRONOUN or not sentence.asserts(relation.first, relation.last):
                continue
            ids = opposing(case, one, relation)
            if ids:
                claim = f"{one} {relation.how} {relation.other}"
                span = sentence.span(relation.first, relation.last)
                yield case.check(
                    "relation", "contradicted", "RELATION_REFUTED", "answer", span, claim, ids
                )


def check_yes_no(case: Case) -> Iterator[Check]:
    """Judge `Is the truck in front of the sign?` by the relations of captions."""
    question, sentence = case.question, case.question.sentence
    if question.kind != "yes_no" or question.polarity is None or sentence is None:
        return
    for relation in relations(sentence):
        one = asked_noun(case) if relation.one == PRONOUN else relation.one
        ids: tuple[int, ...] = ()
        if question.polarity == "yes":
            ids = opposing(case, one, relation)
        if ids:
            span = sentence.span(relation.first, relation.last)
            claim = f"{one} {relation.how} {relation.other}: {question.polarity}"
            yield case.check(
                "relation", "contradicted", "RELATION_REFUTED", "question", span, claim, ids
            )


def check_where(case: Case) -> Iterator[Check]:
    """Judge `Where is the cat?` `In the bathtub.` where captions have it on something else.

    Two captions must name the thing with another thing to be on or in, and none this one.
    """
    asked, known = case.question.sentence, case.knowledge
    if asked is None or asked.words[0] != "where" or not case.answer_reading.sentences:
        return
    # what has no category goes by its noun: `Where is the lamp?`
    names = case.asked[0].entry.categories if case.asked else (asked_noun(case),)
    surfaces = _surfaces()
    if len(names) != 1 or names[0] == PRONOUN:
        return
    sentence = case.answer_reading.sentences[0]
    words = sentence.words
    unknown = _unknown_place(case, names[0], sentence)
    if unknown is not None:
        index, ids = unknown
        span, claim = sentence.span(index, index), f"{names[0]} at {words[index]}"
        yield case.check("relation", "contradicted", "RELATION_REFUTED", "answer", span, claim, ids)
        return
    for index, word in enumerate(words):
        group = surfaces.get(singular(word))
        if group is None or not _PLACING.intersection(words[max(0, index - 4) : index]):
            continue
        naming = known.named.get(names[0], ()) if case.asked else known.names(names[0])
        there = {n for n in naming if n}
        on = {n: set[int]() for n in there}
        for caption in known.captions:
            if caption.id in on:
                vocabulary = caption.reading.vocabulary
                on[caption.id] = {surfaces[s] for s in map(singular, vocabulary) if s in surfaces}
        named = {surfaces.get(singular(w)) for w in known.words}
        boxed = {surfaces.get(name.split()[-1]) for name in known.boxes}
        ids = tuple(sorted(n for n, groups in on.items() if groups))
        if len(ids) > 1 and group not in named | boxed and sentence.asserts(index, index):
            claim = f"{names[0]} on {word}"
            span = sentence.span(index, index)
            yield case.check(
                "relation", "contradicted", "RELATION_REFUTED", "answer", span, claim, ids
            )
        return


def check_surface(case: Case) -> Iterator[Check]:
    """Judge `The cat sits on the roof.` where three captions have it on or in something else.

    Nothing in captions or boxes may be what the answer has it on.
    """
    surfaces, known = _surfaces(), case.knowledge
    for sentence in case.answer_reading.sentences:
        words = sentence.words
        for start in sentence.hits(PLACE):
            if words[start] not in _PLACING or RESTING.isdisjoint(words[max(0, start - 4) : start]):
                continue
            after = range(start + 1, min(start + 7, len(words)))
            index = next((i for i in after if singular(words[i]) in surfaces), None)
            name = _placed_before(case, sentence, start) if index is not None else None
            if index is None or name is None or not sentence.asserts(index, index):
                continue
            on: dict[int, set[int]] = {}
            for caption in known.captions:
                if caption.id in known.named.get(name, ()):
                    on[caption.id] = _on_surfaces(caption.reading.words)
            named = {surfaces.get(singular(w)) for w in known.words}
            boxed = {surfaces.get(box.split()[-1]) for box in known.boxes}
            ids = tuple(sorted(n for n, groups in on.items() if groups and n))
            if len(ids) > 2 and surfaces[singular(words[index])] not in named | boxed:
                claim, span = f"{name} on {words[index]}", sentence.span(start, index)
                yield case.check(
                    "relation", "contradicted", "RELATION_REFUTED", "answer", span, claim, ids
                )
                return


def _placed_before(case: Case, sentence: Sentence, index: int) -> str | None:
    """Return the category of the one thing that a phrase at `index` places after a verb."""
    begin, _ = sentence.clause(index)
    words = sentence.words
    before = [m for m in sentence.mentions if begin <= m.first and m.last < index]
    if not before and words[begin] in ("it", "he", "she"):
        before = list(case.asked[:1])
    if len(before) != 1 or len(before[0].entry.categories) != 1 or before[0].number != "one":
        return None
    name = before[0].entry.categories[0]
    return name if name in case.knowledge.single and name != "person" else None


def _on_surfaces(words: Sequence[str]) -> set[int]:
    """Return the groups of surfaces that a caption has something on or in."""
    surfaces = _surfaces()
    return {
        surfaces[name]
        for index, word in enumerate(words)
        if (name := singular(word)) in surfaces
        and not _PLACING.isdisjoint(words[max(0, index - 6) : index])
    }


def _unknown_place(case: Case, name: str, sentence: Sentence) -> tuple[int, tuple[int, ...]] | None:
    """Return the place that an answer gives, and the captions, where none knows any word of it.

    Four captions must put the thing on, in or at something.
    """
    known, words = case.knowledge, sentence.words
    places: list[tuple[int, int]] = []
    for index, word in enumerate(words):
        if (word in _AT or word == "of") and index + 1 < len(words):
            start = index + 1 + (words[index + 1] == "to")
            while start < len(words) and words[start] in _ARTICLES:
                start += 1
            last = last_of_phrase(words, start, len(words))
            if last >= start and words[last] not in _PARTS_OF_PLACES:
                places.append((start, last))
    if not places or not sentence.asserts(places[0][0], places[-1][1]):
        return None
    for start, last in places:
        mention = next((m for m in sentence.mentions if m.first <= last <= m.last), None)
        if any(noun_name(words[i]) in known.nouns for i in range(start, last + 1)) or (
            mention is not None and known.support(mention.entry, mention.word) is not None
        ):
            return None
    ids = {
        caption.id
        for caption in known.captions
        if caption.id in known.named.get(name, ()) and not _AT.isdisjoint(caption.reading.words)
    }
    return (places[0][1], tuple(sorted(ids))) if len(ids) > 3 else None


@cache
def _surfaces() -> dict[str, int]:
    """Return the nouns of what things are on or in, each with the number of its group."""
    groups = wording.load("facts")["surfaces"]
    return {word: number for number, group in enumerate(groups) for word in group}


def opposing(case: Case, one: str, claim: Relation) -> tuple[int, ...]:
    """Return the captions with the opposite relation; none where any caption has this one."""
    if claim.other == "sign" and "stop sign" in case.knowledge.boxes:
        claim = replace(claim, other="stop sign")
    same, opposite = {(one, claim.how, claim.other)}, {(one, _OPPOSITE[claim.how], claim.other)}
    if claim.how in ("front", "behind"):
        same.add((claim.other, _OPPOSITE[claim.how], one))
        opposite.add((claim.other, claim.how, one))
    else:
        opposite.add((claim.other, claim.how, one))
    found: set[int] = set()
    for relation, number in case.knowledge.relations:
        key = (relation.one, relation.how, relation.other)
        if key in same:
            return ()
        if key in opposite:
            found.add(number)
    return tuple(sorted(n for n in found if n))


_AT: Final = word_set("on in at inside onto into atop under")
_ARTICLES: Final = word_set("a an the his her its their this some")
_PARTS_OF_PLACES: Final = word_set(
    "top front side left right middle center centre corner edge image picture photo foreground "
    "foot end row background distance view frame back bottom room ground floor air wall area scene "
    "outside half"
)
RESTING: Final = word_set(
    "sits sit sitting lies lie lying lays laying stands stand standing rests resting sleeps "
    "sleeping perched perches placed hopped jumped climbed settled left put curled seated mounted"
)
_PLACING: Final = word_set("on in at inside onto into atop")
_OPPOSITE: Final = {"front": "behind", "behind": "front", "on": "under", "under": "on"}
