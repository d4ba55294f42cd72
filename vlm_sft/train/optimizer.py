"""AdamW with one learning rate a part, and a schedule that is a pure function of the step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from vlm_sft.config.schema import LearningRates, OptimConfig
from vlm_sft.train.adamw_8bit import eight_bit_adamw, is_eight_bit, moment_bytes
from vlm_sft.train.adamw_bf16 import StochasticAdamW
from vlm_sft.train.fsdp import own_part, whole

NamedParameters = Sequence[tuple[str, nn.Parameter]]

MOMENT_BYTES: Final = 8
"""AdamW's state of a weight of at most 32 bits: two float32 numbers."""


def build_optimizer(
    parts: Mapping[str, NamedParameters], config: OptimConfig, *, seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of every part.

    Each parameter group carries `part` (its part's name), `peak_lr` and `names` (its parameters'
    names, in order). Vectors (biases, norms) are not decayed, as in transformers' Trainer.

    Args:
        parts: For each part its named parameters; frozen ones are left out.
        config: Kind, rates, decay, betas, epsilon.
        seed: Of the rounding of weights that are kept in bfloat16, if any are.

    Raises:
        ConfigError: 8-bit moments where they cannot be had (see `eight_bit_adamw`).
    """
    groups: list[dict[str, Any]] = []
    for part, named in parts.items():
        trainable = [(name, p) for name, p in named if p.requires_grad]
        for decayed in (True, False):
            chosen = [(name, p) for name, p in trainable if (p.ndim >= 2) == decayed]
            if chosen:
                rate = peak_rate(part, config.learning_rate)
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
        return eight_bit_adamw(groups, config)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = True if devices <= {"cpu", "cuda"} else None
    if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return StochasticAdamW(groups, config, seed=seed, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=fused)


def peak_rate(part: str, rates: LearningRates) -> float:
    """The peak learning rate of a part; adapters take the language model's."""
    return rates.projector if part == "projector" else rates.language_model


def rate_factor(step: int, *, total_steps: int, config: OptimConfig) -> float:
    """What the peak rate is multiplied by in optimizer step `step`, counted from 0.

    Warm-up is linear over `ceil(warmup_ratio * total_steps)` steps and the peak is reached in the
    last of them; then a half cosine or a line falls towards 0, which the step after the last would
    have. transformers' schedule is the same one step later: its first step has rate 0.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group its peak rate times `factor`; returns the rate of each part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory that the optimizer's state takes once the first step is done."""
    parameters = [own_part(p) for group in optimizer.param_groups for p in group["params"]]
    if is_eight_bit(optimizer):
        return sum(moment_bytes(p.numel()) for p in parameters)
    return sum(p.numel() * max(MOMENT_BYTES, 2 * p.element_size()) for p in parameters)


def gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Global 2-norm of the gradients before clipping (scalar tensor); clips them if asked to.

    Both in float32 or wider.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(gradient.dtype == torch.bfloat16 for gradient in gradients):
        return _norm_in_float32(gradients, max_norm)
    if max_norm is None:
        return whole(torch.nn.utils.get_total_norm(gradients))
    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def _norm_in_float32(gradients: Sequence[torch.Tensor], max_norm: float | None) -> torch.Tensor:
    """The same where torch would round each tensor's norm, and the factor, to bfloat16."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.copy_(gradient.float() * factor)
    return norm
