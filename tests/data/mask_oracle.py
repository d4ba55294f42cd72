"""The expected ids and labels of a conversation, written down independently of ChatTokenizer.

Two independent readings are compared: `expected` writes a conversation as the model's makers
describe their format, `read` turns ids back into text byte by byte from the vocabulary alone.
Nothing here calls the chat tokenizer's own encoder, its templates or its proof.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from tests.tokenizers_for_tests import load
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.errors import RecordError

MASKED = -100
IMAGE_ID = -200

VICUNA_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {who}'s questions."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Pair:
    """A template on a tokenizer, and the facts that the oracle needs of the two."""

    template: str
    tokenizer: str
    format: str
    """Which of the formats below; `auto` on Qwen's tokenizer writes `qwen`."""
    takes_system: bool = True
    max_exchanges: int = 6
    grows: bool = True
    """A longer conversation begins with the ids of the shorter one."""

    @property
    def name(self) -> str:
        return f"{self.template}-{self.tokenizer}"


MAIN_PAIRS = (
    Pair("chatml", "qwen", "chatml"),
    Pair("gemma", "gemma", "gemma"),
    Pair("internvl2_5", "bytes-img", "internvl"),
    Pair("llama_3", "llama_3", "llama_3"),
    Pair("llava_llama_2", "llama_2_file", "llava_llama_2"),
    Pair("llava_onevision", "qwen", "llava_onevision"),
    Pair("llava_plain", "llama_2_file", "llava_plain", takes_system=False, max_exchanges=1),
    Pair("llava_v1", "sentencepiece", "llava_v1"),
    Pair("mistral", "llama_2_file", "mistral"),
    Pair("phi_3", "phi_3", "phi_3"),
    Pair("plain", "sentencepiece", "plain", takes_system=False, max_exchanges=1),
    Pair("smollm2", "qwen", "smollm2"),
    Pair("vicuna_v1", "sentencepiece", "vicuna_v1"),
    Pair("auto", "qwen", "qwen"),
)
"""One tokenizer for every template."""

OTHER_PAIRS = (
    Pair("chatml", "bytes", "chatml"),
    Pair("chatml", "bpe", "chatml"),
    Pair("chatml", "smollm2", "chatml"),
    Pair("smollm2", "smollm2", "smollm2"),
    Pair("smollm2", "bytes", "smollm2"),
    Pair("llava_llama_2", "sentencepiece", "llava_llama_2"),
    Pair("llava_v1", "llama_2_file", "llava_v1"),
    Pair("mistral", "sentencepiece", "mistral"),
    Pair("plain", "bytes", "plain", takes_system=False, max_exchanges=1),
    Pair("plain", "llama_2_file", "plain", takes_system=False, max_exchanges=1),
    Pair("plain", "qwen", "plain", takes_system=False, max_exchanges=1),
    Pair("vicuna_v1", "bytes", "vicuna_v1"),
    Pair("vicuna_v1", "llama_2_file", "vicuna_v1"),
    Pair("vicuna_v1", "llama_3", "vicuna_v1"),
    Pair("auto", "bytes", "chatml"),
    Pair("auto", "bpe", "chatml"),
    Pair("auto", "gemma", "gemma", takes_system=False),
    Pair("auto", "llama_3", "llama_3"),
    Pair("auto", "phi_3", "phi_3_own", grows=False),
    Pair("auto", "sentencepiece", "mistral_own", takes_system=False, grows=False),
    Pair("auto", "smollm2", "smollm2"),
)

DUMMY_SPACE: dict[str, Literal["first", "always"]] = {
    "sentencepiece": "first",
    "llama_2_file": "always",
    "phi_3": "always",
}
"""Where SentencePiece tokenizers put a space of their own: before the text, or before every
stretch of it that begins the sequence or follows a control token or an image."""


@functools.cache
def chat_tokenizer(pair: Pair) -> ChatTokenizer:
    return ChatTokenizer.from_name(pair.template, load(pair.tokenizer))


# --- what must come out


@dataclass(frozen=True)
class Item:
    """A control token by name, an image, or text; `turn` where it belongs to an answer."""

    kind: Literal["control", "image", "text"]
    text: str = ""
    turn: int | None = None


