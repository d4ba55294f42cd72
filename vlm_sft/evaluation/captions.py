"""Loss of held-out answers with their own image and with another one: does the model look."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlm_sft.data.batch import pad_examples
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.dataset import Example
from vlm_sft.data.tokenize import expand
from vlm_sft.evaluation.probes import derangement
from vlm_sft.evaluation.statistics import cluster_bootstrap_ratio
from vlm_sft.inference.loaded_model import VlmRun
from vlm_sft.utils.constants import IGNORE_INDEX


@dataclass(frozen=True)
class CaptionLoss:
    """Summed losses in nats of a record's supervised tokens."""

    image: str
    num_tokens: int
    right: float
    shuffled: float


def other_images(records: Sequence[Conversation], *, seed: int) -> dict[str, str]:
    """Another record's image for each (see `derangement`)."""
    return derangement((str(record.images[0]) for record in records), seed=seed)


def caption_losses(
    run: VlmRun,
    records: Sequence[Conversation],
    others: Mapping[str, str],
    *,
    batch_size: int = 8,
) -> Iterator[CaptionLoss]:
    """Losses of records with one image each, in their order: with their own, and with another's.

    Args:
        run: What is measured.
        records: One image file each.
        others: What `other_images` gave.
        batch_size: Records that go through the model together, each of them twice.

    Raises:
        ImageError: An image is missing or broken.
    """
    for start in range(0, len(records), batch_size):
        yield from _losses_of(run, records[start : start + batch_size], others)


@torch.inference_mode()
def _losses_of(
    run: VlmRun, records: Sequence[Conversation], others: Mapping[str, str]
) -> list[CaptionLoss]:
    own = [_example(run, record) for record in records]
    foreign = [
        replace(example, pixel_values=run.pixels(Path(others[str(record.images[0])]))[None])
        for example, record in zip(own, records, strict=True)
    ]
    batch = pad_examples([*own, *foreign], run.pad_token_id)
    losses = run.model(batch.to(run.device)).per_record_loss.tolist()
    return [
        CaptionLoss(str(record.images[0]), _num_targets(example), right, shuffled)
        for record, example, right, shuffled in zip(
            records, own, losses[: len(records)], losses[len(records) :], strict=True
        )
    ]


def _example(run: VlmRun, record: Conversation) -> Example:
    tokenized = run.chat_tokenizer.tokenize(record)
    tokens = run.model.vision_tower.num_tokens
    return Example(
        record.id,
        torch.tensor(expand(tokenized.input_ids, tokens)),
        torch.tensor(expand(tokenized.input_ids, tokens, tokenized.labels)),
        run.pixels(Path(str(record.images[0])))[None],
    )


def _num_targets(example: Example) -> int:
    return int((example.labels != IGNORE_INDEX).sum())


def summarize_captions(losses: Sequence[CaptionLoss], *, seed: int = 0) -> dict[str, Any]:
    """Loss a token with each image, and the paired difference (shuffled - right).

    95 % percentile bootstrap over images.
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
