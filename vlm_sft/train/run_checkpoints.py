"""Save and restore a run on the ranks that hold its weights."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator

from vlm_sft.checkpoint.async_save import CheckpointSaver
from vlm_sft.checkpoint.digests import frozen_digests
from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.store import CheckpointStore, require_within
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import rank0_only
from vlm_sft.train.preflight import dry_run_save, require_unchanged
from vlm_sft.utils.process_group import Value

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """The checkpoints of a run that is being trained.

    Rank 0 saves. If the weights are sharded, every rank saves its own rows; all ranks call the
    methods in either case.

    Args:
        store: Where checkpoints are saved.
        model: The model, whose frozen parts must not change.
        accelerator: The run's ranks.
        sharded: Whether the weights are sharded over the ranks.
        asynchronous: Write checkpoints in a thread while training continues.

    Attributes:
        resumed_from: The checkpoint that the run was resumed from, or None.
        saved_step: The newest step that was saved; a save may still be under way.
        sharded: Whether the weights are sharded over the ranks.
    """

    def __init__(
        self,
        store: CheckpointStore,
        model: VisionLanguageModel,
        accelerator: Accelerator,
        *,
        sharded: bool,
        asynchronous: bool,
    ) -> None:
        self._store = store
        self._model = model
        self._frozen: dict[str, str] = {}
        self._accelerator = accelerator
        self._saver = CheckpointSaver(store, asynchronous=asynchronous)
        self._saved_at = time.monotonic()
        self.sharded = sharded
        self.resumed_from: Checkpoint | None = None
        self.saved_step = 0

    def restore(self, total_steps: int) -> Checkpoint | None:
        """Load the newest complete checkpoint; in a new run, do a dry run of saving instead.

        Returns:
            The checkpoint; None in a new run.

        Raises:
            CheckpointError: All checkpoints are damaged, the newest is of another run, or the dry
                run failed.
            ConfigError: The newest checkpoint is beyond the last step.
            UserError: The frozen parts are not those that the run was started with.
        """
        checkpoint = rank0_only(self._accelerator, self._store.newest)
        if checkpoint is None:
            store, trainable = self._store, list(self._store.trainable.items())
            self._on_saving_ranks(
                lambda: dry_run_save(store.output_dir, store.components, trainable, store.group)
            )
            self._frozen = frozen_digests(self._model)
            return None
        self._store.load(checkpoint)
        require_within(checkpoint, total_steps)
        self._frozen = dict(checkpoint.manifest["frozen"])
        require_unchanged(self._frozen, frozen_digests(self._model))
        self.resumed_from, self.saved_step = checkpoint, checkpoint.step
        logger.info("resuming from %s (step %d)", checkpoint.folder, checkpoint.step)
        return checkpoint

    def save(self, position: Mapping[str, Any]) -> None:
        """Start to save the state of `position["step"]`; wait for the previous save first.

        Raises:
            CheckpointError: This save cannot start, or the previous one failed.
            OSError: The disk failed and saving is not asynchronous.
        """
        manifest = {**position, "frozen": self._frozen}
        self._on_saving_ranks(lambda: self._saver.save(manifest))
        self.saved_step, self._saved_at = int(position["step"]), time.monotonic()

    @property
    def failed(self) -> bool:
        """Whether an asynchronous save of this rank has failed; `wait` raises the error."""
        return self._saver.failed

    def minutes_since_save(self) -> float:
        """Return the minutes since the last save, or since the start."""
        return (time.monotonic() - self._saved_at) / 60

    def wait(self) -> Checkpoint | None:
        """Wait for the save that is under way; return the newest checkpoint, resumed or saved.

        Raises:
            CheckpointError: The save failed.
        """
        return self._on_saving_ranks(self._saver.wait) or self.resumed_from

    def keep_best(self) -> Checkpoint:
        """Copy the newest checkpoint, which is the best so far, to `best/`.

        Raises:
            CheckpointError: It could not be saved or copied.
        """
        checkpoint = self.wait()
        assert checkpoint is not None
        return rank0_only(self._accelerator, lambda: self._store.keep_best(checkpoint))

    def finish(self, last: Checkpoint) -> Checkpoint:
        """Check that the frozen parts were not changed, then copy the last checkpoint to `final/`.

        Raises:
            UserError: A frozen part was changed.
        """
        require_unchanged(self._frozen, frozen_digests(self._model))
        return rank0_only(self._accelerator, lambda: self._store.finish(last))

    def _on_saving_ranks(self, action: Callable[[], Value]) -> Value:
        return action() if self.sharded else rank0_only(self._accelerator, action)
