"""Read rows of CSV and TSV files."""

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from vlm_sft.data.columns import is_image_name
from vlm_sft.data.record_formats import MAX_RECORD_BYTES, RawRecord, RawRecords
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.filesystem import warn_once
from vlm_sft.utils.reading import open_regular

_DELIMITERS: Final = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_EXCEL_LINE: Final = re.compile(r'"?sep=([,;|\t])"?\r?\n?')


def open_csv(path: Path) -> RawRecords:
    """Open a table with a header line; quoting as in RFC 4180, also in TSV files.

    The delimiter is the tab for `.tsv`, the one of Excel's first line `sep=;`, or the one of comma,
    semicolon, tab and bar that divides the header line into most columns. A cell is at most 64 MiB.
    Lines end with LF, CR LF or CR.

    Raises:
        UserError: There is no header, a column name is empty or appears twice, or, when the rows
            are read, the text is not UTF-8 or a quote does not end where its cell ends.
    """
    # The limit of the csv module is global and by default 128 KiB, less than a long answer.
    csv.field_size_limit(MAX_RECORD_BYTES)
    total = 0
    with open_regular(path) as file:
        while block := file.read(2**20):
            total += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
    # An upper bound without the header: the last line may not end, and cells can have line breaks.
    first_line = next(_lines(path), "")
    if "\0" in first_line:
        message = f"{path}:1: has NUL characters; if it is UTF-16, save the file as UTF-8"
        raise UserError(message, code="not_utf8")
    mark = _EXCEL_LINE.fullmatch(first_line)
    skipped = 0 if mark is None else 1
    if mark is not None:
        delimiter = mark[1]
    else:
        candidates = ["\t"] if path.suffix.lower() == ".tsv" else list(_DELIMITERS)
        # `max` takes the first of equals: a header of one column is read with the comma.
        delimiter = max(candidates, key=lambda mark: len(_cells(first_line, mark)))
    where = f"{path}:{skipped + 1}"
    lines = itertools.islice(_lines(path), skipped, None)
    try:
        header = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    except csv.Error:
        raise UserError(
            f"{where}: a quote in the header line does not end where its cell ends; close it, or "
            "remove it",
            code="bad_row",
        ) from None
    # Blanks after the delimiters of the header are after those of the rows, too.
    blanks = any(name.startswith(" ") for name in header[1:])
    header = [name.strip() for name in header]
    repeated = [name for name in header if header.count(name) > 1]
    if not header or "" in header or repeated:
        found = f"{repeated[0]!r} appears twice" if repeated else "a name is empty"
        raise UserError(
            f"{where}: expected a header line with the names of the columns, but "
            f"{found if header else 'the line is empty'}",
            code="missing_column",
        )
    return RawRecords(total, _rows(path, header, delimiter, skipped, blanks), header=header)


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _rows(
    path: Path, header: list[str], delimiter: str, skipped: int, blanks: bool
) -> Iterator[RawRecord | RecordError]:
    row_lines: list[str] = []
    lines = _kept(itertools.islice(_lines(path), skipped, None), row_lines)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=blanks)
    next(reader)
    doubtful: list[str] = []
    while True:
        row_lines.clear()
        line = skipped + reader.line_num + 1
        where, fallback_id = f"{path}:{line}", f"line-{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            at_end = "unexpected end of data" in str(error)
            last = skipped + reader.line_num
            if at_end or last > line:
                # The lines below are part of this cell, so which rows they are is unknown.
                end = "before the end of the file" if at_end else "where its cell ends"
                raise UserError(
                    f"{where}: a quote begins in this row and does not end {end} (lines {line} "
                    f"to {last} were read as one row); close it, and write a quote within a quoted "
                    'cell twice ("")',
                    code="bad_row",
                ) from None
            message = f'{error}; write a quote within a quoted cell twice ("")'
            yield RecordError("bad_row", message, record_id=fallback_id, where=where)
            continue
        if cells is None:
            break
        if not cells:
            continue  # an empty line
        if any("\0" in cell for cell in cells):
            message = "has a NUL character, which is no text; remove it"
            yield from _bad_lines(path, line, skipped + reader.line_num, message)
            continue
        if len(cells) != len(header):
            message = (
                f"has {len(cells)} cells, but the header has {len(header)} (delimiter: "
                f"{_DELIMITERS.get(delimiter, delimiter)}); put a cell that contains the delimiter "
                "in quotes"
            )
            yield from _bad_lines(path, line, skipped + reader.line_num, message)
            continue
        swallowed = _swallowed(row_lines, cells, delimiter)
        if swallowed == "certain":
            message = "a line within a cell is a row of its own; close the quote before it"
            yield from _bad_lines(path, line, skipped + reader.line_num, message)
            continue
        if swallowed == "possible":
            doubtful.append(where)
        yield RawRecord(dict(zip(header, cells, strict=True)), where, fallback_id)
    if doubtful:
        warn_once(
            f"{path}: {len(doubtful):,} rows have a cell with a line that could be a row of its "
            f"own, the first at {doubtful[0]}; if a quote is missing there, these rows are lost"
        )


