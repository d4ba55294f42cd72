"""Questions that are a choice among a few answers, of which a guesser could know the commoner."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from data_tools.instruct.clean.texts import words
from data_tools.instruct.schema import Kind, Turn
from data_tools.instruct.verify.lexicon import Lexicon

Family = Literal["yes_no", "side", "height", "option"]

VALUES: Final[dict[Family, tuple[str, ...]]] = {
    "yes_no": ("yes", "no"),
    "side": ("left", "right"),
    "height": ("top", "bottom"),
    "option": ("A", "B", "C", "D", "E", "F"),
}
"""What can be answered, by family; the order is that of `Choice.value`."""

_YES_NO: Final = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_VERDICT: Final = re.compile(r"\bso,? (yes|no)\W*$", re.IGNORECASE)
_OPEN_QUESTION: Final = re.compile(
    r"\W*(?:what|how|where|which|who|whom|whose|why|when|describe|name|list)\b", re.IGNORECASE
)
_SIDES: Final = {
    "side": (
        r"\bleft(?:most|-hand|ward)?\b",
        r"\bright(?:most|-hand|ward)?\b(?! (?:next|behind|in|at|on|now|above|below|there|away|by|"
        r"beside|beneath|under|before|after|near|beyond|through|across|up|down|under))",
    ),
    "height": (
        r"\b(?<!on )(?:top|upper|above|higher)\b(?! of)",
        r"\b(?:bottom|lower|below)\b",
    ),
}
_PATTERNS: Final = {
    family: tuple(re.compile(text, re.IGNORECASE) for text in pair)
    for family, pair in _SIDES.items()
}
_OPTION_LISTED: Final = re.compile(r"(?:^|[\s(])([A-F])[.):]\s")
_OPTION_CHOSEN: Final = re.compile(
    r"\W*(?:option |answer |the answer is )?\(?([A-F])\b(?:[.):,]|\W*$)"
)


@dataclass(frozen=True)
class Choice:
    """One question with a choice.

    Attributes:
        family: Which answers there are.
        value: The one given, an index into `VALUES[family]`.
        options: How many are offered.
    """

    family: Family
    value: int
    options: int


def choice_of(turn: Turn) -> Choice | None:
    """Return the choice that the turn is; None if it is not one or its answer is unclear."""
    return _option(turn) or _yes_no(turn) or _place(turn)


def _option(turn: Turn) -> Choice | None:
    listed = _OPTION_LISTED.findall(turn.question)
    options = len(set(listed))
    if options < 2 or sorted(set(listed)) != list(VALUES["option"][:options]):
        return None
    chosen = _OPTION_CHOSEN.match(turn.answer)
    if chosen is None or chosen[1] not in listed:
        return None
    return Choice("option", VALUES["option"].index(chosen[1]), options)


def _yes_no(turn: Turn) -> Choice | None:
    found = None
    if not _OPEN_QUESTION.match(turn.question):
        found = _YES_NO.match(turn.answer)
    if found is None and turn.kind == "existence":
        found = _VERDICT.search(turn.answer)
    return Choice("yes_no", VALUES["yes_no"].index(found[1].lower()), 2) if found else None


def _place(turn: Turn) -> Choice | None:
    families: tuple[Family, ...] = ("side", "height")
    for family in families:
        first, second = _PATTERNS[family]
        offered = first.search(turn.question) and second.search(turn.question)
        if not offered and turn.kind != "place":
            continue
        said = [pattern.search(turn.answer) is not None for pattern in (first, second)]
        if sum(said) == 1:
            return Choice(family, said.index(True), 2)
    return None


def group_of(turn: Turn, choice: Choice, categories: "Categories") -> tuple[str, Kind, str]:
    """What a guesser who does not see the image knows: family, kind, categories named."""
    family = choice.family if choice.family != "option" else f"option_of_{choice.options}"
    return family, turn.kind, "+".join(categories.named(turn.question))


class Categories:
    """Finds the annotated categories that a question names, by the words that `verify` knows."""

    def __init__(self, names: Iterable[str]) -> None:
        self._lexicon = Lexicon(names)

    def named(self, text: str) -> list[str]:
        """The categories in the order of their names, each once.

        A wider word (`vehicle`) is a category of its own here: the guesser reads the word.
        """
        found = self._lexicon.matches(words(text))
        return sorted({"|".join(match.entry.categories) for match in found})
