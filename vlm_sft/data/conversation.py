"""A conversation: the turns of text and images of one record, whatever its format."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]

ImageSource = Path | bytes
"""An image file, or the encoded bytes of an image (from a Parquet column or a data URL)."""


@dataclass(frozen=True)
class TextPart:
    """Text exactly as in the record; it is never interpreted as special tokens."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """The position of an image; `index` is its index in `Conversation.images`."""

    index: int


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: The speaker.
        parts: Text and images in order.
        supervised: Whether the turn is trained on; only used for assistant turns.
        image_separator: Text to put between an image and its neighbors: "" if `parts` are complete
            as they are, None for the template's (content that was a list of parts).
    """

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = True
    image_separator: str | None = ""

    @property
    def text(self) -> str:
        """The text of the turn without its images."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True)
class Conversation:
    """One record: at most one leading system turn, then user and assistant turns alternate.

    Attributes:
        id: The record's id; ids should be unique, but nothing relies on it.
        turns: The turns in order; in training data the last one is an assistant turn.
        images: One source per image; `ImagePart.index` counts from 0 in reading order.
        where: `file:line` (lines from 1) or `file[index]`, for error messages.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    where: str = "<memory>"

    def image_parts(self) -> Iterator[ImagePart]:
        """Yield the position of every image, in reading order."""
        for turn in self.turns:
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    yield part
