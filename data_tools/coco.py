"""COCO's annotation files as an index: what is known about each image, and what is not."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from data_tools.findings import MAX_FAULTY, Findings
from data_tools.json_lists import Element, read_lists
from vlm_sft.errors import UserError
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.image_paths import MAX_NAME, shown_name
from vlm_sft.utils.progress import track

MAX_CAPTION: Final = 5_000
"""Characters; longer texts are no captions."""
MAX_ID: Final = 2**63
"""Above every id; larger ones fit neither NumPy's integers nor Arrow's."""
MAX_SIDE: Final = 1_000_000
"""Pixels; no image that can be opened has a longer side."""
SLACK: Final = 1.0
"""Pixels; published COCO boxes leave their image by rounding, never by a whole pixel."""

_KINDS: Final = {int: "a whole number", str: "a text"}
_CATEGORY_NAME: Final = re.compile(r"\w[\w .,'&/()+-]{0,59}")
_SPLIT: Final = re.compile(r"(?:^|[/_])((?:train|val|test)20(?:14|15|17))(?=[/_])")


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image with its captions and boxes.

    Attributes:
        id: COCO's image id.
        file_name: Path below the image folder.
        width: Pixels.
        height: Pixels.
        captions: In the file's order, white space made single.
        boxes: In the file's order. Empty means unknown, never that nothing is there.
        caption_ids: The captions' annotation ids, in the order of `captions`.
        license: COCO's number of the image's licence; None where the files name none.
        split: The part of COCO that the image's name or address speaks of, e.g. `val2014`.
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

    Attributes:
        licenses: The files' table of licences, by number, as they have it.
        findings: What was wrong or is worth knowing, and what was set aside for it.
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


def read_coco(
    instances: Path | None,
    captions: Path | None,
    max_faulty: float = MAX_FAULTY,
    remedy: str = "",
) -> CocoIndex:
    """Read COCO's files (2014 and 2017 have one form) as a stream; either may be None.

    Single faulty boxes and captions are set aside and told in the index's `findings`.

    Args:
        instances: `instances_*.json`.
        captions: `captions_*.json`.
        max_faulty: Share of the boxes or captions that may be set aside for one fault.
        remedy: How the user raises that share, for the end of the message.

    Raises:
        UserError: A file is missing, is no JSON, lacks a key, repeats an id, names an image or
            category it does not list, disagrees with the other, or has too many faulty boxes
            (degenerate, outside their images) or captions.
    """
    reader = _Reader(Findings())
    sentences = reader.captions(captions) if captions is not None else {}
    boxes = reader.boxes(instances) if instances is not None else {}
    reader.findings.require_few(reader.totals, max_faulty, remedy)
    images = tuple(
        _annotated(image, sentences.get(image.id, ()), boxes.get(image.id, ()), reader.findings)
        for image in (reader.images[image_id] for image_id in sorted(reader.images))
    )
    return CocoIndex(images, reader.categories, reader.licenses, reader.findings)


class _Image(NamedTuple):
    """An entry of a file's `images`, as far as we use it."""

    id: int
    file_name: str
    width: int
    height: int
    license: int | None
    split: str | None


class _Sentence(NamedTuple):
    id: int
    text: str


class _Entry(NamedTuple):
    """An annotation that has been looked at by itself, but not yet beside its image."""

    id: int
    image_id: int
    position: int
    content: Any


_ContentOf = Callable[[Any, str], Any]
"""What we use of an annotation, checked by itself; the text says where it stands."""


