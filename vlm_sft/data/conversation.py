"""One record as the trainer sees it: turns of text and images, whatever format it came in."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]

ImageSource = Path | bytes
"""An image's file, or its encoded bytes (Parquet image columns)."""


@dataclass(frozen=True)
class TextPart:
    """Text exactly as the user wrote it; never interpreted as control tokens."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """The place of an image; `index` points into `Conversation.images`."""

    index: int


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Attributes:
        role: The speaker.
        parts: Text and images in order.
        supervised: Whether the turn is trained; meaningful for assistants only.
        image_separator: Text to write between an image and its neighbors: "" where `parts` are
            exactly what was written, None (content given as a list of parts) for the template's.
    """

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = True
    image_separator: str | None = ""

    @property
    def text(self) -> str:
        """The turn's text without its images."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True)
class Conversation:
    """A record: at most one leading system turn, then user and assistant in alternation.

    Attributes:
        id: The record's id as a string; unique ids are wanted, not assumed.
        turns: The turns in order; the last one is an assistant's in training data.
        images: One source for each image; `ImagePart.index` counts from 0 in reading order.
        where: `file:line` (lines from 1) or `file[index]`, for messages.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    where: str = "<memory>"

    def image_parts(self) -> Iterator[ImagePart]:
        """Every image's place, in reading order."""
        for turn in self.turns:
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    yield part
