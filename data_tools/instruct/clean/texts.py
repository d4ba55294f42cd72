"""Split texts into what they are compared by: words, shingles, openings, references back."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import islice
from typing import Final

from data_tools.instruct.schema import SampleType, Turn

Shingles = frozenset[tuple[str, ...]]
"""Sequences of consecutive words."""

_WORD: Final = re.compile(r"\w+(?:['’]\w+)*")
_REFERS_BACK: Final = re.compile(
    r"\b(?:it|its|he|him|his|she|her|hers|they|them|their|theirs|this|that|these|those|one|ones|"
    r"other|others|another|else|also|too|same|both|instead|either|neither|former|latter)\b"
    r"|^(?:and|but|so|why|what about|how about|how so)\b"
)
_OF_THE_IMAGE: Final = re.compile(
    r"\b(?:this|that|the same) "
    r"(?:picture|image|photo|photograph|scene|shot|view|painting|drawing)\b"
)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(_folded(text))


def compared(turns: Sequence[Turn], sample_type: SampleType) -> str:
    """Return the text by which a sample is compared: answers; in conversations, questions too.

    The question of a description comes from a short list and would only dilute its answer; a short
    answer means nothing without its question.
    """
    if sample_type == "conversation":
        return "\n".join(f"{turn.question}\n{turn.answer}" for turn in turns)
    return "\n".join(turn.answer for turn in turns)


def shingles(found: Sequence[str], size: int) -> Shingles:
    """Return all sequences of `size` words; the whole text if it is shorter."""
    if len(found) <= size:
        return frozenset([tuple(found)])
    return frozenset(zip(*(found[start:] for start in range(size)), strict=False))


def jaccard(first: Shingles, second: Shingles) -> float:
    """Return the share of common shingles among all, from 0 to 1."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def opening(answer: str, min_words: int) -> str | None:
    """Return the first three words; None for answers of fewer than `min_words`."""
    found = [match[0] for match in islice(_WORD.finditer(_folded(answer)), min_words)]
    return " ".join(found[:3]) if len(found) == min_words else None


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def refers_back(question: str) -> bool:
    """Return whether a question may need the turn before it to be understood."""
    text = _OF_THE_IMAGE.sub("", " ".join(words(question)))
    return _REFERS_BACK.search(text) is not None
