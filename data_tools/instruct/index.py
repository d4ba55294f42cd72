"""The annotations of a run: read and checked once, then one image a line."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from data_tools.coco import AnnotatedImage, CocoIndex
from data_tools.digests import file_digest
from data_tools.findings import finding_lines
from data_tools.image_check import read_annotated
from data_tools.instruct.config import CocoConfig, InstructConfig
from data_tools.instruct.run_folder import RunFolder
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.image_paths import nearest_existing
from vlm_sft.utils.owned_files import owned_open, write_owned_json
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import open_regular, read_json

FORMAT: Final = 3
"""Raised when this module would write other files from the same annotations."""


def command(config: InstructConfig) -> None:
    """Read and check the annotations, unless `images.jsonl` was made from these very files."""
    coco = config.coco
    if coco.instances is None and coco.captions is None:
        raise UserError(
            "give coco.instances, coco.captions or both: there is nothing to build from"
        )
    folder = RunFolder(Path(config.output_dir))
    inputs = _inputs(coco)
    report = _existing(folder, inputs)
    if report is not None:
        echo(f"{folder.images}: up to date", file=sys.stdout)
    else:
        report = _index(folder, inputs, coco)
    echo("\n".join(_table(report)), file=sys.stdout)


def read_images(folder: RunFolder) -> dict[int, AnnotatedImage]:
    """Return the indexed images by id, in the order of ids.

    Raises:
        UserError: The annotations have not been indexed, or the file was damaged.
    """
    decoder = msgspec.json.Decoder(AnnotatedImage)
    images: dict[int, AnnotatedImage] = {}
    try:
        with open_regular(folder.images) as file:
            for number, line in enumerate(file, 1):
                try:
                    image = decoder.decode(line)
                except (msgspec.DecodeError, RecursionError):
                    raise _damaged(f"{folder.images}:{number}") from None
                images[image.id] = image
    except FileNotFoundError:
        raise _not_indexed(folder.images) from None
    return images


def read_categories(folder: RunFolder) -> tuple[str, ...]:
    """Return the names of all categories in the annotations, also of those without a box.

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
    """Replace the indexed images; return the file's SHA-256."""
    digest, encoder = hashlib.sha256(), msgspec.json.Encoder()
    with owned_open(folder.images) as file:
        for image in images:
            line = encoder.encode(image) + b"\n"
            digest.update(line)
            file.write(line)
    return digest.hexdigest()


def _damaged(where: str) -> UserError:
    return UserError(
        f"{where}: was damaged or not written by this version; delete the file and run `index` "
        "again",
        code="json_syntax",
    )


def _not_indexed(path: Path) -> UserError:
    return UserError(f"{path}: there is no such file; run `index` first", code="data_file_missing")


def _index(folder: RunFolder, inputs: dict[str, Any], config: CocoConfig) -> dict[str, Any]:
    """Write images.jsonl and index.json; return the content of index.json."""
    index, images = read_annotated(
        _path(config.instances),
        _path(config.captions),
        Path(config.images),
        max_faulty=config.max_faulty,
        names=("coco.images", "coco.max_faulty="),
        follow_symlinks=config.follow_symlinks,
    )
    digest = write_images(folder, track(images, description="writing images"))
    report = _report(index, images, inputs, digest)
    write_owned_json(folder.index, report)
    return report


def _report(
    index: CocoIndex, images: Sequence[AnnotatedImage], inputs: dict[str, Any], digest: str
) -> dict[str, Any]:
    """Return the content of `index.json`: without paths, so that it depends on contents alone."""
    frequencies = replace(index, images=tuple(images)).frequencies()
    boxes = Counter(box.category for image in images for box in image.boxes)
    of_license = Counter(image.license for image in images)
    return {
        "format": FORMAT,
        "inputs": inputs,
        "images_sha256": digest,
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
        "findings": index.findings.as_dict(),
    }


def _table(report: dict[str, Any]) -> Iterator[str]:
    images = report["images"]
    used = sum(bool(of["boxes"]) for of in report["categories"].values())
    yield (
        f"{images['indexed']:,} of {images['annotated']:,} annotated images: "
        f"{images['with_captions']:,} with captions ({report['captions']:,}), "
        f"{images['with_boxes']:,} with boxes ({report['boxes']:,} boxes; {used:,} of "
        f"{len(report['categories']):,} categories occur)"
    )
    yield from finding_lines(report["findings"].values())
    for number, entry in report["licenses"].items():
        yield f"{entry['images']:>9,}  under license {number}: {entry.get('name', 'not named')}"
    if report["images_without_license"]:
        yield f"{report['images_without_license']:>9,}  of unknown license"


def _inputs(config: CocoConfig) -> dict[str, Any]:
    """Return what the index depends on: digests of the files, names and sizes of the images."""
    inputs: dict[str, Any] = {
        "max_faulty": config.max_faulty,
        "follow_symlinks": config.follow_symlinks,
    }
    for name in ("instances", "captions"):
        path = _path(getattr(config, name))
        try:
            inputs[name] = path and {"file": path.name, "sha256": file_digest(path)}
        except FileNotFoundError:
            raise UserError(
                f"{path}: there is no such file; give your annotation file as coco.{name}, in the "
                f"configuration or on the command line as coco.{name}=FILE",
                code="data_file_missing",
            ) from None
    folder = Path(config.images)
    if not folder.is_dir():
        raise UserError(
            f"coco.images {folder}: is not a folder{nearest_existing(folder)}; give the folder of "
            "the images",
            code="image_missing",
        )
    digest, count = hashlib.sha256(), 0
    for name, size in _files(folder, ""):
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        count += 1
    inputs["images"] = {"files": count, "sha256": digest.hexdigest()}
    return inputs


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the names of all files below the folder and their sizes, in the order of names."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _files(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size


def _existing(folder: RunFolder, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of `index.json` if it and the images were made from these inputs."""
    try:
        report: dict[str, Any] = json.loads(folder.index.read_bytes())
        if (report["format"], report["inputs"]) != (FORMAT, inputs):
            return None
        return report if report["images_sha256"] == file_digest(folder.images) else None
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
