"""Write files atomically: write and sync a temporary file, then rename it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vlm_sft.utils.filesystem import (
    create_exclusively,
    naming,
    sync,
    sync_folder,
    temporary_sibling,
)


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as UTF-8 JSON ending in a newline; NaN and infinities are refused.

    Raises:
        ValueError: A number in `value` is not finite. The old file, if any, is untouched.
        OSError: As `write_bytes`.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with its line ends unchanged; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file at `path` by `data`; readers see either the old or the new content.

    Missing directories are created. The data is on the disk when this returns.

    Raises:
        OSError: The disk is full or the place cannot be written. The old file is untouched and no
            temporary file is left.
    """
    with atomic_open(path) as file:
        file.write(data)


@contextmanager
def atomic_open(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that replaces `path` when the block ends without an error.

    A new file gets the mode given by the umask; a replaced one keeps its mode where the file system
    allows it. A stream (see `is_stream`) is written in place.

    Raises:
        OSError: As `write_bytes`; the error names `path`.
    """
    path = Path(path)
    if is_stream(path):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    with naming(path):
        with _reported_as(path):
            descriptor = create_exclusively(temporary)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                _keep_mode(file.fileno(), path)
                # Without this, a power cut after the rename can leave an empty file.
                sync(file.fileno(), path)
            with _reported_as(path):
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)  # makes the rename itself durable


def is_stream(path: Path) -> bool:
    """Return whether `path` is a device, a pipe or an open descriptor, which cannot be replaced.

    `/dev/stdout` is one even if it is redirected to a file.
    """
    name = os.path.abspath(path)
    if name in ("/dev/stdout", "/dev/stderr") or name.startswith(("/dev/fd/", "/proc/")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def _reported_as(path: Path) -> Iterator[None]:
    """Name the user's file in errors about the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _keep_mode(descriptor: int, path: Path) -> None:
    """Give the temporary file the mode of the file that it replaces, if any."""
    with suppress(OSError):
        mode = path.stat().st_mode & 0o777
        if mode != os.fstat(descriptor).st_mode & 0o777:
            os.fchmod(descriptor, mode)
