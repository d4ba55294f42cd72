"""A suite is evaluated during training, and the best checkpoint is kept."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_runs import ROOT, rows, run
from tests.train.tiny import in_processes
from vlm_sft.errors import UserError
from vlm_sft.train.validation import BestEvaluation


@pytest.fixture
def small_suite(suite_tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"tasks": suite_tree["tasks"][:1]}))
    return path


def train(out: Path, *overrides: str) -> int:
    with contextlib.chdir(ROOT):
        return run("stage1", out, "data.template=chatml", "train.eval_samples=0", *overrides)


def test_a_suite_changes_no_loss_and_its_best_checkpoint_is_kept(
    small_suite: Path, tmp_path: Path
) -> None:
    assert train(tmp_path / "plain") == 0
    watched = [f"train.eval_suite={small_suite}", "train.eval_every_steps=1"]
    watched += ["train.keep_best=exists.accuracy", "train.early_stopping=2"]
    assert train(tmp_path / "run", *watched) == 0
    found = rows(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in found if "loss" in row]
    plain = [row for row in rows(tmp_path / "plain" / "metrics.jsonl") if "loss" in row]
    assert [row["loss"] for row in steps] == [row["loss"] for row in plain][: len(steps)]

    evaluated = [row for row in found if "eval_suite" in row]
    values = [row["eval_suite"]["exists.accuracy"] for row in evaluated]
    assert {"exists.f1", "exists.blank.accuracy", "exists.looks"} <= evaluated[0][
        "eval_suite"
    ].keys()
    best = json.loads((tmp_path / "run" / "best" / "manifest.json").read_text())["step"]
    assert best == evaluated[values.index(max(values))]["step"]
    # It ends early if the accuracy has not risen in two evaluations, and is finished then.
    ended = json.loads((tmp_path / "run" / "final" / "manifest.json").read_text())["step"]
    assert ended == evaluated[-1]["step"] == min(4, best + 2)
    assert train(tmp_path / "run", *watched) == 0
    assert rows(tmp_path / "run" / "metrics.jsonl") == found
    assert "Suite" in (tmp_path / "run" / "report.html").read_text()


def test_an_unknown_metric_is_refused_before_the_model_is_built(
    small_suite: Path, tmp_path: Path
) -> None:
    watched = [f"train.eval_suite={small_suite}", "train.keep_best=exists.f2"]
    with pytest.raises(UserError, match=r"has no metric 'exists\.f2'; expected one of exists\.acc"):
        train(tmp_path / "run", *watched)


def test_the_best_evaluation_is_the_first_of_equal_ones_and_knows_what_is_better() -> None:
    best = BestEvaluation("pope.accuracy", [(1, 0.5), (2, None), (3, 0.5)])
    assert (best.step, best.value, best.num_since) == (1, 0.5, 2)
    assert best.add(4, 0.6) and (best.step, best.num_since) == (4, 0)
    lower = BestEvaluation("objects.chair_i", [(1, 0.5), (2, 0.4), (3, 0.45)])
    assert (lower.step, lower.num_since) == (2, 1)
    counts = BestEvaluation("signs.without_number", [(1, 5.0), (2, 0.0)])
    assert counts.step == 2


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    best = BestEvaluation("eval_loss", [(1, float("nan")), (2, float("-inf"))])
    assert (best.step, best.value, best.num_since) == (None, None, 2)
    assert best.add(3, 2.0) and not best.add(4, float("nan")) and best.add(5, 1.0)


def full(out: Path, *overrides: str) -> int:
    with contextlib.chdir(ROOT):
        return run("stage2", out, "projector=null", "train.eval_samples=0", *overrides)


def full_in_process(_: Any, out: Path, overrides: list[str]) -> int:
    return full(out, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "zero3"])
def test_two_processes_have_the_metrics_of_one(
    sharding: str, small_suite: Path, tmp_path: Path
) -> None:
    watched = [f"train.eval_suite={small_suite}", "train.eval_every_steps=2"]
    watched += ["train.keep_best=exists.looks"]
    assert full(tmp_path / "one", *watched) == 0
    together = [*watched, f"train.sharding={sharding}"]
    assert in_processes(2, full_in_process, tmp_path / "two", together) == [0, 0]
    found = [rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    one, two = ([row["eval_suite"] for row in run if "eval_suite" in row] for run in found)
    assert len(two) == len(one) == 2
    assert two == [pytest.approx(row, abs=1e-9) for row in one]
    assert (tmp_path / "two" / "best" / "manifest.json").exists()
