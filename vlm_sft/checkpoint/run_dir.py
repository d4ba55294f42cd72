"""A run's folder: one run at a time, one configuration for its whole life."""

import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final

from vlm_sft.config.resume import Change, changes_between, require_allowed
from vlm_sft.config.schema import RunConfig, dump_config, load_stored_config
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.atomic_files import is_stream, write_text
from vlm_sft.utils.console import say
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

_held: set[int] = set()
"""Descriptors of locks, which a forked loader process must not keep when its parent is killed."""


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)  # the parent's lock stays, since only its own copy holds it
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


EXPORT_OUTLOOK: Final = "export_outlook.json"
"""Name of the file that keeps whether the run's model can be exported, for the report."""

WRITTEN: Final = frozenset(
    {
        ".lock",
        "activation_checkpointing.json",
        "checkpoints",
        "config.yaml",
        EXPORT_OUTLOOK,
        "final",
        "ledger.jsonl",
        "ledger_eval.jsonl",
        "metrics.jsonl",
        "parts.json",
        "report.html",
        "samples.jsonl",
        "trackers",
        "trained.jsonl",
    }
)
"""Names that a run writes in its folder; others there are the user's and stay as they are."""


def own_run_folder(config: RunConfig) -> None:
    """Create and mark the run's folder, or accept one that a run made before.

    Raises:
        UserError: As `require_run_folder`; nothing was changed.
    """
    require_run_folder(config)
    own_directory(
        config.output_dir,
        TRAINING_RUN,
        adopt=_is_unmarked_run(Path(config.output_dir)),
        setting="output_dir",
    )


def require_run_folder(config: RunConfig) -> None:
    """Check that `output_dir` is new, empty, or a run's, without changing anything.

    Raises:
        UserError: It holds something else, a pipe or a device has the name of a run's file, or the
            run would replace what it reads.
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
    """Return whether a version that wrote no markers trained in a folder."""
    return (folder / "config.yaml").is_file() and is_run(folder)


@contextmanager
def locked(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Keep a second run out of the folder while the block lasts; a killed run leaves no lock.

    Where the file system has no locks, a warning is printed and the run starts.

    Raises:
        UserError: Another process has it; it is named with its host and when it began. Or `.lock`
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
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())


def keep_foreign_files(output_dir: Path) -> None:
    """Rename the files that the run is about to replace and that no run has written so.

    Files of rows, such as `metrics.jsonl`, are handled where they are opened.
    """
    for name, is_ours in _CONTENT.items():
        path = output_dir / name
        if os.path.lexists(path) and not _is_empty(path) and not is_ours(path):
            kept = set_aside(path)
            say(
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
    """Return a test for a JSON object with these keys, or a list of objects with them."""

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
    "ledger.jsonl": _is_ledger,
    "ledger_eval.jsonl": _is_ledger,
    "parts.json": _has_keys("part"),
}
"""Files that a run replaces as a whole, and what tells that a run wrote them."""


def settle_config(
    config: RunConfig, *, has_checkpoints: bool, allowed: Sequence[str] = ()
) -> list[Change]:
    """Write `config.yaml`, after refusing to go on with a run under another configuration.

    A file that means the same stays as it is, comments included. One that was written by hand and
    means something else is kept under another name.

    Args:
        config: This call's configuration.
        has_checkpoints: Whether the folder holds a run to go on with.
        allowed: Settings that the user allows to change (see `vlm_sft.config.resume`).

    Returns:
        The settings that the user allowed to change and that do.

    Raises:
        ConfigError: The folder's checkpoints were made otherwise; every difference is shown.
    """
    granted = require_same_config(config, has_checkpoints=has_checkpoints, allowed=allowed)
    path = Path(config.output_dir) / "config.yaml"
    meaning = _meaning(path)
    if meaning == dump_config(config):
        return granted
    if os.path.lexists(path) and _is_written_by_hand(path, meaning):
        kept = set_aside(path)
        say(f"warning: {path} was edited by hand or written by another version; it is now {kept}")
    write_text(path, dump_config(config))
    return granted


def require_same_config(
    config: RunConfig, *, has_checkpoints: bool, allowed: Sequence[str] = ()
) -> list[Change]:
    """Do what `settle_config` does, without writing anything."""
    path = Path(config.output_dir) / "config.yaml"
    if not has_checkpoints or not path.exists():
        return []
    changes = changes_between(load_stored_config(path), config)
    return require_allowed(changes, allowed, config.output_dir)


def require_unlocked(output_dir: Path) -> None:
    """Refuse a folder that another process trains in, without creating or changing a file.

    Raises:
        UserError: As `locked` raises it.
    """
    path = output_dir / ".lock"
    if not os.path.lexists(path):
        return
    with _open_lock(path, create=False) as file:
        if lock(file.fileno(), path, wait=False) == "held_elsewhere":
            raise _in_use(output_dir, file)
        _require_own_lock(file)


def _open_lock(path: Path, *, create: bool) -> IO[str]:
    """Open a lock file itself, never what a link of its name leads to.

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
    """Refuse a file with content that no run writes into its lock."""
    found = file.read(_MAX_LOCK_CHARACTERS + 1).strip("\0")  # zeros are left by a power cut
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


def _meaning(path: Path) -> str | None:
    """Return a configuration file as `dump_config` would write it; None if it cannot be read."""
    try:
        return dump_config(load_stored_config(path))
    except (ConfigError, OSError):
        return None


def _is_written_by_hand(path: Path, meaning: str | None) -> bool:
    return meaning is None or path.is_symlink() or path.read_bytes() != meaning.encode()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "its process is not known"
