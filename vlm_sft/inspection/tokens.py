"""A record's tokens as people read them: what is trained, what is control, exactly as spelled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Literal

from vlm_sft.data.tokenize import Renderer
from vlm_sft.errors import RecordError
from vlm_sft.inspection.records import Inspected
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID

Fate = Literal["context", "trained", "untrained"]
"""Read only; trained; an answer that is not trained."""

LONGEST_LETTER: Final = 16
"""Tokens that are waited for until they spell a letter together."""


@dataclass(frozen=True)
class Token:
    """One token's text; of several that only together spell a letter, the letter."""

    text: str
    is_control: bool = False
    is_image: bool = False


@dataclass(frozen=True)
class Stretch:
    """Adjacent tokens of one fate."""

    fate: Fate
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """What they spell."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True)
class Spelled:
    """A record as it is shown.

    Attributes:
        stretches: In order, an answer always on its own.
        input_ids: One `IMAGE_TOKEN_ID` an image.
        labels: `IGNORE_INDEX` where nothing is trained.
        length: Tokens, image tokens included.
        num_images: Images.
        control: How the tokenizer's control tokens and an image's place are spelled.
    """

    stretches: tuple[Stretch, ...]
    input_ids: list[int]
    labels: list[int]
    length: int
    num_images: int
    control: tuple[str, ...] = (IMAGE_PLACEHOLDER,)

    @property
    def num_trained(self) -> int:
        """Trained tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def num_text_tokens(self) -> int:
        """Tokens without those of images."""
        return len(self.input_ids) - self.num_images


def spell(found: Inspected, renderer: Renderer, num_image_tokens: int) -> Spelled | None:
    """A record's tokens with their fates; None where it cannot be rendered.

    Of a record that is not trained on, nothing is marked as trained.
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
    stretches: list[Stretch] = []
    end = 0
    for span in rendered.answers:
        stretches += _stretches(ids, labels, end, span.start, "context", renderer)
        stretches += _stretches(ids, labels, span.start, span.end, "untrained", renderer)
        end = span.end
    stretches += _stretches(ids, labels, end, len(ids), "context", renderer)
    num_images = rendered.num_images
    length = len(ids) + num_images * (num_image_tokens - 1)
    control = (IMAGE_PLACEHOLDER, *renderer.encoder.control_ids)
    return Spelled(tuple(stretches), ids, labels, length, num_images, control)


def as_json(found: Inspected, renderer: Renderer) -> dict[str, Any]:
    """One rendered record for other programs.

    `input_ids` hold one `image_token_id` an image; `labels` are -100 where nothing is trained;
    `tokens` are the vocabulary's own spellings.
    """
    outcome = found.outcome
    rendering = outcome.rendering or outcome.whole
    assert rendering is not None
    ids = rendering.input_ids
    made = {
        "id": found.entry.record_id,
        "where": found.entry.where,
        "outcome": found.bucket,
        "input_ids": ids,
        "labels": [IGNORE_INDEX] * len(ids) if outcome.rendering is None else rendering.labels,
        "tokens": [_token(i, renderer) for i in ids],
        "num_images": ids.count(IMAGE_TOKEN_ID),
        "image_token_id": IMAGE_TOKEN_ID,
    }
    if found.entry.reason:
        made |= {"reason": found.entry.reason, "message": found.entry.message}
    return made


def _stretches(
    ids: Sequence[int],
    labels: Sequence[int],
    start: int,
    end: int,
    otherwise: Fate,
    renderer: Renderer,
) -> Iterator[Stretch]:
    pairs = zip(ids[start:end], labels[start:end], strict=True)
    for is_trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        tokens = tuple(_tokens([token_id for token_id, _ in group], renderer))
        yield Stretch("trained" if is_trained else otherwise, tokens)


def _tokens(ids: Sequence[int], renderer: Renderer) -> Iterator[Token]:
    control = set(renderer.encoder.control_ids.values()) | {IMAGE_TOKEN_ID}
    for is_control, group in groupby(ids, key=control.__contains__):
        if is_control:
            yield from (Token(_token(i, renderer), True, i == IMAGE_TOKEN_ID) for i in group)
        else:
            yield from map(Token, _letters(list(group), renderer))


def _letters(ids: list[int], renderer: Renderer) -> list[str]:
    """The text of each ordinary token; together exactly the text of them all."""
    whole = renderer.encoder.decode(ids)
    texts: list[str] = []
    waiting: list[int] = []
    for token_id in ids:
        waiting.append(token_id)
        text = renderer.encoder.decode(waiting)
        if "\ufffd" not in text or len(waiting) >= LONGEST_LETTER:
            texts.append(text)
            waiting = []
    if waiting:
        texts.append(renderer.encoder.decode(waiting))
    return texts if "".join(texts) == whole else [whole]


def _token(token_id: int, renderer: Renderer) -> str:
    if token_id == IMAGE_TOKEN_ID:
        return IMAGE_PLACEHOLDER
    return str(renderer.tokenizer.convert_ids_to_tokens(token_id))
