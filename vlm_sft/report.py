"""Write a run's settings, curves and answers as one HTML page: `python -m vlm_sft.report RUN`."""

import io
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from vlm_sft.checkpoint.jsonl import has_step, read_rows
from vlm_sft.checkpoint.run_dir import EXPORT_OUTLOOK, WRITTEN
from vlm_sft.commands.parser import CommandParser
from vlm_sft.data.images import open_image
from vlm_sft.errors import UserError, run_command
from vlm_sft.utils.atomic_files import write_bytes, write_text
from vlm_sft.utils.console import say
from vlm_sft.utils.html import embedded_image, page, section, table
from vlm_sft.utils.ownership import (
    has_mark,
    made_by,
    refuse_in_checkpoint,
    require_output_file,
    set_aside,
)
from vlm_sft.utils.progress import format_seconds
from vlm_sft.utils.reading import read_bytes, read_json

Row = Mapping[str, Any]

COMMAND = "report"
"""Name in the marks of reports."""

MANIFEST = "manifest.json"

WRITTEN_BY_RUNS = ("metrics.jsonl", "ledger.jsonl", "parts.json", "checkpoints", "final")
"""Names of which every run's folder has one."""

ABOUT = "Write a run, finished or interrupted, as one HTML page."

EXAMPLES = """\
examples:
  # RUN/report.html, also of a run that was interrupted
  python -m vlm_sft.report runs/stage2_lora

  # a page somewhere else
  python -m vlm_sft.report runs/stage2_lora --out stage2.html
"""

READINGS = {
    "right": "its own",
    "blank": "blank",
    "shuffled": "another one",
    "difference": "another one minus its own",
}
HOW_ANSWERED = {
    "likeliest": "Each question is answered by the likeliest of its possible answers.",
    "spoken": "The model answers freely; the last verdict it says counts, and none is wrong.",
}


@dataclass(frozen=True)
class ShownImage:
    """An image with the questions that the model was asked and its answers.

    Attributes:
        exchanges: Pairs of question and answer.
        expected: The true answer of each exchange, e.g. `yes`, None where it is open; empty where
            none is known. An answer is marked right if this is the last of its kind that it says.
    """

    path: Path
    exchanges: Sequence[tuple[str, str]]
    expected: Sequence[str | None] = ()


@dataclass(frozen=True)
class DemoReport:
    """What the quickstart has to show.

    Attributes:
        runs: Run folders by title, e.g. `Stage 1`, in order.
        results: What `vlm_sft.evaluate` wrote, by title.
        seconds: How long each phase took.
    """

    title: str
    lead: str
    images: Sequence[ShownImage]
    runs: Mapping[str, Path]
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    credits: Sequence[str] = ()


