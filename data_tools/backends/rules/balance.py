"""Equal numbers of every answer, so that guessing the commonest one gains nothing."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from data_tools.records import Exchange

LEAST_SHARE: Final = 0.02
"""Answers rarer than this share of a kind are left out: they would shrink all others to nothing."""


def level(
    found: Mapping[int, Sequence[Exchange]], per_image: int, rng: np.random.Generator
) -> dict[int, list[Exchange]]:
    """Choose among the exchanges so that, within a kind, all answers are equally many.

    Args:
        found: Candidates by image id.
        per_image: At most this many of an image are kept.
        rng: Decides which are kept.
    """
    places: dict[str, dict[str, list[tuple[int, Exchange]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for image_id, exchanges in found.items():
        for i in rng.permutation(len(exchanges))[:per_image]:
            places[exchanges[i].kind][exchanges[i].answer].append((image_id, exchanges[i]))
    chosen: dict[int, list[Exchange]] = {image_id: [] for image_id in found}
    for answers in places.values():
        total = sum(len(group) for group in answers.values())
        kept = [group for group in answers.values() if len(group) >= LEAST_SHARE * total]
        if len(kept) < 2:  # whoever gives the only answer is always right: nothing is measured
            continue
        quota = min(len(group) for group in kept)
        for group in kept:
            for i in sorted(rng.permutation(len(group))[:quota]):
                image_id, exchange = group[i]
                chosen[image_id].append(exchange)
    return chosen
