"""Kinds that exclude each other: of people, animals, vehicles, sports, rooms, places and times."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case, Part
from data_tools.instruct.verify.describing import noun_name
from data_tools.instruct.verify.flags import KIND, PERSON
from data_tools.instruct.verify.grammar import (
    BE,
    FUNCTION_WORDS,
    MODALS,
    determiner,
    is_finite,
    is_plural,
    last_of_phrase,
    word_set,
)
from data_tools.instruct.verify.knowledge import Knowledge
from data_tools.instruct.verify.numbers import number_of
from data_tools.instruct.verify.objects import BITS, MIXED
from data_tools.instruct.verify.reading import Reading, Sentence

TIMES: Final = frozenset({"time of day", "weather", "season"})
"""Families whose contradictions are `TIME_WRONG`."""
LOCATIONS: Final = frozenset({"room", "building", "place"})
"""Families of which a word counts only where it is the place of the whole scene."""


@dataclass(frozen=True)
class Kind:
    """A word, the family that it belongs to, and the number of its group there."""

    family: str
    group: int


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for each kind that captions contradict."""
    yield from _check_families(case, "answer", case.answer_reading)
    question = case.question
    said = question.kind not in ("existence", "yes_no") or question.polarity == "yes"
    said = said and "or" not in case.question_reading.vocabulary  # `Is it day or night?`
    if said:
        yield from _check_families(case, "question", case.question_reading)
    yield from _check_people(case, with_question=said)


def _check_families(case: Case, part: Part, reading: Reading) -> Iterator[Check]:
    if not reading.bits & KIND:
        return
    kinds = _kinds()
    known = case.knowledge
    known_families = known_kinds(known)
    for sentence in reading.sentences:
        words = sentence.words
        ends: dict[str, int] = {}  # by family: the `park` of a `skate park` is not a park
        for index in sentence.hits(KIND):
            for phrase, text, kinds_here in kinds[words[index]]:
                last = index + len(phrase) - 1
                if last > index and tuple(words[index : last + 1]) != phrase:
                    continue
                if kinds_here[0].family not in known_families and len(kinds_here) == 1:
                    ends[kinds_here[0].family] = last + 1
                    break  # captions name no kind of the family
                # `evening` is in two groups of its family; one of them suffices
                allowed = {k.family for k in kinds_here if excluding(known, k) is None}
                for kind in kinds_here:
                    if index < ends.get(kind.family, 0):
                        continue
                    ends[kind.family] = last + 1
                    if kind.family in allowed:
                        continue
                    ids = excluding(known, kind)
                    if (
                        ids is None
                        or not sentence.asserts(
                            index, max(last, last_of_phrase(words, last + 1, len(words)))
                        )
                        or not _is_claim(case, sentence, index, last, kind)
                    ):
                        continue
                    code = "TIME_WRONG" if kind.family in TIMES else "KIND_WRONG"
                    span = sentence.span(index, last)
                    yield case.check("kind", "contradicted", code, part, span, text, ids)
                    break
                break


def excluding(known: Knowledge, kind: Kind) -> tuple[int, ...] | None:
    """Return the captions that name another kind of the family, where none names this one."""
    found = known_kinds(known).get(kind.family)
    if not found or kind.group in found:
        return None
    return tuple(sorted({number for ids in found.values() for number in ids if number}))


def known_kinds(known: Knowledge) -> dict[str, dict[int, tuple[int, ...]]]:
    """Return the kinds that the captions of an image name, by family and group."""
    found = known.kinds
    if found is None:
        found = {}
        kinds = _kinds()
        for caption in known.captions:
            words = caption.reading.words
            ends: dict[str, int] = {}
            for index, flags in enumerate(caption.reading.flags):
                for phrase, _, kinds_here in kinds[words[index]] if flags & KIND else ():
                    if tuple(words[index : index + len(phrase)]) == phrase:
                        for kind in kinds_here:
                            if index < ends.get(kind.family, 0):
                                continue
                            ends[kind.family] = index + len(phrase)
                            groups = found.setdefault(kind.family, {})
                            groups[kind.group] = (*groups.get(kind.group, ()), caption.id)
                        break
        ids = tuple(caption.id for caption in known.captions)
        for family, others in _evidence().items() if ids else ():
            if any(known.says(other) for other in others):
                found.setdefault(family, {}).setdefault(-1, ids[:1])
        known.kinds = found
    return found


