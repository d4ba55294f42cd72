"""Are the things that a turn names in the image, and those that it denies not?"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.instruct.schema import Check, Verdict
from data_tools.instruct.verify.case import Case, Part
from data_tools.instruct.verify.describing import action_stems, actions
from data_tools.instruct.verify.grammar import (
    BE,
    FUNCTION_WORDS,
    determiner,
    singular,
    word_set,
)
from data_tools.instruct.verify.knowledge import Knowledge, evidence
from data_tools.instruct.verify.lexicon import Entry, Mention
from data_tools.instruct.verify.reading import Sentence


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for every thing named in question and answer."""
    for sentence, mention in case.answer_reading.mentions:
        if mention.stance == "denied":
            yield _judge_denied(case, sentence, mention, "answer")
        else:
            yield _judge_named(case, sentence, mention, "answer")
    yield from _check_question(case)


def _check_question(case: Case) -> Iterator[Check]:
    """Yield what the question takes for granted, and what its yes or no says."""
    question = case.question
    if question.sentence is None:
        return
    refused = {
        name
        for _, mention in case.answer_reading.mentions
        if mention.stance in ("denied", "local")
        for name in mention.entry.categories
    }
    says_no = question.polarity == "no" or (question.kind == "how_many" and question.number == 0)
    # `Is there a cat or a boat?` claims neither: the answer says which, and a bare yes means any.
    offered = () if says_no else question.asked.alternatives
    if question.polarity == "yes" and not any(
        case.knowledge.support(mention.entry, mention.word) for mention in offered
    ):
        offered = ()
    for mention in question.mentions:
        if mention.stance not in ("asserted", "depicted") or mention in offered:
            continue
        if question.kind == "existence" or (question.kind == "how_many" and says_no):
            if says_no:
                if question.is_unrestricted:
                    yield _judge_denied(case, question.sentence, mention, "question")
            elif question.polarity == "yes" or question.kind == "how_many":
                yield _judge_named(case, question.sentence, mention, "question")
        elif (
            not says_no
            and not refused.intersection(mention.entry.categories)
            and case.turn.kind != "cannot_tell"
        ):
            yield _judge_named(case, question.sentence, mention, "question")


def _judge_named(case: Case, sentence: Sentence, mention: Mention, part: Part) -> Check:
    knowledge, entry = case.knowledge, mention.entry
    span = sentence.span(mention.first, mention.last)
    support = knowledge.support(entry, mention.word)
    if support is not None:
        return case.check("object", "supported", None, part, span, mention.word, support)
    some = mention.word == "couple" and not _OF_THEM.isdisjoint(sentence.vocabulary)
    if some or _is_ingredient(case, sentence, mention):
        return case.check("object", "unknown", None, part, span, mention.word)
    # A statue or painting of a thing need not be boxed, but nobody could know of it either.
    is_claim = mention.stance in ("asserted", "depicted") and not _is_anyone(sentence, mention)
    acts = entry.categories == ("person",) and _acts(sentence, mention)
    known = knowledge.has_boxes or knowledge.excludes(entry.categories, acts=acts)
    certain = is_claim and known and (entry.firm or acts)
    tolerated = case.sample_type == "reasoning" and not _is_premise(sentence, mention)
    if not certain or tolerated or knowledge.shows_toys or _is_confusable(knowledge, entry):
        return case.check("object", "unknown", None, part, span, mention.word)
    under_labelled = case.policy.under_labelled.issuperset(entry.categories)
    doubtful = under_labelled or mention.stance == "depicted"
    verdict: Verdict = "unknown" if doubtful else "contradicted"
    code = "OBJECT_NOT_FOUND" if case.config.unseen_objects == "reject" else None
    return case.check("object", verdict, code, part, span, mention.word)


def _is_ingredient(case: Case, sentence: Sentence, mention: Mention) -> bool:
    """Return whether bits of it are in a dish whose contents a caption sums up: `vegetables`."""
    before = sentence.words[max(0, mention.first - 4) : mention.first]
    return (
        "of" in before
        and not BITS.isdisjoint(before)
        and not MIXED.isdisjoint(case.knowledge.words)
    )


def _judge_denied(case: Case, sentence: Sentence, mention: Mention, part: Part) -> Check:
    knowledge, entry = case.knowledge, mention.entry
    span = sentence.span(mention.first, mention.last)
    claim = f"no {mention.word}"
    boxes = knowledge.boxes_of(entry.categories)
    captions = tuple(n for name in entry.categories for n in knowledge.named.get(name, ()))
    same_word = mention.word in knowledge.words
    is_there = bool(boxes or any(name in knowledge.named for name in entry.categories))
    closed = _closed().get(singular(mention.word), _NONE)
    of_closed = any(box.category in closed for box in boxes)
    if is_there and (same_word or of_closed or (entry.firm and not entry.narrow)):
        ids = evidence(boxes, set(captions))
        return case.check("absence", "contradicted", "OBJECT_DENIED", part, span, claim, ids)
    if not knowledge.has_boxes or knowledge.support(entry, mention.word) is not None:
        return case.check("absence", "unknown", None, part, span, claim)
    return case.check("absence", "supported", None, part, span, claim)


