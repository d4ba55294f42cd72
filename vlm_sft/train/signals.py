"""Signals that ask a run to save at the end of its step, and to leave or to go on."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from vlm_sft.utils.console import say

LEAVING = (signal.SIGINT, signal.SIGTERM)
SAVING = signal.SIGUSR1


class StopRequest:
    """Within the block SIGINT and SIGTERM set `received`, and a second one ends at once; SIGUSR1
    sets `save_now`, and the run saves and goes on.

    Outside a process's main thread Python allows no handlers, and none is set.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.save_now = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in (*LEAVING, SAVING)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for watched, handler in self._previous.items():
            signal.signal(watched, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == SAVING:
            self.save_now = True
            return
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        self.received = signal.Signals(number)
        say(
            f"{self.received.name} received: finishing this step, then saving and leaving "
            "(once more to leave at once)"
        )


def exit_code(received: signal.Signals) -> int:
    """What shells expect of a process that a signal ended: 128 + its number."""
    return 128 + int(received)
