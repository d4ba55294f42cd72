"""Defaults of `vlm_sft.show`."""

from typing import Final

LLAVA_IMAGE_TOKENS: Final = 576
"""Image tokens per image in LLaVA-1.5: 24 x 24 patches of CLIP ViT-L/14 at 336 pixels."""

MAX_PRINTED: Final = 5
"""Records that are printed without a pager and without --limit."""

MAX_ON_PAGE: Final = 200
"""Records on an HTML page without --limit."""