def _is_anyone(sentence: Sentence, mention: Mention) -> bool:
    """Return whether people in general are meant: `a sign that welcomes people`."""
    words, first = sentence.words, mention.first
    if mention.word != "people" or first == 0 or (mention.last + 1 < len(words) and (
        words[mention.last + 1] in BE or words[mention.last + 1].endswith("ing")
    )):  # fmt: skip
        return False
    before = words[first - 1]
    return before.endswith("s") and before not in FUNCTION_WORDS and before not in _SHOWS


def _is_confusable(knowledge: Knowledge, entry: Entry) -> bool:
    """Return whether a box has a category that people call by this name too: a cup, a bowl."""
    return len(entry.categories) == 1 and any(
        entry.categories[0] in pair and any(other in knowledge.boxes for other in pair)
        for pair in _CONFUSABLE
    )


def _is_premise(sentence: Sentence, mention: Mention) -> bool:
    """Return whether reasoning states the thing as a fact of the image, not of its kind."""
    if _is_said_visible(sentence, mention):
        return True
    words = sentence.words
    after = words[mention.last + 1 : mention.last + 4]
    introduced, begin = determiner(words, mention.first)
    if introduced == "none" and mention.number == "many":
        # `Dogs need water` is general; `Bicycles are parked there`, `riding bicycles` are not
        if mention.first > 1 and words[mention.first - 1].endswith("ed") and (
            words[mention.first - 2] in ("have", "has")
        ):  # fmt: skip
            return True  # `people have opened umbrellas`
        if mention.first and words[mention.first - 1] in action_stems():
            return words[mention.first - 1].endswith("ing")
        return (after[:1] in (["are"], ["were"]) and after[1:2] != [] and after[1] in _PLACED) or (
            bool(after) and after[0] in _PLACED
        )
    vague = introduced == "number" and words[begin] in _VAGUE
    if mention.entry.categories == ("person",) and (introduced != "number" or vague):
        # `the owner`, `a driver` are inferred from other things; `a man stands next to it` is not
        return (introduced == "indefinite" or vague) and _acts(sentence, mention)
    if introduced == "none":
        return False
    return not (introduced == "indefinite" and _is_general(after))


def _acts(sentence: Sentence, mention: Mention) -> bool:
    """Return whether the thing stands, sits, walks or holds something, as only seen things do."""
    return any(
        action.mention is mention and action.stem in _SEEN_ACTIONS for action in actions(sentence)
    )


def _is_general(after: Sequence[str]) -> bool:
    """Return whether these words after a singular speak of its kind: `is a`, `needs`, `has to`."""
    if after[:1] in (["is"], ["has"], ["was"]):
        return after[1:2] != [] and after[1] in _OF_KIND
    return bool(after) and after[0] in _GENERAL_VERBS


def _is_said_visible(sentence: Sentence, mention: Mention) -> bool:
    """Return whether the sentence states that the thing is to be seen."""
    before = sentence.words[max(0, mention.first - 6) : mention.first]
    after = sentence.words[mention.last + 1 : mention.last + 5]
    near = set(before[-4:])
    if "there" in near and near & _BE:
        return True
    if {"image", "picture", "photo", "scene"} & set(before) and near & _SHOWS:
        return True
    if before and before[-1] in ("the", "of", "from") and _SIDES & sentence.vocabulary:
        return True  # `The cat is left of the zebra.`
    return bool(_SEEN & set(after)) and bool(_BE & set(after))


@cache
def _closed() -> dict[str, frozenset[str]]:
    """Return for wider words the categories that they certainly include."""
    return {word: frozenset(names) for word, names in wording.load("claims")["closed"].items()}


_NONE: Final[frozenset[str]] = frozenset()
_CONFUSABLE: Final = (("cup", "bowl"), ("cup", "wine glass"), ("car", "truck"), ("tv", "laptop"))
_OF_THEM: Final = frozenset({"them", "others"})
_PLACED: Final = word_set(
    "parked lined placed seated scattered gathered standing sitting waiting lying stand sit lie "
    "line fill hang run walk visible seen crossing moored tied stacked piled leaning resting"
)
_GENERAL_VERBS: Final = word_set(
    "needs requires provides offers makes gives takes usually often helps allows means can must"
)
_SEEN_ACTIONS: Final = word_set("stand sit lie walk run ride lean kneel crouch jump hold carry")
_OF_KIND: Final = word_set("a an to often usually one not more less better good useful always")
_BE: Final = frozenset({"is", "are", "be"})
BITS: Final = word_set(
    "bit bits piece pieces chunk chunks slice slices strip strips shreds cubes diced chopped"
)
MIXED: Final = word_set(
    "vegetable vegetables veggies fruit fruits salad stew soup mixture mix toppings ingredients"
)
_SHOWS: Final = frozenset({"shows", "show", "depicts", "features", "contains", "includes", "with"})
_VAGUE: Final = word_set("many some most several few more all")
_SIDES: Final = frozenset({"left", "right", "above", "below"})
_SEEN: Final = frozenset({"visible", "seen", "shown", "present", "pictured"})
