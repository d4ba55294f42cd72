"""Find the columns of a table, and turn its rows into records: a question and answer, or a caption.

A table is a CSV file or any file whose rows are flat objects. Which column has which part is given
in the configuration (`columns`) or recognized by the names in `NAMES`.
"""

import difflib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from vlm_sft.config.schema import ColumnNames
from vlm_sft.data.record_formats import Columns, RawRecord
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.reading import StrictJsonError, parse_json

NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "id": ("id", "record_id", "question_id"),
    "image": (
        "image", "images", "image_path", "image_file", "image_name", "img", "img_path",
        "file_name", "file_names", "filename", "file_path", "filepath",
    ),
    "question": ("question", "query", "prompt", "instruction"),
    "answer": ("answer", "response", "output", "completion"),
    "text": ("text", "caption", "description"),
    "messages": ("messages", "conversations"),
}  # fmt: skip
"""Column names that are recognized, in any case and with spaces or hyphens for underscores."""

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of image files, in lower case."""

_RECOGNIZED: Final = frozenset({"input"}.union(*NAMES.values()))
_LOGGED: Final[set[tuple[str, Columns, frozenset[str]]]] = set()

logger = logging.getLogger(__name__)


def find_columns(
    header: Sequence[str], names: ColumnNames, where: str, example: Mapping[str, Any]
) -> Columns:
    """Return the columns of a table, or of one row without a header, and log them once.

    Args:
        header: Names of the columns.
        names: Columns that the configuration names; all others are recognized by their name.
        where: The table, for messages.
        example: A row with these columns.

    Raises:
        UserError: A named column does not exist, several columns could have the same part, or a
            part is missing.
    """
    for part, column in names:
        if column is not None and column not in header:
            near = difflib.get_close_matches(column, header, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = f"{where}: no column {column!r} (columns.{part}){hint}; {_listed(header)}"
            raise UserError(message, code="missing_column")
    named = {part: column for part, column in names if column is not None}
    texts_are_named = any(part in named for part in ("question", "answer", "text", "messages"))
    found: dict[str, str] = {}
    for part, known in NAMES.items():
        if part in named:
            found[part] = named[part]
        elif part in ("id", "image") or not texts_are_named:
            matching = [c for c in header if _plain(c) in known and c not in named.values()]
            if part == "id":
                matching = sorted(matching, key=lambda c: known.index(_plain(c)))[:1]
            if len(matching) > 1:
                raise UserError(
                    f"{where}: the columns {_quoted(matching)} could each be the {part}; name the "
                    f"right one, e.g. columns: {{{part}: {matching[0]}}}",
                    code="ambiguous_columns",
                )
            if matching:
                found[part] = matching[0]
    if "question" in found and _plain(found["question"]) == "instruction":
        extra = [column for column in header if _plain(column) == "input"]
        if extra:
            found["input"] = extra[0]
    columns = Columns(**found)
    _require_one_kind(columns, header, where, example)
    unused = [column for column in header if column not in found.values()]
    lost = frozenset(column for column in unused if _plain(column) in _RECOGNIZED)
    _log_columns(where, columns, lost, unused)
    return columns


def is_table(keys: Sequence[str]) -> bool:
    """Return whether a record's keys look like a row: a question and answer, or image and text."""
    found = {part for part, known in NAMES.items() for key in keys if _plain(key) in known}
    return {"question", "answer"} <= found or {"image", "text"} <= found


def is_image_name(value: object) -> bool:
    """Return whether a value is text that ends like the name of an image file."""
    return isinstance(value, str) and value.strip().lower().endswith(IMAGE_SUFFIXES)


def _require_one_kind(
    columns: Columns, header: Sequence[str], where: str, example: Mapping[str, Any]
) -> None:
    """Refuse a table that has no texts, texts of several kinds, or captions without images."""
    pair = [name for name in (columns.question, columns.answer) if name is not None]
    kinds = [[name] for name in (columns.messages, columns.text) if name is not None]
    kinds += [pair] if pair else []
    if len(kinds) > 1:
        known = " and ".join(_quoted(kind) for kind in kinds)
        raise UserError(
            f"{where}: the columns {known} are texts of different kinds; name those to train on, "
            "e.g. columns: {question: QUESTION, answer: ANSWER} or columns: {text: CAPTION}",
            code="ambiguous_columns",
        )
    if not kinds or len(pair) == 1:
        missing = "text (a caption) or question and answer"
        if pair:
            missing = "answer" if columns.answer is None else "question"
        part = missing.split()[0]
        raise UserError(
            f"{where}: no column for {missing}; {_listed(header)}. Name it, e.g. "
            f"columns: {{{part}: COLUMN}} (in a command: --columns {part}=COLUMN)",
            code="missing_column",
        )
    if columns.image is not None:
        return
    likely = [column for column in header if is_image_name(example.get(column))]
    if likely or columns.text is not None:
        hint = f"{likely[0]!r} looks like it" if likely else _listed(header)
        column = likely[0] if likely else "COLUMN"
        raise UserError(
            f"{where}: no column for the image; {hint}. Name it, e.g. "
            f"columns: {{image: {column}}} (in a command: --columns image={column})",
            code="missing_column",
        )


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip()).casefold()


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown


