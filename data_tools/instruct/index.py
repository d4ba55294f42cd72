"""The annotations of a run: read and checked once, then one image a line."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from data_tools.coco import AnnotatedImage, Box, CocoIndex, read_coco
from data_tools.digests import file_digest
from data_tools.image_check import usable_images
from data_tools.instruct.config import CocoConfig, InstructConfig
from data_tools.instruct.run_folder import RunFolder
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import owned_open, write_owned_json
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import open_regular, read_json

FORMAT: Final = 3
"""Raised when this module would write other files from the same annotations."""

_IMAGE_FIELDS: Final = tuple(field.name for field in fields(AnnotatedImage))
_BOX_FIELDS: Final = tuple(field.name for field in fields(Box))


def command(config: InstructConfig) -> None:
    """Read and check the annotations, unless `images.jsonl` is of these very files."""
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
        echo(f"{folder.images}: made from these very files before; nothing to do", file=sys.stdout)
    echo("\n".join(_table(told)), file=sys.stdout)


def read_images(folder: RunFolder) -> dict[int, AnnotatedImage]:
    """The indexed images by id, in the order of ids.

    Raises:
        UserError: The annotations have not been indexed.
    """
    try:
        with open_regular(folder.images) as file:
            images = [_read_image(line, folder.images, n) for n, line in enumerate(file, 1)]
    except FileNotFoundError:
        raise _not_indexed(folder.images) from None
    return {image.id: image for image in images}


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


def write_images(folder: RunFolder, images: Iterable[AnnotatedImage]) -> str:
    """Replace the indexed images; returns the file's SHA-256."""
    digest = hashlib.sha256()
    with owned_open(folder.images) as file:
        for image in images:
            line = json.dumps(_plain(image), ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
    return digest.hexdigest()


def _read_image(line: bytes, path: Path, number: int) -> AnnotatedImage:
    try:
        image = _image(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(f"{path}:{number}") from None
    return image


def _damaged(where: str) -> UserError:
    return UserError(
        f"{where}: was damaged or not written by this version; delete the file and run `index` "
        "again",
        code="json_syntax",
    )


def _not_indexed(path: Path) -> UserError:
    return UserError(f"{path}: there is no such file; run `index` first", code="data_file_missing")


def _plain(image: AnnotatedImage) -> dict[str, Any]:
    """As `dataclasses.asdict`, at a tenth of its time: an image has many boxes."""
    values = {name: getattr(image, name) for name in _IMAGE_FIELDS}
    boxes = [{name: getattr(box, name) for name in _BOX_FIELDS} for box in image.boxes]
    return {**values, "boxes": boxes}


def _image(values: dict[str, Any]) -> AnnotatedImage:
    boxes = tuple(Box(**box) for box in values.pop("boxes"))
    captions, caption_ids = tuple(values.pop("captions")), tuple(values.pop("caption_ids"))
    return AnnotatedImage(**values, boxes=boxes, captions=captions, caption_ids=caption_ids)


def _index(folder: RunFolder, inputs: dict[str, Any], config: CocoConfig) -> dict[str, Any]:
    aside = "; coco.max_faulty=1 sets aside whatever is faulty"
    index = read_coco(_path(config.instances), _path(config.captions), config.max_faulty, aside)
    images = usable_images(index, Path(config.images), follow_symlinks=config.follow_symlinks)
    remedy = (
        "; coco.images is to be the folder these images lie in, and coco.max_faulty=1 takes "
        "what is there"
    )
    index.findings.require_few({"image": len(index.images)}, config.max_faulty, remedy)
    if not images:
        raise UserError(f"{config.images}: not one annotated image is there", code="no_records")
    written = write_images(folder, track(images, description="writing images"))
    told = _told(index, images, inputs, written)
    write_owned_json(folder.index, told)
    return told


def _told(
    index: CocoIndex, images: Sequence[AnnotatedImage], inputs: dict[str, Any], written: str
) -> dict[str, Any]:
    """The content of `index.json`: without paths, so that the same files give the same bytes."""
    frequencies = CocoIndex(tuple(images), index.categories).frequencies()
    boxes = Counter(box.category for image in images for box in image.boxes)
    of_license = Counter(image.license for image in images)
    return {
        "format": FORMAT,
        "inputs": inputs,
        "images_sha256": written,
        "images": {
            "annotated": len(index.images),
            "indexed": len(images),
            "with_captions": sum(bool(image.captions) for image in images),
            "with_boxes": sum(bool(image.boxes) for image in images),
            "by_split": dict(sorted(Counter(image.split or "unknown" for image in images).items())),
        },
        "captions": sum(len(image.captions) for image in images),
        "boxes": boxes.total(),
        "categories": {
            name: {"images": frequencies[name], "boxes": boxes[name]} for name in index.categories
        },
        "licenses": {
            str(number): {**index.licenses.get(number, {}), "images": of_license[number]}
            for number in sorted(n for n in of_license if n is not None)
        },
        "images_without_license": of_license[None],
        "findings": index.findings.told(),
    }


def _table(told: dict[str, Any]) -> Iterator[str]:
    images = told["images"]
    used = sum(bool(found["boxes"]) for found in told["categories"].values())
    yield (
        f"{images['indexed']:,} of {images['annotated']:,} annotated images: "
        f"{images['with_captions']:,} with captions ({told['captions']:,}), "
        f"{images['with_boxes']:,} with boxes ({told['boxes']:,} boxes; {used:,} of "
        f"{len(told['categories']):,} categories occur)"
    )
    for found in told["findings"].values():
        lost = found["consequence"] != "reported"
        example = f": {found['consequence']}, e.g. {found['examples'][0]}" if lost else ""
        yield f"{found['count']:>9,}  {found['meaning']}{example}"
    for number, entry in told["licenses"].items():
        yield f"{entry['images']:>9,}  under licence {number}: {entry.get('name', 'not named')}"
    if told["images_without_license"]:
        yield f"{told['images_without_license']:>9,}  of unknown licence"


def _inputs(config: CocoConfig) -> dict[str, Any]:
    """What the index is made of, by content; images by name and size in bytes."""
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
            f"coco.images {folder}: is not a folder; give the one the images lie in",
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
    """The content of `index.json` where it and the images are what these inputs give."""
    try:
        told: dict[str, Any] = json.loads(folder.index.read_bytes())
        if (told["format"], told["inputs"]) != (FORMAT, inputs):
            return None
        return told if told["images_sha256"] == _digest(folder.images) else None
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
