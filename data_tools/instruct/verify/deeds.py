"""What the figures of an image do, and where, that no caption has a word for.

Captions leave out what is in the background, what people wear and how they hold their arms. Of what
nearly all of them name they say what it does, with what, and where. So a deed that is none of those
of captions, by WordNet's wider and narrower verbs, is contradicted if captions hardly leave it out
(`swim`, `sleep`) or if it is done with a thing that no caption has; and so is a kind of place where
captions have other kinds.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verify import senses
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.clauses import Predicate, predicates
from data_tools.instruct.verify.describing import ANIMALS, action_stems, noun_at
from data_tools.instruct.verify.grammar import LIGHT_VERBS, determiner, is_plural, word_set
from data_tools.instruct.verify.knowledge import AT, Knowledge
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence

CAPTIONS: Final = 3
"""How many captions an image needs before what they do not say is excluded."""


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for the first deed or place of a figure that captions exclude."""
    known = case.knowledge
    if len(known.captions) < CAPTIONS or not known.figures:
        return
    subject = _asked_figure(case)
    first: dict[str, Mention] = {}
    for number, sentence in enumerate(case.answer_reading.sentences):
        for mention in sentence.mentions:
            for name in mention.entry.categories:
                first.setdefault(name, mention)
        telling = known.tells_more(sentence.words)
        for predicate in predicates(sentence.words) if telling or number == 0 else ():
            scene = _is_of_scene(sentence, predicate)
            subject = subject if scene else _subject(sentence, predicate, subject, first)
            if not (scene or subject in known.figures) or not _is_claimed(sentence, predicate):
                continue
            asked = number == 0 and "doing" in case.question_reading.vocabulary
            last = predicate.object or predicate.index
            place = unseen_place(known, sentence, predicate, animate=subject in _ANIMATE)
            if not scene and subject in _ANIMATE and is_unseen_deed(
                known, sentence, predicate, asked=asked
            ):  # fmt: skip
                rule, code, claim = "action", "ACTION_WRONG", predicate.stem
            elif place is not None:
                rule, code, last = "relation", "RELATION_REFUTED", place
                claim = f"{subject or 'scene'} at {sentence.words[place]}"
            else:
                continue
            span = sentence.span(predicate.index, max(last, predicate.index))
            ids = tuple(caption.id for caption in known.captions if caption.id)
            yield case.check(rule, "contradicted", code, "answer", span, claim, ids)
            return


def _asked_figure(case: Case) -> str:
    """Return the figure that a pronoun at the start of the answer stands for; empty if unknown."""
    asked = {name for mention in case.asked for name in mention.entry.categories}
    figures = case.knowledge.figures
    found = sorted(asked & figures) if asked else sorted(figures)
    return found[0] if found and (asked or len(found) == 1) else ""


def _is_of_scene(sentence: Sentence, predicate: Predicate) -> bool:
    """Return whether `was taken in` or `takes place at` gives the place of the whole scene."""
    if predicate.stem != "take":
        return False
    thing = sentence.words[predicate.object] if predicate.object is not None else ""
    return sentence.words[predicate.index] == "taken" or thing == "place"


def _subject(
    sentence: Sentence, predicate: Predicate, before: str, first: Mapping[str, Mention]
) -> str:
    """Return whose deed it is: a category or noun; a pronoun stands for the one before.

    Of several of a category, the answer must speak of the first that it names.
    """
    if predicate.subject is None:
        return ""
    words = sentence.words
    if words[predicate.subject] in _PRONOUNS:
        return before
    introduced, begin = determiner(words, predicate.subject)
    if not _OTHERS.isdisjoint(words[begin : predicate.subject]):
        return ""
    for mention in sentence.mentions:
        if mention.first <= predicate.subject <= mention.last:
            names = mention.entry.categories
            name = "person" if "person" in names else names[0] if len(names) == 1 else ""
            return name if introduced == "definite" or mention is first.get(name) else ""
    noun = senses.noun(words[predicate.subject])
    if noun is not None and senses.nouns().is_a(noun, "person"):
        return "person" if "person" not in first or introduced == "definite" else ""
    return noun_at(sentence, predicate.subject)


