"""Files that only grow, a line at a time, whole lines or none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_sft.filesystem import lock, sync, unlock


class SharedLog:
    """A file of lines that several processes append to, each after having read what is new."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._seen = 0
        with self.locked():
            cut_torn_line(self._descriptor)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from appending within the block, where the file system has locks."""
        lock(self._descriptor, self._path, wait=True)
        try:
            yield
        finally:
            unlock(self._descriptor)

    def append(self, line: str) -> None:
        """Add a line; it outlives this process from here on.

        Raises:
            OSError: The disk is full or fails; nothing of the line stays.
        """
        append_line(self._descriptor, line.encode() + b"\n", self._path)

    def news(self) -> list[str]:
        """The whole lines that were not there at the last look, one's own among them."""
        size = os.fstat(self._descriptor).st_size
        new = os.pread(self._descriptor, size - self._seen, self._seen)
        whole = new[: new.rfind(b"\n") + 1]
        self._seen += len(whole)
        return whole.decode(errors="replace").split("\n")[:-1]

    def close(self) -> None:
        """Put everything on the disk and let go of the file."""
        sync(self._descriptor, self._path)
        os.close(self._descriptor)


def append_line(descriptor: int, line: bytes, path: Path) -> None:
    """Write the line whole, or leave the file as it was.

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


def cut_torn_line(descriptor: int) -> int:
    """Take away what stands behind the last line end; returns the number of bytes."""
    size, step = os.fstat(descriptor).st_size, 1 << 16
    end = size
    while end:
        start = max(0, end - step)
        cut = os.pread(descriptor, end - start, start).rfind(b"\n")
        if cut >= 0:
            end = start + cut + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return size - end
