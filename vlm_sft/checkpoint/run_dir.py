"""The directory of a run: locked by one process, under one configuration from start to end."""

import functools
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final

from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.config.resume import Change, changes_between, require_allowed
from vlm_sft.config.schema import RunConfig, dump_config, load_stored_config
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.atomic_files import is_stream, write_text
from vlm_sft.utils.console import echo
from vlm_sft.utils.filesystem import lock
from vlm_sft.utils.ownership import (
    TRAINING_RUN,
    is_run,
    own_directory,
    require_directory,
    set_aside,
)
from vlm_sft.utils.reading import open_regular, read_json, require_regular

_LOCK_CONTENT: Final = re.compile(r"process \d+ on .* since \S+")
_MAX_LOCK_CHARACTERS: Final = 1000

_locks: set[int] = set()
"""File descriptors of the locks that this process holds."""


EXPORT_OUTLOOK: Final = "export_outlook.json"
"""Name of the file that records whether the model can be exported; the report shows it."""

STARTS: Final = "starts.jsonl"
"""Name of the file with the starts of the run (`train/run_history.py`)."""

SAMPLE_IMAGES: Final = "sample_images"
"""Name of the directory with the images of `samples.jsonl`, by their digest."""

PACKING_STATS: Final = "packing.json"
"""How full the rows of a packed run are, and what shared prefixes save."""
CACHE_ESTIMATE: Final = "feature_cache.json"
"""What the feature cache of a run costs and saves."""

WRITTEN: Final = frozenset(
    {
        ".lock",
        "activation_checkpointing.json",
        "best",
        "checkpoints",
        "config.yaml",
        EXPORT_OUTLOOK,
        CACHE_ESTIMATE,
        "final",
        "ledger.jsonl",
        "ledger_eval.jsonl",
        "ledger_text.jsonl",
        "metrics.jsonl",
        PACKING_STATS,
        "parts.json",
        "report.html",
        SAMPLE_IMAGES,
        "samples.jsonl",
        STARTS,
        "trackers",
        "trained.jsonl",
    }
)
"""Names that a run writes in its directory; other files there belong to the user."""


def own_run_dir(config: RunConfig) -> None:
    """Create and mark the run's directory, or accept that of an earlier start.

    Raises:
        UserError: As `require_run_dir`; nothing was changed.
    """
    require_run_dir(config)
    own_directory(
        config.output_dir,
        TRAINING_RUN,
        adopt=_is_unmarked_run(Path(config.output_dir)),
        setting="output_dir",
    )


def require_run_dir(config: RunConfig) -> None:
    """Check that `output_dir` is new, empty, or the directory of a run; nothing is changed.

    Raises:
        UserError: It holds something else, the name of one of the run's files belongs to a pipe or
            device, or the run would replace one of its inputs.
    """
    output_dir, inputs = Path(config.output_dir), config.input_paths()
    require_directory(
        output_dir,
        TRAINING_RUN,
        inputs=inputs,
        adopt=_is_unmarked_run(Path(config.output_dir)),
        setting="output_dir",
    )
    written = {Path(os.path.realpath(output_dir / name)) for name in WRITTEN}
    for source in inputs:
        place = Path(os.path.realpath(source))
        if not written.isdisjoint((place, *place.parents)):
            raise UserError(
                f"output_dir {output_dir}: the run would replace {source}, which it reads; choose "
                "another output_dir",
                code="not_ours",
            )
    for name in sorted(WRITTEN):
        if (output_dir / name).exists() and is_stream(output_dir / name):
            require_regular(output_dir / name)
    checkpoints = output_dir / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise UserError(
            f"{checkpoints}: is not a directory, but the run keeps its checkpoints under this "
            "name; rename that file, or choose another output_dir",
            code="not_ours",
        )


def _is_unmarked_run(folder: Path) -> bool:
    """Return whether a directory is a run of a version that wrote no markers."""
    return (folder / "config.yaml").is_file() and is_run(folder)


