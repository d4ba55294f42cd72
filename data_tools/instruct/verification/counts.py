"""Are there as many as the turn says?"""

from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.coco import Box
from data_tools.instruct.schema import Check, Verdict
from data_tools.instruct.verification.case import Case, Part
from data_tools.instruct.verification.knowledge import evidence, names_for_counts
from data_tools.instruct.verification.lazy import lazy
from data_tools.instruct.verification.lexicon import Entry
from data_tools.instruct.verification.numbers import Quantity, quantity
from data_tools.instruct.verification.reading import Mention, Sentence


def check(case: Case) -> Iterator[Check]:
    """A finding for every number of a thing; too many is wrong, fewer may speak of some of them."""
    asked = case.question.counted
    if asked is not None:
        yield from _check_how_many(case, asked)
    for sentence, mention in case.answer_reading.mentions:
        is_asked = asked is not None and asked.entry.categories == mention.entry.categories
        if mention.stance == "asserted" and not is_asked:
            number = quantity(sentence, mention)
            if number is not None:
                yield from _judge(case, sentence, mention, number, "answer")
    yield from _check_yes_no(case)


def _check_how_many(case: Case, asked: Mention) -> Iterator[Check]:
    value = case.question.number
    sentence = case.question.sentence
    if value is None or sentence is None:
        return
    tally = Tally(case, asked.entry, asked.word)
    span = sentence.span(asked.first, asked.last)
    claim = f"how many {asked.word}: {value}"
    if value == 0 or (not tally.boxes and case.knowledge.has_boxes):
        return  # `objects` says whether any is there
    verdict, code = tally.exactly(value)
    if asked.entry.narrow or not case.question.is_unrestricted:
        verdict, code = tally.at_least(value)
    if (
        verdict == "unknown"
        and case.config.uncertain_counts == "reject"
        and not ((asked.entry.narrow and tally.boxes) or not case.question.is_unrestricted)
    ):
        code = "COUNT_UNCERTAIN"
    yield case.check("count", verdict, code, "question", span, claim, tally.evidence(value))


def _check_yes_no(case: Case) -> Iterator[Check]:
    """`Are there two dogs?` `Yes.` says what a sentence would; `No.` that it is another number."""
    question = case.question
    if question.kind not in ("existence", "yes_no") or question.polarity is None:
        return
    for mention in question.mentions:
        sentence = question.sentence
        number = quantity(sentence, mention) if sentence else None
        if sentence is None or number is None or number.least < 2:
            continue
        if question.polarity == "yes":
            yield from _judge(case, sentence, mention, number, "question")
            continue
        tally = Tally(case, mention.entry, mention.word)
        if question.kind == "existence" and tally.is_countable and not mention.entry.narrow:
            wrong = len(tally.boxes) == number.least
            span = sentence.span(number.first, mention.last)
            verdict: Verdict = "contradicted" if wrong else "supported"
            code = "COUNT_WRONG" if wrong else None
            claim = f"not {number.least} {mention.word}"
            yield case.check("count", verdict, code, "question", span, claim, tally.evidence(0))


def _judge(
    case: Case, sentence: Sentence, mention: Mention, number: Quantity, part: Part
) -> Iterator[Check]:
    tally = Tally(case, mention.entry, mention.word)
    value = number.least
    if (not tally.boxes and case.knowledge.has_boxes) or (value < 2 and not number.exact):
        return
    exact = number.exact and not mention.entry.narrow
    verdict, code = tally.exactly(value) if exact else tally.at_least(value)
    if sentence.words[number.first] in _VAGUE and verdict == "contradicted":
        verdict, code = "unknown", None  # one box may hold a whole bunch
    span = sentence.span(number.first, mention.last)
    claim = f"{'exactly ' if exact else ''}{value} {mention.word}"
    yield case.check("count", verdict, code, part, span, claim, tally.evidence(value))


_VAGUE = frozenset({"several", "many", "multiple", "various", "numerous", "few"})


@dataclass(frozen=True)
class Tally:
    """How many of a thing the annotations have."""

    case: Case
    entry: Entry
    word: str

    @lazy
    def boxes(self) -> tuple[Box, ...]:
        """Every box that may be meant."""
        return self.case.knowledge.boxes_of(self.entry.categories)

    @property
    def is_countable(self) -> bool:
        """Whether there are boxes, not too many, none of them a crowd's."""
        boxes = self.boxes
        few = 0 < len(boxes) <= self.case.config.countable
        return few and not any(box.crowd for box in boxes)

    def exactly(self, value: int) -> tuple[Verdict, str | None]:
        """What is known of there being so many and no more."""
        if not self.is_countable:
            return ("supported" if self._is_in_captions(value, whole=True) else "unknown"), None
        if value == len(self.boxes):
            return "supported", None
        doubtful = self._large <= value <= len(self.boxes) or not self.entry.firm
        if doubtful or self._is_in_captions(value, whole=True):
            return "unknown", None
        return "contradicted", "COUNT_WRONG"

    def at_least(self, value: int) -> tuple[Verdict, str | None]:
        """What is known of there being so many, and perhaps more."""
        if self._is_in_captions(value) or value <= len(self.boxes):
            return "supported", None
        if not self.is_countable or not self.entry.firm:
            return "unknown", None
        return "contradicted", "COUNT_TOO_HIGH"

    def evidence(self, value: int) -> tuple[int, ...]:
        """The boxes, and the captions with this number."""
        captions = {n for ids in self._captions(value) for n in ids}
        return evidence(self.boxes, captions)

    @property
    def _large(self) -> int:
        picture = self.case.knowledge.picture
        least = self.case.config.tiny * picture.width * picture.height
        return sum(box.width * box.height >= least for box in self.boxes)

    def _is_in_captions(self, value: int, *, whole: bool = False) -> bool:
        return bool(self._captions(value, whole=whole))

    def _captions(self, value: int, *, whole: bool = False) -> list[tuple[int, ...]]:
        known = self.case.knowledge
        counts = known.whole_counts if whole else known.counts
        return [
            counts[name][value]
            for name in names_for_counts(self.entry, self.word)
            if value in counts.get(name, ())
        ]
