"""Evaluate a checkpoint and print the table of results."""

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
from vlm_sft.evaluation.conditions import ImageCondition
from vlm_sft.evaluation.questions import (
    EvalItem,
    Prediction,
    Question,
    generate_predictions,
    make_items,
    read_questions,
    require_images_inside,
    require_questions_in_prompt,
    score_predictions,
    summarize,
)
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import Console, echo
from vlm_sft.utils.ownership import MADE_BY, made_by
from vlm_sft.utils.progress import track

ONE_SIDED: Final = 0.95
"""Share of one answer from which on the accuracy alone is misleading."""


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, write `--out`; return the exit code."""
    files = {path: read_questions(path) for path in arguments.probes}
    links = arguments.follow_symlinks
    for path, questions in files.items():
        require_images_inside(path, questions, arguments.images, follow_symlinks=links)
    records = (
        _read_captions(arguments.captions, arguments.images, links) if arguments.captions else []
    )
    loaded = load_checkpoint(
        arguments.checkpoint,
        device=arguments.device,
        bases=parse_bases(arguments.base),
        template=arguments.template,
    )
    if files:
        require_questions_in_prompt(loaded)
    results: dict[str, Any] = {
        MADE_BY: made_by("evaluate"),
        "checkpoint": str(arguments.checkpoint),
        "step": loaded.manifest.get("step"),
        "interval": "95 % percentile bootstrap over images; Wilson's if all are right or all wrong",
        "seed": arguments.seed,
        "answers": arguments.answers,
        "probes": {},
    }
    items = _items(files, arguments)
    losses, predictions = _measure(loaded, items, records, arguments)
    for (measure, condition), found in predictions.items():
        summary = summarize(found, seed=arguments.seed)
        results["probes"].setdefault(measure, {})[condition] = summary
    if records:
        results["captions"] = summarize_captions(losses, seed=arguments.seed)
    Console().print(results_table(results))  # before writing, which can fail on a full disk
    for line in one_sided(results):
        echo(line, file=sys.stdout)
    write_json(arguments.out, results)
    echo(f"results: {arguments.out}", file=sys.stdout)
    return 0


def one_sided(results: dict[str, Any]) -> Iterator[str]:
    """Yield a note for each measure whose predictions are nearly always the same answer."""
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
    """Return the results as a table of at most 80 columns."""
    table = Table(title="Evaluation; 95 % intervals over images", box=box.SIMPLE_HEAD)
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


def _items(files: dict[Path, list[Question]], arguments: argparse.Namespace) -> list[EvalItem]:
    items: list[EvalItem] = []
    for path, questions in files.items():
        images = _first_images([q.image for q in questions], arguments.max_images)
        selected = [question for question in questions if question.image in images]
        only_right = path in arguments.right_only
        conditions: list[ImageCondition] = ["right"] if only_right else arguments.conditions
        items += make_items(selected, conditions, measure=path.stem, seed=arguments.seed)
    return items


def _measure(
    loaded: LoadedModel,
    items: list[EvalItem],
    records: list[Conversation],
    arguments: argparse.Namespace,
) -> tuple[list[CaptionLoss], dict[tuple[str, str], list[Prediction]]]:
    """Return caption losses, and predictions by measure and condition; show one progress bar."""
    if records:
        images = _first_images([str(r.images[0]) for r in records], arguments.max_images)
        records = [record for record in records if str(record.images[0]) in images]
    others = other_images(records, seed=arguments.seed) if records else {}
    captions = caption_losses(loaded, records, others)
    predict = generate_predictions if arguments.answers == "free_form" else score_predictions
    losses: list[CaptionLoss] = []
    predictions: dict[tuple[str, str], list[Prediction]] = {
        (item.measure, item.condition): [] for item in items
    }
    results: Iterator[CaptionLoss | tuple[EvalItem, Prediction]] = chain(
        captions, predict(loaded, items, arguments.images)
    )
    for result in track(results, len(records) + len(items), "evaluating"):
        if isinstance(result, CaptionLoss):
            losses.append(result)
        else:
            item, prediction = result
            predictions[item.measure, item.condition].append(prediction)
    return losses, predictions


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