def _is_claim(case: Case, sentence: Sentence, first: int, last: int, kind: Kind) -> bool:
    """Return whether the word is said of the scene or a thing in it, not used as a modifier."""
    words = sentence.words
    before = words[first - 1] if first else ""
    after = words[last + 1] if last + 1 < len(words) else ""
    if before == "or" or after == "or":
        return False  # `beans or peas`
    if kind.family == "sport":
        return after not in _CLOTHES  # `tennis shoes`
    if kind.family in LOCATIONS:
        introduced, begin = determiner(words, first)
        if introduced == "none":
            return False
        if words[last] in _WATERSIDE and not _WATERS.isdisjoint(case.knowledge.words):
            return False  # `the shore` of the lake that captions name
        start = begin - 1
        lead = words[start] if start >= 0 else ""
        ends = not after or after in FUNCTION_WORDS or not after[0].isalpha()
        if lead == "of" and words[start - 1] in _AREAS:
            start -= 2  # `in the middle of a forest`
            while start > 0 and words[start] in ("the", "a"):
                start -= 1
            lead = words[start] if start >= 0 else ""
            lead = "in" if lead in ("from", "under") else lead
        elif lead == "of" and words[start - 1] == "inside":
            lead = "inside"
        ends = ends or after.endswith(("ed", "ing")) or is_finite(after)
        # `The sea lies on the left.` names a thing, `A beach.` the place
        opens = start < 0 and not is_finite(after) and after not in MODALS
        located = lead in _LOCATING or opens
        located = located or (kind.family == "room" and first <= 4 and after in _FEATURES)
        return (ends or after in _FEATURES) and located
    if kind.family == "time of day":
        timed = before in _BEFORE_TIMES or before == "of"
        asked = not _TIMES_ASKED.isdisjoint(case.question_reading.vocabulary)
        if before == "of" and words[first] == "day":
            return False  # `what time of day`
        return (timed or asked) and after not in _AFTER_TIMES
    if kind.family in ("bird", "bear"):
        return case.knowledge.boxes_of((kind.family,)) != () or not case.knowledge.has_boxes
    if kind.family == "aircraft" and case.sample_type != "conversation":
        # a description may name another one that captions leave out; not where most name them
        named = known_kinds(case.knowledge)[kind.family].values()
        return len({number for ids in named for number in ids}) > 3
    if kind.family == "phone use":
        return "cell phone" in case.knowledge.perhaps_named
    if kind.family in ("stroke", "style"):
        named = known_kinds(case.knowledge)[kind.family].values()
        return len({number for ids in named for number in ids}) > 1
    if kind.family == "produce":
        # captions that list what is there name two kinds, and three of them one of these
        if case.knowledge.words.keys() & MIXED and BITS & {*words[max(0, first - 4) : first]}:
            return False  # `bits of carrot`
        if words[first] == "orange" or not _SUPPOSING.isdisjoint(
            words[:first] if first > 1 else words
        ):
            return False
        groups = known_kinds(case.knowledge)[kind.family]
        said = {n for ids in groups.values() for n in ids}
        if len(groups) == 1 and len(said) > 3:
            # all name these, the answer does not, and something else of which they are silent; or
            # two say what else is there
            group = next(iter(groups))
            listed = _lists_contents(case.knowledge)
            return listed or _names_none(case.answer_reading, kind.family, group)
        return len(groups) > 1 and len(said) > 2
    if kind.family == "aloft":
        return "airplane" in case.knowledge.perhaps_named and (kind.group == 0 or "on" in (
            words[max(0, first - 3) : first]
        ))  # fmt: skip
    if kind.family == "animal":
        return not _ANIMALS_ASKED.isdisjoint(case.question_reading.vocabulary)
    if kind.family == "fruit asked":
        return not {"fruit", "fruits"}.isdisjoint(case.question_reading.vocabulary)
    if kind.family == "drink":
        return after not in ("glass", "glasses", "bottle", "table", "cup", "mug", "maker")
    return True


