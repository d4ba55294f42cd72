"""Find COCO's objects in a description, by the words that the data verifier knows, too."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from vlm_sft.utils import words

_TOKEN: Final = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*|[.,;:!?()\n]")
_PUNCTUATION: Final = frozenset(".,;:!?()\n")
_CLAUSE_ENDS: Final = frozenset({*".;:!?\n", "but", "however", "although"})
_NEGATORS: Final = frozenset(
    ("no", "not", "without", "never", "neither", "nor", "isn't", "aren't", "wasn't", "weren't",
     "doesn't", "don't", "cannot", "can't", "hasn't", "haven't", "lacks", "lack", "absence")
)  # fmt: skip
_NEGATION_REACH: Final = 5
"""Words between a negator and a mention that it denies: `there is no sign of a dog`."""
_AFTER_NEGATOR: Final = frozenset(
    ("a", "an", "the", "any", "of", "on", "in", "under", "near", "at", "sign", "signs", "visible",
     "evidence", "have", "has", "show", "contain", "include", "see", "there", "other", "single")
)  # fmt: skip
_LIST_WORDS: Final = frozenset((",", "or", "nor", "and", "any", "other"))
_QUALIFIERS: Final = frozenset(("baby", "infant", "adult", "male", "female"))
"""Words for people that describe an animal after them: `a male zebra`."""
_BEFORE_FRUIT: Final = frozenset(
    ("a", "an", "the", "one", "this", "that", "each", "another", "half", "of", "sliced", "peeled",
     "whole", "fresh", "cut", "single", "ripe")
)  # fmt: skip
_AFTER_FRUIT: Final = frozenset(
    ("is", "are", "was", "on", "in", "with", "next", "sits", "sitting", "lies", "lying", "to",
     "near", "by", "at", "that", "from", "beside", "under", "and", "or", "slices", "slice", "cut")
)  # fmt: skip
_PREPOSITIONS: Final = frozenset(("at", "in", "on", "for", "by", "near", "behind", "outside"))
_DETERMINERS: Final = frozenset(("a", "an", "the", "some", "two", "three", "several", "many"))


@dataclass(frozen=True)
class Mention:
    """An object that a text names.

    Attributes:
        category: COCO's name.
        word: The words of the text.
        denied: The text says that the object is not there.
    """

    category: str
    word: str
    denied: bool = False


def find_objects(text: str) -> list[Mention]:
    """Return each mention of one of COCO's 80 categories, in order.

    The longest phrase counts (`toilet seat` is no seat), a noun that describes the next one does
    not (`dog food`, `wine glass` is no wine), nor does the color orange. Words that may mean other
    things, too (`table`, `vehicle`, `rider`), name no category here.
    """
    tokens = _TOKEN.findall(text.lower().replace("’", "'"))
    owners = [token.endswith(("'s", "s'")) for token in tokens]
    plain = [token.removesuffix("'s").rstrip("'") for token in tokens]
    found: list[Mention] = []
    index, end_of_denied = 0, -1
    while index < len(tokens):
        length, category = _longest(plain, tokens, index)
        if category and not _only_describes(plain, owners, index, length, category):
            word = " ".join(tokens[index : index + length])
            denied = _is_denied(plain, index) or (
                end_of_denied >= 0 and _continues_list(plain, end_of_denied, index)
            )
            end_of_denied = index + length if denied else -1
            found.append(Mention(category, word, denied))
        index += length
    return found


def category_named(name: str) -> str | None:
    """Return COCO's category for its name or one of its synonyms, or None."""
    return _phrases().get(tuple(name.lower().split()))


def _longest(plain: Sequence[str], tokens: Sequence[str], index: int) -> tuple[int, str | None]:
    """Return the number of words of the longest known phrase here (1 if none) and its category."""
    phrases = _phrases()
    for length in range(min(_longest_phrase(), len(plain) - index), 0, -1):
        for words_here in (plain, tokens):  # `catcher's mitt` is listed with its apostrophe
            phrase = tuple(words_here[index : index + length])
            if phrase in phrases and not _ends_in_verb(plain, index, phrase):
                return length, phrases[phrase]
    return 1, None


