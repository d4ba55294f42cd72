"""Score training records with a model: loss with and without image and question, embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_sft.data.batch import Batch, pack_examples, pad_examples
from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource, Turn
from vlm_sft.data.dataset import Example
from vlm_sft.data.images import ImageCrops
from vlm_sft.data.tokenize import TokenizedRecord, expand
from vlm_sft.errors import RecordError, UserError
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.packed_attention import PackedLayout, install_packed_attention

EMBEDDING_SIZE: Final = 128
"""Most numbers of an embedding; wider hidden states are projected at random."""
_IMAGES_AT_ONCE: Final = 16
"""Images, or groups of images of a record, that go through the tower together."""


@dataclass(frozen=True)
class RecordScores:
    """What a model says of a record.

    Attributes:
        num_tokens: Supervised tokens of its answers, stop tokens included.
        loss: Mean loss of these tokens, in nats.
        loss_blank: The same with every image in one color; None without images.
        loss_alone: The same without the text of the questions; the images stay.
        embedding: Mean hidden state at the supervised tokens, of length 1,
            `[min(D, EMBEDDING_SIZE)]`.
    """

    num_tokens: int
    loss: float
    loss_blank: float | None
    loss_alone: float | None
    embedding: NDArray[np.float16]

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return float(np.exp(self.loss))

    @property
    def ifd(self) -> float | None:
        """Instruction-following difficulty: loss by loss without question (arXiv 2308.12032)."""
        return self.loss / self.loss_alone if self.loss_alone else None

    @property
    def necessity(self) -> float | None:
        """Visual necessity: loss with blank images minus loss with its own (arXiv 2603.01195)."""
        return None if self.loss_blank is None else self.loss_blank - self.loss


class RecordScorer:
    """Scores records, several in one batch.

    Args:
        loaded: The model.
        max_tokens: Most tokens of a batch; a longer record is a batch of its own.
        packed: Concatenate records in one row without padding, instead of one row per record.
        only_loss: Compute neither `loss_blank` nor `loss_alone`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_tokens: int = 4096,
        packed: bool = False,
        only_loss: bool = False,
    ) -> None:
        self._loaded, self._max_tokens = loaded, max_tokens
        self._packed, self._only_loss = packed, only_loss
        if packed:
            install_packed_attention(causal_lm(loaded.model.language_model))
        color = torch.tensor([int(255 * value) for value in loaded.image_spec.mean])
        self._color = color.to(torch.uint8).view(1, 3, 1, 1)
        self._blank: Tensor | None = None

    def score(self, records: Sequence[Conversation]) -> list[RecordScores | UserError]:
        """Return the scores of records in order; an error for one that cannot be scored."""
        errors: dict[int, UserError] = {}
        examples: list[tuple[int, str, Example]] = []
        tokenizer = self._loaded.chat_tokenizer
        alone = () if self._only_loss else map(without_questions, records)
        texts = (tokenizer.tokenize_all(records), tokenizer.tokenize_all(alone))
        tokenized = zip_longest(*texts)  # many texts at once: far faster than one by one
        for number, (record, both) in enumerate(zip(records, tokenized, strict=True)):
            try:
                examples += [(number, *variant) for variant in self._variants(record, *both)]
            except UserError as error:  # a broken image, a text that cannot be tokenized
                errors[number] = error
        images = [records[number].images for number, _, _ in examples]
        examples = self._with_features(examples, images)
        losses: dict[tuple[int, str], float] = {}
        embeddings: dict[int, NDArray[np.float16]] = {}
        for batch in self._batches(examples):
            found, states = self._run([example for _, _, example in batch])
            for (number, name, _), loss, state in zip(batch, found, states, strict=True):
                losses[number, name] = loss
                if name == "own":
                    embeddings[number] = state
        counts = {
            number: int((example.labels[1:] >= 0).sum())
            for number, name, example in examples
            if name == "own"
        }
        return [
            errors.get(number)
            or RecordScores(
                counts[number],
                losses[number, "own"],
                losses.get((number, "blank")),
                losses.get((number, "alone")),
                embeddings[number],
            )
            for number in range(len(records))
        ]

    def _variants(
        self,
        record: Conversation,
        text: TokenizedRecord | RecordError,
        alone: TokenizedRecord | RecordError | None,
    ) -> Iterator[tuple[str, Example]]:
        """Yield the record, and what it is compared with.

        Args:
            record: The record.
            text: Its tokens.
            alone: Its tokens without the text of the questions; None if they are not wanted.
        """
        loaded = self._loaded
        images = loaded.load_images(record)
        own = _example(loaded, record.id, text, images)
        loaded.free_positions(len(own.input_ids) - 1)
        yield "own", own
        if alone is None:
            return
        if images:
            yield "blank", own
        yield "alone", _example(loaded, record.id, alone, images)

    @torch.inference_mode()
    def _with_features(
        self,
        examples: Sequence[tuple[int, str, Example]],
        images: Sequence[tuple[ImageSource, ...]],
    ) -> list[tuple[int, str, Example]]:
        """Return the examples with the tower's features instead of pixels.

        The tower is most of the work with short records, and sees each image once, however many
        records and variants have it.
        """
        pixels = {
            sources: example.pixel_values
            for sources, (_, _, example) in zip(images, examples, strict=True)
            if sources
        }
        tower, device = self._loaded.model.vision_tower, self._loaded.device
        features: dict[tuple[ImageSource, ...], Tensor] = {}
        distinct = list(pixels.items())
        for start in range(0, len(distinct), _IMAGES_AT_ONCE):
            group = distinct[start : start + _IMAGES_AT_ONCE]
            encoded = tower(torch.cat([crops for _, crops in group]).to(device))
            parts = encoded.split([len(crops) for _, crops in group])
            features |= {sources: part for (sources, _), part in zip(group, parts, strict=True)}
        if pixels and self._blank is None and not self._only_loss:
            crop = next(iter(pixels.values()))[:1]
            self._blank = tower(self._color.expand_as(crop).to(device))
        changed = []
        for sources, (number, name, example) in zip(images, examples, strict=True):
            found = features.get(sources)
            if name == "blank":
                assert self._blank is not None
                found = self._blank.expand(len(example.pixel_values), -1, -1)
            none = example.pixel_values[:0]
            changed.append(
                (number, name, replace(example, pixel_values=none, image_features=found))
            )
        return changed

    def _batches(
        self, examples: Sequence[tuple[int, str, Example]]
    ) -> Iterator[list[tuple[int, str, Example]]]:
        """Yield examples of similar length together."""
        batch: list[tuple[int, str, Example]] = []
        tokens = 0
        for one in sorted(examples, key=lambda one: len(one[2].input_ids)):
            length = len(one[2].input_ids)
            # Padded rows are as long as the longest, which is the last.
            total = tokens + length if self._packed else (len(batch) + 1) * length
            if batch and total > self._max_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(one)
            tokens += length
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, examples: Sequence[Example]) -> tuple[list[float], NDArray[np.float16]]:
        """Return the mean loss and the embedding of each example."""
        model, pad = self._loaded.model, self._loaded.pad_token_id
        batch = pack_examples(examples, pad) if self._packed else pad_examples(examples, pad)
        batch = batch.to(self._loaded.device)
        hidden = self._hidden(batch)
        losses = model.loss(hidden, batch).per_record_loss
        counts = torch.bincount(batch.target_records, minlength=len(examples))
        states = hidden.flatten(0, 1)[batch.target_positions].float()
        sums = states.new_zeros(len(examples), states.shape[1])
        means = sums.index_add(0, batch.target_records, states)
        means = torch.nn.functional.normalize(means @ _projection(states.shape[1]).to(means.device))
        values = cast(list[float], (losses.double() / counts).tolist())
        return values, means.cpu().numpy().astype(np.float16)

    def _hidden(self, batch: Batch) -> Tensor:
        """Return the hidden states of a batch, as `VisionLanguageModel.forward` computes them."""
        model = self._loaded.model
        image_embeds = None
        if batch.image_features is not None:
            image_embeds = model.arrange(model.project(batch.image_features), batch.layouts)
        embeds = model.embed(batch.input_ids, image_embeds)
        layout = None
        if batch.segments is not None:
            layout = PackedLayout(
                batch.segments, embeds.device, model.attention_backend,
                batch.unique_target_positions,
            )  # fmt: skip
        return model.decode(embeds, batch.attention_mask, layout)[0]