class _Reader:
    """The two files, one after the other; what both say must agree."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.images: dict[int, _Image] = {}
        self.licenses: dict[int, Mapping[str, Any]] = {}
        self.categories: tuple[str, ...] = ()
        self.totals: Counter[str] = Counter()

    def captions(self, path: Path) -> dict[int, list[_Sentence]]:
        """The usable captions by image."""
        found: dict[int, list[_Sentence]] = defaultdict(list)
        for entry in self._annotations(path, _caption_of, {}):
            self.totals["caption"] += 1
            text = self._usable_caption(entry, path)
            if text is not None:
                found[entry.image_id].append(_Sentence(entry.id, text))
        return found

    def boxes(self, path: Path) -> dict[int, list[Box]]:
        """The usable boxes by image."""
        found: dict[int, list[Box]] = defaultdict(list)
        categories: dict[int, str] = {}
        for entry in self._annotations(path, _box_of, categories):
            self.totals["box"] += 1
            box = self._usable_box(entry, categories, path)
            if box is not None and not self._repeats(box, found[entry.image_id], path):
                found[entry.image_id].append(box)
        self.categories = tuple(categories.values())
        return found

    def _annotations(
        self, path: Path, content_of: _ContentOf, categories: dict[int, str]
    ) -> Iterator[_Entry]:
        """A file's annotations when all of it is read: their images may stand behind them."""
        own: dict[int, _Image] = {}
        entries: list[_Entry] = []
        keys = ["images", "annotations", *(["categories"] if content_of is _box_of else [])]
        elements = read_lists(path, keys, optional=("licenses",))
        for element in track(elements, description=f"reading {path.name}"):
            where = f"{path}: {element.key}[{element.position}]"
            match element.key:
                case "images":
                    _add_image(own, element.value, where)
                case "annotations":
                    entries.append(_entry(element, where, content_of))
                case "categories":
                    _add_category(categories, element.value, where)
                case _:
                    _add_license(self.licenses, element.value, where)
        self._merge(own, path)
        yield from _checked(entries, own, path)

    def _merge(self, own: Mapping[int, _Image], path: Path) -> None:
        for image_id, image in own.items():
            known = self.images.setdefault(image_id, image)
            for key in ("file_name", "width", "height"):
                here, there = getattr(image, key), getattr(known, key)
                if here != there:
                    here, there = (shortened(repr(value), 200) for value in (here, there))
                    raise UserError(
                        f"{path}: image {image_id}: {key} is {here} here and {there} in "
                        "the captions file; the two files must speak of the same images"
                    )

    def _usable_caption(self, entry: _Entry, path: Path) -> str | None:
        text = " ".join(entry.content.split())
        where = f"{path.name}: annotation {entry.id}"
        if not text:
            self.findings.add("caption_empty", f"{where}: the caption is empty")
        elif len(text) > MAX_CAPTION:
            problem = f"a caption of {len(text):,} characters, expected {MAX_CAPTION:,} at most"
            self.findings.add("caption_long", f"{where}: {problem}")
        elif any("\ud800" <= character <= "\udfff" for character in text):
            problem = "half a surrogate pair in the caption, which is no Unicode text"
            self.findings.add("caption_unreadable", f"{where}: {problem}")
        else:
            return text
        return None

    def _usable_box(self, entry: _Entry, categories: Mapping[int, str], path: Path) -> Box | None:
        (left, top, width, height), category_id, crowd = entry.content
        where = f"{path.name}: annotation {entry.id}"
        name = categories.get(category_id)
        if name is None:
            raise UserError(
                f"{path}: annotation {entry.id}: category_id {category_id} is not among the "
                "categories"
            )
        box = Box(name, left, top, width, height, crowd, entry.id)
        values = [left, top, width, height]
        image = self.images[entry.image_id]
        beyond = max(-box.left, -box.top, box.right - image.width, box.bottom - image.height)
        if box.width <= 0 or box.height <= 0:
            problem = f"bbox {values} has no area; width and height must be above 0"
            self.findings.add("box_without_area", f"{where}: {problem}")
            return None
        if beyond > SLACK:
            self.findings.add(
                "box_outside",
                f"{where}: bbox {values} leaves its image of {image.width} x "
                f"{image.height} pixels; expected [x, y, width, height] in pixels",
            )
            return None
        if beyond > 0:
            self.findings.add("box_rounded", f"{where}: bbox {values}, {beyond:.2g} pixels")
        if crowd:
            self.findings.add("box_crowd", f"{where}: {name}")
        return box

    def _repeats(self, box: Box, others: Iterable[Box], path: Path) -> bool:
        """Whether a box stands twice under two ids, which would count one thing as two."""
        for other in others:
            if (other.left, other.top, other.width, other.height, other.category) == (
                box.left, box.top, box.width, box.height, box.category,
            ):  # fmt: skip
                problem = f"the same {box.category} in the same place as annotation {other.id}"
                self.findings.add("box_repeated", f"{path.name}: annotation {box.id}: {problem}")
                return True
        return False


def _annotated(
    entry: _Image,
    sentences: Iterable[_Sentence],
    boxes: Iterable[Box],
    findings: Findings,
) -> AnnotatedImage:
    image = AnnotatedImage(
        id=entry.id,
        file_name=entry.file_name,
        width=entry.width,
        height=entry.height,
        captions=tuple(sentence.text for sentence in sentences),
        boxes=tuple(boxes),
        caption_ids=tuple(sentence.id for sentence in sentences),
        license=entry.license,
        split=entry.split,
    )
    if not image.captions:
        findings.add("image_without_captions", image.file_name)
    if not image.boxes:
        findings.add("image_without_boxes", image.file_name)
    for _ in range(len(image.captions) - len(set(image.captions))):
        findings.add("caption_repeated", image.file_name)
    return image


def _entry(element: Element, where: str, content_of: _ContentOf) -> _Entry:
    number = _field(element.value, "id", int, where)
    image_id = _field(element.value, "image_id", int, where)
    return _Entry(number, image_id, element.position, content_of(element.value, where))


