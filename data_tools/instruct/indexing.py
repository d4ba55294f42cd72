"""The annotations of a run: read and checked once, then one picture a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict

from data_tools.coco import Box, Picture
from data_tools.instruct.folder import RunFolder
from vlm_sft.atomic import atomic_open
from vlm_sft.errors import UserError


def read_pictures(folder: RunFolder) -> dict[int, Picture]:
    """The indexed pictures by id, in the order of ids.

    Raises:
        UserError: The annotations have not been indexed.
    """
    try:
        with folder.pictures.open("rb") as file:
            pictures = [_picture(json.loads(line)) for line in file]
    except FileNotFoundError:
        raise UserError(
            f"{folder.pictures}: there is no such file; run `index` first",
            code="data_file_missing",
        ) from None
    return {picture.id: picture for picture in pictures}


def read_categories(folder: RunFolder) -> tuple[str, ...]:
    """Names of all categories that the annotations know, with a box or without.

    Raises:
        UserError: The annotations have not been indexed.
    """
    try:
        index = json.loads(folder.index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder.index}: there is no such file; run `index` first", code="data_file_missing"
        ) from None
    return tuple(index["categories"])


def write_pictures(folder: RunFolder, pictures: Iterable[Picture]) -> None:
    """Replace the indexed pictures."""
    with atomic_open(folder.pictures) as file:
        for picture in pictures:
            file.write(json.dumps(asdict(picture), ensure_ascii=False).encode() + b"\n")


def _picture(values: dict[str, object]) -> Picture:
    known: dict[str, object] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    known["boxes"] = tuple(Box(**box) for box in values["boxes"])  # type: ignore[attr-defined]
    return Picture(**known)  # type: ignore[arg-type]