def main(argv: Sequence[str]) -> int:
    """Write the report of a run, finished or interrupted, and print where it is.

    Raises:
        UserError: The folder is no run's, or the page would replace a file of another origin.
    """
    arguments = parser().read(argv)
    run = arguments.run
    if not any((run / name).exists() for name in WRITTEN_BY_RUNS):
        raise UserError(
            f"{run}: not the output_dir of a training run (it has none of "
            f"{', '.join(WRITTEN_BY_RUNS)}); give the folder that a stage trained in"
        )
    out = arguments.out or run / "report.html"
    kept = [run / name for name in sorted(WRITTEN - {"report.html"})]
    out = require_output_file(out, inputs=kept, command=COMMAND, overwrite=arguments.overwrite)
    say(write_run_report(run, out), file=sys.stdout)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("python -m vlm_sft.report", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the output_dir of a training run")
    add("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    add("--overwrite", action="store_true", help="replace FILE although another program wrote it")
    return parser


def write_run_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write what a run's folder holds as one HTML page, finished or not.

    Files that the run did not write (held-out answers, say) have no section. Damaged lines and
    files are counted in the page and otherwise skipped.

    Args:
        run_dir: The run's folder.
        out: The page, which is replaced; None: `report.html` in the folder, where a file that this
            toolkit did not write is kept under another name.

    Returns:
        The page's path.

    Raises:
        OSError: A file cannot be read or the page cannot be written.
    """
    run_dir = Path(run_dir)
    damaged: dict[str, int] = {}
    rows = _read(run_dir / "metrics.jsonl", damaged)
    manifest = _newest_manifest(run_dir)
    body = [_run_totals(rows, run_dir)]
    if rows:
        body.append(section("Loss", embedded_image(curves_png({"": rows}), "curve", "loss curves")))
    body += _run_parts(run_dir, damaged)
    body += _export_outlook(run_dir, damaged)
    body += _ledgers(run_dir, damaged)
    samples = _read(run_dir / "samples.jsonl", damaged)
    if samples:
        last = samples[-1].get("step")
        newest = [_shown(row) for row in samples if row.get("step") == last]
        columns = ("id", "question", "answer", "expected")
        body.append(section(f"Held-out answers at step {last}", table(columns, newest)))
    body += _software(manifest)
    body += _settings(run_dir)
    body += _damaged(damaged)
    if out is None:
        _keep_foreign(run_dir / "report.html")
    path = Path(out) if out is not None else run_dir / "report.html"
    write_text(path, page(f"Run {run_dir.resolve().name}", str(run_dir), body, command=COMMAND))
    return path


def write_demo_report(report: DemoReport, path: str | Path) -> Path:
    """Write one HTML page with everything inside it, and the curves beside it as a PNG.

    The PNG has the page's name with `.png`. Returns the page's path. Files of these names that
    this toolkit did not write are kept under other names.
    """
    path = Path(path)
    refuse_in_checkpoint(path)
    for written in (path, path.with_suffix(".png")):
        _keep_foreign(written)
    curves = curves_png(
        {title: read_rows(d / "metrics.jsonl").rows for title, d in report.runs.items()}
    )
    write_bytes(path.with_suffix(".png"), curves)
    cards = "".join(_image_card(shown) for shown in report.images)
    body = [_headline(report.results), f'<div class="grid">{cards}</div>']
    for title, results in report.results.items():
        body.append(section(f"Held-out: {title}", results_html(results)))
    body.append(section("Loss", embedded_image(curves, "curve", "loss curves of every stage")))
    if report.seconds:
        timing = [{"phase": k, "time": format_seconds(v)} for k, v in report.seconds.items()]
        total = format_seconds(sum(report.seconds.values()))
        timing.append({"phase": "together", "time": total})
        body.append(section("Time", table(("phase", "time"), timing)))
    body.append(section("Environment", table(("what", "version"), environment())))
    if report.credits:
        lines = "".join(f"<p>{escape(line)}</p>" for line in report.credits)
        body.append(section("Credits", lines))
    write_text(path, page(report.title, report.lead, body, command=COMMAND))
    return path


def _keep_foreign(path: Path) -> None:
    """Rename a file that is about to be replaced unless a report was written there before."""
    if os.path.lexists(path) and (not path.is_file() or not has_mark(path, COMMAND)):
        kept = set_aside(path)
        say(f"warning: {path} was not written by vlm_sft {COMMAND}; it is now {kept}")


def curves_png(runs: Mapping[str, Sequence[Row]]) -> bytes:
    """Training and held-out loss against the step, one panel a run, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * max(1, len(runs)), 3.4), dpi=130, layout="constrained")
    axes = figure.subplots(1, max(1, len(runs)), squeeze=False)[0]
    for panel, (title, rows) in zip(axes, runs.items(), strict=False):
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
            points = [(row["step"], row[key]) for row in rows if _number(row, key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, ms=4, lw=1.5)
        panel.set(title=title, xlabel="step", ylabel="loss, nats a token")
        panel.grid(alpha=0.25)
        if panel.lines:
            panel.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": made_by(COMMAND)})
    return buffer.getvalue()


def results_html(results: Mapping[str, Any]) -> str:
    """What `vlm_sft.evaluate` found, as a table with intervals."""
    rows = []
    for name, conditions in results.get("probes", {}).items():
        for condition, found in conditions.items():
            rows.append(
                {
                    "measure": name,
                    "image shown": READINGS[condition],
                    "n": f"{found['questions']:,}",
                    "result [95 % interval]": _percent(found["accuracy"]),
                    "guessing": f"{100 * found['chance']:.0f} %",
                }
            )
    captions = results.get("captions", {})
    for condition in ("right", "shuffled", "difference"):
        if condition in captions:
            rows.append(
                {
                    "measure": "caption loss, nats a token",
                    "image shown": READINGS[condition],
                    "n": f"{captions['records']:,}",
                    "result [95 % interval]": _interval(captions[condition]),
                    "guessing": "",
                }
            )
    columns = ("measure", "image shown", "n", "result [95 % interval]", "guessing")
    answered = HOW_ANSWERED[results.get("answers", "likeliest")]
    note = (
        f"{answered} With a blank image a model can only guess; what it gains over that, it has "
        "seen."
    )
    return f'{table(columns, rows)}<p class="note">{note}</p>'


def environment() -> list[dict[str, str]]:
    """Versions of what a run rests on."""
    rows = [{"what": "Python", "version": platform.python_version()}]
    for name in ("vlm-sft", "torch", "transformers", "timm", "peft", "accelerate"):
        try:
            rows.append({"what": name, "version": version(name)})
        except PackageNotFoundError:
            rows.append({"what": name, "version": "not installed"})
    return [*rows, {"what": "machine", "version": f"{platform.system()} {platform.machine()}"}]


def _run_totals(rows: Sequence[Row], run_dir: Path) -> str:
    train = [row for row in rows if _number(row, "loss") is not None]
    if not train:
        return "<p>No training step has been recorded yet.</p>"
    finished = (run_dir / "final" / MANIFEST).is_file()
    last, held_out = train[-1], [row for row in rows if _number(row, "eval_loss") is not None]
    facts = {
        "state": "finished" if finished else "not finished",
        "steps recorded": f"{last['step']:,}",
        f"training loss at step {last['step']:,}": f"{last['loss']:.4f}",
    }
    if held_out:
        newest = held_out[-1]
        facts[f"held-out loss at step {newest['step']:,}"] = f"{newest['eval_loss']:.4f}"
    if failed := sum("eval_error" in row for row in rows):
        facts["evaluations that failed"] = f"{failed:,}"
    for key, name in (
        ("samples_per_second", "samples a second, median of the recorded steps"),
        ("target_tokens_per_second", "supervised tokens a second, median of the recorded steps"),
    ):
        values = [value for row in train if (value := _number(row, key)) is not None]
        if values:
            facts[name] = f"{median(values):,.1f}"
    memory = [value for row in rows if (value := _number(row, "memory_bytes")) is not None]
    if memory:
        # A row has the peak of the process that wrote it; a resumed run has several.
        facts["peak memory of the first process over all starts"] = f"{max(memory) / 2**30:.1f} GiB"
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()
    )
    return f'<dl class="card grid">{items}</dl>'