@contextmanager
def locked(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Lock the run's directory against a second run during the block.

    The lock belongs to the open file, so the operating system releases it when the run is killed.
    Where the file system has no locks, a warning is printed and the run starts.

    Args:
        output_dir: The run's directory.
        enabled: Whether to lock at all; with several ranks, rank 0 holds the lock.

    Raises:
        UserError: Another process holds the lock (with its number, host and start time), or `.lock`
            is a file that no run wrote.
    """
    if not enabled:
        yield
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with _open_lock(output_dir / ".lock", create=True) as file:
        if lock(file.fileno(), Path(file.name), wait=False) == "held_elsewhere":
            raise _in_use(output_dir, file)
        _require_own_lock(file)
        file.seek(0)
        file.truncate()
        began = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {began}")
        file.flush()
        _close_locks_in_forks()
        _locks.add(file.fileno())
        try:
            yield
        finally:
            _locks.discard(file.fileno())


@functools.cache
def _close_locks_in_forks() -> None:
    """Let forked processes close their copies of the locks.

    Otherwise a data-loader worker that outlives a killed run would keep the directory locked.
    """

    def close_locks() -> None:
        for descriptor in _locks:
            os.close(descriptor)  # the parent's own descriptor keeps the lock
        _locks.clear()

    os.register_at_fork(after_in_child=close_locks)


def set_foreign_files_aside(output_dir: Path) -> None:
    """Rename files that the run is about to replace but that no run wrote as they are.

    JSONL files such as `metrics.jsonl` are handled where they are opened.
    """
    for name, is_ours in _CONTENT.items():
        path = output_dir / name
        if os.path.lexists(path) and not _is_empty(path) and not is_ours(path):
            kept = set_aside(path)
            echo(
                f"warning: {path} was not written by a run, or was edited or damaged; it is now "
                f"{kept}"
            )


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _is_ledger(path: Path) -> bool:
    if not path.is_file():
        return False
    with open_regular(path) as file:
        head = file.readline()
        return head.startswith(b'{"total": ') and all(map(_is_entry, file))


def _is_entry(line: bytes) -> bool:
    return line.startswith(b'{"id": ')


def _has_keys(*keys: str) -> Callable[[Path], bool]:
    """Return a predicate for files that hold JSON objects with these keys."""

    def test(path: Path) -> bool:
        try:
            found = read_json(path)
        except (OSError, UserError):
            return False
        rows = found if isinstance(found, list) else [found]
        return all(isinstance(row, dict) and row.keys() >= set(keys) for row in rows)

    return test


_CONTENT: Final[dict[str, Callable[[Path], bool]]] = {
    "activation_checkpointing.json": _has_keys("policy", "trials", "basis"),
    EXPORT_OUTLOOK: _has_keys("hf"),
    CACHE_ESTIMATE: _has_keys("tower_share", "saved"),
    "ledger.jsonl": _is_ledger,
    "ledger_eval.jsonl": _is_ledger,
    "ledger_text.jsonl": _is_ledger,
    PACKING_STATS: _has_keys("rows_per_step", "saved"),
    "parts.json": _has_keys("part"),
}
"""Files that a run replaces as a whole, each with a predicate for what a run writes."""


def store_config(
    config: RunConfig, *, has_checkpoints: bool, allowed: Sequence[str] = ()
) -> list[Change]:
    """Write `config.yaml`, unless the directory holds a run under another configuration.

    A file with the same settings stays as it is, including its comments. A file with other settings
    that no run wrote is kept under another name.

    Args:
        config: The configuration of this start.
        has_checkpoints: Whether the directory holds a run to resume.
        allowed: Settings that the user allows to change (see `vlm_sft.config.resume`).

    Returns:
        The changed settings, all of which the user allowed.

    Raises:
        ConfigError: The run to resume has other settings; every difference is shown.
    """
    granted = require_same_config(config, has_checkpoints=has_checkpoints, allowed=allowed)
    path = Path(config.output_dir) / "config.yaml"
    stored = _normalized(path)
    if stored == dump_config(config):
        return granted
    if os.path.lexists(path) and _is_edited(path, stored):
        kept = set_aside(path)
        echo(f"warning: {path} was edited by hand or written by another version; it is now {kept}")
    write_text(path, dump_config(config))
    return granted


def require_same_config(
    config: RunConfig, *, has_checkpoints: bool, allowed: Sequence[str] = ()
) -> list[Change]:
    """Return the changed settings as `store_config` does, without writing anything.

    Raises:
        ConfigError: As `store_config`.
    """
    path = Path(config.output_dir) / "config.yaml"
    if not has_checkpoints or not path.exists():
        return []
    changes = changes_between(load_stored_config(path), config)
    return require_allowed(changes, allowed, config.output_dir)


def has_other_length(config: RunConfig, final: Checkpoint) -> bool:
    """Return whether a run is to be trained for another length than its final checkpoint was.

    This compares settings with those inside the checkpoint and not with `config.yaml` of the run,
    which already has the new ones if training was interrupted after they were changed.
    """
    before = load_stored_config(final.folder / "config.yaml").train
    now = config.train
    return (before.epochs, before.max_steps) != (now.epochs, now.max_steps)


def require_unlocked(output_dir: Path) -> None:
    """Check that no other process trains in a directory, without creating or changing a file.

    Raises:
        UserError: As `locked`.
    """
    path = output_dir / ".lock"
    if not os.path.lexists(path):
        return
    with _open_lock(path, create=False) as file:
        if lock(file.fileno(), path, wait=False) == "held_elsewhere":
            raise _in_use(output_dir, file)
        _require_own_lock(file)


def _open_lock(path: Path, *, create: bool) -> IO[str]:
    """Open a lock file, but not the target of a symbolic link of its name.

    Raises:
        UserError: It is a link or no regular file.
    """
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise _foreign_lock(path)

    def opener(name: str, flags: int) -> int:
        added = os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
        return os.open(name, flags | added, 0o666)

    mode = "r+" if create else "r"
    return open(path, mode, encoding="utf-8", errors="replace", opener=opener)


def _require_own_lock(file: IO[str]) -> None:
    """Check that a lock file is empty or has the content that a run writes."""
    found = file.read(_MAX_LOCK_CHARACTERS + 1).strip("\0")  # a power cut can leave zeros
    if found and not _LOCK_CONTENT.fullmatch(found):
        raise _foreign_lock(Path(file.name))


def _foreign_lock(path: Path) -> UserError:
    return UserError(
        f"{path}: expected the lock file of a training run, found something else; nothing was "
        "changed. Move it away",
        code="not_ours",
    )


def _in_use(output_dir: Path, file: IO[str]) -> UserError:
    return UserError(
        f"output_dir {output_dir} is locked by another run ({_holder(file)}); wait for it or "
        "choose another output_dir",
        code="folder_in_use",
    )


def _normalized(path: Path) -> str | None:
    """Return a stored configuration as `dump_config` writes it; None if it cannot be read."""
    try:
        return dump_config(load_stored_config(path))
    except (ConfigError, OSError):
        return None


def _is_edited(path: Path, normalized: str | None) -> bool:
    """Return whether a configuration is not exactly what a run of this version writes."""
    return normalized is None or path.is_symlink() or path.read_bytes() != normalized.encode()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "its process is not known"
