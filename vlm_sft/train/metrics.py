"""The metrics of a run: `metrics.jsonl`, `samples.jsonl`, trackers and the progress line."""

import hashlib
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator

from vlm_sft.checkpoint.jsonl import read_rows
from vlm_sft.checkpoint.run_dir import SAMPLE_IMAGES
from vlm_sft.train.distributed import rank0_only
from vlm_sft.train.progress_line import ProgressLine
from vlm_sft.train.trackers import AnswerTracker, tracker_values
from vlm_sft.train.train_step import StepGradient
from vlm_sft.train.update import Update
from vlm_sft.train.validation import ValidationResult
from vlm_sft.utils.atomic_files import write_bytes
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.filesystem import naming, sync, warn_once
from vlm_sft.utils.libraries import one_line
from vlm_sft.utils.ownership import set_aside

logger = logging.getLogger(__name__)

EVALUATED = frozenset({"eval_loss", "eval_suite", "eval_error", "text_loss"})
"""Keys of which a row about an evaluation has one."""


class MetricsFile:
    """A JSONL file with one row per event; every row is on the disk as soon as it is written.

    Args:
        path: The file. Rows of steps after `last_step` are removed, since the resumed run writes
            them again. A file with lines that no run wrote is kept under another name.
        last_step: The step that the run resumes from; 0 starts an empty file.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self.path = path
        found = read_rows(path)
        if found.num_damaged:
            warn_once(
                f"{path}: {found.num_damaged} damaged lines are skipped; the original file is now "
                f"{set_aside(path)}"
            )
        rows = [row for row in found.rows if row["step"] <= last_step] if last_step else []
        self.last_found = max((row["step"] for row in found.rows), default=0)
        """The last step that the file had before rows were removed."""
        self.last_seconds = max(map(_seconds, rows), default=0.0)
        """Training time up to `last_step`, in seconds."""
        write_bytes(path, "".join(map(_line, rows)).encode())

    def has_evaluation(self, step: int) -> bool:
        """Return whether the file has a row of that step's evaluation, successful or failed."""
        rows = read_rows(self.path).rows
        return any(row["step"] == step and not row.keys().isdisjoint(EVALUATED) for row in rows)

    def evaluations(self, metric: str) -> list[tuple[int, float | None]]:
        """Return step and metric of every evaluation: `eval_loss`, or a metric of the suite."""
        found = []
        for row in read_rows(self.path).rows:
            if not row.keys().isdisjoint(("eval_loss", "eval_suite")):
                values = {**row.get("eval_suite", {}), "eval_loss": row.get("eval_loss")}
                found.append((row["step"], values.get(metric)))
        return found

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Flush the rows to the disk, where they survive a power cut."""
        with self.path.open("ab") as file:
            sync(file.fileno(), self.path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _seconds(row: Mapping[str, Any]) -> float:
    seconds = row.get("seconds", 0.0)
    usable = isinstance(seconds, (int, float)) and 0 <= seconds < 1e12
    return float(seconds) if usable else 0.0


class RunMetrics:
    """Write every logged step and evaluation to files and trackers, and show it on stderr.

    All ranks call its methods; only rank 0 writes and shows anything.

    Args:
        output_dir: The run directory.
        accelerator: Rank, device and trackers.
        first_step: The step that the run resumes from.
        total_steps: Optimizer steps of the run.
    """

    def __init__(
        self, output_dir: Path, accelerator: Accelerator, *, first_step: int, total_steps: int
    ) -> None:
        main = accelerator.is_main_process
        self._output_dir = output_dir
        self._accelerator = accelerator
        self._file, self._samples = (
            MetricsFile(output_dir / name, last_step=first_step) if main else None
            for name in ("metrics.jsonl", "samples.jsonl")
        )
        if self._file is not None and self._file.last_found > first_step:
            last, path = self._file.last_found, self._file.path
            logger.info(
                f"{path}: steps {first_step + 1} to {last} of an earlier start were not saved in a "
                f"checkpoint; starting from step {first_step}"
            )
        self._progress = ProgressLine(total_steps, first_step, enabled=main)
        earlier = 0.0 if self._file is None else self._file.last_seconds
        self._start = time.monotonic() - earlier
        self._throughput = Throughput()
        self._answers = AnswerTracker(accelerator)
        self._tracker_failed = False

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()

    def count(self, gradient: StepGradient) -> None:
        """Add a step's records and targets to the throughput."""
        self._throughput.add(gradient.num_records, gradient.num_targets)

    def reset_throughput(self) -> None:
        """Start to measure the throughput again, after something that was no training."""
        self._throughput = Throughput()

    def log_step(self, step: int, epoch: float, gradient: StepGradient, update: Update) -> None:
        """Log a training step; throughput is the mean since the last logged one."""
        norm = update.gradient_norm
        row: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 6),
            # JSON has no NaN and no infinity.
            "loss": gradient.loss if math.isfinite(gradient.loss) else None,
            "learning_rate": dict(update.learning_rates),
            "grad_norm": float(norm) if bool(torch.isfinite(norm)) else None,
            **self._throughput.read(),
            "num_targets": gradient.num_targets,
            "memory_bytes": peak_memory_bytes(self._accelerator.device),
            "seconds": round(time.monotonic() - self._start, 3),
        }
        self._write(row)
        self._progress.show(row)

    def show_step(self, step: int) -> None:
        """Show that a step was done which is not logged."""
        self._progress.show_step(step)

    def log_evaluation(
        self,
        step: int,
        epoch: float,
        result: ValidationResult | None,
        suite: Mapping[str, float | None],
        text: tuple[float, int] | None,
    ) -> None:
        """Log the losses, the metrics of the suite, and the generated samples.

        Args:
            step: Steps done.
            epoch: Epochs done.
            result: Loss and samples; None without validation records.
            suite: Metrics by name; empty without a suite.
            text: Loss and number of supervised tokens of the held-out text; None without any.
        """
        row: dict[str, Any] = {"step": step, "epoch": round(epoch, 6)}
        if result is not None:
            row |= {"eval_loss": result.loss, "eval_num_targets": result.num_targets}
        if suite:
            row["eval_suite"] = dict(suite)
        if text is not None:
            row |= {"text_loss": text[0], "text_num_targets": text[1]}
            logger.info("step %d: loss of held-out text %.4f over %s tokens", step, *text)
        self._write(row)
        own = [
            f"{name} {value:.4f}"
            for name, value in suite.items()
            if name.count(".") == 1 and value is not None
        ]  # with the questions' own images
        if own:
            logger.info("step %d: %s", step, ", ".join(own))
        if result is None:
            return
        tokens = f"{result.num_targets:,} tokens"
        logger.info("step %d: validation loss %.4f over %s", step, result.loss, tokens)
        if self._samples is None:
            return
        for row in result.samples:
            images = [self._keep_image(data) for data in row.get("images", ())]
            self._samples.write({"step": step, **row, "images": images})
            question, answer, expected = (
                shortened(row[key].strip(), 200) for key in ("question", "answer", "expected")
            )
            logger.info("  %s: %r -> %r (label: %r)", row["id"], question, answer, expected)
        self._track(lambda: self._answers.log(result.samples, step), step)

    def _keep_image(self, data: bytes) -> str:
        """Write an image of the samples for the report, and return its name."""
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.jpg"
        path = self._output_dir / SAMPLE_IMAGES / name
        if not path.exists():
            write_bytes(path, data)
        return name

    def log_failed_evaluation(self, step: int, error: Exception) -> None:
        """Log that an evaluation failed."""
        reason = one_line(error)
        logger.warning("step %d: the evaluation failed (%s); training continues", step, reason)
        logger.debug("the evaluation of step %d failed", step, exc_info=error)
        if self._file is not None:
            self._file.write({"step": step, "eval_error": reason})

    def has_evaluation(self, step: int) -> bool:
        """Return whether an evaluation of that step was logged."""

        def on_rank0() -> bool:
            assert self._file is not None
            return self._file.has_evaluation(step)

        return rank0_only(self._accelerator, on_rank0)

    def evaluations(self, metric: str) -> list[tuple[int, float | None]]:
        """Return step and metric of every evaluation that was logged, on all ranks."""

        def on_rank0() -> list[tuple[int, float | None]]:
            assert self._file is not None
            return self._file.evaluations(metric)

        return rank0_only(self._accelerator, on_rank0)

    def sync(self) -> None:
        """Flush the files to the disk."""
        for file in (self._file, self._samples):
            if file is not None:
                file.sync()

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(row)
        step = row["step"]
        self._track(lambda: self._accelerator.log(tracker_values(row), step=step), step)

    def _track(self, log: Callable[[], None], step: int) -> None:
        try:
            log()
        except Exception as error:  # a tracker may fail in any way, and none is worth a run
            if not self._tracker_failed:
                logger.warning(
                    "step %d: a tracker failed (%s); training continues, and metrics.jsonl has "
                    "every row",
                    step,
                    one_line(error),
                )
            self._tracker_failed = True


class Throughput:
    """Samples and supervised tokens per second since the last reading."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._samples = self._targets = 0

    def add(self, samples: int, targets: int) -> None:
        """Count a step."""
        self._samples += samples
        self._targets += targets

    def read(self) -> dict[str, float]:
        """Return both rates and start again."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rates = {
            "samples_per_second": round(self._samples / seconds, 3),
            "target_tokens_per_second": round(self._targets / seconds, 3),
        }
        self._since, self._samples, self._targets = now, 0, 0
        return rates


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
