"""Sides, halves and distances of boxes: certain, impossible, or neither.

The rules that write sentences state a place only where it is `supported`; the verifier rejects one
that is `contradicted`. Both use these functions and constants; `verify.gap`, `verify.centres` and
`verify.far` change them for the verifier.
"""

from collections.abc import Iterable
from typing import Final, Literal

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.schema import Verdict

Direction = Literal["left", "right", "above", "below"]
Region = Literal["left", "right", "top", "bottom", "centre"]

GAP: Final = 0.02
"""Share of the side that must lie between two boxes, or a box and the middle, for a side to be
certain."""
CENTERS: Final = 0.15
"""Where boxes overlap in one direction: share of the side that their centers must differ by."""
FAR: Final = 0.25
"""A gap of this share of the side between two boxes refutes that they touch."""
CROSSING: Final = 0.15
"""A box with at most this share of its length in a half is not in that half."""
FAR_SIDE: Final = 0.1
"""Share of the side by which the center of such a box must be away from the middle."""


def order(
    one: Box,
    other: Box,
    direction: Direction,
    image: AnnotatedImage,
    gap: float = GAP,
    centers: float = CENTERS,
) -> Verdict:
    """Return whether `one` lies in this direction of `other`.

    Certain where a gap of `gap` of the side lies between the boxes, or their centers differ by
    `centers` of it and neither lies within the other's extent.
    """
    horizontal = direction in ("left", "right")
    side = image.width if horizontal else image.height
    first, second = _extent(one, horizontal), _extent(other, horizontal)
    if direction in ("right", "below"):
        first, second = second, first
    if _precedes(first, second, gap * side, centers * side):
        return "supported"
    reverse = _precedes(second, first, gap * side, centers * side)
    return "contradicted" if reverse else "unknown"


def region(box: Box, where: Region, image: AnnotatedImage, margin: float = GAP) -> Verdict:
    """Return whether the box lies in this half of the image, or about its center.

    A half is certain where the box stays `margin` of the side away from the middle. `centre` is
    refuted only, by a box that stays in an outer quarter.
    """
    if where == "centre":
        x, y = _extent(box, True), _extent(box, False)
        outside = _is_outer(x, image.width) or _is_outer(y, image.height)
        return "contradicted" if outside else "unknown"
    horizontal = where in ("left", "right")
    side = image.width if horizontal else image.height
    start, end = _extent(box, horizontal)
    begins, ends = end <= side * (0.5 - margin), start >= side * (0.5 + margin)
    if where in ("right", "bottom"):
        begins, ends = ends, begins
    if begins:
        return "supported"
    # A box that only just crosses the middle is still on the other side.
    middle = side / 2
    inside = (middle - start if where in ("left", "top") else end - middle) / max(end - start, 1)
    across = inside <= CROSSING and abs((start + end) / 2 - middle) >= max(margin, FAR_SIDE) * side
    return "contradicted" if ends or across else "unknown"


def are_far_apart(one: Box, other: Box, image: AnnotatedImage, far: float = FAR) -> bool:
    """Return whether a gap of `far` of the width or height lies between the boxes."""
    across = max(one.left - other.right, other.left - one.right) / image.width
    down = max(one.top - other.bottom, other.top - one.bottom) / image.height
    return max(across, down) >= far


def of_all(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict that all share; where they differ, it depends on which one is meant."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "unknown"


_Extent = tuple[float, float]


def _extent(box: Box, horizontal: bool) -> _Extent:
    return (box.left, box.right) if horizontal else (box.top, box.bottom)


def _precedes(first: _Extent, second: _Extent, gap: float, centers: float) -> bool:
    if first[1] + gap <= second[0]:
        return True
    one, other = sum(first) / 2, sum(second) / 2
    apart = other - one > centers
    return apart and not (first[0] <= other <= first[1] or second[0] <= one <= second[1])


def _is_outer(extent: _Extent, side: float) -> bool:
    return extent[1] <= side / 4 or extent[0] >= side * 3 / 4
