"""Draw the boxes that the teacher saw on their image: where labels go, and as a PNG file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from data_tools.coco import AnnotatedImage
from data_tools.instruct.schema import Check, Shown, Verdict
from vlm_sft.utils.output_files import PNG_SOFTWARE

if TYPE_CHECKING:
    from PIL import Image

SYMBOLS: Final[dict[Verdict, str]] = {"supported": "✓", "contradicted": "✗", "unknown": "?"}
"""A verdict is never shown by its color alone."""

VERDICTS: Final[tuple[Verdict, ...]] = ("contradicted", "unknown", "supported")
"""The most important first."""

COLORS: Final[dict[Verdict | None, str]] = {
    "supported": "#0072b2",
    "contradicted": "#d55e00",
    "unknown": "#8a6d00",
    None: "#4a5261",
}
"""Blue, vermilion and ocher, which color-blind readers can tell apart (Okabe and Ito)."""

FEW: Final = 5
"""Up to this many boxes are all labeled in a small image; of more, only those with a verdict."""

_LETTER_WIDTH: Final = 0.6
"""Average width of a letter as a share of its height; labels are placed before they are drawn."""

_DPI: Final = 64
"""A power of two, so that matplotlib's size in inches times this is exactly the size in pixels."""


@dataclass(frozen=True)
class DrawnBox:
    """One box to draw; the coordinates are shares of the image's width and height.

    Attributes:
        label: `b3`; "" for a box that the prompt only counted.
        verdict: The most important verdict of the checks that used this box, if any did.
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
        """Full label, such as `✗ b3 dog`."""
        words = (SYMBOLS[self.verdict] if self.verdict else "", self.label, self.category)
        return " ".join(word for word in words if word) + (" (crowd)" if self.crowd else "")

    @property
    def css(self) -> str:
        """Classes of the box on a page."""
        crowd, counted = "" if not self.crowd else " crowd", "" if self.label else " counted"
        return f"{self.verdict or 'plain'}{crowd}{counted}"


@dataclass(frozen=True)
class BoxLabel:
    """The label of a box on the image, in pixels."""

    box: DrawnBox
    text: str
    left: float
    top: float
    width: float
    height: float

    def overlaps(self, other: "BoxLabel") -> bool:
        """Return whether the two labels overlap."""
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.top < other.top + other.height
            and other.top < self.top + self.height
        )


def drawn_boxes(image: AnnotatedImage, shown: Shown, checks: Sequence[Check]) -> list[DrawnBox]:
    """Return the boxes that the prompt listed or counted, the largest first so that none is hidden.

    Args:
        image: The image with its boxes.
        shown: Which of them the teacher saw.
        checks: Checks whose evidence is emphasized.
    """
    label = {number: f"b{i}" for i, number in enumerate(shown.boxes, 1)}
    counted = {number for numbers in shown.summarised.values() for number in numbers}
    found = [
        DrawnBox(
            label.get(box.id, ""),
            box.category,
            box.left / image.width,
            box.top / image.height,
            box.width / image.width,
            box.height / image.height,
            box.crowd,
            worst_verdict([check for check in checks if box.id in check.evidence]),
        )
        for box in image.boxes
        if box.id in label or box.id in counted
    ]
    return sorted(found, key=lambda box: -box.width * box.height)


def worst_verdict(checks: Sequence[Check]) -> Verdict | None:
    """Return the most important verdict of the checks; None without a check."""
    found = {check.verdict for check in checks}
    return next((verdict for verdict in VERDICTS if verdict in found), None)


def place_labels(
    boxes: Sequence[DrawnBox], size: tuple[float, float], letter: float, *, brief: bool = False
) -> list[BoxLabel]:
    """Place labels at the corners of their boxes so that they overlap as little as possible.

    Args:
        boxes: The boxes.
        size: Width and height of the image in pixels.
        letter: Height of a letter in pixels.
        brief: If there are more than `FEW` boxes, label only those with a verdict, and shortly.
    """
    wanted = [box for box in boxes if box.label or box.verdict]
    if brief and len(wanted) > FEW:
        wanted = [box for box in wanted if box.verdict]
    short = brief and len(wanted) > FEW
    placed: list[BoxLabel] = []
    for box in sorted(wanted, key=lambda box: box.verdict is None):
        text = (box.label or box.category) if short else box.name
        candidates = _candidates(box, text, size, letter)
        free = (label for label in candidates if not any(map(label.overlaps, placed)))
        placed.append(next(free, candidates[0]))
    return placed


def _candidates(
    box: DrawnBox, text: str, size: tuple[float, float], letter: float
) -> list[BoxLabel]:
    width, height = len(text) * letter * _LETTER_WIDTH + 6, letter + 5
    left, right = box.left * size[0], (box.left + box.width) * size[0] - width
    top, bottom = box.top * size[1], (box.top + box.height) * size[1]
    corners = [(left, top), (left, top - height), (right, top), (left, bottom - height)]
    corners += [(right, bottom - height), (left, bottom), (right, top - height)]
    corners += [(left, top + step * height) for step in range(1, 6)]
    return [
        BoxLabel(
            box,
            text,
            round(max(0.0, min(x, size[0] - width)), 1),
            round(max(0.0, min(y, size[1] - height)), 1),
            width,
            height,
        )
        for x, y in corners
    ]


def draw_png(opened: "Image.Image", boxes: Sequence[DrawnBox]) -> bytes:
    """Return the image with its boxes and labels as PNG; equal arguments give equal bytes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import IdentityTransform

    pixels = np.asarray(opened.convert("RGB"))
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    figure.figimage(pixels, origin="upper")
    letter = max(12, round(max(width, height) / 50))

    def add(left: float, top: float, w: float, h: float, **style: Any) -> None:
        corner = (left, height - top - h)
        figure.add_artist(Rectangle(corner, w, h, transform=IdentityTransform(), **style))

    for box in boxes:
        thickness = (letter / 6 + (2 if box.verdict else 0)) * 72 / _DPI
        add(
            box.left * width,
            box.top * height,
            box.width * width,
            box.height * height,
            fill=False,
            edgecolor=COLORS[box.verdict],
            linewidth=thickness,
            linestyle="--" if box.crowd else "-" if box.label else ":",
            path_effects=[withStroke(linewidth=thickness + 2, foreground="white")],
        )
    for label in place_labels(boxes, (width, height), letter):
        add(label.left, label.top, label.width, label.height, color=COLORS[label.box.verdict])
        figure.text(
            label.left + 3,
            height - label.top - label.height / 2,
            drawable(label.text),
            transform=IdentityTransform(),
            color="white",
            fontsize=0.8 * letter * 72 / _DPI,
            verticalalignment="center",
            parse_math=False,
        )
    return save_figure(figure)


def drawable(text: str, limit: int = 40) -> str:
    """Return a label for matplotlib: without letters that its font lacks, and not too long."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    known = {*SYMBOLS.values(), "…"}
    return "".join(c if 31 < ord(c) < 0x250 or c in known else "?" for c in cut)


def save_figure(figure: Any) -> bytes:
    """Return a matplotlib figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": PNG_SOFTWARE})
    return buffer.getvalue()
