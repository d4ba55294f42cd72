"""Pictures of evaluations, by COCO's numeric id."""

import json
import re
from pathlib import Path
from typing import Any, Final

from data_tools.mixing.config import GuardLists
from vlm_sft.errors import UserError

_COCO_FILE: Final = re.compile(r"(?:COCO_[a-z]+20\d\d_)?(\d{12})")
_ID: Final = re.compile(r"(?:.*/)?(?:COCO_[a-z]+20\d\d_)?0*(\d{1,12})(?:\.[A-Za-z]{3,4})?")


def coco_id(path: Path) -> int | None:
    """The id in a file name of COCO's form, twelve digits; None for other names."""
    match = _COCO_FILE.fullmatch(path.stem)
    return int(match[1]) if match else None


def guarded_ids(config: GuardLists) -> frozenset[int]:
    """The ids that the lists name.

    Raises:
        UserError: A list is not there, or an entry of it is no COCO id.
    """
    found: set[int] = set()
    for files in config.lists.values():
        for name in [files] if isinstance(files, str) else files:
            found.update(_read(Path(name)))
    return frozenset(found)


def _read(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file", code="data_file_missing") from None
    entries: list[Any]
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})", code="json_syntax") from None
    else:
        entries = text.split()
    return [_id_of(entry, path) for entry in entries]


def _id_of(entry: Any, path: Path) -> int:
    match = _ID.fullmatch(str(entry)) if isinstance(entry, str | int) else None
    if match is None:
        raise UserError(
            f"{path}: found {str(entry)[:60]!r}, expected ids or file names of COCO's pictures, "
            "one a line or as a JSON list"
        )
    return int(match[1])
