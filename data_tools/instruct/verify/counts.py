"""Are there as many as the turn says?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.coco import Box
from data_tools.instruct.schema import Check, Verdict
from data_tools.instruct.verify.case import Case, Part
from data_tools.instruct.verify.describing import action_stems, noun_name
from data_tools.instruct.verify.flags import NUMBER
from data_tools.instruct.verify.grammar import (
    FUNCTION_WORDS,
    last_of_phrase,
    singular,
    word_set,
)
from data_tools.instruct.verify.knowledge import evidence, names_for_counts
from data_tools.instruct.verify.lazy import lazy
from data_tools.instruct.verify.lexicon import Entry, Mention
from data_tools.instruct.verify.numbers import Quantity, numbered_nouns, quantity
from data_tools.instruct.verify.reading import Sentence

FAR_MORE: Final = 1.5
"""Where this many times a number are boxed, the number is wrong though they are hard to count."""


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for every number of a thing.

    Too many is wrong. Fewer may speak of some of them, unless the sentence counts all of them or
    captions give another number for the same word.
    """
    asked = case.question.counted
    if asked is not None:
        yield from _check_how_many(case, _named_in_answer(case, asked))
    elif case.question.kind == "how_many":
        yield from _check_how_many_others(case)
    answer = case.answer_reading
    for sentence, mention in answer.mentions if answer.bits & NUMBER else ():
        is_asked = asked is not None and asked.entry.categories == mention.entry.categories
        number = quantity(sentence, mention)
        if number is None or is_asked:
            continue
        if mention.stance == "asserted":
            yield from _judge(case, sentence, mention, number, "answer")
        elif mention.stance == "depicted":
            yield from _judge_depicted(case, sentence, mention, number)
    if answer.bits & NUMBER:
        yield from _check_others(case)
    if case.question_reading.bits & NUMBER:
        yield from _check_yes_no(case)


def _named_in_answer(case: Case, asked: Mention) -> Mention:
    """Return the thing that the answer counts: `How many animals?` `There are three horses.`"""
    if asked.entry.firm:
        return asked
    for sentence, mention in case.answer_reading.mentions:
        narrower = set(mention.entry.categories) < set(asked.entry.categories)
        if mention.entry.firm and narrower and quantity(sentence, mention) is not None:
            return Mention(mention.entry, mention.word, asked.first, asked.last, asked.stance)
    return asked


def _check_how_many(case: Case, asked: Mention) -> Iterator[Check]:
    value = case.question.number
    sentence = case.question.sentence
    if value is None or sentence is None:
        return
    tally = Tally(case, asked.entry, asked.word)
    span = sentence.span(asked.first, asked.last)
    claim = f"how many {asked.word}: {value}"
    if value == 0 or (not tally.boxes and case.knowledge.has_boxes and not tally.in_captions):
        return  # `objects` says whether any is there
    unrestricted = case.question.is_unrestricted
    narrow = asked.entry.narrow
    verdict: Verdict
    code: str | None
    if (unrestricted and tally.is_far_more_than(value)) or (
        value == 1 and len(tally.boxes) > 2 and not unrestricted and _is_plural_there(case, tally)
    ):
        verdict, code = "contradicted", "COUNT_WRONG"
    elif not narrow and unrestricted and tally.boxes:
        verdict, code = tally.exactly(value)
        if verdict == "unknown" and tally.exceeds_captions(value):
            verdict, code = "contradicted", "COUNT_TOO_HIGH"
    elif tally.exceeds_captions(value) or (
        (unrestricted or _shares_words(case))
        and (
            tally.refuted_by_captions(value, some=not unrestricted)
            or tally.refuted_by_other_words(value)
        )
    ):
        verdict, code = "contradicted", "COUNT_WRONG"
    elif narrow or not unrestricted:
        verdict, code = tally.at_least(value)
    else:
        verdict, code = tally.exactly(value)
    if verdict == "unknown" and _counts_others(case, value):
        verdict = "supported"
    if (
        verdict == "unknown"
        and case.config.uncertain_counts == "reject"
        and not ((narrow and tally.boxes) or not unrestricted or tally.is_mirrored)
    ):
        code = "COUNT_UNCERTAIN"
    yield case.check("count", verdict, code, "question", span, claim, tally.evidence(value))


def _counts_others(case: Case, value: int) -> bool:
    """Return whether the answer counts what has no category, as captions do: `two goats`."""
    counts = case.knowledge.word_counts
    return any(
        number == value and value in counts.get(noun_name(noun), ())
        for sentence in case.answer_reading.sentences[:1]
        for noun, number, _, _ in numbered_nouns(sentence)
    )


