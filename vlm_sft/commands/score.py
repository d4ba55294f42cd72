"""Score a file of answers, and print or write the scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.table import Table

from vlm_sft.evaluation.intervals import cluster_bootstrap_interval
from vlm_sft.evaluation.scores.captions import score_captions, tokenize
from vlm_sft.evaluation.scores.exact import (
    score_counting,
    score_gqa,
    score_grounding,
    score_multiple_choice,
)
from vlm_sft.evaluation.scores.files import Answers, Row, match, read_answers, read_rows
from vlm_sft.evaluation.scores.pope import score_pope
from vlm_sft.evaluation.scores.vqa import score_vqa
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import Console, echo, echo_json
from vlm_sft.utils.ownership import MADE_BY, made_by

LIST_KEYS = ("annotations", "questions", "data")
"""Keys of an object that hold the rows, e.g. in COCO's and VQAv2's files."""


def run(
    kind: str,
    answers_path: Path,
    truth_path: Path,
    *,
    seed: int,
    as_json: bool,
    out: Path | None,
    stream: IO[str],
) -> int:
    """Score and print; return the exit code.

    Raises:
        UserError: A file is malformed, or no answer belongs to a question.
    """
    found = score(kind, read_answers(answers_path), read_rows(truth_path, LIST_KEYS), seed=seed)
    if out is not None:
        write_json(out, {MADE_BY: made_by("score"), **found})
    if as_json:
        echo_json(found)
    else:
        print_scores(found, stream)
        if out is not None:
            echo(out, file=stream)
    return 0


def score(kind: str, answers: Answers, truth: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """Return the scores of one kind, as values for JSON.

    Raises:
        UserError: A row is malformed, or no answer belongs to a question.
    """
    if kind == "caption":
        return score_caption_files(answers, truth, seed=seed)
    scores = {
        "pope": score_pope, "vqa": score_vqa, "gqa": score_gqa, "counting": score_counting,
        "multiple_choice": score_multiple_choice, "grounding": score_grounding,
    }  # fmt: skip
    return scores[kind](answers, truth, seed=seed)


def score_caption_files(answers: Answers, truth: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """Return CIDEr-D, BLEU and ROUGE-L of captions by image id.

    An image without a caption counts as one with an empty caption.
    """
    references: dict[str, list[list[str]]] = {}
    for row in truth:
        caption = tokenize(row.text("caption", "text", "answer"))
        references.setdefault(row.text("image_id", "image", "id"), []).append(caption)
    coverage = match(answers, list(references))
    captions = [tokenize(answers.by_id.get(name, "")) for name in references]
    found = score_captions(captions, list(references.values()))
    interval = cluster_bootstrap_interval(found.cider_by_caption, list(references), seed=seed)
    return {
        "kind": "caption",
        **coverage.as_dict(),
        "references": sum(map(len, references.values())),
        "cider_d": found.cider,
        "cider_d_interval": [interval.low, interval.high],
        **{f"bleu_{n}": value for n, value in enumerate(found.bleu, 1)},
        "rouge_l": found.rouge_l,
        "mean_words": sum(map(len, captions)) / len(captions),
        "meteor": "not computed: needs Java (package pycocoevalcap)",
        "spice": "not computed: needs Java (package pycocoevalcap)",
    }


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
    columns = list(readings)
    table = Table("score", *([] if columns == [""] else columns), box=box.SIMPLE_HEAD)
    if columns == [""]:
        table.add_column("value")
    first = readings[columns[0]]
    skipped = {"kind", "questions", "unanswered", "extra_answers"}
    for name, value in first.items():
        if name in skipped or isinstance(value, list | dict):
            continue
        table.add_row(name, *(_number(readings[column][name]) for column in columns))
        if f"{name}_interval" in first:
            table.add_row("  95 %", *(_interval(readings[column], name) for column in columns))
    console.print(table)
    for name, groups in found.items():
        if isinstance(groups, dict) and name != "readings":
            _print_groups(console, name, groups)


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
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
