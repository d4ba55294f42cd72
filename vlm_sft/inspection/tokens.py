"""View a record's tokens as text: which are trained, which are special, exactly as decoded."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.errors import RecordError
from vlm_sft.inspection.records import Inspected
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID
from vlm_sft.utils.escape import escape_control

SpanKind = Literal["context", "trained", "untrained"]
"""`context`: input only; `trained`: has labels; `untrained`: an answer without labels."""

MAX_TOKENS_PER_CHARACTER: Final = 16
"""Tokens that are collected for one character before they are shown as they are."""


@dataclass(frozen=True)
class Token:
    """The text of one token, or of several that only together form a character.

    Attributes:
        text: The decoded text, or the name of a special token.
        is_special: The text is a special token's, or stands for an image.
        image: Number of the image in its record, from 1; 0 for all other tokens.
        image_tokens: Tokens of that image.
    """

    text: str
    is_special: bool = False
    image: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class TokenSpan:
    """Adjacent tokens of one kind."""

    kind: SpanKind
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """The concatenated text of the tokens."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True)
class TokenView:
    """A tokenized record, split into spans for display.

    Attributes:
        spans: All tokens in order; each answer has spans of its own.
        input_ids: Token ids, with one `IMAGE_TOKEN_ID` per image.
        labels: `IGNORE_INDEX` at every position that is not trained.
        length: Number of tokens, image tokens included.
        num_images: Number of images.
        special_texts: Names of the tokenizer's special tokens, and the image placeholder.
    """

    spans: tuple[TokenSpan, ...]
    input_ids: list[int]
    labels: list[int]
    length: int
    num_images: int
    special_texts: tuple[str, ...] = (IMAGE_PLACEHOLDER,)

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def num_text_tokens(self) -> int:
        """Number of tokens without image tokens."""
        return len(self.input_ids) - self.num_images

    def __str__(self) -> str:
        """Return the text with the trained tokens between ⟦ and ⟧; see `shown_texts`."""
        texts = []
        for span in self.spans:
            text = "".join(text for _, text in self.shown_texts(span))
            texts.append(f"⟦{text}⟧" if span.kind == "trained" else text)
        return "".join(texts)

    def shown_texts(self, span: TokenSpan) -> Iterator[tuple[bool, str]]:
        """Yield the text of a span in pieces that are safe to print, each with `is_special`.

        Ordinary text that equals the name of a special token, `<image>` or one of the marks gets a
        backslash, so that it differs from the real one. Control characters are shown as symbols
        (␛), so that data cannot control the terminal.
        """
        for is_special, tokens in itertools.groupby(span.tokens, key=lambda t: t.is_special):
            text = "".join(token.text for token in tokens)
            text = text if is_special else marked(text, self.special_texts)
            yield is_special, escape_control(text)


