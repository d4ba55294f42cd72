"""The description of an image for a teacher: its captions and boxes as text, safely quoted."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.schema import Shown

MIN_AREA = 0.002
MAX_BOXES = 30

_MARKUP = frozenset("<>[]{}|`")
"""Characters of control words of chat templates (`<|im_end|>`, `[INST]`) and of code fences."""


@dataclass(frozen=True)
class Context:
    """The text, and the annotations that are in it."""

    text: str
    shown: Shown


def describe(
    image: AnnotatedImage,
    decimals: int = 2,
    max_boxes: int = MAX_BOXES,
    min_area: float = MIN_AREA,
    *,
    after: Shown | None = None,
    title: str = "IMAGE",
) -> Context:
    """Return an image in words.

    Captions are labeled `c1`, `c2`, ... in the file's order. Boxes are labeled `b1`, `b2`, ...,
    by category, the category with the biggest box first and the biggest first within it.

    Args:
        image: With its annotations.
        decimals: Decimals of the coordinates, which are shares of the image's width and height.
        max_boxes: If there are more boxes, the smallest ones are only counted.
        min_area: Boxes with a smaller share of the image's area are only counted.
        after: What is shown of the images before this one, whose labels are continued.
        title: What the image is called.
    """
    before = Shown() if after is None else after
    boxes = sorted(image.boxes, key=lambda box: (-_area(box), box.id))
    smallest = min_area * image.width * image.height
    num_big = sum(_area(box) >= smallest for box in boxes)
    num_listed = min(num_big, max_boxes)
    listed, rest = boxes[:num_listed], boxes[num_listed:]
    groups = {name: [b for b in listed if b.category == name] for name in _names(listed)}
    summarised = {name: [b for b in rest if b.category == name] for name in _names(rest)}
    text = "\n\n".join(
        (
            f"{title}: {image.width} x {image.height} pixels",
            "\n".join(_captions(image.captions, len(before.captions) + 1)),
            "\n".join(_objects(image, groups, summarised, decimals, len(before.boxes))),
        )
    )
    shown = Shown(
        captions=image.caption_ids,
        boxes=tuple(box.id for group in groups.values() for box in group),
        summarised={name: tuple(b.id for b in group) for name, group in summarised.items()},
        decimals=decimals,
    )
    return Context(text, shown)


def describe_several(
    images: Sequence[AnnotatedImage], decimals: int, max_boxes: int, min_area: float
) -> Context:
    """Return several images in words; labels are counted through all of them."""
    texts, shown = [], Shown(decimals=decimals)
    for number, image in enumerate(images, 1):
        one = describe(image, decimals, max_boxes, min_area, after=shown, title=f"IMAGE {number}")
        texts.append(one.text)
        summarised = {
            name: shown.summarised.get(name, ()) + one.shown.summarised.get(name, ())
            for name in {**shown.summarised, **one.shown.summarised}
        }
        shown = Shown(
            captions=shown.captions + one.shown.captions,
            boxes=shown.boxes + one.shown.boxes,
            summarised=summarised,
            decimals=decimals,
        )
    return Context("\n\n".join(texts), shown)


def quoted(text: str) -> str:
    r"""Return any text as one line between quotation marks.

    JSON's own escapes, and `\uXXXX` for characters without a glyph or with a meaning as markup:
    line separators, marks that turn the reading direction, chat templates' control words.
    """
    line = json.dumps(text, ensure_ascii=False)[1:-1]
    return '"' + "".join(_escaped(line)) + '"'


def _escaped(line: str) -> Iterator[str]:
    for character in line:
        unseen = unicodedata.category(character)[0] in "CZ" and character != " "
        if unseen or character in _MARKUP:
            units = character.encode("utf-16-be", "surrogatepass")
            yield "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
        else:
            yield character


def _captions(captions: Sequence[str], first: int) -> Iterator[str]:
    if not captions:
        yield "CAPTIONS: nobody wrote any for this image."
        return
    yield f"CAPTIONS ({len(captions)}, each by one person):"
    for number, caption in enumerate(captions, first):
        yield f"c{number}: {quoted(caption)}"


def _objects(
    image: AnnotatedImage,
    groups: dict[str, list[Box]],
    summarised: dict[str, list[Box]],
    decimals: int,
    number: int,
) -> Iterator[str]:
    if not image.boxes:
        yield (
            "OBJECTS: not annotated for this image. Whatever the captions do not mention is "
            "unknown, neither present nor absent."
        )
        return
    yield (
        "OBJECTS (left, top, right, bottom as shares of the original image's width and height, "
        "from its top left corner):"
    )
    for name, group in groups.items():
        yield f"{name}: {_count(group + summarised.get(name, []), len(group))}"
        for box in group:
            number += 1
            crowd = ", a crowd" if box.crowd else ""
            yield f"  b{number}: {_corners(box, image, decimals)}{crowd}"
    small = {name: boxes for name, boxes in summarised.items() if name not in groups}
    if small:
        counted = ", ".join(f"{name}: {_count(boxes, 0)}" for name, boxes in small.items())
        yield f"As a count only, without a box here: {counted}"


def _count(boxes: Sequence[Box], listed: int) -> str:
    """Return how many boxes there are; with a crowd, also next to single ones, it is `many`."""
    singles, small = sum(not box.crowd for box in boxes), len(boxes) - listed
    total = str(singles) if singles == len(boxes) else "many (a crowd, not to be counted)"
    return total + (f", {small} of them without a box here" if listed and small else "")


def _corners(box: Box, image: AnnotatedImage, decimals: int) -> str:
    shares = (
        box.left / image.width,
        box.top / image.height,
        box.right / image.width,
        box.bottom / image.height,
    )
    return "[" + ", ".join(f"{min(max(share, 0), 1):.{decimals}f}" for share in shares) + "]"


def _names(boxes: Sequence[Box]) -> Iterator[str]:
    return iter(Counter(box.category for box in boxes))


def _area(box: Box) -> float:
    return box.width * box.height
