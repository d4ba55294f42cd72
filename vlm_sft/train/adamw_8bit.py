"""AdamW whose two moments take a byte a number each, by bitsandbytes (arXiv 2110.02861)."""

import importlib
import importlib.util
import math
from typing import Any, Final

import torch

from vlm_sft.config.schema import OptimConfig
from vlm_sft.errors import ConfigError
from vlm_sft.utils.libraries import library_call

SMALLEST: Final = 4096
"""Tensors of fewer numbers keep moments in float32; bitsandbytes' `min_8bit_size`."""

BLOCK: Final = 256
"""Numbers that share a scale, in bitsandbytes."""


def eight_bit_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Bitsandbytes' AdamW of parameter groups as `build_optimizer` makes them.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    require_eight_bit()
    with library_call("bitsandbytes", "optim", "make its 8-bit AdamW"):
        kind = importlib.import_module("bitsandbytes").optim.AdamW8bit
        made: torch.optim.Optimizer = kind(
            groups, lr=0.0, betas=config.betas, eps=config.epsilon, min_8bit_size=SMALLEST
        )
    return made


def require_eight_bit() -> None:
    """Refuse 8-bit moments without bitsandbytes.

    Raises:
        ConfigError: With the line that installs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optim.optimizer: adamw_8bit needs bitsandbytes, which is not installed; run "
            "`pip install 'vlm-sft[qlora]'`, or set it to adamw"
        )


def moment_bytes(count: int) -> int:
    """Memory of both moments of a tensor of so many numbers, scales included."""
    if count < SMALLEST:
        return 2 * 4 * count
    return 2 * (count + 4 * math.ceil(count / BLOCK))
