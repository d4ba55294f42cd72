"""Colors, materials and states, compared with those that captions give to the same noun."""

import re
from collections.abc import Iterator, Sequence
from functools import cache

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.describing import (
    ANIMALS,
    ONE,
    PRONOUN,
    Attribute,
    Family,
    attribute_words,
    attributes,
    noun_at,
    noun_name,
    parts,
    subject_before,
    switched,
)
from data_tools.instruct.verify.flags import ATTRIBUTE
from data_tools.instruct.verify.grammar import (
    BE,
    DEFINITE,
    INDEFINITE,
    QUANTITIES,
    determiner,
    last_of_phrase,
    word_set,
)
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for each color, material and state of the answer."""
    yield from _check_switched(case)
    reading = case.answer_reading
    if not reading.bits & ATTRIBUTE:
        return
    seen: set[str] = set()
    for number, sentence in enumerate(reading.sentences):
        for attribute in attributes(sentence):
            if not sentence.asserts(attribute.first, attribute.last):
                continue
            noun = attribute.noun
            if noun in (PRONOUN, ONE):
                noun = asked_noun(case) if number == 0 else _previous(reading.sentences, number)
            if attribute.noun == ONE and not _is_listed(case, noun):
                continue
            ids = contradicting(case, attribute, noun, _is_worn_by_first(case, sentence, attribute))
            if ids is not None and _is_one_of_many(case, sentence, attribute, noun):
                continue
            if ids is not None:
                seen.update(attribute.words)
                span = sentence.span(attribute.first, attribute.last)
                claim = f"{' and '.join(attribute.words)} {noun}"
                yield case.check(
                    "attribute", "contradicted", "ATTRIBUTE_WRONG", "answer", span, claim, ids
                )
    yield from _check_negated(case)
    yield from _check_bare(case)
    yield from _check_words(case, seen)


def check_yes_no(case: Case) -> Iterator[Check]:
    """Judge `Is the bus red?` `Yes.`, and `No.` where captions have it red."""
    question, sentence = case.question, case.question.sentence
    if question.kind != "yes_no" or question.polarity is None or sentence is None:
        return
    families, words = attribute_words(), sentence.words
    last = len(words) - 1
    while last > 0 and families.get(words[last]) is None and words[last] in ("color", "colour"):
        last -= 1
    family = families.get(words[last])
    if family is None and question.polarity == "no":
        yield from _check_denied(case, sentence, last)
    if (
        family is None
        or words[0] not in (BE | {"has", "have"})
        or words[max(0, last - 1)] in ("a", "an", "or", "and")
    ):
        return
    noun = asked_noun(case)
    many = noun_name(noun) != noun or words[0] in ("are", "were", "have")
    claim = Attribute(family, (words[last],), noun, many, last, last, True)
    text = f"{words[last]} {noun}"
    ids = contradicting(case, claim, noun) if question.polarity == "yes" else None
    if question.polarity == "no":
        given = case.knowledge.attributes.get((family, noun), [])
        same = _same_side(words[last])
        if given and all(not same.isdisjoint(known.words) for known, _ in given):
            ids, text = tuple(number for _, number in given if number), f"not {text}"
    if ids is not None:
        span = sentence.span(last, last)
        yield case.check(
            "attribute", "contradicted", "ATTRIBUTE_WRONG", "question", span, text, ids
        )


def _check_negated(case: Case) -> Iterator[Check]:
    """Judge `It has not been peeled yet.` where captions have `a peeled banana`."""
    for number, sentence in enumerate(case.answer_reading.sentences):
        words = sentence.words
        for index in sentence.hits(ATTRIBUTE):
            before = words[max(0, index - 3) : index]
            if "not" not in before or attribute_words()[words[index]] != "state":
                continue
            verb = index - len(before) + before.index("not")
            while verb > 0 and words[verb - 1] in _AUXILIARIES:
                verb -= 1
            subject = subject_before(sentence, verb)
            noun = subject[0] if subject is not None else PRONOUN
            if noun == PRONOUN:
                noun = (
                    asked_noun(case)
                    if number == 0
                    else _previous(case.answer_reading.sentences, number)
                )
            given = case.knowledge.attributes.get(("state", noun), [])
            if given and all(words[index] in known.words for known, _ in given):
                ids = tuple(caption for _, caption in given if caption)
                span, claim = sentence.span(index, index), f"not {words[index]} {noun}"
                yield case.check(
                    "attribute", "contradicted", "ATTRIBUTE_WRONG", "answer", span, claim, ids
                )
                return


def _is_listed(case: Case, noun: str) -> bool:
    """Return whether a caption lists several colors of the noun: `a red and green bucket`."""
    given = case.knowledge.attributes.get(("color", noun), [])
    return any(len(known.words) > 1 for known, _ in given)


def _check_denied(case: Case, sentence: Sentence, last: int) -> Iterator[Check]:
    """Judge `Has the wall been painted?` `No.` where captions have `a painted wall`."""
    word, noun = sentence.words[last], asked_noun(case)
    if not word.endswith(("ed", "en")) or noun == PRONOUN:
        return
    ids = tuple(
        caption.id
        for caption in case.knowledge.captions
        if word in caption.reading.vocabulary
        and any(
            said.words[at] == word and noun_name(said.words[at + 1]) == noun
            for said in caption.reading.sentences
            for at in range(len(said.words) - 1)
        )
    )
    if ids:
        span, text = sentence.span(last, last), f"not {word} {noun}"
        found = tuple(number for number in ids if number)
        yield case.check(
            "attribute", "contradicted", "ATTRIBUTE_WRONG", "question", span, text, found
        )


def contradicting(
    case: Case, claim: Attribute, noun: str, worn_by_first: bool = False
) -> tuple[int, ...] | None:
    """Return the captions that give the noun another attribute; None unless they decide.

    Args:
        case: The turn.
        claim: What the answer states.
        noun: Of which noun, pronouns resolved.
        worn_by_first: Whether it belongs to the first person whom the answer names, who is the one
            that captions describe.

    They decide where none of them gives the noun an attribute that may be the same, and the noun
    can only be one thing.
    """
    known = case.knowledge
    noun = _whole(case, noun)
    if noun == "light" and "traffic light" in known.boxes:
        noun = "traffic light"
    found = known.attributes.get((claim.family, noun), ())
    if not found and claim.family == "color" and claim.predicate and claim.many:
        return _varied(case, noun)
    if not found or (claim.family == "color" and (noun in _uncolored() or known.is_monochrome)):
        return None
    if claim.family == "state":
        opposite = {w for word in claim.words for w in _opposites().get(word, ())}
        stated = {word for attribute, _ in found for word in attribute.words}
        if not stated & opposite or stated & set(claim.words) or _shared_side(claim.words, stated):
            return None
    else:
        stated = {word for attribute, _ in found for word in attribute.words}
        same = [any(alike(claim.family, one, other) for other in stated) for one in claim.words]
        # `brown and pink` is wrong of what captions call `brown and black`
        listed = 1 < len(claim.words) <= max(len(attribute.words) for attribute, _ in found)
        if all(same) or (any(same) and not listed):
            return None
    known_ones = [attribute for attribute, _ in found]
    if not _is_one_thing(case, claim, noun, known_ones, worn_by_first):
        return None
    return tuple(number for _, number in found if number)


def _is_one_of_many(case: Case, sentence: Sentence, claim: Attribute, noun: str) -> bool:
    """Return whether `a tall red cabinet` may be another one than `white cabinets` of captions."""
    given = case.knowledge.attributes.get((claim.family, noun), ())
    indefinite = determiner(sentence.words, claim.first)[0] == "indefinite"
    return indefinite and not claim.many and all(known.many for known, _ in given)


def _varied(case: Case, noun: str) -> tuple[int, ...] | None:
    """Return the captions by which things that are all of one color have several."""
    named = {*case.knowledge.named.get(noun, ()), *case.knowledge.names(noun)}
    ids = (
        caption.id
        for caption in case.knowledge.captions
        if caption.id in named and _VARIED.search(caption.reading.text)
    )
    return tuple(number for number in ids if number) or None


def alike(family: Family, one: str, other: str) -> bool:
    """Return whether two people may use these two words for the same color or material."""
    if one == other:
        return True
    groups = _groups(family)
    return not groups.get(one, frozenset()).isdisjoint(groups.get(other, frozenset()))


def _is_one_thing(
    case: Case, claim: Attribute, noun: str, known: Sequence[Attribute], worn_by_first: bool
) -> bool:
    """Return whether claim and captions must speak of the same thing, or of all such things."""
    knowledge = case.knowledge
    if claim.predicate and claim.many:
        return True  # `both buckets are yellow` is wrong if one of them is red
    if knowledge.boxes.get(noun):
        one = knowledge.prominent(noun) == 1 or noun in knowledge.single
        return one or (claim.many and any(a.many for a in known))
    if noun in _wearables() and knowledge.prominent("person") > 1:
        return worn_by_first or _asks_about_one_person(case)
    return claim.many == any(a.many for a in known) or not claim.many


def _is_worn_by_first(case: Case, sentence: Sentence, attribute: Attribute) -> bool:
    """Return whether the noun belongs to the first person, a single one, whom the answer names."""
    people = [(s, m) for s, m in case.answer_reading.mentions if "person" in m.entry.categories]
    if not people or people[0][1].number != "one" or people[0][1].entry.categories != ("person",):
        return False
    first, person = people[0]
    before = [m for s, m in people if s is sentence and m.last < attribute.first]
    if before:
        same = before[-1] is person or before[-1].first == person.last + 1  # `male player`
        return first is sentence and same
    return sentence.words[0] in ("he", "she", "his", "her") and len(people) == 1


def _asks_about_one_person(case: Case) -> bool:
    """Return whether the question is about the one person whom captions describe."""
    asked = [m for m in case.question.mentions if "person" in m.entry.categories]
    return bool(asked) and all(m.number == "one" for m in asked)


def asked_noun(case: Case) -> str:
    """Return the noun that the question asks about; `it` if there is none."""
    sentence = case.question.sentence
    if sentence is None:
        return PRONOUN
    words = sentence.words
    start = next((i + 1 for i, word in enumerate(words) if word in BE or word == "does"), 0)
    if words[0] in ("has", "have"):
        start = 1  # `has the banana been peeled`
    while start < len(words) and (
        words[start] in DEFINITE or words[start] in INDEFINITE or words[start] in QUANTITIES
        or words[start] == "there"
    ):  # fmt: skip
        start += 1
    last = last_of_phrase(words, start, len(words))
    while last > start and words[last] in attribute_words():
        last -= 1  # `is the book open or closed`
    owned = last >= start and words[start - 1] == "its" and words[last] in parts()
    if last < start or owned:
        return _name_of(case.asked) if case.before is not None else PRONOUN
    if words[last] in parts() and words[last + 1 : last + 2] == ["of"]:
        inner = last_of_phrase(words, last + 3, len(words))
        last = inner if inner > last + 2 else last
    return noun_at(sentence, last)


def _name_of(mentions: Sequence[Mention]) -> str:
    """Return the category of the first of these, where it has one."""
    names = mentions[0].entry.categories if mentions else ()
    return names[0] if len(names) == 1 else PRONOUN


def _check_bare(case: Case) -> Iterator[Check]:
    """Judge `What color is the bus?` `Dark red.`"""
    words = case.answer_reading.spoken
    families = attribute_words()
    if not words or len(words) > 5 or case.question.kind != "open":
        return
    asked = case.question_reading.vocabulary
    given = tuple(word for word in words if word in families)
    if not given or any(word not in families and word not in _BARE_WORDS for word in words):
        return
    family = families[given[0]]
    if not (asked & _ASKS[family] or any(families.get(word) == family for word in asked)):
        return  # `Is it red or blue?` asks for a color too
    noun = asked_noun(case)
    many = noun_name(noun) != noun
    ids = contradicting(case, Attribute(family, given, noun, many, 0, 0, predicate=True), noun)
    if ids is not None:
        claim = f"{' and '.join(given)} {noun}"
        span = (0, len(case.answer_reading.text))
        yield case.check("attribute", "contradicted", "ATTRIBUTE_WRONG", "answer", span, claim, ids)


def _check_switched(case: Case) -> Iterator[Check]:
    """Judge whether a lamp or screen is on or off, where captions say the other and not this."""
    given = case.knowledge.switched
    if not given:
        return
    question, asked = case.question, " ".join(case.question_reading.words)
    claims = [
        (name, is_on, "answer") for name, is_on in switched(" ".join(case.answer_reading.words))
    ]
    if question.kind == "yes_no" and question.polarity is not None:
        yes = question.polarity == "yes"
        claims += [(name, is_on == yes, "question") for name, is_on in switched(asked)]
    for name, is_on, part in claims:
        if (name, not is_on) in given and (name, is_on) not in given:
            reading = case.answer_reading if part == "answer" else case.question_reading
            text, where = f"{name} {'on' if is_on else 'off'}", (0, len(reading.text))
            ids = tuple(number for number in given[name, not is_on] if number)
            yield case.check(
                "attribute", "contradicted", "ATTRIBUTE_WRONG",
                "answer" if part == "answer" else "question", where, text, ids,
            )  # fmt: skip
            return


def _check_words(case: Case, seen: set[str]) -> Iterator[Check]:
    """Yield whether any caption has the word; unknown words reject only if the settings say so."""
    reading, knowledge = case.answer_reading, case.knowledge
    listed = _listed()
    known = (reading.vocabulary & listed) - seen
    for sentence in reading.sentences if known else ():
        for index in sentence.hits(ATTRIBUTE):
            word = sentence.words[index]
            if word not in known:
                continue
            known -= {word}
            span = sentence.span(index, index)
            captions = knowledge.words.get(word, ())
            if captions:
                ids = tuple(number for number in captions if number)
                yield case.check("attribute", "supported", None, "answer", span, word, ids)
            else:
                refused = case.config.unknown_attributes == "reject"
                code = "ATTRIBUTE_UNKNOWN" if refused and case.sample_type != "reasoning" else None
                yield case.check("attribute", "unknown", code, "answer", span, word)


def _previous(sentences: Sequence[Sentence], number: int) -> str:
    """Return what a pronoun stands for: the first thing that the sentence before names."""
    return _name_of(sentences[number - 1].mentions)


def _whole(case: Case, noun: str) -> str:
    """Return the animal for its fur, the thing for its skin or wrapper, if it can be only one."""
    if noun in _coverings() and ("state", noun) not in case.knowledge.attributes:
        given = {name for family, name in case.knowledge.attributes if family == "state"}
        named = {n for _, m in case.answer_reading.mentions for n in m.entry.categories} & given
        return named.pop() if len(named) == 1 else noun  # the skin of the banana
    if noun not in _fur() or ("color", noun) in case.knowledge.attributes:
        return noun
    named = {
        name
        for reading in (case.question_reading, case.answer_reading)
        for _, mention in reading.mentions
        for name in mention.entry.categories
        if name in ANIMALS and len(mention.entry.categories) == 1
    }
    animals = sorted(named) or case.knowledge.animals
    return animals[0] if len(animals) == 1 else noun


def _shared_side(words: Sequence[str], stated: set[str]) -> bool:
    sides = [set(side) for pair in wording.load("facts")["states"] for side in pair]
    return any(side & stated and side & set(words) for side in sides)


def _same_side(word: str) -> frozenset[str]:
    """Return the words for the same state: `shut` for `closed`."""
    found = {word}
    for pair in wording.load("facts")["states"]:
        found.update(*(side for side in pair if word in side))
    return frozenset(found)


@cache
def _groups(family: Family) -> dict[str, frozenset[int]]:
    """Return for every word the groups of alike words that it is in."""
    groups: dict[str, set[int]] = {}
    listed = wording.load("facts")["colors" if family == "color" else "materials"]
    for number, group in enumerate(listed):
        for word in group:
            groups.setdefault(word, set()).add(number)
    return {word: frozenset(numbers) for word, numbers in groups.items()}


@cache
def _opposites() -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for one, other in wording.load("facts")["states"]:
        for side, opposite in ((one, other), (other, one)):
            for word in side:
                found[word] = found.get(word, frozenset()) | frozenset(opposite)
    return found


@cache
def _listed() -> frozenset[str]:
    claims = wording.load("claims")
    return frozenset(claims["colours"]) | frozenset(claims["materials"])


@cache
def _uncolored() -> frozenset[str]:
    return frozenset(wording.load("facts")["uncolored"])


@cache
def _wearables() -> frozenset[str]:
    return frozenset(wording.load("facts")["wearables"])


@cache
def _coverings() -> frozenset[str]:
    return frozenset(wording.load("facts")["coverings"])


@cache
def _fur() -> frozenset[str]:
    return frozenset(noun_name(word) for word in wording.load("facts")["fur"]) | {"fur"}


_BARE_WORDS = word_set("it is they are and dark light bright pale mostly the a of made both all")
_ASKS: dict[Family, frozenset[str]] = {
    "color": frozenset({"color", "colour", "colors", "colours", "colored", "coloured"}),
    "material": frozenset({"made", "material", "materials"}),
    "state": frozenset({"state", "condition"}),
}
_VARIED = re.compile(
    r"\b(?:various|different|many|multi|assorted|several|all kinds of)[ -]?colou?r", re.IGNORECASE
)
_AUXILIARIES = word_set("is are was were has have had does do been")
