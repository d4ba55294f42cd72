"""Measure a checkpoint on held-out images and print the table."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.evaluation.captions import (
    CaptionLoss,
    caption_losses,
    other_images,
    summarize_captions,
)
from vlm_sft.evaluation.conditions import Condition
from vlm_sft.evaluation.probes import (
    Probe,
    Task,
    Verdict,
    ask,
    judge,
    read_probes,
    require_images_inside,
    require_questions,
    summarize,
    tasks_of,
)
from vlm_sft.inference.loaded_model import VlmRun, load_run
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import Console, say
from vlm_sft.utils.ownership import MADE_BY, made_by
from vlm_sft.utils.progress import track

ONE_SIDED: Final = 0.95
"""Share of one answer from which the accuracy alone would mislead."""


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write `--out`; returns the exit code."""
    files = {path: read_probes(path) for path in arguments.probes}
    links = arguments.follow_symlinks
    for path, probes in files.items():
        require_images_inside(path, probes, arguments.images, follow_symlinks=links)
    records = (
        _read_captions(arguments.captions, arguments.images, links) if arguments.captions else []
    )
    vlm_run = load_run(
        arguments.checkpoint, device=arguments.device, bases=parse_bases(arguments.base)
    )
    if files:
        require_questions(vlm_run)
    results: dict[str, Any] = {
        MADE_BY: made_by("evaluate"),
        "checkpoint": str(arguments.checkpoint),
        "step": vlm_run.manifest.get("step"),
        "interval": "95 % percentile bootstrap over images; Wilson's where all answers are alike",
        "seed": arguments.seed,
        "answers": arguments.answers,
        "probes": {},
    }
    tasks = _tasks(files, arguments)
    losses, verdicts = _measure(vlm_run, tasks, records, arguments)
    for (measure, condition), found in verdicts.items():
        summary = summarize(found, seed=arguments.seed)
        results["probes"].setdefault(measure, {})[condition] = summary
    if records:
        results["captions"] = summarize_captions(losses, seed=arguments.seed)
    Console().print(results_table(results))  # before writing: a full disk must not lose it
    for line in one_sided(results):
        say(line, file=sys.stdout)
    write_json(arguments.out, results)
    say(f"results: {arguments.out}", file=sys.stdout)
    return 0


def one_sided(results: dict[str, Any]) -> Iterator[str]:
    """Yield a line for all probes that got nearly always the same answer."""
    for measure, by_condition in results["probes"].items():
        for condition, found in by_condition.items():
            answer, share = max(found["chosen"].items(), key=lambda item: item[1])
            if share >= ONE_SIDED:
                balanced = found["balanced_accuracy"]["estimate"]
                yield (
                    f"note: {measure} ({condition}): {share:.0%} of the answers are {answer!r}; "
                    f"balanced accuracy {balanced:.1%}"
                )


def results_table(results: dict[str, Any]) -> Table:
    """The results as a table for people, at most 80 columns wide."""
    table = Table(title="Images of the probes; 95 % intervals over images", box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("image")
    for name in ("questions", "right answers", "chance"):
        table.add_column(name, justify="right")
    for name, by_condition in results["probes"].items():
        for condition, found in by_condition.items():
            shown, chance = _percent(found["accuracy"]), f"{found['chance']:.0%}"
            table.add_row(name, condition, f"{found['questions']:,}", shown, chance)
        table.add_section()
    if "captions" in results:
        found = results["captions"]
        for condition in ("right", "shuffled", "difference"):
            row = ("caption loss", condition, f"{found['records']:,}", _number(found[condition]))
            table.add_row(*row, "")
    return table


def _tasks(files: dict[Path, list[Probe]], arguments: argparse.Namespace) -> list[Task]:
    tasks: list[Task] = []
    for path, probes in files.items():
        kept = _first_images([p.image for p in probes], arguments.max_images)
        chosen = [probe for probe in probes if probe.image in kept]
        asked: list[Condition] = ["right"] if path in arguments.beside else arguments.conditions
        tasks += tasks_of(chosen, asked, measure=path.stem, seed=arguments.seed)
    return tasks


def _measure(
    run: VlmRun, tasks: list[Task], records: list[Conversation], arguments: argparse.Namespace
) -> tuple[list[CaptionLoss], dict[tuple[str, str], list[Verdict]]]:
    """Everything under one progress bar, which counts questions and captions."""
    if records:
        kept = _first_images([str(r.images[0]) for r in records], arguments.max_images)
        records = [record for record in records if str(record.images[0]) in kept]
    others = other_images(records, seed=arguments.seed) if records else {}
    captions = caption_losses(run, records, others)
    judged = (ask if arguments.answers == "spoken" else judge)(run, tasks, arguments.images)
    losses: list[CaptionLoss] = []
    verdicts: dict[tuple[str, str], list[Verdict]] = {
        (task.measure, task.condition): [] for task in tasks
    }
    items: Iterator[CaptionLoss | tuple[Task, Verdict]] = chain(captions, judged)
    for item in track(items, len(records) + len(tasks), "measuring"):
        if isinstance(item, CaptionLoss):
            losses.append(item)
        else:
            task, verdict = item
            verdicts[task.measure, task.condition].append(verdict)
    return losses, verdicts


def _read_captions(path: Path, images: Path, follow_symlinks: bool) -> list[Conversation]:
    records = []
    for record in read_records(
        DataFile(path=str(path), image_root=str(images), follow_symlinks=follow_symlinks)
    ):
        if isinstance(record, RecordError):
            raise record
        if len(record.images) != 1 or not isinstance(record.images[0], Path):
            raise UserError(f"{record.where}: expected a record with one image file")
        records.append(record)
    return records


def _first_images(images: Sequence[str], count: int | None) -> set[str]:
    return set(list(dict.fromkeys(images))[:count])


def _percent(found: dict[str, float]) -> str:
    return f"{found['estimate']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def _number(found: dict[str, float]) -> str:
    return f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
