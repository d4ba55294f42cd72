"""Compare where a text says things are (`left of the cup`, `at the top left`) with the boxes."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

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
from data_tools.instruct.verify.flags import PLACE
from data_tools.instruct.verify.grammar import determiner, word_set
from data_tools.instruct.verify.knowledge import evidence
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.placings import (
    PRONOUNS,
    Beside,
    InFrame,
    InLayer,
    Placing,
    placings,
)
from data_tools.instruct.verify.reading import Sentence

if TYPE_CHECKING:
    from data_tools.instruct.verify.case import Case, Part

PLAIN_MARGIN: Final = 0.1
"""`on the left`, without naming the image, is compared with halves with at least this margin."""
RELATIVE_MARGIN: Final = 0.2
"""The same for `to the left`, which may be seen from the thing named before."""
END_SHARE: Final = 0.25
"""What lies in this share of a desk is not at its other end."""
EDGE: Final = 0.33
"""What lies in this share of the width is hardly right of anything without a box."""
LARGE: Final = 0.3
"""A box of this share of the image is not in its background."""
TINY: Final = 0.005
LOW: Final = 0.6
"""A box of that share of the image which ends above this share of its height is not in front."""
DEEP: Final = 0.2
"""What ends this share of the height below another thing is not behind it."""
_ALOFT: Final = word_set(
    "kite airplane bird frisbee clock tv umbrella snowboard skateboard book tie chair couch bed "
    "train boat bench"
) | {"sports ball", "traffic light", "stop sign", "cell phone", "dining table"}
"""Things whose lowest edge says little about how near they are."""


def check(case: "Case") -> Iterator[Check]:
    """Yield a finding for every place given, in sentences, yes/no questions and bare answers."""
    answer = case.answer_reading
    sentences = answer.sentences if answer.bits & PLACE else ()
    for number, sentence in enumerate(sentences):
        for placing in placings(sentence):
            if isinstance(placing, InFrame) and placing.pronoun:
                opens = sentence.words[0] in PRONOUNS
                where = number == 0 and case.question_reading.words[:1] == ["where"]
                meant = _antecedent(case, number) if opens or where else None
                if meant is None:
                    continue
                placing = replace(placing, subjects=(meant,))
            yield _judge(case, sentence, placing, "answer")
    if case.question_reading.bits & PLACE:
        yield from _check_yes_no(case)
    if answer.bits & PLACE:
        yield from _check_bare_answer(case)


def _antecedent(case: "Case", number: int) -> Mention | None:
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
    personal = case.answer_reading.sentences[number].words[0] in ("he", "she")
    if personal and case.before is not None and not any(map(_is_one_person, asserted)):
        people = [m for _, m in case.before.answer_reading.mentions if _is_one_person(m)]
        return people[0] if len(people) == 1 else None
    return asserted[0] if asserted else None


def _is_one_person(mention: Mention) -> bool:
    return mention.entry.categories == ("person",) and mention.number == "one"


def _judge(
    case: "Case", sentence: Sentence, placing: Placing, part: "Part", *, negated: bool = False
) -> Check:
    rule, code = "side", "PLACE_WRONG"
    if isinstance(placing, InFrame):
        verdict, boxes = _frame_verdict(case, sentence, placing)
        where = f"{' '.join(placing.regions)} of the image"
    elif isinstance(placing, InLayer):
        verdict, boxes = _layer_verdict(case, placing)
        where = f"in the {placing.layer}"
    else:
        verdict, boxes = _beside_verdict(case, placing)
        touches = placing.how not in ("left", "right", "above", "below")
        rule, code = ("touch", "RELATION_REFUTED") if touches else ("order", "PLACE_WRONG")
        where = f"{placing.how} {placing.other.word if placing.other else 'another thing'}"
    if negated:
        where = f"not {where}"
        verdict = _OPPOSITE.get(verdict, verdict) if rule != "touch" else "unknown"
    claim = f"{placing.subjects[0].word} {where}"
    span = sentence.span(placing.first, placing.last)
    found = code if verdict == "contradicted" else None
    return case.check(rule, verdict, found, part, span, claim, evidence(boxes))


def _frame_verdict(
    case: "Case", sentence: Sentence, placing: InFrame
) -> tuple[Verdict, tuple[Box, ...]]:
    image = case.knowledge.image
    margin = max(case.config.gap, PLAIN_MARGIN) if placing.plain else case.config.gap
    boxes = _boxes(case, placing.subjects)
    if not boxes:
        return "unknown", ()
    if placing.relative or placing.of is not None:
        margin = RELATIVE_MARGIN
    if len(boxes) > 1 and (placing.plain or placing.relative) and any(
        determiner(sentence.words, m.first)[0] == "definite" for m in placing.subjects
    ):  # fmt: skip
        return "unknown", boxes  # the left one of two, as likely as the left half
    of = _boxes(case, (placing.of,)) if placing.of is not None else ()
    if of:
        return _end_verdict(boxes, of, placing.regions[0]), boxes + of
    worst = [
        of_all(region(box, where, image, margin) for box in boxes) for where in placing.regions
    ]
    if "contradicted" in worst:
        return "contradicted", boxes
    return ("supported" if set(worst) == {"supported"} else "unknown"), boxes


def _end_verdict(boxes: tuple[Box, ...], of: tuple[Box, ...], side: str) -> Verdict:
    """Return whether things are at this end of another one, which must have one box."""
    if len(of) != 1 or side not in ("left", "right"):
        return "unknown"
    whole = of[0]
    for box in boxes:
        middle = (box.left + box.right) / 2
        share = (middle - whole.left) / max(whole.width, 1)
        if side == "left":
            share = 1 - share
        if share > END_SHARE:
            return "unknown"
    return "contradicted"


def _layer_verdict(case: "Case", placing: InLayer) -> tuple[Verdict, tuple[Box, ...]]:
    """Return whether a thing fills the image that is called its background, or the reverse."""
    image = case.knowledge.image
    boxes = _boxes(case, placing.subjects)
    area = image.width * image.height
    if not boxes or len(placing.subjects) > 1:
        return "unknown", boxes
    if placing.layer == "background":
        refuted = all(box.width * box.height > LARGE * area for box in boxes)
    else:
        refuted = all(
            box.width * box.height < TINY * area and box.bottom < image.height * LOW
            for box in boxes
        )
    return ("contradicted" if refuted else "unknown"), boxes


def _beside_verdict(case: "Case", placing: Beside) -> tuple[Verdict, tuple[Box, ...]]:
    image = case.knowledge.image
    boxes = _boxes(case, placing.subjects)
    others = _boxes(case, (placing.other,)) if placing.other is not None else ()
    if boxes and not others and placing.how in ("left", "right") and placing.other is None:
        # what stands at one edge of the image is hardly on the other side of anything
        edge = EDGE * image.width
        outermost = all(
            box.right < edge if placing.how == "right" else box.left > image.width - edge
            for box in boxes
        )
        return ("contradicted" if outermost else "unknown"), boxes
    if not boxes or not others:
        return "unknown", boxes + others
    if placing.marked is not None:
        marks = case.knowledge.boxes_of(placing.marked.entry.categories)
        others = tuple(o for o in others if any(_overlap(o, mark) for mark in marks)) or others
    if placing.how in ("left", "right", "above", "below"):
        verdicts = {
            order(one, other, placing.how, image, case.config.gap, case.config.centres)
            for one in boxes
            for other in others
            if one is not other
        }
        return of_all(verdicts), boxes + others
    if placing.how in ("behind", "in front of"):
        return _depth_verdict(case, boxes, others, placing.how), boxes + others
    # One box of each, or another one that nobody boxed may be meant.
    sole = len(boxes) == len(others) == 1
    far = sole and are_far_apart(boxes[0], others[0], image, case.config.far)
    return ("contradicted" if far else "unknown"), boxes + others


def _depth_verdict(
    case: "Case", boxes: tuple[Box, ...], others: tuple[Box, ...], how: str
) -> Verdict:
    """Return whether what is called behind reaches far lower in the image, and so is nearer."""
    if len(boxes) != 1 or len(others) != 1:
        return "unknown"
    back, front = boxes[0], others[0]
    if how == "in front of":
        back, front = front, back
    if not {back.category, front.category}.isdisjoint(_ALOFT):
        return "unknown"
    lower = back.bottom - front.bottom > DEEP * case.knowledge.image.height
    return "contradicted" if lower else "unknown"


def _overlap(one: Box, other: Box) -> bool:
    return (
        one.left < other.right
        and other.left < one.right
        and one.top < other.bottom
        and other.top < one.bottom
    )


def _boxes(case: "Case", mentions: tuple[Mention, ...]) -> tuple[Box, ...]:
    """Return the boxes that may be meant; none where a thing is not boxed, or too often."""
    found: list[Box] = []
    for mention in mentions:
        boxes = case.knowledge.boxes_of(mention.entry.categories)
        many = len(boxes) > case.config.countable or any(box.crowd for box in boxes)
        sole = len(mention.entry.categories) == len(boxes) == 1
        if not boxes or many or not (mention.entry.firm or sole):
            return ()
        found += boxes
    return tuple(found)


def _check_yes_no(case: "Case") -> Iterator[Check]:
    """Judge `Is the cat left of the cup?` `No.`"""
    question = case.question
    if question.kind != "yes_no" or question.polarity is None or question.sentence is None:
        return
    negated = question.polarity == "no"
    for placing in placings(question.sentence):
        yield _judge(case, question.sentence, placing, "question", negated=negated)


def _check_bare_answer(case: "Case") -> Iterator[Check]:
    """Judge `Is the cat in the left or the right half?` `Left.`"""
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
    """Return the thing whose place is asked for, and the one it is seen from."""
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
