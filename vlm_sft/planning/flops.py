"""Count the FLOPs of a model's operators, and combine them into those of a micro-batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_sft.model.activation_checkpointing import CheckpointPolicy
from vlm_sft.planning.micro_batch import MicroBatch


@dataclass(frozen=True)
class DecoderFlops:
    """FLOPs of the language model without its head; a multiply-add counts as 2.

    Attributes:
        forward: Matrix products of one token in the forward pass.
        backward: Matrix products of one token in the backward pass: for a frozen weight as many as
            in the forward pass (gradient of the input), for a trainable one twice as many.
        attention: One query-key pair in the forward pass.
    """

    forward: float
    backward: float
    attention: float


@dataclass(frozen=True)
class Flops:
    """FLOPs of each element of a micro-batch.

    Attributes:
        decoder: A token in the decoder.
        target: A supervised token in the head, forward and backward.
        crop: A crop of an image in the tower (forward) and the projector (forward and backward).
    """

    decoder: DecoderFlops
    target: float
    crop: float

    def of(
        self,
        *,
        tokens: float,
        attention_pairs: float,
        targets: float,
        crops: float,
        policy: CheckpointPolicy = "none",
    ) -> float:
        """Return the FLOPs of a forward and a backward pass.

        `full` activation checkpointing runs the forward pass of the decoder twice; what `selective`
        recomputes is no matrix product and is not counted. The backward pass of attention costs
        twice its forward pass. A causal mask leaves half of the query-key pairs.
        """
        forwards = 2 if policy == "full" else 1
        per_token = forwards * self.decoder.forward + self.decoder.backward
        per_pair = self.decoder.attention / 2 * (forwards + 2)
        decoder = tokens * per_token + attention_pairs * per_pair
        return decoder + targets * self.target + crops * self.crop

    def of_batch(self, batch: MicroBatch, policy: CheckpointPolicy = "none") -> float:
        """Return the FLOPs of a micro-batch; one without images runs a dummy image."""
        return self.of(
            tokens=batch.tokens,
            attention_pairs=batch.attention_pairs,
            targets=batch.targets,
            crops=max(1, batch.crops),
            policy=policy,
        )


def count_flops(work: Callable[[], Any]) -> tuple[int, int]:
    """Run `work`; return the FLOPs of its matrix products and convolutions, and of its attention.

    Eager attention consists of batched products (`bmm`), which occur nowhere else here.
    """
    fused = {torch.ops.aten._native_multi_head_attention: _native_attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op) or "bmm" in str(op))
    return sum(counts.values()) - attention, attention


def _native_attention_flops(query: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the FLOPs of `nn.MultiheadAttention`'s fused inference kernel.

    torch's counter does not know it. Four projections (query, key, value, output) of `[T, D]` by
    `[D, D]`, and two products of `[T, D]` by `[D, T]` over all heads.
    """
    rows, tokens, width = query
    return rows * (8 * tokens * width**2 + 4 * tokens**2 * width)
