"""Read rows of CSV and TSV files."""

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vlm_sft.data.record_formats import MAX_RECORD_BYTES, RawRecord, RawRecords
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.reading import open_regular

_DELIMITERS: Final = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def open_csv(path: Path) -> RawRecords:
    """Open a table with a header line; quoting as in RFC 4180, also in TSV files.

    The delimiter is the tab for `.tsv`, and else the one of comma, semicolon, tab and bar that
    divides the header line into most columns. A cell is at most 64 MiB.

    Raises:
        UserError: There is no header, a column name is empty or appears twice, or, when the rows
            are read, the text is not UTF-8 or a quote does not end.
    """
    # The limit of the csv module is global and by default 128 KiB, less than a long answer.
    csv.field_size_limit(MAX_RECORD_BYTES)
    total = -1
    with open_regular(path) as file:
        while block := file.read(2**20):
            total += block.count(b"\n")
        total += 1  # an upper bound: the last line may not end, and cells can have line breaks
    first_line = next(_lines(path), "")
    candidates = ["\t"] if path.suffix.lower() == ".tsv" else list(_DELIMITERS)
    # `max` takes the first of equals: a header of one column is read with the comma.
    delimiter = max(candidates, key=lambda mark: len(_cells(first_line, mark)))
    header = next(csv.reader(_lines(path), delimiter=delimiter), [])
    header = [name.strip() for name in header]
    repeated = [name for name in header if header.count(name) > 1]
    if not header or "" in header or repeated:
        found = f"{repeated[0]!r} appears twice" if repeated else "a name is empty"
        raise UserError(
            f"{path}:1: expected a header line with the names of the columns, but "
            f"{found if header else 'the line is empty'}",
            code="missing_column",
        )
    return RawRecords(max(total, 0), _rows(path, header, delimiter), header=header)


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _rows(path: Path, header: list[str], delimiter: str) -> Iterator[RawRecord | RecordError]:
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    next(reader)
    while True:
        line = reader.line_num + 1
        where, fallback_id = f"{path}:{line}", f"line-{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                # Everything below is part of this cell, so no record of it can be accounted for.
                raise UserError(
                    f"{where}: a quote begins in this row and does not end before the end of the "
                    'file; close it, and write a quote within a quoted cell twice ("")',
                    code="bad_row",
                ) from None
            message = f'{error}; write a quote within a quoted cell twice ("")'
            yield RecordError("bad_row", message, record_id=fallback_id, where=where)
            continue
        if cells is None:
            return
        if not cells:
            continue  # an empty line
        if len(cells) != len(header):
            message = (
                f"has {len(cells)} cells, but the header has {len(header)} (delimiter: "
                f"{_DELIMITERS[delimiter]}); put a cell that contains the delimiter in quotes"
            )
            yield RecordError("bad_row", message, record_id=fallback_id, where=where)
            continue
        yield RawRecord(dict(zip(header, cells, strict=True)), where, fallback_id)


def _lines(path: Path) -> Iterator[str]:
    """Yield lines of text.

    Raises:
        UserError: A line is not UTF-8.
    """
    with open_regular(path) as file:
        number = 0
        while data := file.readline(MAX_RECORD_BYTES):
            number += 1
            if number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = data[error.start]
                raise UserError(
                    f"{path}:{number}: not UTF-8 (byte 0x{byte:02x} at position {error.start} of "
                    "the line); save the file as UTF-8 (in Excel: CSV UTF-8)",
                    code="not_utf8",
                ) from None
