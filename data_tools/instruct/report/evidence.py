"""What a check rests on, and where its claim stands in the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.schema import Check, Sample, Shown, Verdict

SYMBOLS: Final[dict[Verdict, str]] = {"supported": "✓", "contradicted": "✗", "unknown": "?"}
"""A verdict is never told by its colour alone."""

VERDICTS: Final[tuple[Verdict, ...]] = ("supported", "contradicted", "unknown")

_WEIGHT: Final[dict[Verdict, int]] = {"contradicted": 2, "unknown": 1, "supported": 0}


def labels(image: AnnotatedImage | None, shown: Shown) -> dict[int, str]:
    """What each annotation id was called before the teacher: `c2`, `b1 dog`, `#7 cup (...)`."""
    category = {box.id: box.category for box in image.boxes} if image else {}
    names = {number: f"c{i}" for i, number in enumerate(shown.captions, 1)}
    for i, number in enumerate(shown.boxes, 1):
        names[number] = f"b{i} {category.get(number, '')}".rstrip()
    for name, numbers in shown.summarised.items():
        names.update({number: f"#{number} {name} (told as a number)" for number in numbers})
    return names


def evidence(check: Check, names: Mapping[int, str]) -> str:
    """The check's evidence by its labels, `c2, b1 b3 dog`; ids that were not shown as `#id`."""
    groups: dict[str, list[str]] = {}
    for number in check.evidence:
        label, _, category = names.get(number, f"#{number}").partition(" ")
        groups.setdefault(category, []).append(label)
    return ", ".join(" ".join([*found, category]).rstrip() for category, found in groups.items())


def deciding(sample: Sample) -> tuple[Check, ...]:
    """The checks that made the sample what it is: those with a code, else all."""
    rejecting = tuple(check for check in sample.checks if check.code is not None)
    return rejecting if sample.status == "rejected" else sample.checks


def verdict_of(checks: Sequence[Check]) -> Verdict | None:
    """The weightiest verdict among checks; None where there is no check."""
    found = sorted((check.verdict for check in checks), key=_WEIGHT.__getitem__)
    return found[-1] if found else None


@dataclass(frozen=True)
class Piece:
    """A stretch of a text that the same claims cover.

    Attributes:
        covering: Indices of the claims over it.
        opening, closing: Of those, the ones that begin with it, and that end with it.
    """

    text: str
    covering: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


def pieces(text: str, spans: Mapping[int, tuple[int, int]]) -> list[Piece]:
    """`text` cut wherever a claim begins or ends; together the pieces are the text.

    Args:
        text: What the spans are of.
        spans: From and to of each claim by its index; what lies outside the text is left out.
    """
    inside = {
        index: (max(start, 0), min(end, len(text)))
        for index, (start, end) in spans.items()
        if max(start, 0) < min(end, len(text))
    }
    cuts = sorted({0, len(text), *(place for span in inside.values() for place in span)})
    return [
        Piece(
            text[start:end],
            tuple(i for i, (a, b) in inside.items() if a <= start and end <= b),
            tuple(i for i, (a, _) in inside.items() if a == start),
            tuple(i for i, (_, b) in inside.items() if b == end),
        )
        for start, end in pairwise(cuts)
    ]


def spans_of(checks: Sequence[Check], turn: int, part: str) -> dict[int, tuple[int, int]]:
    """The claims that stand in one text of one turn, by their index among `checks`."""
    return {
        index: check.span
        for index, check in enumerate(checks)
        if check.turn == turn and check.part == part and check.span is not None
    }