def marked(text: str, special_texts: Sequence[str]) -> str:
    """Put a backslash before names of special tokens and marks, and before such backslashes."""
    # Longest first: a name can be the beginning of another one.
    names = sorted({*special_texts, "⟦", "⟧"}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    return re.sub(rf"(\\*)({pattern})", r"\1\1\\\2", text)


def view_tokens(
    found: Inspected, chat_tokenizer: ChatTokenizer, layout_rule: LayoutRule
) -> TokenView | None:
    """Return a record's tokens in spans; None if the record cannot be tokenized.

    In a record that training does not use, no token counts as trained.
    """
    conversation = found.conversation
    if conversation is None:
        return None
    try:
        tokenized = chat_tokenizer.tokenize(conversation)
    except RecordError:
        return None
    kept = found.result.tokenized
    labels = [IGNORE_INDEX] * len(tokenized.labels) if kept is None else kept.labels
    image_tokens = [layout.num_tokens for layout in found.layouts]
    if len(image_tokens) < tokenized.num_images:  # an image is missing or broken
        if layout_rule.needs_sizes:
            return None
        image_tokens = [layout_rule.crop_tokens] * tokenized.num_images
    return view_tokenized(tokenized, labels, chat_tokenizer, image_tokens)


def view_tokenized(
    tokenized: TokenizedRecord,
    labels: list[int],
    chat_tokenizer: ChatTokenizer,
    image_tokens: Sequence[int],
) -> TokenView:
    """Return the tokens of a tokenized record in spans.

    Args:
        tokenized: The record.
        labels: Which tokens count as trained.
        chat_tokenizer: Decodes the ids.
        image_tokens: Tokens of each image.
    """
    ids = tokenized.input_ids
    images = enumerate(image_tokens, 1)
    spans: list[TokenSpan] = []
    end = 0
    for answer in tokenized.answer_spans:
        spans += _spans(ids, labels, end, answer.start, "context", chat_tokenizer, images)
        spans += _spans(ids, labels, answer.start, answer.end, "untrained", chat_tokenizer, images)
        end = answer.end
    spans += _spans(ids, labels, end, len(ids), "context", chat_tokenizer, images)
    num_images = tokenized.num_images
    length = tokenized.expanded_length(image_tokens)
    special_texts = (IMAGE_PLACEHOLDER, *chat_tokenizer.encoder.special_tokens)
    return TokenView(tuple(spans), ids, labels, length, num_images, special_texts)


def as_json(found: Inspected, chat_tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return a tokenized record as plain values, for other programs.

    `input_ids` contains one `image_token_id` per image; `labels` is -100 at every position that is
    not trained; `tokens` are the names in the vocabulary.
    """
    result = found.result
    tokenized = result.tokenized or result.untruncated
    assert tokenized is not None
    ids = tokenized.input_ids
    row = {
        "id": found.entry.record_id,
        "where": found.entry.where,
        "outcome": found.bucket,
        "input_ids": ids,
        "labels": [IGNORE_INDEX] * len(ids) if result.tokenized is None else tokenized.labels,
        "tokens": [_name_of_token(i, chat_tokenizer) for i in ids],
        "num_images": ids.count(IMAGE_TOKEN_ID),
        "image_token_id": IMAGE_TOKEN_ID,
    }
    if found.entry.reason:
        row |= {"reason": found.entry.reason, "message": found.entry.message}
    return row


def _spans(
    ids: Sequence[int],
    labels: Sequence[int],
    start: int,
    end: int,
    kind_without_label: SpanKind,
    chat_tokenizer: ChatTokenizer,
    images: Iterator[tuple[int, int]],
) -> Iterator[TokenSpan]:
    """Yield the spans of `ids[start:end]`, split where labels begin and end."""
    pairs = zip(ids[start:end], labels[start:end], strict=True)
    for is_trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        tokens = tuple(_tokens([token_id for token_id, _ in group], chat_tokenizer, images))
        yield TokenSpan("trained" if is_trained else kind_without_label, tokens)


def _tokens(
    ids: Sequence[int], chat_tokenizer: ChatTokenizer, images: Iterator[tuple[int, int]]
) -> Iterator[Token]:
    special = set(chat_tokenizer.encoder.special_tokens.values()) | {IMAGE_TOKEN_ID}
    for is_special, group in itertools.groupby(ids, key=special.__contains__):
        if not is_special:
            yield from map(Token, _texts(list(group), chat_tokenizer))
            continue
        for token_id in group:
            image = next(images) if token_id == IMAGE_TOKEN_ID else (0, 0)
            yield Token(_name_of_token(token_id, chat_tokenizer), True, *image)


def _texts(ids: list[int], chat_tokenizer: ChatTokenizer) -> list[str]:
    """Return the text of each ordinary token; their concatenation is the decoded sequence."""
    decoded = chat_tokenizer.encoder.decode(ids)
    texts: list[str] = []
    pending: list[int] = []
    for token_id in ids:
        # A byte-level token can be a fragment of a UTF-8 character, which decodes to U+FFFD: wait
        # for the tokens that complete the character.
        pending.append(token_id)
        text = chat_tokenizer.encoder.decode(pending)
        if "\ufffd" not in text or len(pending) >= MAX_TOKENS_PER_CHARACTER:
            texts.append(text)
            pending = []
    if pending:
        texts.append(chat_tokenizer.encoder.decode(pending))
    # Some decoders treat a token differently at the start of a text. Then show the whole text as
    # one token rather than text that was never encoded.
    return texts if "".join(texts) == decoded else [decoded]


def _name_of_token(token_id: int, chat_tokenizer: ChatTokenizer) -> str:
    if token_id == IMAGE_TOKEN_ID:
        return IMAGE_PLACEHOLDER
    return str(chat_tokenizer.tokenizer.convert_ids_to_tokens(token_id))
