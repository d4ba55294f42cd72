"""Plurals, articles, numbers and lists in English, for category names."""

import re
from collections.abc import Sequence
from functools import cache

from data_tools import wording

_ES_ENDINGS = ("s", "x", "z", "ch", "sh")
_VOWEL_SOUND = re.compile(
    r"(?!uni(?!n)|us[ae]|ute|eu|ewe|one\b|once\b|ukulele)[aeiou]|hour|heir|honest", re.IGNORECASE
)
"""Beginning of names that take `an`: a sound, not a letter (`a unicorn`, `an hourglass`)."""


def plural(name: str) -> str:
    """Return `buses` for `bus`, `people` for `person`, `pairs of skis` for `skis`.

    Exceptions live in `wording/words.json`. A name that is a plural already stays.
    """
    known: str | None = wording.load("words")["plurals"].get(name)
    if known is not None:
        return known
    if _is_pair(name):
        return f"pairs of {name}"
    if is_plural(name):
        return name
    if name.endswith(_ES_ENDINGS):
        return name + "es"
    if len(name) > 1 and name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def single(name: str) -> str:
    """Return the name behind `one`: `dog`, `pair of scissors`, `piece of broccoli`, `shoe`."""
    if _is_pair(name):
        return f"pair of {name}"
    if is_plural(name):
        return _singular(name)
    group, of, rest = plural(name).partition(" of ")
    return f"{group.removesuffix('s')} of {rest}" if of and rest == name else name


def article(name: str) -> str:
    """Return `a`, `an`, `some` or `a pair of`, as the name wants."""
    known: str | None = wording.load("words")["articles"].get(name)
    if known is not None:
        return known
    if _is_pair(name):
        return "a pair of"
    if is_plural(name):
        return "some"
    return "an" if _VOWEL_SOUND.match(name) else "a"


def be(name: str) -> str:
    """Return the verb behind `the NAME`: `the dog is`, `the skis are`."""
    return "are" if is_plural(name) else "is"


def be_one(name: str) -> str:
    """Return the verb of what `article` begins: `is a pair of skis`, `are some shoes`."""
    return "are" if is_plural(name) and not _is_pair(name) else "is"


def is_plural(name: str) -> bool:
    """Return whether a category's name is a plural, such as `skis`, `people` or `shoes`."""
    known = wording.load("words")
    last = name.lower().rpartition(" ")[2]
    if last in known["singular_names"] or last in known["plurals"]:
        return False
    if last in known["pairs"] or last in known["plural_names"]:
        return True
    return len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is"))


def _is_pair(name: str) -> bool:
    """Return whether one of it is a pair: `skis`, `ski goggles`, `glasses`, not `wine glasses`."""
    pairs, last = wording.load("words")["pairs"], name.lower().rpartition(" ")[2]
    return name.lower() in pairs or (last in pairs and last != "glasses")


def _singular(name: str) -> str:
    """Return a plural name's singular: `shoe` for `shoes`, `wine glass` for `wine glasses`."""
    before, space, last = name.rpartition(" ")
    known: str | None = wording.load("words")["plural_names"].get(last.lower())
    if known is not None:
        return before + space + known
    if last.endswith("ies"):
        return before + space + last[:-3] + "y"
    for ending in ("ses", "xes", "zes", "ches", "shes"):
        if last.endswith(ending):
            return before + space + last[:-2]
    return before + space + last[:-1]


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
