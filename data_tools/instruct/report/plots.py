"""The report's charts as PNG files, for slides and papers; equal figures give equal bytes."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from data_tools.instruct.report.charts import binned
from data_tools.instruct.report.drawing import COLOURS
from data_tools.instruct.report.evidence import VERDICTS
from data_tools.instruct.report.figures import STEPS, TYPES, Figures, by_code
from vlm_sft.utils.output_files import PNG_SOFTWARE

_BLUE: Final = "#3b6fb6"
_HATCHES: Final = {"supported": "", "contradicted": "////", "unknown": "...."}
MOST_BARS: Final = 25


def plots(figures: Figures) -> Iterator[tuple[str, bytes]]:
    """File names with their PNGs; what there is nothing to draw of is left out."""
    if figures.step("planned"):
        steps = {words: figures.step(step) for step, words in STEPS.items()}
        yield "funnel.png", _bars("What became of the requests", "requests", steps)
    if figures.rejections:
        codes = dict(by_code(figures.rejections))
        yield "reasons.png", _bars("Why samples were rejected", "samples", codes)
    if figures.claims:
        yield "claims.png", _claims(figures)
    if figures.good.samples:
        yield "categories.png", _categories(figures)
        yield "lengths.png", _lengths(figures)
    if figures.good.yes_no:
        yield "yes-no.png", _yes_no(figures)


def _bars(title: str, unit: str, values: Mapping[str, int]) -> bytes:
    shown = dict(list(values.items())[:MOST_BARS])
    figure, axes = _figure(len(shown))
    bars = axes.barh([*map(_plain, shown)], list(shown.values()), color=_BLUE)
    axes.bar_label(bars, [f"{value:,}" for value in shown.values()], padding=3, fontsize=8)
    left = len(values) - len(shown)
    axes.set(title=title + (f" ({left} rarer left out)" if left else ""), xlabel=unit)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    return _png(figure)


def _stacked(
    title: str, unit: str, rows: Sequence[str], parts: Mapping[str, tuple[Sequence[int], str, str]]
) -> bytes:
    """Bars of parts, each with its counts, colour and hatch."""
    figure, axes = _figure(len(rows))
    before = [0] * len(rows)
    for name, (counts, colour, hatch) in parts.items():
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.barh([*map(_plain, rows)], list(counts), left=before, label=name, **style)
        before = [a + b for a, b in zip(before, counts, strict=True)]
    axes.set(title=title, xlabel=unit)
    axes.invert_yaxis()
    axes.legend(loc="lower right", framealpha=0.9)
    return _png(figure)


def _claims(figures: Figures) -> bytes:
    totals = {
        rule: sum(figures.claims[rule, verdict] for verdict in VERDICTS)
        for rule, _ in figures.claims
    }
    rules = sorted(totals, key=lambda rule: (-totals[rule], rule))[:MOST_BARS]
    parts = {
        str(verdict): (
            [figures.claims[rule, verdict] for rule in rules],
            COLOURS[verdict],
            _HATCHES[verdict],
        )
        for verdict in VERDICTS
    }
    return _stacked("Claims by rule and verdict", "checks", rules, parts)


def _categories(figures: Figures) -> bytes:
    ordered = sorted(figures.annotated.items(), key=lambda entry: (-entry[1], entry[0]))
    names = [name for name, _ in ordered[:MOST_BARS]]
    covered = [figures.good.covered[name] for name in names]
    rest = [figures.annotated[name] - figures.good.covered[name] for name in names]
    parts = {"with a sample": (covered, _BLUE, ""), "without": (rest, "#c9d2de", "....")}
    title = f"Images of the {len(names)} commonest categories"
    return _stacked(title, "images", names, parts)


def _yes_no(figures: Figures) -> bytes:
    counts = figures.good.yes_no
    names = sorted(
        {name for name, _ in counts},
        key=lambda name: (-counts[name, "yes"] - counts[name, "no"], name),
    )[:MOST_BARS]
    parts = {
        "yes": ([counts[name, "yes"] for name in names], COLOURS["supported"], ""),
        "no": ([counts[name, "no"] for name in names], "#d9a441", "////"),
    }
    return _stacked("Yes and no by the category asked about", "answers", names, parts)


def _lengths(figures: Figures) -> bytes:
    from matplotlib.figure import Figure

    shown = [name for name in TYPES if any(t == name for t, _, _ in figures.good.words)]
    figure = Figure(figsize=(4.0 * len(shown), 3.0), dpi=130, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        words = figures.good.words
        shape = binned({n: c for (t, p, n), c in words.items() if t == name and p == "answer"})
        starts = [i * shape.width for i in range(len(shape.counts))]
        axes.bar(starts, shape.counts, width=shape.width * 0.92, align="edge", color=_BLUE)
        axes.set(title=name, xlabel="words of an answer", ylabel="answers")
        axes.yaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
    return _png(figure)


def _figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.3 + 0.3 * max(rows, 2)), dpi=130, layout="constrained")
    axes = figure.subplots()
    _tidy(axes)
    return figure, axes


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    """A label that matplotlib does not take for a formula and the font has letters for."""
    cut = text if len(text) <= 40 else f"{text[:39]}…"
    return "".join(c if 31 < ord(c) < 0x250 or c == "…" else "?" for c in cut).replace("$", r"\$")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": PNG_SOFTWARE})
    return buffer.getvalue()
