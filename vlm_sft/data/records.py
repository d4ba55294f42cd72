"""Read record files (JSON, JSONL, Parquet, `datasets` folders) into conversations."""

import codecs
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.record_formats import RawRecord, parse_record
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.image_paths import current_directory_hint, nearest_existing
from vlm_sft.utils.json_items import RawJson, comma_hint, map_file, split_list
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import StrictJsonError, open_regular, parse_json, require_regular

MAX_RECORD_BYTES: Final = 64 * 2**20
"""A larger record is quarantined, whatever the kind of file, and never held in memory."""

_ROWS_AT_ONCE: Final = 16
_UNREADABLE: Final = "data_file_unreadable"


@dataclass(frozen=True)
class Records:
    """The records of one file.

    Attributes:
        total: The number of records, or an upper bound of it; for progress bars.
        conversations: A conversation per usable record, an error per other record. Can be
            iterated once.
    """

    total: int
    conversations: Iterator[Conversation | RecordError]


def open_records(file: DataFile) -> Records:
    """Open a file of records; a record that cannot be used is its own error.

    `<image>` marks an image's place in human turns of LLaVA and Alpaca records, and in user
    messages that are plain text in `messages` records that list images; anywhere else it is
    ordinary text. Images are neither opened nor looked for here.

    Args:
        file: The path, with the format and image folder of the records.

    Raises:
        UserError: The file as a whole cannot be read: missing, damaged or of no known kind.
    """
    path = Path(file.path)
    raw_records = open_raw_records(path)
    image_root = Path(file.image_root or (path if path.is_dir() else path.parent))
    form = None if file.format == "auto" else file.format

    def conversations() -> Iterator[Conversation | RecordError]:
        for raw in raw_records.records:
            if isinstance(raw, RecordError):
                yield raw
                continue
            try:
                yield parse_record(raw, form, image_root, follow_symlinks=file.follow_symlinks)
            except RecordError as error:
                yield error

    return Records(raw_records.total, conversations())


def read_records(file: DataFile) -> Iterator[Conversation | RecordError]:
    """Return `open_records(file).conversations`."""
    return open_records(file).conversations


@dataclass(frozen=True)
class RawRecords:
    """The parsed values of one file, as `Records` but before they are conversations."""

    total: int
    records: Iterator[RawRecord | RecordError]


def open_raw_records(path: Path) -> RawRecords:
    """Open a file or folder of records; its name and first bytes decide how it is read.

    Only a few records are in memory at once, whatever the kind of file.

    Raises:
        UserError: As `open_records`; for JSON with line and column.
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
    first = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first in (b"[", b""):
        return _open_list(path)
    with open_regular(path) as file:
        first_line, rest = file.readline(MAX_RECORD_BYTES), file.read(MAX_RECORD_BYTES)
    if first == b"{" and _is_json(first_line):
        return _open_lines(path)
    if first == b"{" and _is_json(first_line + rest):
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


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return False
    return True


# --- one JSON value per line


def _open_lines(path: Path) -> RawRecords:
    total, last = 0, b"\n"
    with open_regular(path) as file:
        while block := file.read(2**20):
            total += block.count(b"\n")
            last = block[-1:]
    return RawRecords(total + (last != b"\n"), _read_lines(path))


def _read_lines(path: Path) -> Iterator[RawRecord | RecordError]:
    with open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES):
            number += 1
            where, fallback_id = f"{path}:{number}", f"line-{number}"
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield _too_large(where, fallback_id)
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield RawRecord(_parse(line), where, fallback_id)
            except StrictJsonError as error:
                yield RecordError(error.reason, str(error), record_id=fallback_id, where=where)


def _skip_line(file: IO[bytes]) -> None:
    while block := file.readline(2**20):
        if block.endswith(b"\n"):
            return


def _too_large(where: str, record_id: str) -> RecordError:
    message = f"the record is larger than {MAX_RECORD_BYTES:,} bytes"
    return RecordError("line_too_long", message, record_id=record_id, where=where)


def _parse(data: bytes) -> Any:
    """Parse one record; strictly JSON, see `parse_json`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
        raise StrictJsonError("not_utf8", message) from None
    try:
        return parse_json(text)
    except StrictJsonError as error:
        hint = "" if error.position is None else comma_hint(text, error.position)
        raise StrictJsonError(error.reason, f"{error}{hint}") from None


# --- one JSON list


def _open_list(path: Path) -> RawRecords:
    items = split_list(path, map_file(path))
    return RawRecords(len(items), _read_list(path, items))


def _read_list(path: Path, items: Sequence[RawJson]) -> Iterator[RawRecord | RecordError]:
    for index, item in enumerate(items):
        where, fallback_id = f"{path}[{index}]", f"index-{index}"
        if len(memoryview(item)) > MAX_RECORD_BYTES:
            yield _too_large(where, fallback_id)
            continue
        try:
            yield RawRecord(_parse(bytes(item)), where, fallback_id)
        except StrictJsonError as error:
            yield RecordError(error.reason, str(error), record_id=fallback_id, where=where)


# --- tables


def _open_folder(path: Path) -> RawRecords:
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


def _open_parquet(paths: list[Path]) -> RawRecords:
    from pyarrow import parquet

    total = 0
    for path in paths:
        require_regular(path)
        with library_call("pyarrow", str(path), "read this Parquet file", code=_UNREADABLE):
            total += parquet.ParquetFile(path).metadata.num_rows
    return RawRecords(total, _read_parquet(paths))


def _read_parquet(paths: list[Path]) -> Iterator[RawRecord | RecordError]:
    for path in paths:
        yield from _arrow_rows(path, _parquet_batches(path), "pyarrow", "read this Parquet file")


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    yield from parquet.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE)


def _open_datasets_folder(path: Path) -> RawRecords:
    import datasets

    for entry in itertools.chain(path.glob("*.arrow"), path.glob("*.json")):
        require_regular(entry)
    action = "load this folder"
    with library_call("datasets", str(path), action, code=_UNREADABLE):
        # Arrow rows keep an image as its bytes and path; other formats would decode it here.
        table = datasets.load_from_disk(str(path)).with_format("arrow")
        batches = iter(table.iter(batch_size=_ROWS_AT_ONCE))
    return RawRecords(len(table), _arrow_rows(path, batches, "datasets", action))


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
    if batch.nbytes <= MAX_RECORD_BYTES:
        rows: list[Any] = batch.to_pylist()
        return rows
    singles = (batch.slice(row, 1) for row in range(batch.num_rows))
    return [None if row.nbytes > MAX_RECORD_BYTES else row.to_pylist()[0] for row in singles]
