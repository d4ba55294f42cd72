"""Score a file of answers, and print or write the scores."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from rich import box
from rich.table import Table

from vlm_sft.errors import UserError
from vlm_sft.evaluation.judges.asking import JudgeOptions
from vlm_sft.evaluation.scores.files import read_answers
from vlm_sft.evaluation.scores.registry import read_truth, score
from vlm_sft.evaluation.scores.results import Options
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import Console, echo, echo_json
from vlm_sft.utils.ownership import MADE_BY, made_by

_MOST_COLUMNS: Final = 4
"""Readings side by side in 80 columns."""


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options of a command line.

    Raises:
        UserError: Some of the judge's options are missing, or a file of --others is malformed.
    """
    names = ("judge_url", "judge_model", "judge_log")
    given = [name for name in names if getattr(arguments, name) is not None]
    missing = [f"--{name.replace('_', '-')}" for name in names if name not in given]
    if given and missing:
        raise UserError(f"a judge also needs {' and '.join(missing)}")
    others = {}
    for text in arguments.others:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in others:
            raise UserError(f"--others {text}: expected NAME=FILE, each name once")
        others[name] = read_answers(Path(path))
    prices = arguments.usd_per_million
    judge = JudgeOptions(
        base_url=arguments.judge_url,
        model=arguments.judge_model,
        log=arguments.judge_log,
        prompts=arguments.judge_prompts,
        key_variable=arguments.judge_key_variable,
        usd_per_million=None if prices is None else (prices[0], prices[1]),
        max_usd=arguments.max_usd,
        max_tokens=arguments.max_tokens,
        seed=arguments.judge_seed,
        concurrency=arguments.concurrency,
    )
    return Options(
        seed=arguments.seed,
        verdict=arguments.verdict,
        meteor=arguments.meteor,
        judge=judge if given else None,
        name=arguments.name,
        others=others,
    )


def run(
    kind: str,
    answers_path: Path,
    truth_paths: Sequence[Path],
    options: Options,
    *,
    as_json: bool,
    out: Path | None,
    stream: IO[str],
) -> int:
    """Score and print; return the exit code.

    Raises:
        UserError: A file is malformed, or no answer belongs to a question.
    """
    results = score(kind, read_answers(answers_path), read_truth(kind, truth_paths), options)
    if out is not None:
        write_json(out, {MADE_BY: made_by("score"), **results.scores, "rows": results.rows})
    if as_json:
        echo_json(results.scores)
    else:
        print_scores(results.scores, stream)
        if out is not None:
            echo(out, file=stream)
    return 0


def print_scores(found: Mapping[str, Any], stream: IO[str]) -> None:
    """Print the scores as a table."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    questions, unanswered, extra = (
        found[key] for key in ("questions", "unanswered", "extra_answers")
    )
    console.print(f"{found['kind']}: {questions:,} questions", soft_wrap=True)
    if unanswered:
        names = ", ".join(found["unanswered_ids"])
        more = ", ..." if unanswered > 5 else ""
        console.print(
            f"without an answer, counted as wrong: {unanswered:,} ({names}{more})", soft_wrap=True
        )
    if extra:
        names = ", ".join(found["extra_ids"])
        more = ", ..." if extra > 5 else ""
        console.print(
            f"answers to other questions, not used: {extra:,} ({names}{more})", soft_wrap=True
        )
    readings = found.get("readings", {"": found})
    for start in range(0, len(readings), _MOST_COLUMNS):
        _print_columns(
            console,
            {name: readings[name] for name in list(readings)[start : start + _MOST_COLUMNS]},
        )
    for name, groups in found.items():
        if isinstance(groups, dict) and groups and name != "readings":
            _print_groups(console, name, groups)


def _print_columns(console: Console, readings: Mapping[str, Mapping[str, Any]]) -> None:
    first, *_ = readings.values()
    table = Table("score", *(name or "value" for name in readings), box=box.SIMPLE_HEAD)
    skipped = {"kind", "questions", "unanswered", "extra_answers"}
    for name, value in first.items():
        if name in skipped or isinstance(value, list | dict):
            continue
        table.add_row(name, *(_number(column[name]) for column in readings.values()))
        if f"{name}_interval" in first:
            table.add_row("  95 %", *(_interval(column, name) for column in readings.values()))
    console.print(table)


def _print_groups(console: Console, name: str, groups: Mapping[str, Any]) -> None:
    table = Table(name, box=box.SIMPLE_HEAD)
    keys = list(next(iter(groups.values()))) if name.startswith("by_") else ["answers"]
    for key in keys:
        table.add_column(key, justify="right")
    for group, values in groups.items():
        shown = [_number(values[key]) for key in keys] if name.startswith("by_") else [str(values)]
        table.add_row(group, *shown)
    console.print(table)


def _interval(scores: Mapping[str, Any], name: str) -> str:
    low, high = scores[f"{name}_interval"]
    return f"{low:.3f} - {high:.3f}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return "-" if value is None else str(value)
