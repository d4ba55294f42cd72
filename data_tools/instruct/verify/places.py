"""Compare where a text says things are (`left of the cup`, `at the top left`) with the boxes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

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
from data_tools.instruct.verify.grammar import word_set
from data_tools.instruct.verify.knowledge import evidence
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence

if TYPE_CHECKING:
    from data_tools.instruct.verify.case import Case, Part

PLAIN_MARGIN: Final = 0.1
"""`on the left`, without naming the image, is compared with halves with at least this margin."""


def check(case: "Case") -> Iterator[Check]:
    """Yield a finding for every place given, in sentences, yes/no questions and bare answers."""
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
    return asserted[0] if asserted else None


def _judge(
    case: "Case",
    sentence: Sentence,
    placing: "InFrame | Beside",
    part: "Part",
    *,
    negated: bool = False,
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


def _frame_verdict(case: "Case", placing: "InFrame") -> tuple[Verdict, tuple[Box, ...]]:
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


def _beside_verdict(case: "Case", placing: "Beside") -> tuple[Verdict, tuple[Box, ...]]:
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


Touch = Literal["on", "under", "in", "next to"]
"""Relations that need the two to be near each other."""


@dataclass(frozen=True, slots=True)
class InFrame:
    """Things said to be in a region of the image.

    `subjects` may each be the one that is meant. `plain`: `on the left`, without naming the
    image, which may also be said of two things. `pronoun`: an `it` or `they` is placed, and
    `subjects` is empty.
    """

    subjects: tuple[Mention, ...]
    regions: tuple[Region, ...]
    plain: bool
    first: int
    last: int
    pronoun: bool = False


@dataclass(frozen=True, slots=True)
class Beside:
    """Things said to be in a direction of another, or near it."""

    subjects: tuple[Mention, ...]
    how: Direction | Touch
    other: Mention
    first: int
    last: int


def placings(sentence: Sentence) -> Iterator[InFrame | Beside]:
    """Yield every place that a sentence gives to a thing it names."""
    if not sentence.bits & PLACE:
        return
    words = sentence.words
    for index in sentence.hits(PLACE):
        word = words[index]
        if word in _SIDES or word in _CORNERS:
            found = _side(sentence, index)
        elif word in _VERTICAL:
            found = _vertical(sentence, index)
        elif word in _CENTRES:
            found = _centre(sentence, index)
        elif word in _ORDER:
            found = _beside(sentence, index, index, _ORDER[word])
        else:
            found = _touch(sentence, index)
        if found is not None:
            yield found


def _side(sentence: Sentence, index: int) -> InFrame | Beside | None:
    """Return the place that the word `left` or `right` gives."""
    words = sentence.words
    side = words[index].removesuffix("-hand").removesuffix("most")
    before = words[index - 1] if index else ""
    first = index - 1 if before in _BEFORE_SIDE else index
    regions: tuple[Region, ...] = _CORNERS.get(side, (side,))  # type: ignore[arg-type]
    if before in _VERTICAL_OF and len(regions) == 1:
        regions = (_VERTICAL_OF[before], side)  # type: ignore[assignment]
    last, named = _skip_part(words, index)
    after = words[last + 1] if last + 1 < len(words) else ""
    if after == "of" or (after == "from" and not named):
        if _frame_follows(words, last + 2):
            return _in_frame(sentence, regions, False, first, last)
        direct = before in ("the", "immediate", "far") or before in _BE or index == 0
        direct = direct or any(m.last == index - 1 for m in sentence.mentions)
        if len(regions) == 1 and (direct or before in ("directly", "just", "immediately")):
            return _beside(sentence, first, last + 1, side)  # type: ignore[arg-type]
        return None
    if before not in _BEFORE_SIDE or after in _BODY or (not named and not _may_end(after)):
        return None
    return _in_frame(sentence, regions, not named and len(regions) == 1, first, last)


def _vertical(sentence: Sentence, index: int) -> InFrame | None:
    """Return the place that `top`, `bottom`, `upper`, `lower` give where no side follows."""
    words = sentence.words
    if index + 1 < len(words) and words[index + 1] in _SIDES:
        return None  # `_side` takes the corner
    last, named = _skip_part(words, index)
    if words[index] in ("upper", "lower") and not named:
        return None
    of_frame = words[last + 1 : last + 2] == ["of"] and _frame_follows(words, last + 2)
    if not (of_frame or words[last] in ("half", "third")) or (
        words[last + 1 : last + 2] == ["of"] and not of_frame
    ):
        return None
    region = _VERTICAL_OF[words[index]]
    return _in_frame(sentence, (region,), False, max(0, index - 1), last)


def _centre(sentence: Sentence, index: int) -> InFrame | None:
    words = sentence.words
    if words[index + 1 : index + 2] != ["of"] or not _frame_follows(words, index + 2):
        return None
    return _in_frame(sentence, ("centre",), False, max(0, index - 1), index)


def _touch(sentence: Sentence, index: int) -> Beside | None:
    """Return on, under, in or next to: only straight after the thing or its verb."""
    words = sentence.words
    how, last = _TOUCHES[words[index]], index
    if words[index] == "next":
        if words[index + 1 : index + 2] != ["to"]:
            return None
        last = index + 1
    if len(sentence.mentions) < 2:
        return None
    begin = index
    while begin and (words[begin - 1] in _POSTURES or words[begin - 1] in _BE):
        begin -= 1
    subject = next((m for m in sentence.mentions if m.last == begin - 1), None)
    other = _following(sentence, last, 3)
    if subject is None or other is None or "one" not in (subject.number, other.number):
        return None
    if subject.stance != "asserted" or other.stance != "asserted":
        return None
    return Beside((subject,), how, other, subject.first, other.last)


def _in_frame(
    sentence: Sentence, regions: tuple[Region, ...], plain: bool, first: int, last: int
) -> InFrame | None:
    subjects = _subjects(sentence, first, last)
    if subjects:
        return InFrame(subjects, regions, plain, first, last)
    begin, _ = sentence.clause(max(0, first - 1))
    opens = sentence.words[begin : begin + 2]
    named = any(begin <= m.first < first for m in sentence.mentions)
    if len(opens) == 2 and opens[0] in _PRONOUNS and opens[1] in _PLACING and not named:
        return InFrame((), regions, plain, first, last, pronoun=True)
    return None


def _beside(sentence: Sentence, first: int, last: int, how: Direction | Touch) -> Beside | None:
    """Return what is placed by a phrase (`left of`) whose last word is `last`."""
    other = _following(sentence, last, 4)
    if other is None or other.stance not in ("asserted", "depicted"):
        return None
    subjects = _subjects(sentence, first, other.last)
    return Beside(subjects, how, other, first, other.last) if subjects else None


def _subjects(sentence: Sentence, first: int, last: int) -> tuple[Mention, ...]:
    """Return what may be placed: named before in the clause, or right after if nothing is."""
    begin, _ = sentence.clause(max(0, first - 1))
    before = [m for m in sentence.mentions if begin <= m.first and m.last < first]
    if before:
        asserted = [m for m in before if m.stance == "asserted"]
        return tuple(asserted) if len(asserted) == len(before) else ()
    between = sentence.words[begin:first]
    if all(word in _LEADING for word in between):
        after = [m for m in sentence.mentions if m.first > last][:1]
        gap = sentence.words[last + 1 : after[0].first] if after else ()
        if after and after[0].stance == "asserted" and _INVERTED & set(gap):
            return tuple(after)
    return ()


def _following(sentence: Sentence, index: int, reach: int) -> Mention | None:
    """Return the thing named straight after, adjectives and articles between."""
    for mention in sentence.mentions:
        if mention.first > index:
            between = sentence.words[index + 1 : mention.first]
            plain = all(w not in _NOT_BEFORE_NOUN and w[0].isalpha() for w in between)
            return mention if len(between) < reach and plain else None
    return None


def _skip_part(words: Sequence[str], index: int) -> tuple[int, bool]:
    """Return the last of `hand`, `side`, `half` after a side, and whether a part is named."""
    last, named = index, False
    while last + 1 < len(words) and words[last + 1] in _PARTS:
        last += 1
        named = named or words[last] != "hand"
    return last, named


def _frame_follows(words: Sequence[str], index: int) -> bool:
    return any(word in _FRAME for word in words[index : index + 2])


def _may_end(word: str) -> bool:
    """Return whether `on the left` may be complete before this word."""
    return not word or not word[0].isalpha() or word in _AFTER_PLAIN


_SIDES: Final = word_set("left right left-hand right-hand leftmost rightmost")
_VERTICAL_OF: Final[dict[str, Region]] = {
    "upper": "top", "top": "top", "lower": "bottom", "bottom": "bottom",
}  # fmt: skip
_SIDE_OF: Final[dict[str, Region]] = {"left": "left", "right": "right"}
_CORNERS: Final[dict[str, tuple[Region, ...]]] = {
    f"{vertical}-{side}": (region, where)
    for vertical, region in _VERTICAL_OF.items()
    for side, where in _SIDE_OF.items()
}
_VERTICAL: Final = frozenset(_VERTICAL_OF)
_CENTRES: Final = word_set("centre center middle")
_ORDER: Final[dict[str, Direction]] = {"above": "above", "below": "below"}
_TOUCHES: Final[dict[str, Touch]] = {
    "on": "on", "onto": "on", "atop": "on", "under": "under", "underneath": "under",
    "beneath": "under", "in": "in", "inside": "in", "next": "next to", "beside": "next to",
}  # fmt: skip
CUES: Final = _SIDES | _CORNERS.keys() | _VERTICAL | _CENTRES | _ORDER.keys() | _TOUCHES.keys()
_BEFORE_SIDE: Final = word_set("the far upper lower top bottom immediate extreme")
_PARTS: Final = word_set("hand side half part portion third corner edge section area")
_FRAME: Final = word_set("picture image photo photograph frame scene shot view")
_BODY: Final = word_set("hand arm leg foot shoulder ear eye wing paw knee turn lane")
_AFTER_PLAIN: Final = word_set("is are and while with has in appears stands sits there we or")
_BE: Final = word_set("is are was were be stays lies located positioned placed situated")
_POSTURES: Final = word_set(
    "sitting standing lying laying sits stands lies lays placed resting rests perched seated "
    "parked located positioned"
)
_PLACING: Final = _BE | _POSTURES | word_set("can appears seems 're 's")
_PRONOUNS: Final = word_set("it he she they")
_LEADING: Final = word_set("on to in at the far immediate directly just and , towards toward")
_INVERTED: Final = word_set("is are there stands sits lies , we")
_NOT_BEFORE_NOUN: Final = word_set(
    "of is are and or with that which to in on at from by some several"
)
