"""Bits for the rules that a word concerns, so that a text's words are looked up only once.

Every rule first tests the bits of a whole text or sentence, and then visits only the words that
have its bit. Most texts concern few rules.
"""

from collections.abc import Iterable
from typing import Final

THING: Final = 1
"""Begins the name of a thing."""
STANCE: Final = 2
"""Denies, guesses, compares, or speaks in general."""
DEPICTS: Final = 4
"""Makes what follows an image of a thing (`statue`)."""
ATTRIBUTE: Final = 8
"""A color, material or state."""
ACTION: Final = 16
"""A form of a listed verb."""
RELATION: Final = 32
"""Puts things in front of, behind, on or under others."""
KIND: Final = 64
"""Begins a kind that excludes others (`tennis`, `kitchen`)."""
PERSON: Final = 128
"""Gives the sex or age of a person, pronouns included."""
PLACE: Final = 256
"""A side, corner, or a relation that boxes can refute."""
NUMBER: Final = 512
"""A number or `several`."""
COUNTED: Final = 1024
"""Asks for a number (`how many`, `the number of`)."""
INTRODUCES: Final = 2048
"""An article or quantity, after which a noun comes."""
SIGHT: Final = 4096
"""A striking thing outside the categories (`rabbit`)."""


class FlagTable:
    """The bits of every known word."""

    def __init__(self) -> None:
        self._bits: dict[str, int] = {str(n): NUMBER for n in range(1000)}
        self.of = self._bits.get
        """Return the bits of a word, or a default."""

    def add(self, bit: int, words: Iterable[str]) -> None:
        """Give a bit to words."""
        for word in words:
            self._bits[word] = self._bits.get(word, 0) | bit
