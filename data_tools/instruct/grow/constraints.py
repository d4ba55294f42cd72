"""Instructions with several constraints at once, each checked by a program.

The constraints have IFEval's names and arguments (arXiv 2311.07911) and are checked by the code
that scores models on IFEval's questions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from data_tools.instruct.schema import Constraint
from vlm_sft.evaluation.scores.constraint_checks import CHECKS, Arguments
from vlm_sft.evaluation.scores.files import Row

Drawn = dict[str, Any] | None


@dataclass(frozen=True)
class Kind:
    """A kind of constraint.

    Attributes:
        text: What the answer must do, with the arguments by name.
        draw: Arguments, from a generator and words of the image; None: the image has no such word.
        excludes: Kinds that cannot hold at the same time, or not for certain.
    """

    text: str
    draw: Callable[[np.random.Generator, Sequence[str]], Drawn] = lambda rng, words: {}
    excludes: tuple[str, ...] = ()


def _words(rng: np.random.Generator, words: Sequence[str]) -> Drawn:
    if rng.random() < 0.5:
        return {"relation": "at most", "num_words": int(rng.integers(6, 13)) * 5}
    return {"relation": "at least", "num_words": int(rng.integers(4, 9)) * 5}


def _a_word(rng: np.random.Generator, words: Sequence[str]) -> Drawn:
    return {"keywords": [words[int(rng.integers(len(words)))]]} if words else None


def _one_of(argument: str, *texts: str) -> Callable[..., Drawn]:
    return lambda rng, words: {argument: texts[int(rng.integers(len(texts)))]}


def _forbidden(rng: np.random.Generator, words: Sequence[str]) -> Drawn:
    known = ("image", "picture", "photo", "scene", "shows", "there", "very", "has")
    first, second = rng.permutation(len(known))[:2]
    return {"forbidden_words": [known[int(first)], known[int(second)]]}


_JSON, _BULLETS = "detectable_format:json_format", "detectable_format:number_bullet_lists"
_SENTENCES, _QUOTED = "length_constraints:number_sentences", "startend:quotation"
_START, _END = "startend:start_checker", "startend:end_checker"
_LOWER, _UPPER = "change_case:english_lowercase", "change_case:english_capital"
_POSTSCRIPT, _COMMA = "detectable_content:postscript", "punctuation:no_comma"

KINDS: Final[Mapping[str, Kind]] = {
    "length_constraints:number_words": Kind("have {relation} {num_words} words", _words, (_JSON,)),
    _SENTENCES: Kind(
        "have exactly {num_sentences} sentences",
        lambda rng, words: {"relation": "exactly", "num_sentences": int(rng.integers(2, 5))},
        (_JSON, _BULLETS, _POSTSCRIPT),
    ),
    _BULLETS: Kind(
        "have exactly {num_bullets} bullet points, lines that begin with '- '",
        lambda rng, words: {"num_bullets": int(rng.integers(2, 5))},
        (_JSON, _SENTENCES, _QUOTED),
    ),
    "keywords:existence": Kind("contain the word {keywords}", _a_word),
    "keywords:forbidden_words": Kind("contain none of the words {forbidden_words}", _forbidden),
    _COMMA: Kind("not contain a comma", excludes=(_JSON,)),
    _LOWER: Kind(
        "be in English and in lower case letters only", excludes=(_UPPER, _POSTSCRIPT, _JSON)
    ),
    _UPPER: Kind("be in English and in capital letters only", excludes=(_LOWER, _JSON)),
    _START: Kind(
        "begin with '{start_phrase}'",
        _one_of("start_phrase", "In short", "At a glance", "To sum up"),
        (_JSON, _QUOTED),
    ),
    _END: Kind(
        "end with '{end_phrase}'",
        _one_of("end_phrase", "That is all.", "Nothing more to add.", "And that is it."),
        (_JSON, _QUOTED, _POSTSCRIPT),
    ),
    _QUOTED: Kind("stand between double quotation marks", excludes=(_JSON, _BULLETS, _START, _END)),
    _JSON: Kind(
        "be one JSON object and nothing else",
        excludes=("length_constraints:number_words", _SENTENCES, _BULLETS, _COMMA, _LOWER, _UPPER,
                  _START, _END, _QUOTED, _POSTSCRIPT),
    ),
    _POSTSCRIPT: Kind(
        "have a postscript that begins with '{postscript_marker}'",
        _one_of("postscript_marker", "P.S."),
        (_JSON, _SENTENCES, _LOWER, _END),
    ),
}  # fmt: skip
"""By IFEval's name."""


def draw(rng: np.random.Generator, number: int, words: Sequence[str]) -> tuple[Constraint, ...]:
    """Return constraints that can hold together, in random order; fewer if no more are left.

    Args:
        rng: The only source of chance.
        number: How many.
        words: Words that an answer about the image can well contain.
    """
    found: list[Constraint] = []
    for position in rng.permutation(len(KINDS)):
        name = list(KINDS)[int(position)]
        kind = KINDS[name]
        clash = any(one.kind in kind.excludes or name in KINDS[one.kind].excludes for one in found)
        arguments = None if clash or len(found) == number else kind.draw(rng, words)
        if arguments is not None:
            found.append(Constraint(kind=name, arguments=arguments))
    return tuple(found)


def describe(constraint: Constraint) -> str:
    """Return the constraint as a sentence."""
    values = {
        name: " or ".join(f"'{text}'" for text in value) if isinstance(value, list) else value
        for name, value in constraint.arguments.items()
    }
    return f"The answer must {KINDS[constraint.kind].text.format(**values)}."


def instruction(base: str, constraints: Sequence[Constraint]) -> str:
    """Return a request for a description, with its constraints."""
    return " ".join([base, *map(describe, constraints)])


def broken(answer: str, constraints: Sequence[Constraint]) -> list[Constraint]:
    """Return the constraints that the answer does not keep to."""
    return [one for one in constraints if not _holds(answer, one)]


def _holds(answer: str, constraint: Constraint) -> bool:
    arguments = Arguments(constraint.kind, constraint.arguments, Row("constraint", {}))
    return CHECKS[constraint.kind](answer, arguments)
