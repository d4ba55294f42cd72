"""Token ids that are ours, not a tokenizer's, and what a packed row is made of; their one home."""

from typing import Final

IGNORE_INDEX: Final = -100
"""Label of a position that carries no loss (torch's `cross_entropy` default)."""

IMAGE_TOKEN_ID: Final = -200
"""Id of an image placeholder (LLaVA's IMAGE_TOKEN_INDEX, `llava/constants.py`).

One per image in a tokenized record, one per image feature after expansion. It is negative, so no
tokenizer and no text can produce it.
"""

IMAGE_PLACEHOLDER: Final = "<image>"
"""How LLaVA-form records spell an image inside a human turn."""

Segment = tuple[int, int]
"""Tokens of one stretch of a packed row, and the number of the segment it continues (-1: none).

A record that shares nothing is one segment. Where records share a prefix, the prefix is a segment
and each of them another that continues it.
"""

MAX_SHARD_SIZE: Final = "5GB"
"""Exported weights larger than this are written as several files."""
