"""How many tokens a text is, about, without a tokenizer: for prices, before anything is sent."""

import re
from typing import Final

_PIECES: Final = re.compile(r"[^\W\d_]+|\d+|\s+|[^\w\s]|_")
_LONG_WORD: Final = 9
"""Letters; common words up to this length are one token in vocabularies of 100,000 and more."""


def estimate_tokens(text: str) -> int:
    """Tokens of English text with numbers and JSON in it."""
    return sum(_tokens(piece) for piece in _PIECES.findall(text))


def _tokens(piece: str) -> int:
    first = piece[0]
    if first.isdigit():
        return -(-len(piece) // 3)
    if first.isspace():
        return int(piece != " ")
    return 1 if not first.isalpha() else -(-len(piece) // _LONG_WORD)
