"""A run's folder: one run at a time, one configuration for its whole life."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from vlm_sft.atomic import write_text
from vlm_sft.changes import Change, changes_between, require_allowed
from vlm_sft.config import RunConfig, dump_config, load_config
from vlm_sft.errors import UserError
from vlm_sft.filesystem import lock

_held: set[int] = set()
"""Descriptors of locks, which a forked loader process must not keep when its parent is killed."""


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)  # the parent's lock stays, since only its own copy holds it
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def locked(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Keep a second run out of the folder while the block lasts; a killed run leaves no lock.

    Where the file system has no locks, a warning is printed and the run starts.

    Raises:
        UserError: Another process has it; it is named with its host and when it began.
    """
    if not enabled:
        yield
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("a+", encoding="utf-8") as file:
        if lock(file.fileno(), Path(file.name), wait=False) == "held_elsewhere":
            raise _in_use(output_dir, file)
        file.truncate(0)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {began}")
        file.flush()
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())


def settle_config(
    config: RunConfig, *, has_checkpoints: bool, allowed: Sequence[str] = ()
) -> list[Change]:
    """Write `config.yaml`, after refusing to go on with a run under another configuration.

    Args:
        config: This call's configuration.
        has_checkpoints: Whether the folder holds a run to go on with.
        allowed: Settings that the user allows to change (see `vlm_sft.changes`).

    Returns:
        The settings that the user allowed to change and that do.

    Raises:
        ConfigError: The folder's checkpoints were made otherwise; every difference is shown.
    """
    granted = require_same_config(config, has_checkpoints=has_checkpoints, allowed=allowed)
    write_text(Path(config.output_dir) / "config.yaml", dump_config(config))
    return granted


def require_same_config(
    config: RunConfig, *, has_checkpoints: bool, allowed: Sequence[str] = ()
) -> list[Change]:
    """Do what `settle_config` does, without writing anything."""
    path = Path(config.output_dir) / "config.yaml"
    if not has_checkpoints or not path.exists():
        return []
    changes = changes_between(load_config(path), config)
    return require_allowed(changes, allowed, config.output_dir)


def require_unlocked(output_dir: Path) -> None:
    """Refuse a folder that another process trains in, without creating or changing a file.

    Raises:
        UserError: As `locked` raises it.
    """
    path = output_dir / ".lock"
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        if lock(file.fileno(), path, wait=False) == "held_elsewhere":
            raise _in_use(output_dir, file)


def _in_use(output_dir: Path, file: IO[str]) -> UserError:
    return UserError(
        f"output_dir {output_dir} is locked by another run ({_holder(file)}); wait for it or "
        "choose another output_dir",
        code="folder_in_use",
    )


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "its process is not known"