@dataclass
class _Writer:
    bos: str | None
    eos: str | None
    items: list[Item] = field(default_factory=list)

    def control(self, name: str | None) -> None:
        if name is not None:
            self.items.append(Item("control", name))

    def text(self, text: str) -> None:
        self.items.append(Item("text", text))

    def said(self, turn: Turn) -> None:
        for part in turn.parts:
            self.items.append(
                Item("text", part.text) if isinstance(part, TextPart) else Item("image")
            )

    def answer(
        self, index: int, turn: Turn, stop: str | None, before: str = "", after: str = ""
    ) -> None:
        text = before + "".join(p.text for p in turn.parts if isinstance(p, TextPart)) + after
        self.items.append(Item("text", text, index))
        if stop is not None:
            self.items.append(Item("control", stop, index))


def expected(pair: Pair, conversation: Conversation) -> list[Item]:
    """The conversation in its format, with the spaces that the tokenizer is known to add."""
    tokenizer = load(pair.tokenizer)
    bos, eos = (None if t is None else str(t) for t in (tokenizer.bos_token, tokenizer.eos_token))
    writer = _Writer(bos, eos)
    FORMATS[pair.format](writer, conversation.turns)
    items = [item for item in writer.items if item.kind != "text" or item.text]
    if pair.tokenizer == "qwen":
        items = _composed(items)
    return _with_dummy_spaces(pair, items)


def _vicuna(who: str, writer: _Writer, turns: Sequence[Turn]) -> None:
    writer.control(writer.bos)
    if turns[0].role != "system":
        writer.text(VICUNA_SYSTEM.format(who=who) + " ")
    for index, turn in enumerate(turns):
        if turn.role == "system":
            writer.said(turn)
            writer.text(" ")
        elif turn.role == "user":
            writer.text("USER: ")
            writer.said(turn)
            writer.text(" ASSISTANT:")
        else:
            writer.answer(index, turn, writer.eos, before=" ")


def _plain(newline: bool, writer: _Writer, turns: Sequence[Turn]) -> None:
    user, answer = turns
    writer.control(writer.bos)
    writer.items += [Item("image") for part in user.parts if isinstance(part, ImagePart)]
    if newline:
        writer.answer(1, answer, None, after="\n")
    else:
        writer.answer(1, answer, writer.eos)


def _llava_llama_2(writer: _Writer, turns: Sequence[Turn]) -> None:
    first = True
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            writer.answer(index, turn, writer.eos, before=" ", after=" ")
        elif turn.role == "user":
            writer.control(writer.bos)
            writer.text("[INST] ")
            if first:
                writer.text("<<SYS>>\n")
                if turns[0].role == "system":
                    writer.said(turns[0])
                else:
                    writer.text(LLAVA_LLAMA_2_SYSTEM)
                writer.text("\n<</SYS>>\n\n")
                first = False
            writer.said(turn)
            writer.text(" [/INST]")


def _mistral(own: bool, writer: _Writer, turns: Sequence[Turn]) -> None:
    writer.control(writer.bos)
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            writer.answer(index, turn, writer.eos, before="" if own else " ")
            writer.text(" " if own else "")
        elif turn.role == "user":
            writer.text("[INST] ")
            if index == 1 and turns[0].role == "system":
                writer.said(turns[0])
                writer.text("\n\n")
            writer.said(turn)
            writer.text(" [/INST]")


def _llama_3(writer: _Writer, turns: Sequence[Turn]) -> None:
    writer.control("<|begin_of_text|>")
    for index, turn in enumerate(turns):
        writer.control("<|start_header_id|>")
        writer.text(turn.role)
        writer.control("<|end_header_id|>")
        writer.text("\n\n")
        if turn.role == "assistant":
            writer.answer(index, turn, "<|eot_id|>")
        else:
            writer.said(turn)
            writer.control("<|eot_id|>")


def _chatml(system: str | None, writer: _Writer, turns: Sequence[Turn]) -> None:
    if system is not None and turns[0].role != "system":
        writer.control("<|im_start|>")
        writer.text(f"system\n{system}")
        writer.control("<|im_end|>")
        writer.text("\n")
    for index, turn in enumerate(turns):
        writer.control("<|im_start|>")
        writer.text(f"{turn.role}\n")
        if turn.role == "assistant":
            writer.answer(index, turn, "<|im_end|>")
        else:
            writer.said(turn)
            writer.control("<|im_end|>")
        writer.text("\n")


def _gemma(writer: _Writer, turns: Sequence[Turn]) -> None:
    writer.control("<bos>")
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            writer.control("<start_of_turn>")
            writer.text("model\n")
            writer.answer(index, turn, "<end_of_turn>")
            writer.text("\n")
        elif turn.role == "user":
            writer.control("<start_of_turn>")
            writer.text("user\n")
            if index == 1 and turns[0].role == "system":
                writer.said(turns[0])
                writer.text("\n\n")
            writer.said(turn)
            writer.control("<end_of_turn>")
            writer.text("\n")


