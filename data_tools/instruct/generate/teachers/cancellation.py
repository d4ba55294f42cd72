"""Cancel a run: whatever waits stops waiting, and nothing more is sent."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Cancelled(Exception):
    """The run was canceled; what was about to be sent was not sent."""


class Cancellation:
    """A flag that is set once; waits that go through it end when it is set."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self._event.is_set()

    def request(self) -> None:
        """Ask the run to stop."""
        self._event.set()

    def check(self) -> None:
        """Raise if the run was asked to stop.

        Raises:
            Cancelled: It was.
        """
        if self.requested:
            raise Cancelled

    async def sleep(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Cancelled: The run was asked to stop.
        """
        await self.wait_for(asyncio.sleep(seconds))

    async def wait_for(self, waiting: Coroutine[Any, Any, Any]) -> None:
        """Await `waiting`, or stop waiting when the run is asked to stop.

        Raises:
            Cancelled: The run was asked to stop before the wait was over.
        """
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._event.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
