"""Save checkpoints in a thread while training continues."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.errors import CheckpointError, is_disk_full


@dataclass
class CheckpointSaver:
    """Save through a store, one checkpoint at a time, in this thread or in another.

    A failure in the thread is raised by the next `save` or `wait`. The checkpoints before it stay
    complete and the newest of them is the one to resume from.

    Args:
        store: The store to save through.
        asynchronous: Write in a thread; the training thread then only makes the copies in host
            memory.
    """

    store: CheckpointStore
    asynchronous: bool = False
    newest: Checkpoint | None = field(default=None, init=False)
    """The newest checkpoint that this saver has written and verified."""
    _thread: threading.Thread | None = field(default=None, init=False)
    _failure: Exception | None = field(default=None, init=False)
    _step: int = field(default=0, init=False)

    def save(self, position: Mapping[str, Any]) -> None:
        """Wait for the previous save, then start this one.

        Args:
            position: As `CheckpointStore.save` takes it.

        Raises:
            CheckpointError: This save cannot start, or the previous one failed.
            OSError: Without `asynchronous`, the disk is full or failed.
        """
        # One at a time: a second snapshot would double the host memory, and two threads would
        # prune the same folders.
        self.wait()
        write = self.store.snapshot(position)
        if not self.asynchronous:
            self.newest = write()
            return
        self._step = int(position["step"])
        self._thread = threading.Thread(target=self._write, args=(write,), name="checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save in the thread has failed and the failure has not been raised yet."""
        return self._failure is not None

    def wait(self) -> Checkpoint | None:
        """Wait for the running save; return the newest complete checkpoint of this saver.

        Raises:
            CheckpointError: The save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(
                f"the checkpoint of step {self._step} could not be saved: {failure}; the ones "
                "before it are untouched and the run resumes from them when started again",
                code="disk_full" if is_disk_full(failure) else "save_failed",
            ) from failure
        return self.newest

    def _write(self, write: Callable[[], Checkpoint]) -> None:
        try:
            self.newest = write()
        except Exception as error:  # an exception of a thread is lost; `wait` raises it
            self._failure = error