def _check_how_many_others(case: Case) -> Iterator[Check]:
    """Judge the number of what has no category (`How many buckets?`) by the captions."""
    sentence, value = case.question.sentence, case.question.number
    if sentence is None or not value:
        return
    words = sentence.words
    start = next((i + 1 for i, w in enumerate(words) if w in ("many", "of")), 0)
    last = last_of_phrase(words, start, len(words))
    known = case.knowledge.word_counts.get(noun_name(words[last])) if last >= start else None
    if not known:
        return
    span, claim = sentence.span(start, last), f"how many {words[last]}: {value}"
    if value in known:
        ids = tuple(number for number in known[value] if number)
        yield case.check("count", "supported", None, "question", span, claim, ids)
    elif case.question.is_unrestricted or _shares_words(case):
        ids = tuple(sorted({n for numbers in known.values() for n in numbers if n}))
        yield case.check("count", "contradicted", "COUNT_WRONG", "question", span, claim, ids)


def _check_others(case: Case) -> Iterator[Check]:
    """Judge the numbers of what has no category (`three buckets`) by captions."""
    for sentence in case.answer_reading.sentences:
        for noun, value, first, last in numbered_nouns(sentence):
            known = case.knowledge.word_counts.get(noun_name(noun))
            if not known or any(m.first <= last <= m.last for m in sentence.mentions):
                continue
            span, claim = sentence.span(first, last), f"{value} {sentence.words[last]}"
            ids = tuple(sorted({n for numbers in known.values() for n in numbers if n}))
            if value > max(known) > 1 and sentence.asserts(first, last):
                yield case.check(
                    "count", "contradicted", "COUNT_TOO_HIGH", "answer", span, claim, ids
                )


def _check_yes_no(case: Case) -> Iterator[Check]:
    """Read `Are there two dogs?` `Yes.` as a sentence; `No.` claims another number."""
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
    value, words = number.least, sentence.words
    if value < 2 and not number.exact and sentence.words[number.first] != "one":
        return
    if not tally.boxes and (case.knowledge.has_boxes or not tally.in_captions):
        return
    vague = sentence.words[number.first] in _VAGUE
    exact = number.exact and not mention.entry.narrow
    if value < 2 and not number.exact and not _counts_all(case, sentence, mention, number):
        return
    fewer = value < max(tally.in_captions, default=0)
    all_of_them = number.exact or (fewer and _counts_all(case, sentence, mention, number))
    verdict: Verdict
    code: str | None
    if not vague and all_of_them and tally.refuted_by_captions(value):
        exact, verdict, code = True, "contradicted", "COUNT_WRONG"
    elif (
        (number.exact and words[number.first] != "both" and tally.is_far_more_than(value))
        or tally.counts_reflections(value)
        or (mention.word in _PERFORMERS and tally.refuted_by_other_words(value))
    ):
        verdict, code = "contradicted", "COUNT_WRONG"
    elif not vague and tally.exceeds_captions(value):
        verdict, code = "contradicted", "COUNT_TOO_HIGH"
    else:
        verdict, code = tally.exactly(value) if exact else tally.at_least(value)
        if vague and verdict == "contradicted":
            verdict, code = "unknown", None  # one box may hold a whole bunch
    span = sentence.span(number.first, mention.last)
    claim = f"{'exactly ' if exact else ''}{value} {mention.word}"
    yield case.check("count", verdict, code, part, span, claim, tally.evidence(value))


def _judge_depicted(
    case: Case, sentence: Sentence, mention: Mention, number: Quantity
) -> Iterator[Check]:
    """Judge `a statue of three women`, which no box counts, by captions."""
    counted = Tally(case, mention.entry, mention.word).in_captions
    votes = sum(len(ids) for ids in counted.values())
    if votes > 1 and number.least > max(counted):
        span, claim = sentence.span(number.first, mention.last), f"{number.least} {mention.word}"
        ids = tuple(sorted({n for ids in counted.values() for n in ids if n}))
        yield case.check("count", "contradicted", "COUNT_TOO_HIGH", "answer", span, claim, ids)


def _counts_all(case: Case, sentence: Sentence, mention: Mention, number: Quantity) -> bool:
    """Return whether a number at the beginning of a sentence, or after `the`, is of all of them.

    It may be of some of them where the clause says which (`in the background`) or where the answer
    speaks of more of them.
    """
    words = sentence.words
    first = number.first
    if words[max(0, first - 3) : first] in (["a", "group", "of"], ["a", "total", "of"]):
        first -= 3
    if first and words[first - 1] in ("the", "these", "all"):
        first -= 1
    elif first > 0 and not _is_agreed(case, mention):
        return False
    if words[number.first + 1] == "of" and words[number.first] not in ("couple", "pair"):
        return False  # `two of the dogs`
    begin, end = sentence.clause(mention.first)
    end = next((i for i in range(mention.last + 1, end) if words[i] in ("and", ",")), end)
    partial = _PARTIAL & set(words[begin:end])
    after = words[mention.last + 1 : end]
    if partial <= _PLACES and _is_where_captions_count(case, mention, after):
        partial = frozenset()
    if partial or (words[mention.last + 1 : mention.last + 2] in (["with"], ["wearing"], ["of"])):
        return False
    others = [
        (where, other)
        for where, other in case.answer_reading.mentions
        if other is not mention and other.entry.categories == mention.entry.categories
    ]
    more = any(
        not _MORE.isdisjoint(where.words[max(0, other.first - 2) : other.first])
        or quantity(where, other) is not None
        for where, other in others
    )
    return not more and not _MORE_ALONE & case.answer_reading.vocabulary


