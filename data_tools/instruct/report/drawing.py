"""An image under the boxes that were shown: how each is drawn, as SVG or as PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.report.evidence import SYMBOLS, verdict_of
from data_tools.instruct.schema import Check, Shown, Verdict
from vlm_sft.errors import ImageError
from vlm_sft.utils.escape import escape_control
from vlm_sft.utils.output_files import PNG_SOFTWARE

if TYPE_CHECKING:
    from PIL import Image

COLOURS: Final[dict[Verdict | None, str]] = {
    "supported": "#0072b2",
    "contradicted": "#d55e00",
    "unknown": "#8a6d00",
    None: "#4a5261",
}
"""Blue, vermillion and ochre stay apart for colour-blind readers (Okabe and Ito's palette)."""

FEW: Final = 5
"""Up to so many boxes all are named in a small image; beyond, those that decided by label."""

_LETTER: Final = 0.56
"""Width of a letter as a share of its height; names are placed before anyone draws them."""


@dataclass(frozen=True)
class Mark:
    """One box to draw; places are shares of the image's width and height.

    Attributes:
        label: `b3`; "" for one that was told as a number only.
        verdict: Of the checks that rest on this box; None where none of those given does.
    """

    label: str
    category: str
    left: float
    top: float
    width: float
    height: float
    crowd: bool
    verdict: Verdict | None

    @property
    def name(self) -> str:
        """`✗ b3 dog`."""
        words = (SYMBOLS[self.verdict] if self.verdict else "", self.label, self.category)
        return " ".join(word for word in words if word) + (" (crowd)" if self.crowd else "")


def marks(image: AnnotatedImage, shown: Shown, checks: Sequence[Check]) -> list[Mark]:
    """The boxes that were shown or summarised, biggest first so that none hides another.

    Args:
        image: With its boxes.
        shown: Which of them the teacher was told of.
        checks: Those whose evidence stands out.
    """
    label = {number: f"b{i}" for i, number in enumerate(shown.boxes, 1)}
    summarised = {number for numbers in shown.summarised.values() for number in numbers}
    found = [
        Mark(
            label.get(box.id, ""),
            box.category,
            box.left / image.width,
            box.top / image.height,
            box.width / image.width,
            box.height / image.height,
            box.crowd,
            verdict_of([check for check in checks if box.id in check.evidence]),
        )
        for box in image.boxes
        if box.id in label or box.id in summarised
    ]
    return sorted(found, key=lambda mark: -mark.width * mark.height)


@dataclass(frozen=True)
class Tag:
    """A box's name on the image: its left top corner and its size in pixels."""

    mark: Mark
    text: str
    left: float
    top: float
    width: float
    height: float

    def meets(self, other: "Tag") -> bool:
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.top < other.top + other.height
            and other.top < self.top + self.height
        )


def tags(drawn: Sequence[Mark], size: tuple[float, float], letter: float, all_: bool) -> list[Tag]:
    """Names placed at their boxes' corners so that they cover each other as little as possible.

    Args:
        drawn: The boxes.
        size: Of the image, pixels.
        letter: Height of a letter, pixels.
        all_: Name every shown box; else those with a verdict, shortly where they are many, and all
            where they are few.
    """
    wanted = [mark for mark in drawn if mark.label or mark.verdict]
    if not all_ and len(wanted) > FEW:
        wanted = [mark for mark in wanted if mark.verdict]
    short = not all_ and len(wanted) > FEW
    placed: list[Tag] = []
    for mark in sorted(wanted, key=lambda mark: mark.verdict is None):
        text = mark.label or mark.category if short else mark.name
        choices = _choices(mark, escape_control(text), size, letter)
        free = (tag for tag in choices if not any(tag.meets(other) for other in placed))
        placed.append(next(free, choices[0]))
    return placed


def _choices(mark: Mark, text: str, size: tuple[float, float], letter: float) -> list[Tag]:
    width, height = len(text) * letter * _LETTER + 6, letter + 5
    left, right = mark.left * size[0], (mark.left + mark.width) * size[0] - width
    top, bottom = mark.top * size[1], (mark.top + mark.height) * size[1]
    corners = [(left, top), (left, top - height), (right, top), (left, bottom - height)]
    corners += [(right, bottom - height), (left, bottom), (right, top - height)]
    corners += [(left, top + step * height) for step in range(1, 6)]
    return [
        Tag(mark, text, _inside(x, size[0] - width), _inside(y, size[1] - height), width, height)
        for x, y in corners
    ]


def _inside(place: float, most: float) -> float:
    return round(max(0.0, min(place, most)), 1)


