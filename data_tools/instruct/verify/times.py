"""Times on clocks: contradicted where a caption reads another one."""

from collections.abc import Iterator
from typing import Final

from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.clock import times

SLACK: Final = 10
"""Minutes by which two people may read a clock differently."""


def check(case: Case) -> Iterator[Check]:
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
