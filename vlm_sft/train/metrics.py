"""What a run says while it goes: `metrics.jsonl`, trackers, and a live line."""

import importlib.util
import json
import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vlm_sft.atomic import write_bytes
from vlm_sft.errors import UserError
from vlm_sft.filesystem import naming, sync
from vlm_sft.libraries import library_call
from vlm_sft.progress import format_seconds

logger = logging.getLogger(__name__)

LINE_SECONDS = 5.0
"""Where no terminal is, one plain line about this often."""


class MetricsFile:
    """Rows of plain values, one JSON object a line, on the disk as soon as they are written.

    Args:
        path: The file; rows of steps after `last_step` are cut off, since a resumed run makes
            them again.
        last_step: The step that the run goes on from; 0 starts the file anew.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self.path = path
        kept = [
            line for line in _whole_lines(path) if int(json.loads(line).get("step", 0)) <= last_step
        ]
        kept = kept if last_step else []
        self.last_seconds = max(
            (json.loads(line).get("seconds", 0.0) for line in kept), default=0.0
        )
        """Training time that the rows kept stand for."""
        write_bytes(path, "".join(kept).encode())

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Put what was written on the disk, where a power cut leaves it."""
        with self.path.open("ab") as file:
            sync(file.fileno(), self.path)


class LiveLine:
    """One line that keeps itself up to date: a bar on a terminal, else plain lines now and then."""

    def __init__(self, total_steps: int, first_step: int, *, enabled: bool) -> None:
        self.total_steps = total_steps
        self._first_step, self._start = first_step, time.monotonic()
        self._last_line = 0.0
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("starting", total=total_steps, completed=first_step)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a training row."""
        if not self._enabled:
            return
        step, now = int(row["step"]), time.monotonic()
        done = step - self._first_step
        left = (now - self._start) / max(1, done) * (self.total_steps - step)
        text = f"{row_text(row)}, {format_seconds(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= LINE_SECONDS or step == self.total_steps:
            print(f"step {step}/{self.total_steps}: {text}", file=sys.stderr, flush=True)
            self._last_line = now

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def row_text(row: Mapping[str, Any]) -> str:
    """Loss, learning rates, speeds and memory of a training row, with units."""
    rates = " ".join(f"{part} {rate:.2e}" for part, rate in row["learning_rate"].items())
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    return (
        f"loss {loss}, lr {rates}, {row['samples_per_second']:.1f} samples/s, "
        f"{row['target_tokens_per_second']:,.0f} trained tokens/s, "
        f"{row['memory_bytes'] / 2**30:.1f} GiB"
    )


class Speed:
    """Samples and supervised tokens a second since the last reading."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._samples = self._targets = 0

    def add(self, samples: int, targets: int) -> None:
        """Count a step's work."""
        self._samples += samples
        self._targets += targets

    def read(self) -> dict[str, float]:
        """The rates, and start again."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rates = {
            "samples_per_second": round(self._samples / seconds, 3),
            "target_tokens_per_second": round(self._targets / seconds, 3),
        }
        self._since, self._samples, self._targets = now, 0, 0
        return rates


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: With the line that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers: {name} is not installed; run `pip install {name}` or take it "
                "off the list"
            )


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any], run_name: str) -> None:
    """Open the trackers named when `accelerator` was made, with the run's configuration."""
    if accelerator.log_with:
        with library_call("accelerate", "train.trackers", "start the trackers"):
            accelerator.init_trackers(run_name, config=flat(config))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as dotted keys with text or numbers, as every tracker takes them."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, (int, float, bool)) else str(value)
    return result


def tracker_values(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under `train/` or `eval/`, for `Accelerator.log`."""
    kind = "eval" if "eval_loss" in row else "train"
    numbers = {k: v for k, v in flat(row).items() if isinstance(v, (int, float)) and k != "step"}
    return {f"{kind}/{key}": float(value) for key, value in numbers.items()}


def _whole_lines(path: Path) -> list[str]:
    """The file's complete lines; a kill may have cut the last one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and line.startswith("{")]