def _bad_lines(path: Path, first: int, last: int, message: str) -> Iterator[RecordError]:
    """Yield an error for each line of a bad row: a wrong quote can have made one row of several."""
    if last > first:
        message = f"lines {first} to {last} were read as one row: {message}"
    for line in range(first, last + 1):
        yield RecordError("bad_row", message, record_id=f"line-{line}", where=f"{path}:{line}")


def _swallowed(
    lines: Sequence[str], cells: Sequence[str], delimiter: str
) -> Literal["certain", "possible"] | None:
    """Return whether the lines of one row seem to be several rows, joined by a forgotten quote.

    It is certain if a line has a file name of an image in the row's image column, and possible if
    it has as many cells as the row, as lines of code or lists can have, too.

    Args:
        lines: The lines that the row was read from.
        cells: Its cells.
        delimiter: The delimiter of the file.
    """
    if len(lines) == 1 or len(cells) == 1:
        return None
    images = [index for index, cell in enumerate(cells) if is_image_name(cell)]
    found: Literal["possible"] | None = None
    for number, line in enumerate(lines):
        line = line.rstrip("\r\n")
        if number == 0:  # what follows the last quote is within a cell, the cells before are not
            before, _, text = line.rpartition('"')
            start, is_cut = max(len(_cells(before, delimiter)) - 1, 0), False
        else:  # what follows the first quote may be outside of the cell
            text, quote, _ = line.partition('"')
            start, is_cut = 0, bool(quote)
        parts = text.split(delimiter)
        is_whole = not is_cut and start + len(parts) == len(cells)
        inside = range(start + (number == 0), start + len(parts) - is_cut)
        names = [i for i in images if i in inside and is_image_name(parts[i - start])]
        if names and (is_cut or is_whole):
            return "certain"
        if number and is_whole and all(part and part == part.lstrip() for part in parts):
            found = "possible"
    return found


def _kept(lines: Iterator[str], kept: list[str]) -> Iterator[str]:
    """Yield lines, and append each to `kept`."""
    for line in lines:
        kept.append(line)
        yield line


def _lines(path: Path) -> Iterator[str]:
    """Yield lines of text with their ends: LF, CR LF or CR.

    Raises:
        UserError: A line is not UTF-8.
    """
    with open_regular(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            while line := text.readline(MAX_RECORD_BYTES):
                yield line
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _not_utf8(path: Path) -> UserError:
    """Return the error of the first line that is not UTF-8."""
    number, place = 0, "not UTF-8"
    with open_regular(path) as file:
        while data := file.readline(MAX_RECORD_BYTES):
            number += 1
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                place = (
                    f"not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start} of the "
                    "line)"
                )
                break
    return UserError(
        f"{path}:{number}: {place}; save the file as UTF-8 (in Excel: CSV UTF-8)", code="not_utf8"
    )
