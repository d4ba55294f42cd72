"""Write training runs, running, interrupted or finished, as one HTML page."""

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Final

from vlm_sft.checkpoint.run_dir import SAMPLE_IMAGES
from vlm_sft.inspection.charts import Chart, Series, shown_number
from vlm_sft.inspection.run_data import (
    RunData,
    Start,
    different_settings,
    mean_of_last,
    minutes_since,
    number,
    read_run,
)
from vlm_sft.utils.atomic_files import write_text
from vlm_sft.utils.console import echo
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.html import data_uri, render_page
from vlm_sft.utils.output_files import has_mark
from vlm_sft.utils.ownership import set_aside
from vlm_sft.utils.progress import format_seconds
from vlm_sft.utils.reading import read_bytes

COMMAND: Final = "report"
"""Command in the ownership mark of reports."""

MAX_ANSWERS: Final = 8
"""Answers to one question that the page shows: the first, the last, and some in between."""

_SUITE_SCORES: Final = ("accuracy", "cider_d", "chair_s", "looks")
"""Scores of the suite with curves; all of them are in a table."""

_BUCKETS: Final = {
    "trained": "used completely",
    "evaluated": "used completely",
    "turns_dropped": "used, with turns dropped",
}
"""Display names of the ledger's buckets that differ from their names."""

_IMAGE_NAME: Final = re.compile(r"[0-9a-f]{16}\.jpg")


@dataclass(frozen=True)
class Run:
    """What the page shows of one run, by the names that the template uses."""

    data: RunData
    name: str

    @property
    def totals(self) -> dict[str, str]:
        """The run's totals by name; without the losses if no training step was logged."""
        return {**_state(self.data), **_totals(self.data)}

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts, with what each changed."""
        found: list[dict[str, Any]] = []
        before: Start | None = None
        for start in self.data.starts:
            found.append(
                {
                    "at": start.at.replace("T", " ").removesuffix("+00:00"),
                    "from step": f"{start.step:,}",
                    "last save": f"{start.last_step:,}",
                    "end": start.how or self._unlogged_end(start),
                    "machine": start.machine,
                    "changed": [*_changes(start), *_changed_software(before, start)],
                }
            )
            before = start
        return found

    def _unlogged_end(self, start: Start) -> str:
        is_last = start is self.data.starts[-1]
        return "running" if is_last and self.data.state == "running" else "killed (none was logged)"

    @property
    def phases(self) -> list[dict[str, str]]:
        """Time and share of every phase."""
        seconds = self.data.seconds
        total = sum(seconds.values())
        return [
            {"phase": name, "time": format_seconds(value), "share": f"{100 * value / total:.1f} %"}
            for name, value in seconds.items()
            if total > 0
        ]

    @property
    def ledgers(self) -> list[tuple[str, list[dict[str, str]]]]:
        """Number of records per outcome and reason, with a message of each."""
        return [
            (
                f"{title.capitalize()} records",
                [
                    {
                        "outcome": _BUCKETS.get(bucket, bucket),
                        "reason": reason,
                        "records": f"{count:,}",
                        "for example": "\n".join(
                            shortened(text, 300)
                            for text in self.data.messages[title].get((bucket, reason), ())
                        ),
                    }
                    for (bucket, reason), count in counts.most_common()
                ],
            )
            for title, counts in self.data.ledgers.items()
        ]

    @property
    def questions(self) -> list[dict[str, Any]]:
        """The generated answers by question, over the steps."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self.data.samples:
            key = str(row.get("id", "")), str(row.get("question", ""))
            question = found.setdefault(
                key,
                {
                    "id": key[0],
                    "question": shortened(key[1].strip(), 600),
                    "expected": shortened(str(row.get("expected", "")), 600),
                    "images": list(_images(self.data.run_dir, row.get("images"))),
                    "answers": [],
                },
            )
            question["answers"].append((row["step"], shortened(str(row.get("answer", "")), 600)))
        for question in found.values():
            question["num_answers"] = len(question["answers"])
            question["answers"] = _spread(question["answers"], MAX_ANSWERS)
        return list(found.values())

    @property
    def suite_rows(self) -> list[dict[str, str]]:
        """First and last value of every metric of the suite."""
        rows = []
        for name in self.data.names("eval_suite"):
            points = self.data.points(f"eval_suite.{name}")
            values = [shown_number(value) for _, value in points] or ["-"]
            lowest, highest = (
                (shown_number(pick(value for _, value in points)) if points else "-")
                for pick in (min, max)
            )
            rows.append({"metric": name, "first": values[0], "last": values[-1]})
            rows[-1] |= {"lowest": lowest, "highest": highest}
        return rows

    @property
    def evaluations(self) -> list[tuple[str, list[dict[str, str]]]]:
        """Main scores of the suites that were evaluated into the run directory."""
        return [
            (f"Evaluation in {name}", [_score(row) for row in rows])
            for name, rows in self.data.evaluations.items()
        ]

    @property
    def software(self) -> list[dict[str, str]]:
        """Versions of the newest checkpoint; of this process if there is none."""
        versions = self.data.software.items()
        return [{"software": name, "version": value[:12]} for name, value in versions] or (
            software_versions()
        )

    @property
    def config(self) -> str | None:
        """The text of `config.yaml`, or None."""
        path = self.data.run_dir / "config.yaml"
        return read_bytes(path).decode(errors="replace") if path.is_file() else None


