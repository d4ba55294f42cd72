"""AdamW with one learning rate per part, and a schedule that is a pure function of the step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import nn

from vlm_sft.checkpoint.optimizer import is_eight_bit
from vlm_sft.config.schema import LearningRates, OptimConfig
from vlm_sft.train.adamw_8bit import build_adamw_8bit, moment_bytes
from vlm_sft.train.adamw_bf16 import StochasticAdamW
from vlm_sft.utils.dtensor import full_tensor, local_tensor

NamedParameters = Sequence[tuple[str, nn.Parameter]]

ADAMW_STATE_BYTES: Final = 8
"""Optimizer state of a weight in at most 32 bits: two moments in float32."""


def build_optimizer(
    parts: Mapping[str, NamedParameters], config: OptimConfig, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Build AdamW for the trainable parameters of every part.

    Each parameter group has the keys `part` (name of the part), `peak_lr` (base learning rate) and
    `names` (parameter names, in order). Vectors (biases, norms) get no weight decay, as in
    transformers' Trainer.

    Args:
        parts: The named parameters of each part; frozen ones are skipped.
        config: Optimizer, learning rates, weight decay, betas and epsilon.
        seed: Seed of the stochastic rounding of weights that are kept in bfloat16, if any.

    Raises:
        UserError: If 8-bit AdamW is requested and bitsandbytes is not installed.
    """
    groups: list[dict[str, Any]] = []
    for part, named in parts.items():
        trainable = [(name, p) for name, p in named if p.requires_grad]
        for decayed in (True, False):
            chosen = [(name, p) for name, p in trainable if (p.ndim >= 2) == decayed]
            if chosen:
                rate = base_lr(part, config.learning_rate)
                groups.append(
                    {
                        "params": [p for _, p in chosen],
                        "names": [name for name, _ in chosen],
                        "part": part,
                        "lr": rate,
                        "peak_lr": rate,
                        "weight_decay": config.weight_decay if decayed else 0.0,
                    }
                )
    if config.optimizer == "adamw_8bit":
        return build_adamw_8bit(groups, config)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = True if devices <= {"cpu", "cuda"} else None
    if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return StochasticAdamW(groups, config, seed=seed, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=fused)


def base_lr(part: str, rates: LearningRates) -> float:
    """Return the learning rate of a part before the schedule; adapters use the language model's."""
    return rates.projector if part == "projector" else rates.language_model


def lr_multiplier(step: int, *, total_steps: int, config: OptimConfig) -> float:
    """Return the factor of the base learning rates in optimizer step `step`, counted from 0.

    Warm-up is linear over `ceil(warmup_ratio * total_steps)` steps and reaches 1 in the last of
    them. A half cosine or a line then falls towards 0, which only the step after the last one would
    have. The schedules of transformers are the same one step later: their first step has rate 0.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


def set_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Set every group's learning rate to `multiplier` times its base; return the rate per part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of this rank's optimizer state once the first step is done."""
    parameters = [local_tensor(p) for group in optimizer.param_groups for p in group["params"]]
    if is_eight_bit(optimizer):
        return sum(moment_bytes(p.numel()) for p in parameters)
    return sum(p.numel() * max(ADAMW_STATE_BYTES, 2 * p.element_size()) for p in parameters)


def adamw_state_bytes(
    tensor_sizes: Iterable[int], optimizer: Literal["adamw", "adamw_8bit"]
) -> int:
    """Return the bytes of the state for tensors of these numbers of weights, without making it."""
    if optimizer == "adamw_8bit":
        return sum(map(moment_bytes, tensor_sizes))
    return ADAMW_STATE_BYTES * sum(tensor_sizes)


def checkpoint_bytes(trainable: Iterable[nn.Parameter]) -> int:
    """Return the approximate bytes of a checkpoint: trainable weights and their AdamW state."""
    return sum(p.numel() * (p.element_size() + ADAMW_STATE_BYTES) for p in trainable)


def gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Clip the gradients to a global 2-norm of `max_norm`, if any; return the norm before that.

    The norm (a scalar tensor) and the clipping are computed in float32 or wider.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(gradient.dtype == torch.bfloat16 for gradient in gradients):
        return _norm_in_float32(gradients, max_norm)
    if max_norm is None:
        return full_tensor(torch.nn.utils.get_total_norm(gradients))
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def _norm_in_float32(gradients: Sequence[torch.Tensor], max_norm: float | None) -> torch.Tensor:
    """Do the same for bfloat16 gradients, whose norms and clip factor torch would round."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.copy_(gradient.float() * factor)
    return norm
