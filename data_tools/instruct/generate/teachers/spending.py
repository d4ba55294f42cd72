"""What a run has sent and spent over all of its starts, and the caps on it.

Every sending is written down at the most it can cost before it is sent, and corrected when its cost
is known. A process that is killed in between leaves the higher figure: a server may have charged
for it. So no cap is passed, whatever happens, as long as the server keeps to `max_tokens`.
"""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from data_tools.instruct.config import LimitsConfig, PricesConfig
from data_tools.instruct.generate.append_only import SharedLog
from data_tools.instruct.generate.teachers.stopping import Stopping
from data_tools.instruct.generate.teachers.wire import cost, length_of
from vlm_sft.errors import UserError

MOST_SPENT: Final = 10**15
"""Above every number of requests, tokens or dollars of a run."""
_ROUNDING: Final = 1e-6
"""US dollars by which sums of parts may differ."""


class LimitReached(Exception):
    """The next request might pass a cap."""


@dataclass(frozen=True)
class Usage:
    """Sendings, tokens in and out, US dollars (0 where prices are unknown)."""

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
        """Return what a file's object says.

        Raises:
            ValueError: A value is missing, of another type, or beyond what can be spent.
        """
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        found: dict[str, Any] = {name: values.get(name) for name in ("requests", "tokens", "usd")}
        for name, value in found.items():
            is_number = isinstance(value, int | float if name == "usd" else int)
            if not is_number or isinstance(value, bool) or not -MOST_SPENT <= value <= MOST_SPENT:
                raise ValueError(f"{name} is no amount")
        return cls(found["requests"], found["tokens"], float(found["usd"]))

    def line(self, request: str) -> str:
        """One line of the log."""
        values: dict[str, Any] = {"requests": self.requests, "tokens": self.tokens, "usd": self.usd}
        return json.dumps({"request": request[:16], **values})


class Spending:
    """The run's account; processes of one run share it."""

    def __init__(self, path: Path, limits: LimitsConfig, stopping: Stopping) -> None:
        self._stopping = stopping
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
        """What all starts have spent, what is in flight at the most it can cost."""
        return self._total

    async def reserve(self, request: str, most: Usage) -> None:
        """Wait until the sending fits below the caps, and write it down.

        Raises:
            LimitReached: It does not, though nothing of this process is in flight any more.
            Stopped: The run is to end.
        """
        while not self.reserve_now(request, most):
            if not self._open:
                raise LimitReached
            self._settled.clear()
            await self._stopping.unless(self._settled.wait())
        self._open += 1

    def settle(self, request: str, reserved: Usage, spent: Usage) -> None:
        """Correct what `reserve` wrote down by what it came to."""
        self.settle_now(request, reserved, spent)
        self._open -= 1
        self._settled.set()

    def settle_now(self, request: str, reserved: Usage, spent: Usage) -> None:
        """Correct what `reserve_now` wrote down by what it came to."""
        if spent != reserved:
            with self._log.locked():
                self._log.append((spent - reserved).line(request))
                self._take_in()

    def close(self) -> None:
        """Put the account on the disk."""
        self._log.close()

    def reserve_now(self, request: str, most: Usage) -> bool:
        """Write the sending down if it fits below the caps; whether it does."""
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
                raise self._edited(f"is no line of this file ({str(error)[:100]})") from None
            known = self._of.get(request, Usage()) + usage
            if known.requests < 0 or known.tokens < 0 or known.usd < -_ROUNDING:
                raise self._edited("takes back more than its request was counted with")
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
        """Whether the caps have room for it, as far as this process knows."""
        after, limits = self._total + more, self._limits
        return (
            (limits.requests is None or after.requests <= limits.requests)
            and (limits.tokens is None or after.tokens <= limits.tokens)
            and (limits.usd is None or after.usd <= limits.usd)
        )


def most(body: dict[str, Any], prices: PricesConfig | None) -> Usage:
    """The most that one sending of a request can take.

    No tokenizer makes more tokens of a text than it has bytes; chat templates add a few a message.
    """
    texts = sum(len(message["content"].encode()) + 16 for message in body["messages"])
    prompt = texts + len(json.dumps(body.get("response_format", ""))) + 64
    return Usage(1, prompt + length_of(body), cost(prompt, 0, length_of(body), prices) or 0.0)
