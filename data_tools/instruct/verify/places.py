"""Are things where the turn says they are?"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from data_tools.coco import Box
from data_tools.geometry import (
    Direction,
    Region,
    are_far_apart,
    of_all,
    order,
    region,
)
from data_tools.instruct.schema import Check, Verdict
from data_tools.instruct.verify.case import Case, Part
from data_tools.instruct.verify.flags import PLACE
from data_tools.instruct.verify.knowledge import evidence
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.placing import Beside, InFrame, placings
from data_tools.instruct.verify.reading import Sentence

PLAIN_MARGIN: Final = 0.1
"""`on the left`, without naming the image, is held against halves with at least this margin."""


def check(case: Case) -> Iterator[Check]:
    """A finding for every place given, in sentences, in yes/no questions and in bare answers."""
    answer = case.answer_reading
    sentences = answer.sentences if answer.bits & PLACE else ()
    for number, sentence in enumerate(sentences):
        for placing in placings(sentence):
            if isinstance(placing, InFrame) and placing.pronoun:
                meant = _antecedent(case, number)
                if meant is None:
                    continue
                placing = replace(placing, subjects=(meant,))
            yield _judge(case, sentence, placing, "answer")
    if case.question_reading.bits & PLACE:
        yield from _check_yes_no(case)
    if answer.bits & PLACE:
        yield from _check_bare_answer(case)


def _antecedent(case: Case, number: int) -> Mention | None:
    """Return what a pronoun in this sentence stands for, where only one thing comes into question.

    That is the subject of the sentence before, or of the question.
    """
    if number:
        before = case.answer_reading.sentences[number - 1].mentions[:1]
    elif case.asked and case.question.reading.words[0] == "where":
        before = case.asked[:1]
    else:
        before = case.asked if len(case.asked) == 1 else ()
    asserted = [m for m in before if m.stance == "asserted"]
    return asserted[0] if asserted else None


def _judge(
    case: Case, sentence: Sentence, placing: InFrame | Beside, part: Part, *, negated: bool = False
) -> Check:
    if isinstance(placing, InFrame):
        verdict, boxes = _frame_verdict(case, placing)
        rule, code = "side", "PLACE_WRONG"
        where = f"{' '.join(placing.regions)} of the picture"
    else:
        verdict, boxes = _beside_verdict(case, placing)
        touches = placing.how not in ("left", "right", "above", "below")
        rule, code = ("touch", "RELATION_REFUTED") if touches else ("order", "PLACE_WRONG")
        where = f"{placing.how} {placing.other.word}"
    if negated:
        where = f"not {where}"
        verdict = _OPPOSITE.get(verdict, verdict) if rule != "touch" else "unknown"
    claim = f"{placing.subjects[0].word} {where}"
    span = sentence.span(placing.first, placing.last)
    found = code if verdict == "contradicted" else None
    return case.check(rule, verdict, found, part, span, claim, evidence(boxes))


def _frame_verdict(case: Case, placing: InFrame) -> tuple[Verdict, tuple[Box, ...]]:
    image = case.knowledge.image
    margin = max(case.config.gap, PLAIN_MARGIN) if placing.plain else case.config.gap
    boxes = _boxes(case, placing.subjects)
    if not boxes:
        return "unknown", ()
    if len(boxes) > 1 and placing.plain:
        return "unknown", boxes  # the left one of two, as likely as the left half
    worst = [
        of_all(region(box, where, image, margin) for box in boxes) for where in placing.regions
    ]
    if "contradicted" in worst:
        return "contradicted", boxes
    return ("supported" if set(worst) == {"supported"} else "unknown"), boxes


def _beside_verdict(case: Case, placing: Beside) -> tuple[Verdict, tuple[Box, ...]]:
    others = _boxes(case, (placing.other,))
    boxes = _boxes(case, placing.subjects)
    if not boxes or not others:
        return "unknown", boxes + others
    image = case.knowledge.image
    if placing.how in ("left", "right", "above", "below"):
        verdicts = {
            order(one, other, placing.how, image, case.config.gap, case.config.centres)
            for one in boxes
            for other in others
            if one is not other
        }
        return of_all(verdicts), boxes + others
    # One box of each, or another one that nobody boxed may be meant.
    sole = len(boxes) == len(others) == 1
    far = sole and are_far_apart(boxes[0], others[0], image, case.config.far)
    return ("contradicted" if far else "unknown"), boxes + others


def _boxes(case: Case, mentions: tuple[Mention, ...]) -> tuple[Box, ...]:
    """The boxes that may be meant; none where a thing is not boxed, or is too many to tell."""
    found: list[Box] = []
    for mention in mentions:
        boxes = case.knowledge.boxes_of(mention.entry.categories)
        many = len(boxes) > case.config.countable or any(box.crowd for box in boxes)
        if not boxes or many or not mention.entry.firm:
            return ()
        found += boxes
    return tuple(found)


def _check_yes_no(case: Case) -> Iterator[Check]:
    """`Is the cat left of the cup?` `No.`"""
    question = case.question
    if question.kind != "yes_no" or question.polarity is None or question.sentence is None:
        return
    negated = question.polarity == "no"
    for placing in placings(question.sentence):
        yield _judge(case, question.sentence, placing, "question", negated=negated)


def _check_bare_answer(case: Case) -> Iterator[Check]:
    """`Is the cat in the left or the right half?` `Left.`"""
    answer = case.answer_reading
    question = case.question
    if answer.mentions or question.sentence is None or not question.mentions:
        return
    words = [word for word in answer.words if word[0].isalpha()]
    sides = [word for word in words if word in _BARE]
    if len(sides) != 1 or len(words) > 8:
        return
    asked = _ASKS_PLACE.search(" ".join(question.sentence.words))
    if asked is None:
        return
    subject, other = _asked_about(question.sentence, question.mentions)
    if subject is None:
        return
    index = answer.words.index(sides[0])
    placing: InFrame | Beside
    if other is None:
        where: Region = _BARE[sides[0]]
        placing = InFrame((subject,), (where,), False, subject.first, subject.last)
    else:
        direction: Direction = _DIRECTIONS[_BARE[sides[0]]]
        placing = Beside((subject,), direction, other, subject.first, subject.last)
    found = _judge(case, question.sentence, placing, "question")
    span = answer.sentences[0].span(0, 0) if index == 0 else None
    yield replace(found, part="answer", span=span or (0, len(answer.text)))


def _asked_about(
    sentence: Sentence, mentions: tuple[Mention, ...]
) -> tuple[Mention | None, Mention | None]:
    """The thing whose place is asked for, and the one it is seen from."""
    others = [m for m in mentions if _is_reference(sentence, m)]
    subjects = [m for m in mentions if m not in others]
    if len(subjects) != 1 or len(others) > 1:
        return None, None
    return subjects[0], others[0] if others else None


def _is_reference(sentence: Sentence, mention: Mention) -> bool:
    before = sentence.words[max(0, mention.first - 3) : mention.first]
    return bool(before) and any(word in ("of", "from", "than") for word in before)


_OPPOSITE: Final[dict[Verdict, Verdict]] = {
    "supported": "contradicted",
    "contradicted": "supported",
}
_BARE: Final[dict[str, Region]] = {
    "left": "left", "right": "right", "top": "top", "bottom": "bottom", "upper": "top",
    "lower": "bottom", "above": "top", "below": "bottom",
}  # fmt: skip
_DIRECTIONS: Final[dict[Region, Direction]] = {
    "left": "left", "right": "right", "top": "above", "bottom": "below",
}  # fmt: skip
_ASKS_PLACE: Final = re.compile(
    r"\b(?:left|right|top|bottom|above|below|upper|lower)\b|\bwhere\b|\bwhich (?:side|half)\b"
)