def _is_agreed(case: Case, mention: Mention) -> bool:
    """Return whether captions count as many as are boxed, and none another number."""
    tally = Tally(case, mention.entry, mention.word)
    numbers = tally.in_captions
    boxed = len(tally.boxes)
    return tally.is_countable and set(numbers) == {boxed} and boxed > 1


def _is_where_captions_count(case: Case, mention: Mention, after: Sequence[str]) -> bool:
    """Return whether captions count the things at the place that follows: `sit at the table`."""
    known = case.knowledge
    counting = {
        number
        for name in names_for_counts(mention.entry, mention.word)
        for ids in known.counts.get(name, {}).values()
        for number in ids
    }
    places = [word for word in after if word not in FUNCTION_WORDS]
    return any(counting & set(known.words.get(word, ())) for word in places)


def _is_plural_there(case: Case, tally: "Tally") -> bool:
    """Return whether a caption has several of the word with a word of the question: `watch`."""
    sentence = case.question.sentence
    stems = action_stems()
    asked = {stems[w] for w in sentence.words if w in stems} if sentence else set()
    return any(
        mention.number == "many"
        and noun_name(mention.word) == noun_name(tally.word)
        and not asked.isdisjoint(stems.get(w, "") for w in caption.reading.vocabulary)
        for caption in case.knowledge.captions
        for _, mention in caption.reading.mentions
    )


def _shares_words(case: Case) -> bool:
    """Return whether captions have a word by which the question says which things to count."""
    sentence = case.question.sentence
    if sentence is None:
        return False
    inside = {i for m in case.question.mentions[:1] for i in range(m.first, m.last + 1)}
    content = {
        word
        for i, word in enumerate(sentence.words)
        if i not in inside and word not in FUNCTION_WORDS and word not in _ASKING
    }
    captions = {singular(word) for word in case.knowledge.words}
    known = case.knowledge
    for mention in case.question.mentions[1:]:
        if any(name in known.boxes or name in known.named for name in mention.entry.categories):
            return True
    return any(singular(word) in captions for word in content)


