"""The text between an image and its neighbors, where a turn's content is a list of parts."""

from dataclasses import replace
from typing import Final

from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn

DEFAULT_SEPARATOR: Final = "\n"
"""In LLaVA's records each image is on a line of its own."""


def separated(
    conversation: Conversation, separator: str, text_separator: str | None = None
) -> Conversation:
    """Return the conversation with every separator written out.

    Args:
        conversation: Turns whose `image_separator` is None get `separator`.
        separator: The template's.
        text_separator: The template's between an image and text after it; None: the same.
    """
    if all(turn.image_separator == "" for turn in conversation.turns):
        return conversation
    turns = tuple(_separated(turn, separator, text_separator) for turn in conversation.turns)
    return replace(conversation, turns=turns)


def _separated(turn: Turn, separator: str, text_separator: str | None) -> Turn:
    if turn.image_separator is not None:
        separator, text_separator = turn.image_separator, None
    parts = separated_parts(turn.parts, separator, text_separator)
    return replace(turn, parts=tuple(parts), image_separator="")


def separated_parts(
    parts: tuple[Part, ...], separator: str, text_separator: str | None = None
) -> list[Part]:
    """Return the parts with exactly one separator between an image and its neighbors.

    `text_separator` is between an image and text after it, by default the same. Text that already
    begins or ends with its separator gets no second one; empty text is dropped. The exported chat
    template follows the same rule (`jinja_export.jinja_prelude`).
    """
    before_text = separator if text_separator is None else text_separator
    made: list[Part] = []
    text = ""  # since the last image
    for part in parts:
        if isinstance(part, ImagePart):
            if made and not (text and text.endswith(separator)):
                made.append(TextPart(separator))
            text = ""
        elif not part.text:
            continue
        else:
            follows_image = bool(made) and isinstance(made[-1], ImagePart)
            if follows_image and not part.text.startswith(before_text):
                made.append(TextPart(before_text))
            text += part.text
        made.append(part)
    return [part for part in made if isinstance(part, ImagePart) or part.text]


class ImageLayoutCheck:
    """Compares where training questions have their images with the prompts of inference.

    `chat`, `evaluate` and the exported chat template put the images first and the template's
    separator after each.

    Args:
        separator: The template's.
        text_separator: The template's between an image and text after it; None: the same.
    """

    def __init__(self, separator: str, text_separator: str | None = None) -> None:
        self._separator = separator
        self._text_separator = separator if text_separator is None else text_separator
        self.num_questions = 0
        self._other_separator: list[str] = []
        self._other_place: list[str] = []

    def add(self, record: Conversation) -> None:
        """Count a record's questions about images."""
        for turn in separated(record, self._separator, self._text_separator).turns:
            if not any(isinstance(part, ImagePart) for part in turn.parts):
                continue
            self.num_questions += 1
            trained = _joined(turn.parts)
            if _joined(self._as_prompted(turn.parts)) != trained:
                self._other_separator.append(record.id)
            elif not isinstance(turn.parts[0], ImagePart):
                self._other_place.append(record.id)

    def warnings(self) -> list[str]:
        """Return a sentence for each way in which prompts differ from training."""
        found = []
        if self._other_separator:
            found.append(
                f"{self._counted(self._other_separator)} have other text than "
                f"{self._text_separator!r} "
                "between an image and its neighbors, which chat, evaluate and the exported chat "
                "template write; set data.image_separator to the text in the records, or change "
                "the records"
            )
        if self._other_place:
            found.append(
                f"{self._counted(self._other_place)} do not begin with the image; chat and "
                "evaluate put it first (data.llava_quirks: llava-1.5 moves it there in "
                "training too)"
            )
        return found

    def _counted(self, ids: list[str]) -> str:
        return (
            f"{len(ids):,} of {self.num_questions:,} questions about images "
            f"(first: record {ids[0]!r})"
        )

    def _as_prompted(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Return the parts as a caller gives them: in the same order, without outer white space."""
        bare = []
        for index, part in enumerate(parts):
            if isinstance(part, TextPart):
                text = part.text
                if index and isinstance(parts[index - 1], ImagePart):
                    text = text.lstrip()
                if index + 1 < len(parts) and isinstance(parts[index + 1], ImagePart):
                    text = text.rstrip()
                part = TextPart(text)
            bare.append(part)
        return tuple(separated_parts(tuple(bare), self._separator, self._text_separator))


def _joined(parts: tuple[Part, ...]) -> list[str | int]:
    """Return texts and image indices, with adjacent texts joined."""
    made: list[str | int] = []
    for part in parts:
        if isinstance(part, ImagePart):
            made.append(part.index)
        elif made and isinstance(made[-1], str):
            made[-1] += part.text
        elif part.text:
            made.append(part.text)
    return made
