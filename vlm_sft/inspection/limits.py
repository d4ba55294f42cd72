"""Defaults of `vlm_sft.show`."""

from typing import Final

LLAVA_IMAGE_TOKENS: Final = 576
"""LLaVA-1.5's tokens an image: 24 x 24 patches of CLIP ViT-L/14 at 336 pixels."""

SHOWN: Final = 5
"""Records printed where no pager is and no limit was given."""

SHOWN_ON_A_PAGE: Final = 200
"""Records on a page where no limit was given."""
