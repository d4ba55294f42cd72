"""Which turns and samples go so that no answer, opening, type or category outweighs the others."""

import math

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]


def level(
    coarse: Ints,
    fine: Ints,
    values: Ints,
    num_values: int,
    *,
    order: NDArray[np.uint64],
    free: Mask,
    ratio: float,
    slack: int,
) -> Mask:
    """Turns to set aside so that no answer of a coarse group outweighs its rarest.

    An answer is allowed `ratio` times the rarest one's count plus `slack`. What goes is taken, in
    the order of `order`, where the answer is in excess in its fine group too, so that levelling the
    whole does not tilt its parts.

    Args:
        coarse: The group to be levelled that each turn belongs to, numbers from 0.
        fine: A group within it.
        values: The turn's answer, below `num_values`.
        num_values: How many answers there are.
        order: Random numbers; the smallest go first.
        free: Turns that may go.
        ratio: At least 1.
        slack: Turns.
    """
    surplus = _surplus(coarse, values, num_values, ratio, slack)
    excess = _surplus(fine, values, num_values, 1.0, 0)
    rank = _rank(fine * num_values + values, order, free)
    candidates = free & (rank < excess[fine, values])
    rank = _rank(coarse * num_values + values, order, candidates)
    return candidates & (rank < surplus[coarse, values])


def over_cap(
    keys: Ints, limits: Ints, *, order: NDArray[np.uint64], free: Mask | None = None
) -> Mask:
    """Of every key's members, those beyond its limit, in the order of `order`."""
    free = np.ones(len(keys), np.bool_) if free is None else free
    counts = np.bincount(keys, minlength=len(limits))
    return free & (_rank(keys, order, free) < (counts - limits)[keys])


def share_limit(counts: Ints, share: float, *, least: int, max_loss: float) -> int:
    """The count that no member may exceed so that none has more than `share` of what is left.

    At least `least`. Where even equal counts have a larger share (fewer than 1 / share members), or
    more than `max_loss` of all would go, it is the largest count: nothing is cut.
    """
    limit = max(_highest(counts, share), least)
    lost = int(np.maximum(counts - limit, 0).sum())
    return limit if lost <= max_loss * int(counts.sum()) else int(counts.max())


def _highest(counts: Ints, share: float) -> int:
    """With every count cut to L, the total is sum(min(count, L)), and L may be `share` of that."""
    ascending = np.sort(counts)
    below = np.concatenate([[0], np.cumsum(ascending)])
    if len(counts) * share < 1:
        return int(ascending[-1])
    for place in range(len(counts) - 1, -1, -1):
        cut = len(counts) - place
        rest = 1 - share * cut
        limit = math.inf if rest <= 0 else share * float(below[place]) / rest
        limit = min(limit, float(ascending[place]))
        if place == 0 or limit >= ascending[place - 1]:
            return int(limit + 1e-9)
    raise AssertionError("cutting all counts to 0 always keeps the share")


def in_proportion(counts: Ints, shares: NDArray[np.float64]) -> Ints:
    """The most of each that has these proportions, none above its count."""
    wanted = shares / shares.sum()
    total = min(
        (count / part for count, part in zip(counts, wanted, strict=True) if part > 0), default=0
    )
    return np.minimum(counts, np.floor(wanted * total + 1e-9).astype(np.int64))


def by_rarest_category(categories: list[tuple[int, ...]], order: Ints, cap: int) -> Mask:
    """Samples that some category brings in: each its first `cap` in the order of `order`.

    A rare category brings in all it has, a frequent one no more than the cap beside what others
    bring (LLaVA's choice of captions by noun phrases). Samples without a category all stay.
    """
    members: dict[int, list[int]] = {}
    taken = np.array([not found for found in categories], np.bool_)
    for place in order:
        for category in categories[place]:
            members.setdefault(category, []).append(int(place))
    for places in members.values():
        taken[places[:cap]] = True
    return taken


def _surplus(groups: Ints, values: Ints, num_values: int, ratio: float, slack: int) -> Ints:
    """How many of each answer are too many `[groups, values]`."""
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    counts = np.bincount(groups * num_values + values, minlength=num_groups * num_values)
    counts = counts.reshape(num_groups, num_values)
    allowed = np.floor(counts.min(axis=1, keepdims=True) * ratio).astype(np.int64) + slack
    return np.maximum(counts - allowed, 0)


def _rank(keys: Ints, order: NDArray[np.uint64], among: Mask) -> Ints:
    """Each member's place by `order` among those of its key; beyond all counts for the others."""
    places = np.flatnonzero(among)
    rank = np.full(len(keys), np.iinfo(np.int64).max)
    sorting = np.lexsort((order[places], keys[places]))
    ordered = keys[places][sorting]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(starts, len(ordered)))
    rank[places[sorting]] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return rank
