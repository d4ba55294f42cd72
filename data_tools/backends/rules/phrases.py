"""Filling the wording's patterns with names, articles and plurals."""

from collections.abc import Sequence

import numpy as np

from data_tools import words
from data_tools.records import AnswerStyle


class Speaker:
    """Chooses among wordings by one generator and answers in one style."""

    def __init__(self, rng: np.random.Generator, answers: AnswerStyle) -> None:
        self.rng = rng
        self._answers = answers

    def pick(self, texts: Sequence[str]) -> str:
        """One of the texts."""
        return texts[int(self.rng.integers(len(texts)))]

    def say(self, texts: Sequence[str], name: str, **values: str) -> str:
        """One of the patterns, with `{name}`, `{names}`, `{a}` and `values` filled in."""
        pattern = self.pick(texts)
        return pattern.format(name=name, names=words.plural(name), a=words.article(name), **values)

    def reply(self, answer: str, texts: Sequence[str], name: str, **values: str) -> str:
        """`Yes.` in the short style, else one of `texts`, which may hold `{answer}` too."""
        if self._answers == "short":
            return words.capital(answer) + "."
        return self.say(texts, name, answer=answer, **values)
