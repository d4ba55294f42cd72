"""Picture files to pixels: one contract for every format, mode, rotation, alpha and bit depth."""

from dataclasses import dataclass
from typing import Literal

Aspect = Literal["pad", "crop"]


@dataclass(frozen=True)
class ImageSpec:
    """What a vision tower wants to be fed; comes from the tower.

    Attributes:
        size: Side of the square input in pixels.
        mean: Subtracted from red, green, blue, each in 0..1.
        std: Divides red, green, blue after that.
        interpolation: How pictures are resized.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