def _is_claimed(sentence: Sentence, predicate: Predicate) -> bool:
    """Return whether the deed is stated of this image, not denied, supposed or general."""
    words, subject, index = sentence.words, predicate.subject, predicate.index
    if subject is None or not sentence.asserts(index, index):
        return False
    if words[index - 1] == "to" and predicate.object is None:
        return False
    general = is_plural(words[subject]) and determiner(words, subject)[0] == "none"
    return not (general and not words[index].endswith("ing"))


def is_unseen_deed(
    known: Knowledge, sentence: Sentence, predicate: Predicate, *, asked: bool
) -> bool:
    """Return whether captions would have a word for this deed, and have none.

    Args:
        known: What the captions say.
        sentence: Where the deed is stated.
        predicate: The deed.
        asked: Whether the question is what is done.
    """
    words, index = sentence.words, predicate.index
    if words[index].endswith("ed") and _HAVE.isdisjoint(words[max(0, index - 3) : index]):
        return False  # `is decorated with`, `topped with`
    if predicate.stem in LIGHT_VERBS or known.has_verb(predicate.stem):
        return False
    thing = words[predicate.object] if predicate.object is not None else None
    new = thing is None or known.is_new(thing)
    root = _root(words[index], predicate.stem)
    if root is None:
        if asked:
            return words[index].endswith("ing")
        noun = senses.noun(thing) if thing is not None else None
        return noun is not None and new and (
            senses.nouns().is_a(noun, "physical_entity")
            and not senses.nouns().may_be(noun, "body_part")
        )  # fmt: skip
    if words[index] not in action_stems() and not new:
        return False
    needs = _striking()[root]
    possible = not needs.isdisjoint(known.words) or any(name in known.boxes for name in needs)
    if possible and not (asked and thing is not None and new):
        return False
    return not known.has_verb(root) and (asked or len(known.captions) > CAPTIONS)


def unseen_place(
    known: Knowledge, sentence: Sentence, predicate: Predicate, *, animate: bool
) -> int | None:
    """Return the noun of the place of a deed, of a kind that no caption has while two have others.

    None where captions do not decide.
    """
    for preposition, head in predicate.places:
        word = sentence.words[head]
        if preposition.split()[-1] not in AT or word in _SIDES or not known.is_new(word):
            continue
        ground = senses.ground(senses.noun(word) or "")
        grounds = known.grounds
        elsewhere = sum(grounds.values()) > 1 or (ground in _REMARKABLE and animate)
        if ground is not None and ground not in grounds and elsewhere:
            return head
    return None


@cache
def _root(word: str, stem: str) -> str | None:
    """Return the striking action that a verb is, or is a way of: `doze` for `sleep`."""
    listed = action_stems().get(word)
    if listed is not None:
        return listed if listed in _striking() else None
    if stem in _striking():
        return stem
    verbs = senses.verbs()
    path = verbs.path(verbs.of.get(stem, (0,))[0])
    for root in _striking():
        if any(sense in path for sense in verbs.of.get(root, ())[:2]):
            return root
    return None


@cache
def _striking() -> dict[str, frozenset[str]]:
    """Return the actions that captions hardly leave out, with words of which one may stand for it.

    Names of categories among these words stand for boxes.
    """
    listed = wording.load("facts")["activities"]["striking"]
    return {stem: frozenset(words) for stem, words in listed.items()}


_REMARKABLE: Final = frozenset(
    {"body_of_water", "seashore", "beach", "vegetation", "desert", "roof", "bridge", "tower"}
)
"""Kinds of places of people and animals that captions hardly leave out."""
_ANIMATE: Final = frozenset({"person", *ANIMALS})
_SIDES: Final = word_set("left right side front back top bottom edge end")
_HAVE: Final = word_set("has have had")
_PRONOUNS: Final = word_set("he she it they who which that him them both")
_OTHERS: Final = word_set("another other second third some few several one many most")
