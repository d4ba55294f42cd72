"""Ratings from verdicts, against scikit-learn and alpaca_eval."""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from vlm_sft.evaluation.judges.ratings import (
    CENTER,
    SCALE,
    Battle,
    bootstrap_ratings,
    bradley_terry,
    elo,
    length_controlled_win_rate,
    unbounded,
    win_matrix,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "scores"


def battles(seed: int, count: int = 400, models: int = 5) -> list[Battle]:
    rng = random.Random(seed)
    strength = [rng.uniform(-1.5, 1.5) for _ in range(models)]
    found = []
    for number in range(count):
        i, j = rng.sample(range(models), 2)
        chance = 1 / (1 + np.exp(strength[j] - strength[i]))
        result = 0.5 if rng.random() < 0.2 else float(rng.random() < chance)
        found.append(Battle(i, j, result, number // 3))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_bradley_terry_is_scikit_learns_logistic_regression(seed: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    played = battles(seed)
    rows, labels, weights = [], [], []
    for battle in played:
        row = np.zeros(5)
        row[battle.first], row[battle.second] = 1, -1
        for label, weight in ((1, battle.result), (0, 1 - battle.result)):
            rows.append(row)
            labels.append(label)
            weights.append(weight)
    model = linear_model.LogisticRegression(
        C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    model.fit(np.array(rows)[:, 1:], labels, sample_weight=weights)
    strength = np.concatenate([[0.0], model.coef_[0]])
    expected = CENTER + SCALE * (strength - strength.mean())
    found = bradley_terry(win_matrix(played, 5))
    assert found == pytest.approx(expected, abs=1e-3)


def test_two_models_differ_by_the_log_odds_of_their_wins() -> None:
    found = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]))
    assert found[0] - found[1] == pytest.approx(400 * np.log10(3), abs=1e-3)
    assert found.mean() == pytest.approx(1000)


def test_models_without_a_finite_rating_are_named() -> None:
    # 0 and 1 beat each other, 2 loses to both, 3 met nobody.
    wins = np.array([[0, 2, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0.0]])
    assert unbounded(wins) == [2, 3]
    assert np.isfinite(bradley_terry(wins)).all()
    assert unbounded(win_matrix(battles(1), 5)) == []


def test_bootstrap_intervals_hold_the_rating_and_are_seeded() -> None:
    played = battles(7)
    found = bootstrap_ratings(played, 5, seed=0, samples=100)
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    rating = bradley_terry(win_matrix(played, 5))
    assert (low < rating).all() and (rating < high).all()
    assert (found == bootstrap_ratings(played, 5, seed=0, samples=100)).all()


def test_elo_orders_the_models_as_bradley_terry_does() -> None:
    played = battles(3, count=1200)
    assert list(np.argsort(elo(played, 5, seed=1))) == list(
        np.argsort(bradley_terry(win_matrix(played, 5)))
    )
    assert elo(played, 5, seed=1).mean() == pytest.approx(1000)


def test_length_controlled_win_rates_are_alpaca_evals() -> None:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("lc", GOLDEN / "length_controlled.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    golden = json.loads((GOLDEN / "length_controlled.json").read_text())
    for case, (win_rate, controlled) in zip(script.CASES, golden, strict=True):
        preferences, ours, theirs = script.comparisons(*case)
        assert 100 * np.mean(preferences) == pytest.approx(win_rate)
        found = length_controlled_win_rate(preferences, ours, theirs)
        assert found is not None and 100 * found == pytest.approx(controlled, abs=1e-6)


def test_length_control_needs_lengths_that_differ() -> None:
    assert length_controlled_win_rate([1.0] * 10, [5] * 10, [5] * 10) is None
    assert length_controlled_win_rate([1.0, 0.0], [5, 6], [7, 9]) is None
