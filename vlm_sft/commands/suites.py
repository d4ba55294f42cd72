"""Evaluate a model on a suite, compare results, and write suites for other libraries."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from rich import box
from rich.table import Table

from vlm_sft.commands.parser import heavy_imports
from vlm_sft.evaluation.endpoint import Endpoint
from vlm_sft.evaluation.suites.answer_log import ANSWERS, Answer
from vlm_sft.evaluation.suites.answering import (
    Answerer,
    EndpointAnswerer,
    LocalAnswerer,
    answer_all,
    file_digests,
    model_identity,
)
from vlm_sft.evaluation.suites.compare import compare_results, read_results
from vlm_sft.evaluation.suites.config import SuiteConfig
from vlm_sft.evaluation.suites.results import (
    INTERVALS,
    TaskResult,
    looks,
    score_task,
    visual_necessity,
    with_true_answers,
    without_own_image,
)
from vlm_sft.evaluation.suites.tasks import Key, Task, plan, read_task
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.console import Console, echo, echo_json
from vlm_sft.utils.keyed_log import KeyedLog
from vlm_sft.utils.ownership import MADE_BY, made_by
from vlm_sft.utils.progress import track

RESULTS: Final = "results.json"
REPORT: Final = "report.html"
NECESSITY: Final = "necessity.jsonl"


def run_suite(suite: SuiteConfig, arguments: argparse.Namespace) -> int:
    """Answer what is missing, score, write the folder's files, print a table; return the exit code.

    Raises:
        UserError: A file, an image, the model or the folder cannot be used; see the functions
            called. Answers that were made before stay in the folder.
    """
    tasks = [read_task(config, seed=suite.seed) for config in suite.tasks]
    batches = plan(tasks, seed=suite.seed, batch_size=arguments.batch_size)
    keys = [key for batch in batches for group in batch for ask in group.asks for key in ask.keys]
    name, identity = _model(arguments)
    settings = {
        "suite": suite.model_dump(mode="json"),
        "files": file_digests(suite.input_paths()),
        "model": identity,
        "batch_size": arguments.batch_size,
    }
    inputs = [*suite.input_paths(), *suite.image_roots(), arguments.suite]
    out: Path = arguments.out
    with KeyedLog(out, ANSWERS, settings, keys, inputs=inputs) as log:
        missing = len(keys) - len(log.lines)
        if missing < len(keys):
            echo(f"{out}: {len(keys) - missing:,} of {len(keys):,} answers are there already")
        if missing:
            answers = answer_all(_answerer(arguments), batches, log.lines.__contains__)
            for _ in track(_appended(log, answers), missing, "answering"):
                pass
        found = [score_task(task, log.lines, seed=suite.seed) for task in tasks]
    results = results_dict(suite, found, model=name, suite_path=arguments.suite)
    write_results(out, results, tasks, found)
    console = Console()
    console.print(scores_table(found))
    for line in _notes(results, found, suite.seed):
        echo(line, file=sys.stdout)
    echo(f"report: {out / REPORT}", file=sys.stdout)
    return 0


def results_dict(
    suite: SuiteConfig, found: Sequence[TaskResult], *, model: str, suite_path: Path
) -> dict[str, Any]:
    """Return the content of `results.json`."""
    return {
        MADE_BY: made_by("evaluate"),
        "model": model,
        "suite": str(suite_path),
        "seed": suite.seed,
        "interval": INTERVALS,
        "looks": looks(with_true_answers(found), seed=suite.seed),
        "tasks": {task.name: task.as_dict(seed=suite.seed) for task in found},
    }


def write_results(
    out: Path, results: Mapping[str, Any], tasks: Sequence[Task], found: Sequence[TaskResult]
) -> None:
    """Write `results.json`, `necessity.jsonl` and `report.html`."""
    import json

    from vlm_sft.evaluation.suites.report import suite_page

    write_json(out / RESULTS, results)
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in visual_necessity(found)]
    write_text(out / NECESSITY, "".join(rows))
    write_text(out / REPORT, suite_page(results, tasks, found))


def scores_table(found: Sequence[TaskResult]) -> Table:
    """Return the main scores as a table of at most 80 columns."""
    table = Table(title="Evaluation; 95 % intervals over images", box=box.SIMPLE_HEAD)
    for name in ("task", "image", "score"):
        table.add_column(name)
    for name in ("questions", "value [95 %]"):
        table.add_column(name, justify="right")
    for task in found:
        for condition, scores in task.scores.items():
            value, interval = scores[task.main], scores.get(f"{task.main}_interval")
            shown = "-" if value is None else f"{value:.3f}"
            if interval is not None:
                shown += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
            table.add_row(task.name, condition, task.main, f"{scores['questions']:,}", shown)
        table.add_section()
    return table


def run_compare(
    first: Path,
    others: Sequence[Path],
    *,
    seed: int,
    as_json: bool,
    out: Path | None,
    stream: IO[str],
) -> int:
    """Print paired differences between the first results and each of the others.

    Raises:
        UserError: A file is no result of a suite, or two have no question in common.
    """
    base = read_results(first)
    found = [compare_results(base, read_results(path), seed=seed) for path in others]
    value: Any = found[0] if len(found) == 1 else {MADE_BY: found[0][MADE_BY], "pairs": found}
    if out is not None:
        write_json(out, value)
    if as_json:
        echo_json(value)
        return 0
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    for pair in found:
        _print_pair(console, pair)
    if out is not None:
        echo(out, file=stream)
    return 0


def run_export(suite: SuiteConfig, suite_path: Path, *, to: str, out: Path) -> int:
    """Write a suite for lmms-eval or VLMEvalKit, and print the command that runs it.

    Raises:
        UserError: A task cannot be written in that format, or a file cannot be used.
    """
    from vlm_sft.evaluation.suites.bridges import export_lmms_eval, export_vlmevalkit

    tasks = [read_task(config, seed=suite.seed) for config in suite.tasks]
    inputs = [*suite.input_paths(), *suite.image_roots(), suite_path]
    write = export_lmms_eval if to == "lmms-eval" else export_vlmevalkit
    for line in write(tasks, out, inputs=inputs):
        echo(line, file=sys.stdout)
    return 0


def _model(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the model's name, and what identifies it in the settings."""
    if arguments.base_url is not None:
        return arguments.model, {"base_url": arguments.base_url, "model": arguments.model}
    identity = model_identity(str(arguments.checkpoint))
    return str(arguments.checkpoint), {**identity, "template": arguments.template}