def _caption_of(value: Mapping[str, Any], where: str) -> str:
    text: str = _field(value, "caption", str, where)
    return text


def _box_of(
    value: Mapping[str, Any], where: str
) -> tuple[tuple[float, float, float, float], int, bool]:
    for key in ("bbox", "category_id"):
        if key not in value:
            raise UserError(f"{where}: {key!r} is missing")
    numbers = value["bbox"]
    if not (
        isinstance(numbers, list)
        and len(numbers) == 4
        and all(_is_pixels(number) for number in numbers)
    ):
        shown = shortened(repr(numbers), 200)
        raise UserError(f"{where}: bbox is {shown}, expected four numbers [x, y, width, height]")
    left, top, width, height = map(float, numbers)
    category = _field(value, "category_id", int, where)
    return (left, top, width, height), category, bool(value.get("iscrowd", 0))


def _is_pixels(number: Any) -> bool:
    """Return whether a value is a number that can be a place or a length in an image."""
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and abs(number) <= MAX_SIDE  # false for NaN


def _checked(
    entries: Iterable[_Entry], images: Mapping[int, _Image], path: Path
) -> Iterator[_Entry]:
    seen: set[int] = set()
    for entry in entries:
        where = f"{path}: annotations[{entry.position}]"
        if entry.id in seen:
            raise UserError(f"{where}: annotation id {entry.id} stands twice; ids must be unique")
        if entry.image_id not in images:
            raise UserError(f"{where}: image_id {entry.image_id} is not among the file's images")
        seen.add(entry.id)
        yield entry


def _add_image(images: dict[int, _Image], value: Any, where: str) -> None:
    image_id = _field(value, "id", int, where)
    name = _field(value, "file_name", str, where)
    if not _is_below(name):
        raise UserError(
            f"{where}: file_name is {shown_name(name)}, expected a path below the folder of "
            f"images with '/' between folders and at most {MAX_NAME:,} characters",
            code="image_path",
        )
    for side in ("width", "height"):
        if not 1 <= _field(value, side, int, where) <= MAX_SIDE:
            shown = shortened(str(value[side]), 100)
            raise UserError(f"{where}: {side} is {shown}, expected 1 to {MAX_SIDE:,} pixels")
    if image_id in images:
        raise UserError(f"{where}: image id {image_id} stands twice; ids must be unique")
    license = value.get("license")
    if license is not None:
        license = _field(value, "license", int, where)
    url = value.get("coco_url")
    split = _SPLIT.search(f"{name} {url[:MAX_NAME] if isinstance(url, str) else ''}")
    images[image_id] = _Image(
        image_id, name, value["width"], value["height"], license, split.group(1) if split else None
    )


def _is_below(name: str) -> bool:
    """Whether a name stays in the folder it starts from, on every system, and can be written."""
    path = PurePosixPath(name.replace("\\", "/"))
    whole = 0 < len(name) <= MAX_NAME and name.isprintable()
    return whole and not path.is_absolute() and ".." not in path.parts and ":" not in name


def _add_category(categories: dict[int, str], value: Any, where: str) -> None:
    number, name = _field(value, "id", int, where), _field(value, "name", str, where)
    if number in categories or name in categories.values():
        shown = shortened(name, 100)
        raise UserError(f"{where}: id {number} or name {shown!r} stands twice")
    if not _CATEGORY_NAME.fullmatch(name):
        raise UserError(
            f"{where}: name is {shortened(name, 100)!r}, expected up to 60 letters, digits, spaces "
            "and .,'&/()+-"
        )
    categories[number] = name


def _add_license(licenses: dict[int, Mapping[str, Any]], value: Any, where: str) -> None:
    """Keep a licence by its number; the two files' tables must agree."""
    number = _field(value, "id", int, where)
    for key in ("name", "url"):
        if value.get(key) is not None:
            _field(value, key, str, where)
    known = licenses.setdefault(number, {"name": value.get("name"), "url": value.get("url")})
    for key, there in known.items():
        if value.get(key) != there:
            raise UserError(
                f"{where}: licence {number} has {key} {shortened(repr(value.get(key)), 100)} here "
                f"and {shortened(repr(there), 100)} before"
            )


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    """Return a value of this type; whole numbers are ids, counts or pixels."""
    if not isinstance(entry, dict):
        found = shortened(repr(entry), 100)
        raise UserError(f"{where}: is {found}, expected an object with {key!r}")
    if key not in entry:
        raise UserError(f"{where}: {key!r} is missing")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        found = shortened(repr(value), 100)
        raise UserError(f"{where}: {key!r} is {found}, expected {_KINDS[kind]}")
    if isinstance(value, int) and not 0 <= value < MAX_ID:
        found = shortened(str(value), 100)
        raise UserError(f"{where}: {key!r} is {found}, expected 0 to {MAX_ID - 1}")
    return value
