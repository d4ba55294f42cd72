"""Shapes of the benchmarks' models; without packages that only some of them need."""

from dataclasses import dataclass

IMAGE, PATCH = 336, 14
NUM_IMAGE_TOKENS = (IMAGE // PATCH) ** 2


@dataclass(frozen=True)
class Size:
    """Shapes of CLIP and Llama; images are 336 x 336 in patches of 14."""

    name: str
    vision_layers: int
    vision_width: int
    vision_heads: int
    layers: int
    width: int
    intermediate: int
    heads: int
    vocabulary: int = 32_064
    """32,000 pieces, `<image>`, and rows up to a multiple of 64."""


SIZES = {
    "tiny": Size("tiny", 4, 128, 2, 4, 256, 688, 4),
    "small": Size("small", 4, 128, 2, 8, 512, 1376, 8),
    "7b": Size("7b", 24, 1024, 16, 32, 4096, 11008, 32),
}
