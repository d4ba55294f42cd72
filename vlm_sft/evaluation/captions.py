"""Loss of held-out answers with their own picture and with another one: does the model look."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_sft.constants import IGNORE_INDEX
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.masking import expand
from vlm_sft.evaluation.probes import derangement
from vlm_sft.evaluation.statistics import cluster_bootstrap_ratio
from vlm_sft.inference import VlmRun


@dataclass(frozen=True)
class CaptionLoss:
    """Summed losses in nats of a record's supervised tokens."""

    image: str
    num_tokens: int
    right: float
    shuffled: float


def other_pictures(records: Sequence[Conversation], *, seed: int) -> dict[str, str]:
    """Another record's picture for each (see `derangement`)."""
    return derangement((str(record.images[0]) for record in records), seed=seed)


@torch.inference_mode()
def caption_loss(run: VlmRun, record: Conversation, other: Any) -> CaptionLoss:
    """Losses of a record with one picture: with its own, and with `other`'s."""
    rendered = run.renderer.render(record)
    tokens = run.model.vision_tower.num_tokens
    ids = expand(rendered.input_ids, tokens)
    labels = expand(rendered.input_ids, tokens, rendered.labels)
    input_ids = torch.tensor([ids, ids], device=run.device)
    targets = torch.tensor([labels, labels], device=run.device)
    pixels = torch.stack([run.pixels(record.images[0]), run.pixels(other)]).to(run.device)
    losses = run.model(input_ids, torch.ones_like(input_ids).bool(), targets, pixels)
    right, shuffled = losses.per_record_loss.tolist()
    count = sum(label != IGNORE_INDEX for label in labels)
    return CaptionLoss(str(record.images[0]), count, right, shuffled)


def summarize_captions(losses: Sequence[CaptionLoss], *, seed: int = 0) -> dict[str, Any]:
    """Loss a token with each picture, and the paired difference (shuffled - right).

    95 % percentile bootstrap over pictures.
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
