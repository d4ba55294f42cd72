"""Intervals have their nominal coverage on simulated images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft.evaluation.intervals import (
    balanced_accuracy_interval,
    cluster_bootstrap_interval,
    cluster_bootstrap_ratio,
    interval_of_shares,
    wilson_interval,
)


def test_the_clustered_interval_covers_the_truth_with_about_its_confidence() -> None:
    generator = np.random.default_rng(0)
    clusters = [image for image in range(80) for _ in range(5)]
    covered = covered_naive = 0
    for trial in range(200):
        # Answers of one image go together: each image has its own chance of a right answer.
        chances = generator.beta(0.7, 0.3, size=80)  # mean 0.7
        values = (generator.random(400) < np.repeat(chances, 5)).astype(float)
        found = cluster_bootstrap_interval(list(values), clusters, seed=trial, samples=400)
        covered += found.low <= 0.7 <= found.high
        naive = wilson_interval(int(values.sum()), 400)
        covered_naive += naive.low <= 0.7 <= naive.high
    assert 180 <= covered <= 199
    assert covered_naive < 160, "an interval that ignores images is too narrow here"


def test_wilson_gives_the_textbook_interval() -> None:
    found = wilson_interval(45, 50)
    assert (found.estimate, round(found.low, 4), round(found.high, 4)) == (0.9, 0.7864, 0.9565)


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_holds_its_estimate_inside_zero_and_one(successes: int, more: int) -> None:
    found = wilson_interval(successes, successes + more)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_all_right_is_not_certainty() -> None:
    found = interval_of_shares([True] * 40, [i // 2 for i in range(40)], seed=0)
    assert (found.estimate, found.high) == (1.0, 1.0)
    assert 0.8 < found.low < 0.9  # Wilson over 20 images


def test_a_seed_gives_the_same_interval_again() -> None:
    values, clusters = [0.0, 1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "c", "d"]
    first = cluster_bootstrap_interval(values, clusters, seed=3)
    assert first == cluster_bootstrap_interval(values, clusters, seed=3)
    assert first.estimate == pytest.approx(0.6)


def test_the_ratio_weighs_tokens_not_records() -> None:
    found = cluster_bootstrap_ratio([10.0, 1.0], [10.0, 1.0], ["a", "b"], seed=0)
    assert (found.estimate, found.low, found.high) == (1.0, 1.0, 1.0)
    assert cluster_bootstrap_ratio([30.0, 1.0], [10.0, 1.0], [0, 1], seed=0).estimate == 31 / 11


def test_balanced_accuracy_of_always_yes_is_one_half() -> None:
    truths = ["yes"] * 30 + ["no"] * 10
    correct = [truth == "yes" for truth in truths]
    found = balanced_accuracy_interval(correct, truths, list(range(40)), seed=0)
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        cluster_bootstrap_interval([], [], seed=0)
