"""Which things a sentence puts where: in a part of the image, or beside, behind, on others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from data_tools.geometry import Direction, Region
from data_tools.instruct.verify.flags import PLACE
from data_tools.instruct.verify.grammar import (
    ADVERBS,
    BE,
    DEFINITE,
    INDEFINITE,
    PREPOSITIONS,
    QUANTITIES,
    determiner,
    is_finite,
    last_of_phrase,
    word_set,
)
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.reading import Sentence

Touch = Literal["on", "under", "in", "next to"]
"""Relations that need the two to be near each other."""
Depth = Literal["behind", "in front of"]
"""Relations that boxes refute where the wrong one reaches far lower in the image."""
Layer = Literal["background", "foreground"]


@dataclass(frozen=True, slots=True)
class InFrame:
    """Things said to be in a region of the image.

    Any of `subjects` may be the one that is meant. `plain`: `on the left`, without naming the
    image, which may also be said of two things. `relative`: `to the left`, seen from what was named
    before. `of`: the thing whose side is meant (`at the right end of the desk`), if it has one box.
    `pronoun`: an `it` or `they` is placed, and `subjects` is empty.
    """

    subjects: tuple[Mention, ...]
    regions: tuple[Region, ...]
    plain: bool
    first: int
    last: int
    pronoun: bool = False
    relative: bool = False
    of: Mention | None = None


@dataclass(frozen=True, slots=True)
class Beside:
    """Things said to be in a direction of another, or near it.

    `other` is None where the other has no category (`to the right of the bush`). `marked`: a thing
    that tells it from others of its kind (`the woman with the phone`).
    """

    subjects: tuple[Mention, ...]
    how: Direction | Touch | Depth
    other: Mention | None
    first: int
    last: int
    marked: Mention | None = None


@dataclass(frozen=True, slots=True)
class InLayer:
    """Things said to be in the background or the foreground."""

    subjects: tuple[Mention, ...]
    layer: Layer
    first: int
    last: int


Placing = InFrame | Beside | InLayer


def placings(sentence: Sentence) -> Iterator[Placing]:
    """Yield every place that a sentence gives to a thing it names."""
    if not sentence.bits & PLACE:
        return
    words = sentence.words
    for index in sentence.hits(PLACE):
        word = words[index]
        if word in _SIDES or word in _CORNERS:
            yield from _side(sentence, index)
        elif word in _VERTICAL:
            yield from _vertical(sentence, index)
        elif word in _CENTRES:
            yield from _centre(sentence, index)
        elif word in _LAYERS:
            yield from _layer(sentence, index)
        elif word in _ORDER:
            yield from _beside(sentence, index, index, _ORDER[word])
        elif word in _DEPTHS:
            yield from _depth(sentence, index)
        else:
            found = _touch(sentence, index)
            if found is not None:
                yield found


def _side(sentence: Sentence, index: int) -> Iterator[Placing]:
    """Yield the place that the word `left` or `right` gives."""
    words = sentence.words
    side = words[index].removesuffix("-hand").removesuffix("most")
    before = words[index - 1] if index else ""
    first = index - 1 if before in _BEFORE_SIDE else index
    regions: tuple[Region, ...] = _CORNERS.get(side, (side,))  # type: ignore[arg-type]
    if before in _VERTICAL_OF and len(regions) == 1:
        regions = (_VERTICAL_OF[before], side)  # type: ignore[assignment]
    last, named = _skip_part(words, index)
    after = words[last + 1] if last + 1 < len(words) else ""
    if after == "of" or (after == "from" and not named):
        if _frame_follows(words, last + 2):
            yield from _in_frame(sentence, regions, False, first, last)
            return
        direct = before in ("the", "immediate", "far") or before in BE or index == 0
        direct = direct or any(m.last == index - 1 for m in sentence.mentions)
        if len(regions) > 1:
            return
        if named:
            yield from _end_of(sentence, regions, first, last)
        elif direct or before in ("directly", "just", "immediately"):
            yield from _beside(sentence, first, last + 1, side)  # type: ignore[arg-type]
        return
    if before not in _BEFORE_SIDE or after in _BODY or (not named and not _may_end(after)):
        return
    relative = "to" in words[max(0, first - 2) : first] and not named
    plain = not named and len(regions) == 1
    yield from _in_frame(sentence, regions, plain, first, last, relative=relative)


def _end_of(
    sentence: Sentence, regions: tuple[Region, ...], first: int, last: int
) -> Iterator[InFrame]:
    """Yield `at the right end of the desk`."""
    of = _following(sentence, last + 1, 4)
    if of is None and sentence.words[last + 1 : last + 2] == ["of"]:
        head = last_of_phrase(sentence.words, last + 3, len(sentence.words))
        if sentence.words[head] not in _EXTENDED:
            return
    for found in _in_frame(sentence, regions, True, first, last):
        yield InFrame(
            found.subjects, regions, True, found.first, found.last, found.pronoun, of is None, of
        )


def _vertical(sentence: Sentence, index: int) -> Iterator[InFrame]:
    """Yield the place that `top`, `bottom`, `upper`, `lower` give where no side follows."""
    words = sentence.words
    if index + 1 < len(words) and words[index + 1] in _SIDES:
        return  # `_side` takes the corner
    last, named = _skip_part(words, index)
    if words[index] in ("upper", "lower") and not named:
        return
    of_frame = words[last + 1 : last + 2] == ["of"] and _frame_follows(words, last + 2)
    if not (of_frame or words[last] in ("half", "third")) or (
        words[last + 1 : last + 2] == ["of"] and not of_frame
    ):
        return
    region = _VERTICAL_OF[words[index]]
    yield from _in_frame(sentence, (region,), False, max(0, index - 1), last)


def _centre(sentence: Sentence, index: int) -> Iterator[InFrame]:
    words = sentence.words
    if words[index + 1 : index + 2] != ["of"] or not _frame_follows(words, index + 2):
        return
    yield from _in_frame(sentence, ("centre",), False, max(0, index - 1), index)


def _layer(sentence: Sentence, index: int) -> Iterator[InLayer]:
    """Yield what `in the background` and `in the foreground` place."""
    words = sentence.words
    if words[max(0, index - 2) : index] != ["in", "the"]:
        return
    layer: Layer = "background" if words[index] == "background" else "foreground"
    for group in _subjects(sentence, index - 1, index):
        yield InLayer(group, layer, index - 1, index)


def _depth(sentence: Sentence, index: int) -> Iterator[Beside]:
    """Yield `X is behind Y` and `X is in front of Y`."""
    words = sentence.words
    last, first = index, index
    if words[index] == "front":
        if words[index - 1 : index] != ["in"] or words[index + 1 : index + 2] != ["of"]:
            return
        first, last = index - 1, index + 1
    other = _following(sentence, last, 4)
    if other is None or other.stance != "asserted":
        return
    for group in _subjects(sentence, first, other.last, linked=True):
        yield Beside(group, _DEPTHS[words[index]], other, first, other.last)


def _touch(sentence: Sentence, index: int) -> Beside | None:
    """Return on, under, in or next to: only straight after the thing or its verb."""
    words = sentence.words
    how, last = _TOUCHES[words[index]], index
    if words[index] == "next":
        if words[index + 1 : index + 2] != ["to"]:
            return None
        last = index + 1
    if len(sentence.mentions) < 2:
        return None
    begin = index
    while begin and (words[begin - 1] in _POSTURES or words[begin - 1] in BE):
        begin -= 1
    subject = next((m for m in sentence.mentions if m.last == begin - 1), None)
    other = _following(sentence, last, 3)
    if subject is None or other is None or "one" not in (subject.number, other.number):
        return None
    if subject.stance != "asserted" or other.stance != "asserted":
        return None
    return Beside((subject,), how, other, subject.first, other.last)


def _in_frame(
    sentence: Sentence,
    regions: tuple[Region, ...],
    plain: bool,
    first: int,
    last: int,
    *,
    relative: bool = False,
) -> Iterator[InFrame]:
    groups = _subjects(sentence, first, last)
    for group in groups:
        yield InFrame(group, regions, plain, first, last, relative=relative)
    if groups:
        return
    begin, _ = sentence.clause(max(0, first - 1))
    opens = sentence.words[begin : begin + 2]
    named = any(begin <= m.first < first for m in sentence.mentions)
    bare = begin == 0 and all(word in _LEADING for word in sentence.words[:first])
    placed = len(opens) == 2 and opens[0] in PRONOUNS and opens[1] in _PLACING
    if (placed or bare) and not named:
        yield InFrame((), regions, plain, first, last, pronoun=True, relative=relative)


def _beside(
    sentence: Sentence, first: int, last: int, how: Direction | Touch | Depth
) -> Iterator[Beside]:
    """Yield what is placed by a phrase (`left of`) whose last word is `last`."""
    words = sentence.words
    other = _following(sentence, last, 4)
    if other is not None and other.stance not in ("asserted", "depicted"):
        return
    end = other.last if other is not None else last
    marked = None
    if other is None and words[last + 1 : last + 2] == ["it"]:
        other, end = _opening(sentence, first), last + 1
        if other is None:
            return
    elif other is not None and words[end + 1 : end + 2] and words[end + 1] in _MARKING:
        marked = _following(sentence, end + 1, 4)
    elif other is None and words[last + 1 : last + 2] in (["it"], ["him"], ["her"], ["them"]):
        return
    for group in _subjects(sentence, first, end):
        if other not in group:
            yield Beside(group, how, other, first, end, marked)


def _opening(sentence: Sentence, before: int) -> Mention | None:
    """Return the thing that opens a sentence of two, for which a later `it` stands.

    `A sink is near the middle, and the toilet is to the left of it.`
    """
    named = [m for m in sentence.mentions if m.last < before]
    if len(named) != 2 or named[0].number != "one" or named[0].stance != "asserted":
        return None
    opens = named[0].first <= OPENING and PREPOSITIONS.isdisjoint(sentence.words[: named[0].first])
    return named[0] if opens else None


def _subjects(
    sentence: Sentence, first: int, last: int, *, linked: bool = False
) -> list[tuple[Mention, ...]]:
    """Return what a phrase from `first` to `last` places, each as the things that may be meant.

    That is the subject of the verb before the phrase (`a bag and a book are on the left`), what the
    phrase follows, or, where it opens the clause, what comes after it (`On the left stands a dog`).
    `linked`: only the first of these.
    """
    words = sentence.words
    begin, _ = sentence.clause(max(0, first - 1))
    start = first
    while start > begin and words[start - 1] in _LEADING:
        start -= 1
    before = [m for m in sentence.mentions if begin <= m.first and m.last < start]
    if not before:
        if any(word not in _LEADING for word in words[begin:start]):
            return []
        after = _after_phrase(sentence, last)
        return [(after,)] if after is not None and after.stance == "asserted" else []
    verb = start
    while verb > begin and (words[verb - 1] in _LINKS or words[verb - 1] in ADVERBS):
        verb -= 1
    if any(m.stance != "asserted" for m in before):
        return []
    near = before[-1]
    if verb < start:
        between = words[near.last + 1 : verb]
        joined = between[:1] == ["and"] and len(between) < 4 and PREPOSITIONS.isdisjoint(between)
        if (not between or joined) and not _is_governed(sentence, near):
            found: list[tuple[Mention, ...]] = [(near,)]
            earlier = [m for m in sentence.mentions if m.last < near.first][-1:]
            if earlier and _is_coordinated(sentence, earlier[0], near):
                found.append((earlier[0],))
            return found
        if not _is_governed(sentence, before[0]) and not between and all(
            _is_governed(sentence, m) for m in before[1:]
        ):  # fmt: skip
            return [(before[0],)]
    if linked:
        return []
    return [tuple(before)]


def _after_phrase(sentence: Sentence, last: int) -> Mention | None:
    """Return what a phrase that opens the clause places: `On the left of the image stands a dog`.

    A second phrase between commas may stand in between.
    """
    words = sentence.words
    index = last + 1
    if words[index : index + 1] == ["of"] and _frame_follows(words, index + 1):
        index += 2 if words[index + 1] in _FRAME else 3
    if words[index : index + 1] == [","]:
        index += 1
        if words[index : index + 1] and (
            words[index] in PREPOSITIONS or words[index] in ("close", "next", "right")
        ):
            index = next((i + 1 for i in range(index, len(words)) if words[i] == ","), len(words))
    while index < len(words) and (words[index] in _INVERTED or words[index] in _LINKS):
        index += 1
    if index >= len(words):
        return None
    if words[index] in DEFINITE or words[index] in INDEFINITE or words[index] in QUANTITIES:
        index += 1
    head = last_of_phrase(words, index, len(words))
    return next((m for m in sentence.mentions if index <= m.first <= head <= m.last), None)


def _is_governed(sentence: Sentence, mention: Mention) -> bool:
    """Return whether a preposition or a verb stands before the thing: `the rider of the bike`."""
    kind, begin = determiner(sentence.words, mention.first)
    if begin == 0:
        return False
    before = sentence.words[begin - 1]
    return before in PREPOSITIONS or before in _TRANSITIVE or (
        kind != "none" and is_finite(before) and before not in BE
    )  # fmt: skip


def _is_coordinated(sentence: Sentence, one: Mention, other: Mention) -> bool:
    _, begin = determiner(sentence.words, other.first)
    return sentence.words[one.last + 1 : begin] in (["and"], [","])


def _following(sentence: Sentence, index: int, reach: int) -> Mention | None:
    """Return the thing named straight after, adjectives and articles between."""
    for mention in sentence.mentions:
        if mention.first > index:
            between = sentence.words[index + 1 : mention.first]
            plain = all(w not in _NOT_BEFORE_NOUN and w[0].isalpha() for w in between)
            return mention if len(between) < reach and plain else None
    return None


def _skip_part(words: Sequence[str], index: int) -> tuple[int, bool]:
    """Return the last of `hand`, `side`, `half` after a side, and whether a part is named."""
    last, named = index, False
    while last + 1 < len(words) and words[last + 1] in _PARTS:
        last += 1
        named = named or words[last] != "hand"
    return last, named


def _frame_follows(words: Sequence[str], index: int) -> bool:
    return any(word in _FRAME for word in words[index : index + 2])


def _may_end(word: str) -> bool:
    """Return whether `on the left` may be complete before this word."""
    return not word or not word[0].isalpha() or word in _AFTER_PLAIN or is_finite(word)


OPENING: Final = 3
"""The subject of a sentence begins by this word."""
_SIDES: Final = word_set("left right left-hand right-hand leftmost rightmost")
_VERTICAL_OF: Final[dict[str, Region]] = {
    "upper": "top", "top": "top", "lower": "bottom", "bottom": "bottom",
}  # fmt: skip
_SIDE_OF: Final[dict[str, Region]] = {"left": "left", "right": "right"}
_CORNERS: Final[dict[str, tuple[Region, ...]]] = {
    f"{vertical}-{side}": (region, where)
    for vertical, region in _VERTICAL_OF.items()
    for side, where in _SIDE_OF.items()
}
_VERTICAL: Final = frozenset(_VERTICAL_OF)
_CENTRES: Final = word_set("centre center middle")
_LAYERS: Final = word_set("background foreground")
_ORDER: Final[dict[str, Direction]] = {"above": "above", "below": "below"}
_DEPTHS: Final[dict[str, Depth]] = {"behind": "behind", "front": "in front of"}
_TOUCHES: Final[dict[str, Touch]] = {
    "on": "on", "onto": "on", "atop": "on", "under": "under", "underneath": "under",
    "beneath": "under", "in": "in", "inside": "in", "next": "next to", "beside": "next to",
}  # fmt: skip
CUES: Final = (
    _SIDES
    | _CORNERS.keys()
    | _VERTICAL
    | _CENTRES
    | _LAYERS
    | _ORDER.keys()
    | _DEPTHS.keys()
    | _TOUCHES.keys()
)
_BEFORE_SIDE: Final = word_set("the far upper lower top bottom immediate extreme very its his her")
_PARTS: Final = word_set("hand side half part portion third corner edge section area end wall")
_FRAME: Final = word_set(
    "picture image photo photograph frame scene shot view room bathroom bedroom kitchen street"
)
_EXTENDED: Final = word_set("desk table counter court road sofa shelf wall stage track field")
_BODY: Final = word_set("hand arm leg foot shoulder ear eye wing paw knee turn lane")
_AFTER_PLAIN: Final = word_set(
    "is are and while with has in appears stands sits there we or a an two three four one another "
    "some several the his her near next behind you can stand sit lie hang at as where who which"
)
_POSTURES: Final = word_set(
    "sitting standing lying laying sits stands lies lays placed resting rests perched seated "
    "parked located positioned"
)
_LINKS: Final = (
    BE
    | _POSTURES
    | word_set(
        "can seen visible situated stays sit stand lie rest hang hangs hanging leaning leans "
        "mounted waits waiting parked crouches crouching kneels kneeling appears appear shown found"
    )
)
_PLACED_BE: Final = word_set("is are was were be stays lies located positioned placed situated")
_PLACING: Final = _PLACED_BE | _POSTURES | word_set("can appears seems 're 's")
PRONOUNS: Final = word_set("it he she they")
_LEADING: Final = word_set(
    "on to in at the far immediate directly just and , towards toward along near very its his her "
    "upper lower top bottom"
)
_INVERTED: Final = word_set("there we you see ,")
_TRANSITIVE: Final = word_set(
    "holding wearing carrying riding using holds wears carries rides has have with showing"
)
_MARKING: Final = word_set("with holding carrying using wearing riding")
_NOT_BEFORE_NOUN: Final = word_set(
    "of is are and or with that which to in on at from by some several"
)
