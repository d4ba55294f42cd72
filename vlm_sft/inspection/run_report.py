"""Write a training run, finished or interrupted, as one HTML page."""

import io
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Final

from vlm_sft.checkpoint.jsonl import has_step, read_rows
from vlm_sft.checkpoint.run_dir import EXPORT_OUTLOOK
from vlm_sft.utils.atomic_files import write_text
from vlm_sft.utils.console import echo
from vlm_sft.utils.html import data_uri, render_page
from vlm_sft.utils.output_files import has_mark
from vlm_sft.utils.ownership import made_by, set_aside
from vlm_sft.utils.reading import read_bytes, read_json

Row = Mapping[str, Any]

COMMAND: Final = "report"
"""Command in the ownership mark of reports."""

_SUITE_SCORES: Final = ("accuracy", "cider_d", "chair_s", "looks")
"""Scores of the suite with curves; `metrics.jsonl` has all of them."""

_MANIFEST: Final = "manifest.json"
_BUCKETS: Final = {
    "trained": "used completely",
    "evaluated": "used completely",
    "turns_dropped": "used, with turns dropped",
}
"""Display names of the ledger's buckets that differ from their names."""


def write_run_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the contents of a run directory as one HTML page.

    A file that the run did not write, such as the generated samples, has no section. Damaged lines
    and files are skipped and counted on the page.

    Args:
        run_dir: Output directory of the run.
        out: The page; an existing file is replaced. None: `report.html` in the run directory; a
            file there that this toolkit did not write is kept under another name.

    Returns:
        The path of the page.

    Raises:
        OSError: A file cannot be read, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    html = _RunFiles(run_dir).render()
    if out is None:
        keep_file_of_others(run_dir / "report.html")
    path = Path(out) if out is not None else run_dir / "report.html"
    write_text(path, html)
    return path


class _RunFiles:
    """Read the files of a run directory; count their damaged lines."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.damaged: dict[str, int] = {}

    def render(self) -> str:
        """Return the page."""
        metrics = self._read_rows("metrics.jsonl")
        samples = self._read_rows("samples.jsonl")
        last_step = samples[-1].get("step") if samples else None
        manifest = self._newest_manifest()
        config = self.run_dir / "config.yaml"
        values = {
            "totals": self._totals(metrics),
            "curves": data_uri(loss_curves({"": metrics})) if metrics else "",
            "suite": data_uri(suite_curves(metrics)) if _suite_points(metrics) else "",
            "modules": self._read_json("parts.json", lambda rows: [dict(row) for row in rows]),
            "export": self._read_json(EXPORT_OUTLOOK, lambda value: value["hf"].strip()),
            "ledgers": [
                (title, self._ledger(name))
                for name, title in (
                    ("ledger.jsonl", "Training records"),
                    ("ledger_eval.jsonl", "Validation records"),
                )
            ],
            "steps": self._trained_steps(),
            "sample_step": last_step,
            "samples": [row for row in samples if row.get("step") == last_step],
            "manifest": manifest,
            "versions": software_versions() if not manifest else [],
            "config": read_bytes(config).decode(errors="replace") if config.exists() else None,
        }
        return render_page(
            __package__,
            "run_report.html",
            title=f"Run {self.run_dir.resolve().name}",
            lead=str(self.run_dir),
            command=COMMAND,
            **values,
            damaged=self.damaged,  # last: the lines above count the damaged lines
        )

    def _totals(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return the run's totals by name; empty if no training step was logged."""
        train = [row for row in rows if _number(row, "loss") is not None]
        if not train:
            return {}
        finished = (self.run_dir / "final" / _MANIFEST).is_file()
        last = train[-1]
        validations = [row for row in rows if _number(row, "eval_loss") is not None]
        totals = {
            "state": "finished" if finished else "not finished",
            "last logged step": f"{last['step']:,}",
            f"training loss at step {last['step']:,}": f"{last['loss']:.4f}",
        }
        if validations:
            newest = validations[-1]
            totals[f"validation loss at step {newest['step']:,}"] = f"{newest['eval_loss']:.4f}"
        if failed := sum("eval_error" in row for row in rows):
            totals["failed evaluations"] = f"{failed:,}"
        for key, name in (
            ("samples_per_second", "samples per second (median of the logged steps)"),
            ("target_tokens_per_second", "trained tokens per second (median of the logged steps)"),
        ):
            values = [value for row in train if (value := _number(row, key)) is not None]
            if values:
                totals[name] = f"{median(values):,.1f}"
        memory = [value for row in rows if (value := _number(row, "memory_bytes")) is not None]
        if memory:
            # Each row has the peak of the process that wrote it, and every start of a resumed run
            # is a new process.
            totals["peak memory of rank 0 over all starts"] = f"{max(memory) / 2**30:.1f} GiB"
        return totals

    def _ledger(self, name: str) -> list[dict[str, str]]:
        """Return the number of records per bucket and reason."""
        counts: Counter[tuple[str, str]] = Counter()
        for row in self._read_rows(name, is_row=lambda row: True):
            if bucket := row.get("bucket"):
                counts[str(bucket), str(row.get("reason") or "")] += 1
        return [
            {"outcome": _BUCKETS.get(bucket, bucket), "reason": reason, "records": f"{count:,}"}
            for (bucket, reason), count in counts.most_common()
        ]

    def _trained_steps(self) -> dict[str, int] | None:
        """Count the steps of `trained.jsonl`; None without that file."""
        rows = self._read_rows("trained.jsonl")
        if not rows:
            return None
        lists = [row["records"] for row in rows if isinstance(row.get("records"), list)]
        return {
            "steps": len(rows),
            "records": len({str(record) for records in lists for record in records}),
            "uses": sum(map(len, lists)),
            "skipped_updates": sum("update_left_out" in row for row in rows),
        }

    def _newest_manifest(self) -> dict[str, Any] | None:
        """Return the manifest of the newest checkpoint that has a valid one."""
        steps = sorted((self.run_dir / "checkpoints").glob(f"step-*/{_MANIFEST}"), reverse=True)
        for path in (self.run_dir / "final" / _MANIFEST, *steps):
            try:
                found = read_json(path)
            except (OSError, ValueError):
                continue
            if isinstance(found, dict) and isinstance(found.get("software"), dict):
                return found
        return None

    def _read_rows(
        self, name: str, *, is_row: Callable[[dict[str, Any]], bool] = has_step
    ) -> list[dict[str, Any]]:
        """Return the valid rows of a JSON Lines file, and count its damaged lines."""
        found = read_rows(self.run_dir / name, is_row=is_row)
        if found.num_damaged:
            self.damaged[name] = found.num_damaged
        return found.rows

    def _read_json(self, name: str, select: Callable[[Any], Any]) -> Any:
        """Return what `select` takes from a JSON file; None if the file is missing or damaged."""
        path = self.run_dir / name
        if not path.exists():
            return None
        try:
            return select(read_json(path))
        except (ValueError, TypeError, LookupError, AttributeError):
            self.damaged[name] = 1
            return None