def _ends_in_verb(plain: Sequence[str], index: int, phrase: Sequence[str]) -> bool:
    """Return whether the last word of a phrase is a verb: `a bus stops`, `the train runs on`."""
    if len(phrase) < 2 or not _is_plural(phrase[-1]) or _phrases()[tuple(phrase)]:
        return False
    before = plain[index - 1] if index else ""
    after = plain[index + len(phrase)] if index + len(phrase) < len(plain) else ""
    return before in ("a", "an", "one", "another") or (before == "the" and after in _PREPOSITIONS)


def _only_describes(
    plain: Sequence[str], owners: Sequence[bool], index: int, length: int, category: str
) -> bool:
    """Return whether the noun describes the one after it, or is the color orange."""
    end = index + length
    after = plain[end] if end < len(plain) else ""
    if category == "orange" and plain[end - 1] == "orange":
        return not _is_fruit(plain, index, end)
    if not after or after in _PUNCTUATION or owners[end - 1] or _is_plural(plain[end - 1]):
        return False
    if after in words.table("heads"):
        return True
    _, following = _longest(plain, plain, end)
    if not following:
        return False
    return category != "person" or plain[end - 1] in _QUALIFIERS


def _is_fruit(plain: Sequence[str], index: int, end: int) -> bool:
    before = plain[index - 1] if index else ""
    after = plain[end] if end < len(plain) else ""
    if before not in _BEFORE_FRUIT:
        return False
    if after in ("and", "or"):  # `an orange and a cup`, but `an orange and white cat`
        rest = plain[end + 1 :]
        return bool(rest) and (rest[0] in _DETERMINERS or bool(_longest(rest, rest, 0)[1]))
    return not after or after in _PUNCTUATION or after in _AFTER_FRUIT


def _is_denied(plain: Sequence[str], index: int) -> bool:
    """Return whether a negator before the mention concerns it, with at most one adjective between.

    `a man without a hat rides a horse` has a horse.
    """
    for place in range(index - 1, max(-1, index - 2 - _NEGATION_REACH), -1):
        if plain[place] in _CLAUSE_ENDS:
            return False
        if plain[place] in _NEGATORS:
            between = plain[place + 1 : index]
            others = [n for n, word in enumerate(between) if word not in _AFTER_NEGATOR]
            last_determiner = max(
                (n for n, w in enumerate(between) if w in _DETERMINERS), default=-1
            )
            return "only" not in between and (
                not others or (len(others) == 1 and others[0] > last_determiner)
            )
    return False


def _continues_list(plain: Sequence[str], end: int, index: int) -> bool:
    """Return whether only a comma or conjunction is between two mentions: `no cars or buses`."""
    between = [word for word in plain[end:index]]
    if between and between[-1] in ("a", "an", "the") and {"or", "nor"} & set(between):
        between.pop()
    return bool(between) and all(word in _LIST_WORDS for word in between)


def _is_plural(word: str) -> bool:
    return (word.endswith("s") and not word.endswith(("ss", "us"))) or word in ("people", "mice")


@cache
def _phrases() -> Mapping[tuple[str, ...], str]:
    """Return the category of each phrase; an empty one for compounds that name none."""
    synonyms: Mapping[str, Sequence[str]] = words.table("synonyms")
    compounds = dict(words.table("compounds"))
    phrases: dict[tuple[str, ...], str] = {}
    for category, others in synonyms.items():
        for name in (*others, category):
            for form in _forms(name):
                phrases[tuple(form.split())] = category
    for name, category in compounds.items():
        if name not in synonyms:
            for form in _forms(name):
                phrases[tuple(form.split())] = category
    return phrases


@cache
def _longest_phrase() -> int:
    return max(map(len, _phrases()))


def _forms(name: str) -> set[str]:
    plural = words.plural(name)
    return {name, name + "s"} | ({plural} if " of " not in plural or " of " in name else set())
