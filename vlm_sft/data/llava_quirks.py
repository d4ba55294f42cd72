"""Recipes: what LLaVA 1.5 did to conversations, by name, to be repeated or corrected."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.errors import RecordError, UserError

CAPTION_NEWLINE: Final = "caption_newline"
IMAGE_FIRST: Final = "image_first"
SPACE_BEHIND_IMAGE: Final = "space_behind_image"

_EMPTY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Recipe:
    """A named set of quirks that are repeated on purpose.

    Attributes:
        name: `fixed` or `llava-1.5`.
        quirks: What is repeated, by name, each with a sentence for the manifest.
    """

    name: str
    quirks: Mapping[str, str] = field(default_factory=lambda: _EMPTY)

    def describe(self) -> dict[str, Any]:
        """For the manifest: which quirks are repeated and which corrected, a sentence each."""
        corrected = {k: v for k, v in LLAVA_1_5.quirks.items() if k not in self.quirks}
        return {
            "name": self.name,
            "repeated": dict(self.quirks),
            "corrected": {**corrected, **NEVER_REPEATED},
        }

    def template(self, name: str) -> str:
        """The template that takes the place of the one named."""
        return "llava_plain" if name == "plain" and CAPTION_NEWLINE in self.quirks else name

    def arranged(self, conversation: Conversation) -> Conversation:
        """The conversation as the recipe reorders it.

        Raises:
            RecordError: A turn has several images, of which LLaVA would keep one.
        """
        if IMAGE_FIRST not in self.quirks or not conversation.images:
            return conversation
        turns = tuple(_image_first(turn, conversation) for turn in conversation.turns)
        return Conversation(conversation.id, turns, conversation.images, conversation.where)


FIXED: Final = Recipe("fixed")
LLAVA_1_5: Final = Recipe(
    "llava-1.5",
    MappingProxyType(
        {
            CAPTION_NEWLINE: "stage 1 trains a newline behind the caption and no EOS "
            "(template llava_plain for plain)",
            IMAGE_FIRST: "a turn's image moves to a line of its own before its stripped text "
            "(preprocess_multimodal)",
            SPACE_BEHIND_IMAGE: "text behind an image is tokenized as the start of a text, "
            "with SentencePiece's dummy space (tokenizer_image_token)",
        }
    ),
)
NEVER_REPEATED: Final = {
    "zeroed_samples": "a record whose mask LLaVA cannot find trains nothing there (preprocess_v1)",
    "control_from_data": "</s> or <image> in a record's words becomes a control token there",
    "cut_answers": "records are cut at the length limit there, inside answers and images",
}
RECIPES: Final = {recipe.name: recipe for recipe in (FIXED, LLAVA_1_5)}


def recipe_named(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UserError: There is none of this name.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}; expected {' or '.join(RECIPES)}")
    return RECIPES[name]


def _image_first(turn: Turn, conversation: Conversation) -> Turn:
    images = [part for part in turn.parts if isinstance(part, ImagePart)]
    if not images:
        return turn
    if len(images) > 1:
        raise RecordError(
            "several_images",
            f"recipe llava-1.5 keeps one image a turn and this one has {len(images)}; spread "
            "them over turns, or take `llava_quirks: none`",
            record_id=conversation.id,
            where=conversation.where,
        )
    text = turn.text.strip()
    parts: tuple[Part, ...] = (images[0], TextPart(f"\n{text}")) if text else (images[0],)
    return Turn(turn.role, parts, turn.supervised)
