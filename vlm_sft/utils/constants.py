"""Constants that several packages share: our own token ids, packed segments, file sizes."""

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
"""A segment of a packed row: its length in tokens, and the index of its parent (-1: none).

A record that shares nothing is one segment. Where records share a prefix, the prefix is a segment,
and the rest of each record is a segment with the prefix as its parent.
"""

MAX_SHARD_SIZE: Final = "5GB"
"""Exported weights larger than this are written as several files."""
