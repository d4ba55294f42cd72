"""What words can mean, by WordNet: which are nouns or verbs, and which are wider than others.

The table `wording/wordnet.txt` is made by `scripts/make_wordnet_table.py`. A word may have several
senses; which one a text means is not decided, so two words are related if any of their senses are.
"""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Final

from data_tools import wording
from data_tools.instruct.verify.grammar import FUNCTION_WORDS, singular


class Senses:
    """The senses of nouns, or of verbs, as a tree from the widest to the narrowest."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[int, ...]] = {}
        """The senses of every word by number."""
        self.mostly: dict[str, tuple[int, ...]] = {}
        """Those that are its most frequent; several where that is not known, none where the most
        frequent sense is not in the table."""
        self._wider = {0: 0}
        self._named: dict[str, list[int]] = {}
        self._paths: dict[int, frozenset[int]] = {0: frozenset()}

    def add(self, line: str) -> None:
        """Enter a line of the table: `12 3 sofa+ couch`."""
        number, wider, *words = line.split()
        sense = int(number)
        self._wider[sense] = int(wider)
        self._named.setdefault(words[0].strip("*+"), []).append(sense)
        for word in words:
            if word[0] == "*":
                continue
            name = word.rstrip("+")
            self.of[name] = (*self.of.get(name, ()), sense)
            if name != word:
                self.mostly[name] = (*self.mostly.get(name, ()), sense)

    def named(self, kind: str) -> tuple[int, ...]:
        """Return the senses that have this name."""
        return tuple(self._named[kind])

    def path(self, sense: int) -> frozenset[int]:
        """Return a sense with all wider ones."""
        found = self._paths.get(sense)
        if found is None:
            found = self._paths[sense] = self.path(self._wider[sense]) | {sense}
        return found

    def is_a(self, word: str, *kinds: str) -> bool:
        """Return whether the word mostly is of one of these kinds."""
        return self._is_any(self.mostly.get(word, ()), kinds)

    def may_be(self, word: str, *kinds: str) -> bool:
        """Return whether any sense of the word is of one of these kinds."""
        return self._is_any(self.of.get(word, ()), kinds)

    def _is_any(self, senses: Iterable[int], kinds: Iterable[str]) -> bool:
        wanted = {sense for kind in kinds for sense in self._named[kind]}
        return any(not wanted.isdisjoint(self.path(sense)) for sense in senses)

    def related(self, one: str, other: str) -> bool:
        """Return whether one may mean the same as the other, or a wider or narrower thing."""
        if one == other:
            return True
        others = self.of.get(other, ())
        return any(
            a in self.path(b) or b in self.path(a) for a in self.of.get(one, ()) for b in others
        )


@cache
def _sections() -> dict[str, list[str]]:
    """Return the lines of the table by section."""
    text = files(wording.__name__).joinpath("wordnet.txt").read_text(encoding="utf-8")
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            lines = sections.setdefault(line[2:], [])
        else:
            lines.append(line)
    return sections


@cache
def _senses(part: str) -> Senses:
    found = Senses()
    for line in _sections()[part]:
        found.add(line)
    return found


@cache
def _irregular(part: str) -> dict[str, str]:
    forms: dict[str, str] = {}
    for line in _sections()[f"irregular {part}"]:
        form, stem = line.split()
        forms.setdefault(form, stem)
    return forms


def nouns() -> Senses:
    """Return the nouns of things that can be seen."""
    return _senses("nouns")


def verbs() -> Senses:
    """Return the verbs."""
    return _senses("verbs")


@cache
def mostly_verbs() -> frozenset[str]:
    """Return the words that are nouns as well, but verbs more often."""
    return frozenset(_sections()["mostly verbs"])


@cache
def mostly_adjectives() -> frozenset[str]:
    """Return the nouns and verbs that are adjectives more often."""
    return frozenset(_sections()["mostly adjectives"])


@cache
def noun(word: str) -> str | None:
    """Return the singular of a noun of the table; None for other words."""
    of = nouns().of
    for form in (_irregular("nouns").get(word), word, singular(word)):
        if form is not None and form in of:
            return form
    return None


@cache
def verb(word: str) -> str | None:
    """Return the stem of a form of a verb of the table; None for other words."""
    of = verbs().of
    for form in (word, _irregular("verbs").get(word)):
        if form is not None and form in of:
            return form
    for ending, instead in _ENDINGS:
        if word.endswith(ending):
            stem = word[: -len(ending)]
            doubled = ending in ("ing", "ed") and len(stem) > 2 and stem[-1] == stem[-2]
            for candidate in (stem + instead, stem[:-1] if doubled else stem):
                if candidate in of and len(candidate) > 2:
                    return candidate
    return None


@cache
def members(*kinds: str) -> tuple[str, ...]:
    """Return the nouns that are no verbs, and all of whose senses are of one of these kinds."""
    found = nouns()
    wanted = {sense for kind in kinds for sense in found.named(kind)}
    return tuple(
        name
        for name, meant in found.of.items()
        if name in found.mostly
        and name not in verbs().of
        and name not in mostly_adjectives()
        and f"{name}s" not in FUNCTION_WORDS  # `does`
        and all(not wanted.isdisjoint(found.path(s)) for s in meant)
    )


@cache
def is_food(word: str) -> bool:
    """Return whether a word names something to eat, and nothing else more often."""
    name = noun(word)
    if name is None or name in _FOODS or not nouns().may_be(name, *_FOODS):
        return False
    return name not in nouns().mostly or nouns().is_a(name, "food", "plant", "fungus", "animal")


@cache
def ground(name: str) -> str | None:
    """Return the kind of place that a noun names, as one of WordNet's; None for other things."""
    return next((kind for kind in _GROUNDS if nouns().is_a(name, kind)), None)


_FOODS: Final = ("edible_fruit", "vegetable", "meat", "seafood", "baked_goods", "agaric", "fish")
_GROUNDS: Final = (
    "body_of_water", "seashore", "beach", "vegetation", "tract", "desert", "room", "building",
    "establishment", "facility", "workplace", "way", "bridge", "tower", "roof", "windowsill",
    "furniture", "shelf", "bathtub", "tree",
)  # fmt: skip
_ENDINGS: Final = (
    ("ies", "y"), ("ied", "y"), ("es", "e"), ("es", ""), ("s", ""), ("ing", "e"), ("ing", ""),
    ("ed", "e"), ("ed", ""),
)  # fmt: skip
