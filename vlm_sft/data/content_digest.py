"""Digests of what records say, and of the image files that they show."""

import hashlib
import json

from vlm_sft.data.conversation import Conversation, ImageSource, TextPart
from vlm_sft.utils.image_paths import split_member


def content_digest(record: Conversation) -> str:
    """Return a digest of a record's turns and images; of a file, of its name, size and time."""
    digest = hashlib.sha256(turns_content(record))
    for image in record.images:
        digest.update(image_content(image))
    return digest.hexdigest()[:32]


def turns_content(record: Conversation) -> bytes:
    """Return the bytes of a record's turns that digests are taken over, without its images."""
    turns = [
        [turn.role, turn.supervised, turn.image_separator,
         [part.text if isinstance(part, TextPart) else part.index for part in turn.parts]]
        for turn in record.turns
    ]  # fmt: skip
    return json.dumps(turns).encode("utf-8", "surrogatepass")


def image_content(image: ImageSource) -> bytes:
    """Return a digest of an embedded image, or a file's name, size and modification time.

    Of a member of a tar file, size and time are those of the tar file.
    """
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    inside = split_member(image)
    try:
        state = (image if inside is None else inside[0]).stat()
    except OSError:
        return f"{image} missing".encode("utf-8", "surrogateescape")
    name = f"{image} {state.st_size} {state.st_mtime_ns}"
    return name.encode("utf-8", "surrogateescape")
