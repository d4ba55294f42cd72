"""LLaVA-1.5's quirks in preparing conversations, to be reproduced or corrected."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.errors import RecordError, UserError

Quirk = Literal["caption_newline", "image_first", "space_behind_image"]

_NONE: Mapping[Quirk, str] = MappingProxyType({})


@dataclass(frozen=True)
class LlavaQuirks:
    """A named set of LLaVA's quirks to reproduce.

    Attributes:
        name: The value of `data.llava_quirks`: `none` or `llava-1.5`.
        stored_name: The name in checkpoints (`template.json`) and manifests.
        quirks: The reproduced quirks, each with a sentence for the manifest.
    """

    name: str
    stored_name: str
    quirks: Mapping[Quirk, str] = field(default_factory=lambda: _NONE)

    def __contains__(self, quirk: Quirk) -> bool:
        return quirk in self.quirks

    @classmethod
    def from_name(cls, name: str) -> "LlavaQuirks":
        """Return the set of this name or of this name in a checkpoint.

        Raises:
            UserError: There is none.
        """
        for known in (NO_QUIRKS, LLAVA_1_5):
            if name in (known.name, known.stored_name):
                return known
        raise UserError(
            f"data.llava_quirks: unknown value {name!r}; expected "
            f"{NO_QUIRKS.name} or {LLAVA_1_5.name}"
        )

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry: the reproduced and the corrected quirks with a sentence."""
        corrected = {k: v for k, v in LLAVA_1_5.quirks.items() if k not in self.quirks}
        return {
            "name": self.stored_name,
            "repeated": dict(self.quirks),
            "corrected": {**corrected, **NEVER_REPRODUCED},
        }

    def template_name(self, name: str) -> str:
        """Return the template that replaces the named one: `llava_plain` for `plain`, or itself."""
        return "llava_plain" if name == "plain" and "caption_newline" in self else name

    def rearrange(self, conversation: Conversation) -> Conversation:
        """Return the conversation with each image before its turn's text, as LLaVA puts it.

        Raises:
            RecordError: A turn has several images, of which LLaVA would keep one.
        """
        if "image_first" not in self or not conversation.images:
            return conversation
        turns = tuple(_image_first(turn, conversation) for turn in conversation.turns)
        return Conversation(conversation.id, turns, conversation.images, conversation.where)


NO_QUIRKS: Final = LlavaQuirks("none", stored_name="fixed")
LLAVA_1_5: Final = LlavaQuirks(
    "llava-1.5",
    stored_name="llava-1.5",
    quirks=MappingProxyType(
        {
            "caption_newline": "stage 1 trains a newline after the caption and no EOS "
            "(template llava_plain for plain)",
            "image_first": "a turn's image moves to a line of its own before its stripped text "
            "(preprocess_multimodal)",
            "space_behind_image": "text after an image is tokenized as the start of a text, "
            "with SentencePiece's dummy space (tokenizer_image_token)",
        }
    ),
)
NEVER_REPRODUCED: Final = {
    "zeroed_samples": "a record whose mask LLaVA cannot find trains nothing there (preprocess_v1)",
    "control_from_data": "</s> or <image> in a record's words becomes a special token there",
    "cut_answers": "records are cut at the length limit there, inside answers and images",
}


def _image_first(turn: Turn, conversation: Conversation) -> Turn:
    images = [part for part in turn.parts if isinstance(part, ImagePart)]
    if not images:
        return turn
    if len(images) > 1:
        raise RecordError(
            "several_images",
            f"`llava_quirks: llava-1.5` keeps one image per turn and this one has {len(images)}; "
            "spread them over turns, or use `llava_quirks: none`",
            record_id=conversation.id,
            where=conversation.where,
        )
    text = turn.text.strip()
    parts: tuple[Part, ...] = (images[0], TextPart(f"\n{text}")) if text else (images[0],)
    return Turn(turn.role, parts, turn.supervised)
