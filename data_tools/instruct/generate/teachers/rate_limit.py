"""Limit how fast requests are sent: rates, `Retry-After`, and waits between attempts.

The retries are our own, not the client's or tenacity's, because the cost of each attempt is
reserved before it is sent, and one `Retry-After` must hold back all requests.
"""

import asyncio
from typing import TYPE_CHECKING, Final

from data_tools.digests import hashed
from data_tools.instruct.config import TeacherConfig
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from vlm_sft.utils.libraries import import_extra

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter

LONGEST_BACKOFF: Final = 60.0
"""Longest wait between attempts, in seconds, without a `Retry-After`."""
_BURST_SECONDS: Final = 3.0
"""After an idle period, the requests of this many seconds may be sent at once."""


class RateLimiter:
    """The rate limits of one server account, shared by all workers."""

    def __init__(self, config: TeacherConfig, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._requests = _limiter(config.requests_per_minute)
        self._tokens = _limiter(config.tokens_per_minute)
        self._paused_until = 0.0

    async def acquire(self, tokens: int) -> None:
        """Wait until a request of `tokens` tokens may be sent.

        Raises:
            Cancelled: The run was asked to stop.
        """
        while (left := self._paused_until - asyncio.get_running_loop().time()) > 0:
            await self._cancellation.sleep(left)
        if self._requests is not None:
            await self._cancellation.wait_for(self._requests.acquire())
        if self._tokens is not None:
            amount = min(float(tokens), self._tokens.max_rate)
            await self._cancellation.wait_for(self._tokens.acquire(amount))

    def pause(self, seconds: float) -> None:
        """Hold back all requests for `seconds`."""
        until = asyncio.get_running_loop().time() + seconds
        self._paused_until = max(self._paused_until, until)


def backoff(first: float, attempt: int, seed: int, request: str) -> float:
    """Return the seconds to wait after an attempt (from 1): doubled each time, half of it random.

    The random half is a function of the arguments: requests that failed together are not retried
    together, and a repeated run waits equally long.
    """
    share = hashed(seed, request, attempt) / 2**64
    return float(min(LONGEST_BACKOFF, first * 2 ** (attempt - 1)) * (0.5 + share / 2))


def _limiter(per_minute: int | None) -> "AsyncLimiter | None":
    if per_minute is None:
        return None
    burst = max(1.0, per_minute * _BURST_SECONDS / 60)
    library = import_extra("aiolimiter", "instruct")
    limiter: AsyncLimiter = library.AsyncLimiter(burst, burst * 60 / per_minute)
    return limiter