def write_run_report(
    run_dir: str | Path, out: str | Path | None = None, *, is_running: bool | None = None
) -> Path:
    """Write the contents of a run directory as one HTML page.

    Damaged lines and files are skipped and counted on the page.

    Args:
        run_dir: Output directory of the run.
        out: The page; an existing file is replaced. None: `report.html` in the run directory; a
            file there that this toolkit did not write is kept under another name.
        is_running: Whether the run is being trained; None: whether a process has locked it.

    Returns:
        The path of the page.

    Raises:
        OSError: A file cannot be read, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    html = report_page([read_run(run_dir, is_running=is_running)])
    if out is None:
        keep_file_of_others(run_dir / "report.html")
    path = Path(out) if out is not None else run_dir / "report.html"
    write_text(path, html)
    return path


def report_page(found: Sequence[RunData]) -> str:
    """Return the page of one run, or of several with a comparison in front."""
    names = _names([run.run_dir for run in found])
    runs = [Run(run, name) for run, name in zip(found, names, strict=True)]
    several = len(runs) > 1
    return render_page(
        __package__,
        "run_report.html",
        title=f"{len(runs)} runs" if several else f"Run {found[0].run_dir.resolve().name}",
        lead=", ".join(names) if several else str(found[0].run_dir),
        command=COMMAND,
        script="charts.js",
        runs=runs,
        overview=_side_by_side([run.totals for run in runs], runs),
        charts=[chart for chart in _charts(runs) if chart.svg],
        settings=_difference([run.settings for run in found], runs),
        software=_difference([run.software for run in found], runs),
        max_answers=MAX_ANSWERS,
    )


def keep_file_of_others(path: Path) -> None:
    """Rename a file that is about to be replaced, unless a report was written there before."""
    if os.path.lexists(path) and (not path.is_file() or not has_mark(path, COMMAND)):
        kept = set_aside(path)
        echo(f"warning: {path} was not written by vlm_sft {COMMAND}; it was renamed to {kept}")


def software_versions() -> list[dict[str, str]]:
    """Return the versions of Python and the main packages, and the machine."""
    rows = [{"software": "Python", "version": platform.python_version()}]
    for name in ("vlm-sft", "torch", "transformers", "timm", "peft", "accelerate"):
        try:
            rows.append({"software": name, "version": version(name)})
        except PackageNotFoundError:
            rows.append({"software": name, "version": "not installed"})
    machine = f"{platform.system()} {platform.machine()}"
    return [*rows, {"software": "machine", "version": machine}]


def _state(run: RunData) -> dict[str, str]:
    """Return the state of a run, and what that means."""
    words = {"interrupted": "not finished"}.get(run.state, run.state)
    last = run.starts[-1] if run.starts else None
    if run.state == "interrupted" and last is not None:
        words += f": {last.how or 'killed (no end was logged)'}"
    if run.state == "running" and last is not None:
        minutes = minutes_since(last.at)
        words += "" if minutes is None else f" for {format_seconds(60 * minutes)}"
    values = {"state": words}
    if run.stage:
        values["stage"] = run.stage
    if run.state == "running" and (left := _seconds_left(run)) is not None:
        values["time left (estimate)"] = format_seconds(left)
    return values


def _seconds_left(run: RunData) -> float | None:
    rows = [row for row in run.train_rows if number(row.get("seconds")) is not None][-50:]
    if len(rows) < 2 or run.total_steps is None or rows[-1]["step"] <= rows[0]["step"]:
        return None
    per_step = (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"])
    return max(0.0, per_step * (run.total_steps - rows[-1]["step"]))


def _totals(run: RunData) -> dict[str, str]:
    """Return the totals of the logged rows; empty if no training step was logged."""
    rows = run.train_rows
    if not rows:
        return {}
    step = rows[-1]["step"]
    of_all = f" of {run.total_steps:,}" if run.total_steps else ""
    totals = {"last logged step": f"{step:,}{of_all}"}
    losses, validations = run.points("loss"), run.points("eval_loss")
    if losses:
        totals[f"training loss at step {losses[-1][0]:,}"] = f"{losses[-1][1]:.4f}"
    if (text := run.text_loss) is not None:
        totals["loss of held-out text, before and after"] = (
            f"{text['before']:.4f} → {text['after']:.4f} ({text['change']:+.4f})"
        )
    if len(losses) > 20:
        totals["training loss, mean of the last 20 logged"] = f"{mean_of_last(losses):.4f}"
    if validations:
        totals[f"validation loss at step {validations[-1][0]:,}"] = f"{validations[-1][1]:.4f}"
        best = min(validations, key=lambda point: point[1])
        totals["lowest validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
    if failed := sum("eval_error" in row for row in run.metrics):
        totals["failed evaluations"] = f"{failed:,}"
    if unusable := sum(number(row["loss"]) is None for row in rows):
        totals["logged steps whose loss is not finite"] = f"{unusable:,}"
    for key, name in (
        ("samples_per_second", "samples per second (median of the logged steps)"),
        ("target_tokens_per_second", "trained tokens per second (median of the logged steps)"),
    ):
        if points := run.points(key):
            totals[name] = f"{median(value for _, value in points):,.1f}"
    if memory := run.points("memory_bytes"):
        # Each row has the peak of the process that wrote it, and every start of a resumed run
        # is a new process.
        peak = max(value for _, value in memory)
        totals["peak memory of rank 0 over all starts"] = f"{peak / 2**30:.1f} GiB"
    if total := sum(run.seconds.values()):
        totals["time, all starts"] = format_seconds(total)
    elif seconds := run.points("seconds"):
        totals["time in the training loop"] = format_seconds(seconds[-1][1])
    return totals


def _charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield the charts of one run, or of several with a curve for each."""
    several = len(runs) > 1

    def curves(key: str, name: str = "", *, dots: bool = False, scale: float = 1) -> list[Series]:
        return [
            Series(
                " ".join(filter(None, (run.name if several else "", name))) or key,
                [(step, value * scale) for step, value in run.data.points(key)],
                dots,
            )
            for run in runs
        ]

    if several:
        yield Chart("training loss (nats per token)", curves("loss"))
        yield Chart("validation loss (nats per token)", curves("eval_loss", dots=True))
    else:
        losses = [*curves("loss", "training"), *curves("eval_loss", "validation", dots=True)]
        yield Chart("loss (nats per token)", losses)
    yield Chart("loss of held-out text (nats per token)", curves("text_loss", dots=True))
    parts = dict.fromkeys(part for run in runs for part in run.data.names("learning_rate"))
    rates = [series for part in parts for series in curves(f"learning_rate.{part}", part)]
    yield Chart("learning rate", rates)
    yield Chart("gradient norm before clipping", curves("grad_norm"))
    yield Chart("trained tokens per second", curves("target_tokens_per_second"))
    yield Chart("peak memory of rank 0 (GiB)", curves("memory_bytes", scale=1 / 2**30))
    metrics = dict.fromkeys(name for run in runs for name in run.data.names("eval_suite"))
    for score in _SUITE_SCORES:
        tasks = [name for name in metrics if name.partition(".")[2] == score]
        series = [
            curve
            for name in tasks
            for curve in curves(f"eval_suite.{name}", name.partition(".")[0], dots=True)
        ]
        yield Chart(f"suite: {score}", series)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths; as many as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _side_by_side(columns: Sequence[Mapping[str, str]], runs: Sequence[Run]) -> list[Any]:
    """Return a row for each total that any of the runs has."""
    # The step is part of some names, which differ between runs.
    renamed = [{re.sub(r" at step [\d,.]+$", "", k): v for k, v in c.items()} for c in columns]
    names = dict.fromkeys(name for column in renamed for name in column)
    return [
        {"": name, **{run.name: c.get(name, "-") for run, c in zip(runs, renamed, strict=True)}}
        for name in names
    ]


