"""Classes of English words, and the small questions about word order that several rules share.

This is not a part-of-speech tagger: closed classes (articles, prepositions, auxiliaries) are
listed, and everything else is judged by its neighbors.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Final, Literal

from data_tools import wording

Determiner = Literal["definite", "indefinite", "number", "none"]


def word_set(text: str) -> frozenset[str]:
    """Return the words of a list written as one text."""
    return frozenset(text.split())


@lru_cache(maxsize=65536)
def singular(word: str) -> str:
    """Return the singular of a noun by its ending: `walls` -> `wall`, `dishes` -> `dish`."""
    known = _IRREGULAR.get(word)
    if known is not None:
        return known
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return word[:-1]


def is_plural(word: str) -> bool:
    """Return whether a noun is a plural by its ending."""
    return singular(word) != word


def determiner(words: Sequence[str], first: int) -> tuple[Determiner, int]:
    """Return what introduces the noun that begins at `first`, and the index of that word.

    Up to four adjectives may stand between. Without a determiner the index is that of the first
    adjective.
    """
    index = first - 1
    while index >= 0 and first - index <= 5:
        word = words[index]
        if word in DEFINITE:
            return "definite", index
        if word in INDEFINITE:
            return "indefinite", index
        if word in QUANTITIES or word.isdigit():
            return "number", index
        if not may_be_adjective(word):
            break
        index -= 1
    return "none", index + 1


def may_be_adjective(word: str) -> bool:
    """Return whether a word may stand between a determiner and its noun."""
    return (
        word not in FUNCTION_WORDS
        and word[0].isalpha()
        and not is_plural(word)
        and word not in finite_verbs()
    )


def is_finite(word: str) -> bool:
    """Return whether a word is a finite verb when it follows its subject."""
    return word in BE or word in _HAVE or word in finite_verbs()


@cache
def finite_verbs() -> frozenset[str]:
    """Return the finite forms of the verbs that are listed."""
    claims = wording.load("claims")
    listed = {form for forms in claims["actions"].values() for form in forms}
    verbs = {form for form in listed if not form.endswith(("ing", "ed"))}
    return frozenset(verbs | set(claims["more_verbs"]))


def _is_unlisted_verb(words: Sequence[str], index: int) -> bool:
    """Return whether a word is a verb by its place: `the walls swallow a lot`, `it holds the`."""
    after = words[index + 1] if index + 1 < len(words) else ""
    takes_object = after in DEFINITE or after in INDEFINITE
    if is_plural(words[index - 1]):
        return not is_plural(words[index]) and (takes_object or after in PREPOSITIONS)
    return is_plural(words[index]) and takes_object


@cache
def _phrase_ends() -> frozenset[str]:
    """Return the words that end a noun phrase which they do not begin."""
    return finite_verbs() | frozenset(wording.load("claims")["colours"]) | _PARTICIPLES


@cache
def verb_stems() -> frozenset[str]:
    """Return the stems of the listed verbs, which follow plurals: `two girls pet goats`."""
    return frozenset(wording.load("claims")["actions"])


@lru_cache(maxsize=65536)
def _place_in_phrase(word: str) -> Literal["outside", "first", "inside"]:
    """Return whether a word ends a noun phrase, ends one begun before it, or is in one."""
    if word in FUNCTION_WORDS or not word[0].isalpha():
        return "outside"
    if word.endswith("ly") and word not in ("family", "butterfly", "belly"):
        return "outside"
    participle = word.endswith(("ing", "ed")) and singular(word) not in _NOUNS_IN_ING
    return "first" if participle or word in _phrase_ends() else "inside"


def last_of_phrase(words: Sequence[str], first: int, end: int) -> int:
    """Return the last word of the noun phrase whose next word is `first`; `first - 1` if none.

    The phrase ends before function words, verbs and punctuation: in `red jacket skis down` the
    phrase after `red` is `jacket`.
    """
    stems = verb_stems()
    index = first
    while index < end:
        word = words[index]
        place = _place_in_phrase(word)
        if place == "outside":
            break
        if index > first and (
            place == "first"
            or (word in stems and is_plural(words[index - 1]))
            or _is_unlisted_verb(words, index)
        ):
            break
        index += 1
    return index - 1


BE: Final = word_set("is are was were be been being isn't aren't wasn't weren't 're 's")
_HAVE: Final = word_set("has have had does do did can could will would")
DEFINITE: Final = word_set(
    "the this these that those his her its their our my your each every both all"
)
INDEFINITE: Final = word_set("a an another any some no one")
QUANTITIES: Final = word_set(
    "two three four five six seven eight nine ten eleven twelve several many multiple various "
    "numerous few couple pair dozen dozens single"
)
INTRODUCING: Final = (DEFINITE | INDEFINITE | QUANTITIES) - word_set("no all both each every that")
"""Words after which a noun comes that is there."""
MODALS: Final = word_set(
    "can could may might must shall should will would need needs ought cannot can't couldn't "
    "won't wouldn't shouldn't"
)
PREPOSITIONS: Final = word_set(
    "of in on at to with by from near behind under over above below beneath underneath between "
    "beside besides inside outside around through toward towards against along across into onto "
    "off up down out for about as than like while during before after without within next atop "
    "among amid past via per throughout away aside unlike versus compared"
)
CONJUNCTIONS: Final = word_set(
    "and or but nor so because since although though whereas if unless when where who whom whose "
    "which that what why how whether while"
)
PRONOUNS: Final = word_set(
    "i you he she it we they him them us me himself herself itself themselves who someone somebody "
    "everyone everybody nobody anyone anybody one ones other others there here"
)
ADVERBS: Final = word_set(
    "not never always often also still just only very quite rather too too then now already "
    "together alone apart well again even almost nearly perhaps maybe close full next nearby ready "
    "visible available asleep"
)
FUNCTION_WORDS: Final = (
    BE | _HAVE | DEFINITE | INDEFINITE | QUANTITIES | MODALS | PREPOSITIONS | CONJUNCTIONS
    | PRONOUNS | ADVERBS
)  # fmt: skip
_PARTICIPLES: Final = word_set("made worn held shown seen built hung drawn written kept taken")
_NOUNS_IN_ING: Final = word_set(
    "building clothing ceiling painting railing awning wedding pudding evening morning string ring "
    "wing thing covering lighting frosting icing crossing landing netting topping seating bed shed "
    "drawing feed seed red swimming dining parking fishing cutting"
)
_IRREGULAR: Final = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "persons": "person",
    "feet": "foot", "teeth": "tooth", "mice": "mouse", "geese": "goose", "knives": "knife",
    "shelves": "shelf", "leaves": "leaf", "loaves": "loaf", "wolves": "wolf", "scarves": "scarf",
    "glasses": "glass", "buses": "bus", "dresses": "dress", "tomatoes": "tomato",
    "potatoes": "potato", "scissors": "scissors", "skis": "skis", "clothes": "clothes",
    "sunglasses": "sunglasses", "shorts": "shorts", "stairs": "stairs", "jeans": "jeans",
    "pants": "pants", "trousers": "trousers", "horses": "horse", "noses": "nose", "houses": "house",
    "roses": "rose", "vases": "vase", "cases": "case", "benches": "bench", "toothbrushes":
    "toothbrush", "tennis": "tennis", "lens": "lens", "grass": "grass", "species": "species",
}  # fmt: skip
