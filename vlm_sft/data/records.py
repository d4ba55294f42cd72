"""Read record files and folders of every kind into conversations (`docs/data-formats.md`)."""

import codecs
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, cast, get_args

from vlm_sft.config.hub_address import is_hub_address
from vlm_sft.config.schema import DataFile
from vlm_sft.data.caption_folder import open_caption_folder
from vlm_sft.data.columns import find_columns, is_image_name, is_table, rows_to_records
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.csv_files import open_csv
from vlm_sft.data.record_formats import (
    FORMAT_KEYS,
    MAX_RECORD_BYTES,
    Columns,
    Form,
    RawRecord,
    RawRecords,
    parse_record,
)
from vlm_sft.data.vqa_files import KEYS as VQA_KEYS
from vlm_sft.data.vqa_files import open_vqa
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.filesystem import warn_once
from vlm_sft.utils.image_paths import current_directory_hint, nearest_existing
from vlm_sft.utils.json_items import RawJson, comma_hint, map_file, split_list, split_object
from vlm_sft.utils.libraries import import_extra, library_call
from vlm_sft.utils.reading import StrictJsonError, open_regular, parse_json, require_regular

_METADATA: Final = ("metadata.csv", "metadata.jsonl")
_ROWS_AT_ONCE: Final = 16
_KEYS_AT_ONCE: Final = 1024
_UNREADABLE: Final = "data_file_unreadable"


@dataclass(frozen=True)
class Records:
    """The records of one file.

    Attributes:
        total: The number of records, or an upper bound of it; for progress bars.
        conversations: A conversation per usable record, an error per other record. Can be
            iterated once.
        image_root: Folder that image names start from.
    """

    total: int
    conversations: Iterator[Conversation | RecordError]
    image_root: Path


def open_records(file: DataFile) -> Records:
    """Open a file of records; a record that cannot be used is its own error.

    `<image>` marks an image's place in human turns of LLaVA and Alpaca records, and in user
    messages that are plain text in `messages` records that list images; anywhere else, as in the
    cells of a table, it is ordinary text. Images are neither opened nor looked for here.

    Args:
        file: The path, with the format and image folder of the records.

    Raises:
        UserError: The file as a whole cannot be read: missing, damaged or of no known kind.
    """
    raw_records = open_record_values(file)
    image_root = raw_records.image_root or file.images_start_in()
    form = _form(file)

    def conversations() -> Iterator[Conversation | RecordError]:
        for raw in raw_records.records:
            if isinstance(raw, RecordError):
                yield raw
                continue
            try:
                record = parse_record(raw, form, image_root, follow_symlinks=file.follow_symlinks)
            except RecordError as error:
                yield error
                continue
            yield record if file.caption_prompt is None else _asking(record, file.caption_prompt)

    return Records(raw_records.total, conversations(), image_root)


def _asking(record: Conversation, prompt: str) -> Conversation:
    """Return a record in which a user turn that is an image alone asks `prompt` about it."""

    def asking(turn: Turn) -> Turn:
        images = tuple(part for part in turn.parts if isinstance(part, ImagePart))
        if turn.role != "user" or turn.text.strip() or not images:
            return turn
        return replace(turn, parts=(*images, TextPart(prompt)), image_separator=None)

    return replace(record, turns=tuple(map(asking, record.turns)))


def read_records(file: DataFile) -> Iterator[Conversation | RecordError]:
    """Return `open_records(file).conversations`."""
    return open_records(file).conversations


def open_record_values(file: DataFile) -> RawRecords:
    """Open the records before they are conversations: rows of tables as records in messages format.

    Raises:
        UserError: As `open_records`.
    """
    opened = open_raw_records(Path(file.path), file)
    return opened if _form(file) is not None else _without_columns(opened, file)


def require_columns(file: DataFile) -> None:
    """Check that the columns of a table with a header line are found, and read nothing else.

    Raises:
        UserError: As `open_records`.
    """
    path = Path(file.path)
    is_table = path.suffix.lower() in (".csv", ".tsv") or (path / "metadata.csv").exists()
    if is_table and not is_hub_address(file.path):
        open_record_values(file)


def _form(file: DataFile) -> Form | None:
    return cast(Form, file.format) if file.format in get_args(Form) else None


