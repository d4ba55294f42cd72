"""What a text is compared by: its words, its shingles, its opening, and what it refers back to."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import islice
from typing import Final

from data_tools.instruct.schema import SampleType, Turn

Shingles = frozenset[tuple[str, ...]]
"""Runs of words."""

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
    """The text's words in lower case, without punctuation."""
    return _WORD.findall(_folded(text))


def compared(turns: Sequence[Turn], sample_type: SampleType) -> str:
    """What stands for a sample: its answers; in conversations with their questions.

    The question of a description comes from a short list and would only water its answer down; a
    short answer says nothing without its question.
    """
    if sample_type == "conversation":
        return "\n".join(f"{turn.question}\n{turn.answer}" for turn in turns)
    return "\n".join(turn.answer for turn in turns)


def shingles(found: Sequence[str], size: int) -> Shingles:
    """All runs of `size` words; the whole text where it is shorter."""
    if len(found) <= size:
        return frozenset([tuple(found)])
    return frozenset(zip(*(found[start:] for start in range(size)), strict=False))


def jaccard(first: Shingles, second: Shingles) -> float:
    """Common shingles by all shingles, from 0 to 1."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def opening(answer: str, min_words: int) -> str | None:
    """The first three words; None for answers of fewer than `min_words`."""
    found = [match[0] for match in islice(_WORD.finditer(_folded(answer)), min_words)]
    return " ".join(found[:3]) if len(found) == min_words else None


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def refers_back(question: str) -> bool:
    """Whether a question may need the turn before it to be understood."""
    text = _OF_THE_IMAGE.sub("", " ".join(words(question)))
    return _REFERS_BACK.search(text) is not None


def digest(*parts: object) -> int:
    """64 bits that depend on the parts alone, the same on every machine."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
