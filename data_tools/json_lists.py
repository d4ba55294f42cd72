"""Read the lists of a large JSON object, such as a COCO annotation file, element by element."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.errors import UserError
from vlm_sft.utils.json_items import map_file, split_list, split_object
from vlm_sft.utils.reading import StrictJsonError


@dataclass(frozen=True)
class Element:
    """One element of one list: `document[key][position]` is `value`."""

    key: str
    position: int
    value: Any


def read_lists(
    path: Path, keys: Collection[str], optional: Collection[str] = ()
) -> Iterator[Element]:
    """Yield the elements of the lists that the file's object has under `keys`, in the file's order.

    One element at a time is in memory. Values under other keys are skipped.

    Args:
        path: A JSON file with one object.
        keys: Lists that must exist.
        optional: Lists that may exist.

    Raises:
        UserError: The file does not exist or is not a JSON object in UTF-8, a key appears twice,
            or a list is missing.
    """
    try:
        data = map_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file", code="data_file_missing") from None
    if bytes(data[:4096]).lstrip()[:1] != b"{":
        raise _not_coco(path, next(iter(keys)))
    try:
        values = split_object(data)
    except StrictJsonError as error:
        raise _invalid(path, str(error)) from None
    for key in keys:
        if key not in values:
            raise _not_coco(path, key)
    for key, text in values.items():
        if key not in keys and key not in optional:
            continue
        if bytes(memoryview(text)[:1]) != b"[":
            raise _not_coco(path, key)
        for position, item in enumerate(split_list(path, memoryview(text))):
            try:
                yield Element(key, position, json.loads(bytes(item)))
            except ValueError as error:  # an integer of thousands of digits
                raise _invalid(path, f"{key}[{position}]: {error}") from None


def _invalid(path: Path, problem: str) -> UserError:
    message = f"{path}: is not valid JSON ({problem}); download or write it again"
    return UserError(message, code="json_syntax")


def _not_coco(path: Path, key: str) -> UserError:
    return UserError(
        f"{path}: expected COCO's form, an object with a list {key!r}, and found none",
        code="data_file_unreadable",
    )
