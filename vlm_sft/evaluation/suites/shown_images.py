"""The images that a suite shows: as they are, blank, blurred, or without their middle."""

import io
from typing import Final

from PIL import Image, ImageDraw, ImageFilter

from vlm_sft.data.conversation import ImageSource
from vlm_sft.data.images import open_image
from vlm_sft.evaluation.suites.tasks import Shown

BLANK_SIZE: Final = 336
"""Side of the blank image in pixels."""

BLUR_SHARE: Final = 1 / 16
"""Standard deviation of the blur, as a share of the longer side: objects become patches."""

CLIP_MEAN: Final = (122, 116, 104)
"""CLIP's mean color, for models whose own is not known."""

Color = tuple[int, int, int]


def image_source(shown: Shown, color: Color = CLIP_MEAN) -> ImageSource | None:
    """Return the file or the bytes of an image to show; None for a question without an image.

    Args:
        shown: The image and what is done with it.
        color: Color of the blank image and of removed areas.

    Raises:
        ImageError: The file is missing or cannot be decoded.
    """
    if shown.change is None:
        return None
    if shown.path is None:
        return png(Image.new("RGB", (BLANK_SIZE, BLANK_SIZE), color))
    if shown.change == "right":
        return shown.path
    image = open_image(shown.path)
    if shown.change == "blurred":
        return png(image.filter(ImageFilter.GaussianBlur(BLUR_SHARE * max(image.size))))
    width, height = image.size
    middle = (width / 4, height / 4, 3 * width / 4, 3 * height / 4)
    ImageDraw.Draw(image).rectangle(shown.box or middle, fill=color)
    return png(image)


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
