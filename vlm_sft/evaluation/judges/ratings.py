"""Turn verdicts about pairs of answers into win rates and ratings."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlm_sft.utils.libraries import import_extra

SCALE: Final = 400.0 / np.log(10.0)
"""Rating points per unit of log odds: 400 points are odds of 10 to 1."""
CENTER: Final = 1000.0
"""Mean of all ratings."""
_RIDGE: Final = 1e-6
"""Keeps ratings finite if a model wins or loses everything; otherwise without visible effect."""
_ELO_STEP: Final = 4.0
_ELO_ORDERS: Final = 20
_FOLDS: Final = 5

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Battle:
    """One question answered by two models.

    Attributes:
        first: Number of a model.
        second: Number of another.
        result: Share of the win that `first` gets: 1, 0.5 (tie), 0, or between.
        cluster: What the intervals resample: the image or the question.
    """

    first: int
    second: int
    result: float
    cluster: Hashable


def bradley_terry(wins: Numbers) -> Numbers:
    """Return ratings by maximum likelihood (Bradley and Terry 1952), by Newton's method.

    Args:
        wins: `wins[..., i, j]` is how often model i won against j; a tie is half a win for both.

    Returns:
        Ratings `[..., models]` with the mean `CENTER`, 400 points per factor of 10 in odds.
    """
    count = wins.shape[-1]
    games = wins + np.swapaxes(wins, -1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(100):
        chance = 1 / (1 + np.exp(strength[..., None, :] - strength[..., :, None]))
        gradient = (wins - games * chance).sum(axis=-1) - _RIDGE * strength
        weights = games * chance * (1 - chance)
        # Strengths have one free constant; adding ones fixes it at a mean of zero.
        hessian = (weights.sum(axis=-1)[..., None] + _RIDGE) * np.eye(count) - weights + 1.0
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        strength += np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-9:
            break
    centered = strength - strength.mean(axis=-1, keepdims=True)
    return np.asarray(CENTER + SCALE * centered, dtype=np.float64)


def elo(battles: Sequence[Battle], count: int, *, seed: int) -> Numbers:
    """Return Elo ratings (K = 4), averaged over random orders, which Elo depends on."""
    generator = np.random.default_rng(seed)
    total = np.zeros(count)
    for _ in range(_ELO_ORDERS):
        rating = [CENTER] * count
        for number in generator.permutation(len(battles)):
            battle = battles[number]
            gap = (rating[battle.second] - rating[battle.first]) / 400.0
            change = _ELO_STEP * (battle.result - 1 / (1 + 10.0**gap))
            rating[battle.first] += change
            rating[battle.second] -= change
        total += rating
    return np.asarray(total / _ELO_ORDERS, dtype=np.float64)


def win_matrix(battles: Sequence[Battle], count: int) -> Numbers:
    """Return how often each model won against each other one."""
    wins = np.zeros((count, count))
    for battle in battles:
        wins[battle.first, battle.second] += battle.result
        wins[battle.second, battle.first] += 1 - battle.result
    return wins


def bootstrap_ratings(
    battles: Sequence[Battle], count: int, *, seed: int, samples: int = 500
) -> Numbers:
    """Return Bradley-Terry ratings `[samples, models]` of battles with resampled clusters."""
    clusters = list(dict.fromkeys(battle.cluster for battle in battles))
    number = {cluster: n for n, cluster in enumerate(clusters)}
    wins = np.zeros((len(clusters), count, count))
    for battle in battles:
        wins[number[battle.cluster], battle.first, battle.second] += battle.result
        wins[number[battle.cluster], battle.second, battle.first] += 1 - battle.result
    generator = np.random.default_rng(seed)
    chance = np.full(len(clusters), 1 / len(clusters))
    weights = generator.multinomial(len(clusters), chance, size=samples).astype(np.float64)
    return bradley_terry(np.tensordot(weights, wins, axes=1))


def unbounded(wins: Numbers) -> list[int]:
    """Return the models whose rating has no finite best value.

    Ratings are finite if every model can be reached from every other one over wins, in both
    directions. A model that only wins, only loses, or met none of the others cannot.
    """
    reached = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins)):
        reached = (reached.astype(float) @ reached.astype(float)) > 0
    mutual = reached & reached.T
    largest = max(mutual.sum(axis=1))
    group = next(row for row in mutual if row.sum() == largest)
    return [number for number in range(len(wins)) if not group[number]]


def length_controlled_win_rate(
    preferences: Sequence[float], lengths: Sequence[int], baseline_lengths: Sequence[int]
) -> float | None:
    """Return the win rate that a model would have if its answers were as long as the baseline's.

    This is the form `length_controlled_minimal` of AlpacaEval (arXiv 2404.04475): a logistic
    regression of the preference on tanh of the standardized difference of lengths and a constant,
    with an L1 penalty chosen by 5-fold cross-validation. AlpacaEval's full form also uses the
    difficulty of its own 805 instructions.

    Args:
        preferences: 0 (the baseline is better) to 1, by question.
        lengths: Characters of the model's answers.
        baseline_lengths: Characters of the baseline's answers.

    Returns:
        The win rate from 0 to 1; None for fewer than five questions or equal differences.

    Raises:
        UserError: scikit-learn is not installed.
    """
    difference = np.array(baseline_lengths, float) - np.array(lengths, float)
    if len(preferences) < _FOLDS or not difference.std():
        return None
    sklearn: Any = import_extra("sklearn", "scores")
    linear_model: Any = import_extra("sklearn.linear_model", "scores")
    metrics: Any = import_extra("sklearn.metrics", "scores")
    model_selection: Any = import_extra("sklearn.model_selection", "scores")
    features = np.stack([np.tanh(difference / difference.std(ddof=1)), np.ones(len(difference))], 1)
    # Each question stands twice, as a win and as a loss, weighted by the preference.
    weights = np.concatenate([preferences, 1 - np.array(preferences, float)])
    labels = np.repeat([1, 0], len(preferences))
    groups = np.tile(np.arange(len(preferences)), 2)
    with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about its own future versions
        scorer = metrics.make_scorer(
            _loss, response_method="predict_proba", greater_is_better=False
        ).set_score_request(preference=True)
        model = linear_model.LogisticRegressionCV(
            cv=model_selection.GroupKFold(_FOLDS), scoring=scorer, l1_ratios=(1.0,),
            solver="liblinear", fit_intercept=False, random_state=123,
        ).set_fit_request(sample_weight=True)  # fmt: skip
        model.fit(
            np.concatenate([features, features]), labels,
            sample_weight=weights, groups=groups, preference=weights,
        )  # fmt: skip
        return float(model.predict_proba(np.array([[0.0, 1.0]]))[0, 1])


def _loss(truth: Numbers, chance: Numbers, preference: Numbers) -> float:
    """Return the cross-entropy with the preferences; a row that is a loss has the opposite one."""
    wanted = np.where(truth == 1, preference, 1 - preference)
    chance = np.clip(chance, 1e-15, 1 - 1e-15)
    return float(-np.mean(wanted * np.log(chance) + (1 - wanted) * np.log(1 - chance)))
