"""Files of raw records, each with its place: JSON, JSONL, Parquet, `datasets` folders."""

import codecs
import itertools
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.image_paths import current_directory_hint, nearest_existing
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import StrictJsonError, open_regular, parse_json, require_regular

MAX_LINE_BYTES: Final = 64 * 2**20
"""A larger record, of whichever form, is one bad record and is skipped without being held in
memory."""

_ROWS_AT_ONCE: Final = 16
_UNREADABLE: Final = "data_file_unreadable"
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_BOM: Final = b"\xef\xbb\xbf"
_WINDOW: Final = 2**20
"""Bytes of a JSON list that are held at least."""
_GROWTH: Final = 8 * 2**20
"""Bytes by which what is held grows at most at a time."""
_STRING_REST: Final = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_BRACKET: Final = re.compile(r'["{}\[\],]')
_EDGE: Final = 16
"""A mistake so near the window's end may only be a word or an escape that it cuts."""


@dataclass(frozen=True)
class RawRecord:
    """One record as the file has it.

    Attributes:
        value: What was parsed, of any type.
        where: `file:line` (lines from 1) or `file[index]`.
        fallback_id: `line-N` or `index-N`, for records without an id.
    """

    value: Any
    where: str
    fallback_id: str


@dataclass(frozen=True)
class RecordFile:
    """An opened file: how many records it has at most, and an iterator over them, once."""

    total: int
    records: Iterator[RawRecord | RecordError]


def open_record_file(path: Path) -> RecordFile:
    """Open a file or folder of records by what it is: `.jsonl` line by line, `.json` a list, ...

    A line that is no JSON comes as a RecordError and the reading goes on. Whatever the kind, no
    more than a few records are in memory at once.

    Raises:
        UserError: The file is missing, of no known kind, or damaged as a whole (with line and
            column for JSON).
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        with open_regular(path) as file:
            start = file.read(4096)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such data file{current_directory_hint(path)}{nearest_existing(path)}; "
            "check `path` under `data`",
            code="data_file_missing",
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}", code="data_file_unreadable"
        ) from None
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: is UTF-16; save the file as UTF-8", code="not_utf8")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _open_lines(path)
    if start.startswith(b"PAR1"):
        return _open_parquet([path])
    first = start.removeprefix(_BOM).lstrip()[:1]
    if first in (b"[", b""):
        return _open_list(path)
    if first == b"{" and _first_line_is_json(path):
        return _open_lines(path)
    if first == b"{" and _is_one_object(path):
        raise UserError(
            f"{path}: holds one JSON object over several lines; expected a list of records (put "
            "it between [ and ]) or one record a line",
            code="data_file_unreadable",
        )
    raise UserError(
        f"{path}: expected a JSON list of records, one JSON record a line, or Parquet, found a "
        f"file that begins with {start[:20]!r}",
        code="data_file_unreadable",
    )


def _first_line_is_json(path: Path) -> bool:
    with open_regular(path) as file:
        return _is_json(file.readline(MAX_LINE_BYTES))


def _is_one_object(path: Path) -> bool:
    with open_regular(path) as file:
        data = file.read(MAX_LINE_BYTES + 1)
    return len(data) <= MAX_LINE_BYTES and _is_json(data)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data.removeprefix(_BOM))
    except (ValueError, RecursionError):
        return False
    return True


# --- one JSON value a line


def _open_lines(path: Path) -> RecordFile:
    total, last = 0, b"\n"
    with open_regular(path) as file:
        while block := file.read(2**20):
            total += block.count(b"\n")
            last = block[-1:]
    return RecordFile(total + (last != b"\n"), _read_lines(path))


def _read_lines(path: Path) -> Iterator[RawRecord | RecordError]:
    with open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            where, fallback_id = f"{path}:{number}", f"line-{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield _too_large(where, fallback_id)
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            try:
                yield RawRecord(_parse_line(line), where, fallback_id)
            except StrictJsonError as error:
                yield RecordError(error.reason, str(error), record_id=fallback_id, where=where)


def _skip_line(file: IO[bytes]) -> None:
    while block := file.readline(2**20):
        if block.endswith(b"\n"):
            return


def _too_large(where: str, record_id: str) -> RecordError:
    message = f"the record is larger than {MAX_LINE_BYTES:,} bytes"
    return RecordError("line_too_long", message, record_id=record_id, where=where)


def _parse_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
        raise StrictJsonError("not_utf8", message) from None
    return _parse(text)


def _parse(text: str, start: int | None = None) -> Any:
    """Parse the text's one JSON value, or the value that begins at `start`; strictly JSON."""
    try:
        return parse_json(text, start)
    except StrictJsonError as error:
        hint = "" if error.position is None else _hint(text, error.position)
        raise StrictJsonError(error.reason, f"{error}{hint}") from None


