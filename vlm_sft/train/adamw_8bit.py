"""AdamW with 8-bit moments, from bitsandbytes (arXiv 2110.02861)."""

import importlib
import math
from typing import Any, Final

import torch

from vlm_sft.config.schema import OptimConfig
from vlm_sft.utils.libraries import library_call, require_extra

MIN_8BIT_SIZE: Final = 4096
"""Smaller tensors keep float32 moments; `min_8bit_size` of bitsandbytes."""

BLOCK_SIZE: Final = 256
"""Values that share one float32 scale in bitsandbytes."""


def build_adamw_8bit(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Build the AdamW of bitsandbytes for parameter groups as `build_optimizer` makes them.

    Raises:
        UserError: If bitsandbytes is not installed.
    """
    require_extra("bitsandbytes", "optim.optimizer: adamw_8bit")
    with library_call("bitsandbytes", "optim", "create its 8-bit AdamW"):
        optimizer_class = importlib.import_module("bitsandbytes").optim.AdamW8bit
        optimizer: torch.optim.Optimizer = optimizer_class(
            groups, lr=0.0, betas=config.betas, eps=config.epsilon, min_8bit_size=MIN_8BIT_SIZE
        )
    return optimizer


def moment_bytes(count: int) -> int:
    """Return the bytes of both moments of a tensor with `count` values, scales included."""
    if count < MIN_8BIT_SIZE:
        return 2 * 4 * count
    return 2 * (count + 4 * math.ceil(count / BLOCK_SIZE))
