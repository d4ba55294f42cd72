"""Split large JSON files into their items, without parsing the items or holding the file."""

import codecs
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from vlm_sft.errors import UserError
from vlm_sft.utils.reading import StrictJsonError, open_regular

Bytes = bytes | memoryview | mmap.mmap
RawJson = bytes | msgspec.Raw
"""The JSON text of one item, as the file has it; `bytes(item)` copies it."""

_BLOCK: Final = 2**20
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_LENIENT: Final = json.JSONDecoder(parse_int=str, parse_float=str)


def map_file(path: Path) -> Bytes:
    """Map a regular file of UTF-8 text into memory, without its byte order mark.

    The operating system loads and drops pages as they are used, so a file of any size takes no
    memory of this process.

    Raises:
        UserError: The file is not UTF-8; the message names line and byte.
        OSError: As `open_regular`.
    """
    with open_regular(path) as file:
        if not file.read(1):
            return b""
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        num_held = len(decoder.getstate()[0])  # bytes of a character that the last block cut
        try:
            decoder.decode(block, final=start + _BLOCK >= len(data))
        except UnicodeDecodeError as error:
            byte = start - num_held + error.start
            line = _line_of(data, byte)
            message = f"{path}:{line}: not UTF-8 (byte {byte}); save the file as UTF-8"
            raise UserError(message, code="not_utf8") from None
    mark = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
    return memoryview(data)[mark:]


def split_list(path: Path, data: Bytes) -> list[RawJson]:
    """Return the items of the file's one JSON list; none for a file of white space.

    Raises:
        UserError: The file is not one JSON list; the message names line and column.
    """
    try:
        return msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        # msgspec refuses the whole file for a syntax error, which is reported with its place, but
        # also for NaN and for half a surrogate pair, which are the fault of one record alone.
        return [item.encode() for item in _items_of_text(path, bytes(data))]


def _items_of_text(path: Path, data: bytes) -> Iterator[str]:
    """Yield the items of a JSON list by the standard library, with the whole text in memory."""
    text = data.decode("utf-8")

    def skip_space(position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        return match.end()

    def syntax_error(position: int, problem: str) -> UserError:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        problem += comma_hint(text, position)
        return UserError(f"{path}:{line}:{column}: not valid JSON: {problem}", code="json_syntax")

    position = skip_space(0)
    if position == len(text):
        return
    if text[position] != "[":
        raise syntax_error(position, "expected a list")
    position, index = skip_space(position + 1), 0
    closed = text[position : position + 1] == "]"
    while not closed:
        try:
            end = _LENIENT.raw_decode(text, position)[1]
        except json.JSONDecodeError as error:
            raise syntax_error(error.pos, error.msg) from None
        except RecursionError:
            message = f"{path}[{index}]: JSON nested too deeply to be a record; fix or remove it"
            raise UserError(message, code="json_depth") from None
        yield text[position:end]
        position, index = skip_space(end), index + 1
        closed = text[position : position + 1] == "]"
        if not closed:
            if text[position : position + 1] != ",":
                raise syntax_error(position, "expected ',' or ']' after a record")
            position = skip_space(position + 1)
    position = skip_space(position + 1)
    if position != len(text):
        raise syntax_error(position, "expected nothing after the end of the list")


def comma_hint(text: str, position: int) -> str:
    """Return advice for a syntax error after a comma that has nothing after it."""
    if text[:position].rstrip().endswith(",") and text[position : position + 1] in ("]", "}"):
        return " (remove the comma before the closing bracket)"
    return ""


class _Key(str):
    """A key of an object; msgspec reports each one to `split_object`."""


def split_object(data: Bytes) -> dict[str, RawJson]:
    """Return the values of the file's one JSON object by key, in the file's order.

    Raises:
        StrictJsonError: The text is not one JSON object, or a key appears twice.
    """
    keys: list[str] = []

    def note_key(kind: type[Any], key: str) -> _Key:
        keys.append(key)
        return _Key(key)

    values: Mapping[str, RawJson]
    try:
        values = msgspec.json.decode(data, type=dict[_Key, msgspec.Raw], dec_hook=note_key)
    except RecursionError:
        raise StrictJsonError("json_depth", "lists within lists, nested too deeply") from None
    except msgspec.DecodeError as error:
        if "truncated" in str(error):  # nothing to repair, and the file may be large
            raise StrictJsonError("json_syntax", str(error)) from None
        # As in `split_list`: NaN or half a surrogate pair is the fault of one value alone.
        members = list(_members_of_text(bytes(data)))
        keys, values = [key for key, _ in members], dict(members)
    if len(values) != len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise StrictJsonError("json_duplicate_key", f"the key {twice!r} appears twice")
    return {str(key): value for key, value in values.items()}


def _members_of_text(data: bytes) -> Iterator[tuple[str, RawJson]]:
    """Yield key and value of a JSON object by the standard library, with the text in memory."""
    text = data.decode("utf-8")

    def after_space(position: int, expected: str) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        if text[match.end() : match.end() + 1] not in tuple(expected):
            raise json.JSONDecodeError(f"expected {' or '.join(expected)}", text, match.end())
        return match.end()

    try:
        position = after_space(0, "{") + 1
        while text[position - 1] != "}":
            start = after_space(position, '"')
            key, position = _LENIENT.raw_decode(text, start)
            start = after_space(position, ":") + 1
            space = _SPACE.match(text, start)
            assert space is not None
            start = space.end()
            position = _LENIENT.raw_decode(text, start)[1]
            yield key, text[start:position].encode()
            position = after_space(position, ",}") + 1
        if _SPACE.fullmatch(text, position) is None:
            raise json.JSONDecodeError("expected nothing after the object", text, position)
    except json.JSONDecodeError as error:
        place = f"{error.msg} in line {error.lineno}, column {error.colno}"
        raise StrictJsonError("json_syntax", place) from None


def _line_of(data: mmap.mmap, byte: int) -> int:
    blocks = range(0, byte, _BLOCK)
    return 1 + sum(data[start : min(start + _BLOCK, byte)].count(b"\n") for start in blocks)