def _hint(text: str, position: int) -> str:
    if text[:position].rstrip().endswith(",") and text[position : position + 1] in ("]", "}"):
        return " (remove the comma before the closing bracket)"
    return ""


_FAST: Final = json.JSONDecoder(parse_int=str, parse_float=str)


# --- one JSON list


def _open_list(path: Path) -> RecordFile:
    with open_regular(path) as file:
        bounds = _ListScan(path, file).bounds()
    return RecordFile(max(0, len(bounds) - 1), _read_list(path, bounds))


class _ListScan:
    """A window that moves along the one list of a file, as wide as its longest item."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._done = 0  # characters of the window that are done with
        self._ended = False
        # Of what is done with: bytes, line ends, characters behind the last of them.
        self._bytes = self._lines = self._columns = 0
        self._read_bytes = 0
        if file.read(len(_BOM)) == _BOM:
            self._bytes = self._read_bytes = len(_BOM)
        else:
            file.seek(0)

    def bounds(self) -> "array[int]":
        """The byte at which each item begins, and that of the list's end; nothing if it is empty.

        Proves the file's syntax on the way.

        Raises:
            UserError: It is not one JSON list, with line and column.
        """
        starts = array("q")
        position = self._after_space(0)
        if position == len(self._text):
            return starts
        position = self._after_space(position + 1)
        if self._mark(position) != "]":
            while True:
                begin = self._byte(position)
                end = self._item_end(position, len(starts))
                starts.append(begin)
                position = self._after_space(self._move(end))
                mark = self._mark(position)
                if mark == "]":
                    break
                if mark != ",":
                    raise self._syntax_error(position, "expected ',' or ']' after a record")
                position = self._after_space(position + 1)
        starts.append(self._byte(position))
        position = self._after_space(position + 1)
        if position != len(self._text):
            raise self._syntax_error(position, "expected nothing after the list's end")
        return starts if len(starts) > 1 else array("q")

    def _item_end(self, start: int, index: int) -> int:
        while True:
            if len(self._text) - start > MAX_LINE_BYTES:
                return self._skip_item(start)
            try:
                end = _FAST.raw_decode(self._text, start)[1]
                if end < len(self._text) or not self._more():
                    return end
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated")
                if (cut_off or error.pos + _EDGE >= len(self._text)) and self._more():
                    continue
                problem = error.msg + _hint(self._text, error.pos)
                raise self._syntax_error(error.pos, problem) from None
            except RecursionError:
                message = f"{self._path}[{index}]: JSON nested too deeply to be a record"
                raise UserError(f"{message}; mend or remove it", code="json_depth") from None

    def _skip_item(self, position: int) -> int:
        """Return where a too large item ends, without holding it; only its brackets are counted."""
        depth, in_string = 0, False
        while True:
            if in_string:
                match = _STRING_REST.match(self._text, position)
                assert match is not None
                position = match.end()
                if self._mark(position) == '"':
                    in_string, position = False, position + 1
                    continue
            elif found := _BRACKET.search(self._text, position):
                mark, position = found.group(), found.end()
                if depth == 0 and mark in ",]}":
                    return found.start()
                in_string = mark == '"'
                depth += (mark in "[{") - (mark in "]}")
                continue
            else:
                position = len(self._text)
            position = self._move(position)
            if not self._more():
                raise self._syntax_error(position, "the file ends inside a record")

    def _mark(self, position: int) -> str:
        return self._text[position : position + 1]

    def _after_space(self, position: int) -> int:
        position = _after_space(self._text, position)
        while position >= len(self._text):
            position = self._move(position)
            if not self._more():
                break
            position = _after_space(self._text, position)
        return position

    def _more(self) -> bool:
        """Widen the window; whether there was anything left to read."""
        if self._ended:
            return False
        data = self._file.read(min(max(_WINDOW, len(self._text)), _GROWTH))
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # What the decoder held back of the chunk before counts among the bytes it names.
            held = len(error.object) - len(data)
            line = (
                self._lines
                + self._text.count("\n", self._done)
                + error.object.count(b"\n", 0, error.start)
            )
            byte = self._read_bytes - held + error.start
            message = f"{self._path}:{line + 1}: not UTF-8 (byte {byte}); save the file as UTF-8"
            raise UserError(message, code="not_utf8") from None
        self._read_bytes += len(data)
        self._ended = not data
        return True

    def _byte(self, position: int) -> int:
        return self._bytes + len(self._text[self._done : position].encode())

    def _move(self, position: int) -> int:
        """Be done with what lies before `position`; returns where that is afterwards."""
        self._bytes = self._byte(position)
        gone = self._text[self._done : position]
        self._lines += gone.count("\n")
        newline = gone.rfind("\n")
        self._columns = len(gone) - newline - 1 + (self._columns if newline < 0 else 0)
        self._done = position
        if position >= _WINDOW // 2:
            self._text = self._text[position:]
            self._done = position = 0
        return position

    def _syntax_error(self, position: int, problem: str) -> UserError:
        before = self._text[self._done : position]
        line = self._lines + before.count("\n") + 1
        newline = before.rfind("\n")
        column = len(before) - newline + (self._columns if newline < 0 else 0)
        message = f"{self._path}:{line}:{column}: not valid JSON: {problem}"
        return UserError(message, code="json_syntax")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _read_list(path: Path, bounds: "array[int]") -> Iterator[RawRecord | RecordError]:
    with open_regular(path) as file:
        for index in range(len(bounds) - 1):
            where, fallback_id = f"{path}[{index}]", f"index-{index}"
            if bounds[index + 1] - bounds[index] > MAX_LINE_BYTES:
                yield _too_large(where, fallback_id)
                continue
            file.seek(bounds[index])
            data = file.read(bounds[index + 1] - bounds[index])
            try:
                yield RawRecord(_parse(data.decode(), 0), where, fallback_id)
            except StrictJsonError as error:
                yield RecordError(error.reason, str(error), record_id=fallback_id, where=where)


# --- tables


def _open_folder(path: Path) -> RecordFile:
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UserError(
            f"{path}: a `datasets` folder with splits ({', '.join(splits)}); name one of them, "
            f"e.g. {path / splits[0] if splits else path}",
            code="data_file_unreadable",
        )
    if (path / "state.json").exists():
        return _open_datasets_folder(path)
    files = sorted(path.glob("*.parquet"))
    if files:
        return _open_parquet(files)
    raise UserError(
        f"{path}: expected a data file, a folder of Parquet files, or a folder that "
        "`datasets` saved (save_to_disk)",
        code="data_file_unreadable",
    )


def _open_parquet(paths: list[Path]) -> RecordFile:
    from pyarrow import parquet

    total = 0
    for path in paths:
        require_regular(path)
        with library_call("pyarrow", str(path), "read this Parquet file", code=_UNREADABLE):
            total += parquet.ParquetFile(path).metadata.num_rows
    return RecordFile(total, _read_parquet(paths))


def _read_parquet(paths: list[Path]) -> Iterator[RawRecord | RecordError]:
    for path in paths:
        yield from _arrow_rows(path, _parquet_batches(path), "pyarrow", "read this Parquet file")


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    yield from parquet.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE)


def _open_datasets_folder(path: Path) -> RecordFile:
    import datasets

    for entry in itertools.chain(path.glob("*.arrow"), path.glob("*.json")):
        require_regular(entry)
    action = "load this folder"
    with library_call("datasets", str(path), action, code=_UNREADABLE):
        # Arrow rows keep an image as its bytes and path; other formats would decode it here.
        table = datasets.load_from_disk(str(path)).with_format("arrow")
        batches = iter(table.iter(batch_size=_ROWS_AT_ONCE))
    return RecordFile(len(table), _arrow_rows(path, batches, "datasets", action))


def _arrow_rows(
    path: Path, batches: Iterator[Any], library: str, action: str
) -> Iterator[RawRecord | RecordError]:
    index = 0
    while True:
        with library_call(library, f"{path}[{index}]", action, code=_UNREADABLE):
            batch = next(batches, None)
            rows = [] if batch is None else _rows_of(batch)
        if batch is None:
            return
        for row in rows:
            where, fallback_id = f"{path}[{index}]", f"index-{index}"
            if row is None:
                yield _too_large(where, fallback_id)
            else:
                yield RawRecord(row, where, fallback_id)
            index += 1


def _rows_of(batch: Any) -> list[Any]:
    """Return rows of an Arrow batch; None for one that is too large to become Python objects."""
    if batch.nbytes <= MAX_LINE_BYTES:
        rows: list[Any] = batch.to_pylist()
        return rows
    singles = (batch.slice(row, 1) for row in range(batch.num_rows))
    return [None if row.nbytes > MAX_LINE_BYTES else row.to_pylist()[0] for row in singles]