def svg(drawn: Sequence[Mark], size: tuple[int, int], *, letter: float = 11, all_: bool) -> str:
    """The boxes as SVG to lie over an image of that size; classes carry verdicts and labels."""
    width, height = size
    parts = []
    for mark in drawn:
        place = (
            f'x="{mark.left * width:.1f}" y="{mark.top * height:.1f}" '
            f'width="{mark.width * width:.1f}" height="{mark.height * height:.1f}"'
        )
        title = f"<title>{escape(escape_control(mark.name))}</title>"
        css = _classes(mark)
        parts.append(f'<g class="{css}" data-b="{mark.label}"><rect class="under" {place}/>')
        parts.append(f'<rect class="line" {place}>{title}</rect></g>')
    for tag in tags(drawn, size, letter, all_):
        parts.append(
            f'<g class="tag {_classes(tag.mark)}" data-b="{tag.mark.label}">'
            f'<rect x="{tag.left}" y="{tag.top}" width="{tag.width:.1f}" height="{tag.height}" '
            f'rx="2"/><text x="{tag.left + 3}" y="{tag.top + letter:.1f}" '
            f'font-size="{letter}" textLength="{tag.width - 6:.1f}" '
            f'lengthAdjust="spacingAndGlyphs">{escape(tag.text)}</text></g>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="presentation">{"".join(parts)}</svg>'


def _classes(mark: Mark) -> str:
    words: list[str] = [mark.verdict or "plain"]
    words += ["crowd"] if mark.crowd else []
    words += [] if mark.label else ["told"]
    return " ".join(words)


def png(opened: "Image.Image", drawn: Sequence[Mark]) -> bytes:
    """The image with every box and its name; the same image and boxes give the same bytes."""
    from PIL import ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    canvas = opened.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    letter = max(12, round(max(canvas.size) / 50))
    font: Any = ImageFont.load_default(letter)
    line = max(2, letter // 6)
    for mark in drawn:
        _outline(draw, mark, canvas.size, line)
    for tag in tags(drawn, canvas.size, letter, True):
        place = (tag.left, tag.top, tag.left + tag.width, tag.top + tag.height)
        draw.rectangle(place, fill=COLOURS[tag.mark.verdict])
        draw.text((tag.left + 3, tag.top + 1), _drawable(tag.text), fill="white", font=font)
    buffer = io.BytesIO()
    info = PngInfo()
    info.add_text("Software", PNG_SOFTWARE)
    canvas.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def _outline(draw: Any, mark: Mark, size: tuple[int, int], line: int) -> None:
    """A box in its verdict's colour within a white border; dashed for crowds, dotted if told."""
    left, top = mark.left * size[0], mark.top * size[1]
    right, bottom = left + mark.width * size[0], top + mark.height * size[1]
    wide = line + (2 if mark.verdict else 0)
    step = line * 6 if mark.crowd else 0 if mark.label else line * 3
    sides = [(left, top, right, top), (right, top, right, bottom)]
    sides += [(left, bottom, right, bottom), (left, top, left, bottom)]
    for colour, thick in (("white", wide + 2), (COLOURS[mark.verdict], wide)):
        for side in sides:
            _side(draw, side, step, colour, thick)


def _side(
    draw: Any, side: tuple[float, float, float, float], step: int, colour: str, width: int
) -> None:
    x0, y0, x1, y1 = side
    length = max(x1 - x0, y1 - y0)
    stops = [i * step for i in range(int(length / step) + 1)] if step else [0.0]
    for start in stops:
        a = start / length if length else 0.0
        b = min(1.0, (start + step * 0.6) / length) if step and length else 1.0
        ends = (x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0))
        draw.line(ends, fill=colour, width=width)


def _drawable(text: str) -> str:
    """The built-in font has Latin letters; verdicts get words, the rest a question mark."""
    words = {"✓": "ok", "✗": "NO"}
    return "".join(words.get(c, c if ord(c) < 0x250 else "?") for c in text)


def open_image(folder: Path, image: AnnotatedImage) -> "Image.Image | str":
    """The image as training opens it, or, in a sentence, why it cannot be opened."""
    from vlm_sft.data.images import open_image

    try:
        return open_image(folder / image.file_name)
    except ImageError as error:
        return str(error)


def jpeg(opened: "Image.Image", longest: int, quality: int) -> tuple[bytes, tuple[int, int]]:
    """The image made smaller if need be, and its size then."""
    small = opened.convert("RGB")
    small.thumbnail((longest, longest))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue(), small.size
