"""What a sentence says of the things it names: colors, materials, states, actions, positions.

The same reading serves answers and captions, so that the two can be compared noun by noun.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from data_tools import wording
from data_tools.instruct.verify.flags import ACTION, ATTRIBUTE, RELATION
from data_tools.instruct.verify.grammar import (
    ADVERBS,
    BE,
    CONJUNCTIONS,
    DEFINITE,
    FUNCTION_WORDS,
    INDEFINITE,
    PREPOSITIONS,
    QUANTITIES,
    determiner,
    finite_verbs,
    is_plural,
    last_of_phrase,
    singular,
    word_set,
)
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence

Family = Literal["color", "material", "state"]
PRONOUN: Final = "it"
"""The noun of what is said of a pronoun."""
ONE: Final = "one"
"""The noun of one of the things named before: `a red one`."""


@dataclass(slots=True)
class Attribute:
    """A color, material or state of a noun; `first` and `last` are words of the sentence.

    `noun` is a category, or a singular in lower case. `predicate`: it is said of all of them (`the
    buckets are red`), not of those that are named (`two red buckets`).
    """

    family: Family
    words: tuple[str, ...]
    noun: str
    many: bool
    first: int
    last: int
    predicate: bool = False


@dataclass(slots=True)
class Action:
    """A verb with its subject: a category, `it` for a pronoun, None if neither is found.

    `target` is the category of what follows the verb.
    """

    stem: str
    subject: str | None
    mention: Mention | None
    index: int
    target: str | None


@dataclass(slots=True)
class Relation:
    """`one` is `how` (in front of, behind, on, under) the `other`; both are nouns."""

    one: str
    how: str
    other: str
    first: int
    last: int


def attributes(sentence: Sentence) -> Iterator[Attribute]:
    """Yield every color, material and state that the sentence gives to a noun."""
    if not sentence.bits & ATTRIBUTE:
        return
    families, words = attribute_words(), sentence.words
    end = 0
    for index in sentence.hits(ATTRIBUTE):
        if index < end:
            continue  # `red and white` is read at once
        family = families[words[index]]
        last = _chain(words, index, family)
        found = tuple(w for w in words[index : last + 1] if families.get(w) == family)
        attribute = _attribute(sentence, family, found, index, last)
        if attribute is not None:
            yield attribute
        end = last + 1


def _chain(words: Sequence[str], index: int, family: Family) -> int:
    """Return the last word of `red, white and blue`."""
    families = attribute_words()
    last = index
    while last + 1 < len(words):
        step = 2 if words[last + 1] in ("and", ",", "-", "or") else 1
        if last + step >= len(words) or families.get(words[last + step]) != family:
            if words[last + 1 : last + 3] == [",", "and"] and (
                families.get("".join(words[last + 3 : last + 4])) == family
            ):
                last += 3
                continue
            break
        last += step
    return last


def _attribute(
    sentence: Sentence, family: Family, found: tuple[str, ...], first: int, last: int
) -> Attribute | None:
    words = sentence.words
    head = last_of_phrase(words, last + 1, len(words))
    if words[last + 1 : last + 3] == ["see", "through"]:
        head = last_of_phrase(words, last + 3, len(words))
    mention = next((m for m in sentence.mentions if m.first <= last < m.last), None)
    if mention is not None:
        head = mention.last  # `black bear` is one name
    if family == "color" and head > last and families_of(words[head]) == "material" and (
        "of" in words[max(0, first - 3) : first]
    ):  # fmt: skip
        head = last  # `made of light beige stone` says that the thing is beige
        while first > 0 and words[first] != "of":
            first -= 1
        subject = subject_before(sentence, first - 1) if words[first - 1] in _MADE else None
        subject = subject or (subject_before(sentence, first - 2) if first > 1 else None)
        if subject is not None:
            return Attribute(family, found, subject[0], _is_many(words, subject[1]), first, last)
    if family == "material" and words[max(0, first - 2) : first][-1:] == ["of"] and first > 1:
        head = last if words[first - 2] in _MADE else head  # `built of plywood sheets`
        if words[first - 2] == "made" and words[first - 3] not in BE and first > 3:
            at = first - 3  # `a bench made of wooden slats`
            if words[at][0].isalpha() and words[at] not in FUNCTION_WORDS | ADVERBS:
                return Attribute(
                    family, found, noun_at(sentence, at), _is_many(words, at), at, last
                )
    if head > last and words[head] in ("one", "ones"):
        return Attribute(family, found, ONE, False, first, head)
    if head > last and words[last + 1] not in finite_verbs():
        return Attribute(family, found, noun_at(sentence, head), _is_many(words, head), first, head)
    if family == "state" and words[last + 1 : last + 2] and words[last + 1] in _OWNED:
        start = last + 1  # `has closed all of its doors`
        while start < len(words) and (words[start] in _OWNED or words[start] == "of"):
            start += 1
        head = last_of_phrase(words, start, len(words))
        if head >= start and words[last].endswith(("ed", "shut", "lit")):
            many = _is_many(words, head)
            return Attribute(family, found, noun_at(sentence, head), many, first, head, many)
    before = first - 1
    while family == "color" and before > 0 and words[before] in _SHADES:
        before -= 1
    if family == "color" and before > 0 and words[before] == "in" and words[before - 1] not in BE:
        if words[before - 1] in _MADE_IN:
            subject = subject_before(sentence, before - 1)
            if subject is not None:
                many = _is_many(words, subject[1])
                return Attribute(family, found, subject[0], many, first, last, predicate=True)
        noun = noun_at(sentence, before - 1)  # `an apple in red and yellow`
        if words[before - 1][0].isalpha() and words[before - 1] not in FUNCTION_WORDS:
            return Attribute(family, found, noun, False, first, last)
    if family == "state" and before > 0 and "with" in words[max(0, before - 2) : before]:
        # `with its doors open`
        return Attribute(
            family, found, noun_at(sentence, before), _is_many(words, before), first, last
        )
    if before > 1 and words[before] == "and" and words[before - 2] in _LINKING | _DEGREES:
        before -= 2  # `are clear and spotless`
    while before >= 0 and words[before] in _DEGREES:
        before -= 1
    if before < 0:
        return None
    if family == "material" and before > 1 and words[before] not in FUNCTION_WORDS and (
        words[before - 1] == "of" and words[before - 2] in _MADE
    ):  # fmt: skip
        before -= 1  # `made of polished metal`
    if words[before] in ("of", "from", "in") and before and words[before - 1] in _MADE:
        before -= 1 if words[before - 1] != "out" else 2
        while before >= 0 and words[before] in _MADE:
            before -= 1
    elif family == "material":
        return None  # `a wall of stone`, `made with wood` say less
    if before < 0 or words[before] not in _LINKING:
        if before < 0 or family == "material":
            return None
        participle = before < first - 1 or words[first].endswith(("ed", "shut", "open"))
        if not participle or words[before] in FUNCTION_WORDS or not words[before][0].isalpha():
            return None
        if words[before] in finite_verbs() or words[before].endswith(("ing", "ly")):
            return None
        noun = noun_at(sentence, before)  # `a wall painted dark green`, `a bed covered in a net`
        return Attribute(family, found, noun, _is_many(words, before), first, last)
    while before > 0 and words[before - 1] in _LINKING:
        before -= 1  # `has been left open`
    subject = subject_before(sentence, before)
    if subject is None:
        return None
    noun, at = subject
    of_all = _SOME.isdisjoint(words[max(0, at - 4) : at]) or (
        at > 1 and words[at - 2] == "the" and words[at - 1] == "two"
    )
    return Attribute(family, found, noun, _is_many(words, at), first, last, predicate=of_all)


def switched(text: str) -> list[tuple[str, bool]]:
    """Return the lamps, screens and other devices that a text says are on or off."""
    if " on" not in text and " off" not in text:
        return []
    return [(noun_name(m[1]), m[2] == "on") for m in _SWITCHED.finditer(text)]


def subject_before(sentence: Sentence, verb: int) -> tuple[str, int] | None:
    """Return the noun before a linking verb, and its index: `the walls of the room are`."""
    words = sentence.words
    begin, _ = sentence.clause(verb)
    begin = max([begin, *(i + 1 for i in range(begin, verb) if words[i] == ",")])
    while begin < verb and words[begin] in (CONJUNCTIONS | ADVERBS | {","}):
        begin += 1
    if begin >= verb:
        return None
    if words[begin] in _PRONOUNS and all(word in ADVERBS for word in words[begin + 1 : verb]):
        return PRONOUN, begin
    if words[begin] in _QUANTIFIERS and words[begin + 1 : begin + 2] == ["of"]:
        begin += 2  # `all of the umbrellas`
    if "whose" in words[begin:verb]:
        begin = words.index("whose", begin) + 1
    index = begin
    while index < verb and not (index > begin and words[index] in _ENDS_SUBJECT):
        index += 1
    head = index - 1
    if head > begin and words[head].endswith("ing") and words[index] in PREPOSITIONS:
        head -= 1  # `the lamps hanging from the ceiling are`
    if words[head] in parts() and words[index : index + 1] == ["of"]:
        inner = last_of_phrase(words, index + 2, verb)
        head = inner if inner > index + 1 else head
    if words[head] in parts():
        return None
    if not words[head][0].isalpha() or words[head] in PREPOSITIONS:
        return None
    return noun_at(sentence, head), head


def noun_at(sentence: Sentence, index: int) -> str:
    """Return the name of the noun at an index: its category, or its singular."""
    for mention in sentence.mentions:
        if mention.first <= index <= mention.last:
            if len(mention.entry.categories) == 1:
                return mention.entry.categories[0]
            break
    words = sentence.words
    if words[index] in _SURFACES and index and words[index - 1] not in FUNCTION_WORDS:
        index -= words[index - 1] not in attribute_words()  # `counter space`
    return noun_name(words[index])


@cache
def noun_name(word: str) -> str:
    """Return one name for synonyms: `countertops` -> `counter`."""
    name = singular(word)
    return _synonyms().get(name, name)


def actions(sentence: Sentence) -> Sequence[Action]:
    """Return every listed verb of the sentence with its subject; read once for all rules."""
    if not sentence.bits & ACTION:
        return ()
    if sentence.actions is None:
        sentence.actions = tuple(_read_actions(sentence))
    return sentence.actions


def _read_actions(sentence: Sentence) -> Iterator[Action]:
    stems, words = action_stems(), sentence.words
    for index in sentence.hits(ACTION):
        word = words[index]
        stem = stems.get(word)
        if stem is None and word in _PHRASES:
            before, known = _PHRASES[word]
            stem = known if words[index - 1 : index] and words[index - 1] in before else None
        if stem is None and words[index + 1 : index + 2] == ["off"] and word in _LEAVES:
            stem = "fly" if words[index + 2 : index + 3] not in _TAKEN_OFF else None
        if word in _TAKES and not _PHOTOS.isdisjoint(words[index + 1 : index + 5]):
            stem = "photograph"
        if stem is None or any(m.first <= index <= m.last for m in sentence.mentions):
            continue
        noun_place = index and word not in _PHRASES and _is_noun_place(words[index - 1])
        if (noun_place or _is_noun(sentence, index, stem)) and not word.endswith("ing"):
            continue  # `a ride`, `the look`, `a groomed run`
        if words[index - 1 : index] == ["or"] or words[index + 1 : index + 2] == ["or"]:
            continue  # `sits or stands`
        if word.endswith("ing") and index and words[index - 1] in _BEFORE_GERUND:
            continue  # `a parking meter`, `for skating`
        if stem == "talk" and is_on_phone(words, index):
            stem = "call"
        if stem == "fly" and not {"kite", "kites"}.isdisjoint(words[index + 1 : index + 6]):
            stem = "play"
        if _takes_object(words, index, stem):
            continue  # `resting its head`
        subject = _subject(sentence, index, stem)
        target = _target(sentence, index)
        if isinstance(subject, Mention):
            names = subject.entry.categories
            # `pitcher` is a vessel as well, but does nothing then
            name = "person" if "person" in names else names[0] if len(names) == 1 else None
            yield Action(stem, name, subject, index, target)
        else:
            yield Action(stem, subject, None, index, target)


def is_on_phone(words: Sequence[str], verb: int) -> bool:
    """Return whether a phone follows `talking` closely."""
    return not PHONES.isdisjoint(words[verb + 1 : verb + 8])


def _target(sentence: Sentence, verb: int) -> str | None:
    """Return the category that follows a verb: `riding on the back of an elephant`."""
    _, end = sentence.clause(verb)
    after = [m for m in sentence.mentions if verb < m.first < end]
    names = after[0].entry.categories if after and after[0].first - verb <= 7 else ()
    return names[0] if len(names) == 1 else None


def _takes_object(words: Sequence[str], index: int, stem: str) -> bool:
    return stem in ("lie", "sit", "stand", "run", "jump") and words[index + 1 : index + 2] in (
        ["its"], ["his"], ["her"], ["their"],
    )  # fmt: skip


def _subject(sentence: Sentence, verb: int, stem: str) -> Mention | str | None:
    """Return whose action a verb is: a thing that is named, `it` for a pronoun, or None.

    Only people and animals do what is not listed as done by things as well: `a boy with a spoon
    looking at a cake` has the boy look.
    """
    words = sentence.words
    begin, _ = sentence.clause(verb)
    before = [m for m in sentence.mentions if begin <= m.first and m.last < verb]
    alive = stem not in _OF_THINGS
    if _is_of_unlisted(sentence, begin, verb):
        return None  # `more planks are lying there`
    if before and alive and not _is_alive(before[-1]):
        before = [m for m in before if _is_alive(m)]
        if not before and words[begin] not in _PRONOUNS and _continues(words, begin, verb):
            before = [m for m in sentence.mentions if m.last < begin and _is_alive(m)][:1]
            return before[0] if before else _pronoun(words, 0, verb)
        if before:
            return before[0] if len(before) == 1 else None
    joint = max((i for i in range(begin, verb) if words[i] in ("and", ",")), default=-1)
    if joint > begin and verb - joint > 1 and _continues(words, joint, verb) and (
        words[begin] in _PRONOUNS
    ):  # fmt: skip
        return PRONOUN  # `he has dropped his bat and is running`
    if before:
        near = before[-1]
        between = words[near.last + 1 : verb]
        if all(word in _BEFORE_VERB for word in between):
            return near
        joint = max(
            (i for i in range(begin, verb) if words[i] in (",", "and", "while")), default=-1
        )
        if joint > before[0].last and verb - joint > 2:
            return None  # another noun may stand in between
        return before[0]
    if begin < verb and any(w in _PRONOUNS or w in _THEM for w in words[begin:verb]):
        return PRONOUN
    if begin and verb - begin <= 2 and words[begin] in ("and", ",", "while"):
        earlier = [m for m in sentence.mentions if m.last < begin]
        if earlier and alive:
            earlier = [m for m in earlier if _is_alive(m)] or earlier
        return earlier[0] if earlier else _pronoun(words, 0, verb)
    return None


def _is_of_unlisted(sentence: Sentence, begin: int, verb: int) -> bool:
    """Return whether the noun before a verb is its subject, but no thing of the categories."""
    words, head = sentence.words, verb - 1
    while head > begin and words[head] in _BEFORE_VERB:
        head -= 1
    word = words[head] if head >= 0 else ""
    if head == verb - 1 or not is_plural(word) or any(
        m.first <= head <= m.last for m in sentence.mentions
    ):  # fmt: skip
        return False
    start = determiner(words, head)[1]
    return start <= begin or words[start - 1] in (",", "and")


def _pronoun(words: Sequence[str], begin: int, verb: int) -> str | None:
    return PRONOUN if any(word in _PRONOUNS for word in words[begin:verb]) else None


def _continues(words: Sequence[str], begin: int, verb: int) -> bool:
    """Return whether only `and`, adverbs and auxiliaries stand before the verb in its clause."""
    return all(w in ADVERBS or w in BE or w in ("and", ",", "then") for w in words[begin:verb])


def _is_alive(mention: Mention) -> bool:
    return not _ALIVE.isdisjoint(mention.entry.categories)


def relations(sentence: Sentence) -> Iterator[Relation]:
    """Yield `one in front of other`, behind, on and under, of nouns that stand close by."""
    if not sentence.bits & RELATION:
        return
    words = sentence.words
    for index in sentence.hits(RELATION):
        word = words[index]
        how, last = RELATIONS[word], index
        if word == "front":
            if index == 0 or words[index - 1] != "in" or words[index + 1 : index + 2] != ["of"]:
                continue
            last = index + 1
        if word == "top":
            if words[index + 1 : index + 2] != ["of"]:
                continue
            last = index + 1
        start = last + 1
        while start < len(words) and words[start] in (DEFINITE | INDEFINITE | QUANTITIES):
            start += 1
        other = last_of_phrase(words, start, len(words))
        mention = next((m for m in sentence.mentions if m.first >= start), None)
        if mention is not None and mention.first <= start + 2 and mention.first <= other:
            owns = mention.last in sentence.owners and other > mention.last
            other = other if owns else mention.last  # `on the person's knees`
        if other < start:
            continue
        begin, _ = sentence.clause(index)
        for subject in _placed(sentence, begin, index):
            yield Relation(subject, how, noun_at(sentence, other), index, other)


def _placed(sentence: Sentence, begin: int, index: int) -> Iterator[str]:
    """Yield the nouns that the phrase at `index` may place: the first and the last before it."""
    words = sentence.words
    before = [m for m in sentence.mentions if begin <= m.first and m.last < index]
    for subject in before[:1] + before[1:][-1:]:
        names = subject.entry.categories
        yield names[0] if len(names) == 1 else noun_name(subject.word)
    if not before and begin < index and words[begin] in _PRONOUNS:
        yield PRONOUN


@cache
def attribute_words() -> dict[str, Family]:
    """Return the words that are colors, materials and states, with their family."""
    claims, facts = wording.load("claims"), wording.load("facts")
    found: dict[str, Family] = dict.fromkeys(claims["materials"], "material")
    found |= dict.fromkeys(claims["colours"], "color")
    found |= {w: "state" for pair in facts["states"] for side in pair for w in side}
    return found


@cache
def action_stems() -> dict[str, str]:
    """Return the stems of verb forms: `riding` -> `ride`."""
    listed = wording.load("claims")["actions"]
    return {form: stem for stem, forms in listed.items() for form in forms}


@cache
def parts() -> frozenset[str]:
    """Return nouns that stand for what follows their `of`: `the front part of the bus`."""
    return frozenset(wording.load("facts")["parts"])


@cache
def _synonyms() -> dict[str, str]:
    return {word: group[0] for group in wording.load("facts")["nouns"] for word in reversed(group)}


def families_of(word: str) -> Family | None:
    """Return the family of a word that is a color, a material or a state."""
    return attribute_words().get(word)


def _is_many(words: Sequence[str], index: int) -> bool:
    every = index > 0 and words[index - 1] in ("every", "each")
    return every or is_plural(words[index]) or words[index] in _MANY


def _is_noun(sentence: Sentence, index: int, stem: str) -> bool:
    """Return whether a bare verb follows `a` and an adjective: no singular takes that form."""
    words = sentence.words
    if words[index] != stem or is_plural(words[index - 1]):
        return False
    if any(m.last == index - 1 and m.number != "one" for m in sentence.mentions):
        return False  # `a few people run`
    kind, begin = determiner(words, index)
    return kind == "indefinite" and words[begin] in ("a", "an", "another", "each", "every")


def _is_noun_place(before: str) -> bool:
    return before in _BEFORE_NOUNS and before != "couple"  # `a couple sits`


ANIMALS: Final = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
)  # fmt: skip
_ALIVE: Final = frozenset({"person", *ANIMALS})
_OF_THINGS: Final = word_set(
    "stand lie sit hang lean park fly drive ride run hold carry cover balance pull push work wait "
    "race cross cut hit"
)
PHONES: Final = word_set("phone cellphone telephone smartphone")
_TAKES: Final = word_set("take takes taking took")
_LEAVES: Final = _TAKES | word_set("taken lift lifts lifted lifting")
_TAKEN_OFF: Final = [["his"], ["her"], ["their"], ["its"], ["a"]]
_PHRASES: Final = {
    "foot": (word_set("on"), "walk"), "horseback": (word_set("on"), "ride"),
    "feet": (word_set("their his her its"), "stand"),
}  # fmt: skip
"""Nouns that stand for an action after these words: `on foot`, `on their feet`."""
PHRASED: Final = _LEAVES | _PHRASES.keys()
_PHOTOS: Final = word_set("photo photos picture pictures photograph photographs selfie image")
_DEGREES: Final = word_set(
    "very mostly all both completely entirely bright dark light deep pale painted colored coloured "
    "a an quite also rather predominantly vivid solid cheerful shiny soft warm rich vibrant glossy "
    "still now just lovely dull plain slightly fairly beautiful striking wide already fully "
    "tightly firmly neatly"
)
_MADE_IN: Final = word_set("painted colored covered kept finished")
_MADE: Final = word_set("made carved built constructed out cut")
_LINKING: Final = BE | word_set(
    "looks appears seems painted colored glows shines looked left kept spread stays stay remains "
    "remain stand stands swung"
)
_SHADES: Final = word_set("dark light bright deep pale")
_OWNED: Final = word_set("all both its his her their the every each")
_MANY: Final = word_set("they them both these those")
_THEM: Final = word_set("them others")
_SOME: Final = word_set("some many several few most other one two three")
_PRONOUNS: Final = word_set("it they he she both these those this that")
_ENDS_SUBJECT: Final = PREPOSITIONS | word_set(
    "that which who , and is are was were worn has have had"
)
_BEFORE_NOUNS: Final = DEFINITE | INDEFINITE | QUANTITIES
_SURFACES: Final = word_set("space area top surface")
_QUANTIFIERS: Final = word_set("all both most each many some")
_BEFORE_VERB: Final = (
    BE | ADVERBS | word_set("who that which and , has have been peacefully happily")
)
_BEFORE_GERUND: Final = word_set("for of a an the")
_SWITCHED: Final = re.compile(
    r"\b(lamps?|lights?|tvs?|televisions?|monitors?|screens?|laptops?|computers?|fans?|ovens?|"
    r"stoves?|headlights?)(?: (?:next to|beside|near|on|above|by|behind) (?:\w+ ){0,2}\w+)?"
    r"(?: (?:that|is|are|was|were|left|currently|still|already|been|has|have))*"
    r" (?:(?<= is )|(?<= are )|(?<= left )|(?<= still )|turned |switched )(on|off)"
    r"(?= (?:by|and|in|while|with|but|at|next|near|behind|because|so)\b| [^\w\s]|$)"
)
RELATIONS: Final = {
    "front": "front", "behind": "behind", "under": "under", "underneath": "under",
    "beneath": "under", "below": "under", "on": "on", "atop": "on", "top": "on",
}  # fmt: skip
