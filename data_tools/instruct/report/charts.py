"""Draw the report's charts with matplotlib; equal counts give equal files."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from data_tools.instruct.report.counts import STEPS, RunCounts, by_count, sum_by_first
from data_tools.instruct.report.draw import COLORS, VERDICTS, drawable

MAX_BARS: Final = 25
_BLUE: Final = "#3b6fb6"
_HATCHES: Final = {"supported": "", "contradicted": "////", "unknown": "...."}


def charts(counts: RunCounts) -> Iterator[tuple[str, Any]]:
    """Yield the names of the charts that have something to show, with their matplotlib figures."""
    good = counts.good
    if counts.step("planned"):
        steps = [(words, counts.step(step)) for step, words in STEPS.items()]
        yield "funnel", _bars("Results of the requests", "requests", steps)
    if counts.rejected:
        codes = by_count(sum_by_first(counts.rejected))
        yield "reasons", _bars("Why samples were rejected", "samples", codes)
    if counts.claims:
        rules = [rule for rule, _ in by_count(sum_by_first(counts.claims))]
        yield (
            "claims",
            _stacked(
                "Claims by rule and verdict",
                "checks",
                rules,
                {
                    verdict: (
                        [counts.claims[rule, verdict] for rule in rules],
                        COLORS[verdict],
                        _HATCHES[verdict],
                    )
                    for verdict in reversed(VERDICTS)
                },
            ),
        )
    if good.samples:
        names = [name for name, _ in by_count(counts.annotated)]
        covered = [good.covered[name] for name in names]
        rest = [counts.annotated[name] - good.covered[name] for name in names]
        parts = {"with a sample": (covered, _BLUE, ""), "without": (rest, "#c9d2de", "....")}
        yield "categories", _stacked("Images by category", "images", names, parts)


def _bars(title: str, unit: str, values: Sequence[tuple[str, int]]) -> Any:
    shown = values[:MAX_BARS]
    figure, axes = _figure(title, unit, len(shown), len(values))
    numbers = [number for _, number in shown]
    bars = axes.barh(range(len(shown)), numbers, color=_BLUE)
    _name_rows(axes, [name for name, _ in shown])
    axes.bar_label(bars, [f"{number:,}" for number in numbers], padding=3, fontsize=8)
    axes.margins(x=0.12)
    return figure


def _stacked(
    title: str,
    unit: str,
    rows: Sequence[str],
    parts: Mapping[str, tuple[Sequence[int], str, str]],
) -> Any:
    """Return stacked bars; `parts` are the values of the rows, a color and a hatch by name."""
    shown = rows[:MAX_BARS]
    figure, axes = _figure(title, unit, len(shown), len(rows))
    left = np.zeros(len(shown), dtype=np.int64)
    for name, (values, color, hatch) in parts.items():
        width = np.array(values[:MAX_BARS])
        style = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.barh(range(len(shown)), width, left=left, label=name, **style)
        left += width
    _name_rows(axes, shown)
    axes.legend(loc="lower right", framealpha=0.9)
    return figure


def _figure(title: str, unit: str, shown: int, total: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.3 + 0.3 * max(shown, 2)), dpi=130, layout="constrained")
    axes = figure.subplots()
    left_out = f" ({shown} most frequent of {total})" if shown < total else ""
    axes.set(title=title + left_out, xlabel=unit)
    axes.invert_yaxis()
    _tidy(axes)
    return figure, axes


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [drawable(name) for name in names], parse_math=False)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
