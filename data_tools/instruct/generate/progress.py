"""Count, show and summarize the progress of `generate`."""

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
class GenerationProgress:
    """Counts of one start of the command.

    Attributes:
        spending: What the run has spent over all starts.
        name: The beginning of every line.
        total: Requests of this shard.
        before: Requests answered earlier, or by another process in the meantime.
        answered: Requests answered in this start.
        failed: Requests that have no answer after all attempts.
        silent: Requests for which the rules have nothing to say.
        tokens: Input and output tokens of this start.
        judged: Answers of this start that were verified at once.
        accepted: Those of them that passed.
    """

    spending: Spending
    name: str = "generate"
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
        """Count an answer; `accepted` is None if it was not verified."""
        self.answered += 1
        self.judged += accepted is not None
        self.accepted += accepted is True
        self.tokens += answer.tokens_in + answer.tokens_out

    @property
    def done(self) -> int:
        """Requests that are finished in this start."""
        return self.before + self.answered + self.failed + self.silent

    def status(self) -> str:
        """Return a line such as `120 answered (93% accepted), 2 failed, 14.0/s, 3 min left`."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self.before) / elapsed
        acceptance = f" ({self.accepted / self.judged:.0%} accepted)" if self.judged else ""
        parts = [f"{self.answered:,} answered{acceptance}"]
        parts += [f"{self.failed:,} failed"] if self.failed else []
        parts += [f"{rate:,.1f}/s"]
        parts += [f"{self.tokens:,} tokens"] if self.tokens else []
        usd = self.spending.total.usd
        parts += [f"${usd:,.{2 if usd >= 1 else 4}f} in total"] if usd else []
        if rate and self.total > self.done:
            parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def summary(self) -> str:
        """Return the line that is printed at the end."""
        missing = self.total - self.before - self.answered - self.silent
        spent = self.spending.total
        parts = [f"{self.before:,} answered before", f"{self.answered:,} now"]
        parts += [f"{missing:,} without an answer ({self.failed:,} failed)"] if missing else []
        parts += [f"{self.silent:,} with nothing to say"] if self.silent else []
        text = f"{self.name}: {self.total:,} requests: {', '.join(parts)}"
        if self.judged:
            text += f"; {self.accepted:,} of {self.judged:,} verified now are accepted"
        if spent.requests:
            text += f"; all starts: {spent.requests:,} attempts, {spent.tokens:,} tokens"
            text += f", ${spent.usd:,.4f}" if spent.usd else ""
        return text


@asynccontextmanager
async def shown(progress: GenerationProgress) -> AsyncIterator[None]:
    """Show the progress within the block: a bar on a terminal, a line now and then elsewhere."""
    show = _bar if sys.stderr.isatty() else _lines
    task = asyncio.create_task(show(progress))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _lines(progress: GenerationProgress) -> None:
    while True:
        await asyncio.sleep(LINE_SECONDS)
        share = f"{progress.done:,} of {progress.total:,}"
        echo(f"{progress.name}: {share}: {progress.status()}")


async def _bar(progress: GenerationProgress) -> None:
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
            status = progress.status()
            bar.update(task, completed=progress.done, total=progress.total, description=status)

        try:
            while True:
                draw()
                await asyncio.sleep(_REDRAW_SECONDS)
        finally:
            draw()