@dataclass(frozen=True)
class Tally:
    """How many of a thing the annotations have."""

    case: Case
    entry: Entry
    word: str

    @lazy
    def boxes(self) -> tuple[Box, ...]:
        """Return every box that may be meant."""
        return self.case.knowledge.boxes_of(self.entry.categories)

    @property
    def is_countable(self) -> bool:
        """Return whether there are boxes, not too many, none of them of a crowd or a bunch."""
        boxes = self.boxes
        few = 0 < len(boxes) <= self.case.config.countable
        single = self.case.knowledge.single  # a bunch is hardly called `a banana`
        return few and not any(
            box.crowd or (box.category in _bunches() and box.category not in single)
            for box in boxes
        )

    @lazy
    def in_captions(self) -> dict[int, tuple[int, ...]]:
        """Return the numbers that captions give for this word, or its category if it is for all."""
        known = self.case.knowledge
        found = dict(known.word_counts.get(noun_name(self.word.rpartition(" ")[2]), {}))
        if not self.entry.narrow:
            for name in names_for_counts(self.entry, self.word):
                for number, ids in known.counts.get(name, {}).items():
                    found[number] = (*found.get(number, ()), *ids)
        only = self.entry.categories[0] if len(self.entry.categories) == 1 else ""
        name = f"word {singular(self.word)}" if self.entry.narrow else only
        if name in known.single and only != "person":
            found.setdefault(1, known.named.get(only, ()))  # captions only have `a laptop`
        return found

    def exactly(self, value: int) -> tuple[Verdict, str | None]:
        """Return what is known of there being this many and no more."""
        if not self.is_countable:
            return ("supported" if self._is_in_captions(value, whole=True) else "unknown"), None
        if value == len(self.boxes):
            return "supported", None
        if value in self.in_captions:
            return "supported", None
        doubtful = self._large <= value <= len(self.boxes) or not self.entry.firm
        doubtful = doubtful or value <= self._single_parts
        doubtful = doubtful or (value < len(self.boxes) and self.is_mirrored)
        if doubtful or self._is_in_captions(value, whole=True):
            return "unknown", None
        return "contradicted", "COUNT_WRONG"

    def is_far_more_than(self, value: int) -> bool:
        """Return whether twice as many are boxed, too many to count, and no caption counts so."""
        many = len(self.boxes) > self.case.config.countable and value * FAR_MORE <= self._large
        return many and not (value in self.in_captions or self._is_in_captions(value))

    def at_least(self, value: int) -> tuple[Verdict, str | None]:
        """Return what is known of there being this many, and perhaps more."""
        if self._is_in_captions(value) or value <= len(self.boxes):
            return "supported", None
        people = self.entry.categories == ("person",)  # `friends`
        if not self.is_countable or not (self.entry.firm or people) or value <= self._single_parts:
            return "unknown", None
        return "contradicted", "COUNT_TOO_HIGH"

    def refuted_by_captions(self, value: int, *, some: bool = False) -> bool:
        """Return whether captions count this word and neither they nor the boxes allow the number.

        Without boxes two captions must agree. `some`: only some of the things are counted, so that
        the number of boxes says nothing.
        """
        numbers = self.in_captions
        several = {number for number in numbers if number > 1} or set(numbers)
        same = value == len(self.boxes) and self.entry.firm and not (some and self.entry.narrow)
        if not several or value in numbers or same:
            return False
        firm = self.entry.firm and not self.entry.narrow
        if self.boxes and firm and self._large <= value <= len(self.boxes):
            return False
        votes = sum(len(numbers[number]) for number in several)
        return bool(self.boxes) or votes > 1

    def refuted_by_other_words(self, value: int) -> bool:
        """Return whether captions count the same things by other words: players as `two women`."""
        if not self.entry.narrow or self.in_captions or value == len(self.boxes):
            return False
        known = self.case.knowledge.counts.get(self.entry.categories[0], {})
        several = {number: ids for number, ids in known.items() if number > 1}
        votes = sum(len(ids) for ids in several.values())
        return len(several) == 1 and votes > 1 and value not in known and value > 1

    def counts_reflections(self, value: int) -> bool:
        """Return whether a mirror's reflection is counted, where all captions name one thing."""
        known, answer = self.case.knowledge, self.case.answer_reading.vocabulary
        return (
            value == len(self.boxes) == 2
            and self.entry.categories[0] in known.single
            and any(word in known.words for word in _MIRRORS)
            and answer.isdisjoint(_MIRRORS)
        )

    def exceeds_captions(self, value: int) -> bool:
        """Return whether captions agree on a smaller number of a kind, or of what has no box."""
        numbers = self.in_captions
        firm = self.entry.firm and not self.entry.narrow
        if not numbers or value <= max(numbers) or (self.boxes and firm):
            return False
        votes = sum(len(ids) for ids in numbers.values())
        # a word for several categories is counted by captions only where most of them do
        if self.entry.narrow and max(numbers) > 1 and value != len(self.boxes):
            return votes > 0
        return votes > (1 if self.entry.firm else 2) and value > self._most

    def evidence(self, value: int) -> tuple[int, ...]:
        """Return the boxes, and the captions with this number."""
        captions = {n for ids in self._captions(value) for n in ids}
        captions.update(self.in_captions.get(value, ()))
        return evidence(self.boxes, captions)

    @property
    def _single_parts(self) -> int:
        """Return the number of single skis, where a box holds a pair."""
        return 2 * len(self.boxes) if self.entry.categories == ("skis",) else 0

    @property
    def _most(self) -> int:
        """Return the number of boxes, where a kind might be all of its category."""
        return 0 if self.entry.narrow or not self.entry.firm else len(self.boxes)

    @property
    def is_mirrored(self) -> bool:
        """Return whether a mirror may have been boxed as a second one."""
        words = self.case.knowledge.words
        return any(w in words or w in self.case.answer_reading.vocabulary for w in _MIRRORS)

    @property
    def _large(self) -> int:
        image = self.case.knowledge.image
        least = self.case.config.tiny * image.width * image.height
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


@cache
def _bunches() -> frozenset[str]:
    """Return the categories of which one box may hold many."""
    return frozenset(wording.load("claims")["bunches"])


_VAGUE: Final = frozenset({"several", "many", "multiple", "various", "numerous", "few"})
_PARTIAL: Final = word_set(
    "background foreground behind left right front others other near beside next closest nearest "
    "them top bottom upper lower side distance edge more on in at under inside outside"
)
_PERFORMERS: Final = word_set("players skiers surfers skaters skateboarders snowboarders")
_PLACES: Final = word_set("on in at under inside outside")
_MORE: Final = word_set("another other more additional second third fourth fifth remaining")
_MORE_ALONE: Final = word_set("others other another second fourth third fifth remaining rest")
_MIRRORS: Final = ("mirror", "mirrors", "reflection", "reflected", "reflections")
_ASKING: Final = word_set("many number standing sitting total visible seen picture image photo")
