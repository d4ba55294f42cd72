"""Files that are either complete or absent: written beside their place, then renamed into it."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as UTF-8 JSON ending in a newline; NaN and infinities are refused.

    Raises:
        ValueError: A number in `value` is not finite. The old file, if any, is untouched.
        OSError: As `write_bytes`.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, line ends as given; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, so that readers see the old file or the new one whole.

    Folders above are made. The data is on the disk when this returns.

    Raises:
        OSError: The disk is full or the place cannot be written. The old file is untouched and no
            temporary file is left.
    """
    with atomic_open(path) as file:
        file.write(data)


@contextmanager
def atomic_open(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write that takes the place of `path` when the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            _take_mode(file.fileno(), path)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk; systems that cannot sync a folder are let be."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_mode(descriptor: int, path: Path) -> None:
    """Give the temporary file the mode of the file it replaces, or that of an ordinary new file."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        mode = 0o644
    with suppress(OSError, AttributeError):
        os.fchmod(descriptor, mode)