def _answerer(arguments: argparse.Namespace) -> Answerer:
    if arguments.base_url is not None:
        endpoint = Endpoint(arguments.base_url, arguments.model, arguments.api_key_env)
        return EndpointAnswerer(endpoint, concurrency=arguments.concurrency)
    with heavy_imports():
        from vlm_sft.checkpoint.base_models import parse_bases
        from vlm_sft.inference.loaded_model import load_checkpoint
    loaded = load_checkpoint(
        arguments.checkpoint,
        device=arguments.device,
        bases=parse_bases(arguments.base),
        template=arguments.template,
    )
    return LocalAnswerer(loaded)


def _appended(log: KeyedLog[Key, Answer], answers: Iterator[list[Answer]]) -> Iterator[Answer]:
    """Append answers as they arrive, and yield those that were missing."""
    for batch in answers:
        yield from log.append(batch)


def _notes(results: Mapping[str, Any], found: Sequence[TaskResult], seed: int) -> Iterator[str]:
    total = results["looks"]
    if total is not None:
        difference = total["difference"]
        yield (
            f"own image minus another one: {100 * difference['estimate']:+.1f} points "
            f"[{100 * difference['low']:.1f}, {100 * difference['high']:.1f}] over "
            f"{total['questions']:,} questions"
        )
    for task in found:
        refused = sum(scores["without_answer"] for scores in task.scores.values())
        if refused:
            yield f"note: {task.name}: the server refused {refused:,} questions, counted as wrong"
        without = without_own_image(task, seed=seed)
        if without is None or without[1]["low"] > 0:
            continue
        condition, gain = without
        other = "a blank one" if condition == "blank" else "that of another question"
        shown = f"{gain['estimate']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        if gain["high"] < 0:
            yield (
                f"note: {task.name}: the score with its own image is lower than with {other} "
                f"({shown}): check that images and questions belong together"
            )
        else:
            yield (
                f"note: {task.name}: the score with its own image is not clearly higher than with "
                f"{other} ({shown}): the model may not use its images; train it on more images or "
                "for more steps, or evaluate it on more images for a narrower interval"
            )


def _print_pair(console: Console, pair: Mapping[str, Any]) -> None:
    first, other = pair["first"], pair["other"]
    console.print(f"first: {first['model']} ({first['path']})", soft_wrap=True)
    console.print(f"other: {other['model']} ({other['path']})", soft_wrap=True)
    table = Table("task", "image", "questions", "first", "other", box=box.SIMPLE_HEAD)
    table.add_column("other - first [95 %]", justify="right")
    for row in pair["comparisons"]:
        found = row["difference"]
        shown = f"{found['estimate']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        means = (f"{row[name]:.3f}" for name in ("first", "other"))
        table.add_row(row["task"], row["condition"], f"{row['questions']:,}", *means, shown)
    console.print(table)
    for row in pair["comparisons"]:
        if row["only_first"] or row["only_other"]:
            console.print(
                f"note: {row['task']} ({row['condition']}): only the first has "
                f"{row['only_first']:,} questions, only the other {row['only_other']:,}",
                soft_wrap=True,
            )
