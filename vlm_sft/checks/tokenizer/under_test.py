"""Define findings, the sample conversations, and the tokenizer under test."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from transformers import PreTrainedTokenizerBase

from vlm_sft.data.conversation import Conversation, ImagePart, Part, Role, TextPart, Turn
from vlm_sft.data.hf_tokenizer import exported_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.errors import RecordError
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID

Level = Literal["good", "note", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        code: Stable short name, for programs.
        level: `good`; `note`: worth knowing; `warning`: other tools or rare records behave
            differently; `bad`: training and inference would use different tokens.
        what: Subject of the check.
        found: Result of the check.
        advice: What to do about it; "" if nothing needs to be done.
    """

    code: str
    level: Level
    what: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Sample:
    """A conversation on which a template is tested."""

    name: str
    conversation: Conversation

    @property
    def has_image(self) -> bool:
        """Whether a turn has an image."""
        return bool(self.conversation.images)

    def prompts(self) -> Iterator[tuple[int, Conversation]]:
        """Yield the number of each answer, and the turns before it."""
        turns = self.conversation.turns
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        for number, index in enumerate(answers):
            yield number, conversation_of(self.name, *turns[:index])


class TokenizerUnderTest:
    """A tokenizer and a chat template, with the samples that the template accepts, tokenized.

    Attributes:
        special_ids: Ids of all special tokens, which data must never produce.
        eot_token: Text of the token that ends an answer; "" if the template has none.
        eot_token_id: Its id; None if the template has none.
        samples: Accepted samples, tokenized for training.
        refused: Samples that the template does not accept, and why.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_name: str,
        chat_tokenizer: ChatTokenizer,
        generation_config: Mapping[str, Any] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_name = template_name
        self.chat_tokenizer = chat_tokenizer
        self.generation_config = generation_config
        self.encoder = chat_tokenizer.encoder
        self.special_ids = chat_tokenizer.special_token_ids
        self.eot_token = chat_tokenizer.template.eot_token
        self.eot_token_id = chat_tokenizer.eot_token_id
        self.samples: list[tuple[Sample, TokenizedRecord]] = []
        self.refused: list[tuple[Sample, RecordError]] = []
        for sample in SAMPLES:
            try:
                self.samples.append((sample, chat_tokenizer.tokenize(sample.conversation)))
            except RecordError as error:
                self.refused.append((sample, error))

    @property
    def text_samples(self) -> list[tuple[Sample, TokenizedRecord]]:
        """The accepted samples without images."""
        return [(sample, tokenized) for sample, tokenized in self.samples if not sample.has_image]

    @functools.cached_property
    def exported(self) -> PreTrainedTokenizerBase:
        """The tokenizer as an export writes it."""
        return exported_tokenizer(self.tokenizer, self.chat_tokenizer.to_jinja())

    def exported_ids(self, conversation: Conversation, *, generate: bool) -> list[int]:
        """Return the ids of the export's `apply_chat_template`; images are `IMAGE_TOKEN_ID`."""
        ids = self.exported.apply_chat_template(
            messages_of(conversation), add_generation_prompt=generate, return_dict=False
        )
        image = self.exported.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        return [IMAGE_TOKEN_ID if token == image else token for token in ids]

    def special_ids_in(self, ids: Sequence[int]) -> list[int]:
        """Return the special tokens of a sequence, in order."""
        return [token for token in ids if token in self.special_ids]

    def plain_text(self, ids: Sequence[int]) -> str:
        """Decode a sequence without its special tokens and images."""
        ordinary = [t for t in ids if t not in self.special_ids and t != IMAGE_TOKEN_ID]
        return self.encoder.decode(ordinary)

    def token_names(self, ids: Sequence[int]) -> str:
        """Return the vocabulary's names of tokens, separated by spaces."""
        return " ".join(
            IMAGE_PLACEHOLDER
            if token == IMAGE_TOKEN_ID
            else str(self.tokenizer.convert_ids_to_tokens(token))
            for token in ids
        )

    def describe_difference(self, expected: Sequence[int], found: Sequence[int]) -> str:
        """Return where two sequences differ first, with a few tokens of context."""
        at = first_difference(expected, found)
        context = [self.token_names(ids[max(0, at - 3) : at + 4]) for ids in (expected, found)]
        return f"at token {at}: '{context[0]}' versus '{context[1]}'"


def conversation_of(name: str, *turns: Turn) -> Conversation:
    """Return a record of these turns, with an empty image for each image part."""
    images = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    return Conversation(f"sample: {name}", turns, (b"",) * images, "<tokenizer check>")


def _turn(role: Role, *parts: str | int) -> Turn:
    built: list[Part] = [TextPart(p) if isinstance(p, str) else ImagePart(p) for p in parts]
    return Turn(role, tuple(built))


def exchange(question: str, answer: str) -> tuple[Turn, Turn]:
    """Return a question and its answer as turns."""
    return _turn("user", question), _turn("assistant", answer)


_FOLLOW_UPS: Final = (
    *exchange("Why?", "Because 3 of them are closed."),
    *exchange("Name one, please.", "The café's door; it isn't new."),
)


SAMPLES: Final = tuple(
    Sample(name, conversation_of(name, *turns))
    for name, turns in {
        "text only": exchange("Is there a dog?", "Yes, on the left of the table."),
        "3 turns": (*exchange("Is there a dog?", "No."), *_FOLLOW_UPS),
        "system": (_turn("system", "Answer briefly."), *exchange("Is there a dog?", "No.")),
        "image first": (
            _turn("user", 0, "\nWhat color is the car?"),
            _turn("assistant", "Red."),
        ),
        "image as a content part": (
            replace(_turn("user", 0, "What color is the car?"), image_separator=None),
            _turn("assistant", "Red."),
        ),
        "image later": (
            _turn("user", "What do you see here?\n", 0),
            _turn("assistant", "A red car, parked."),
        ),
        "3 turns about an image": (
            _turn("user", 0, "\nWhat is it?"),
            _turn("assistant", "A street."),
            *_FOLLOW_UPS,
        ),
    }.items()
)


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the turns as messages of transformers: text with `<image>`, or lists of parts."""
    return [{"role": turn.role, "content": _content(turn)} for turn in conversation.turns]


def _content(turn: Turn) -> str | list[dict[str, str]]:
    if turn.image_separator is not None:
        texts = (p.text if isinstance(p, TextPart) else IMAGE_PLACEHOLDER for p in turn.parts)
        return "".join(texts)
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in turn.parts
    ]


def chat_text(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Return the text that the tokenizer's chat template writes for a conversation."""
    messages = template_messages(tokenizer, conversation)
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def template_messages(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> list[dict[str, Any]]:
    """Return messages in the form that the tokenizer's chat template reads: text, or parts.

    Templates of vision-language models, such as LLaVA-1.5's, can skip contents that are plain text.
    """
    messages: list[dict[str, Any]] = list(messages_of(conversation))
    users = (m["content"] for m in messages if m["role"] == "user")
    asked = next((text for text in users if isinstance(text, str) and text), "")
    with suppress(Exception):  # a template can raise anything
        if str(asked).strip() in str(tokenizer.apply_chat_template(messages, tokenize=False)):
            return messages
    parts = [
        m | {"content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str)
        else m
        for m in messages
    ]
    with suppress(Exception):
        if str(asked).strip() in str(tokenizer.apply_chat_template(parts, tokenize=False)):
            return parts
    return messages


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the first index at which two sequences differ, or the length of the shorter one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def listing(names: Sequence[str]) -> str:
    """Return up to eight names, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def counted(number: int, noun: str) -> str:
    """Return `1 note`, `2 notes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
