"""Saving beside training: what is to be saved is held still at once, and written in a thread."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_sft.checkpoint.store import Checkpoint, CheckpointStore
from vlm_sft.errors import CheckpointError, is_disk_full


@dataclass
class Saver:
    """Saves through a store, in this thread or beside it, one checkpoint at a time.

    A save that fails in the background is told by the next `raise_failure`, `save` or `wait`,
    whichever comes first, and by nothing else: the checkpoints before it stay the newest.

    Args:
        store: Where checkpoints go.
        background: Write in a thread; the training thread only makes the copies.
    """

    store: CheckpointStore
    background: bool = False
    newest: Checkpoint | None = field(default=None, init=False)
    """The newest checkpoint that this saver proved to be complete."""
    _thread: threading.Thread | None = field(default=None, init=False)
    _failure: Exception | None = field(default=None, init=False)
    _step: int = field(default=0, init=False)

    def save(self, position: Mapping[str, Any]) -> None:
        """Begin a save, after the one before it ended.

        Raises:
            CheckpointError: This save cannot begin, or the one before failed.
            OSError: Without `background`, the disk refused.
        """
        self.wait()
        write = self.store.capture(position)
        if not self.background:
            self.newest = write()
            return
        self._step = int(position["step"])
        self._thread = threading.Thread(target=self._write, args=(write,), name="checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed and nobody was told yet."""
        return self._failure is not None

    def wait(self) -> Checkpoint | None:
        """Let the save under way end; the newest complete checkpoint of this saver.

        Raises:
            CheckpointError: It failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(
                f"the checkpoint of step {self._step} could not be saved: {failure}; the ones "
                "before it are untouched and the run goes on from them when started again",
                code="disk_full" if is_disk_full(failure) else "save_failed",
            ) from failure
        return self.newest

    def _write(self, write: Callable[[], Checkpoint]) -> None:
        try:
            self.newest = write()
        except Exception as error:  # nobody sees what a thread raises; `wait` raises it
            self._failure = error
