"""Which pictures are asked about, and for what: pure functions of the seed and pictures' ids."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from data_tools.coco import Picture
from data_tools.instruct.prompting import TYPES
from data_tools.instruct.schema import SampleType


def choose(
    pictures: Sequence[Picture],
    count: int | None,
    how: Literal["random", "balanced"],
    seed: int,
) -> list[Picture]:
    """The pictures to ask about, in the order of ids; a larger count keeps a smaller one's.

    Args:
        pictures: With annotations, and not refused.
        count: None, or more than there are: all of them.
        how: `random`: every picture alike. `balanced`: categories take turns, the rarest first,
            each with a picture of its own until all pictures are taken; a picture counts for all
            of its categories, and pictures without boxes are a category of their own.
        seed: The run's.
    """
    if count is None or count >= len(pictures):
        chosen = list(pictures)
    elif how == "random":
        chosen = _shuffled(pictures, seed)[:count]
    else:
        turns = _in_turns(_shuffled(pictures, seed))
        chosen = [next(turns) for _ in range(count)]
    return sorted(chosen, key=lambda picture: picture.id)


def types_of(
    picture_id: int, shares: Mapping[SampleType, float], seed: int
) -> Iterator[tuple[SampleType, int]]:
    """The samples asked for a picture: types with their numbers from 0.

    A share of 1.4 asks once, and twice where the picture's own draw is below 0.4: no picture's
    samples depend on other pictures, and a larger share keeps a smaller one's.
    """
    for sample_type in TYPES:
        share = shares.get(sample_type, 0.0)
        whole = int(share)
        extra = draw(seed, "type", picture_id, sample_type) < share - whole
        for number in range(whole + extra):
            yield sample_type, number


def draw(seed: int, *what: object) -> float:
    """A number in 0 <= x < 1 that depends on the arguments alone."""
    return integer(seed, *what) / 2**64


def integer(seed: int, *what: object) -> int:
    """A whole number below 2^64 that depends on the arguments alone."""
    text = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shuffled(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    return sorted(pictures, key=lambda picture: (integer(seed, "picture", picture.id), picture.id))


def _in_turns(pictures: Sequence[Picture]) -> Iterator[Picture]:
    """All pictures; whenever one more round begins, the rarest category chooses first."""
    waiting: dict[str, list[Picture]] = {}
    for picture in reversed(pictures):
        for name in _categories(picture):
            waiting.setdefault(name, []).append(picture)
    order = sorted(waiting, key=lambda name: (len(waiting[name]), name))
    taken: set[int] = set()
    having: Counter[str] = Counter()
    level = 0
    while waiting:
        level += 1
        for name in order:
            while having[name] < level and waiting.get(name):
                picture = waiting[name].pop()
                if picture.id not in taken:
                    taken.add(picture.id)
                    having.update(_categories(picture))
                    yield picture
            if not waiting.get(name):
                waiting.pop(name, None)


def _categories(picture: Picture) -> tuple[str, ...]:
    return picture.categories or ("",)
