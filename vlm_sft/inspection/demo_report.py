"""Write the quickstart's page: images with answers, evaluation results, loss curves and time."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlm_sft.checkpoint.jsonl import read_rows
from vlm_sft.data.images import open_image
from vlm_sft.inspection.run_report import (
    COMMAND,
    keep_file_of_others,
    loss_curves,
    software_versions,
)
from vlm_sft.utils.atomic_files import write_bytes, write_text
from vlm_sft.utils.html import data_uri, render_page
from vlm_sft.utils.ownership import refuse_in_checkpoint
from vlm_sft.utils.progress import format_seconds

_CONDITIONS: Final = {
    "right": "its own",
    "blank": "blank",
    "shuffled": "another one",
    "difference": "another one minus its own",
}
"""Display names of the evaluation's image conditions."""

_ANSWER_METHODS: Final = {
    "likeliest": "Each question is answered by the most likely of its possible answers.",
    "free_form": (
        "The model answers freely; the last possible answer in its text counts, and a text without "
        "one is wrong."
    ),
}


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
        results: Output of `vlm_sft.evaluate` by title.
        seconds: Duration of each phase.
        credits: One line per source of data or weights.
    """

    title: str
    lead: str
    images: Sequence[ShownImage]
    runs: Mapping[str, Path]
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
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
        results=[
            (title, _result_rows(found), _ANSWER_METHODS[found.get("answers", "likeliest")])
            for title, found in report.results.items()
        ],
        curves=data_uri(curves),
        seconds={name: format_seconds(value) for name, value in report.seconds.items()},
        total_time=format_seconds(sum(report.seconds.values())),
        versions=software_versions(),
        credits=report.credits,
    )
    write_text(path, html)
    return path


def _headline(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yield accuracy, caption and note of the first measure: own images first, then blank ones.

    Blank images are the same in every set of results, so only the last set's accuracy is shown.
    """
    for condition in ("right", "blank"):
        for title, found in list(results.items())[-1 if condition == "blank" else 0 :]:
            measures: Mapping[str, Mapping[str, Any]] = found.get("probes", {})
            if not measures:
                continue
            measure, by_condition = next(iter(measures.items()))
            if condition not in by_condition:
                continue
            accuracy, chance = (
                by_condition[condition]["accuracy"],
                by_condition[condition]["chance"],
            )
            caption = f"{measure}, {title}" + (", blank image" if condition == "blank" else "")
            bounds = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f} %"
            note = f"95 % interval {bounds}; chance {100 * chance:.0f} %"
            yield f"{100 * accuracy['estimate']:.1f} %", caption, note


def _image(image: ShownImage) -> dict[str, Any]:
    """Return a thumbnail with its questions, the answers, and whether they are right."""
    from vlm_sft.evaluation.questions import closed_set, last_choice  # imports torch

    thumbnail = open_image(image.path)
    thumbnail.thumbnail((640, 640))
    buffer = io.BytesIO()
    thumbnail.save(buffer, format="JPEG", quality=85)
    expected = image.expected or [None] * len(image.exchanges)
    return {
        "uri": data_uri(buffer.getvalue(), "jpeg"),
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
    for measure, by_condition in results.get("probes", {}).items():
        for condition, found in by_condition.items():
            low, high = 100 * found["accuracy"]["low"], 100 * found["accuracy"]["high"]
            accuracy = f"{100 * found['accuracy']['estimate']:.1f} % [{low:.1f}, {high:.1f}]"
            rows.append(
                {
                    "measure": measure,
                    "image": _CONDITIONS[condition],
                    "n": f"{found['questions']:,}",
                    "result [95 % interval]": accuracy,
                    "chance": f"{100 * found['chance']:.0f} %",
                }
            )
    captions = results.get("captions", {})
    for condition in ("right", "shuffled", "difference"):
        if condition in captions:
            loss = captions[condition]
            interval = f"[{loss['low']:.3f}, {loss['high']:.3f}]"
            rows.append(
                {
                    "measure": "caption loss (nats per token)",
                    "image": _CONDITIONS[condition],
                    "n": f"{captions['records']:,}",
                    "result [95 % interval]": f"{loss['estimate']:.3f} {interval}",
                }
            )
    return rows
