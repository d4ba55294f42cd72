"""Pages that tell a run's story: settings, curves, answers; one file, no scripts, no network."""

import io
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_sft.atomic import write_bytes, write_text
from vlm_sft.evaluation.probes import closed_set, spoken_choice
from vlm_sft.page import page, picture, section, table
from vlm_sft.progress import format_seconds

Row = Mapping[str, Any]

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
class ShownPicture:
    """A picture with the questions that the model was asked and its answers.

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
    pictures: Sequence[ShownPicture]
    runs: Mapping[str, Path]
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    credits: Sequence[str] = ()


def write_run_report(run_dir: str | Path) -> Path:
    """Write `report.html` from what a run's folder holds; returns its path.

    Files that the run did not write (held-out answers, say) have no section.
    """
    run_dir = Path(run_dir)
    rows = read_rows(run_dir / "metrics.jsonl")
    body = [_run_totals(rows)]
    if rows:
        body.append(section("Loss", picture(curves_png({"": rows}), "curve", "loss curves")))
    body += _run_parts(run_dir)
    body += _ledgers(run_dir)
    samples = read_rows(run_dir / "samples.jsonl")
    if samples:
        last = samples[-1].get("step")
        newest = [row for row in samples if row.get("step") == last]
        columns = ("id", "question", "answer", "expected")
        body.append(section(f"Held-out answers at step {last}", table(columns, newest)))
    body.append(section("Environment", table(("what", "version"), environment())))
    body += _settings(run_dir)
    path = run_dir / "report.html"
    write_text(path, page(f"Run {run_dir.name}", str(run_dir), body))
    return path


def write_demo_report(report: DemoReport, path: str | Path) -> Path:
    """Write one HTML page with everything inside it, and the curves beside it as a PNG.

    The PNG has the page's name with `.png`. Returns the page's path.
    """
    path = Path(path)
    curves = curves_png({title: read_rows(d / "metrics.jsonl") for title, d in report.runs.items()})
    write_bytes(path.with_suffix(".png"), curves)
    cards = "".join(_picture_card(shown) for shown in report.pictures)
    body = [_headline(report.results), f'<div class="grid">{cards}</div>']
    for title, results in report.results.items():
        body.append(section(f"Held-out: {title}", results_html(results)))
    body.append(section("Loss", picture(curves, "curve", "loss curves of every stage")))
    if report.seconds:
        timing = [{"phase": k, "time": format_seconds(v)} for k, v in report.seconds.items()]
        total = format_seconds(sum(report.seconds.values()))
        timing.append({"phase": "together", "time": total})
        body.append(section("Time", table(("phase", "time"), timing)))
    body.append(section("Environment", table(("what", "version"), environment())))
    if report.credits:
        lines = "".join(f"<p>{escape(line)}</p>" for line in report.credits)
        body.append(section("Credits", lines))
    write_text(path, page(report.title, report.lead, body))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a JSON-lines file; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def curves_png(runs: Mapping[str, Sequence[Row]]) -> bytes:
    """Training and held-out loss against the step, one panel a run, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * max(1, len(runs)), 3.4), dpi=130, layout="constrained")
    axes = figure.subplots(1, max(1, len(runs)), squeeze=False)[0]
    for panel, (title, rows) in zip(axes, runs.items(), strict=False):
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, ms=4, lw=1.5)
        panel.set(title=title, xlabel="step", ylabel="loss, nats a token")
        panel.grid(alpha=0.25)
        if panel.lines:
            panel.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def results_html(results: Mapping[str, Any]) -> str:
    """What `vlm_sft.evaluate` found, as a table with intervals."""
    rows = []
    for name, conditions in results.get("probes", {}).items():
        for condition, found in conditions.items():
            rows.append(
                {
                    "measure": name,
                    "picture shown": READINGS[condition],
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
                    "picture shown": READINGS[condition],
                    "n": f"{captions['records']:,}",
                    "result [95 % interval]": _interval(captions[condition]),
                    "guessing": "",
                }
            )
    columns = ("measure", "picture shown", "n", "result [95 % interval]", "guessing")
    answered = HOW_ANSWERED[results.get("answers", "likeliest")]
    note = (
        f"{answered} With a blank picture a model can only guess; what it gains over that, it has "
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


def _run_totals(rows: Sequence[Row]) -> str:
    train = [row for row in rows if row.get("loss") is not None]
    if not train:
        return "<p>No training step has been recorded yet.</p>"
    last, held_out = train[-1], [row["eval_loss"] for row in rows if "eval_loss" in row]
    facts = {"steps": f"{last['step']:,}", "last training loss": f"{last['loss']:.4f}"}
    if held_out:
        facts["held-out loss"] = f"{held_out[-1]:.4f}"
    for key, name in (
        ("samples_per_second", "samples a second, mean"),
        ("target_tokens_per_second", "trained tokens a second, mean"),
    ):
        values = [row[key] for row in train if row.get(key) is not None]
        if values:
            facts[name] = f"{sum(values) / len(values):,.1f}"
    if "memory_bytes" in last:
        facts["peak memory"] = f"{last['memory_bytes'] / 2**30:.1f} GiB"
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()
    )
    return f'<dl class="card grid">{items}</dl>'


def _run_parts(run_dir: Path) -> list[str]:
    path = run_dir / "parts.json"
    if not path.exists():
        return []
    parts = json.loads(path.read_text(encoding="utf-8"))
    return [section("Parts", table(tuple(parts[0]), parts))] if parts else []


def _ledgers(run_dir: Path) -> list[str]:
    sections = []
    for name, title in (("ledger", "Training records"), ("ledger_eval", "Held-out records")):
        rows = read_rows(run_dir / f"{name}.jsonl")
        counts: Counter[tuple[str, str]] = Counter()
        for row in rows:
            bucket = row.get("bucket") or row.get("outcome") or row.get("status")
            if bucket:
                counts[str(bucket), str(row.get("reason") or "")] += 1
        if counts:
            found = [
                {"what became of it": bucket, "reason": reason, "records": f"{count:,}"}
                for (bucket, reason), count in counts.most_common()
            ]
            sections.append(section(title, table(tuple(found[0]), found)))
    return sections


def _settings(run_dir: Path) -> list[str]:
    path = run_dir / "config.yaml"
    if not path.exists():
        return []
    text = escape(path.read_text(encoding="utf-8"))
    return [
        section("Settings", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    ]


def _headline(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The first measure's accuracy in large figures: each set's pictures, then blank ones."""
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
                where = f"{measure}, {title}" + (", blank picture" if condition == "blank" else "")
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
    if spoken_choice(answer, closed_set(expected)) == expected.lower():
        return ' <span class="right">✓ right</span>'
    return f' <span class="wrong">✗ wrong, it is {escape(expected)}</span>'


def _picture_card(shown: ShownPicture) -> str:
    image = Image.open(shown.path).convert("RGB")
    image.thumbnail((640, 640))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    expected = shown.expected or [None] * len(shown.exchanges)
    said = "".join(
        f"<dt>{escape(asked)}</dt><dd>{escape(answer)}{_mark(answer, truth)}</dd>"
        for (asked, answer), truth in zip(shown.exchanges, expected, strict=True)
    )
    shown_as = picture(buffer.getvalue(), "", shown.path.name, kind="jpeg")
    return f'<article class="card">{shown_as}<dl>{said}</dl></article>'


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _percent(found: Mapping[str, float]) -> str:
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['estimate']:.1f} % [{low:.1f}, {high:.1f}]"
