"""Read untrusted files: regular files only, with limits on bytes, nesting and numbers.

A named pipe or device in place of a configuration, manifest or record file would make a command
wait forever or read without end. All readers of such files open them here.
"""

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.escape import shortened

MAX_FILE_BYTES: Final = 64 * 2**20
"""Maximum size of files read into memory as a whole: configurations, templates, manifests."""


class NotARegularFile(UserError):
    """There is a directory, pipe, socket or device where a file is expected."""

    default_code = "not_a_file"


class StrictJsonError(ValueError):
    """A text is not standard JSON.

    Attributes:
        reason: The name of the error in `vlm_sft.errors.codes`.
        position: Position of a syntax error in the text, in characters; None if unknown.
    """

    def __init__(self, reason: str, message: str, position: int | None = None) -> None:
        self.reason = reason
        self.position = position
        super().__init__(message)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; never open a pipe or device.

    Raises:
        NotARegularFile: It is something else, which the message names.
        OSError: As `open`, e.g. FileNotFoundError.
    """
    try:
        # Checked before opening: opening alone can rewind a tape or start a watchdog.
        _refuse_special(os.stat(path).st_mode, path)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except UserError:
        raise
    except ValueError as error:  # a NUL or half a surrogate pair in the name
        raise OSError(errno.EINVAL, f"no file has such a name ({error})", str(path)) from None
    try:
        _refuse_special(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: str | Path) -> None:
    """Check that a path that a library will open is a regular file.

    Raises:
        NotARegularFile: It is a pipe, device or directory.
        OSError: As `os.stat`.
    """
    _refuse_special(os.stat(path).st_mode, path)


def _refuse_special(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        found = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise NotARegularFile(f"{path}: expected a regular file, found {found}")


def read_bytes(path: str | Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        NotARegularFile: See `open_regular`.
        UserError: `file_too_large`.
        OSError: As `open`.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(
            f"{path}: larger than {limit:,} bytes, the maximum for such files; check the name",
            code="file_too_large",
        )
    return data


def read_text(path: str | Path, limit: int = MAX_FILE_BYTES) -> str:
    """Read a regular file of UTF-8 text, without a byte order mark; raises as `read_bytes`.

    Raises:
        UserError: It is not UTF-8; the message names the byte.
    """
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8", code="not_utf8"
        ) from None


def read_json(path: str | Path, limit: int = MAX_FILE_BYTES) -> Any:
    """Read a regular file with one value of strict JSON; raises as `read_text`.

    Raises:
        UserError: It is not JSON; the message names line and column.
    """
    text = read_text(path, limit)
    try:
        return parse_json(text)
    except StrictJsonError as error:
        place = str(path)
        if error.position is not None:
            line = text.count("\n", 0, error.position) + 1
            column = error.position - text.rfind("\n", 0, error.position)
            place = f"{path}:{line}:{column}"
        raise UserError(f"{place}: {error}", code=error.reason) from None


def parse_json(text: str, start: int | None = None) -> Any:
    """Parse the one JSON value of `text`, or the value that begins at `start`.

    Unlike `json.loads`, this refuses repeated keys, NaN, Infinity and numbers beyond a float, and
    reports too deep nesting and too long integers as the same type of error.

    Raises:
        StrictJsonError: With the name of the error.
    """
    try:
        return _STRICT.decode(text) if start is None else _STRICT.raw_decode(text, start)[0]
    except StrictJsonError:
        raise
    except json.JSONDecodeError as error:
        message = f"not valid JSON at column {error.colno}: {error.msg}"
        raise StrictJsonError("json_syntax", message, error.pos) from None
    except RecursionError:
        raise StrictJsonError("json_depth", "JSON nested too deeply") from None
    except ValueError as error:
        raise StrictJsonError("json_syntax", f"not valid JSON: {error}") from None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                message = f"the key {shortened(key, 100)!r} appears twice in one object"
                raise StrictJsonError("json_duplicate_key", message)
            seen.add(key)
    return table


def _refuse_constant(name: str) -> Any:
    raise StrictJsonError("json_nan", f"the number {name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        message = f"the number {shortened(digits, 64)} is beyond what a float can hold"
        raise StrictJsonError("json_nan", message)
    return value


_STRICT: Final = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant, parse_float=_finite
)
