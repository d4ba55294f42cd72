"""Which images are asked about, and for what: pure functions of the seed and images' ids."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from data_tools.coco import AnnotatedImage
from data_tools.instruct.plan.prompts import TYPES
from data_tools.instruct.schema import SampleType


def choose(
    images: Sequence[AnnotatedImage],
    count: int | None,
    how: Literal["random", "balanced"],
    seed: int,
) -> list[AnnotatedImage]:
    """The images to ask about, in the order of ids; a larger count keeps a smaller one's.

    Args:
        images: With annotations, and not refused.
        count: None, or more than there are: all of them.
        how: `random`: every image alike. `balanced`: categories take turns, the rarest first,
            each with an image of its own until all images are taken; an image counts for all
            of its categories, and images without boxes are a category of their own.
        seed: The run's.
    """
    if count is None or count >= len(images):
        chosen = list(images)
    elif how == "random":
        chosen = _shuffled(images, seed)[:count]
    else:
        turns = _in_turns(_shuffled(images, seed))
        chosen = [next(turns) for _ in range(count)]
    return sorted(chosen, key=lambda image: image.id)


def types_of(
    image_id: int, shares: Mapping[SampleType, float], seed: int
) -> Iterator[tuple[SampleType, int]]:
    """The samples asked for an image: types with their numbers from 0.

    A share of 1.4 asks once, and twice where the image's own draw is below 0.4: no image's
    samples depend on other images, and a larger share keeps a smaller one's.
    """
    for sample_type in TYPES:
        share = shares.get(sample_type, 0.0)
        whole = int(share)
        extra = draw(seed, "type", image_id, sample_type) < share - whole
        for number in range(whole + extra):
            yield sample_type, number


def draw(seed: int, *what: object) -> float:
    """A number in 0 <= x < 1 that depends on the arguments alone."""
    return integer(seed, *what) / 2**64


def integer(seed: int, *what: object) -> int:
    """A whole number below 2^64 that depends on the arguments alone."""
    text = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shuffled(images: Sequence[AnnotatedImage], seed: int) -> list[AnnotatedImage]:
    return sorted(images, key=lambda image: (integer(seed, "image", image.id), image.id))


def _in_turns(images: Sequence[AnnotatedImage]) -> Iterator[AnnotatedImage]:
    """All images; whenever one more round begins, the rarest category chooses first."""
    waiting: dict[str, list[AnnotatedImage]] = {}
    for image in reversed(images):
        for name in _categories(image):
            waiting.setdefault(name, []).append(image)
    order = sorted(waiting, key=lambda name: (len(waiting[name]), name))
    taken: set[int] = set()
    having: Counter[str] = Counter()
    level = 0
    while waiting:
        level += 1
        for name in order:
            while having[name] < level and waiting.get(name):
                image = waiting[name].pop()
                if image.id not in taken:
                    taken.add(image.id)
                    having.update(_categories(image))
                    yield image
            if not waiting.get(name):
                waiting.pop(name, None)


def _categories(image: AnnotatedImage) -> tuple[str, ...]:
    return image.categories or ("",)
