"""How far generation is: counted as answers come in, shown while they do, told at the end."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from data_tools.instruct.generate.teachers.spending import Spending
from data_tools.instruct.schema import Answer
from vlm_sft.utils.console import echo
from vlm_sft.utils.progress import LINE_SECONDS, format_seconds

_REDRAW_SECONDS: Final = 0.5


@dataclass
class Standing:
    """Counts of one start of the command.

    Attributes:
        spending: The run's account, over all starts.
        total: Requests of this process's part.
        before: Those that had their answer, or got it from another process meanwhile.
        answered: Answers of this start.
        failed: Requests whose attempts ended without one.
        silent: Requests about which the rules have nothing to say.
        tokens: In and out, of this start's answers.
        judged: Answers of this start that were held against the annotations at once.
        accepted: Those of them that `verify` will accept.
    """

    spending: Spending
    total: int = 0
    before: int = 0
    answered: int = 0
    failed: int = 0
    silent: int = 0
    tokens: int = 0
    judged: int = 0
    accepted: int = 0
    _start: float = field(default_factory=time.monotonic)

    def take(self, answer: Answer, accepted: bool | None) -> None:
        """Count an answer; `accepted` is None where it was not judged."""
        self.answered += 1
        self.judged += accepted is not None
        self.accepted += accepted is True
        self.tokens += answer.tokens_in + answer.tokens_out

    @property
    def done(self) -> int:
        """Requests that need nothing more in this start."""
        return self.before + self.answered + self.failed + self.silent

    def figures(self) -> str:
        """`120 answered (93% accepted), 2 failed, 14.0/s, 3,300 tokens, $0.42, 3 min left`."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self.before) / elapsed
        rate_told = f" ({self.accepted / self.judged:.0%} accepted)" if self.judged else ""
        parts = [f"{self.answered:,} answered{rate_told}"]
        parts += [f"{self.failed:,} failed"] if self.failed else []
        parts += [f"{rate:,.1f}/s"]
        parts += [f"{self.tokens:,} tokens"] if self.tokens else []
        usd = self.spending.total.usd
        parts += [f"${usd:,.{2 if usd >= 1 else 4}f} in all starts"] if usd else []
        if rate and self.total > self.done:
            parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def summary(self) -> str:
        """The line at the end."""
        missing = self.total - self.before - self.answered - self.silent
        spent = self.spending.total
        parts = [f"{self.before:,} answered before", f"{self.answered:,} now"]
        parts += [f"{missing:,} without an answer ({self.failed:,} failed)"] if missing else []
        parts += [f"{self.silent:,} with nothing to say"] if self.silent else []
        text = f"generate: {self.total:,} requests: {', '.join(parts)}"
        if self.judged:
            text += f"; {self.accepted:,} of {self.judged:,} judged now are accepted"
        if spent.requests:
            text += f"; all starts: {spent.requests:,} sendings, {spent.tokens:,} tokens"
            text += f", ${spent.usd:,.4f}" if spent.usd else ""
        return text


@asynccontextmanager
async def shown(standing: Standing) -> AsyncIterator[None]:
    """Within the block, a bar on a terminal, a plain line now and then elsewhere."""
    show = _bar if sys.stderr.isatty() else _lines
    task = asyncio.create_task(show(standing))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _lines(standing: Standing) -> None:
    while True:
        await asyncio.sleep(LINE_SECONDS)
        share = f"{standing.done:,} of {standing.total:,}"
        echo(f"generate: {share}: {standing.figures()}")


async def _bar(standing: Standing) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from vlm_sft.utils.console import Console

    bar = Progress(
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("", total=None)

        def draw() -> None:
            figures = standing.figures()
            bar.update(task, completed=standing.done, total=standing.total, description=figures)

        try:
            while True:
                draw()
                await asyncio.sleep(_REDRAW_SECONDS)
        finally:
            draw()