def _without_columns(opened: RawRecords, file: DataFile) -> RawRecords:
    """Return the records with the rows of a table turned into records in messages format.

    Without a header, each row's own keys decide: the first rows may have no image and later ones
    one, and records and rows may be mixed.

    Raises:
        UserError: The columns of the header, or of the first row, cannot be found.
    """
    head = list(itertools.islice(opened.records, _ROWS_AT_ONCE))
    rows: Iterator[RawRecord | RecordError] = itertools.chain(head, opened.records)
    values = (raw.value for raw in head if isinstance(raw, RawRecord))
    example = next((value for value in values if isinstance(value, Mapping)), {})
    has_rows_only = (
        opened.header is not None
        or opened.is_image_folder
        or file.format == "table"
        or bool(file.columns.model_fields_set)
    )

    def find(header: Sequence[str], row: Mapping[str, Any]) -> Columns | None:
        is_row = is_table(header) and not any(key in FORMAT_KEYS for key in header)
        if not header or not (has_rows_only or is_row):
            return None
        columns = find_columns(header, file.columns, file.path, row)
        if opened.is_image_folder and columns.image is None:
            raise UserError(
                f"{file.path}: an imagefolder's metadata needs the column 'file_name'; its columns "
                f"are {', '.join(map(repr, header))}",
                code="missing_column",
            )
        return columns

    columns = opened.columns or find(opened.header or list(map(str, example)), example)
    known: dict[tuple[Any, ...], Columns | None] = {}

    def columns_of(raw: RawRecord) -> Columns | None:
        if opened.columns is not None or opened.header is not None:
            return columns
        if not isinstance(raw.value, Mapping):
            return columns if has_rows_only else None
        keys = tuple(raw.value)
        if keys not in known:
            if len(known) == _KEYS_AT_ONCE:
                known.clear()
            try:
                known[keys] = find(list(map(str, keys)), raw.value)
            except UserError as error:
                message = str(error).removeprefix(f"{file.path}: ")
                raise raw.error(error.reason, message) from None
        return known[keys]

    if opened.is_image_folder and file.image_root is None:
        rows = _count_unnamed(Path(file.path), rows)
    records = rows_to_records(rows, columns_of, refuse_repeated=opened.is_image_folder)
    return replace(opened, records=records)


def _count_unnamed(
    folder: Path, rows: Iterator[RawRecord | RecordError]
) -> Iterator[RawRecord | RecordError]:
    """Yield the rows of an imagefolder, then warn of images that none of them names."""
    named: set[str] = set()
    for raw in rows:
        if isinstance(raw, RawRecord) and isinstance(raw.value, Mapping):
            for cell in raw.value.values():
                names = cell if isinstance(cell, list) else [cell]
                named.update(os.path.normpath(name) for name in names if is_image_name(name))
        yield raw
    unnamed = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.relpath(os.path.join(place, name), folder)
            unnamed += is_image_name(name) and path not in named
    if unnamed:
        warn_once(f"{folder}: {unnamed:,} images are in no row of its metadata; they are not used")


