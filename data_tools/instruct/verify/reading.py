"""A text as sentences of words, with the things it names and how it speaks of them."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import reduce
from itertools import repeat
from operator import or_
from typing import Any, Final

from data_tools.instruct.verify.flags import DEPICTS, STANCE, THING
from data_tools.instruct.verify.grammar import word_set
from data_tools.instruct.verify.lazy import lazy
from data_tools.instruct.verify.lexicon import Lexicon, Mention
from data_tools.instruct.verify.stances import Stances


class Sentence:
    """One sentence.

    Args:
        words: Lower-case words, punctuation among them.
        begin: Which word of its text the first is.
        text: The text.
        flags: Which rules each word concerns.

    Attributes:
        bits: The flags that any word has.
        actions: What `describing.actions` found, once asked for.
    """

    def __init__(
        self, words: Sequence[str], begin: int, text: "Reading", flags: Sequence[int]
    ) -> None:
        self.words = words
        self.begin = begin
        self.text = text
        self.flags = flags
        self.bits = reduce(or_, flags, 0)
        self.actions: tuple[Any, ...] | None = None
        self._hits: dict[int, list[int]] = {}

    @property
    def lexicon(self) -> Lexicon:
        """Return which words name what."""
        return self.text.lexicon

    def hits(self, bit: int) -> list[int]:
        """Return the indices of the words that have a flag."""
        if not self.bits & bit:
            return _NONE
        found = self._hits.get(bit)
        if found is None:
            found = self._hits[bit] = [i for i, flags in enumerate(self.flags) if flags & bit]
        return found

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return characters of the text from word `first` to word `last`."""
        spans = self.text.spans
        return spans[self.begin + first][0], spans[self.begin + last][1]

    @lazy
    def mentions(self) -> tuple[Mention, ...]:
        """Return every thing named."""
        if not self.bits & THING:
            return ()
        found = self.lexicon.matches(self.words, self.hits(THING), self.owners)
        if found and self.bits & (STANCE | DEPICTS):
            inside = frozenset(i for m in found for i in range(m.first, m.last + 1))
            stances = Stances(self, inside)
            for mention in found:
                mention.stance = stances.of(mention.first, mention.last)
        return tuple(found)

    @lazy
    def stances(self) -> Stances:
        """Return how it speaks of what it names."""
        inside = {i for m in self.mentions for i in range(m.first, m.last + 1)}
        return Stances(self, frozenset(inside))

    def asserts(self, first: int, last: int) -> bool:
        """Return whether these words are claimed as they stand: not denied, guessed, or general."""
        if not self.bits & STANCE:
            return True
        return self.stances.of(first, last) == "asserted"

    def is_seen_after(self, last: int) -> bool:
        """Return whether `can be seen` or `could be made out` follows."""
        return not _SEEN.isdisjoint(self.words[last + 1 : last + 5])

    @lazy
    def owners(self) -> frozenset[int]:
        owners = self.text.owners
        if not owners:
            return owners
        return frozenset(i for i in range(len(self.words)) if i + self.begin in owners)

    @lazy
    def vocabulary(self) -> frozenset[str]:
        """Return the words, each once."""
        return frozenset(self.words)

    def clause(self, index: int) -> tuple[int, int]:
        """Return first and one-past-last word of the clause around a word."""
        bounds = self._bounds
        place = bisect_right(bounds, index)
        return bounds[place - 1], bounds[place] if place < len(bounds) else len(self.words)

    @lazy
    def _bounds(self) -> list[int]:
        words = self.words
        bounds = [0]
        for i in range(1, len(words)):
            word = words[i]
            ends = word in _CLAUSE_WORDS or (
                word in (",", "and", "or") and i + 1 < len(words) and words[i + 1] in _STARTERS
            )
            if ends and not (word == "or" and words[i + 1] in _OR_GOES_ON):
                bounds.append(i)
        return bounds


class Reading:
    """A text taken apart once, for all rules."""

    def __init__(self, text: str, lexicon: Lexicon) -> None:
        self.text = text
        self.lexicon = lexicon
        # Lower case can be longer than the text outside of ASCII, where the words would differ.
        self._searched = text.lower() if text.isascii() else text
        self._tokens: list[str] = _TOKEN.findall(self._searched)
        tokens = self._tokens
        self.words = tokens if text.isascii() else [token.lower() for token in tokens]
        self.owners: frozenset[int] = frozenset()
        if "'" in text or "’" in text:
            self._remove_owners()
        of = lexicon.flags.of
        self.flags = list(map(of, self.words, repeat(0)))
        self.bits = reduce(or_, self.flags, 0)

    def _remove_owners(self) -> None:
        """Replace `dog's` by `dog`, and remember where: the owner is named, not the letter."""
        owners = []
        self.words = self.words.copy()
        for index, word in enumerate(self.words):
            word = word.replace("’", "'")
            if word.endswith("'s") and len(word) > 2 and word not in _NOT_OWNERS:
                owners.append(index)
            self.words[index] = word[:-2] if word.endswith("'s") and len(word) > 2 else word
        self.owners = frozenset(owners)

    @lazy
    def spans(self) -> list[tuple[int, int]]:
        """Return characters of the text that each word takes."""
        found, end = [], 0
        find = self._searched.find
        for token in self._tokens:  # only spaces and underscores lie between tokens
            begin = find(token, end)
            end = begin + len(token)
            found.append((begin, end))
        return found

    @lazy
    def spoken(self) -> list[str]:
        """Return the words and numbers, without punctuation."""
        return [word for word in self.words if word not in _PUNCTUATION and word[0].isalnum()]

    @lazy
    def sentences(self) -> tuple[Sentence, ...]:
        """Return its sentences; the final mark belongs to none."""
        words, flags = self.words, self.flags
        if words.count(".") == 1 and words[-1] == "." and not _OTHER_ENDS.intersection(words):
            return (Sentence(words[:-1], 0, self, flags[:-1]),) if len(words) > 1 else ()
        ends = [index for index, word in enumerate(words) if word in _SENTENCE_ENDS]
        begins = [0, *(end + 1 for end in ends)]
        return tuple(
            Sentence(words[begin:end], begin, self, flags[begin:end])
            for begin, end in zip(begins, [*ends, len(words)], strict=True)
            if end > begin
        )

    @lazy
    def vocabulary(self) -> frozenset[str]:
        """Return the words, each once."""
        return frozenset(self.words)

    @lazy
    def mentions(self) -> list[tuple[Sentence, Mention]]:
        """Return every thing named."""
        if not self.bits & THING:
            return []
        return [(sentence, found) for sentence in self.sentences for found in sentence.mentions]


_NONE: Final[list[int]] = []
_TOKEN: Final = re.compile(
    r"[^\W\d_][^\W_]*(?:[-'’][^\W_]+)*|\d+(?:[.:,]\d+)*(?:st|nd|rd|th)?|\n|[^\w\s]"
)
_PUNCTUATION: Final = frozenset(".,;:!?'\"-()\n")
_SENTENCE_ENDS: Final = frozenset(".!?\n")
_OTHER_ENDS: Final = _SENTENCE_ENDS - {"."}
_CLAUSE_WORDS: Final = word_set("; : ( ) but while although though whereas however because since")
_STARTERS: Final = word_set(
    "a an the there it he she they this that these those but while and with which who whose where "
    "only just one two three four five six several some its his her their however instead so "
    "because although i we you another many both each as in on to at near next behind"
)
_OR_GOES_ON: Final = word_set("a an any the other")
_SEEN: Final = word_set("seen visible spotted made")
_NOT_OWNERS: Final = word_set("it's he's she's there's that's what's who's here's let's where's")