def without_questions(record: Conversation) -> Conversation:
    """Return a record whose user turns have images only."""

    def stripped(turn: Turn) -> Turn:
        if turn.role != "user":
            return turn
        return replace(turn, parts=tuple(p for p in turn.parts if isinstance(p, ImagePart)))

    return replace(record, turns=tuple(map(stripped, record.turns)))


def _example(
    loaded: LoadedModel,
    record_id: str,
    tokenized: TokenizedRecord | RecordError,
    images: Sequence[ImageCrops],
) -> Example:
    if isinstance(tokenized, RecordError):
        raise tokenized
    layouts = tuple(image.layout for image in images)
    tokens = [layout.num_tokens for layout in layouts]
    size = loaded.image_spec.size
    pixels = [image.pixels for image in images]
    return Example(
        record_id,
        torch.tensor(expand(tokenized.input_ids, tokens)),
        torch.tensor(expand(tokenized.input_ids, tokens, tokenized.labels)),
        torch.cat(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8),
        layouts=layouts,
    )


def _projection(width: int) -> Tensor:
    """Return a matrix that keeps angles approximately, `[width, min(width, EMBEDDING_SIZE)]`."""
    if width <= EMBEDDING_SIZE:
        return torch.eye(width)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, EMBEDDING_SIZE, generator=generator)