def open_raw_records(path: Path, file: DataFile | None = None) -> RawRecords:
    """Open a file or folder of records; its name and first bytes decide how it is read.

    Only a few records are in memory at once, whatever the kind of file; of VQA files also all
    answers.

    Args:
        path: The file or folder; not used if `file` is a data set of the hub.
        file: Its settings, of which `format`, `annotations`, `image_name` and `follow_symlinks` are
            used.

    Raises:
        UserError: As `open_records`; for JSON with line and column.
    """
    if file is not None and is_hub_address(file.path):
        from vlm_sft.data.hub_datasets import open_hub

        return open_hub(file)
    container = "auto" if file is None else file.format
    annotations = None if file is None or file.annotations is None else Path(file.annotations)
    image_name = None if file is None else file.image_name
    try:
        if path.is_dir():
            shards = sorted(path.glob("*.tar"))
            if container == "shards" or (shards and container == "auto"):
                _refuse_image_root(path, file)
                _refuse_several_kinds(path, shards)
                return _open_shards(shards)
            return _open_folder(path, container, file is not None and file.follow_symlinks)
        if container in ("imagefolder", "captions") and path.exists():
            raise UserError(
                f"{path}: a file, but format {container!r} is that of a folder; give the folder",
                code="data_file_unreadable",
            )
        if container == "vqa" or annotations is not None:
            return open_vqa(path, annotations, image_name)
        with open_regular(path) as opened:
            start = opened.read(4096)
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
    if path.suffix.lower() == ".tar":
        _refuse_image_root(path, file)
        return _open_shards([path])
    if path.suffix.lower() in (".csv", ".tsv"):
        return open_csv(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _open_lines(path)
    if start.startswith(b"PAR1"):
        return _open_parquet([path])
    first = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first in (b"[", b""):
        return _open_list(path)
    with open_regular(path) as opened:
        first_line, rest = opened.readline(MAX_RECORD_BYTES), opened.read(MAX_RECORD_BYTES)
    if first == b"{" and rest.strip() and _is_json(first_line):
        return _open_lines(path)
    if first == b"{" and _is_vqa(path):
        return open_vqa(path, annotations, image_name)
    if first == b"{" and _is_json(first_line):
        return _open_lines(path)
    if first == b"{" and _is_json(first_line + rest):
        raise UserError(
            f"{path}: holds one JSON object over several lines; expected a list of records (put "
            "it between [ and ]) or one record a line",
            code="data_file_unreadable",
        )
    raise UserError(
        f"{path}: expected a JSON list of records, one JSON record a line, Parquet, or a table "
        f"named .csv or .tsv, found a file that begins with {start[:20]!r}",
        code="data_file_unreadable",
    )


def _open_shards(tars: Sequence[Path]) -> RawRecords:
    from vlm_sft.data.shards import open_shards  # imports pyarrow

    return open_shards(tars)


def _refuse_image_root(path: Path, file: DataFile | None) -> None:
    if file is not None and file.image_root is not None:
        raise UserError(
            f"{path}: the images of shards are inside them; remove `image_root`",
            code="data_file_unreadable",
        )


def _refuse_several_kinds(path: Path, shards: Sequence[Path]) -> None:
    """Refuse a folder of shards that also has records of another kind, or none."""
    others = [*sorted(path.glob("*.parquet")), *(path / name for name in _METADATA)]
    others = [other for other in others if other.exists()]
    if not shards or others:
        found = f"{shards[0].name} and {others[0].name}" if shards else "no .tar file"
        raise UserError(
            f"{path}: found {found}; expected one kind of records, so give the file to read as "
            "`path`, or set `format`",
            code="data_file_unreadable",
        )


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return False
    return True


def _is_vqa(path: Path) -> bool:
    try:
        return not set(VQA_KEYS).isdisjoint(split_object(map_file(path)))
    except StrictJsonError:
        return False


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


def _open_folder(path: Path, container: str, follow_symlinks: bool) -> RawRecords:
    metadata = [path / name for name in _METADATA if (path / name).exists()]
    files = sorted(path.glob("*.parquet"))
    if container in ("imagefolder", "auto") and metadata:
        others = [*metadata[1:], *(files if container == "auto" else [])]
        if others:
            raise UserError(
                f"{path}: has {metadata[0].name} and {others[0].name}; give the one to read as "
                f"`path`, e.g. {metadata[0]}",
                code="data_file_unreadable",
            )
        opened = open_csv(metadata[0]) if metadata[0].suffix == ".csv" else _open_lines(metadata[0])
        return replace(opened, is_image_folder=True)
    if container == "imagefolder" or not (container == "captions" or files):
        below = sorted({found.parent for name in _METADATA for found in path.glob(f"*/{name}")})
        if below:
            names = ", ".join(str(folder) for folder in below)
            raise UserError(
                f"{path}: has metadata in its subfolders only; give one of them: {names}",
                code="data_file_unreadable",
            )
    if container == "imagefolder":
        raise UserError(
            f"{path}: no {' or '.join(_METADATA)} in it, which an imagefolder needs",
            code="data_file_unreadable",
        )
    if container == "captions":
        return open_caption_folder(path, follow_symlinks=follow_symlinks)
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UserError(
            f"{path}: a `datasets` folder with splits ({', '.join(splits)}); name one of them, "
            f"e.g. {path / splits[0] if splits else path}",
            code="data_file_unreadable",
        )
    if (path / "state.json").exists():
        return _open_datasets_folder(path)
    if files:
        return _open_parquet(files)
    return open_caption_folder(path, follow_symlinks=follow_symlinks)


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
    datasets = import_extra("datasets", "datasets")
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
