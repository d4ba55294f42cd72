"""What a run will cost, printed before its first step: disk for checkpoints, and time."""

import logging
import math
import time
from pathlib import Path
from typing import Final

from vlm_sft.config.schema import TrainConfig
from vlm_sft.utils.filesystem import free_bytes
from vlm_sft.utils.progress import format_seconds

logger = logging.getLogger(__name__)

MEASURED_STEPS: Final = 3
"""Steps after the first one, from whose time the duration is estimated; the first one is slower."""


def checkpoints_at_once(train: TrainConfig, total_steps: int) -> int:
    """Return how many checkpoints exist at the same time, at most.

    A new one is complete before the oldest one is deleted. `final/` is a hard link to the last one;
    `best/` keeps one that is deleted elsewhere.
    """
    saves = math.ceil(total_steps / train.save_every_steps)
    return min(train.keep_last_checkpoints + 1 + (train.keep_best is not None), saves)


def log_disk(
    output_dir: Path, train: TrainConfig, *, total_steps: int, num_bytes: int, there: int
) -> None:
    """Log where the results go and what disk they need; warn if the disk will not hold them.

    Args:
        output_dir: The run directory.
        train: When checkpoints are saved, and how many are kept.
        total_steps: Optimizer steps of the run.
        num_bytes: Size of a checkpoint.
        there: Checkpoints that exist already.
    """
    count = checkpoints_at_once(train, total_steps)
    needed, free = max(0, count - there) * num_bytes, free_bytes(output_dir)
    kept = "" if free is None else f"; {_size(free)} free"
    logger.info(
        "results: %s (report.html, metrics.jsonl, final/); checkpoints: at most %d of about %s at "
        "once, %s in all%s",
        *(output_dir, count, _size(num_bytes), _size(count * num_bytes), kept),
    )
    if free is not None and free < needed:
        logger.warning(
            "the disk of output_dir will not hold the checkpoints of this run: they need %s more, "
            "and %s are free, so a save will fail; free some space, lower "
            "train.keep_last_checkpoints, or choose another output_dir",
            *(_size(needed), _size(free)),
        )


class DurationNote:
    """Logs how long the run will take, once the first steps are measured.

    Args:
        first_step: Steps that were done before this process started.
        total_steps: Optimizer steps of the run.
    """

    def __init__(self, first_step: int, total_steps: int) -> None:
        self._first_step, self._total_steps = first_step, total_steps
        self._since = 0.0

    def after_step(self, step: int) -> None:
        """Take the time of a finished step."""
        done = step - self._first_step
        if done == 1:
            self._since = time.monotonic()
        elif done == 1 + MEASURED_STEPS and step < self._total_steps:
            seconds = (time.monotonic() - self._since) / MEASURED_STEPS
            left = self._total_steps - step
            logger.info(
                "expected duration: %s for the %s steps that are left, at %.3g s per step as in "
                "the first ones; evaluations and saving come on top",
                *(format_seconds(left * seconds), f"{left:,}", seconds),
            )


def _size(num_bytes: float) -> str:
    if num_bytes < 1e8:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.1f} GB"
