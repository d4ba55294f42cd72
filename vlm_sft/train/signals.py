"""Signals that ask a run to finish its step, save and leave."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Within the block SIGINT, SIGTERM and SIGUSR1 set `received`; a second one ends at once.

    Outside a process's main thread Python allows no handlers, and none is set.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in WATCHED}
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
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        self.received = signal.Signals(number)
        print(
            f"{self.received.name} received: finishing this step, then saving and leaving "
            "(once more to leave at once)",
            file=sys.stderr,
            flush=True,
        )


def exit_code(received: signal.Signals) -> int:
    """What shells expect of a process that a signal ended: 128 + its number."""
    return 128 + int(received)
