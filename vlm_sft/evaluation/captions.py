"""Compare the loss of captions with their own image and with another one.

A model that uses the image has a lower loss with the right one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_sft.data.batch import pad_examples
from vlm_sft.data.conversation import Conversation, ImageSource
from vlm_sft.data.dataset import Example
from vlm_sft.data.tokenize import expand
from vlm_sft.evaluation.conditions import derangement
from vlm_sft.evaluation.intervals import cluster_bootstrap_ratio
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.utils.constants import IGNORE_INDEX


@dataclass(frozen=True)
class CaptionLoss:
    """Summed losses of a record's trained tokens, in nats.

    Attributes:
        image: File name of the record's image.
        num_tokens: Number of trained tokens.
        right: Loss with the record's own image.
        shuffled: Loss with another record's image.
    """

    image: str
    num_tokens: int
    right: float
    shuffled: float


def other_images(records: Sequence[Conversation], *, seed: int) -> dict[str, str]:
    """Assign another record's image to each image (see `derangement`)."""
    return derangement((str(record.images[0]) for record in records), seed=seed)


def caption_losses(
    loaded: LoadedModel,
    records: Sequence[Conversation],
    others: Mapping[str, str],
    *,
    batch_size: int = 8,
) -> Iterator[CaptionLoss]:
    """Yield the losses of records with their own and with another image, in order.

    Args:
        loaded: The model.
        records: Records with one image file each.
        others: Other image of each image (`other_images`).
        batch_size: Records per batch; each is in it twice.

    Raises:
        ImageError: An image is missing or broken.
    """
    for start in range(0, len(records), batch_size):
        yield from _losses_of(loaded, records[start : start + batch_size], others)


@torch.inference_mode()
def _losses_of(
    loaded: LoadedModel, records: Sequence[Conversation], others: Mapping[str, str]
) -> list[CaptionLoss]:
    own = [_example(loaded, record, record.images[0]) for record in records]
    shuffled = [_example(loaded, record, Path(others[str(record.images[0])])) for record in records]
    batch = pad_examples([*own, *shuffled], loaded.pad_token_id)
    losses = loaded.model(batch.to(loaded.device)).per_record_loss.tolist()
    return [
        CaptionLoss(str(record.images[0]), _num_targets(example), right_loss, shuffled_loss)
        for record, example, right_loss, shuffled_loss in zip(
            records, own, losses[: len(records)], losses[len(records) :], strict=True
        )
    ]


def _example(loaded: LoadedModel, record: Conversation, source: ImageSource) -> Example:
    """Return a record with another image, or its own."""
    tokenized = loaded.chat_tokenizer.tokenize(record)
    image = loaded.load_image(source)
    tokens = [image.layout.num_tokens]
    return Example(
        record.id,
        torch.tensor(expand(tokenized.input_ids, tokens)),
        torch.tensor(expand(tokenized.input_ids, tokens, tokenized.labels)),
        image.pixels,
        layouts=(image.layout,),
    )


def _num_targets(example: Example) -> int:
    return int((example.labels != IGNORE_INDEX).sum())


def summarize_captions(losses: Sequence[CaptionLoss], *, seed: int = 0) -> dict[str, Any]:
    """Return the loss per token with each image, and the paired difference (shuffled - right).

    Intervals are 95 % percentile bootstraps over images.
    """
    images = [loss.image for loss in losses]
    tokens = [float(loss.num_tokens) for loss in losses]

    def per_token(values: list[float]) -> dict[str, float | None]:
        return cluster_bootstrap_ratio(values, tokens, images, seed=seed).as_dict()

    return {
        "records": len(losses),
        "tokens": sum(loss.num_tokens for loss in losses),
        "right": per_token([loss.right for loss in losses]),
        "shuffled": per_token([loss.shuffled for loss in losses]),
        "difference": per_token([loss.shuffled - loss.right for loss in losses]),
    }
