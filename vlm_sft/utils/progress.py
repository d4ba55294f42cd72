"""A progress bar with an estimate of the time left, for loops that take more than a few seconds."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vlm_sft.utils.console import Console, echo

Item = TypeVar("Item")

DELAY_SECONDS = 2.0
"""Loops shorter than this print nothing."""
FIRST_SECONDS = 3.0
"""On a terminal, the first line of a call that says nothing itself."""
LINE_SECONDS = 10.0
"""Where no terminal is, one plain line about this often."""
MEASURED_SECONDS = 2.0
"""No estimate of the time left before items after the first one have taken this long."""


_live: Progress | None = None
"""The bar of a longer loop around the tracked ones; they appear below it instead of over it."""


@contextmanager
def live_bar(bar: Progress) -> Iterator[None]:
    """Show a bar during the block, with a line for every loop that is tracked meanwhile.

    Its first column has to show `{task.fields[name]}`.
    """
    global _live
    _live = bar
    try:
        with bar:
            yield
    finally:
        _live = None


def track(
    iterable: Iterable[Item],
    total: int | None = None,
    description: str = "working",
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Yield the items of `iterable` unchanged and show on stderr how far the loop is.

    A bar on a terminal, a plain line about every ten seconds otherwise, nothing for loops of under
    two seconds.

    Args:
        iterable: What to go through.
        total: Number of items; None takes `len(iterable)` if it has one, else no estimate is shown.
        description: What is being done, e.g. `reading train.json`.
        clock: Seconds that only grow.
    """
    if total is None:
        total = len(iterable) if isinstance(iterable, Sized) else None
    if _live is not None:
        yield from _below_bar(_live, iterable, total, description, clock)
    elif sys.stderr.isatty():
        yield from _with_bar(iterable, total, description, clock)
    else:
        yield from _with_lines(iterable, total, description, clock)


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Say on stderr every ten seconds that a call still runs, which does not say how far it is.

    On a terminal the first line comes after three seconds.

    Args:
        description: What is being done, e.g. `loading models/vicuna-7b`.
    """
    finished, start = threading.Event(), time.monotonic()
    first = FIRST_SECONDS if sys.stderr.isatty() else LINE_SECONDS

    def say_so() -> None:
        seconds = first
        while not finished.wait(seconds):
            seconds = LINE_SECONDS
            _print(f"{description}: {format_seconds(time.monotonic() - start)} so far")

    thread = threading.Thread(target=say_so, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _with_bar(
    iterable: Iterable[Item], total: int | None, description: str, clock: Callable[[], float]
) -> Iterator[Item]:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
    task = bar.add_task(description, total=total)
    start, started = clock(), False
    try:
        for done, item in enumerate(iterable, start=1):
            yield item
            if not started and clock() - start > DELAY_SECONDS:
                bar.start()
                started = True
            bar.update(task, completed=done)
    finally:
        if started:
            bar.stop()


def _below_bar(
    bar: Progress,
    iterable: Iterable[Item],
    total: int | None,
    description: str,
    clock: Callable[[], float],
) -> Iterator[Item]:
    task, start, first = None, clock(), 0.0
    try:
        for done, item in enumerate(iterable, start=1):
            yield item
            now = clock()
            first = now if done == 1 else first
            if task is None and now - start > DELAY_SECONDS:
                task = bar.add_task("", total=total, name=description)
            if task is not None:
                left = _left(done, total, now - first)
                bar.update(task, completed=done, description=left)
    finally:
        if task is not None:
            bar.remove_task(task)


def _with_lines(
    iterable: Iterable[Item], total: int | None, description: str, clock: Callable[[], float]
) -> Iterator[Item]:
    start = last = first = clock()
    done, shown = 0, False
    for item in iterable:
        yield item
        done += 1
        now = clock()
        first = now if done == 1 else first
        if now - last >= LINE_SECONDS:
            left = _left(done, total, now - first) or f"{format_seconds(now - start)} so far"
            of_total = f" of {total:,} ({done / total:.0%})" if total else ""
            _print(f"{description}: {done:,}{of_total}, {left}")
            last, shown = now, True
    if shown:
        _print(f"{description}: {done:,} done in {format_seconds(clock() - start)}")


def _left(done: int, total: int | None, since_first: float) -> str:
    """Return the time left, or nothing where it cannot be told.

    Args:
        done: Number of items that are done.
        total: Number of all items.
        since_first: Seconds since the first item was done. That one does not count: libraries that
            it imports and files that it opens make it far slower than the others.
    """
    if not total or since_first < MEASURED_SECONDS:
        return ""
    return f"{format_seconds(since_first / (done - 1) * max(total - done, 0))} left"


def format_seconds(seconds: float) -> str:
    """`7 s`, `2 min 05 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_rate(per_second: float) -> str:
    """Return a rate as `1,234.5`; below 1 with two digits that count, as `0.042`."""
    return f"{per_second:,.1f}" if per_second >= 1 else f"{per_second:.2g}"


def _print(line: str) -> None:
    echo(line)
