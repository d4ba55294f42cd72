"""COCO's annotation files as an index: what is known about each image, and what is not."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

import msgspec

from data_tools.findings import MAX_FAULTY, Findings
from data_tools.json_lists import read_lists
from vlm_sft.errors import UserError
from vlm_sft.utils import words
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.image_paths import MAX_NAME, shown_name
from vlm_sft.utils.progress import track

MAX_CAPTION: Final = 5_000
"""Characters; longer texts are not captions."""
MAX_SIDE: Final = 1_000_000
"""Pixels; no image that can be opened has a longer side."""
SLACK: Final = 1.0
"""Pixels; published COCO boxes leave their image by rounding, never by a whole pixel."""

_CATEGORY_NAME: Final = re.compile(r"\w[\w .,'&/()+-]{0,59}")
_SPLIT: Final = re.compile(r"(?:^|[/_])((?:train|val|test)20(?:14|15|17))(?=[/_])")


class Box(msgspec.Struct, frozen=True, gc=False):
    """One annotated object (or, if `crowd`, a region with an unknown number of them); pixels.

    `id` is the annotation's; 0 for a box that is not from a file.
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


class AnnotatedImage(msgspec.Struct, frozen=True, gc=False):
    """An image with its captions and boxes.

    Attributes:
        id: COCO's image id.
        file_name: Path below the image folder.
        width: Pixels.
        height: Pixels.
        captions: In the file's order, white space made single.
        boxes: In the file's order. Empty means unknown, never that the image shows nothing.
        caption_ids: The captions' annotation ids, in the order of `captions`.
        license: COCO's number of the image's license; None where the files name none.
        split: The part of COCO that the image's name or address names, e.g. `val2014`.
    """

    id: int
    file_name: str
    width: int
    height: int
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]
    caption_ids: tuple[int, ...] = ()
    license: int | None = None
    split: str | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories with a box, each once, in the file's order."""
        return tuple(dict.fromkeys(box.category for box in self.boxes))

    def of(self, category: str) -> tuple[Box, ...]:
        """The boxes of one category."""
        return tuple(box for box in self.boxes if box.category == category)


@dataclass(frozen=True)
class CocoIndex:
    """All images in order of their ids, and the names of all categories that are annotated.

    Categories are named as in sentences: `traffic cone` for `traffic_cone` (`words.spoken`).

    Attributes:
        licenses: The files' table of licenses, by number, as they have it.
        findings: Faults and remarks, and what was dropped for them.
    """

    images: tuple[AnnotatedImage, ...]
    categories: tuple[str, ...]
    licenses: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)

    def frequencies(self) -> Counter[str]:
        """In how many images each category occurs."""
        return Counter(name for image in self.images for name in image.categories)

    def together(self) -> dict[str, Counter[str]]:
        """For each category, in how many of its images every other one occurs."""
        counts: dict[str, Counter[str]] = {name: Counter() for name in self.categories}
        for image in self.images:
            for name in image.categories:
                counts[name].update(other for other in image.categories if other != name)
        return counts


# The forms of the files' elements; keys that are not used, such as polygons, are skipped.

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
_Pixels = Annotated[float, msgspec.Meta(ge=-MAX_SIDE, le=MAX_SIDE)]


class _Image(msgspec.Struct, gc=False):
    id: _Id
    file_name: str
    width: _Side
    height: _Side
    license: _Id | None = None
    coco_url: Any = None


