"""Whether a question is new: ROUGE-L against those that there are (Self-Instruct)."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

from vlm_sft.evaluation.scores.captions import common_length

NOVELTY: Final = 0.7
"""ROUGE-L from which on a question is not new (Self-Instruct, arXiv 2212.10560)."""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def rouge_l(first: str, second: str) -> float:
    """Return the F1 of the longest common subsequence of words, from 0 to 1."""
    a, b = words_of(first), words_of(second)
    return 2 * common_length(a, b) / (len(a) + len(b)) if a and b else 0.0


class QuestionPool:
    """Questions that grow in number, each compared with all earlier ones.

    A question of `n` words must share `0.7 n / 1.3` of them with another one to reach 0.7. So of
    its rarest words, one more than may be missing, the other question has at least one, and only
    such questions are compared.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._texts: list[str] = []
        self._having: dict[str, list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Add a question."""
        for word in set(words_of(text)):
            self._having[word].append(len(self._texts))
        self._texts.append(text)

    def like(self, text: str) -> str | None:
        """Return the earliest question with a ROUGE-L of `NOVELTY` or more; None: it is new."""
        words = Counter(words_of(text))
        length = words.total()
        # 2 L / (n + m) >= NOVELTY with m >= L gives L >= NOVELTY n / (2 - NOVELTY).
        shared = math.ceil(NOVELTY * length / (2 - NOVELTY) - 1e-9)
        rarest = sorted(words, key=lambda word: (len(self._having.get(word, ())), word))
        candidates: set[int] = set()
        seen = 0
        for word in rarest:
            if seen > length - shared:
                break
            seen += words[word]
            candidates.update(self._having.get(word, ()))
        found = (number for number in sorted(candidates))
        return next(
            (self._texts[n] for n in found if rouge_l(self._texts[n], text) >= NOVELTY), None
        )
