"""Floating-point operations that training needs (not those it wastes), and what the machine does.

    python scripts/benchmarks/bench_flops.py cuda  # prints the matrix product's operations a second

Two operations a multiply-add. Backward is once the forward's linear layers where weights are
frozen (gradients of activations alone) and twice where they learn; attention's is always twice.
The head counts at supervised positions, the tower forward only; adapters are left out.
"""

import sys
import time
from dataclasses import dataclass

import torch
from bench_sizes import NUM_IMAGE_TOKENS, Size


@dataclass(frozen=True)
class Sample:
    """Tokens of one record, image tokens included, how many carry loss, and its images."""

    tokens: int
    targets: int
    images: int


def sample_flops(size: Size, sample: Sample, mode: str) -> float:
    """Operations of one record's forward and backward pass in `mode` (see bench_peers/measure)."""
    learns = 3 if mode == "full" else 2
    layer = 4 * size.width**2 + 3 * size.width * size.intermediate
    linear = 2 * sample.tokens * size.layers * layer
    attention = 2 * sample.tokens**2 * size.width * size.layers
    head = 2 * sample.targets * size.width * size.vocabulary
    projector = 2 * NUM_IMAGE_TOKENS * (size.vision_width * size.width + size.width**2)
    images = sample.images * (3 * projector + _tower(size))
    return learns * (linear + head) + 3 * attention + images


def _tower(size: Size) -> float:
    """Forward through the layers that feed the features: all but the last."""
    tokens, layers = NUM_IMAGE_TOKENS + 1, size.vision_layers - 1
    linear = 2 * tokens * 12 * size.vision_width**2
    return layers * (linear + 4 * tokens**2 * size.vision_width)


def matmul_rate(device: str) -> float:
    """Operations a second of a large matrix product: bf16 on a GPU, fp32 on a CPU; median of 5."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(10):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * side**3 / sorted(seconds[3:])[2]


if __name__ == "__main__":
    print(matmul_rate(sys.argv[1]))
