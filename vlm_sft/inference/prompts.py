"""Prompts for generation: a question, chat messages or a conversation, with images."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource, Part, TextPart, Turn
from vlm_sft.data.record_formats import RawRecord, parse_record
from vlm_sft.errors import ImageError, UserError, as_text
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image
"""An image: the path of a file, the bytes of a file, or a PIL image."""

Message: TypeAlias = Mapping[str, Any]
"""A chat message: `role`, and `content` as text or as a list of text and image parts."""

Prompt: TypeAlias = str | Sequence[Message] | Conversation
"""What the model is asked: a question, chat messages, or a conversation of `vlm_sft.data`."""


def as_conversation(prompt: Prompt, images: Sequence[ImageInput] = ()) -> Conversation:
    """Return a prompt as the conversation that the chat tokenizer takes.

    Args:
        prompt: A question; or messages that end with the user's, each
            `{"role": "user", "content": "text"}` or with a list of the parts
            `{"type": "text", "text": ...}` and `{"type": "image"}` as content. An image part may
            contain its image as `"image"`; the others take `images` in order.
        images: The images. If the messages have no places for them (image parts, or `<image>` in
            the text of a user message), they come before the text of the last message.

    Raises:
        UserError: The messages are malformed, do not end with the user's, or have another number
            of places for images than there are images.
        ImageError: Something is not an image.
    """
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
        raise UserError("images: expected a list of images, found a single one; put it in a list")
    if isinstance(prompt, Conversation):
        if images:
            raise UserError("images: a Conversation contains its images; give none besides")
        return prompt
    if isinstance(prompt, str):
        return user_message(prompt, images)
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, bytes)
    if not is_list or not prompt or not all(isinstance(m, Mapping) for m in prompt):
        raise UserError("prompt: expected text, or a list of messages with `role` and `content`")
    return _from_messages(prompt, [image_source(image) for image in images])


def user_message(
    text: str, images: Sequence[ImageInput] = (), *, history: Sequence[Turn] = ()
) -> Conversation:
    """Return a conversation whose last turn is the user's, with the new images before its text.

    The chat template determines the text between an image and the question.

    Args:
        text: The user's text.
        images: All images of the conversation, those of `history` first.
        history: Earlier turns, ending with an assistant's.

    Raises:
        UserError: `text` is not valid Unicode.
    """
    text = as_text(text, "question")
    num_shown = sum(isinstance(part, ImagePart) for turn in history for part in turn.parts)
    parts: list[Part] = [ImagePart(index) for index in range(num_shown, len(images))]
    turn = Turn("user", (*parts, TextPart(text)), image_separator=None if parts else "")
    return Conversation("question", (*history, turn), tuple(map(image_source, images)))


def image_source(image: ImageInput) -> ImageSource:
    """Return an image as a path or as the bytes of an image file.

    A PIL image is encoded without loss, so that it goes through the same preprocessing as a file.

    Raises:
        ImageError: It is neither a path, nor bytes, nor a PIL image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = BytesIO()
        is_png = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        image.save(buffer, format="PNG" if is_png else "TIFF", exif=image.getexif())
        return buffer.getvalue()
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    raise ImageError(
        "image_field", f"expected a path, bytes or a PIL image, found {type(image).__name__}"
    )


def _from_messages(messages: Sequence[Message], images: Sequence[ImageSource]) -> Conversation:
    """Parse messages as a record of the `messages` format, whose rules and errors they share."""
    if messages[-1].get("role") != "user":
        raise UserError("prompt: the last message must be the user's")
    sources = list(images)
    turns = [dict(message) for message in messages]
    for turn in turns:
        if isinstance(turn.get("content"), (list, tuple)):
            turn["content"] = [_with_marker(part, sources) for part in turn["content"]]
    if images and not _has_image_places(turns):
        text = turns[-1]["content"]
        text_parts = [{"type": "text", "text": text}] if isinstance(text, str) else list(text)
        turns[-1]["content"] = [*({"type": "image"} for _ in images), *text_parts]
    # The reader of records wants an answer at the end, and images as names or bytes.
    record = {
        "messages": [*turns, {"role": "assistant", "content": "-"}],
        "images": [_marker(index) for index in range(len(images))],
    }
    read = parse_record(RawRecord(record, "prompt", "prompt"), "messages", Path())
    by_marker: dict[ImageSource, ImageSource] = {_marker(i): s for i, s in enumerate(sources)}
    found = tuple(by_marker.get(image, image) for image in read.images)
    return Conversation("prompt", read.turns[:-1], found, "prompt")


def _marker(index: int) -> bytes:
    return b"image %d" % index


def _with_marker(part: Any, sources: list[ImageSource]) -> Any:
    """Replace the image of an image part by a marker, and append it to `sources`."""
    if not isinstance(part, Mapping) or part.get("type") != "image" or "image" not in part:
        return part
    sources.append(image_source(part["image"]))
    return {"type": "image", "image": {"bytes": _marker(len(sources) - 1)}}


def _has_image_places(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether `images` have places: image parts without an image, or `<image>` in text."""
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, str):
            if turn.get("role") == "user" and IMAGE_PLACEHOLDER in content:
                return True
        elif any(
            part.get("type") == "image" and "image" not in part
            for part in content or ()
            if isinstance(part, Mapping)
        ):
            return True
    return False
