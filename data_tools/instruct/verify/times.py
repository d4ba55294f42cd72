"""Times on clocks, as digits and as words: contradicted where a caption reads another one."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from data_tools.instruct.schema import Check
from data_tools.instruct.verify.numbers import NUMBERS

if TYPE_CHECKING:
    from data_tools.instruct.verify.case import Case

SLACK: Final = 10
"""Minutes by which two people may read a clock differently."""


def check(case: "Case") -> Iterator[Check]:
    """Yield a finding for each time of day on a clock that captions contradict."""
    known = case.knowledge.times
    if not known:
        return
    answer = case.answer_reading
    for minutes, span in times(answer.text):
        if all(_apart(minutes, other) > SLACK for other, _ in known):
            ids = tuple(number for _, number in known if number)
            text = answer.text[slice(*span)]
            yield case.check("time", "contradicted", "TIME_WRONG", "answer", span, text, ids)


def _apart(one: int, other: int) -> int:
    """Return the minutes between two times on a dial of twelve hours."""
    apart = abs(one - other) % 720
    return min(apart, 720 - apart)


def times(text: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield times as minutes after twelve, with their characters: `8:25`, `a quarter to two`."""
    for match in _DIGITAL.finditer(text):
        yield (int(match[1]) % 12) * 60 + int(match[2]), match.span()
    for match in _SPOKEN.finditer(text):
        hour = _number(match["hour"])
        step = {"half": 30, "quarter": 15}.get(match["step"].lower())
        minutes = step if step is not None else _number(match["step"])
        if hour is None or minutes is None:
            continue
        signed = -minutes if match["side"].lower() in ("to", "before") else minutes
        yield (hour % 12) * 60 + signed, match.span()
    for match in _TWELVE.finditer(text):
        yield 0, match.span()
    for match in _HOUR.finditer(text):
        hour = _number(match[1])
        if hour is not None:
            yield (hour % 12) * 60, match.span()


def _number(word: str) -> int | None:
    return int(word) if word.isdigit() else NUMBERS.get(word.lower())


CLOCK: Final = frozenset({"past", "quarter", "half", "o'clock", "o’clock", "to", "after"})
"""Words of which a time in words has one."""
_DIGITAL: Final = re.compile(r"\b(1[0-2]|0?[1-9]):([0-5]\d)\b")
_SPOKEN: Final = re.compile(
    r"\b(?P<step>half|quarter|twenty-five|\d{1,2}|five|ten|twenty)(?: minutes)? "
    r"(?P<side>past|to|after|before) (?P<hour>\d{1,2}|one|two|three|four|five|six|seven|eight|nine|"
    r"ten|eleven|twelve)\b",
    re.IGNORECASE,
)
_TWELVE: Final = re.compile(r"\b(?:is|shows|reads|exactly) (?:exactly )?(?:noon|midnight)\b")
_HOUR: Final = re.compile(
    r"\b(\d{1,2}|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve) o['’]clock",
    re.IGNORECASE,
)
