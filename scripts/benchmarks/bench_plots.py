"""Images of the benchmarks' results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, OTHERS, INK = "#0b6e99", "#b8c4cc", "#22303a"

Row = Mapping[str, Any]


def plot_peers(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Bars of speed (with the range over rounds) and of peak memory, one line a peer."""
    rows = sorted(rows, key=lambda row: row["rate"])
    names = [row["name"] for row in rows]
    colors = [OURS if name.startswith("vlm_sft") else OTHERS for name in names]
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(11, 0.55 * len(rows) + 1.6), sharey=True, width_ratios=(3, 2)
    )
    rates = [row["rate"] for row in rows]
    low = [row["rate"] - row["rate_least"] for row in rows]
    high = [row["rate_most"] - row["rate"] for row in rows]
    speed.barh(names, rates, color=colors, height=0.68)
    speed.errorbar(rates, names, xerr=(low, high), fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    _label_bars(speed, rates, [row["rate_most"] for row in rows], "{:.2f}")
    speed.set_xlabel("samples per CPU-second (more is better; line: least to most over rounds)")
    peaks = [row["peak_gib"] for row in rows]
    memory.barh(names, peaks, color=colors, height=0.68)
    _label_bars(memory, peaks, peaks, "{:.1f}")
    memory.set_xlabel("peak resident memory, GiB (less is better)")
    _finish(figure, (speed, memory), path, title)


def plot_data_quality(rows: Sequence[Row], kinds: Sequence[str], path: Path, *, title: str) -> None:
    """Curves of accuracy by share of spoilt data, cleaned and not, one panel a kind.

    A dot is a run with its interval over images; a curve is the mean over seeds.
    """
    figure, panels = plt.subplots(2, 3, figsize=(11, 6.4), sharex=True, sharey=True)
    for kind, panel in zip(kinds, panels.flat, strict=True):
        mine = [row for row in rows if row["kind"] in (kind, "none")]
        for data, color, shift in (("as it is", "#b3541e", -0.5), ("cleaned", OURS, 0.5)):
            by_level: dict[int, list[float]] = {}
            for row in (row for row in mine if row["data"] == data):
                by_level.setdefault(row["percent"], []).append(row["estimate"])
                bounds = [[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]]
                at = row["percent"] + shift
                panel.errorbar(at, row["estimate"], bounds, fmt="o", ms=3, color=color, alpha=0.6)
            levels = sorted(by_level)
            means = [sum(by_level[level]) / len(by_level[level]) for level in levels]
            panel.plot(levels, means, color=color, label=data)
        panel.set_title(kind, fontsize=10, color=INK)
        panel.axhline(0.5, color=OTHERS, linestyle=":", label="chance")
    for panel in panels[-1]:
        panel.set_xlabel("spoilt conversations (%)")
    for panel in panels[:, 0]:
        panel.set_ylabel("accuracy on held-out scenes")
    panels[0, 0].legend(fontsize=8, loc="lower left")
    _finish(figure, list(panels.flat), path, title)


def plot_stages(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Bars of samples a second and of peak memory, grouped by stage."""
    ordered = list(reversed(rows))
    names = [f"{row['stage']}: {row['name']}" for row in ordered]
    colors = [OURS if row["name"].startswith("vlm_sft") else OTHERS for row in ordered]
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(12, 0.5 * len(names) + 1.6), sharey=True, width_ratios=(3, 2)
    )
    rates = [row["rate"] for row in ordered]
    speed.barh(names, rates, color=colors, height=0.7)
    _label_bars(speed, rates, rates, "{:.3g}")
    speed.set_xlabel("samples per second (more is better)")
    peaks = [row["peak_gib"] for row in ordered]
    memory.barh(names, peaks, color=colors, height=0.7)
    _label_bars(memory, peaks, peaks, "{:.3g}")
    memory.set_xlabel("peak memory, GiB (less is better)")
    _finish(figure, (speed, memory), path, title)


def plot_lines(panels: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Panels of lines; each has `x`, `y` (name to values), `xlabel`, `ylabel`, and `logx`."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.5 * lines), squeeze=False)
    flat = list(axes.flat)
    for axis, panel in zip(flat, panels, strict=False):
        for place, (name, values) in enumerate(panel["y"].items()):
            color = (OURS, "#d1782f", "#6b8f3c", "#8a5fa8")[place % 4]
            axis.plot(panel["x"], values, marker="o", color=color, label=name, linewidth=1.8)
        if panel.get("logx"):
            axis.set_xscale("log")
        top = max(max(values) for values in panel["y"].values())
        axis.set_ylim(0, 1.1 * top)
        if panel["xlabel"] == "images" and max(panel["x"]) < 10:
            axis.set_xticks(panel["x"])
        axis.set_xlabel(panel["xlabel"])
        axis.set_ylabel(panel["ylabel"])
        axis.set_title(panel["title"], fontsize=10, color=INK)
        axis.grid(alpha=0.3)
        if len(panel["y"]) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in flat[len(panels) :]:
        axis.set_visible(False)
    _finish(figure, flat[: len(panels)], path, title)


def plot_differences(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Wrong answers in the selected part, and its accuracy minus that of the random part."""
    rows = sorted(rows, key=lambda row: (row["difference"]["estimate"], row["seed"]))
    names = [f"{row['selection']}, seed {row['seed']}" for row in rows]
    figure, (wrong, gain) = plt.subplots(
        1, 2, figsize=(11, 0.4 * len(rows) + 1.6), sharey=True, width_ratios=(2, 3)
    )
    shares = [100 * row["wrong"] for row in rows]
    wrong.barh(names, shares, color=OTHERS, height=0.68)
    _label_bars(wrong, shares, shares, "{:.0f} %")
    mean = 100 * sum(row["random_wrong"] for row in rows) / len(rows)
    wrong.axvline(mean, color=INK, linewidth=1, linestyle=":")
    wrong.set_xlabel("wrong answers in the selected part, % (line: random parts)")
    points = [100 * row["difference"]["estimate"] for row in rows]
    low = [100 * (row["difference"]["estimate"] - row["difference"]["low"]) for row in rows]
    high = [100 * (row["difference"]["high"] - row["difference"]["estimate"]) for row in rows]
    gain.errorbar(points, names, xerr=(low, high), fmt="o", color=OURS, capsize=3)
    gain.axvline(0, color=INK, linewidth=1)
    gain.grid(alpha=0.3)
    gain.set_xlabel("accuracy minus that of the random part, points (95 % interval over images)")
    _finish(figure, (wrong, gain), path, title)


def _label_bars(axis: Any, values: Sequence[float], ends: Sequence[float], form: str) -> None:
    room = max(ends) * 0.02
    for place, (value, end) in enumerate(zip(values, ends, strict=True)):
        axis.text(end + room, place, form.format(value), va="center", fontsize=9, color=INK)
    axis.set_xlim(0, max(ends) * 1.16)


def _finish(figure: Any, axes: Sequence[Any], path: Path, title: str) -> None:
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)
        axis.tick_params(labelsize=9)
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
