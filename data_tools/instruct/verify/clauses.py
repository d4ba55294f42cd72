"""Who does what to what, and where: the verbs of a sentence with subjects, objects and places.

A small tagger and chunker: closed classes of words are listed in `grammar`, open ones may be what
WordNet has them as, and their neighbors decide between these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, NamedTuple

from data_tools.instruct.verify import senses
from data_tools.instruct.verify.grammar import (
    ADVERBS,
    BE,
    CONJUNCTIONS,
    DEFINITE,
    INDEFINITE,
    MODALS,
    PREPOSITIONS,
    PRONOUNS,
    QUANTITIES,
    is_plural,
    word_set,
)


@dataclass(slots=True)
class Predicate:
    """A verb and what goes with it; nouns are given by the index of their word.

    Attributes:
        stem: The verb without its ending.
        index: Of the verb.
        subject: Of the subject's noun or pronoun; None where none is found.
        finite: Whether it is a verb of a clause (`is riding`), not a modifier (`a man riding`).
        object: Of the object's noun; None without one.
        places: Prepositions with the noun that each governs, up to the next verb.
    """

    stem: str
    index: int
    subject: int | None
    finite: bool
    object: int | None = None
    places: list[tuple[str, int]] = field(default_factory=list)


class Phrase(NamedTuple):
    """A noun phrase: its noun, the preposition before it (empty if none), and its first word."""

    head: int
    preposition: str
    first: int


def tags(words: Sequence[str]) -> list[str]:
    """Return a tag for each word.

    D determiner, A adjective, N noun, O pronoun, B a form of `be`, M modal or auxiliary, V finite
    verb, I infinitive, G verb in -ing, E participle, P preposition, C conjunction, R adverb, `,`.
    """
    found: list[str] = []
    for index, word in enumerate(words):
        after = words[index + 1] if index + 1 < len(words) else ""
        found.append(_closed_class(word, after) or _open_class(words, index, after, found))
    return found


def _closed_class(word: str, after: str) -> str | None:
    """Return the tag of a word whose neighbors hardly matter; None for nouns and verbs."""
    if word in _DETERMINERS:
        alone = not after or after in PREPOSITIONS or after in BE or not after[0].isalnum()
        return "O" if alone and word in _ALSO_PRONOUNS else "D"
    return _tag_of(word)


@cache
def _tag_of(word: str) -> str | None:
    if not word[0].isalnum():
        return ","
    if word[0].isdigit():
        return "D"
    for tag, words in _CLOSED.items():
        if word in words:
            return tag
    if word.endswith("ly") and word not in _NOUNS_IN_LY:
        return "R"
    adjective = word in senses.mostly_adjectives() and not word.endswith(("ing", "ed"))
    return "A" if adjective else None


def _open_class(words: Sequence[str], index: int, after: str, found: Sequence[str]) -> str:
    """Return the tag of a word that WordNet has as a noun, a verb, both, or not at all."""
    word, before = words[index], found[-1] if found else ""
    stem, is_noun = senses.verb(word), senses.noun(word) is not None
    if stem is None:
        return "G" if word.endswith("ing") and before == "B" and not is_noun else "N"
    ends_phrase = (
        not after or after in _DETERMINERS or after in PREPOSITIONS or after in ADVERBS
    )  # fmt: skip
    if word.endswith("ing") and stem != word:
        if before in ("D", "A"):
            return "A" if _may_be_noun(after) else "N"  # `a smiling man`, `the painting`
        joined = before in ("N", "P") or (before == "C" and _may_be_noun(after))
        return "N" if is_noun and joined and not ends_phrase else "G"
    if stem != word and (word.endswith("ed") or word in _PARTICIPLES):
        if before in ("D", "A") or (before in ("P", ",", "C") and _may_be_noun(after)):
            return "A"
        past = before == "O" or (before == "C" and word.endswith("ed") and "N" in found)
        return "V" if past else "E"
    if before == "P":
        verbal = not is_noun or ends_phrase or word in senses.mostly_verbs()
        return "I" if words[index - 1] == "to" and stem == word and verbal else "N"
    if before == "M" or (before == "R" and found[-2:-1] == ["M"]):
        return "I" if stem == word else "N"
    if before in ("D", "A"):
        return "N" if is_noun or before == "D" else "V"
    if before in ("N", "O", "C", "R", ","):
        verb = _is_finite(words, index, after, found, ends_phrase=ends_phrase)
        return "V" if verb else "N"
    return "N" if is_noun else "V"


def _is_finite(
    words: Sequence[str], index: int, after: str, found: Sequence[str], *, ends_phrase: bool
) -> bool:
    """Return whether a word that may be a noun or a verb is a verb that agrees with its subject."""
    word, before = words[index], found[-1]
    stem = senses.verb(word)
    third = stem != word
    many = _is_subject_many(words, found)
    agrees = many is None or third != many
    if senses.noun(word) is None:
        return third or agrees or before == "C"
    if before == "O":
        return agrees
    if third and "V" in found and before == "C" and words[index - 1] == "and":
        return after in _PARTICLES or after in _DETERMINERS  # `and blows out the candle`
    return agrees and ends_phrase and (stem in senses.mostly_verbs() or after in _DETERMINERS)


def _is_subject_many(words: Sequence[str], found: Sequence[str]) -> bool | None:
    """Return whether the noun or pronoun just before is a plural; None if that is not known."""
    for index in range(len(found) - 1, -1, -1):
        word = words[index]
        if found[index] == "O":
            return word in _MANY_PRONOUNS
        if found[index] == "N":
            return is_plural(word) or word in _PLURALS
        if found[index] not in ("R", ","):
            return None
    return None


def _may_be_noun(word: str) -> bool:
    return bool(word) and word not in _DETERMINERS and _tag_of(word) in (None, "A")


def predicates(words: Sequence[str]) -> list[Predicate]:
    """Return the verbs of a sentence in order, with what goes with them."""
    tagged = tags(words)
    found: list[Predicate] = []
    nouns: list[Phrase] = []
    governor = ""
    counted: Predicate | None = None  # its object is a `piece of` what comes next
    index = 0
    while index < len(words):
        tag = tagged[index]
        if tag in ("N", "A", "D"):
            end = _end_of_phrase(tagged, index)
            if tagged[end - 1] != "D" and (tagged[end - 1] == "N" or end - index > 1):
                nouns.append(Phrase(end - 1, governor, index))
                if counted is not None:
                    counted.object, counted = end - 1, None
                elif found:
                    _attach(words, tagged, found[-1], nouns[-1])
            governor, index = "", end
            continue
        if tag == "O":
            nouns.append(Phrase(index, governor, index))
            governor = ""
        elif tag == "P":
            if words[index] == "of" and nouns and words[index - 1] in _PARTITIVES:
                part = nouns.pop()  # `a group of people`: the people are meant
                governor = "front" if words[index - 1] == "front" else part.preposition
                counted = found[-1] if found and found[-1].object == part.head else None
                if found and found[-1].places[-1:] == [(part.preposition, part.head)]:
                    found[-1].places.pop()
            else:
                governor = f"{governor} {words[index]}".strip()
        elif tag in ("V", "G", "E", "I"):
            found.append(_predicate(words, tagged, index, nouns, found))
            governor = ""
        elif tag in ("C", ","):
            governor = ""
        index += 1
    return found


def _end_of_phrase(tagged: Sequence[str], first: int) -> int:
    """Return the index after a noun phrase; a determiner after a noun begins another one."""
    end = first + 1
    while end < len(tagged) and tagged[end] in ("N", "A", "D"):
        if tagged[end] == "D" and tagged[end - 1] == "N":
            break
        end += 1
    return end


def _attach(words: Sequence[str], tagged: Sequence[str], verb: Predicate, noun: Phrase) -> None:
    """Add a noun phrase to the verb before it, as its object or as a place."""
    if not noun.preposition:
        if verb.object is None and set(tagged[verb.index + 1 : noun.first]) <= {"R"}:
            verb.object = noun.head
        return
    with_particle = noun.preposition in _PARTICLES or (
        noun.preposition == "on" and verb.stem in ("put", "try")
    )
    if with_particle and verb.object is None and words[verb.index + 1] == noun.preposition:
        verb.object = noun.head  # `putting on lipstick`
    if noun.preposition != "of":
        verb.places.append((noun.preposition, noun.head))


def _predicate(
    words: Sequence[str],
    tagged: Sequence[str],
    index: int,
    nouns: Sequence[Phrase],
    earlier: Sequence[Predicate],
) -> Predicate:
    """Return a verb with the subject that it has among the nouns before it."""
    stem = senses.verb(words[index]) or words[index]
    begin = index
    while begin and tagged[begin - 1] in ("B", "M", "R"):
        begin -= 1
    finite = tagged[index] == "V" or bool({"B", "M"} & {*tagged[begin:index]})
    verb = earlier[-1] if earlier else None
    before = tagged[begin - 1] if begin else ""
    free = [
        noun
        for noun in nouns
        if not noun.preposition
        and (verb is None or (noun.head > verb.index and noun.head != verb.object))
    ]
    if tagged[index] == "I":
        return Predicate(stem, index, verb.subject if verb else None, False)
    if before == "C" and words[begin - 1] in ("who", "which", "that") and nouns:
        return Predicate(stem, index, nouns[-1].head, finite)
    if not finite and begin and before == "N" and nouns:
        near = nouns[-1]
        governed = near.preposition not in ("", "of") and free
        return Predicate(stem, index, free[-1].head if governed else near.head, False)
    if not finite or not free:
        subject = verb.subject if verb else free[0].head if free and begin else None
        return Predicate(stem, index, subject, finite or (verb is not None and verb.finite))
    reduced = verb is not None and not verb.finite and verb.object is not None
    if reduced and not {"C", ","} & {*tagged[verb.index : begin]}:  # type: ignore[union-attr]
        return Predicate(stem, index, verb.subject, True)  # type: ignore[union-attr]
    # the first noun after the last comma or conjunction; `a cat and a dog` are one subject
    bounds = [
        i
        for i in range(begin)
        if tagged[i] in ("C", ",") and not (words[i] == "and" and tagged[i - 1] == "N")
    ]
    near = next((noun for noun in free if not bounds or noun.first > bounds[-1]), free[0])
    return Predicate(stem, index, near.head, True)


_DETERMINERS: Final = (DEFINITE | INDEFINITE | QUANTITIES) - {"that"}
_CLOSED: Final = {
    "B": BE,
    "M": MODALS | word_set("has have had does do did"),
    "C": CONJUNCTIONS,
    "P": PREPOSITIONS,
    "O": PRONOUNS,
    "R": ADVERBS,
}
"""Classes of words by tag; of those in two classes the first counts."""
_ALSO_PRONOUNS: Final = word_set("her this these those both all one some many each most")
_MANY_PRONOUNS: Final = word_set("they we you i both these those")
_PLURALS: Final = word_set("people men women children police cattle sheep")
_PARTICLES: Final = word_set("up off down out away over")
_PARTICIPLES: Final = word_set(
    "made worn held shown seen built hung drawn written kept taken set cut put torn spread laid "
    "shorn broken eaten bitten thrown caught left tied driven ridden hidden bent stuck fallen"
)
_NOUNS_IN_LY: Final = word_set("family butterfly belly jelly lily fly assembly")
_PARTITIVES: Final = word_set(
    "group couple pair bunch lot lots number crowd herd flock pile row rows piece pieces slice "
    "slices plate bowl cup glass bottle line set side top front back edge part middle rest end "
    "kind type sort bushel handful dozens series collection stack heap bit all some most one both "
    "many"
)
