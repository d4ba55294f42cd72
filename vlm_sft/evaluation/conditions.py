"""Name the images with which a question can be asked."""

from typing import Final, Literal

ImageCondition = Literal["right", "blank", "shuffled"]
"""The question's own image, an image of one color, or the image of another question."""

IMAGE_CONDITIONS: Final[tuple[ImageCondition, ...]] = ("right", "blank", "shuffled")
