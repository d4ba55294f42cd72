"""Named places at which a test ends a process, as a power cut or `kill -9` would.

Production code knows nothing of them: a place is the moment before or after a call of a function,
which is patched by its name. To run a command that dies at a place:

    python -m tests.tools.reliability.kill_places checkpoint.renamed:2 vlm_sft.stage1 CONFIG.yaml
"""

import functools
import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

_STORE: Final = "vlm_sft.checkpoint.store:CheckpointStore"
_FOLDERS: Final = "vlm_sft.checkpoint.folders"
_FILES: Final = "vlm_sft.utils.filesystem"
_WRITE: Final = f"{_STORE}._write"
_FINISH: Final = f"{_STORE}.finish"
_SAVE: Final = "vlm_sft.checkpoint.tensor_files:save_tensors"
_REHEARSAL: Final = "vlm_sft.train.preflight:dry_run_save"
_MOVE: Final = f"{_FOLDERS}:move_into_place"


@dataclass(frozen=True)
class Place:
    """The moment before or after a call.

    Attributes:
        function: The function, as `module:name` or `module:Class.method`.
        when: Which of the two moments.
        within: Only calls made while all of these functions run count.
        nth: Which of the calls within one call of those functions.
    """

    function: str
    when: Literal["before", "after"]
    within: tuple[str, ...] = ()
    nth: int | None = None


PLACES: Final[dict[str, Place]] = {
    "rehearsal.begun": Place(f"{_FOLDERS}:write_folder", "before", (_REHEARSAL,)),
    "rehearsal.component": Place(_SAVE, "after", (_REHEARSAL,)),
    "rehearsal.files_synced": Place(f"{_FOLDERS}:sync_tree", "after", (_REHEARSAL,)),
    "rehearsal.manifest": Place("vlm_sft.checkpoint.format:write_manifest", "after", (_REHEARSAL,)),
    "rehearsal.renamed": Place(_MOVE, "after", (_REHEARSAL,)),
    "rehearsal.written": Place(f"{_FOLDERS}:copy_checkpoint", "after", (_REHEARSAL,)),
    "rehearsal.wiped": Place("vlm_sft.train.preflight:_read_and_compare", "before", (_REHEARSAL,)),
    "resume.verified": Place(f"{_STORE}.load", "before"),
    "resume.loaded": Place(f"{_STORE}.load", "after"),
    "step.gradient": Place("vlm_sft.train.train_step:accumulate_gradient", "after"),
    "step.updated": Place("torch.optim.adamw:AdamW.step", "after"),
    "step.recorded": Place("vlm_sft.train.metrics:MetricsFile.write", "after"),
    "checkpoint.captured": Place(f"{_STORE}.snapshot", "after"),
    "checkpoint.begun": Place(f"{_FOLDERS}:begin_temporary", "after", (_WRITE,)),
    "checkpoint.component": Place(_SAVE, "after", (_WRITE,)),
    "checkpoint.files_synced": Place(f"{_FOLDERS}:sync_tree", "after", (_WRITE,)),
    "checkpoint.manifest": Place("vlm_sft.checkpoint.format:write_manifest", "after", (_WRITE,)),
    # There is a second rename only if the first one has moved a folder of the same name away.
    "checkpoint.replaced": Place(f"{_FILES}:rename_folder", "before", (_WRITE, _MOVE), nth=2),
    "checkpoint.renamed": Place(f"{_FILES}:sync_folder", "before", (_WRITE, _MOVE)),
    "checkpoint.folder_synced": Place(f"{_FILES}:sync_folder", "after", (_WRITE, _MOVE)),
    "checkpoint.verified": Place("vlm_sft.checkpoint.format:verify", "after", (_WRITE,)),
    "checkpoint.pruning": Place(f"{_FILES}:rename_folder", "after", (f"{_FOLDERS}:remove",)),
    "checkpoint.pruned": Place(f"{_STORE}._prune", "after"),
    "final.copied": Place(_MOVE, "before", (_FINISH,)),
    "final.renamed": Place(_MOVE, "after", (_FINISH,)),
    "final.verified": Place(_FINISH, "after"),
}
"""The places, in the order in which a run reaches them."""


@contextmanager
def interrupted(name: str, act: Callable[[], object], *, count: int = 1) -> Iterator[None]:
    """Call `act` when a place is reached for the `count`-th time; remove the patches at the end."""
    place = PLACES[name]
    active, calls, reached = 0, 0, 0

    def entered(call: Callable[[], Any]) -> Any:
        nonlocal active, calls
        active += 1
        calls = 0
        try:
            return call()
        finally:
            active -= 1

    def reach() -> None:
        nonlocal calls, reached
        if active < len(place.within):
            return
        calls += 1
        if place.nth in (None, calls):
            reached += 1
            if reached == count:
                act()

    def called(call: Callable[[], Any]) -> Any:
        if place.when == "before":
            reach()
        result = call()
        if place.when == "after":
            reach()
        return result

    undo = [_patch(place.function, called)]
    undo += [_patch(function, entered) for function in place.within]
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


_until_exit = ExitStack()
"""Holds the patches of `kill_at`, which stay until the process ends."""


def kill_at(name: str, count: int = 1) -> None:
    """Let this process kill itself when it reaches a place for the `count`-th time."""
    _until_exit.enter_context(
        interrupted(name, lambda: os.kill(os.getpid(), signal.SIGKILL), count=count)
    )


def _patch(function: str, around: Callable[[Callable[[], Any]], Any]) -> Callable[[], None]:
    """Wrap a function wherever it is bound, and return the function that undoes this.

    `from module import function` binds a function in more than one module. A module that is
    imported later gets the wrapped one.
    """
    module, _, qualified = function.partition(":")
    *owner, attribute = qualified.split(".")
    home: Any = importlib.import_module(module)
    for part in owner:
        home = getattr(home, part)
    original = getattr(home, attribute)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        return around(lambda: original(*arguments, **named))

    bound = [home]
    if not owner:
        ours = [m for key, m in sys.modules.items() if key.startswith(("vlm_sft", "tests"))]
        bound = [m for m in ours if getattr(m, attribute, None) is original]
    for each in bound:
        setattr(each, attribute, wrapper)

    def undo() -> None:
        for each in bound:
            setattr(each, attribute, original)

    return undo


if __name__ == "__main__":
    chosen, _, number = sys.argv[1].partition(":")
    kill_at(chosen, int(number or 1))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
