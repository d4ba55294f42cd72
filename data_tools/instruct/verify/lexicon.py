"""Which words name which annotated category: names, synonyms, wider words, compounds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from data_tools import wording
from data_tools.instruct.verify.flags import DEPICTS, THING, FlagTable
from data_tools.instruct.verify.grammar import (
    ADVERBS,
    DEFINITE,
    FUNCTION_WORDS,
    INDEFINITE,
    PREPOSITIONS,
    determiner,
    finite_verbs,
    verb_stems,
    word_set,
)
from data_tools.instruct.verify.lazy import lazy
from data_tools.instruct.verify.stances import Stance
from vlm_sft.utils import words

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
class Mention:
    """A thing named in a text; `first` and `last` are words of its sentence."""

    entry: Entry
    word: str
    first: int
    last: int
    stance: Stance = "asserted"

    @property
    def number(self) -> GrammaticalNumber:
        """Return whether the word stands for one or for many."""
        return self.entry.number


class Lexicon:
    """Finds the annotated categories in a sentence's words.

    Args:
        categories: Names of all annotated categories. The annotations cannot settle
            claims about others; those are not found.

    Attributes:
        categories: The same.
        depictions: Words before a thing that make it an image of one (`statue`).
    """

    def __init__(self, categories: Iterable[str]) -> None:
        self.categories = frozenset(categories)
        self._phrases: dict[str, list[tuple[tuple[str, ...], Entry]]] = {}
        claims = wording.load("claims")
        self.depictions = frozenset(claims["depictions"])
        self._heads = frozenset(words.table("heads"))
        self._also_verbs = frozenset(claims["also_verbs"])
        self._mostly_verbs = frozenset(words.plural(verb) for verb in claims["mostly_verbs"])
        self._verb_forms = self._also_verbs | {words.plural(verb) for verb in self._also_verbs}
        self._adjectives = frozenset(claims["adjectives"])
        self._with_article = frozenset(claims["with_article"])
        self._wholes = {part: frozenset(of) for part, of in claims["parts"].items()}
        self._colors = frozenset(claims["colours"])
        entries = self._compounds() | self._wider() | self._names()
        # A compound says more than the name it is made of, unless it is a category's own name.
        own = {
            form for name in self.categories for form in (name.lower(), words.plural(name.lower()))
        }
        entries |= {k: v for k, v in self._compounds().items() if k not in own}
        for phrase, entry in entries.items():
            first, *rest = phrase.split()
            self._phrases.setdefault(first, []).append((tuple(rest), entry))
        for found in self._phrases.values():
            found.sort(key=lambda item: -len(item[0]))

    @lazy
    def flags(self) -> FlagTable:
        """Return which rules each word concerns."""
        table = FlagTable()
        table.add(THING, self._phrases)
        table.add(DEPICTS, self.depictions)
        return table

    def matches(
        self,
        sentence: Sequence[str],
        hits: Iterable[int] | None = None,
        owners: frozenset[int] = frozenset(),
    ) -> list[Mention]:
        """Return the entries in a sentence of lower-case words, longest first at every place.

        Args:
            sentence: The words.
            hits: Indices of the words that may begin a name; None: all are tried.
            owners: Indices of words that carried an `'s`: `the dog's bowl` has a dog.
        """
        found: list[Mention] = []
        phrases = self._phrases
        end = 0
        for index in range(len(sentence)) if hits is None else hits:
            if index < end:
                continue  # inside the name before
            for rest, entry in phrases.get(sentence[index], ()):
                last = index
                if rest:
                    last += len(rest)
                    if tuple(sentence[index + 1 : last + 1]) != rest or (
                        entry.number == "many" and self._ends_in_verb(sentence, index, last)
                    ):
                        continue
                if entry.categories and (
                    last in owners or not self._is_other(sentence, index, last, entry)
                ):
                    word = " ".join(sentence[index : last + 1]) if rest else sentence[index]
                    found.append(Mention(entry, word, index, last))
                end = last + 1
                break
        return found

    def _is_other(self, words: Sequence[str], first: int, last: int, entry: Entry) -> bool:
        """Return whether the word is not a noun here, or only describes the noun after it."""
        word = words[first]
        after = words[last + 1] if last + 1 < len(words) else ""
        if first == last:
            if word in self._verb_forms and self._is_verb(words, first):
                return True
            if word in self._adjectives and (
                _describes(words, last + 1, self._colors)
                or (after in _SHINING and determiner(words, first)[0] != "none")
            ):
                return True
            if word in self._with_article and first > 0:
                kind, begin = determiner(words, first)
                if kind == "none" and begin > 0:
                    return True  # `grilled with chicken`, `made by Apple`, `bear a smile`
        if word == "couple" and after == "of":
            return True  # a number
        if entry.number == "many" or not after:
            return False
        if after == "of" and not self._wholes.get(word, _NONE).isdisjoint(
            words[last + 2 : last + 6]
        ):
            return True  # `the bed of the pickup`
        if after in verb_stems() and determiner(words, first)[0] == "number":
            return False  # `several sheep stand there`
        return after in self._heads or (
            # `dog bowl`, `train car`: the last of two nouns names the thing
            after in self._phrases
            and entry.number == "one"
            and any(not rest and other.categories for rest, other in self._phrases[after])
            and after not in self._also_verbs
            and not self._is_verb(words, last + 1)
        )

    def _is_verb(self, words: Sequence[str], index: int) -> bool:
        """Return whether a word that is a verb as often as a noun is one here (`watches`)."""
        word = words[index]
        if word not in self._verb_forms or index == 0:
            return False
        before = words[index - 1]
        after = words[index + 1] if index + 1 < len(words) else ""
        if word in self._also_verbs:
            if before in _BEFORE_VERBS:
                return True
            plural = self._is_many(before) or before in _PLURAL_SUBJECTS
            if plural and (after in PREPOSITIONS or after in DEFINITE or after in INDEFINITE):
                return True
            return before in _BEFORE_BARE_VERBS and after in _ARTICLES
        if before in _SINGULAR_SUBJECTS:
            return True
        kind, begin = determiner(words, index)
        introduced = words[begin] if kind != "none" else ""
        if begin >= index - 1 and kind != "none":
            return False  # nothing between the determiner and the word
        if introduced in _SINGULAR_DETERMINERS:
            return True  # `a zebra watches`: `a` needs a singular
        ends = not after or after in PREPOSITIONS or after in DEFINITE or after in INDEFINITE
        return kind == "definite" and word in self._mostly_verbs and ends

    def _ends_in_verb(self, words: Sequence[str], first: int, last: int) -> bool:
        """Return whether the last word is a verb, as in `a television stands next to it`."""
        if words[last] not in finite_verbs():
            return False
        kind, begin = determiner(words, first)
        if kind == "indefinite" and words[begin] in _SINGULAR_DETERMINERS:
            return True
        after = words[last + 1] if last + 1 < len(words) else ""
        return kind == "definite" and (not after or after in PREPOSITIONS or after in ADVERBS)

    def _is_many(self, word: str) -> bool:
        return any(
            not rest and entry.number == "many" for rest, entry in self._phrases.get(word, ())
        )

    def _names(self) -> dict[str, Entry]:
        synonyms = words.table("synonyms")
        with_kinds = wording.load("claims")["with_kinds"]
        entries: dict[str, Entry] = {}
        for category in sorted(self.categories):
            for word in synonyms.get(category, ()):
                narrow = word not in with_kinds.get(category, (word,))
                entries |= _forms(word, (category,), firm=True, narrow=narrow)
            name = category.lower()
            if " " in name:  # `traffic-cone` is one word of a sentence
                entries |= _forms(name.replace(" ", "-"), (category,), firm=True)
            entries |= _forms(name, (category,), firm=True)
        return entries

    def _wider(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for word, names in words.table("broad").items():
            if self.categories.intersection(names) and word not in self.categories:
                entries |= _forms(word, tuple(names), firm=False)
        return entries

    def _compounds(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for phrase, name in words.table("compounds").items():
            known = (name,) if name in self.categories else ()
            entries |= _forms(phrase, known, firm=True, narrow=True)
        return entries


_NONE: Final[frozenset[str]] = frozenset()
_BEFORE_VERBS: Final = word_set(
    "to can will may might could would should must they we you i not who don't can't"
)
_BEFORE_BARE_VERBS: Final = word_set("and or then also always often never usually")
_PLURAL_SUBJECTS: Final = word_set("people both players riders men women children kids visitors")
_SHINING: Final = word_set("glow cast")
_SINGULAR_SUBJECTS: Final = word_set(
    "he she it who which that whoever everyone everybody someone somebody nobody anyone"
)
_SINGULAR_DETERMINERS: Final = word_set("a an one another each every this that")
_ARTICLES: Final = word_set("a an the his her its their this that these those")


def _describes(words: Sequence[str], index: int, colors: frozenset[str]) -> bool:
    """Return whether an adjective is followed by the noun, or the color, that it belongs to."""
    if index >= len(words):
        return False
    after = words[index]
    if after in ("one", "ones"):
        return True  # `an orange one`
    if after in ("and", ",") and index + 1 < len(words):
        return words[index + 1] in colors  # `an orange and silver bus`
    return (
        after not in FUNCTION_WORDS
        and after[0].isalpha()
        and after not in finite_verbs()
        and not after.endswith("ing")
    )


def _forms(
    word: str, categories: tuple[str, ...], *, firm: bool, narrow: bool = False
) -> dict[str, Entry]:
    """Return the word in singular and plural."""
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
