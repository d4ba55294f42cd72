"""How many of a thing a text says there are."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from data_tools import wording
from data_tools.instruct.verify.flags import NUMBER
from data_tools.instruct.verify.grammar import (
    is_plural,
    last_of_phrase,
    word_set,
)
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence

_WORDS: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
NUMBERS: Final = {word: value for value, word in enumerate(_WORDS.split())} | {
    "dozen": 12, "single": 1, "lone": 1, "solitary": 1,
    "both": 2, "couple": 2, "pair": 2, "trio": 3, "duo": 2,
}  # fmt: skip
"""Words for numbers."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """`two dogs`: `least` 2; `exact` where no more can be meant (`only two`, `there are two`)."""

    least: int
    exact: bool
    first: int


def quantity(sentence: Sentence, mention: Mention) -> Quantity | None:
    """Return the number before a thing, `two large brown dogs`; None where there is none.

    Measures do not count the thing (`two bunches of bananas`), and word and number must agree
    (`two traffic sign` says nothing of traffic).
    """
    if not sentence.bits & NUMBER:
        return None
    words = sentence.words
    if mention.number == "one" and mention.first:
        nth = _ordinal(words, mention.first)
        if nth is not None:
            return nth
    steps = 0
    index = mention.first - 1
    while index >= 0 and steps < 4:
        word = words[index]
        value = number_of(word)
        if value is not None:
            return _agreed(sentence, mention, index, value)
        if word == "of" and index > 0 and words[index - 1] in ("couple", "pair", "trio", "dozen"):
            return _agreed(sentence, mention, index - 1, NUMBERS[words[index - 1]])
        if word in ("of", "the") and _is_partitive(words[max(0, index - 2) : index + 1]):
            index -= 1
            continue
        if (
            word == "and"
            and index > 1
            and words[index - 1] in _colors()
            and words[index + 1] in _colors()
        ):
            index -= 1
            continue  # `two black and white cats`
        if not _is_adjective(word, words[index - 1] if index else ""):
            return _several(word, mention, index)
        if any(other.first <= index <= other.last for other in sentence.mentions):
            return None
        index -= 1
        steps += 1
    return None


def _ordinal(words: Sequence[str], first: int) -> Quantity | None:
    """Return the least number of things where one of them is called the second or another one."""
    for index in range(first - 1, max(first - 4, -1), -1):
        least = _ORDINALS.get(words[index])
        if least is not None:
            free = words[max(0, index - 1) : index] in (["a"], ["the"], []) or least == 2
            return Quantity(least, False, index) if free else None
        if not _is_adjective(words[index], ""):
            return None
    return None


def numbered_nouns(sentence: Sentence) -> Iterator[tuple[str, int, int, int]]:
    """Yield every noun with a number before it: `two large buckets`.

    As written, with the number, and the indices of the number and of the noun.
    """
    words = sentence.words
    for index in sentence.hits(NUMBER):
        word = words[index]
        number = NUMBERS.get(word) if not word[0].isdigit() else number_of(word)
        if number is None:
            continue
        start = index + 1
        if words[start : start + 1] == ["of"]:
            start += 2 if words[start + 1 : start + 2] == ["the"] else 1
        last = last_of_phrase(words, start, len(words))
        if last >= start and (number == 1 or is_plural(words[last])):
            yield words[last], number, index, last


def number_of(word: str) -> int | None:
    """Return the number that `2` or `two` stands for; None for other words."""
    known = _COUNTING.get(word)
    if known is not None or not word[:1].isdigit():
        return known
    return int(word) if _DIGITS.fullmatch(word) else None


def _agreed(sentence: Sentence, mention: Mention, index: int, value: int) -> Quantity | None:
    if mention.number == ("many" if value == 1 else "one"):
        return None
    words = sentence.words
    before = words[index - 1] if index else ""
    if before in ("number", "no", "than", "over", "nearly", "almost", "about") or (
        before in ("one", "two", "three") or before.isdigit()
    ):
        return None
    exact = (
        words[index] in ("single", "lone", "solitary", "both")
        or before in ("only", "exactly", "just", "precisely")
        or _is_total(sentence, index, mention.last)
    )
    return Quantity(value, exact, index)


def _is_total(sentence: Sentence, index: int, last: int) -> bool:
    """Return whether it counts all: `There are two dogs (in the image).`"""
    words = sentence.words
    before = words[max(0, index - 4) : index]
    if not (_THERE & set(before) and not _NOT_TOTAL & set(words[:index])):
        return False
    _, end = sentence.clause(last)
    rest = words[last + 1 : end]
    goes_on = end < len(words) and words[end] in ("and", ",") and _has_same(sentence, end)
    return all(word in _FRAME for word in rest) and not goes_on


def _has_same(sentence: Sentence, after: int) -> bool:
    """Return whether another number follows: `two dogs and one more on the left`."""
    return any(number_of(word) is not None or word in _MORE for word in sentence.words[after:])


def _several(word: str, mention: Mention, index: int) -> Quantity | None:
    if word in AT_LEAST_TWO and mention.number != "one":
        return Quantity(2, False, index)
    return None


def _is_partitive(words: Sequence[str]) -> bool:
    """Return whether it counts some of them: `two of the dogs`."""
    return (
        len(words) == 3 and list(words[1:]) == ["of", "the"] and number_of(words[0]) is not None
    ) or (len(words) >= 2 and words[-1] == "of" and number_of(words[-2]) is not None)


def _is_adjective(word: str, before: str) -> bool:
    """Return whether the word may stand between a number and its noun."""
    if word in _NOT_ADJECTIVES or not word[0].isalpha():
        return False
    if word.endswith("ing"):
        return number_of(before) is not None
    return not (word.endswith("s") and not word.endswith("ss"))


@cache
def _colors() -> frozenset[str]:
    return frozenset(wording.load("claims")["colours"])


_COUNTING: Final = {
    word: value for word, value in NUMBERS.items() if word not in ("couple", "pair", "trio", "duo")
}
_DIGITS: Final = re.compile(r"\d{1,3}")
_ORDINALS: Final = {"second": 2, "third": 3, "fourth": 4}
ORDINALS: Final = frozenset(_ORDINALS)
AT_LEAST_TWO: Final = frozenset({"several", "many", "multiple", "various", "numerous", "few"})
_NOT_ADJECTIVES: Final = word_set(
    "a an the of in on at to with by from near is are was were be been has have had and or that "
    "which who it its his her their this these those for as some any no not about over under i we "
    "you there into while up down out off along across around behind between through toward "
    "towards against before after during without within holds ride sit stand wear hold several "
    "many multiple various numerous few women men people"
)
_THERE: Final = word_set("there shows show contains contain includes include see features")
_NOT_TOTAL: Final = word_set("on in near behind at to left right foreground background")
_FRAME: Final = word_set(
    "in the this picture image photo photograph scene view frame visible shown here present that "
    "can be seen total altogether are is all"
)
_MORE: Final = word_set("another more other others one")
