"""Record what a run has spent over all of its starts, and keep it within `limits`.

The most that an attempt can cost is recorded before it is sent, and corrected once its cost is
known. If the process is killed in between, the higher figure stays, because the server may have
charged for it. The limits therefore hold whatever happens, as long as the server obeys
`max_tokens`.
"""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from data_tools.instruct.config import LimitsConfig, PricesConfig
from data_tools.instruct.generate.append_only import SharedLog
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from data_tools.instruct.generate.teachers.completions import cost, length_of
from vlm_sft.errors import UserError

MOST_SPENT: Final = 10**15
"""Larger numbers of requests, tokens or dollars are not believed."""
_ROUNDING: Final = 1e-6
"""Rounding error of sums, in US dollars."""


class LimitReached(Exception):
    """The next request might exceed a limit."""


@dataclass(frozen=True)
class Usage:
    """Attempts, input and output tokens, and US dollars (0 if prices are unknown)."""

    requests: int = 0
    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.requests + other.requests, self.tokens + other.tokens, self.usd + other.usd
        )

    def __sub__(self, other: "Usage") -> "Usage":
        return self + Usage(-other.requests, -other.tokens, -other.usd)

    @classmethod
    def of(cls, values: Any) -> Self:
        """Return the usage in a JSON object.

        Raises:
            ValueError: A value is missing, of another type, or impossibly large.
        """
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        found: dict[str, Any] = {name: values.get(name) for name in ("requests", "tokens", "usd")}
        for name, value in found.items():
            is_number = isinstance(value, int | float if name == "usd" else int)
            if not is_number or isinstance(value, bool) or not -MOST_SPENT <= value <= MOST_SPENT:
                raise ValueError(f"{name} is not an amount")
        return cls(found["requests"], found["tokens"], float(found["usd"]))

    def line(self, request: str) -> str:
        """Return a line of the log."""
        values: dict[str, Any] = {"requests": self.requests, "tokens": self.tokens, "usd": self.usd}
        return json.dumps({"request": request[:16], **values})


class Spending:
    """What a run has spent; processes of one run share the file."""

    def __init__(self, path: Path, limits: LimitsConfig, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._log = SharedLog(path, b'{"request": "')
        self._limits = limits
        self._path, self._lines = path, 0
        self._total = Usage()
        self._of: dict[str, Usage] = {}
        self._open = 0
        self._settled = asyncio.Event()
        self._take_in()

    @property
    def total(self) -> Usage:
        """What all starts have spent; attempts in flight count with their largest possible cost."""
        return self._total

    async def reserve(self, request: str, most: Usage) -> None:
        """Wait until the attempt fits within the limits, and record it.

        Raises:
            LimitReached: It does not fit, although nothing of this process is in flight.
            Cancelled: The run was asked to stop.
        """
        while not self.reserve_now(request, most):
            if not self._open:
                raise LimitReached
            self._settled.clear()
            await self._cancellation.wait_for(self._settled.wait())
        self._open += 1

    def settle(self, request: str, reserved: Usage, spent: Usage) -> None:
        """Replace what `reserve` recorded by the actual cost."""
        self.settle_now(request, reserved, spent)
        self._open -= 1
        self._settled.set()

    def settle_now(self, request: str, reserved: Usage, spent: Usage) -> None:
        """Replace what `reserve_now` recorded by the actual cost."""
        if spent != reserved:
            with self._log.locked():
                self._log.append((spent - reserved).line(request))
                self._take_in()

    def close(self) -> None:
        """Sync and close the file."""
        self._log.close()

    def reserve_now(self, request: str, most: Usage) -> bool:
        """Record the attempt if it fits within the limits, and return whether it does."""
        with self._log.locked():
            self._take_in()
            if not self.fits(most):
                return False
            self._log.append(most.line(request))
            self._take_in()
            return True

    def _take_in(self) -> None:
        for line in self._log.news():
            self._lines += 1
            try:
                values = json.loads(line)
                usage, request = Usage.of(values), str(values.get("request"))[:64]
            except (ValueError, RecursionError) as error:
                raise self._edited(f"is not a line of this file ({str(error)[:100]})") from None
            known = self._of.get(request, Usage()) + usage
            if known.requests < 0 or known.tokens < 0 or known.usd < -_ROUNDING:
                raise self._edited("subtracts more than was recorded for its request")
            self._of[request] = known
            self._total += usage

    def _edited(self, what: str) -> UserError:
        return UserError(
            f"{self._path}:{self._lines}: {what}; the file was damaged or edited, so what the run "
            "has spent is unknown and limits cannot be kept. Restore the file, or move it away to "
            "count from zero",
            code="spending_damaged",
        )

    def fits(self, more: Usage) -> bool:
        """Return whether it fits within the limits, as far as this process knows."""
        after, limits = self._total + more, self._limits
        return (
            (limits.requests is None or after.requests <= limits.requests)
            and (limits.tokens is None or after.tokens <= limits.tokens)
            and (limits.usd is None or after.usd <= limits.usd)
        )


def most(body: dict[str, Any], prices: PricesConfig | None) -> Usage:
    """Return the most that one attempt of a request can cost.

    A tokenizer makes at most one token per byte; chat templates add a few per message.
    """
    texts = sum(len(message["content"].encode()) + 16 for message in body["messages"])
    prompt = texts + len(json.dumps(body.get("response_format", ""))) + 64
    return Usage(1, prompt + length_of(body), cost(prompt, 0, length_of(body), prices) or 0.0)
