"""Which words name which annotated category: names, synonyms, wider words, compounds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from data_tools import wording, words

GrammaticalNumber = Literal["one", "many", "any"]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What a word or phrase may name.

    Attributes:
        categories: Any of these; empty for a compound that names none (`hot dog stand`).
        firm: Only these are meant, so that none of them being there refutes the word. Wider words
            (`vehicle`, `table`) mean other things too.
        number: `people` are many, `sheep` can be either.
        narrow: The word is for some of the category only (`woman`), so that its absence or number
            does not follow from the category's.
    """

    categories: tuple[str, ...]
    firm: bool
    number: GrammaticalNumber
    narrow: bool = False


@dataclass(slots=True, eq=False)
class Match:
    """An entry found at a place of a sentence; `last` is the index of its last word."""

    entry: Entry
    first: int
    last: int


def word_set(text: str) -> frozenset[str]:
    """The words of a list written as one text."""
    return frozenset(text.split())


class Lexicon:
    """Finds the annotated categories in a sentence's words.

    Args:
        categories: Names of all annotated categories. Words for others are no claims that the
            annotations could settle, and are not found.

    Attributes:
        categories: The same.
        depictions: Words before a thing that make it an image of one (`statue`).
    """

    def __init__(self, categories: Iterable[str]) -> None:
        self.categories = frozenset(categories)
        self._phrases: dict[str, list[tuple[tuple[str, ...], Entry]]] = {}
        claims = wording.load("claims")
        self.depictions = frozenset(claims["depictions"])
        self._heads = frozenset(claims["heads"])
        self._also_verbs = frozenset(claims["also_verbs"])
        entries = self._compounds() | self._wider() | self._names()
        # A compound says more than the name it is made of, unless it is a category's own name.
        entries |= {k: v for k, v in self._compounds().items() if k not in self.categories}
        for phrase, entry in entries.items():
            first, *rest = phrase.split()
            self._phrases.setdefault(first, []).append((tuple(rest), entry))
        for found in self._phrases.values():
            found.sort(key=lambda item: -len(item[0]))

    def matches(self, sentence: Sequence[str]) -> list[Match]:
        """The entries in a sentence of lower-case words, longest first at every place."""
        found: list[Match] = []
        phrases = self._phrases
        index, end = 0, len(sentence)
        while index < end:
            for rest, entry in phrases.get(sentence[index], ()):
                last = index + len(rest)
                if rest and tuple(sentence[index + 1 : last + 1]) != rest:
                    continue
                if entry.categories and not self._is_other(sentence, index, last, entry):
                    found.append(Match(entry, index, last))
                index = last
                break
            index += 1
        return found

    def _is_other(self, sentence: Sequence[str], first: int, last: int, entry: Entry) -> bool:
        """Whether the word is a verb here, or only describes the noun after it (`dog park`)."""
        word = sentence[first]
        if first == last and word in self._also_verbs and first > 0:
            before = sentence[first - 1]
            if before in _BEFORE_VERBS and not (before == "to" and word.endswith("s")):
                return True
        if last + 1 >= len(sentence) or entry.number == "many":
            return False
        after = sentence[last + 1]
        return after in self._heads or (
            # `dog bowl`, `train car`: the last of two nouns is what is there
            after in self._phrases
            and entry.number == "one"
            and any(not rest and other.categories for rest, other in self._phrases[after])
            and after not in self._also_verbs
        )

    def _names(self) -> dict[str, Entry]:
        synonyms = wording.load("words")["synonyms"]
        with_kinds = wording.load("claims")["with_kinds"]
        entries: dict[str, Entry] = {}
        for category in sorted(self.categories):
            for word in synonyms.get(category, ()):
                narrow = word not in with_kinds.get(category, (word,))
                entries |= _forms(word, (category,), firm=True, narrow=narrow)
            entries |= _forms(category, (category,), firm=True)
        return entries

    def _wider(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for word, names in wording.load("words")["broad"].items():
            if self.categories.intersection(names) and word not in self.categories:
                entries |= _forms(word, tuple(names), firm=False)
        return entries

    def _compounds(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for phrase, name in wording.load("claims")["compounds"].items():
            known = (name,) if name in self.categories else ()
            entries |= _forms(phrase, known, firm=True, narrow=True)
        return entries


_BEFORE_VERBS = word_set(
    "to can will may might could would should must they we you i not who don't can't"
)


def _forms(
    word: str, categories: tuple[str, ...], *, firm: bool, narrow: bool = False
) -> dict[str, Entry]:
    """The word in singular and plural."""
    one = Entry(categories, firm, "one", narrow)
    many = Entry(categories, firm, "many", narrow)
    either = Entry(categories, firm, "any", narrow)
    plural = words.plural(word)
    if plural == word:
        return {word: either}
    if plural.startswith(("pairs of ", "pieces of ")):
        group = plural.split()[0]
        return {word: either, f"{group[:-1]} of {word}": one, plural: many}
    if word.endswith("s") and not word.endswith("ss") and word not in _SINGULAR_IN_S:
        return {word: either}
    return {word: one, plural: many} | ({word + "s": many} if plural != word + "s" else {})


_SINGULAR_IN_S = frozenset({"bus", "tour bus", "coach bus", "double decker bus", "passenger bus"})
