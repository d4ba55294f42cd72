"""Name the images with which a question can be asked, and choose another image for each."""

from collections.abc import Iterable
from typing import Final, Literal

from vlm_sft.errors import UserError

ImageCondition = Literal["right", "blank", "shuffled"]
"""The question's own image, an image of one color, or the image of another question."""

IMAGE_CONDITIONS: Final[tuple[ImageCondition, ...]] = ("right", "blank", "shuffled")

SuiteCondition = Literal["right", "blank", "shuffled", "blurred", "cropped"]
"""As `ImageCondition`; or the own image blurred, or without its middle (or the question's box)."""

CLOSED_SETS: Final = (("yes", "no"), ("left", "right"), ("top", "bottom"))
"""Answers that are alternatives of each other, whatever the other answers of a file are."""


def derangement(names: Iterable[str], *, seed: int) -> dict[str, str]:
    """Assign another image to each image, in one cycle through all of them.

    Raises:
        UserError: There are fewer than two images.
    """
    unique = sorted(set(names))
    if len(unique) < 2:
        raise UserError("the shuffled condition needs at least two images; leave it out")
    import numpy as np  # this module is imported by parsers of arguments

    order = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    return dict(zip(order, [*order[1:], order[0]], strict=True))
