"""Dtypes: what a precision means, and changing the dtype of a whole module."""

from typing import Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The dtype of each `train.precision`."""


def cast_floating(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and batch-norm statistics to `dtype` in place; other buffers stay.

    `module.to(dtype)` would also round rotary-embedding tables, which libraries keep in float32.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for child in module.modules():
        if isinstance(child, _BatchNorm) and child.running_mean is not None:
            child.running_mean = child.running_mean.to(dtype)
            assert child.running_var is not None
            child.running_var = child.running_var.to(dtype)