def _lists_contents(known: Knowledge) -> bool:
    """Return whether two captions name a food with another thing: `a banana and pudding`."""
    joined = 0
    if not MIXED.isdisjoint(known.words):
        return False  # `other vegetables`
    for caption in known.captions:
        words = caption.reading.words
        at = [i for i, f in enumerate(caption.reading.flags) if f & KIND and words[i] in _produce()]
        joined += any(
            "and" in words[max(0, i - 2) : i + 2] or words[i + 1 : i + 3] == ["next", "to"]
            for i in at
        )
    return joined > 1


@cache
def _produce() -> frozenset[str]:
    return frozenset(w for group in wording.load("facts")["kinds"]["produce"] for w in group)


def _names_none(reading: Reading, family: str, group: int) -> bool:
    """Return whether a text has no word of a group."""
    return not any(
        Kind(family, group) in _by_text().get(word, ()) for word in sorted(reading.vocabulary)
    )


def _check_people(case: Case, *, with_question: bool) -> Iterator[Check]:
    """Judge whether people are of the sex and age that captions name."""
    reading, asked = case.answer_reading, case.question_reading
    if not (reading.bits | asked.bits) & PERSON:
        return
    census = census_of(case.knowledge)
    if not census.ids:
        return
    direct = not _names_people().isdisjoint(asked.vocabulary)
    for part, text in (("answer", reading), ("question", asked))[: 1 + with_question]:
        met = part == "answer" and _names_someone(asked) and "or" not in asked.vocabulary
        for number, sentence in enumerate(text.sentences if text.bits & PERSON else ()):
            found = _wrong_person(case, census, sentence, number == 0, direct, met)
            met = met or any("person" in m.entry.categories for m in sentence.mentions)
            if found is None:
                continue
            index = found
            span = sentence.span(index, index)
            word = sentence.words[index]
            part_: Part = "answer" if part == "answer" else "question"
            yield case.check("kind", "contradicted", "KIND_WRONG", part_, span, word, census.ids)
            return


@dataclass(frozen=True)
class Census:
    """Return what captions say about the people: sexes and ages, and how many at most."""

    male: bool
    female: bool
    infant: bool
    child: bool
    sexed_child: bool
    adult: bool
    unsexed: bool
    mixed: bool
    most: int
    ids: tuple[int, ...]


def census_of(known: Knowledge) -> Census:
    """Return what the captions say of the people in an image."""
    if known.census is not None:
        return known.census
    people = _people()
    words = frozenset(known.words)
    ids = {
        number
        for word in words & (people["male"] | people["female"] | people["infant"] | people["child"])
        for number in known.words[word]
    }
    numbers = [n for n in known.counts.get("person", {1: ()})] or [1]
    plural = {"people", "men", "women", "boys", "girls", "children", "kids", "persons", "guys"}
    most = max(numbers) if numbers else 1
    if words & plural and most < 2:
        most = 99
    census = Census(
        male=bool(words & (people["male"] | people["he"])),
        female=bool(words & (people["female"] | people["she"])),
        infant=bool(words & people["infant"]),
        child=bool(words & people["child"]),
        sexed_child=bool(words & people["young"]),
        adult=bool(words & people["adult"]),
        unsexed=most > 1 and _has_unsexed(known, most),
        mixed=bool(words & people["mixed"]) or ("couple" in words and not known.says("couple of")),
        most=most,
        ids=tuple(sorted(n for n in ids if n)),
    )
    known.census = census
    return census


def _has_unsexed(known: Knowledge, most: int) -> bool:
    """Return whether a caption has `people` who are not the two men that others have."""
    counting = known.counts.get("person", {}).get(most, ())
    unsexed = _people()["unsexed"]
    return any(
        caption.id not in counting and not unsexed.isdisjoint(caption.reading.vocabulary)
        for caption in known.captions
    )


