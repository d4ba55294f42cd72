"""Sample several answers to each question of a data file, and write the best as training data."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

from vlm_sft.best_of.choosing import Choice, choose
from vlm_sft.best_of.drawing import draw_samples
from vlm_sft.best_of.graders import Grader, exact_grader, judge_grader, length_grader
from vlm_sft.best_of.questions import (
    Question,
    answered,
    images_digest,
    plan,
    questions_digest,
    read_questions,
)
from vlm_sft.best_of.sample_lines import SAMPLES, Sample
from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.config.schema import ColumnNames, DataFile
from vlm_sft.data.preferences import PreferencePair, trl_row
from vlm_sft.data.record_writer import as_messages
from vlm_sft.evaluation.judges.asking import JudgeOptions
from vlm_sft.evaluation.questions import require_questions_in_prompt
from vlm_sft.evaluation.suites.answering import model_identity
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.inference.shared_prefix import Sampling
from vlm_sft.utils.console import Console, echo
from vlm_sft.utils.keyed_log import KeyedLog
from vlm_sft.utils.owned_files import write_owned, write_owned_json
from vlm_sft.utils.ownership import MADE_BY, made_by
from vlm_sft.utils.progress import track

TRAIN: Final = "train.jsonl"
PAIRS: Final = "preferences.jsonl"
RECEIPTS: Final = "receipts.jsonl"
RESULTS: Final = "results.json"
JUDGE_LOG: Final = "judge.jsonl"

_SHOWN: Final = 5


def run(
    arguments: argparse.Namespace, checkpoint: Path, out: Path, verifier: Grader | None
) -> dict[str, Any]:
    """Draw what is missing, grade, choose, write the files of the folder; return `results.json`.

    Args:
        arguments: Those of the command.
        checkpoint: The model that answers.
        out: The folder.
        verifier: The grader of `--score verifier`.

    Raises:
        UserError: The data, the model, the judge or the folder cannot be used. Samples that were
            drawn before stay in the folder.
    """
    file = DataFile(
        path=arguments.data,
        annotations=None if arguments.answers is None else str(arguments.answers),
        image_name=arguments.image_name,
        columns=ColumnNames.of_option(arguments.columns),
        image_root=None if arguments.images is None else str(arguments.images),
        follow_symlinks=arguments.follow_symlinks,
    )
    questions, left_out = read_questions(file)
    samples = _drawn(arguments, checkpoint, out, questions)
    grader = verifier or _grader(arguments, out)
    choices = choose(questions, samples, grader)
    root = _common_root(questions)
    skipped = _write(out, choices, root)
    results = {
        MADE_BY: made_by("sample"),
        "checkpoint": str(checkpoint),
        "data": arguments.data,
        "image_root": str(root),
        "score": arguments.score,
        "samples_per_question": arguments.n,
        "records_left_out": dict(left_out),
        "pairs_left_out": skipped,
        **counts(choices),
    }
    write_owned_json(out / RESULTS, results)
    Console().print(results_table(results))
    for line in _notes(results, choices, out):
        echo(line, file=sys.stdout)
    return results


def counts(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the counts of all questions and samples; every one is in exactly one place."""
    asked = [choice for choice in choices if choice.outcome != "not_asked"]
    sampled = sum(sum(choice.counts.values()) + choice.cut for choice in asked)
    why: Counter[str] = Counter()
    for choice in choices:
        why.update(choice.why)
    return {
        "questions": len(choices),
        "outcomes": dict(Counter(choice.outcome for choice in choices)),
        "samples": sampled,
        "acceptable_samples": sum(choice.right for choice in asked),
        "duplicates": sum(choice.duplicates for choice in asked),
        "cut_or_empty": sum(choice.cut for choice in asked),
        "acceptable_share": _share(sum(choice.right for choice in asked), sampled),
        "kept_share": _share(sum(choice.outcome == "kept" for choice in asked), len(asked)),
        "pairs": sum(choice.rejected is not None for choice in choices),
        "why": dict(why.most_common()),
    }


