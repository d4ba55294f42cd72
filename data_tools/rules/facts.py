"""What is certain of an image, among what is shown of it, and the labels of its evidence."""

import re
from functools import cached_property
from typing import Final

from data_tools import wording
from data_tools.coco import AnnotatedImage, Box
from data_tools.geometry import Region, order, region
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.plan.context import describe
from data_tools.instruct.schema import Shown
from vlm_sft.utils import words

LIMITS: Final = VerifyConfig()
"""The verifier's defaults; what is written keeps to the same margins and numbers."""

_MIRROR: Final = re.compile(r"\b(?:mirror|reflect)", re.IGNORECASE)


class Facts:
    """One image, with the labels `c1`, `b1`, ... of what is shown of it.

    Small boxes, and those beyond a number, are shown as a count only (`Shown.summarised`): nothing
    is said of them.

    Args:
        image: The annotations.
        shown: Which of them a request shows; None: as a request with the default settings.
    """

    def __init__(self, image: AnnotatedImage, shown: Shown | None = None) -> None:
        self.image = image
        self.shown = shown = describe(image).shown if shown is None else shown
        self._labels = {number: f"b{i}" for i, number in enumerate(shown.boxes, 1)}
        texts = dict(zip(image.caption_ids, image.captions, strict=True))
        self.captions = [(f"c{i}", texts[number]) for i, number in enumerate(shown.captions, 1)]

    def labels(self, *names: str) -> tuple[str, ...]:
        """Return the labels of all shown boxes of these categories."""
        boxes = (box for name in names for box in self.image.of(name))
        return tuple(self._labels[box.id] for box in boxes if box.id in self._labels)

    @cached_property
    def present(self) -> list[str]:
        """Categories with a shown box, in the file's order."""
        return [name for name in self.image.categories if self.labels(name)]

    @cached_property
    def largest(self) -> list[str]:
        """The same, the category that covers the largest area first."""

        def area(name: str) -> float:
            return sum(box.width * box.height for box in self.image.of(name))

        return sorted(sorted(self.present), key=area, reverse=True)

    def is_absent(self, name: str) -> bool:
        """Return whether an image with boxes has none of the category, and no caption names it."""
        return (
            bool(self.image.boxes)
            and name not in self.image.categories
            and not any(words.mentions(caption, name) for caption in self.image.captions)
        )

    @cached_property
    def counts(self) -> dict[str, int]:
        """Numbers of objects, where each has its own box and is shown, and they are not too many.

        What COCO boxes in bunches is counted only where a caption gives the same number. What has
        another number in a caption, or may be a reflection, is not counted.
        """
        bunches = wording.load("claims")["bunches"]
        found = {}
        for name in self.present:
            boxes = self.image.of(name)
            count = len(boxes)
            single = all(box.id in self._labels and not box.crowd for box in boxes)
            if not single or count > LIMITS.countable or (count > 1 and self._has_mirror):
                continue
            same = words.counted(name, count), words.several(name, count)
            if name in bunches and not self._captions_have(*same):
                continue
            others = (words.several(name, n) for n in range(2, 13) if n != count)
            if not self._captions_have(*others):
                found[name] = count
        return found

    def is_several(self, name: str) -> bool:
        """Return whether there is more than one of the category, whatever their number."""
        boxes = self.image.of(name)
        return not self._has_mirror and (len(boxes) > 1 or any(box.crowd for box in boxes))

    @cached_property
    def _has_mirror(self) -> bool:
        return any(_MIRROR.search(caption) for caption in self.image.captions)

    def _captions_have(self, *phrases: str) -> bool:
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)
        return any(pattern.search(caption) for caption in self.image.captions)

    @cached_property
    def single(self) -> list[Box]:
        """Boxes that are the only one of their category, so that `the dog` means one object."""
        return [box for name, n in self.counts.items() if n == 1 for box in self.image.of(name)]

    @cached_property
    def halves(self) -> list[tuple[Box, Region]]:
        """Single objects with each half that they certainly lie in."""
        sides: tuple[Region, ...] = ("left", "right", "top", "bottom")
        return [
            (box, side)
            for box in self.single
            for side in sides
            if region(box, side, self.image) == "supported"
        ]

    @cached_property
    def pairs(self) -> list[tuple[Box, Box]]:
        """Single objects of which the first is certainly to the left of the second."""
        return [
            (one, other)
            for one in self.single
            for other in self.single
            if one is not other and order(one, other, "left", self.image) == "supported"
        ]

    @cached_property
    def chains(self) -> list[tuple[Box, Box, Box]]:
        """Three single objects, each to the left of the next."""
        return [(a, b, c) for a, b in self.pairs for other, c in self.pairs if other is b]
