"""Handle the signals that ask a run to save, or to save and stop, at the end of its step."""

import logging
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from vlm_sft.utils.logs import ALL_RANKS

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE_SIGNAL = signal.SIGUSR1


class SignalHandler:
    """Context manager that records SIGINT, SIGTERM (stop) and SIGUSR1 (save and continue).

    A second SIGINT or SIGTERM ends the process at once. Python allows signal handlers in the main
    thread only; in another thread, none are installed.

    Attributes:
        received: The signal that asks to stop, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._save_requested = False
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            signals = (*STOP_SIGNALS, SAVE_SIGNAL)
            self._previous = {s: signal.signal(s, self._handle) for s in signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def take_save_request(self) -> bool:
        """Return whether a save was requested since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader process, which its parent ends
        if number == SAVE_SIGNAL:
            self._save_requested = True
            return
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        self.received = signal.Signals(number)
        logger.info(
            "%s received: finishing this step, then saving and stopping (again to stop at once)",
            self.received.name,
            extra=ALL_RANKS,
        )


def exit_code(received: signal.Signals) -> int:
    """Return the exit code of a process that a signal ended, as shells have it: 128 + number."""
    return 128 + int(received)
