"""Compute confidence intervals of shares and differences if several questions share an image."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_SAMPLES: Final = 4000
"""Resamples per interval; each 2.5 % tail then has about 100 of them."""

Numbers = NDArray[np.float64]

Statistic = Callable[[Numbers], Numbers]
"""A function from cluster weights `[samples, clusters]` to values `[samples]`."""


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return e.g. `0.912 [0.890, 0.931]`."""
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float | None]:
        """Return plain values for JSON; a bound that is not finite is None."""
        values = {"estimate": self.estimate, "low": self.low, "high": self.high}
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


def cluster_bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    samples: int = BOOTSTRAP_SAMPLES,
) -> Interval:
    """Return the mean of `values` with a percentile interval over resampled clusters.

    Whole clusters (images) are drawn with replacement and the ratio of sums is computed, so values
    of one image may depend on each other. With fewer than about 30 clusters the interval is
    slightly too narrow. For equal values or a single cluster see `interval_of_shares`.

    Args:
        values: One value per observation.
        clusters: The cluster of each observation.
        seed: Seed of the resampling.
        confidence: Coverage in (0, 1).
        samples: Number of resamples.

    Raises:
        ValueError: There are no values, or the lengths differ.
    """
    ones = [1.0] * len(values)
    return cluster_bootstrap_ratio(
        values, ones, clusters, seed=seed, confidence=confidence, samples=samples
    )


def cluster_bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    samples: int = BOOTSTRAP_SAMPLES,
) -> Interval:
    """Return the ratio of two sums, e.g. loss per token, with an interval as above."""
    if not len(numerators) == len(denominators) == len(clusters):
        raise ValueError("numerators, denominators and clusters must have the same length")
    sums = _cluster_sums(clusters, [numerators, denominators])
    above, below = sums[:, 0], sums[:, 1]

    def ratio(weights: Numbers) -> Numbers:
        return np.asarray((weights @ above) / (weights @ below), dtype=np.float64)

    return _percentiles(ratio, len(sums), seed, confidence, samples)


def balanced_accuracy_interval(
    correct: Sequence[bool],
    truths: Sequence[str],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    samples: int = BOOTSTRAP_SAMPLES,
) -> Interval:
    """Return the mean over the true answers of the share that is answered correctly.

    Chance is 1 / number of answers. In a resample in which an answer does not occur, the mean is
    over the others.
    """
    names = sorted(set(truths))
    columns: list[Sequence[float]] = []
    for name in names:
        columns.append([float(c and t == name) for c, t in zip(correct, truths, strict=True)])
        columns.append([float(t == name) for t in truths])
    sums = _cluster_sums(clusters, columns)

    def balanced(weights: Numbers) -> Numbers:
        right, asked = weights @ sums[:, 0::2], weights @ sums[:, 1::2]
        shares = np.divide(right, asked, out=np.full_like(right, np.nan), where=asked > 0)
        return np.asarray(np.nanmean(shares, axis=1), dtype=np.float64)

    return _percentiles(balanced, len(sums), seed, confidence, samples)


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a share (Wilson 1927), for independent trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials is not a share")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    half /= 1 + z * z / trials
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == trials else middle + half
    return Interval(share, low, high)


def interval_of_shares(
    correct: Sequence[bool],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """Return the share of true values with a clustered interval.

    If all values are equal, a bootstrap interval has no width, which would claim certainty. Then
    the interval is Wilson's with the number of images as the number of trials, which is
    conservative.
    """
    if not correct:
        raise ValueError("no values: an interval needs at least one")
    if all(correct) or not any(correct):
        trials = len(set(clusters))
        return wilson_interval(trials if correct[0] else 0, trials, confidence=confidence)
    values = [float(value) for value in correct]
    return cluster_bootstrap_interval(values, clusters, seed=seed, confidence=confidence)


def interval_of_differences(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """Return the mean of paired differences, each from -1 to 1, with a clustered interval.

    If all are equal, a bootstrap interval has no width. Then the bounds are those of Wilson's
    interval of the share of clusters that could have differed.
    """
    if not differences:
        raise ValueError("no values: an interval needs at least one")
    first = differences[0]
    if any(value != first for value in differences):
        return cluster_bootstrap_interval(differences, clusters, seed=seed, confidence=confidence)
    trials = len(set(clusters))
    room = wilson_interval(0, trials, confidence=confidence).high
    return Interval(first, max(-1.0, first - 2 * room), min(1.0, first + 2 * room))


def _cluster_sums(clusters: Sequence[Hashable], columns: Sequence[Sequence[float]]) -> Numbers:
    """Return the sum of each column within each cluster, `[clusters, columns]`."""
    if not clusters:
        raise ValueError("no values: an interval needs at least one")
    if any(len(column) != len(clusters) for column in columns):
        raise ValueError("every value needs a cluster")
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    rows = np.array([index[name] for name in clusters])
    sums = np.zeros((len(index), len(columns)))
    np.add.at(sums, rows, np.array(columns, dtype=np.float64).T)
    return sums


def _percentiles(
    statistic: Statistic, num_clusters: int, seed: int, confidence: float, samples: int
) -> Interval:
    estimate = float(statistic(np.ones((1, num_clusters)))[0])
    generator = np.random.default_rng(seed)
    chance = np.full(num_clusters, 1 / num_clusters)
    found: list[Numbers] = []
    block = max(1, 2_000_000 // num_clusters)  # limits the memory of the weights to 16 MB
    for start in range(0, samples, block):
        count = min(block, samples - start)
        weights = generator.multinomial(num_clusters, chance, size=count).astype(np.float64)
        found.append(statistic(weights))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))
