"""Filling the wording's patterns with names, articles and plurals."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from data_tools import words
from data_tools.coco import AnnotatedImage
from data_tools.records import AnswerStyle

MOST_NAMED: Final = 6
"""Categories named in a list of things, at most; more would be a catalogue."""


def things(image: AnnotatedImage, asked: str = "") -> str:
    """`a cat and a boat`: the image's categories, the one with the largest area first.

    Numbers are left to the counting questions. `asked` is named whenever it is there.
    """
    areas = {
        name: sum(box.width * box.height for box in image.of(name))
        for name in sorted(image.categories)
    }
    largest = sorted(areas, key=lambda name: -areas[name])
    named = largest[:MOST_NAMED]
    if asked in areas and asked not in named:
        named[-1] = asked
    return words.listed([words.counted(name, 1) for name in named])


class Speaker:
    """Chooses among wordings by one generator and answers in one style."""

    def __init__(self, rng: np.random.Generator, answers: AnswerStyle) -> None:
        self.rng = rng
        self.style = answers

    def pick(self, texts: Sequence[str]) -> str:
        """One of the texts."""
        return texts[int(self.rng.integers(len(texts)))]

    def say(self, texts: Sequence[str], name: str, **values: str) -> str:
        """Return one of the patterns, filled in with the forms of the name and `values`.

        The forms are `{name}`, `{names}`, `{one}`, `{a}`, `{any}`, and the verbs `{be}` (behind
        `the NAME`) and `{be_one}` (before `{a}`), with a capital letter as `{Be}`, `{Be_one}`.
        """
        be, be_one, article = words.be(name), words.be_one(name), words.article(name)
        forms = {
            "name": name, "names": words.plural(name), "one": words.single(name), "a": article,
            "any": "any" if article == "some" else article, "be": be, "be_one": be_one,
            "Be": words.capital(be), "Be_one": words.capital(be_one),
        }  # fmt: skip
        return self.pick(texts).format(**forms, **values)

    def reply(self, answer: str, texts: Sequence[str], name: str, **values: str) -> str:
        """One of `texts`, which may hold `{answer}` too, in the sentence style; else `Yes.`."""
        if self.style != "sentence":
            return words.capital(answer) + "."
        return self.say(texts, name, answer=answer, **values)
