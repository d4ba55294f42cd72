"""COCO's annotation files as an index: what is known about each picture, and what is not."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.errors import UserError


@dataclass(frozen=True)
class Box:
    """One annotated object (or, if `crowd`, a region with an unknown number of them); pixels.

    `id` is the annotation's; 0 for a box that was never in a file.
    """

    category: str
    left: float
    top: float
    width: float
    height: float
    crowd: bool
    id: int = 0

    @property
    def right(self) -> float:
        """The x of the right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The y of the bottom edge."""
        return self.top + self.height


@dataclass(frozen=True)
class Picture:
    """A picture with its captions and boxes.

    Attributes:
        id: COCO's image id.
        file_name: Path below the image folder.
        width: Pixels.
        height: Pixels.
        captions: In the file's order, white space made single.
        boxes: In the file's order. Empty means unknown, never that nothing is there.
        caption_ids: The captions' annotation ids, in the order of `captions`.
        license: COCO's number of the picture's licence; None where the files name none.
    """

    id: int
    file_name: str
    width: int
    height: int
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]
    caption_ids: tuple[int, ...] = ()
    license: int | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories with a box, each once, in the file's order."""
        return tuple(dict.fromkeys(box.category for box in self.boxes))

    def of(self, category: str) -> tuple[Box, ...]:
        """The boxes of one category."""
        return tuple(box for box in self.boxes if box.category == category)


@dataclass(frozen=True)
class CocoIndex:
    """All pictures in order of their ids, and the names of all categories that are annotated."""

    pictures: tuple[Picture, ...]
    categories: tuple[str, ...]

    def frequencies(self) -> Counter[str]:
        """In how many pictures each category occurs."""
        return Counter(name for picture in self.pictures for name in picture.categories)

    def together(self) -> dict[str, Counter[str]]:
        """For each category, in how many of its pictures every other one occurs."""
        counts: dict[str, Counter[str]] = {name: Counter() for name in self.categories}
        for picture in self.pictures:
            for name in picture.categories:
                counts[name].update(other for other in picture.categories if other != name)
        return counts


def read_coco(instances: Path | None, captions: Path | None) -> CocoIndex:
    """Read COCO's files (2014 and 2017 have one form); either may be None.

    Raises:
        UserError: A file is missing, is no JSON, lacks a key, repeats an id, names an image or
            category it does not list, or has a box that is degenerate or outside its picture.
    """
    images: dict[int, dict[str, Any]] = {}
    sentences: dict[int, list[tuple[int, str]]] = {}
    boxes: dict[int, list[Box]] = {}
    categories: dict[int, str] = {}
    if captions is not None:
        document = _load(captions, ("images", "annotations"))
        own = _images(document["images"], captions)
        _merge(images, own, captions)
        for entry in _annotations(document, own, captions, ("caption",)):
            text = " ".join(str(entry["caption"]).split())
            if not text:
                raise UserError(f"{captions}: annotation {entry['id']}: the caption is empty")
            sentences.setdefault(entry["image_id"], []).append((entry["id"], text))
    if instances is not None:
        document = _load(instances, ("images", "annotations", "categories"))
        own = _images(document["images"], instances)
        _merge(images, own, instances)
        categories = _categories(document["categories"], instances)
        for entry in _annotations(document, own, instances, ("bbox", "category_id")):
            box = _box(entry, own[entry["image_id"]], categories, instances)
            boxes.setdefault(entry["image_id"], []).append(box)
    pictures = (
        Picture(
            id=image_id,
            file_name=image["file_name"],
            width=image["width"],
            height=image["height"],
            captions=tuple(text for _, text in sentences.get(image_id, ())),
            boxes=tuple(boxes.get(image_id, ())),
            caption_ids=tuple(number for number, _ in sentences.get(image_id, ())),
            license=image.get("license"),
        )
        for image_id, image in sorted(images.items())
    )
    return CocoIndex(tuple(pictures), tuple(categories.values()))