def _phi_3(ends_text: bool, writer: _Writer, turns: Sequence[Turn]) -> None:
    # Its special tokens strip the newlines that its template writes after them.
    for index, turn in enumerate(turns):
        writer.control(f"<|{turn.role}|>")
        if turn.role == "assistant":
            writer.answer(index, turn, "<|end|>")
        else:
            writer.said(turn)
            writer.control("<|end|>")
    if ends_text:
        writer.control("<|endoftext|>")


def _internvl(writer: _Writer, turns: Sequence[Turn]) -> None:
    _chatml(None, writer, turns)
    for index in reversed(range(len(writer.items))):
        if writer.items[index].kind == "image":
            writer.items.insert(index + 1, Item("control", "</img>"))
            writer.items.insert(index, Item("control", "<img>"))


def _llava_onevision(writer: _Writer, turns: Sequence[Turn]) -> None:
    for index, turn in enumerate(turns):
        writer.control("<|im_start|>")
        if turn.role == "assistant":
            writer.text("assistant\n")
            writer.answer(index, turn, "<|im_end|>")
            continue
        writer.text(f"{turn.role} ")
        written = [p for p in turn.parts if not isinstance(p, TextPart) or p.text]
        if written and isinstance(written[0], TextPart):
            writer.text("\n")
        writer.said(turn)
        writer.control("<|im_end|>")


FORMATS = {
    "llava_onevision": _llava_onevision,
    "vicuna_v1": functools.partial(_vicuna, "user"),
    "llava_v1": functools.partial(_vicuna, "human"),
    "plain": functools.partial(_plain, False),
    "llava_plain": functools.partial(_plain, True),
    "llava_llama_2": _llava_llama_2,
    "mistral": functools.partial(_mistral, False),
    "mistral_own": functools.partial(_mistral, True),
    "llama_3": _llama_3,
    "chatml": functools.partial(_chatml, None),
    "qwen": functools.partial(_chatml, QWEN_SYSTEM),
    "smollm2": functools.partial(_chatml, SMOLLM2_SYSTEM),
    "gemma": _gemma,
    "internvl": _internvl,
    "phi_3": functools.partial(_phi_3, False),
    "phi_3_own": functools.partial(_phi_3, True),
}


def _composed(items: list[Item]) -> list[Item]:
    """Qwen's tokenizer composes characters; answers and their headers are apart."""
    merged: list[Item] = []
    for item in items:
        last = merged[-1] if merged else None
        if last is not None and item.kind == last.kind == "text" and item.turn == last.turn:
            merged[-1] = replace(last, text=last.text + item.text)
        else:
            merged.append(item)
    return [replace(i, text=unicodedata.normalize("NFC", i.text)) for i in merged]


def _with_dummy_spaces(pair: Pair, items: list[Item]) -> list[Item]:
    """Where text starts: before anything, after BOS in the textual formats, or `always`."""
    rule = DUMMY_SPACE.get(pair.tokenizer)
    with_spaces: list[Item] = []
    for item in items:
        if item.kind == "text" and (not with_spaces or with_spaces[-1].kind != "text"):
            bos = (
                len(with_spaces) == 1
                and with_spaces[0].kind == "control"
                and pair.template != "auto"
            )
            first = (not with_spaces or bos) and not item.text.startswith((" ", "▁"))
            if rule == "always" or (rule == "first" and first):
                item = replace(item, text=" " + item.text)
        with_spaces.append(item)
    return with_spaces


# --- what did come out


def read(tokenizer_name: str, ids: Iterable[int]) -> list[Item]:
    """Ids as control tokens, images and stretches of text, from the vocabulary alone."""
    items: list[Item] = []
    pending = b""
    control = control_names(tokenizer_name)
    for index in ids:
        if index != IMAGE_ID and index not in control:
            pending += token_bytes(tokenizer_name, index)
            continue
        if pending:
            items.append(Item("text", pending.decode("utf-8")))
            pending = b""
        items.append(Item("image") if index == IMAGE_ID else Item("control", control[index]))
    if pending:
        items.append(Item("text", pending.decode("utf-8")))
    return items


@functools.cache
def control_names(tokenizer_name: str) -> dict[int, str]:
    """Every added token that is more than white space: what data must never become."""
    added = load(tokenizer_name).added_tokens_decoder
    return {index: str(token) for index, token in added.items() if str(token).strip()}


