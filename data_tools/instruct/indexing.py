"""The annotations of a run: read and checked once, then one picture a line."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from data_tools.coco import Box, CocoIndex, Picture, read_coco
from data_tools.digests import file_digest
from data_tools.image_check import usable_pictures
from data_tools.instruct.config import CocoConfig, InstructConfig
from data_tools.instruct.folder import RunFolder
from data_tools.instruct.options import stage_parser
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import owned_open, write_owned_json
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import open_regular, read_json

FORMAT: Final = 2
"""Raised when this module would write other files from the same annotations."""

_PICTURE_FIELDS: Final = tuple(field.name for field in fields(Picture))
_BOX_FIELDS: Final = tuple(field.name for field in fields(Box))


def command(config: InstructConfig, options: Sequence[str]) -> None:
    """Read and check the annotations, unless `pictures.jsonl` is of these very files."""
    stage_parser("index", __doc__).read(options)
    if config.coco.instances is None and config.coco.captions is None:
        raise UserError(
            "give coco.instances, coco.captions or both: there is nothing to build from"
        )
    folder = RunFolder(Path(config.output_dir))
    inputs = _inputs(config.coco)
    told = _up_to_date(folder, inputs)
    if told is None:
        told = _index(folder, inputs, config.coco)
    else:
        echo(
            f"{folder.pictures}: made from these very files before; nothing to do", file=sys.stdout
        )
    echo("\n".join(_table(told)), file=sys.stdout)


def read_pictures(folder: RunFolder) -> dict[int, Picture]:
    """The indexed pictures by id, in the order of ids.

    Raises:
        UserError: The annotations have not been indexed.
    """
    try:
        with open_regular(folder.pictures) as file:
            pictures = [_read_picture(line, folder.pictures, n) for n, line in enumerate(file, 1)]
    except FileNotFoundError:
        raise _not_indexed(folder.pictures) from None
    return {picture.id: picture for picture in pictures}


def read_categories(folder: RunFolder) -> tuple[str, ...]:
    """Names of all categories that the annotations know, with a box or without.

    Raises:
        UserError: The annotations have not been indexed.
    """
    try:
        index = read_json(folder.index)
    except FileNotFoundError:
        raise _not_indexed(folder.index) from None
    categories = index.get("categories") if isinstance(index, dict) else None
    if not isinstance(categories, dict):
        raise _damaged(str(folder.index))
    return tuple(categories)


def write_pictures(folder: RunFolder, pictures: Iterable[Picture]) -> str:
    """Replace the indexed pictures; returns the file's SHA-256."""
    digest = hashlib.sha256()
    with owned_open(folder.pictures) as file:
        for picture in pictures:
            line = json.dumps(_plain(picture), ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
    return digest.hexdigest()


def _read_picture(line: bytes, path: Path, number: int) -> Picture:
    try:
        picture = _picture(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(f"{path}:{number}") from None
    return picture


def _damaged(where: str) -> UserError:
    return UserError(
        f"{where}: was damaged or not written by this version; delete the file and run `index` "
        "again",
        code="json_syntax",
    )


def _not_indexed(path: Path) -> UserError:
    return UserError(f"{path}: there is no such file; run `index` first", code="data_file_missing")


def _plain(picture: Picture) -> dict[str, Any]:
    """As `dataclasses.asdict`, at a tenth of its time: a picture has many boxes."""
    values = {name: getattr(picture, name) for name in _PICTURE_FIELDS}
    boxes = [{name: getattr(box, name) for name in _BOX_FIELDS} for box in picture.boxes]
    return {**values, "boxes": boxes}


def _picture(values: dict[str, Any]) -> Picture:
    boxes = tuple(Box(**box) for box in values.pop("boxes"))
    captions, caption_ids = tuple(values.pop("captions")), tuple(values.pop("caption_ids"))
    return Picture(**values, boxes=boxes, captions=captions, caption_ids=caption_ids)


def _index(folder: RunFolder, inputs: dict[str, Any], config: CocoConfig) -> dict[str, Any]:
    aside = "; coco.max_faulty=1 sets aside whatever is faulty"
    index = read_coco(_path(config.instances), _path(config.captions), config.max_faulty, aside)
    pictures = usable_pictures(index, Path(config.images), follow_symlinks=config.follow_symlinks)
    remedy = (
        "; coco.images is to be the folder these pictures lie in, and coco.max_faulty=1 takes "
        "what is there"
    )
    index.findings.require_few({"picture": len(index.pictures)}, config.max_faulty, remedy)
    if not pictures:
        raise UserError(f"{config.images}: not one annotated picture is there", code="no_records")
    written = write_pictures(folder, track(pictures, description="writing pictures"))
    told = _told(index, pictures, inputs, written)
    write_owned_json(folder.index, told)
    return told


def _told(
    index: CocoIndex, pictures: Sequence[Picture], inputs: dict[str, Any], written: str
) -> dict[str, Any]:
    """The content of `index.json`: without paths, so that the same files give the same bytes."""
    frequencies = CocoIndex(tuple(pictures), index.categories).frequencies()
    boxes = Counter(box.category for picture in pictures for box in picture.boxes)
    of_license = Counter(picture.license for picture in pictures)
    return {
        "format": FORMAT,
        "inputs": inputs,
        "pictures_sha256": written,
        "pictures": {
            "annotated": len(index.pictures),
            "indexed": len(pictures),
            "with_captions": sum(bool(picture.captions) for picture in pictures),
            "with_boxes": sum(bool(picture.boxes) for picture in pictures),
            "by_split": dict(
                sorted(Counter(picture.split or "unknown" for picture in pictures).items())
            ),
        },
        "captions": sum(len(picture.captions) for picture in pictures),
        "boxes": boxes.total(),
        "categories": {
            name: {"pictures": frequencies[name], "boxes": boxes[name]} for name in index.categories
        },
        "licenses": {
            str(number): {**index.licenses.get(number, {}), "pictures": of_license[number]}
            for number in sorted(n for n in of_license if n is not None)
        },
        "pictures_without_license": of_license[None],
        "findings": index.findings.told(),
    }


def _table(told: dict[str, Any]) -> Iterator[str]:
    pictures = told["pictures"]
    used = sum(bool(found["boxes"]) for found in told["categories"].values())
    yield (
        f"{pictures['indexed']:,} of {pictures['annotated']:,} annotated pictures: "
        f"{pictures['with_captions']:,} with captions ({told['captions']:,}), "
        f"{pictures['with_boxes']:,} with boxes ({told['boxes']:,} boxes; {used:,} of "
        f"{len(told['categories']):,} categories occur)"
    )
    for found in told["findings"].values():
        lost = found["consequence"] != "told"
        example = f": {found['consequence']}, e.g. {found['examples'][0]}" if lost else ""
        yield f"{found['count']:>9,}  {found['meaning']}{example}"
    for number, entry in told["licenses"].items():
        yield f"{entry['pictures']:>9,}  under licence {number}: {entry.get('name', 'not named')}"
    if told["pictures_without_license"]:
        yield f"{told['pictures_without_license']:>9,}  of unknown licence"


def _inputs(config: CocoConfig) -> dict[str, Any]:
    """What the index is made of, by content; pictures by name and size in bytes."""
    inputs: dict[str, Any] = {
        "max_faulty": config.max_faulty,
        "follow_symlinks": config.follow_symlinks,
    }
    for name in ("instances", "captions"):
        path = _path(getattr(config, name))
        inputs[name] = None if path is None else {"file": path.name, "sha256": _digest(path)}
    inputs["images"] = _listing(Path(config.images))
    return inputs


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; give your annotation files as coco.instances and "
            "coco.captions, in the configuration or behind it as coco.instances=FILE",
            code="data_file_missing",
        ) from None


def _listing(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"coco.images {folder}: is not a folder; give the one the pictures lie in",
            code="image_missing",
        )
    digest, count = hashlib.sha256(), 0
    for name, size in _files(folder, ""):
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        count += 1
    return {"files": count, "sha256": digest.hexdigest()}


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Names below the folder and sizes in bytes, in the order of names."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _files(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size


def _up_to_date(folder: RunFolder, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The content of `index.json` where it and the pictures are what these inputs give."""
    try:
        told: dict[str, Any] = json.loads(folder.index.read_bytes())
        if (told["format"], told["inputs"]) != (FORMAT, inputs):
            return None
        return told if told["pictures_sha256"] == _digest(folder.pictures) else None
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
