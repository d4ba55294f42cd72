"""How far apart two correct computations of the same value may be, from sizes and dtype alone.

A sum of n products is off by at most n * u times the sum of their magnitudes, in whatever order and
with whatever fused or vector instructions it is computed (u: half of the dtype's epsilon; Higham,
Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.1). A value that passes
through several sums, one after another, collects their errors. Two computations are apart by at
most twice that, relative to the largest magnitude of the result. Cancellation can make a result
smaller than the products it is made of; taking the worst case n where sqrt(n) is typical leaves
room for that. No figure here was measured on a machine.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm_sft.config.schema import load_config
from vlm_sft.model.build import build_model

ROOT = Path(__file__).parent.parent

BACKWARD = 3
"""A gradient passes through the forward sums and through two products a layer on the way back."""


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the relative difference that two computations of `terms` sequential terms may have."""
    return terms * torch.finfo(dtype).eps


def terms_of(model: nn.Module, length: int) -> int:
    """Return how many terms a value passes through on its way through all layers of a model.

    Args:
        model: Every linear, convolution and normalization layer is taken to be on the way, and as
            many softmax sums of `length` as there are linear layers, which is more than there are.
        length: Tokens that attention sums over.
    """
    terms = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            terms += module.in_features + length
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            terms += module.weight[0].numel()
        elif "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            terms += module.weight.numel()
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
            terms += module.weight.shape[0] + length
    return terms


@cache
def terms_of_a_run() -> int:
    """Return the terms that a loss of the tiny configurations passes through, image to loss."""
    model = build_model(
        load_config(ROOT / "configs/tiny/stage1.yaml").model, dtype=torch.float32, seed=0
    )
    return terms_of(model, length=300)


def assert_near(found: Tensor, expected: Tensor, terms: int) -> None:
    """Assert that two tensors differ by rounding only, relative to the largest magnitude."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    bound = rounding(terms, expected.dtype) * float(expected.detach().abs().max())
    difference = float((found - expected).detach().abs().max())
    assert difference <= bound, f"apart by {difference:.2e}, rounding explains {bound:.2e}"
