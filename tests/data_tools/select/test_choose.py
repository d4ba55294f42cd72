"""Which records are selected, and that every other one has a reason."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from data_tools.select.choose import Table, decide
from data_tools.select.config import SelectConfig
from data_tools.select.diversity import cluster_firsts, farthest_first
from vlm_sft.errors import UserError

nan = float("nan")


def unit(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def table(values: list[float], categories: str = "", **more: Any) -> Table:
    ids = [f"r{n}" for n in range(len(values))]
    names = list(categories) or [""] * len(values)
    problems = more.get("problems", [""] * len(values))
    columns = {"answer_words": np.array(values), **more.get("columns", {})}
    return Table(ids, names, problems, columns, more.get("embeddings"))


def config(**settings: Any) -> SelectConfig:
    return SelectConfig(output_dir="out", path="data.json", **settings)


def test_the_highest_are_taken_and_every_other_record_has_a_reason() -> None:
    ifd = np.array([0.5, 0.9, 1.2, nan, 0.7, 0.8])
    problems = ["", "", "", "", "image_missing", ""]
    found = decide(
        table([1, 2, 3, 4, 5, 6], problems=problems, columns={"ifd": ifd}),
        config(model="m", rank_by="ifd", keep={"ifd": [None, 1]}, size=2),
    )
    assert found.selected.tolist() == [1, 5]
    assert found.reasons == ["rank", "", "ifd too high", "ifd unknown", "image_missing", ""]
    assert len(found.random) == 2 and 4 not in found.random


def test_quotas_are_shares_of_the_usable_records_or_equal_ones() -> None:
    values = [float(n) for n in range(12)]
    categories = "aaaaaaaabbbc"
    for quotas, expected in (
        ("proportional", {"a": 4, "b": 2}),
        ("equal", {"a": 3, "b": 2, "c": 1}),
        ("none", {"a": 2, "b": 3, "c": 1}),
    ):
        found = decide(table(values, categories), config(size=6, quotas=quotas))
        assert Counter(categories[row] for row in found.selected) == expected, quotas


def test_of_similar_records_only_the_first_in_rank_is_taken() -> None:
    found = decide(
        table([3, 9, 5, 1], embeddings=unit(0, 2, 90, 91)),
        config(model="m", merge_similar=0.99, size=4),
    )
    assert found.selected.tolist() == [1, 2]
    assert found.reasons == ["similar to r1", "", "", "similar to r2"]


def test_diverse_records_are_spread() -> None:
    embeddings = unit(0, 1, 2, 90, 91, 180)
    assert farthest_first(embeddings, 3) == [0, 5, 3]
    assert cluster_firsts(embeddings, 6, seed=0) == [0, 1, 2, 3, 4, 5]
    groups = unit(0, 1, 2, 120, 121, 122, 240, 241, 242)
    firsts = {place // 3 for seed in range(5) for place in cluster_firsts(groups, 3, seed=seed)}
    assert firsts == {0, 1, 2}


def test_a_share_in_the_middle_of_a_column_is_kept() -> None:
    loss = np.arange(11, dtype=float)
    found = decide(
        table([1.0] * 11, columns={"loss": loss}),
        config(model="m", middle={"loss": 0.4}, share=1.0),
    )
    assert found.selected.tolist() == [3, 4, 5, 6, 7]
    assert Counter(found.reasons) == {"": 5, "loss too low": 3, "loss too high": 3}


def test_records_without_a_finite_score_are_in_neither_part() -> None:
    inf = float("inf")
    loss = np.array([inf, 3.0, nan, 2.0, -inf, 1.0])
    for seed in range(5):
        found = decide(
            table([1.0] * 6, columns={"loss": loss}),
            config(model="m", rank_by="loss", keep={"loss": [None, 2]}, size=2, seed=seed),
        )
        assert found.selected.tolist() == [3, 5]
        assert found.reasons == [
            "loss infinite", "loss too high", "loss unknown", "", "loss infinite", "",
        ]  # fmt: skip
        assert set(found.random) <= {1, 3, 5} and len(found.random) == 2


def test_presets_are_defaults_and_what_cannot_be_computed_is_refused() -> None:
    chosen = config(preset="ifd", model="m", keep={"ifd": [0.2, 0.9]})
    assert (chosen.rank_by, chosen.keep) == ("ifd", {"ifd": [0.2, 0.9]})
    for settings, message in (
        ({"preset": "ifd"}, "needs `model`"),
        ({"preset": "s1", "model": "m"}, "needs `samples`"),
        ({"rank_by": "weak_loss"}, "weak_model"),
        ({"diversity": "k_center"}, "for embeddings"),
        ({"keep": {"answer_words": [5, 1]}}, "least value 5 is above 1"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            config(**settings)
