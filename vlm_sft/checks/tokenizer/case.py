"""Findings, probe conversations, and a tokenizer with a template as the examinations see them."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from vlm_sft.data.conversation import Conversation, ImagePart, Part, Role, TextPart, Turn
from vlm_sft.data.text_encoder import exported_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.errors import RecordError
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID

Level = Literal["good", "note", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        code: Stable short name, for programs.
        level: `good`; `note`: good to know; `warning`: other tools, or rare records, will differ;
            `bad`: training would teach something else than inference needs.
        what: What was looked at.
        found: What came out.
        advice: What to do; "" where there is nothing to do.
    """

    code: str
    level: Level
    what: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Probe:
    """A conversation that a template is tried on."""

    name: str
    conversation: Conversation

    @property
    def has_image(self) -> bool:
        """Whether a turn has one."""
        return bool(self.conversation.images)

    def prompts(self) -> Iterator[tuple[int, Conversation]]:
        """What inference is asked before each answer, with the answer's number."""
        turns = self.conversation.turns
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        for number, at in enumerate(answers):
            yield number, conversation_of(self.name, *turns[:at])


class Case:
    """A tokenizer and a template with the probes that the template can hold, tokenized."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_name: str,
        chat_tokenizer: ChatTokenizer,
        generation_config: Mapping[str, Any] | None,
    ) -> None:
        self.tokenizer, self.template_name, self.chat_tokenizer = (
            tokenizer,
            template_name,
            chat_tokenizer,
        )
        self.generation_config = generation_config
        self.encoder = chat_tokenizer.encoder
        self.control = chat_tokenizer.special_token_ids
        self.eot_token = chat_tokenizer.template.eot_token
        self.eot_token_id = chat_tokenizer.eot_token_id
        self.probes: list[tuple[Probe, TokenizedRecord]] = []
        self.refused: list[tuple[Probe, RecordError]] = []
        for probe in PROBES:
            try:
                self.probes.append((probe, chat_tokenizer.tokenize(probe.conversation)))
            except RecordError as error:
                self.refused.append((probe, error))

    @property
    def text_probes(self) -> list[tuple[Probe, TokenizedRecord]]:
        """The probes without images."""
        return [(probe, tokenized) for probe, tokenized in self.probes if not probe.has_image]

    @functools.cached_property
    def exported(self) -> PreTrainedTokenizerBase:
        """The tokenizer as an export writes it."""
        return exported_tokenizer(self.tokenizer, self.chat_tokenizer.to_jinja())

    def exported_ids(self, conversation: Conversation, *, generate: bool) -> list[int]:
        """What the export's `apply_chat_template` gives, images as `IMAGE_TOKEN_ID`."""
        ids = self.exported.apply_chat_template(
            messages_of(conversation), add_generation_prompt=generate, return_dict=False
        )
        image = self.exported.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        return [IMAGE_TOKEN_ID if token == image else token for token in ids]

    def control_of(self, ids: Sequence[int]) -> list[int]:
        """The control ids among these, in order."""
        return [token for token in ids if token in self.control]

    def words(self, ids: Sequence[int]) -> str:
        """The exact ordinary text of a sequence, without control tokens and images."""
        kept = [token for token in ids if token not in self.control and token != IMAGE_TOKEN_ID]
        return self.encoder.decode(kept)

    def tokens(self, ids: Sequence[int]) -> str:
        """Tokens as the vocabulary spells them, for people."""
        return " ".join(
            IMAGE_PLACEHOLDER
            if token == IMAGE_TOKEN_ID
            else str(self.tokenizer.convert_ids_to_tokens(token))
            for token in ids
        )

    def difference(self, ours: Sequence[int], theirs: Sequence[int]) -> str:
        """The first tokens by which two sequences differ, with a few tokens around."""
        at = first_difference(ours, theirs)
        around = [self.tokens(ids[max(0, at - 3) : at + 4]) for ids in (ours, theirs)]
        return f"at token {at}: '{around[0]}' here, '{around[1]}' there"


def conversation_of(name: str, *turns: Turn) -> Conversation:
    """A record of these turns, with an image for each image part."""
    images = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    return Conversation(f"probe: {name}", turns, (b"",) * images, "<doctor>")


def _turn(role: Role, *parts: str | int) -> Turn:
    made: list[Part] = [TextPart(p) if isinstance(p, str) else ImagePart(p) for p in parts]
    return Turn(role, tuple(made))


def exchange(question: str, answer: str) -> tuple[Turn, Turn]:
    """A question and its answer."""
    return _turn("user", question), _turn("assistant", answer)


_LATER = (
    *exchange("Why?", "Because 3 of them are closed."),
    *exchange("Name one, please.", "The café's door; it isn't new."),
)


PROBES = tuple(
    Probe(name, conversation_of(name, *turns))
    for name, turns in {
        "text only": exchange("Is there a dog?", "Yes, on the left of the table."),
        "3 turns": (*exchange("Is there a dog?", "No."), *_LATER),
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
            *_LATER,
        ),
    }.items()
)


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """The turns as transformers takes them: text with `<image>`, or lists of parts."""
    return [{"role": turn.role, "content": _content(turn)} for turn in conversation.turns]


def _content(turn: Turn) -> str | list[dict[str, str]]:
    if turn.image_separator is not None:
        texts = (p.text if isinstance(p, TextPart) else IMAGE_PLACEHOLDER for p in turn.parts)
        return "".join(texts)
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in turn.parts
    ]


def text_of(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """What the tokenizer's chat template writes for these turns."""
    return str(tokenizer.apply_chat_template(messages_of(conversation), tokenize=False))


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first place at which two sequences differ; the shorter one's end if there is none."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def listing(names: Sequence[str]) -> str:
    """Up to eight names, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def counted(number: int, noun: str) -> str:
    """`1 piece`, `2 pieces`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