def _difference(values: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[dict[str, str]]:
    if len(runs) < 2:
        return []
    return [
        {
            "key": key,
            **{run.name: _shown(v) for run, v in zip(runs, row, strict=True)},
        }
        for key, row in different_settings(values).items()
    ]


def _shown(value: Any) -> str:
    return shortened("null" if value is None else str(value), 300)


def _changes(start: Start) -> list[str]:
    return [f"{key}: {_shown(then)} → {_shown(now)}" for key, then, now in start.changed]


def _changed_software(before: Start | None, start: Start) -> list[str]:
    if before is None:
        return []
    found = different_settings([before.software, start.software])
    changed = [f"{name}: {then[:12]} → {now[:12]}" for name, (then, now) in found.items()]
    if before.machine != start.machine:
        changed.append(f"machine: {before.machine} → {start.machine}")
    return changed


def _spread(answers: Sequence[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    """Return the first and the last answer, and some in between, evenly spread."""
    if len(answers) <= count:
        return list(answers)
    return [answers[i * (len(answers) - 1) // (count - 1)] for i in range(count)]


def _images(run_dir: Path, names: Any) -> Iterator[Any]:
    """Yield the images of a sample as data URIs; None for one that is missing."""
    for name in names if isinstance(names, list) else ():
        # Only what the run wrote itself: a row could name any file.
        path = run_dir / SAMPLE_IMAGES / str(name)
        if not _IMAGE_NAME.fullmatch(str(name)) or not path.is_file():
            yield None
        else:
            yield data_uri(read_bytes(path), "jpeg")


def _score(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row of `RunData.evaluations` as texts."""
    shown = "-" if row["value"] is None else f"{row['value']:.3f}"
    if row["interval"]:
        shown += " [{:.3f}, {:.3f}]".format(*row["interval"])
    texts = {name: str(row[name]) for name in ("task", "image", "score", "questions")}
    return {**texts, "value [95 %]": shown}
