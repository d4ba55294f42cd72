"""Which images are asked about, and for which types: functions of the seed and the images' ids."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from data_tools.coco import AnnotatedImage
from data_tools.digests import hashed
from data_tools.instruct.plan.prompts import TYPES
from data_tools.instruct.schema import SampleType


def choose(
    images: Sequence[AnnotatedImage],
    count: int | None,
    how: Literal["random", "balanced"],
    seed: int,
) -> list[AnnotatedImage]:
    """Return the images to ask about, in the order of ids.

    A larger count keeps the images of a smaller one.

    Args:
        images: With annotations, and not refused.
        count: None, or more than there are: all of them.
        how: `random`: all images are equally likely. `balanced`: the categories take turns, the
            rarest first, each with an image of its own until all images are taken; an image counts
            for all of its categories, and images without boxes are a category of their own.
        seed: The run's.
    """
    shuffled = sorted(images, key=lambda image: (hashed(seed, "image", image.id), image.id))
    if how == "balanced" and count is not None and count < len(images):
        shuffled = list(_by_turns(shuffled))
    return sorted(shuffled[:count], key=lambda image: image.id)


def types_of(
    image_id: int, shares: Mapping[SampleType, float], seed: int
) -> Iterator[tuple[SampleType, int]]:
    """Yield the types of samples to ask for an image, each with its number from 0.

    With a share of 1.4 there is one sample, and a second one if the image's own random number is
    below 0.4. So an image's samples do not depend on other images, and a larger share keeps the
    samples of a smaller one.
    """
    for sample_type in TYPES:
        share = shares.get(sample_type, 0.0)
        whole = int(share)
        extra = hashed(seed, "type", image_id, sample_type) / 2**64 < share - whole
        for number in range(whole + extra):
            yield sample_type, number


def _by_turns(images: Sequence[AnnotatedImage]) -> Iterator[AnnotatedImage]:
    """Yield all images; in every round the rarest category chooses first."""
    waiting: dict[str, list[AnnotatedImage]] = {}
    for image in reversed(images):
        for name in image.categories or ("",):
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
                    having.update(image.categories or ("",))
                    yield image
            if not waiting.get(name):
                waiting.pop(name, None)
