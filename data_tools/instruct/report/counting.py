"""Counting and choosing in memory that does not grow with what is counted."""

import hashlib
import heapq
from collections import Counter
from typing import Final, Generic, TypeVar

OPENING_WORDS: Final = 3
MOST_OPENINGS: Final = 50_000
"""Different openings that are counted at a time."""

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """A random choice of few out of many that depends on their keys alone, not on their order."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._heap: list[tuple[int, str, Item]] = []

    def add(self, key: str, item: Item) -> None:
        """Offer an item; keys are unique."""
        digest = hashlib.sha256(f"{self._seed}:{key}".encode()).digest()
        rank = -int.from_bytes(digest[:8], "big")
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (rank, key, item))
        elif rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (rank, key, item))

    def items(self) -> list[Item]:
        """The chosen ones, in an order that says nothing."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: -entry[0])]


class Openings:
    """How often texts begin with the same words, in memory that has a limit.

    Attributes:
        total: Texts counted.
        least: Openings that occurred up to so often may have been forgotten; 0: none was.
    """

    def __init__(self) -> None:
        self.total = 0
        self.least = 0
        self._counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Count one text."""
        words = text[:200].lower().split()[:OPENING_WORDS]
        self._counts[" ".join(words)[:60]] += 1
        self.total += 1
        if len(self._counts) > MOST_OPENINGS:
            self._forget()

    def _forget(self) -> None:
        """Forget the rarest until half of the room is free."""
        rare = 0
        while len(self._counts) > MOST_OPENINGS // 2:
            rare += 1
            self._counts = Counter({words: n for words, n in self._counts.items() if n > rare})
        self.least += rare

    def most_common(self, count: int) -> list[tuple[str, int]]:
        """The commonest openings, equally common ones by the alphabet."""
        return sorted(self._counts.items(), key=lambda entry: (-entry[1], entry[0]))[:count]

    @property
    def different(self) -> int:
        """How many openings there are; where some were forgotten, at least so many."""
        return len(self._counts)
