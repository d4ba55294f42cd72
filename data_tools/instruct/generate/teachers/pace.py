"""How fast requests are sent: rates, pauses that the server asks for, waits between attempts."""

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any, Final

from data_tools.instruct.config import TeacherConfig
from data_tools.instruct.generate.teachers.stopping import Stopping
from vlm_sft.errors import UserError

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter

LONGEST_BACKOFF: Final = 60.0
"""Seconds between attempts, at most, where the server names no time."""
_BURST_SECONDS: Final = 3.0
"""What may be sent at once after a rest: the rate of so many seconds."""


class Pace:
    """One server account's pace, shared by all that send to it."""

    def __init__(self, config: TeacherConfig, stopping: Stopping) -> None:
        self._stopping = stopping
        self._requests = _limiter(config.requests_per_minute)
        self._tokens = _limiter(config.tokens_per_minute)
        self._paused_until = 0.0

    async def turn(self, tokens: int) -> None:
        """Wait until a request of so many tokens may be sent.

        Raises:
            Stopped: The run is to end.
        """
        while (left := self._paused_until - asyncio.get_running_loop().time()) > 0:
            await self._stopping.sleep(left)
        if self._requests is not None:
            await self._stopping.unless(self._requests.acquire())
        if self._tokens is not None:
            amount = min(float(tokens), self._tokens.max_rate)
            await self._stopping.unless(self._tokens.acquire(amount))

    def pause(self, seconds: float) -> None:
        """Send nothing for so long."""
        until = asyncio.get_running_loop().time() + seconds
        self._paused_until = max(self._paused_until, until)


def backoff(first: float, attempt: int, seed: int, request: str) -> float:
    """Seconds to wait after the attempt of this number (from 1): doubled each time, half random.

    The random half is a function of its arguments, so that requests that failed together do not
    come back together, and come back the same way each time.
    """
    digest = hashlib.sha256(f"{seed} {request} {attempt}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return float(min(LONGEST_BACKOFF, first * 2 ** (attempt - 1)) * (0.5 + share / 2))


def _limiter(per_minute: int | None) -> "AsyncLimiter | None":
    if per_minute is None:
        return None
    try:
        from aiolimiter import AsyncLimiter
    except ImportError:
        raise UserError(
            "teacher.requests_per_minute and tokens_per_minute need the package aiolimiter: "
            "pip install -e '.[instruct]'"
        ) from None
    burst = max(1.0, per_minute * _BURST_SECONDS / 60)
    values: dict[str, Any] = {"max_rate": burst, "time_period": burst * 60 / per_minute}
    return AsyncLimiter(**values)
