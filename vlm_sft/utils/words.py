"""Plurals, articles, numbers and lists in English, and the words for COCO's categories.

The tables are our own: `inflect` 7.6 takes 3 s to import, knows neither pairs (`a pair of skis`)
nor mass nouns (`some broccoli`), and makes `skiss`, `knivess` and the singulars `bu` and `cactu`.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

_ES_ENDINGS = ("s", "x", "z", "ch", "sh")
_VOWEL_SOUND = re.compile(
    r"(?!uni(?!n)|us[ae]|ute|eu|ewe|one\b|once\b|ukulele)[aeiou]|hour|heir|honest", re.IGNORECASE
)
"""Beginning of names that take `an`: a sound, not a letter (`a unicorn`, `an hourglass`)."""
_INITIALS = re.compile(r"[A-Z]{2,}\b")
"""Beginning of names that is read letter by letter (`an SUV`, `a UFO`)."""
_WORD_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
_CAPITALIZED = re.compile(r"\b[A-Z][a-z]+\b")


@cache
def _tables() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("words.json").read_text(encoding="utf-8"))


def table(name: str) -> Any:
    """Return a table of `words.json`, which is not to be changed.

    `synonyms`: words for each of COCO's categories and nothing else; `broad`: wider words, with the
    categories they may name; `compounds`: phrases that contain a synonym, with the category they
    name, or `""`; `heads`: nouns that a synonym before them only describes (`dog food`).
    """
    return _tables()[name]


def spoken(name: str) -> str:
    """Return a category's name as it is written in a sentence: `traffic cone` for `Traffic-Cone`.

    Underscores, and hyphens between two words, become spaces (`t-shirt` stays), and a word of which
    only the first letter is a capital gets a small one (`SUV` stays).
    """
    text = _WORD_HYPHEN.sub(" ", name.replace("_", " "))
    return _CAPITALIZED.sub(lambda found: found[0].lower(), " ".join(text.split()))


def plural(name: str) -> str:
    """Return `buses` for `bus`, `butter knives` for `butter knife`, `pairs of skis` for `skis`.

    Exceptions are in `words.json`. A name that is a plural already stays.
    """
    head, of, rest = name.partition(" of ")
    if of:
        return plural(head) + of + rest
    if _is_pair(name):
        return f"pairs of {name}"
    if is_mass(name):
        return f"pieces of {name}"
    if is_plural(name):
        return name
    before, space, last = name.rpartition(" ")
    return before + space + _plural_word(last)


def single(name: str) -> str:
    """Return the name after `one`: `dog`, `pair of scissors`, `piece of broccoli`, `shoe`."""
    if _is_pair(name):
        return f"pair of {name}"
    if is_mass(name):
        return f"piece of {name}"
    return _singular(name) if is_plural(name) else name


def article(name: str) -> str:
    """Return `a`, `an`, `some` or `a pair of`, as the name requires."""
    if _is_pair(name):
        return "a pair of"
    if is_mass(name) or is_plural(name):
        return "some"
    if _INITIALS.match(name):
        return "an" if name[0] in "AEFHILMNORSX" else "a"
    return "an" if _VOWEL_SOUND.match(name) else "a"


def be(name: str) -> str:
    """Return the verb after `the NAME`: `the dog is`, `the skis are`."""
    return "are" if is_plural(name) else "is"


def be_one(name: str) -> str:
    """Return the verb of what `article` begins: `is a pair of skis`, `are some shoes`."""
    return "are" if is_plural(name) and not _is_pair(name) else "is"


def is_mass(name: str) -> bool:
    """Return whether a name has neither plural nor `a`: `broccoli`."""
    return _last(name) in table("mass")


def is_plural(name: str) -> bool:
    """Return whether a category's name is a plural, such as `skis`, `people` or `shoes`."""
    last = _last(name)
    if last in table("singular_names") or last in table("irregular"):
        return False
    if last in table("pairs") or last in _irregular_plurals():
        return True
    return len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is"))


def number(count: int) -> str:
    """Return `two` for 2, digits above twelve."""
    numbers = table("numbers")
    return str(numbers[count]) if 0 <= count < len(numbers) else str(count)


def counted(name: str, count: int) -> str:
    """Return `a dog`, `two dogs`."""
    return f"{article(name)} {name}" if count == 1 else several(name, count)


def several(name: str, count: int) -> str:
    """Return `one dog`, `two dogs`."""
    return f"{number(count)} {single(name) if count == 1 else plural(name)}"


def listed(items: Sequence[str], conjunction: str = "and") -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


def capital(text: str) -> str:
    """Return the text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def mentions(text: str, name: str) -> bool:
    """Return whether a caption may name the category, by any of its words or a wider one."""
    return _spellings(name).search(text) is not None


@cache
def _spellings(name: str) -> re.Pattern[str]:
    wider = [word for word, names in table("broad").items() if name in names]
    spellings = {name + "s", name.replace(" ", "")}
    for word in (name, *table("synonyms").get(name, ()), *wider):
        spellings |= {word, plural(word)}
    longest_first = sorted(spellings, key=lambda word: (-len(word), word))
    pattern = "|".join(re.escape(word).replace(r"\ ", "[ _-]") for word in longest_first)
    return re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)


def _plural_word(word: str) -> str:
    irregular: str | None = table("irregular").get(word)
    if irregular is not None:
        return irregular
    if word.endswith("man") and word not in table("regular_in_man"):
        return word.removesuffix("man") + "men"
    if word.endswith(_ES_ENDINGS):
        return word + "es"
    if len(word) > 1 and word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _singular(name: str) -> str:
    """Return a plural name's singular: `shoe` for `shoes`, `wine glass` for `wine glasses`."""
    before, space, last = name.rpartition(" ")
    irregular = _irregular_plurals().get(last.lower())
    if irregular is not None:
        return before + space + irregular
    if last.endswith("ies"):
        return before + space + last[:-3] + "y"
    ending = "es" if last.endswith(("ses", "xes", "zes", "ches", "shes")) else "s"
    return before + space + last.removesuffix(ending)


def _is_pair(name: str) -> bool:
    """Return whether one of it is a pair: `skis`, `ski goggles`, `glasses`, not `wine glasses`."""
    last = _last(name)
    return name.lower() in table("pairs") or (last in table("pairs") and last != "glasses")


def _last(name: str) -> str:
    return name.lower().rpartition(" ")[2]


@cache
def _irregular_plurals() -> dict[str, str]:
    found = {many: one for one, many in table("irregular").items() if many != one}
    return found | {"cattle": "cow"}
