"""View a record's tokens as text: which are trained, which are special, exactly as decoded."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from vlm_sft.data.tokenize import Renderer
from vlm_sft.errors import RecordError
from vlm_sft.inspection.records import Inspected
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID

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
    """

    text: str
    is_special: bool = False
    image: int = 0


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


def view_tokens(found: Inspected, renderer: Renderer, num_image_tokens: int) -> TokenView | None:
    """Return a record's tokens in spans; None if the record cannot be tokenized.

    In a record that training does not use, no token counts as trained.
    """
    conversation = found.conversation
    if conversation is None:
        return None
    try:
        rendered = renderer.render(conversation)
    except RecordError:
        return None
    ids = rendered.input_ids
    rendering = found.outcome.rendering
    labels = [IGNORE_INDEX] * len(ids) if rendering is None else rendering.labels
    images = itertools.count(1)
    spans: list[TokenSpan] = []
    end = 0
    for answer in rendered.answers:
        spans += _spans(ids, labels, end, answer.start, "context", renderer, images)
        spans += _spans(ids, labels, answer.start, answer.end, "untrained", renderer, images)
        end = answer.end
    spans += _spans(ids, labels, end, len(ids), "context", renderer, images)
    num_images = rendered.num_images
    length = len(ids) + num_images * (num_image_tokens - 1)
    special_texts = (IMAGE_PLACEHOLDER, *renderer.encoder.control_ids)
    return TokenView(tuple(spans), ids, labels, length, num_images, special_texts)


def as_json(found: Inspected, renderer: Renderer) -> dict[str, Any]:
    """Return a tokenized record as plain values, for other programs.

    `input_ids` contains one `image_token_id` per image; `labels` is -100 at every position that is
    not trained; `tokens` are the names in the vocabulary.
    """
    outcome = found.outcome
    rendering = outcome.rendering or outcome.whole
    assert rendering is not None
    ids = rendering.input_ids
    row = {
        "id": found.entry.record_id,
        "where": found.entry.where,
        "outcome": found.bucket,
        "input_ids": ids,
        "labels": [IGNORE_INDEX] * len(ids) if outcome.rendering is None else rendering.labels,
        "tokens": [_name_of_token(i, renderer) for i in ids],
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
    renderer: Renderer,
    images: Iterator[int],
) -> Iterator[TokenSpan]:
    """Yield the spans of `ids[start:end]`, split where labels begin and end."""
    pairs = zip(ids[start:end], labels[start:end], strict=True)
    for is_trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        tokens = tuple(_tokens([token_id for token_id, _ in group], renderer, images))
        yield TokenSpan("trained" if is_trained else kind_without_label, tokens)


def _tokens(ids: Sequence[int], renderer: Renderer, images: Iterator[int]) -> Iterator[Token]:
    special = set(renderer.encoder.control_ids.values()) | {IMAGE_TOKEN_ID}
    for is_special, group in itertools.groupby(ids, key=special.__contains__):
        if not is_special:
            yield from map(Token, _texts(list(group), renderer))
            continue
        for token_id in group:
            image = next(images) if token_id == IMAGE_TOKEN_ID else 0
            yield Token(_name_of_token(token_id, renderer), True, image)


def _texts(ids: list[int], renderer: Renderer) -> list[str]:
    """Return the text of each ordinary token; their concatenation is the decoded sequence."""
    decoded = renderer.encoder.decode(ids)
    texts: list[str] = []
    pending: list[int] = []
    for token_id in ids:
        # A byte-level token can be a fragment of a UTF-8 character, which decodes to U+FFFD: wait
        # for the tokens that complete the character.
        pending.append(token_id)
        text = renderer.encoder.decode(pending)
        if "\ufffd" not in text or len(pending) >= MAX_TOKENS_PER_CHARACTER:
            texts.append(text)
            pending = []
    if pending:
        texts.append(renderer.encoder.decode(pending))
    # Some decoders treat a token differently at the start of a text. Then show the whole text as
    # one token rather than text that was never encoded.
    return texts if "".join(texts) == decoded else [decoded]


def _name_of_token(token_id: int, renderer: Renderer) -> str:
    if token_id == IMAGE_TOKEN_ID:
        return IMAGE_PLACEHOLDER
    return str(renderer.tokenizer.convert_ids_to_tokens(token_id))