def keep_file_of_others(path: Path) -> None:
    """Rename a file that is about to be replaced, unless a report was written there before."""
    if os.path.lexists(path) and (not path.is_file() or not has_mark(path, COMMAND)):
        kept = set_aside(path)
        echo(f"warning: {path} was not written by vlm_sft {COMMAND}; it was renamed to {kept}")


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
            points = [(row["step"], row[key]) for row in rows if _number(row, key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, ms=4, lw=1.5)
        panel.set(title=title, xlabel="step", ylabel="loss (nats per token)")
        panel.grid(alpha=0.25)
        if panel.lines:
            panel.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": made_by(COMMAND)})
    return buffer.getvalue()


def suite_curves(rows: Sequence[Row]) -> bytes:
    """Draw the suite's main metrics over the step, one panel per score, as a PNG."""
    from matplotlib.figure import Figure

    points = _suite_points(rows)
    figure = Figure(figsize=(5.2 * len(points), 3.4), dpi=130, layout="constrained")
    for panel, (score, by_task) in zip(
        figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True
    ):
        for task, found in by_task.items():
            panel.plot(*zip(*found, strict=True), "o-", label=task, ms=4, lw=1.5)
        panel.set(title=score, xlabel="step")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": made_by(COMMAND)})
    return buffer.getvalue()


def _suite_points(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return step and value of the suite's main metrics, by score and task."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        values: Any = row.get("eval_suite")
        for name in values if isinstance(values, dict) else ():
            task, _, score = name.partition(".")
            value = _number(values, name)
            if score in _SUITE_SCORES and value is not None:
                points.setdefault(score, {}).setdefault(task, []).append((row["step"], value))
    return points


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


def _number(row: Row, key: str) -> float | None:
    """Return a finite number of a row; None for anything else."""
    value = row.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 1e300 else None  # no NaN, infinity or huge integer