@functools.lru_cache(maxsize=500_000)
def token_bytes(tokenizer_name: str, index: int) -> bytes:
    """Return the bytes of an ordinary token."""
    tokenizer = load(tokenizer_name)
    if index in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[index]).encode()
    token: str = tokenizer.convert_ids_to_tokens(index)
    if tokenizer_name in ("sentencepiece", "llama_2_file", "phi_3", "gemma"):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()
    return bytes(_byte_of_letter()[letter] for letter in token)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


@functools.cache
def _unencodable_bytes(tokenizer_name: str) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no token for (SmolLM2 lacks some)."""
    vocabulary = load(tokenizer_name).get_vocab()
    if "Ġ" not in vocabulary:
        return frozenset()
    return frozenset(b for letter, b in _byte_of_letter().items() if letter not in vocabulary)


def can_encode(tokenizer_name: str, text: str) -> bool:
    """Whether every byte of the text has a token."""
    return _unencodable_bytes(tokenizer_name).isdisjoint(text.encode())


# --- the comparison


def check(pair: Pair, conversation: Conversation) -> int:
    """Hold one conversation to every invariant; returns its number of tokens.

    Text that the vocabulary cannot encode must be refused, not shortened.
    """
    by = chat_tokenizer(pair)
    if not all(can_encode(pair.tokenizer, turn.text) for turn in conversation.turns):
        with pytest.raises(RecordError):
            by.tokenize(conversation)
        return 0
    tokenized = by.tokenize(conversation)
    items = expected(pair, conversation)
    ids, labels = tokenized.input_ids, tokenized.labels

    # The sequence says what the format says, control tokens where it puts them and nowhere else.
    assert read(pair.tokenizer, ids) == merged(items)
    assert ids.count(IMAGE_ID) == len(conversation.images)

    # A label is the token itself or nothing.
    assert len(labels) == len(ids)
    assert all(label in (token, MASKED) for token, label in zip(ids, labels, strict=True))

    # The labels in a row are the supervised answers and their stops, in order, and nothing else.
    trained = [i for i, turn in enumerate(conversation.turns) if _is_trained(turn)]
    wanted = [[i for i in items if i.turn == turn] for turn in trained]
    starts = supervised_runs(labels)
    found = [read(pair.tokenizer, labels[start:end]) for start, end in starts]
    assert found == [[replace(i, turn=None) for i in merged(answer)] for answer in wanted if answer]

    # An answer starts where the prompt of the turns before it ends.
    check_prompts(pair, conversation, tokenized, trained, starts)
    return len(ids)


def check_prompts(
    pair: Pair,
    conversation: Conversation,
    tokenized: TokenizedRecord,
    trained: Sequence[int],
    starts: Sequence[tuple[int, int]],
) -> None:
    """Prompts and shorter conversations are exact beginnings of the training ids."""
    by = chat_tokenizer(pair)
    start_of = dict(zip(trained, (start for start, _ in starts), strict=True)) if starts else {}
    for index, turn in enumerate(conversation.turns):
        if turn.role != "assistant":
            continue
        prompt = by.prompt(first_turns(conversation, index))
        assert tokenized.input_ids[: len(prompt)] == prompt
        assert start_of.get(index, len(prompt)) == len(prompt)
        if pair.grows and index + 1 < len(conversation.turns):
            shorter = by.tokenize(first_turns(conversation, index + 1))
            assert tokenized.input_ids[: len(shorter.input_ids)] == shorter.input_ids
            assert tokenized.labels[: len(shorter.labels)] == shorter.labels


def _is_trained(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.supervised


def supervised_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges of adjacent positions that carry a label."""
    runs: list[tuple[int, int]] = []
    start = None
    for position, label in enumerate([*labels, MASKED]):
        if label != MASKED and start is None:
            start = position
        elif label == MASKED and start is not None:
            runs.append((start, position))
            start = None
    return runs


def first_turns(conversation: Conversation, count: int) -> Conversation:
    """The conversation's first `count` turns with the images in them."""
    turns = conversation.turns[:count]
    images = sum(isinstance(p, ImagePart) for turn in turns for p in turn.parts)
    return Conversation(conversation.id, turns, conversation.images[:images], conversation.where)


def merged(items: Sequence[Item]) -> list[Item]:
    """Items without turns, text joined to text."""
    joined: list[Item] = []
    for item in items:
        if item.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Item("text", joined[-1].text + item.text)
        else:
            joined.append(replace(item, turn=None))
    return [item for item in joined if item.kind != "text" or item.text]
