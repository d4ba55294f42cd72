"""Compare results of a suite: paired differences, question by question."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.errors import UserError
from vlm_sft.evaluation.suites.results import NOT_SHARES, RIGHT, difference_interval
from vlm_sft.utils.ownership import MADE_BY, made_by
from vlm_sft.utils.reading import read_json


@dataclass(frozen=True)
class SuiteResults:
    """A file of results: its name, the model's name, and scores by task, condition and question."""

    path: Path
    model: str
    tasks: Mapping[str, Mapping[str, Any]]

    def scores(self, task: str) -> dict[tuple[str, str], tuple[float, str]]:
        """Return score and image by condition and question id."""
        return {
            (condition, question["id"]): (score, question["image"])
            for question in self.tasks[task]["questions"]
            for condition, score in question["scores"].items()
        }


def read_results(path: Path) -> SuiteResults:
    """Read the `results.json` of a suite.

    Raises:
        UserError: The file is missing, or holds something else.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of results", code="data_file_missing") from None
    try:
        tasks = found["tasks"]
        for task in tasks.values():
            for question in task["questions"]:
                _ = question["id"], question["image"], question["scores"].items()
        return SuiteResults(path, str(found["model"]), tasks)
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path}: is not the results.json of an evaluation suite", code="data_file_unreadable"
        ) from None


def compare_results(first: SuiteResults, other: SuiteResults, *, seed: int = 0) -> dict[str, Any]:
    """Return the scores of `other` minus those of `first`, paired by question.

    Raises:
        UserError: They have no question in common, or a task is of another kind in each.
    """
    rows: list[dict[str, Any]] = []
    for name in first.tasks:
        if name not in other.tasks:
            continue
        kind = first.tasks[name]["kind"]
        if kind != other.tasks[name]["kind"]:
            raise UserError(
                f"task {name}: its kind is {kind} in {first.path}, and "
                f"{other.tasks[name]['kind']} in {other.path}; rename one of the tasks"
            )
        mine, theirs = first.scores(name), other.scores(name)
        for condition in dict.fromkeys(condition for condition, _ in mine):
            row = _row(mine, theirs, condition, is_share=kind not in NOT_SHARES, seed=seed)
            if row is not None:
                rows.append({"task": name, "condition": condition, **row})
    if not rows:
        raise UserError(
            f"{first.path} and {other.path} have no question in common; compare results of the "
            "same suite"
        )
    return {
        MADE_BY: made_by("evaluate compare"),
        "first": {"path": str(first.path), "model": first.model},
        "other": {"path": str(other.path), "model": other.model},
        "comparisons": rows,
    }


def _row(
    mine: Mapping[tuple[str, str], tuple[float, str]],
    theirs: Mapping[tuple[str, str], tuple[float, str]],
    condition: str,
    *,
    is_share: bool,
    seed: int,
) -> dict[str, Any] | None:
    """Return the difference under one condition; None without a question in common."""
    asked = [key for key in mine if key[0] == condition]
    common = [key for key in asked if key in theirs]
    if not common:
        return None
    before = [mine[key][0] for key in common]
    after = [theirs[key][0] for key in common]
    differences = [new - old for old, new in zip(before, after, strict=True)]
    images = [mine[key][1] for key in common]
    row: dict[str, Any] = {
        "questions": len(common),
        "only_first": len(asked) - len(common),
        "only_other": sum(key[0] == condition and key not in mine for key in theirs),
        "first": sum(before) / len(common),
        "other": sum(after) / len(common),
        "difference": difference_interval(differences, images, seed=seed).as_dict(),
    }
    if is_share:
        pairs = [(old >= RIGHT, new >= RIGHT) for old, new in zip(before, after, strict=True)]
        row["only_first_right"] = pairs.count((True, False))
        row["only_other_right"] = pairs.count((False, True))
    return row