def _run_parts(run_dir: Path, damaged: dict[str, int]) -> list[str]:
    path = run_dir / "parts.json"
    if not path.exists():
        return []
    try:
        parts = read_json(path)
        return [section("Parts", table(tuple(parts[0]), parts))] if parts else []
    except (ValueError, TypeError, LookupError, AttributeError):
        damaged[path.name] = 1
        return []


def _export_outlook(run_dir: Path, damaged: dict[str, int]) -> list[str]:
    """Return a line about `export --to hf`, as the run found it out at its start."""
    path = run_dir / EXPORT_OUTLOOK
    if not path.exists():
        return []
    try:
        words = read_json(path)["hf"]
        return [f'<p class="note">{escape(f"export --to hf: {words.strip()}")}</p>']
    except (ValueError, TypeError, LookupError, AttributeError):
        damaged[path.name] = 1
        return []


USED = {
    "trained": "used whole",
    "evaluated": "used whole",
    "turns_dropped": "used with turns dropped",
}
"""What a ledger's bucket means, where it is not a word of its own."""


def _ledgers(run_dir: Path, damaged: dict[str, int]) -> list[str]:
    sections = []
    for name, title in (("ledger", "Training records"), ("ledger_eval", "Held-out records")):
        rows = _read(run_dir / f"{name}.jsonl", damaged, is_row=lambda row: True)
        counts: Counter[tuple[str, str]] = Counter()
        for row in rows:
            if bucket := row.get("bucket"):
                counts[str(bucket), str(row.get("reason") or "")] += 1
        if counts:
            found = [
                {
                    "what became of it": USED.get(bucket, bucket),
                    "reason": reason,
                    "records": f"{count:,}",
                }
                for (bucket, reason), count in counts.most_common()
            ]
            seen = _seen(run_dir, damaged) if name == "ledger" else ""
            sections.append(section(title, table(tuple(found[0]), found) + seen))
    return sections


def _seen(run_dir: Path, damaged: dict[str, int]) -> str:
    """How many records the steps so far have trained on, which the ledger does not know."""
    rows = _read(run_dir / "trained.jsonl", damaged)
    if not rows:
        return ""
    lists = [row["records"] for row in rows if isinstance(row.get("records"), list)]
    seen = {str(record) for records in lists for record in records}
    skipped = sum("update_left_out" in row for row in rows)
    text = (
        f"{len(rows):,} steps are on record; they trained on {len(seen):,} different record ids, "
        f"{sum(map(len, lists)):,} times in all."
    )
    if skipped:
        text += f" The update of {skipped:,} of these steps was left out."
    return f'<p class="note">{escape(text)}</p>'


