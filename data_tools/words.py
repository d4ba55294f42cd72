"""Plurals, articles, numbers and lists in English, for category names."""

import re
from collections.abc import Sequence
from functools import cache

from data_tools import wording

_ES_ENDINGS = ("s", "x", "z", "ch", "sh")


def plural(name: str) -> str:
    """`buses` for `bus`, `people` for `person`; exceptions live in `wording/words.json`."""
    known: str | None = wording.load("words")["plurals"].get(name)
    if known is not None:
        return known
    if name.endswith(_ES_ENDINGS):
        return name + "es"
    if len(name) > 1 and name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def single(name: str) -> str:
    """The name behind `one`: `dog`, `pair of scissors`, `piece of broccoli`."""
    group, of, rest = plural(name).partition(" of ")
    return f"{group.removesuffix('s')} of {rest}" if of and rest == name else name


def article(name: str) -> str:
    """`a`, `an`, `some` or `a pair of`, as the name wants."""
    known: str | None = wording.load("words")["articles"].get(name)
    return known if known is not None else ("an" if name[:1].lower() in "aeiou" else "a")


def number(count: int) -> str:
    """`two` for 2, digits above twelve."""
    words: list[str] = wording.load("words")["numbers"]
    return words[count] if 0 <= count < len(words) else str(count)


def counted(name: str, count: int) -> str:
    """`a dog`, `two dogs`."""
    return f"{article(name)} {name}" if count == 1 else f"{number(count)} {plural(name)}"


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]


def capital(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]


def mentions(text: str, name: str) -> bool:
    """Whether a caption may speak of the category: its name, plural, a synonym, a wider word."""
    return _spellings(name).search(text) is not None


@cache
def _spellings(name: str) -> re.Pattern[str]:
    known = wording.load("words")
    wider = [word for word, names in known["broad"].items() if name in names]
    spellings = {name + "s", name.replace(" ", "")}
    for word in (name, *known["synonyms"].get(name, ()), *wider):
        spellings |= {word, plural(word)}
    pattern = "|".join(re.escape(word) for word in sorted(spellings, key=lambda w: (-len(w), w)))
    return re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
