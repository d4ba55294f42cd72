"""FLOPs that training needs (without padding and recomputation), and FLOP/s of the machine.

    python scripts/benchmarks/bench_flops.py cuda  # prints the FLOP/s of a matrix product

A multiply-add counts as 2. The backward pass of a linear layer costs as much as its forward pass if
the weights are frozen (gradients of activations only) and twice as much if they are trainable; that
of attention always costs twice. The head counts at supervised positions and the tower forward only;
adapters are not counted.
"""

import sys
import time
from dataclasses import dataclass

import torch
from bench_sizes import NUM_IMAGE_TOKENS, Size


@dataclass(frozen=True)
class Sample:
    """Number of tokens of a record (image tokens included), of supervised tokens and of images."""

    tokens: int
    targets: int
    images: int


def sample_flops(size: Size, sample: Sample, mode: str) -> float:
    """Return the FLOPs of a record's forward and backward pass in `mode` (bench_peers/measure)."""
    passes = 3 if mode == "full" else 2
    layer = 4 * size.width**2 + 3 * size.width * size.intermediate
    linear = 2 * sample.tokens * size.layers * layer
    attention = 2 * sample.tokens**2 * size.width * size.layers
    head = 2 * sample.targets * size.width * size.vocabulary
    projector = 2 * NUM_IMAGE_TOKENS * (size.vision_width * size.width + size.width**2)
    images = sample.images * (3 * projector + _tower(size))
    return passes * (linear + head) + 3 * attention + images


def _tower(size: Size) -> float:
    """Return the FLOPs of the layers before the features: all but the last, forward."""
    tokens, layers = NUM_IMAGE_TOKENS + 1, size.vision_layers - 1
    linear = 2 * tokens * 12 * size.vision_width**2
    return layers * (linear + 4 * tokens**2 * size.vision_width)


def matmul_rate(device: str) -> float:
    """Return FLOP/s of a large matrix product: bf16 on a GPU, fp32 on a CPU; median of 5."""
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
