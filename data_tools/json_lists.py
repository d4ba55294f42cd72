"""Read the lists of a large JSON object, such as a COCO annotation file, element by element."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vlm_sft.errors import UserError
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.image_paths import looked_for
from vlm_sft.utils.json_items import map_file, split_list, split_object
from vlm_sft.utils.reading import StrictJsonError


class Element(NamedTuple):
    """One element of one list: `document[key][position]` is `value`."""

    key: str
    position: int
    value: Any


def read_lists(
    path: Path, forms: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> Iterator[Element]:
    """Yield the elements of the lists that the file's object has under given keys, in its order.

    The file is mapped into memory, and one element at a time is decoded.

    Args:
        path: A JSON file with one object.
        forms: Types of the elements by key, as msgspec knows them; all these lists must exist.
        optional: The same for lists that may exist.

    Raises:
        UserError: The file does not exist or is not a JSON object in UTF-8, a key appears twice, a
            list is missing, or an element has another form.
    """
    try:
        data = map_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file{looked_for(path)}", code="data_file_missing"
        ) from None
    if bytes(data[:4096]).lstrip()[:1] != b"{":
        raise _not_coco(path, next(iter(forms)))
    try:
        values = split_object(data)
    except StrictJsonError as error:
        message = f"{path}: is not valid JSON ({error}); download or write it again"
        raise UserError(message, code="json_syntax") from None
    for key in forms:
        if key not in values:
            raise _not_coco(path, key)
    known = {**forms, **(optional or {})}
    for key, text in values.items():
        if key not in known:
            continue
        if bytes(memoryview(text)[:1]) != b"[":
            raise _not_coco(path, key)
        decoder = msgspec.json.Decoder(known[key])
        for position, item in enumerate(split_list(path, memoryview(text))):
            try:
                value = decoder.decode(item)
            except (msgspec.DecodeError, RecursionError):
                value = _decode_slowly(bytes(item), known[key], f"{path}: {key}[{position}]")
            yield Element(key, position, value)


def _decode_slowly(text: bytes, form: Any, where: str) -> Any:
    """Decode an element that msgspec refuses, because of its form or of half a surrogate pair."""
    try:
        return msgspec.convert(json.loads(text), form)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        what = what.replace("Expected", "expected").replace(", got", ", found")
        place = place.rstrip("`").lstrip(".")
        found = shortened(text.decode(errors="replace"), 100)
        raise UserError(f"{where}: {place + ': ' if place else ''}{what} in {found}") from None
    except (ValueError, RecursionError) as error:  # e.g. an integer of thousands of digits
        message = f"{where}: is not valid JSON ({error}); download or write the file again"
        raise UserError(message, code="json_syntax") from None


def _not_coco(path: Path, key: str) -> UserError:
    hint = "; boxes are in COCO's instances_*.json, not in captions_*.json"
    return UserError(
        f"{path}: expected COCO's form, an object with a list {key!r}, and found none"
        + (hint if key == "categories" else ""),
        code="data_file_unreadable",
    )