def check_pictures(pictures: Iterable[Picture], folder: Path) -> None:
    """Refuse pictures without a file, naming the first few.

    Raises:
        UserError: The folder or at least one file is not there.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: is not a folder; give the one the pictures lie in")
    missing = [p.file_name for p in pictures if not (folder / p.file_name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"--images {folder}: {len(missing)} annotated pictures are not there ({shown}); "
            "give the folder that holds them, or annotations of these pictures only",
            code="image_missing",
        )


def _load(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file", code="data_file_missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: is not valid JSON ({error}); download or write it again", code="json_syntax"
        ) from error
    for key in keys:
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise UserError(
                f"{path}: expected COCO's form, an object with a list {key!r}, and found none",
                code="data_file_unreadable",
            )
    return document


def _images(entries: list[Any], path: Path) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        where = f"{path}: images[{position}]"
        image_id = _field(entry, "id", int, where)
        _field(entry, "file_name", str, where)
        for side in ("width", "height"):
            if _field(entry, side, int, where) < 1:
                raise UserError(f"{where}: {side} is {entry[side]}, expected at least 1 pixel")
        if image_id in images:
            raise UserError(f"{where}: image id {image_id} stands twice; ids must be unique")
        images[image_id] = entry
    return images


def _merge(
    images: dict[int, dict[str, Any]], own: Mapping[int, dict[str, Any]], path: Path
) -> None:
    for image_id, entry in own.items():
        known = images.setdefault(image_id, entry)
        for key in ("file_name", "width", "height"):
            if known[key] != entry[key]:
                raise UserError(
                    f"{path}: image {image_id}: {key} is {entry[key]!r} here and {known[key]!r} in "
                    "the captions file; the two files must speak of the same pictures"
                )


def _categories(entries: list[Any], path: Path) -> dict[int, str]:
    categories: dict[int, str] = {}
    for position, entry in enumerate(entries):
        where = f"{path}: categories[{position}]"
        number, name = _field(entry, "id", int, where), _field(entry, "name", str, where)
        if number in categories or name in categories.values():
            raise UserError(f"{where}: id {number} or name {name!r} stands twice")
        categories[number] = name
    return categories


def _annotations(
    document: Mapping[str, Any], images: Mapping[int, Any], path: Path, keys: Sequence[str]
) -> Iterable[dict[str, Any]]:
    seen: set[int] = set()
    for position, entry in enumerate(document["annotations"]):
        where = f"{path}: annotations[{position}]"
        number = _field(entry, "id", int, where)
        image_id = _field(entry, "image_id", int, where)
        if number in seen:
            raise UserError(f"{where}: annotation id {number} stands twice; ids must be unique")
        if image_id not in images:
            raise UserError(f"{where}: image_id {image_id} is not among the file's images")
        for key in keys:
            if key not in entry:
                raise UserError(f"{where}: {key!r} is missing")
        seen.add(number)
        yield entry


def _box(
    entry: Mapping[str, Any], image: Mapping[str, Any], categories: Mapping[int, str], path: Path
) -> Box:
    where = f"{path}: annotation {entry['id']}"
    name = categories.get(entry["category_id"])
    if name is None:
        raise UserError(f"{where}: category_id {entry['category_id']} is not among the categories")
    values = entry["bbox"]
    if not (
        isinstance(values, list)
        and len(values) == 4
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    ):
        raise UserError(f"{where}: bbox is {values}, expected four numbers [x, y, width, height]")
    left, top, width, height = (float(value) for value in values)
    if width <= 0 or height <= 0:
        raise UserError(
            f"{where}: bbox {values} has no area; width and height must be above 0, "
            "so mend or delete the annotation"
        )
    slack = 1.0  # published COCO boxes leave their picture by rounding, never by a whole pixel
    outside = left < -slack or top < -slack
    if outside or left + width > image["width"] + slack or top + height > image["height"] + slack:
        raise UserError(
            f"{where}: bbox {values} leaves its picture of {image['width']} x {image['height']} "
            "pixels; expected [x, y, width, height] in pixels"
        )
    return Box(name, left, top, width, height, bool(entry.get("iscrowd", 0)), entry["id"])


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {key!r} is {value!r}, expected {kind.__name__}")
    return value
