"""Show the training progress on stderr: a bar on a terminal, else one line per logged step."""

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vlm_sft.utils.console import Console
from vlm_sft.utils.progress import LINE_SECONDS, format_rate, live_bar

logger = logging.getLogger(__name__)


class ProgressLine:
    """Loss, learning rate, throughput, memory and remaining time of the newest logged step.

    Args:
        total_steps: Optimizer steps of the run.
        first_step: Steps that were done before this process started.
        enabled: Whether this rank shows anything.
    """

    def __init__(self, total_steps: int, first_step: int, *, enabled: bool) -> None:
        self._total_steps, self._first_step = total_steps, first_step
        self._start = self._shown = time.monotonic()
        self._newest = ""
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[name]}", markup=False),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                "starting", total=total_steps, completed=first_step, name="step"
            )
        self._shown_bar: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._shown_bar = live_bar(self._bar)
        self._shown_bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown_bar.__exit__(None, None, None)

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row of `metrics.jsonl`."""
        if not self._enabled:
            return
        step = int(row["step"])
        self._shown, self._newest = time.monotonic(), describe_row(row)
        text = f"{self._newest}  ETA {self._eta(step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            logger.info("step %d/%d  %s", step, self._total_steps, text)

    def show_step(self, step: int) -> None:
        """Show a step that has no row: at once in a bar, in a log every ten seconds."""
        if not self._enabled:
            return
        if self._bar is not None:
            text = f"{self._newest}  ETA {self._eta(step)}".strip()
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            logger.info("step %d/%d  ETA %s", step, self._total_steps, self._eta(step))

    def _eta(self, step: int) -> str:
        seconds_per_step = (time.monotonic() - self._start) / max(1, step - self._first_step)
        return format_eta(seconds_per_step * (self._total_steps - step))


def describe_row(row: Mapping[str, Any]) -> str:
    """Return loss, learning rates, throughput and memory of a row of `metrics.jsonl`."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4g}"
    return (
        f"loss {loss}  lr {_learning_rates(row['learning_rate'])}  "
        f"{format_rate(row['samples_per_second'])} samples/s  "
        f"{row['target_tokens_per_second']:,.0f} supervised tok/s  "
        f"{row['memory_bytes'] / 2**30:.1f} GiB"
    )


def _learning_rates(rates: Mapping[str, float]) -> str:
    """Return one rate if all parts share it, else one per part; `1.4e-3`, without leading zeros."""
    shown = {part: f"{rate:.1e}".replace("e-0", "e-") for part, rate in rates.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return " ".join(f"{part} {rate}" for part, rate in shown.items())


def format_eta(seconds: float) -> str:
    """Return a duration as `4:53` (minutes and seconds) or `1:04:53`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