def _wrong_person(
    case: Case, census: Census, sentence: Sentence, opening: bool, direct: bool, met: bool
) -> int | None:
    """Return the index of a word for a person that captions exclude.

    `met`: someone was named before, besides whom there may be others.
    """
    people = _people()
    words = sentence.words
    if opening and words[0] in ("he", "she") and not direct:
        asked = [m for m in case.question.mentions if "person" in m.entry.categories]
        direct = len(asked) == 1 and asked[0].number == "one"
    opens = direct and opening
    wrong = [
        i
        for i in sentence.hits(PERSON)
        if _is_excluded(census, words[i], opens)
        and (words[i] != "grown" or (words[i + 1 : i + 2] and words[i + 1] in _GROWN))
    ]
    if not wrong:
        return None
    there = case.knowledge.prominent("person") if case.knowledge.has_boxes else 0
    if there == 2 and {"mirror", "reflection"} & case.knowledge.words.keys():
        there = 1
    alone = not (census.mixed or census.unsexed) and (
        (0 < there <= census.most) or (there == 0 and census.most == 1)
    )
    main = _main_person(case, sentence) if opening else None
    sole = _is_sole(case, sentence, census)
    for index in wrong:
        word = words[index]
        pronoun = word in people["he"] or word in people["she"]
        sexed = word in people["male"] or word in people["female"]
        certain = index == main or alone or word == "grown" or (sole and pronoun)
        certain = certain or (opens and not (sexed and census.unsexed))
        if not certain and not _same_number(case, sentence, index):
            continue
        if not sentence.asserts(index, index):
            continue
        if pronoun and not sole:
            if index > 0 and word not in ("he", "she"):
                continue
            if not (opening or index == 0):
                continue
        if not pronoun and word != "grown" and determiner(words, index)[0] != "definite":
            earlier = (m for m in sentence.mentions if m.last < index - 1)
            is_said = words[determiner(words, index)[1] - 1] in BE  # `the rider is a woman`
            if not is_said and (met or any("person" in m.entry.categories for m in earlier)):
                continue  # `two women sit behind him` besides the man of the captions
        if met and census.most == 1 and not pronoun and is_plural(word):
            continue  # `the women behind him`
        before = words[max(0, index - 2) : index]
        if before[-1:] in (["another"], ["other"], ["second"], ["third"]):
            continue
        if before[-1:] == ["of"] and before[0] not in _GROUPS:
            continue  # `one of the women`
        return index
    return None


def _names_someone(asked: Reading) -> bool:
    """Return whether a question is about a man or a woman: `Is he alone?`"""
    people = _people()
    sexed = people["he"] | people["she"] | people["male"] | people["female"]
    return not sexed.isdisjoint(asked.vocabulary)


def _is_excluded(census: Census, word: str, opens: bool) -> bool:
    """Return whether captions have no person of this word's sex or age, but others."""
    people = _people()
    if word in people["young"] and census.child and not census.sexed_child:
        return False  # `a girl` is one of the `children`
    return (
        ((word in people["male"] or word in people["he"]) and census.female and not census.male)
        or ((word in people["female"] or word in people["she"]) and census.male
            and not census.female)
        or (opens and word in people["adult"] and census.infant and not census.adult)
        or (word in people["infant"] and census.adult and not (census.infant or census.child))
        or (word in people["grown"] and census.child and not census.adult)
        or (opens and word in people["small"] and census.adult and not census.child)
    )  # fmt: skip


def _is_sole(case: Case, sentence: Sentence, census: Census) -> bool:
    """Return whether a pronoun must stand for the one person whom the turn names.

    That is a single one, of a sex or as a player, whom captions name with the same word.
    """
    if census.male == census.female or census.mixed:
        return False
    named = [
        m.word
        for reading in (case.question_reading, case.answer_reading)
        for _, m in reading.mentions
        if m.entry.categories == ("person",) and m.number == "one"
    ]
    people = _people()
    if not named or len(set(named)) > 1 or case.knowledge.names(named[0]) == ():
        return False
    if named[0] in people["male"] or named[0] in people["female"]:
        return (named[0] in people["male"]) == census.male
    return census.most == 1


