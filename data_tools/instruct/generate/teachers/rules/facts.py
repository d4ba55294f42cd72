"""What is certain of an image, among what was shown, and the labels that say so."""

from collections.abc import Sequence
from typing import Final

from data_tools.backends.rules.counting import MOST
from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.schema import Shown

GAP: Final = 0.02
"""Share of the width that must lie between two objects to call one left of the other."""
APART: Final = 0.15
"""Share of the width that must lie between their middles."""

BUNCHES: Final = frozenset(("apple", "banana", "book", "broccoli", "carrot", "orange"))
"""A box of these may hold several: COCO's annotators drew bunches and rows as one."""


class Facts:
    """One image, with the labels `c1`, `b1`, ... of what a request shows of it.

    Attributes:
        image: The annotations.
        boxes: Label of every box shown, by annotation id.
        captions: Label and text of every caption shown.
    """

    def __init__(self, image: AnnotatedImage, shown: Shown) -> None:
        self.image = image
        self.boxes = {number: f"b{i}" for i, number in enumerate(shown.boxes, 1)}
        texts = dict(zip(image.caption_ids, image.captions, strict=True))
        self.captions = [(f"c{i}", texts[number]) for i, number in enumerate(shown.captions, 1)]
        self._summarised = frozenset(shown.summarised)

    @property
    def present(self) -> list[str]:
        """Categories of which at least one object was shown, in the file's order."""
        return [
            name
            for name in self.image.categories
            if any(box.id in self.boxes and not box.crowd for box in self.image.of(name))
        ]

    def labels(self, *names: str) -> tuple[str, ...]:
        """Of all boxes shown of these categories."""
        return tuple(
            self.boxes[box.id]
            for name in names
            for box in self.image.of(name)
            if box.id in self.boxes
        )

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of objects, where each was drawn and shown by itself, and they are not too many.

        In the file's order.
        """
        found = {}
        for name in self.present:
            boxes = self.image.of(name)
            every = all(box.id in self.boxes and not box.crowd for box in boxes)
            summarised = name in self._summarised
            if every and not summarised and len(boxes) <= MOST and name not in BUNCHES:
                found[name] = len(boxes)
        return found

    @property
    def single(self) -> list[Box]:
        """Boxes that are the only one of their category, so that `the dog` means one thing."""
        return [box for name, n in self.counts.items() if n == 1 for box in self.image.of(name)]

    def left_of(self, one: Box, other: Box) -> bool:
        """Whether one lies wholly and clearly to the left of the other."""
        width = self.image.width
        middles = (other.left + other.right - one.left - one.right) / 2
        return one.right + GAP * width <= other.left and middles > APART * width

    @property
    def pairs(self) -> list[tuple[Box, Box]]:
        """Left and right of each other, among single objects."""
        single: Sequence[Box] = self.single
        return [(a, b) for a in single for b in single if self.left_of(a, b)]

    @property
    def chains(self) -> list[tuple[Box, Box, Box]]:
        """Three single objects, each left of the next."""
        pairs = self.pairs
        return [(a, b, c) for a, b in pairs for other, c in pairs if other is b]

    @property
    def halves(self) -> list[tuple[Box, str]]:
        """Single objects with the half that they lie in: `left`, `right`, `top`, `bottom`."""
        found = []
        for box in self.single:
            for start, end, length, first, second in (
                (box.left, box.right, self.image.width, "left", "right"),
                (box.top, box.bottom, self.image.height, "top", "bottom"),
            ):
                if end <= (0.5 - GAP) * length:
                    found.append((box, first))
                elif start >= (0.5 + GAP) * length:
                    found.append((box, second))
        return found
