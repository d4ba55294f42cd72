"""Write the quickstart's page: images with answers, evaluation results, loss curves and time."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlm_sft.checkpoint.jsonl import read_rows
from vlm_sft.data.images import thumbnail
from vlm_sft.inspection.run_data import Row, number
from vlm_sft.inspection.run_report import COMMAND, keep_file_of_others, software_versions
from vlm_sft.utils.atomic_files import write_bytes, write_text
from vlm_sft.utils.html import data_uri, render_page
from vlm_sft.utils.ownership import made_by, refuse_in_checkpoint
from vlm_sft.utils.progress import format_seconds

_CONDITIONS: Final = {
    "right": "its own",
    "blank": "blank",
    "shuffled": "another one",
}
"""Display names of the evaluation's image conditions."""

_SCORES: Final = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "mean_absolute_error": "mean absolute error",
    "chair_i": "CHAIRi",
    "chair_s": "CHAIRs",
    "cider_d": "CIDEr-D",
}
"""Scores in the table, with their display names."""

_PERCENT: Final = frozenset(("accuracy", "precision", "recall", "f1", "chair_i", "chair_s"))


@dataclass(frozen=True)
class ShownImage:
    """An image with questions about it and the model's answers.

    Attributes:
        path: The image file.
        exchanges: Pairs of question and answer.
        expected: The true answer to each question, e.g. `yes`, or None for an open question; empty
            if none is known. An answer is marked as right if the last word in it that could be an
            answer is the true one.
    """

    path: Path
    exchanges: Sequence[tuple[str, str]]
    expected: Sequence[str | None] = ()


@dataclass(frozen=True)
class DemoReport:
    """Contents of the quickstart's page.

    Attributes:
        title: Title of the page.
        lead: Sentence under the title.
        images: Images with questions and answers.
        runs: Run directories by title, e.g. `Stage 1`, in order.
        results: `results.json` of a suite by title.
        seconds: Duration of each phase.
        savings: One line per means that made the runs faster.
        credits: One line per source of data or weights.
    """

    title: str
    lead: str
    images: Sequence[ShownImage]
    runs: Mapping[str, Path]
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    savings: Sequence[str] = ()
    credits: Sequence[str] = ()


def write_demo_report(report: DemoReport, path: str | Path) -> Path:
    """Write the page, and its loss curves as a PNG of the same name.

    Files with these names that this toolkit did not write are kept under other names.

    Returns:
        The path of the page.
    """
    path = Path(path)
    refuse_in_checkpoint(path)
    for written in (path, path.with_suffix(".png")):
        keep_file_of_others(written)
    curves = loss_curves(
        {title: read_rows(d / "metrics.jsonl").rows for title, d in report.runs.items()}
    )
    write_bytes(path.with_suffix(".png"), curves)
    html = render_page(
        __package__,
        "demo_report.html",
        title=report.title,
        lead=report.lead,
        command=COMMAND,
        headline=list(_headline(report.results)),
        images=[_image(image) for image in report.images],
        results=[(title, _result_rows(found)) for title, found in report.results.items()],
        curves=data_uri(curves),
        seconds=_bars(report.seconds),
        total_time=format_seconds(sum(report.seconds.values())),
        savings=report.savings,
        versions=software_versions(),
        credits=report.credits,
    )
    write_text(path, html)
    return path


def loss_curves(runs: Mapping[str, Sequence[Row]]) -> bytes:
    """Draw training and validation loss over the step, one panel per run, as a PNG.

    Args:
        runs: Rows of `metrics.jsonl` by title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * max(1, len(runs)), 3.4), dpi=130, layout="constrained")
    axes = figure.subplots(1, max(1, len(runs)), squeeze=False)[0]
    for panel, (title, rows) in zip(axes, runs.items(), strict=False):
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
            points = [(row["step"], row[key]) for row in rows if number(row.get(key)) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, ms=4, lw=1.5)
        panel.set(title=title, xlabel="step", ylabel="loss (nats per token)")
        panel.grid(alpha=0.25)
        if panel.lines:
            panel.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": made_by(COMMAND)})
    return buffer.getvalue()


def _bars(seconds: Mapping[str, float]) -> list[dict[str, str]]:
    """Return each phase with its time and, for the length of its bar, its share of the longest."""
    longest = max(seconds.values(), default=1.0)
    return [
        {"name": name, "time": format_seconds(value), "percent": f"{100 * value / longest:.1f}"}
        for name, value in seconds.items()
    ]


def _headline(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yield accuracy, caption and note of every task with an accuracy: own images, then blank ones.

    Blank images are the same in every set of results, so only the last set's accuracy is shown.
    """
    for condition in ("right", "blank"):
        shown = list(results.items())[-1 if condition == "blank" else 0 :]
        tasks = [(title, name, task) for title, r in shown for name, task in r["tasks"].items()]
        for title, name, task in tasks:
            scores = task["conditions"].get(condition, {})
            if "accuracy_interval" not in scores:
                continue
            low, high = scores["accuracy_interval"]
            caption = f"{name}, {title}" + (", blank image" if condition == "blank" else "")
            note = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
            yield f"{100 * scores['accuracy']:.1f} %", caption, note


def _image(image: ShownImage) -> dict[str, Any]:
    """Return a thumbnail with its questions, the answers, and whether they are right."""
    from vlm_sft.evaluation.questions import closed_set, last_choice  # imports torch

    expected = image.expected or [None] * len(image.exchanges)
    return {
        "uri": data_uri(thumbnail(image.path, 640, quality=85), "jpeg"),
        "name": image.path.name,
        "exchanges": [
            {
                "question": question,
                "answer": answer,
                "expected": truth,
                "is_right": truth is not None
                and last_choice(answer, closed_set(truth)) == truth.lower(),
            }
            for (question, answer), truth in zip(image.exchanges, expected, strict=True)
        ],
    }


def _result_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of an evaluation, by the columns of `demo_report.html`."""
    rows = []
    for name, task in results["tasks"].items():
        for condition, scores in task["conditions"].items():
            for key in (key for key in _SCORES if key in scores):
                rows.append(
                    {
                        "measure": f"{name}: {_SCORES[key]}",
                        "image": _CONDITIONS[condition],
                        "n": f"{scores['questions']:,}",
                        "result [95 % interval]": _shown(scores, key),
                    }
                )
    return rows


def _shown(scores: Mapping[str, Any], key: str) -> str:
    """Return a score with its interval, if it has one."""
    value, interval = scores[key], scores.get(f"{key}_interval")
    if value is None:
        return "-"
    scale, digits, unit = (100, 1, " %") if key in _PERCENT else (1, 3, "")
    text = f"{scale * value:.{digits}f}{unit}"
    if interval is not None:
        text += " [{:.{d}f}, {:.{d}f}]".format(*(scale * bound for bound in interval), d=digits)
    return text