def _main_person(case: Case, sentence: Sentence) -> int | None:
    """Return the index of the person whom an answer names first, whom captions describe too.

    Two captions must have the other sex.
    """
    first = next((m for m in sentence.mentions if "person" in m.entry.categories), None)
    people = _people()
    if first is None or any(word in people["mixed"] for word in sentence.words[: first.first]):
        return None
    at = first.first
    if at and sentence.words[at] not in people["male"] | people["female"]:
        if first.first != first.last:
            return None
        at -= sentence.words[at - 1] in ("male", "female")  # `a female player`
    word = sentence.words[at]
    other = people["female"] if word in people["male"] else people["male"]
    votes = {n for w in other for n in case.knowledge.words.get(w, ())}
    return at if len(votes) > 1 else None


def _same_number(case: Case, sentence: Sentence, index: int) -> bool:
    """Return whether captions give the number before this word for people of the other sex."""
    people = _people()
    word = sentence.words[index]
    sex = "male" if word in people["male"] else "female" if word in people["female"] else None
    if sex is None:
        return False
    numbers = {number_of(w) for w in sentence.words[max(0, index - 3) : index]} - {None, 1}
    after = sentence.words[index + 1 : index + 4]
    if after[:2] == ["and", "a"] and not (people["male"] | people["female"]).isdisjoint(after[2:]):
        numbers.add(2)  # `a boy and a girl`
    counts = case.knowledge.word_counts
    other = people["female" if sex == "male" else "male"]
    return any(numbers & counts.get(noun_name(w), {}).keys() for w in other)


@cache
def _kinds() -> dict[str, tuple[tuple[tuple[str, ...], str, tuple[Kind, ...]], ...]]:
    """Return the phrases of all families by their first word, longest first, with their kinds."""
    found: dict[str, list[tuple[tuple[str, ...], str, tuple[Kind, ...]]]] = {}
    for text, kinds in _by_text().items():
        phrase = tuple(text.split())
        found.setdefault(phrase[0], []).append((phrase, text, kinds))
    return {w: tuple(sorted(entries, key=lambda e: -len(e[0]))) for w, entries in found.items()}


@cache
def _by_text() -> dict[str, tuple[Kind, ...]]:
    found: dict[str, tuple[Kind, ...]] = {}
    for family, groups in wording.load("facts")["kinds"].items():
        for number, group in enumerate(groups):
            for text in group:
                found[text] = (*found.get(text, ()), Kind(family, number))
    return found


@cache
def _evidence() -> dict[str, tuple[str, ...]]:
    return {k: tuple(v) for k, v in wording.load("facts")["kind_evidence"].items()}


@cache
def _names_people() -> frozenset[str]:
    """Return the words by which a question is about a certain person."""
    people = _people()
    names = people["male"] | people["female"] | people["infant"] | people["adult"]
    return names


@cache
def _people() -> dict[str, frozenset[str]]:
    return {name: frozenset(words) for name, words in wording.load("facts")["people"].items()}


_ANIMALS_ASKED: Final = frozenset({"animal", "animals", "creature", "creatures", "pet", "pets"})
_BEFORE_TIMES: Final = word_set(
    "at the during a sunny bright this late early dark mid around about"
)
_AFTER_TIMES: Final = word_set("light lights stand table before of time club")
_TIMES_ASKED: Final = frozenset({"time", "when", "day", "weather"})
_AREAS: Final = word_set(
    "middle center lobby platform corner edge side ceiling floor wall walls trees heart entrance "
    "back shade depths"
)
_LOCATING: Final = word_set(
    "this it in on at along across shows is inside through depicts down over cross crossing"
)
_FEATURES: Final = frozenset({"view", "features", "has", "with", "contains", "is", "scene"})
_CLOTHES: Final = word_set(
    "shirt shirts shoe shoes cap caps hat hats jacket jackets shorts pants jersey uniform boots "
    "glove gloves socks bag bags helmet goggles cart poster posters stickers logo"
)
_GROWN: Final = word_set("man men woman women up ups adult adults person people")
_GROUPS: Final = frozenset({"group", "couple", "pair", "team", "number", "crowd"})
_SUPPOSING: Final = word_set("would could may might can")
_WATERSIDE: Final = word_set("shore dock docks pier harbor harbour marina wharf")
_WATERS: Final = word_set("lake lakes pond river water bay boat boats ship ships")
