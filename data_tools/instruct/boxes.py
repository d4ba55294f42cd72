"""Boxes in texts, and the two frames that their corners are shares of.

`original`: the image as it is. `padded_square`: the square that LLaVA pads it to before resizing,
its longer side's length, the image in the middle (`llava/mm_utils.py:expand2square`). LLaVA's own
files mix the two, so a file of ours names its frame.
"""

import re
from typing import Final, Literal

Frame = Literal["original", "padded_square"]
Corners = tuple[float, float, float, float]
"""Left, top, right, bottom, each as a share of the frame's width or height."""

_NUMBER: Final = r"\s*((?:0?\.|[01]\.)\d{1,6}|[01])\s*"
_BOX: Final = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")


def to_padded_square(corners: Corners, width: int, height: int) -> Corners:
    """Shares of an image of `width` x `height` pixels as shares of the padded square."""
    side, left, top = _square(width, height)
    return (
        (corners[0] * width + left) / side,
        (corners[1] * height + top) / side,
        (corners[2] * width + left) / side,
        (corners[3] * height + top) / side,
    )


def to_original(corners: Corners, width: int, height: int) -> Corners:
    """The other way; what lies in the padding comes out below 0 or above 1."""
    side, left, top = _square(width, height)
    return (
        (corners[0] * side - left) / width,
        (corners[1] * side - top) / height,
        (corners[2] * side - left) / width,
        (corners[3] * side - top) / height,
    )


def boxes_in(text: str) -> list[Corners]:
    """What a text writes as boxes: four numbers from 0 to 1 in brackets.

    At least one has a point, and right and bottom are not before left and top.
    """
    return [corners for match in _BOX.finditer(text) if (corners := _corners(match)) is not None]


def convert(text: str, width: int, height: int, source: Frame, target: Frame) -> tuple[str, int]:
    """The text with its boxes in the other frame, and how many there are.

    Numbers are written with as many decimals as the box had, at least 3, and held within 0 and 1.
    """
    count = 0

    def written(match: re.Match[str]) -> str:
        nonlocal count
        corners = _corners(match)
        if corners is None:
            return match[0]
        count += 1
        if source == target:
            return match[0]
        change = to_padded_square if target == "padded_square" else to_original
        decimals = max(3, *(len(number.partition(".")[2]) for number in match.groups()))
        values = (min(1.0, max(0.0, value)) for value in change(corners, width, height))
        return "[" + ", ".join(f"{value:.{decimals}f}" for value in values) + "]"

    return _BOX.sub(written, text), count


def _square(width: int, height: int) -> tuple[int, int, int]:
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def _corners(match: "re.Match[str]") -> Corners | None:
    numbers = match.groups()
    left, top, right, bottom = (float(number) for number in numbers)
    if not any("." in number for number in numbers) or left > right or top > bottom:
        return None
    return left, top, right, bottom