def _read(
    path: Path, damaged: dict[str, int], *, is_row: Callable[[dict[str, Any]], bool] = has_step
) -> list[dict[str, Any]]:
    """Read a file of the run and count its damaged lines."""
    found = read_rows(path, is_row=is_row)
    if found.num_damaged:
        damaged[path.name] = found.num_damaged
    return found.rows


def _damaged(damaged: Mapping[str, int]) -> list[str]:
    if not damaged:
        return []
    rows = [{"file": name, "lines": f"{count:,}"} for name, count in damaged.items()]
    return [section("Damaged lines that are left out of this page", table(("file", "lines"), rows))]


def _number(row: Row, key: str) -> float | None:
    """Return a finite number of a row; None for anything else."""
    value = row.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 1e300 else None  # no NaN, infinity or huge integer


def _shown(row: Row) -> dict[str, str]:
    return {key: str(row.get(key, "")) for key in ("id", "question", "answer", "expected")}


def _newest_manifest(run_dir: Path) -> dict[str, Any]:
    """Return the manifest of the last checkpoint that has a readable one; empty without."""
    steps = sorted((run_dir / "checkpoints").glob(f"step-*/{MANIFEST}"), reverse=True)
    for path in (run_dir / "final" / MANIFEST, *steps):
        try:
            found = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and isinstance(found.get("software"), dict):
            return found
    return {}


def _software(manifest: Mapping[str, Any]) -> list[str]:
    """What the run was trained with, by its newest checkpoint; else what writes this page."""
    if not manifest:
        return [section("Software that wrote this page", table(("what", "version"), environment()))]
    rows = [{"what": k, "version": str(v)[:12]} for k, v in manifest["software"].items()]
    title = f"Software of the checkpoint of step {manifest.get('step')}"
    return [section(title, table(("what", "version"), rows))]


def _settings(run_dir: Path) -> list[str]:
    path = run_dir / "config.yaml"
    if not path.exists():
        return []
    text = escape(read_bytes(path).decode(errors="replace"))
    return [
        section("Settings", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    ]


def _headline(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The first measure's accuracy in large figures: each set's images, then blank ones."""
    cells = []
    for condition in ("right", "blank"):
        # One blank is as good as another: the last set's stands for all.
        for title, found in list(results.items())[-1 if condition == "blank" else 0 :]:
            probes: Mapping[str, Mapping[str, Any]] = found.get("probes", {})
            if not probes:
                continue
            measure, by_condition = next(iter(probes.items()))
            if condition in by_condition:
                share = by_condition[condition]["accuracy"]
                where = f"{measure}, {title}" + (", blank image" if condition == "blank" else "")
                bounds = f"{100 * share['low']:.1f} to {100 * share['high']:.1f} %"
                cells.append(
                    f'<div class="card"><div class="big">{100 * share["estimate"]:.1f} %</div>'
                    f'<div>{escape(where)}</div><div class="note">95 % interval {bounds}; '
                    f"guessing {100 * by_condition[condition]['chance']:.0f} %</div></div>"
                )
    return f'<div class="grid headline">{"".join(cells)}</div>' if cells else ""


def _mark(answer: str, expected: str | None) -> str:
    if expected is None:
        return ""
    from vlm_sft.evaluation.probes import closed_set, spoken_choice  # imports torch

    if spoken_choice(answer, closed_set(expected)) == expected.lower():
        return ' <span class="right">✓ right</span>'
    return f' <span class="wrong">✗ wrong, it is {escape(expected)}</span>'


def _image_card(shown: ShownImage) -> str:
    photo = open_image(shown.path)
    photo.thumbnail((640, 640))
    buffer = io.BytesIO()
    photo.save(buffer, format="JPEG", quality=85)
    expected = shown.expected or [None] * len(shown.exchanges)
    said = "".join(
        f"<dt>{escape(asked)}</dt><dd>{escape(answer)}{_mark(answer, truth)}</dd>"
        for (asked, answer), truth in zip(shown.exchanges, expected, strict=True)
    )
    shown_as = embedded_image(buffer.getvalue(), "", shown.path.name, kind="jpeg")
    return f'<article class="card">{shown_as}<dl>{said}</dl></article>'


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _percent(found: Mapping[str, float]) -> str:
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['estimate']:.1f} % [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    run_command(main)
