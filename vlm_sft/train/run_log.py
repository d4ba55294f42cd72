"""Log the records used and skipped in every step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from vlm_sft.data.batch import Batch, LoadError
from vlm_sft.errors import UserError
from vlm_sft.train.metrics import MetricsFile

logger = logging.getLogger(__name__)


class RunLog:
    """The records that were trained on and those that were excluded.

    Identical on all ranks; rank 0 writes it.

    Args:
        record_ids: The dataset's record ids, by index.
        accelerator: The run's ranks.
        file: `trained.jsonl`, one row per step; None on ranks other than 0.
        max_quarantined: Records that may fail to load before the run stops.
        max_skipped: Updates that may be skipped before the run stops.
        on_quarantine: Called on rank 0 with each record that is excluded.

    Attributes:
        quarantined: The records that could not be loaded and are excluded, by index.
        num_skipped: Number of skipped updates.
    """

    def __init__(
        self,
        record_ids: Sequence[str],
        accelerator: Accelerator,
        file: MetricsFile | None,
        *,
        max_quarantined: int,
        max_skipped: int,
        on_quarantine: Callable[[LoadError], None],
    ) -> None:
        self._record_ids = record_ids
        self._accelerator = accelerator
        self._file = file
        self._max_quarantined, self._max_skipped = max_quarantined, max_skipped
        self._on_quarantine = on_quarantine
        self._pending: list[LoadError] = []
        self.quarantined: dict[int, LoadError] = {}
        self.num_skipped = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's manifest stores of it."""
        errors = [asdict(self.quarantined[index]) for index in sorted(self.quarantined)]
        return {"quarantined": errors, "skipped_steps": self.num_skipped}

    def restore(self, manifest: Mapping[str, Any]) -> None:
        """Restore from a checkpoint: excluded records stay excluded, repaired or not."""
        self.num_skipped = int(manifest.get("skipped_steps", 0))
        self._exclude([LoadError(**values) for values in manifest.get("quarantined", [])])

    def usable(self, indices: Sequence[int]) -> list[int]:
        """Return the given records without the excluded ones."""
        return [index for index in indices if index not in self.quarantined]

    def add_error(self, error: LoadError) -> None:
        """Add a record of the coming step that this rank could not load."""
        self._pending.append(error)

    @property
    def num_errors(self) -> int:
        """Number of records of the coming step that this rank could not load."""
        return len(self._pending)

    def sync_errors(self, num_errors: int) -> None:
        """Exclude on all ranks what any rank could not load.

        Args:
            num_errors: `num_errors` summed over all ranks; without any, nothing is communicated.

        Raises:
            UserError: On every rank, if too many records are excluded.
        """
        if not num_errors:
            return
        own, self._pending = self._pending, []
        errors = gather_object(own) if self._accelerator.num_processes > 1 else own
        self._exclude(errors)
        if len(self.quarantined) > self._max_quarantined:
            raise UserError(
                f"{len(self.quarantined)} records could not be loaded during training, and "
                f"data.max_quarantined is {self._max_quarantined}; the last one: "
                f"{errors[-1].message} - run vlm_sft.check to find all of them",
                code="too_many_broken",
            )

    def require_planned(self, batches: Sequence[Batch], planned: Sequence[Sequence[int]]) -> None:
        """Check that the loaded micro-batches hold the records that the sampler planned.

        Raises:
            RuntimeError: They differ, which is a bug.
        """
        loaded = [list(batch.record_ids) for batch in batches]
        expected = [[self._record_ids[i] for i in self.usable(indices)] for indices in planned]
        if loaded != expected:
            raise RuntimeError(
                f"the loader returned the records {loaded}, but the step's are {expected}; this is "
                "a bug: please report it"
            )

    def log_step(self, step: int, indices: Sequence[int], problem: str | None) -> None:
        """Write the records of a finished step.

        Args:
            step: The step, counted from 1.
            indices: Its records, on all ranks.
            problem: Why its update was skipped, or None.

        Raises:
            UserError: More updates were skipped than `train.max_skipped_steps` allows.
        """
        if problem is not None:
            self._count_skipped(step, problem)
        if self._file is None:
            return
        row: dict[str, Any] = {"step": step}
        row["records"] = [self._record_ids[index] for index in self.usable(indices)]
        if problem is not None:
            row["update_left_out"] = problem
        self._file.write(row)

    def sync_file(self) -> None:
        """Flush `trained.jsonl` to the disk."""
        if self._file is not None:
            self._file.sync()

    def _count_skipped(self, step: int, problem: str) -> None:
        self.num_skipped += 1
        if self.num_skipped > self._max_skipped:
            raise UserError(
                f"step {step}: {problem}; {self._max_skipped} updates were skipped before, as many "
                "as train.max_skipped_steps allows - lower the learning rate, or look at these "
                "records with vlm_sft.show",
                code="too_many_not_finite",
            )
        logger.info("step %d: %s; its update is skipped", step, problem)

    def _exclude(self, errors: Sequence[LoadError]) -> None:
        # Sorted, so that the ledger does not depend on which rank met which error.
        for error in sorted(errors, key=lambda error: error.index):
            if error.index in self.quarantined:
                continue
            self.quarantined[error.index] = error
            if self._accelerator.is_main_process:
                self._on_quarantine(error)
