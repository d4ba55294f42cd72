"""What a run says while it goes: `metrics.jsonl`, trackers, and a live line."""

import errno
import importlib.util
import json
import logging
import os
import re
import resource
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vlm_sft.checkpoint.jsonl import read_rows
from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError, code_of
from vlm_sft.utils.atomic_files import write_bytes
from vlm_sft.utils.console import Console, say
from vlm_sft.utils.filesystem import naming, require_writable, sync, warn_once
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.ownership import set_aside
from vlm_sft.utils.progress import format_seconds
from vlm_sft.utils.reading import read_text

logger = logging.getLogger(__name__)

EVALUATED = frozenset({"eval_loss", "eval_error"})
"""Keys of which a row about an evaluation has one."""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _seconds(row: Mapping[str, Any]) -> float:
    seconds = row.get("seconds", 0.0)
    usable = isinstance(seconds, (int, float)) and 0 <= seconds < 1e12
    return float(seconds) if usable else 0.0


class MetricsFile:
    """Rows of plain values, one JSON object a line, on the disk as soon as they are written.

    Args:
        path: The file; rows of steps after `last_step` are cut off, since a resumed run makes
            them again. A file with lines that no run wrote is kept under another name.
        last_step: The step that the run resumes from; 0 starts the file anew.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self.path = path
        found = read_rows(path)
        if found.num_damaged:
            warn_once(
                f"{path}: {found.num_damaged} damaged lines are left out; the file as it was is "
                f"now {set_aside(path)}"
            )
        kept = [row for row in found.rows if row["step"] <= last_step] if last_step else []
        self.last_seconds = max(map(_seconds, kept), default=0.0)
        """Training time that the rows kept stand for."""
        write_bytes(path, "".join(map(_line, kept)).encode())

    def has_evaluation(self, step: int) -> bool:
        """Return whether an evaluation of that step is on file, one that failed included."""
        rows = read_rows(self.path).rows
        return any(row["step"] == step and not row.keys().isdisjoint(EVALUATED) for row in rows)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Put what was written on the disk, where a power cut leaves it."""
        with self.path.open("ab") as file:
            sync(file.fileno(), self.path)


class LiveLine:
    """Show every logged step: in a bar on a terminal, else as a line of its own."""

    def __init__(self, total_steps: int, first_step: int, *, enabled: bool) -> None:
        self.total_steps = total_steps
        self._first_step, self._start = first_step, time.monotonic()
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
        else:
            self.say(f"step {step}/{self.total_steps}: {text}")

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if not self._enabled:
            return
        with suppress(OSError):  # a terminal that is gone does not end the run
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                say(text)


def row_text(row: Mapping[str, Any]) -> str:
    """Loss, learning rates, speeds and memory of a training row, with units."""
    rates = " ".join(f"{part} {rate:.2e}" for part, rate in row["learning_rate"].items())
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    return (
        f"loss {loss}, lr {rates}, {row['samples_per_second']:.1f} samples/s, "
        f"{row['target_tokens_per_second']:,.0f} supervised tokens/s, "
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


def tracking_folder(config: RunConfig) -> Path:
    """Return the folder that trackers write to."""
    folder = config.train.tracking.dir
    return Path(config.output_dir) / "trackers" if folder is None else Path(folder).expanduser()


def require_tracking_folder(config: RunConfig) -> None:
    """Check that trackers, if there are any, can write to their directory.

    Raises:
        UserError: It is a file, or does not accept new files.
    """
    folder = tracking_folder(config)
    if not config.train.trackers:
        return
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", str(folder))
        require_writable(folder)
    except OSError as error:
        raise UserError(
            f"train.tracking.dir: {folder} cannot be written ({error.strerror or error}); give "
            "another directory, or set train.trackers to []",
            code=code_of(error).name,
        ) from None


def tracker_arguments(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return what each tracker is started with besides the project.

    The run's id is kept in its folder, so that a resumed run continues the same wandb run.
    """
    tracking, trackers = config.train.tracking, config.train.trackers
    name = tracking.name or Path(config.output_dir).absolute().name
    arguments: dict[str, dict[str, Any]] = {}
    if "wandb" in trackers:
        arguments["wandb"] = {
            "name": name,
            "entity": tracking.entity,
            "dir": str(tracking_folder(config)),
            "id": _tracking_id(Path(config.output_dir)),
            "resume": "allow",
        }
    if "trackio" in trackers:
        # trackio knows runs by name alone.
        unique = f"{name}-{_tracking_id(Path(config.output_dir))}"
        arguments["trackio"] = {"name": tracking.name or unique, "resume": "allow"}
    return arguments


def _tracking_id(output_dir: Path) -> str:
    """Return the id of the run at its trackers, made at the first start."""
    path = output_dir / "trackers" / "run_id"
    try:
        found = read_text(path, limit=1024).strip()
    except FileNotFoundError:
        found = secrets.token_hex(4)
        write_bytes(path, f"{found}\n".encode())
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found) is None:
        raise UserError(f"{path}: expected the id of the tracked run; delete the file for a new id")
    return found


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Open the trackers named when `accelerator` was made, with the run's configuration."""
    if accelerator.log_with:
        arguments: dict[str, dict[str, Any]] = {}
        if accelerator.is_main_process:
            tracking_folder(config).mkdir(parents=True, exist_ok=True)
            arguments = tracker_arguments(config)
            os.environ.setdefault("TRACKIO_DIR", str(tracking_folder(config).absolute()))
        with library_call("accelerate", "train.trackers", "start the trackers"):
            accelerator.init_trackers(
                config.train.tracking.project,
                config=flat(config.model_dump(mode="json")),
                init_kwargs=arguments,
            )


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
