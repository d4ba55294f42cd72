"""Cross-entropy at the target positions, computed in chunks so that few logits exist at a time."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK: Final = 512
"""Target positions that go through the head at once; bounds the memory of the logits."""

Head = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    head: Head, states: Tensor, targets: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, with gradient, and the loss of each position, without gradient.

    The gradient of a chunk is computed in the forward pass, while its logits exist, so that no
    logits are kept and none are computed twice (as in Liger's fused linear cross-entropy, arXiv
    2410.10989). Without any position an empty chunk still goes through the head: the sum is
    exactly 0, and the autograd graph is the same on every rank.

    Args:
        head: Hidden states `[n, D]` to logits `[n, V]`, in the loss dtype.
        states: `[N, D]`, the hidden states that predict the targets.
        targets: `[N]` int64.
        parameters: All parameters that `head` uses; the trainable ones get gradients.

    Returns:
        A scalar, and `[N]`.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.is_grad_enabled() and (trainable or states.requires_grad):
        total, losses = _ChunkedCrossEntropy.apply(head, states, targets, *trainable)
        return total, losses
    losses = torch.cat([_losses(head, part, ids) for part, ids in _chunks(states, targets)])
    return losses.sum(), losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, states: Tensor, targets: Tensor, *trainable: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, state_grads = [], []
        # Accumulate in float32 or wider: a sum over hundreds of bf16 chunks would lose digits.
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in trainable]
        head_grads = [torch.zeros_like(p, dtype=w) for p, w in zip(trainable, wide, strict=True)]
        for part, ids in _chunks(states, targets):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = _losses(head, part, ids)
                grads = torch.autograd.grad(loss.sum(), [part, *trainable])
            losses.append(loss.detach())
            state_grads.append(grads[0])
            for total, grad in zip(head_grads, grads[1:], strict=True):
                total += grad
        narrow = (g.to(p.dtype) for g, p in zip(head_grads, trainable, strict=True))
        ctx.save_for_backward(torch.cat(state_grads), *narrow)
        all_losses = torch.cat(losses)
        ctx.mark_non_differentiable(all_losses)
        return all_losses.sum(), all_losses

    @staticmethod
    def backward(ctx: Any, sum_grad: Tensor, losses_grad: Tensor) -> tuple[Tensor | None, ...]:
        # The saved gradients are those of the sum itself; the chain rule is one multiplication.
        state_grads, *head_grads = (g * sum_grad.to(g.dtype) for g in ctx.saved_tensors)
        return (None, state_grads, None, *head_grads)


def _losses(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(states), targets, reduction="none")


def _chunks(states: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(states.split(CHUNK), targets.split(CHUNK), strict=True))
