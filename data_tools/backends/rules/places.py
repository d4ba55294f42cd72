"""Where? Halves of the image and left or right of another thing, both with a margin."""

from typing import Final

from data_tools import wording
from data_tools.backends.rules.phrases import Speaker
from data_tools.coco import AnnotatedImage, Box
from data_tools.records import Exchange

MARGIN: Final = 0.02
"""Share of the side that must lie between an object and the middle, or between two objects."""


def halves(image: AnnotatedImage, speaker: Speaker) -> list[Exchange]:
    """Left or right, top or bottom half, of single objects that do not reach the middle."""
    exchanges = []
    for box in _single(image):
        sides = (
            ("horizontal_half", _side(box.left, box.right, image.width, "left", "right")),
            ("vertical_half", _side(box.top, box.bottom, image.height, "top", "bottom")),
        )
        for pattern, answer in sides:
            if answer is None:
                continue
            texts = wording.load("questions")[pattern]
            exchanges.append(
                Exchange(
                    family="halves",
                    question=speaker.say(texts["questions"], box.category),
                    reply=speaker.reply(answer, texts["sentence"], box.category),
                    answer=answer,
                    category=box.category,
                    kind=pattern,
                )
            )
    return exchanges


def relations(image: AnnotatedImage, speaker: Speaker) -> list[Exchange]:
    """Left or right of each other, for pairs of single objects with room between them.

    A pair is asked once, from a side drawn at random.
    """
    texts = wording.load("questions")["relation"]
    single = _single(image)
    exchanges = []
    for left in single:
        for right in single:
            if left.right + MARGIN * image.width > right.left:
                continue
            asked_left = bool(speaker.rng.random() < 0.5)
            one, other = (left, right) if asked_left else (right, left)
            answer = "left" if asked_left else "right"
            values = {"other": other.category}
            exchanges.append(
                Exchange(
                    family="relation",
                    question=speaker.say(texts["questions"], one.category, **values),
                    reply=speaker.reply(answer, texts["sentence"], one.category, **values),
                    answer=answer,
                    category=one.category,
                    kind="relation",
                )
            )
    return exchanges


def _single(image: AnnotatedImage) -> list[Box]:
    """Boxes that are the only one of their category, so that `the dog` means one thing."""
    return [box for box in image.boxes if not box.crowd and len(image.of(box.category)) == 1]


def _side(start: float, end: float, length: int, first: str, second: str) -> str | None:
    middle, margin = length / 2, MARGIN * length
    if end <= middle - margin:
        return first
    return second if start >= middle + margin else None
