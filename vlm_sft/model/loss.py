"""Cross-entropy of the supervised positions, a chunk of logits at a time."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK: Final = 512
"""Positions that go through the head at once; bounds the memory of their logits."""

Head = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    head: Head, states: Tensor, targets: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The summed loss, with gradient, and each position's own, without.

    A chunk's gradient is worked out while its logits are there, so that none are kept and none are
    computed twice (as in Liger's fused linear cross-entropy, arXiv 2410.10989). With no position
    the empty row still goes through the head: the sum is exactly 0 and its graph the same.

    Args:
        head: States `[n, D]` to logits `[n, V]`, in the numbers that the loss is to be taken in.
        states: Hidden states that predict, `[N, D]`.
        targets: Ids that they predict, `[N]`.
        parameters: What `head` is made of; gradients go to those that learn.

    Returns:
        A scalar and `[N]`.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.is_grad_enabled() and (learning or states.requires_grad):
        total, losses = _Chunked.apply(head, states, targets, *learning)
        return total, losses
    losses = torch.cat([_losses(head, part, wanted) for part, wanted in _chunks(states, targets)])
    return losses.sum(), losses


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, states: Tensor, targets: Tensor, *learning: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, of_states = [], []
        # In float32 at least: sums of a few hundred bfloat16 chunks would lose digits.
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in learning]
        of_head = [torch.zeros_like(p, dtype=w) for p, w in zip(learning, wide, strict=True)]
        for part, wanted in _chunks(states, targets):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = _losses(head, part, wanted)
                found = torch.autograd.grad(loss.sum(), [part, *learning])
            losses.append(loss.detach())
            of_states.append(found[0])
            for total, gradient in zip(of_head, found[1:], strict=True):
                total += gradient
        narrow = (g.to(p.dtype) for g, p in zip(of_head, learning, strict=True))
        ctx.save_for_backward(torch.cat(of_states), *narrow)
        joined = torch.cat(losses)
        ctx.mark_non_differentiable(joined)
        return joined.sum(), joined

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        of_states, *of_head = (g * of_sum.to(g.dtype) for g in ctx.saved_tensors)
        return (None, of_states, None, *of_head)


def _losses(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(states), targets, reduction="none")


def _chunks(states: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(states.split(CHUNK), targets.split(CHUNK), strict=True))