def results_table(results: Mapping[str, Any]) -> Table:
    """Return the counts as a table."""
    table = Table(title=f"Best of {results['samples_per_question']}", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    outcomes, questions, samples = results["outcomes"], results["questions"], results["samples"]
    rows = [
        ("questions", questions, None),
        ("  kept, with an acceptable sample", outcomes.get("kept", 0), questions),
        ("  without any acceptable sample", outcomes.get("none_acceptable", 0), questions),
        ("  not asked", outcomes.get("not_asked", 0), questions),
        ("samples", samples, None),
        ("  acceptable", results["acceptable_samples"], samples),
        ("  equal to an earlier one", results["duplicates"], samples),
        ("  cut or empty", results["cut_or_empty"], samples),
        ("pairs of a better and a worse answer", results["pairs"], questions),
    ]
    for name, count, whole in rows:
        share = _share(count, whole) if whole else None
        table.add_row(name, f"{count:,}", "" if share is None else f"{share:.1%}")
    return table


def _drawn(
    arguments: argparse.Namespace, checkpoint: Path, out: Path, questions: Sequence[Question]
) -> dict[str, list[Sample]]:
    """Return all samples of each question; draw those that are missing."""
    batches = plan(questions, arguments.n, arguments.batch_size)
    settings = {
        "data": {
            "path": arguments.data,
            "images": None if arguments.images is None else str(arguments.images),
            "follow_symlinks": arguments.follow_symlinks,
            "questions": questions_digest(questions),
            "images_digest": images_digest(questions),
        },
        "model": {**model_identity(str(checkpoint)), "template": arguments.template},
        "n": arguments.n,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
    }
    keys = [(question.id, number) for batch in batches for question, number in batch]
    with KeyedLog(out, SAMPLES, settings, keys, inputs=[arguments.data, checkpoint]) as log:
        missing = len(keys) - len(log.lines)
        if missing < len(keys):
            echo(f"{out}: {len(keys) - missing:,} of {len(keys):,} samples are there already")
        if missing:
            loaded = load_checkpoint(
                checkpoint,
                device=arguments.device,
                bases=parse_bases(arguments.base),
                template=arguments.template,
            )
            require_questions_in_prompt(loaded)
            drawn = draw_samples(
                loaded,
                batches,
                log.lines.__contains__,
                sampling=Sampling(arguments.temperature, arguments.top_p),
                max_tokens=arguments.max_tokens,
                seed=arguments.seed,
            )
            lines = log.lines
            left = sum(any((q.id, n) not in lines for q, n in batch) for batch in batches)
            # Batches, not samples: all samples of a batch come at once.
            for batch in track(drawn, left, f"sampling, batches of {arguments.batch_size}"):
                log.append(batch)
        return {
            question.id: [log.lines[question.id, number] for number in range(arguments.n)]
            for question in questions
        }


def _grader(arguments: argparse.Namespace, out: Path) -> Grader:
    if arguments.score == "exact":
        return exact_grader(arguments.verdict)
    if arguments.score == "length":
        return length_grader(longest=arguments.longest)
    judge = JudgeOptions(
        base_url=arguments.judge_url,
        model=arguments.judge_model,
        log=out / JUDGE_LOG,
        prompts=arguments.judge_prompts,
        key_variable=arguments.judge_key_variable,
        usd_per_million=None if arguments.usd_per_million is None
        else (arguments.usd_per_million[0], arguments.usd_per_million[1]),
        max_usd=arguments.max_usd,
        concurrency=arguments.concurrency,
    )  # fmt: skip
    return judge_grader(judge, arguments.min_grade)


def _common_root(questions: Sequence[Question]) -> Path:
    """Return the folder that contains all images; the current one if there are none."""
    folders = {
        os.path.abspath(image.parent)
        for question in questions
        for image in question.prompt.images
        if isinstance(image, Path)
    }
    return Path(os.path.commonpath(folders)) if folders else Path.cwd()


def _write(out: Path, choices: Sequence[Choice], root: Path) -> int:
    """Write the records, pairs and receipts; return how many pairs have images that are no files.

    TRL takes images as files; such pairs are left out.
    """
    records, pairs, skipped = [], [], 0
    for choice in choices:
        if choice.chosen is None:
            continue
        question = _absolute(choice.question)
        record = answered(question, choice.chosen.text)
        records.append({"id": record.id, "messages": as_messages(record, root)})
        if choice.rejected is None:
            continue
        pair = PreferencePair(question.prompt, choice.chosen.text, choice.rejected.text)
        if all(isinstance(image, Path) for image in question.prompt.images):
            pairs.append(trl_row(pair))
        else:
            skipped += 1
    write_owned(out / TRAIN, _lines(records))
    write_owned(out / PAIRS, _lines(pairs))
    write_owned(out / RECEIPTS, _lines([choice.receipt() for choice in choices]))
    return skipped


def _absolute(question: Question) -> Question:
    """Return a question whose image files are named by absolute paths."""
    images = tuple(
        Path(os.path.abspath(image)) if isinstance(image, Path) else image
        for image in question.prompt.images
    )
    return replace(question, prompt=replace(question.prompt, images=images))


def _notes(results: Mapping[str, Any], choices: Sequence[Choice], out: Path) -> Iterator[str]:
    without = [choice.question.id for choice in choices if choice.outcome == "none_acceptable"]
    if without:
        more = f", ... (outcome in {RECEIPTS})" if len(without) > _SHOWN else ""
        yield f"without any acceptable sample: {', '.join(without[:_SHOWN])}{more}"
    for name, what in (("records_left_out", "records left out"), ("why", "against samples")):
        if found := results[name]:
            yield f"{what}: " + ", ".join(f"{reason} {count:,}" for reason, count in found.items())
    if results["pairs_left_out"]:
        yield f"pairs left out, because TRL needs image files: {results['pairs_left_out']:,}"
    yield (
        f"{out / TRAIN}: {results['outcomes'].get('kept', 0):,} records; train on them with "
        f"data.train.0.path={out / TRAIN} data.train.0.image_root={results['image_root']}"
    )
    yield f"{out / PAIRS}: {results['pairs'] - results['pairs_left_out']:,} pairs for TRL"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