class _Caption(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    caption: str


class _Object(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[_Pixels, _Pixels, _Pixels, _Pixels]
    iscrowd: int | bool | None = 0
    score: Any = None


class _Category(msgspec.Struct):
    id: _Id
    name: str


class _License(msgspec.Struct):
    id: _Id
    name: str | None = None
    url: str | None = None


def read_coco(
    instances: Path | None,
    captions: Path | None,
    max_faulty: float = MAX_FAULTY,
    remedy: str = "",
) -> CocoIndex:
    """Read COCO's files (2014 and 2017 have one form); either may be None.

    Single faulty boxes and captions are dropped and counted in the index's `findings`.

    Args:
        instances: `instances_*.json`.
        captions: `captions_*.json`.
        max_faulty: Share of the boxes or captions that may be dropped for one kind of fault.
        remedy: How the user raises that share, for the end of the message.

    Raises:
        UserError: A file is missing, is not JSON, lacks a key, repeats an id, names an image or
            category it does not list, disagrees with the other, or has too many faulty boxes
            (without area, outside their images) or captions.
    """
    reader = _Reader()
    texts = reader.captions(captions) if captions is not None else {}
    boxes = reader.boxes(instances) if instances is not None else {}
    reader.findings.require_few(reader.totals, max_faulty, remedy)
    images = []
    for number in sorted(reader.images):
        entry, own = reader.images[number], texts.get(number, {})
        split = _SPLIT.search(f"{entry.file_name} {str(entry.coco_url or '')[:MAX_NAME]}")
        images.append(
            AnnotatedImage(
                id=number,
                file_name=entry.file_name,
                width=entry.width,
                height=entry.height,
                captions=tuple(own.values()),
                boxes=tuple(boxes.get(number, ())),
                caption_ids=tuple(own),
                license=entry.license,
                split=split[1] if split else None,
            )
        )
        reader.note_gaps(images[-1])
    return CocoIndex(tuple(images), reader.categories, reader.licenses, reader.findings)


class _Reader:
    """The two files, one after the other, which must agree with each other."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.images: dict[int, _Image] = {}
        self.licenses: dict[int, dict[str, Any]] = {}
        self.categories: tuple[str, ...] = ()
        self.totals: Counter[str] = Counter()

    def captions(self, path: Path) -> dict[int, dict[int, str]]:
        """Return the usable captions by their ids, by image."""
        found: dict[int, dict[int, str]] = defaultdict(dict)
        annotations, _ = self._read(path, {"images": _Image, "annotations": _Caption})
        self.totals["caption"] = len(annotations)
        for entry in annotations:
            text = " ".join(entry.caption.split())
            where = f"{path.name}: annotation {entry.id}"
            if not text:
                self.findings.add("caption_empty", f"{where}: the caption is empty")
            elif len(text) > MAX_CAPTION:
                problem = f"a caption of {len(text):,} characters, expected {MAX_CAPTION:,} at most"
                self.findings.add("caption_long", f"{where}: {problem}")
            elif any("\ud800" <= character <= "\udfff" for character in text):
                problem = "the caption has half a surrogate pair, which is not Unicode text"
                self.findings.add("caption_unreadable", f"{where}: {problem}")
            else:
                found[entry.image_id][entry.id] = text
        return found

    def boxes(self, path: Path) -> dict[int, list[Box]]:
        """Return the usable boxes by image."""
        found: dict[int, list[Box]] = defaultdict(list)
        forms = {"images": _Image, "annotations": _Object, "categories": _Category}
        annotations, names = self._read(path, forms)
        self.totals["box"] = len(annotations)
        self.categories = tuple(names.values())
        for entry in annotations:
            if (name := names.get(entry.category_id)) is None:
                raise UserError(
                    f"{path}: annotation {entry.id}: category_id {entry.category_id} is not among "
                    "the categories"
                )
            left, top, width, height = entry.bbox
            box = Box(name, left, top, width, height, bool(entry.iscrowd), entry.id)
            others = found[entry.image_id]
            if self._is_usable(box, self.images[entry.image_id], others, path):
                others.append(box)
                if entry.score is not None:
                    self.findings.add("box_scored", f"{path.name}: annotation {entry.id}")
        return found

    def _read(self, path: Path, forms: Mapping[str, Any]) -> tuple[list[Any], dict[int, str]]:
        """Read a file; return its annotations, and the names of categories by id.

        Images may come after their annotations, so references are checked at the end.
        """
        own: dict[int, _Image] = {}
        annotations: list[Any] = []
        names: dict[int, str] = {}
        elements = read_lists(path, forms, {"licenses": _License})
        for key, position, value in track(elements, description=f"reading {path.name}"):
            match value:
                case _Image():
                    _check_image(value, own, f"{path}: {key}[{position}]")
                    own[value.id] = value
                case _Category():
                    names[value.id] = self._spoken(value, names, f"{path}: {key}[{position}]")
                case _License():
                    self._add_license(value, f"{path}: {key}[{position}]")
                case _:
                    annotations.append(value)
        for number, image in own.items():
            self._add_image(image, self.images.setdefault(number, image), path)
        seen: set[int] = set()
        for position, entry in enumerate(annotations):
            where = f"{path}: annotations[{position}]"
            if entry.id in seen:
                raise UserError(
                    f"{where}: annotation id {entry.id} appears twice; ids must be unique"
                )
            if entry.image_id not in own:
                raise UserError(
                    f"{where}: image_id {entry.image_id} is not among the file's images"
                )
            seen.add(entry.id)
        return annotations, names

    def _add_image(self, image: _Image, known: _Image, path: Path) -> None:
        for key in ("file_name", "width", "height"):
            here, there = getattr(image, key), getattr(known, key)
            if here != there:
                here, there = (shortened(repr(value), 200) for value in (here, there))
                raise UserError(
                    f"{path}: image {image.id}: {key} is {here} here and {there} in the captions "
                    "file; both files must describe the same images"
                )

    def _spoken(self, category: _Category, names: Mapping[int, str], where: str) -> str:
        """Return the name of a category as sentences have it, and note that it is another one."""
        spoken = words.spoken(category.name)
        shown = repr(shortened(category.name, 100))
        if category.id in names or spoken in names.values():
            same = "" if spoken == category.name else f" (in sentences {spoken!r})"
            raise UserError(f"{where}: id {category.id} or name {shown}{same} appears twice")
        if not _CATEGORY_NAME.fullmatch(category.name) or not spoken:
            raise UserError(
                f"{where}: name is {shown}, expected up to 60 letters, digits, spaces and "
                ".,'&/()+_-"
            )
        if spoken != category.name:
            self.findings.add("category_spoken", f"{category.name!r} is {spoken!r} there")
        return spoken

    def _add_license(self, license: _License, where: str) -> None:
        entry = {"name": license.name, "url": license.url}
        known = self.licenses.setdefault(license.id, entry)
        for key, value in entry.items():
            if value != known[key]:
                raise UserError(
                    f"{where}: license {license.id} has {key} {shortened(repr(value), 100)} here "
                    f"and {shortened(repr(known[key]), 100)} before"
                )

    def _is_usable(self, box: Box, image: _Image, others: Iterable[Box], path: Path) -> bool:
        """Return whether to keep a box; note what is wrong with it."""
        values = [box.left, box.top, box.width, box.height]
        where = f"{path.name}: annotation {box.id}: bbox {values}"
        beyond = max(-box.left, -box.top, box.right - image.width, box.bottom - image.height)
        same = next((other for other in others if _is_same(box, other)), None)
        if box.width <= 0 or box.height <= 0:
            problem = f"{where} has no area; width and height must be above 0"
            self.findings.add("box_without_area", problem)
        elif beyond > SLACK:
            problem = f"{where} leaves its image of {image.width} x {image.height} pixels"
            self.findings.add("box_outside", f"{problem}; expected [x, y, width, height] in pixels")
        elif same is not None:
            # Two ids for one object would count it as two.
            problem = f"{where} is the same {box.category} as annotation {same.id}"
            self.findings.add("box_repeated", problem)
        else:
            if beyond > 0:
                self.findings.add("box_rounded", f"{where}, {beyond:.2g} pixels")
            if box.crowd:
                self.findings.add("box_crowd", f"{where}: {box.category}")
            return True
        return False

    def note_gaps(self, image: AnnotatedImage) -> None:
        """Note missing and repeated annotations of an image."""
        if not image.captions:
            self.findings.add("image_without_captions", image.file_name)
        if not image.boxes:
            self.findings.add("image_without_boxes", image.file_name)
        for _ in range(len(image.captions) - len(set(image.captions))):
            self.findings.add("caption_repeated", image.file_name)


def _is_same(box: Box, other: Box) -> bool:
    return (box.left, box.top, box.width, box.height, box.category) == (
        other.left, other.top, other.width, other.height, other.category,
    )  # fmt: skip


def _check_image(image: _Image, others: Mapping[int, _Image], where: str) -> None:
    name = image.file_name
    # The name must stay in the folder that it starts from, on every system.
    path = PurePosixPath(name.replace("\\", "/"))
    is_below = not path.is_absolute() and ".." not in path.parts and ":" not in name
    if not (is_below and 0 < len(name) <= MAX_NAME and name.isprintable()):
        raise UserError(
            f"{where}: file_name is {shown_name(name)}, expected a path below the folder of "
            f"images with '/' between folders and at most {MAX_NAME:,} characters",
            code="image_path",
        )
    if image.id in others:
        raise UserError(f"{where}: image id {image.id} appears twice; ids must be unique")
