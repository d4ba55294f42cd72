"""Bytes kept in a temporary file while a run lasts, so that records need no memory."""

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple


class SpoolRef(NamedTuple):
    """Where bytes lie in a spool."""

    offset: int
    length: int


class Spool:
    """Append bytes, read them back by reference from this process, its forks or its pickles.

    The file lies in the system's temporary folder (`TMPDIR`) and goes with the object that made it.
    """

    def __init__(self) -> None:
        with _explained("the temporary directory"):
            descriptor, self.path = tempfile.mkstemp(prefix="vlm-sft-", suffix=".spool")
        self._writer = os.fdopen(descriptor, "wb")
        self._end = 0
        self._reader: int | None = None
        weakref.finalize(self, _remove, self.path, self._writer, os.getpid())

    def append(self, data: bytes) -> SpoolRef:
        """Keep `data`.

        Raises:
            OSError: The temporary directory is full; the error names the file and `TMPDIR`.
        """
        ref = SpoolRef(self._end, len(data))
        with _explained(self.path):
            self._writer.write(data)
        self._end += len(data)
        return ref

    def flush(self) -> None:
        """Make all that was appended readable; call it once, after the last `append`."""
        with _explained(self.path):
            self._writer.close()

    def read(self, ref: SpoolRef) -> bytes:
        """The bytes at `ref`, after `flush`."""
        if self._reader is None:
            self._reader = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, _close, self._reader)
        return os.pread(self._reader, ref.length, ref.offset)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_reader": None}


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Say in the error of a failed write what the file is for and how to move it elsewhere."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror} (records are kept there while a command runs; set TMPDIR to a "
        reason += "directory with room)"
        raise OSError(error.errno, reason, error.filename or place) from None


def _close(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)


def _remove(path: str, writer: IO[bytes], owner: int) -> None:
    if os.getpid() == owner:
        with suppress(OSError):
            writer.close()
        with suppress(OSError):
            os.unlink(path)
