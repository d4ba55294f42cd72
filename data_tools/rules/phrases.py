"""Filling patterns with names, articles, plurals and verbs that agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np

from data_tools.instruct.schema import Kind, Turn
from data_tools.rules import Family
from vlm_sft.utils import words

AnswerStyle = Literal["short", "sentence", "evidence"]
"""`Yes.`; a sentence; or what is seen and then the verdict (relations and descriptions aside)."""

_KINDS: Final[Mapping[Family, Kind]] = {
    "caption": "description",
    "description": "description",
    "existence": "existence",
    "counting": "count",
    "halves": "place",
    "relation": "place",
    "reasoning": "reasoning",
}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Exchange:
    """One question with its answer.

    Attributes:
        question: As the user asks it.
        reply: As the model should answer it.
        answer: The bare answer that an evaluation compares with, e.g. `yes`, `two`, `left`.
        category: What is asked about; empty for captions, descriptions and reasoning.
        kind: Within the family; existence: `positive`, or how the absent category was drawn.
        evidence: Labels of the captions and boxes that it follows from.
    """

    family: Family
    question: str
    reply: str
    answer: str = ""
    category: str = ""
    kind: str = ""
    evidence: tuple[str, ...] = ()

    @property
    def turn(self) -> Turn:
        """The same in the form that is verified."""
        kind = _KINDS[self.family]
        return Turn(question=self.question, answer=self.reply, kind=kind, evidence=self.evidence)


class Speaker:
    """Chooses among patterns by one generator and answers in one style."""

    def __init__(self, rng: np.random.Generator, style: AnswerStyle = "sentence") -> None:
        self.rng = rng
        self.style = style

    def pick(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[int(self.rng.integers(len(items)))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return the items in random order."""
        return [items[i] for i in self.rng.permutation(len(items))]

    def fill(self, patterns: Sequence[str], **values: str) -> str:
        """Return one of the patterns, filled in."""
        return words.capital(self.pick(patterns).format(**values))

    def say(self, patterns: Sequence[str], name: str, **values: str) -> str:
        """Return one of the patterns, filled in with the forms of the name and `values`.

        The forms are `{name}`, `{names}`, `{one}`, `{a}`, `{any}`, and the verbs `{be}` (after
        `the NAME`) and `{be_one}` (before `{a}`), with a capital letter as `{Be}`, `{Be_one}`.
        """
        be, be_one, article = words.be(name), words.be_one(name), words.article(name)
        forms = {
            "name": spelled(name), "names": spelled(words.plural(name)),
            "one": spelled(words.single(name)), "a": article,
            "any": "any" if article == "some" else article, "be": be, "be_one": be_one,
            "Be": words.capital(be), "Be_one": words.capital(be_one),
        }  # fmt: skip
        return self.fill(patterns, **forms, **values)

    def reply(self, answer: str, patterns: Sequence[str], name: str, **values: str) -> str:
        """Return one of the patterns, which may hold `{answer}`, as a sentence; else `Yes.`."""
        if self.style != "sentence":
            return words.capital(answer) + "."
        return self.say(patterns, name, answer=answer, **values)


def spelled(text: str) -> str:
    """Return a category's name, or its plural, with the capitals that it has: `TVs`."""
    known: dict[str, str] = words.table("capitals")
    return " ".join(known.get(word, word) for word in text.split(" "))


def several(name: str, count: int) -> str:
    """Return `one dog`, `two dogs`."""
    return spelled(words.several(name, count))
