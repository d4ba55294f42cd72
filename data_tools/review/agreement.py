"""Agreement of two reviewers about the samples that both have decided about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_tools.review.decisions import Decision

CHOICES: Final = ("accept", "edit", "reject")
RESAMPLES: Final = 2000


@dataclass(frozen=True)
class Agreement:
    """How two reviewers decided about the same samples.

    Attributes:
        names: The reviewers.
        counts: `[3, 3]`: samples by the first reviewer's choice (rows) and the second's, in the
            order of `CHOICES`.
        kappa: Cohen's kappa; NaN if chance alone would agree always.
        low, high: 95 % interval of kappa, by resampling the samples.
        differing: Id and decisions of the samples about which they differ.
    """

    names: tuple[str, str]
    counts: NDArray[np.int64]
    kappa: float
    low: float
    high: float
    differing: Sequence[tuple[str, Decision, Decision]]

    @property
    def share(self) -> float:
        """The share of samples about which they agree."""
        return float(np.trace(self.counts) / max(1, self.counts.sum()))


def agreements(
    decisions: Mapping[str, Mapping[str, Sequence[Decision]]], *, seed: int = 0
) -> list[Agreement]:
    """Compare every two reviewers by their last decisions about the same id and content.

    Pairs without a common sample are left out.

    Args:
        decisions: By reviewer and id, the last one last.
        seed: Of the resampling.
    """
    found = []
    for one, other in combinations(sorted(decisions), 2):
        pairs = []
        for name in sorted(decisions[one].keys() & decisions[other].keys()):
            first, second = decisions[one][name][-1], decisions[other][name][-1]
            if first.digest == second.digest:
                pairs.append((name, first, second))
        if pairs:
            found.append(_compare((one, other), pairs, seed))
    return found


def _compare(
    names: tuple[str, str], pairs: Sequence[tuple[str, Decision, Decision]], seed: int
) -> Agreement:
    codes = np.array(
        [[CHOICES.index(one.decision) for one in decided] for _, *decided in pairs], np.int64
    )
    cells = codes[:, 0] * len(CHOICES) + codes[:, 1]
    counts = np.bincount(cells, minlength=len(CHOICES) ** 2)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(pairs), counts / len(pairs), size=RESAMPLES)
    kappas = kappa(drawn.reshape(-1, len(CHOICES), len(CHOICES)))
    known = kappas[np.isfinite(kappas)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    table = counts.reshape(len(CHOICES), len(CHOICES))
    differing = [pair for pair in pairs if pair[1].decision != pair[2].decision]
    return Agreement(names, table, float(kappa(table)), float(low), float(high), differing)


def kappa(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return Cohen's kappa (1960) of tables `[..., C, C]`; NaN where chance agrees always."""
    shares = counts / counts.sum(axis=(-2, -1), keepdims=True)
    observed = np.trace(shares, axis1=-2, axis2=-1)
    chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1 - 1e-12, (observed - chance) / (1 - chance), np.nan)
