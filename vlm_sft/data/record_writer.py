"""Write conversations as records of the `messages` format; reading them gives the same turns."""

import base64
import os
from pathlib import Path
from typing import Any, Final

from vlm_sft.data.conversation import Conversation, ImageSource, TextPart, Turn
from vlm_sft.errors import UserError

_IMAGE_TYPES: Final = {
    b"\xff\xd8": "jpeg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
}


def as_messages(record: Conversation, image_root: Path) -> list[dict[str, Any]]:
    """Return the turns of a conversation as messages.

    Args:
        record: The conversation.
        image_root: The folder that image names will be relative to.

    Raises:
        UserError: An image is not below `image_root`.
    """
    return [_message(turn, record, image_root) for turn in record.turns]


def data_url(image: bytes) -> str:
    """Return the bytes of an image file as a data URL."""
    kind = next((k for head, k in _IMAGE_TYPES.items() if image.startswith(head)), "tiff")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _message(turn: Turn, record: Conversation, image_root: Path) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": _image(record.images[part.index], record, image_root)}
        for part in turn.parts
    ]
    message: dict[str, Any] = {"role": turn.role, "content": parts}
    if turn.image_separator is not None and any(p["type"] == "image" for p in parts):
        message["image_separator"] = turn.image_separator
    if not turn.supervised:
        message["loss"] = False
    return message


def _image(image: ImageSource, record: Conversation, image_root: Path) -> str:
    if isinstance(image, bytes):
        return data_url(image)
    try:
        return Path(os.path.abspath(image)).relative_to(os.path.abspath(image_root)).as_posix()
    except ValueError:
        raise UserError(
            f"{record.where}: record {record.id!r}: the image {image} is not below {image_root}; "
            "set `image_root` to a directory that contains the images of all sources",
            code="image_path",
        ) from None
