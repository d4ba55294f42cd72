"""The end of a run, seen by everything that waits."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Stopped(Exception):
    """The run is ending; what was about to be sent is not."""


class Stopping:
    """Set once when a run is to end; waits that go through it end then too."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self._event.is_set()

    def request(self) -> None:
        """Have the run end."""
        self._event.set()

    def check(self) -> None:
        """Go no further if the run is to end.

        Raises:
            Stopped: It is.
        """
        if self.requested:
            raise Stopped

    async def sleep(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Stopped: The run is to end.
        """
        await self.unless(asyncio.sleep(seconds))

    async def unless(self, waiting: Coroutine[Any, Any, Any]) -> None:
        """Wait for something.

        Raises:
            Stopped: The run is to end, now or before the wait was over.
        """
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._event.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
