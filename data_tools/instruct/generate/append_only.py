"""Append whole lines to files that several processes share.

JSON lines, not SQLite: a run directory may be on a network file system, where SQLite's locks and
its write-ahead log are not reliable.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.filesystem import lock, sync, unlock


class SharedLog:
    """A file of lines that several processes append to, each after reading what is new.

    Args:
        path: The file.
        beginning: First bytes of every line that is appended.

    Raises:
        UserError: As `end_last_line`.
    """

    def __init__(self, path: Path, beginning: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._seen = 0
        try:
            with self.locked():
                remove_cut_line(self._descriptor, path, beginning)
        except BaseException:
            os.close(self._descriptor)
            raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from appending within the block, where the file system has locks."""
        lock(self._descriptor, self._path, wait=True)
        try:
            yield
        finally:
            unlock(self._descriptor)

    def append(self, line: str) -> None:
        """Append a line, which then survives a crash of this process.

        Raises:
            OSError: The disk is full or fails; nothing of the line remains.
        """
        append_line(self._descriptor, line.encode() + b"\n", self._path)

    def news(self) -> list[str]:
        """Return the complete lines added since the last call, including those of this process."""
        size = os.fstat(self._descriptor).st_size
        new = os.pread(self._descriptor, size - self._seen, self._seen)
        whole = new[: new.rfind(b"\n") + 1]
        self._seen += len(whole)
        return whole.decode(errors="replace").split("\n")[:-1]

    def close(self) -> None:
        """Sync and close the file."""
        sync(self._descriptor, self._path)
        os.close(self._descriptor)


def append_line(descriptor: int, line: bytes, path: Path) -> None:
    """Write the whole line, or leave the file as it was.

    Raises:
        OSError: The disk is full or fails.
    """
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise OSError(error.errno, error.strerror, str(path)) from None


def remove_cut_line(descriptor: int, path: Path, beginning: bytes) -> None:
    """Do what `end_last_line` does, with a warning if something was removed."""
    if removed := end_last_line(descriptor, path, beginning):
        echo(
            f"warning: {path}: the last line was cut when a process was ended; its {removed:,} "
            "bytes were removed"
        )


def end_last_line(descriptor: int, path: Path, beginning: bytes) -> int:
    """Complete the last line of a file of JSON lines, or remove it if it is only a part.

    Args:
        descriptor: The open file.
        path: Its name, for the message.
        beginning: First bytes of every line.

    Returns:
        The number of bytes that were removed.

    Raises:
        UserError: The last line is unfinished, and it or the first line begins otherwise; nothing
            was changed.
    """
    size, end = os.fstat(descriptor).st_size, _end_of_lines(descriptor)
    last = os.pread(descriptor, size - end, end)
    if not last:
        return 0
    # After a power failure a file may end in zeros instead of its last line.
    lines = [os.pread(descriptor, len(beginning), 0), last[: len(beginning)]]
    foreign = [line for line in lines if not beginning.startswith(line.rstrip(b"\0"))]
    if foreign:
        raise UserError(
            f"{path}: a line begins with {foreign[0]!r}, expected {beginning!r}; the file was not "
            "written by this command or was edited, and nothing was changed. Move it away, or "
            "remove that line",
            code="not_ours",
        )
    if _is_whole(last):
        append_line(descriptor, b"\n", path)
        return 0
    os.ftruncate(descriptor, end)
    return len(last)


def _is_whole(line: bytes) -> bool:
    """Return whether a line only lacks its line break, which editors may remove."""
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def _end_of_lines(descriptor: int) -> int:
    """Return the position after the last line break."""
    size, step = os.fstat(descriptor).st_size, 1 << 16
    end = size
    while end:
        start = max(0, end - step)
        cut = os.pread(descriptor, end - start, start).rfind(b"\n")
        if cut >= 0:
            end = start + cut + 1
            break
        end = start
    return end