def _listed(header: Sequence[str]) -> str:
    return f"its columns are {_quoted(header)}"


def _log_columns(where: str, columns: Columns, lost: frozenset[str], unused: Sequence[str]) -> None:
    """Log the columns of a file unless this process has; a command opens its files several times.

    Rows without a header can each have other keys. They are logged again only if they differ in
    the columns that are taken, or in recognized ones that are not (`lost`).
    """
    if (where, columns, lost) not in _LOGGED and logger.isEnabledFor(logging.INFO):
        _LOGGED.add((where, columns, lost))
        taken = ", ".join(f"{part} = {column!r}" for part, column in columns.used().items())
        rest = f"; not used: {_quoted(unused)}" if unused else ""
        logger.info(f"{where}: columns {taken}{rest}")


# --- rows


def rows_to_records(
    rows: Iterator[RawRecord | RecordError],
    columns_of: Callable[[RawRecord], Columns | None],
    *,
    refuse_repeated: bool = False,
) -> Iterator[RawRecord | RecordError]:
    """Yield each row as a record in messages format, or the error of a row that has none.

    Args:
        rows: Rows by column name.
        columns_of: Returns the columns of a row; None for a record that is no row, which is
            yielded as it is. Raises RecordError if the row's columns cannot be found.
        refuse_repeated: Whether a row that repeats an earlier one is an error.
    """
    seen: dict[bytes, str] = {}
    for raw in rows:
        try:
            if isinstance(raw, RecordError):
                raise raw
            columns = columns_of(raw)
            record = raw.value if columns is None else _record(raw, columns)
            if refuse_repeated and columns is not None:
                _refuse_repeated(raw, columns, seen)
        except RecordError as error:
            yield error
            continue
        yield replace(raw, value=record)


def _record(raw: RawRecord, columns: Columns) -> dict[str, Any]:
    row = raw.value
    if not isinstance(row, Mapping):
        raise raw.error("format", f"expected a row of named columns, found {row!r}"[:200])
    record: dict[str, Any] = {}
    if columns.id is not None and row.get(columns.id) not in (None, ""):
        record["id"] = row[columns.id]
    images: list[Any] = []
    if columns.image is not None:
        value = row.get(columns.image)
        images = value if isinstance(value, list) else [value]
        if not images or any(image is None or image == "" for image in images):
            # Messages can have their images in their parts.
            if columns.messages is None:
                raise _empty(raw, columns.image)
            images = []
    if columns.messages is not None:
        turns = _turns(raw, columns.messages)
        is_llava = bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
        record["conversations" if is_llava else "messages"] = turns
        return {**record, "images": images} if images else record
    if columns.text is not None:
        question, answer = "", _cell(raw, columns.text)
    else:
        assert columns.question is not None and columns.answer is not None
        question, answer = _cell(raw, columns.question), _cell(raw, columns.answer)
        if columns.input is not None and row.get(columns.input):
            question += f"\n{_cell(raw, columns.input)}"
    # Parts and not one text: the template's separator comes between image and question, as in
    # `chat`, and `<image>` in a cell is ordinary text.
    parts = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "text", "text": question}] if question else []
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {**record, "messages": turns}


def _cell(raw: RawRecord, column: str) -> str:
    value = raw.value.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _empty(raw, column)
    if not isinstance(value, str):
        message = f"column {column!r}: expected text, found {value!r}"[:200]
        raise raw.error("bad_turn", message)
    return value


def _turns(raw: RawRecord, column: str) -> list[Any]:
    value = raw.value.get(column)
    if isinstance(value, str):
        if not value.strip():
            raise _empty(raw, column)
        try:
            value = parse_json(value)
        except StrictJsonError as error:
            raise raw.error(error.reason, f"column {column!r}: {error}") from None
    if not isinstance(value, list):
        message = f"column {column!r}: expected a list of turns, found {value!r}"[:200]
        raise raw.error("format", message)
    return value


def _refuse_repeated(raw: RawRecord, columns: Columns, seen: dict[bytes, str]) -> None:
    """Refuse a row whose parts, apart from the id, are those of an earlier row."""
    cells = {part: raw.value.get(column) for part, column in columns.used().items()}
    if isinstance(cells.get("image"), str):
        cells["image"] = os.path.normpath(cells["image"])
    parts = [value for part, value in cells.items() if part != "id"]
    digest = hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=12).digest()
    earlier = seen.setdefault(digest, raw.where)
    if earlier != raw.where:
        message = f"repeats {earlier}: the same file name and the same text; remove one of them"
        raise raw.error("repeated_row", message)


def _empty(raw: RawRecord, column: str) -> RecordError:
    message = f"the cell of column {column!r} is empty; fill it, or remove the row"
    return raw.error("empty_cell", message)
