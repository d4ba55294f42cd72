"""Choosing among wordings, and the small grammar of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from data_tools import words
from data_tools.backends.rules.phrases import Speaker

Item = TypeVar("Item")

Turn = tuple[str, str, str, Sequence[str]]
"""Question, answer, kind, evidence."""


class Voice(Speaker):
    """A speaker in whole sentences, with one request's own random numbers.

    Attributes:
        frequencies: In how many images each category occurs.
    """

    def __init__(self, rng: np.random.Generator, frequencies: Mapping[str, int]) -> None:
        super().__init__(rng, "sentence")
        self.frequencies = frequencies

    def one_of(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[int(self.rng.integers(len(items)))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        return [items[i] for i in self.rng.permutation(len(items))]

    def fill(self, texts: Sequence[str], **values: Any) -> str:
        """One of the patterns, filled in, with a large letter first."""
        return words.capital(self.pick(texts).format(**values))


def be(count: int) -> str:
    """`is` for one."""
    return "is" if count == 1 else "are"


def several(name: str, count: int) -> str:
    """`one dog`, `two dogs`."""
    return (
        f"one {words.single(name)}" if count == 1 else f"{words.number(count)} {words.plural(name)}"
    )


def turns(*said: Turn) -> dict[str, Any]:
    """The form of conversations: question, answer, kind, evidence."""
    names = ("question", "answer", "kind", "evidence")
    return {"turns": [dict(zip(names, turn, strict=True)) for turn in said]}
