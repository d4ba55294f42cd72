"""Charts as HTML: bars and histograms whose colours and letters follow the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from data_tools.instruct.report.markup import escaped

STYLE: Final = """
.bars{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr max-content;gap:.3rem .8rem;
font-size:.92rem}
.bar{display:grid;grid-column:1/-1;grid-template-columns:subgrid;align-items:center}
.bl{overflow-wrap:anywhere;max-width:22rem}
.bt{display:flex;height:1.15rem;background:var(--chip);border-radius:4px;overflow:hidden;
min-width:4rem}
.bn{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.loss{grid-column:2/4;color:var(--soft);font-size:.84rem;margin-bottom:.35rem;
overflow-wrap:anywhere}
.bt i{display:block;height:100%;min-width:0}
.bt .accent{background:var(--accent)}
.bt .supported{background:var(--bar-supported)}
.bt .contradicted{background:repeating-linear-gradient(135deg,var(--bar-contradicted) 0 5px,
var(--bar-contradicted-2) 5px 8px)}
.bt .unknown{background:repeating-linear-gradient(90deg,var(--bar-unknown) 0 2px,
var(--bar-unknown-2) 2px 5px)}
:root{--bar-supported:#0072b2;--bar-contradicted:#d55e00;--bar-contradicted-2:#f2b88f;
--bar-unknown:#8a6d00;--bar-unknown-2:#e9d794}
@media(prefers-color-scheme:dark){:root{--bar-supported:#56a9e4;--bar-contradicted:#ff8a3d;
--bar-contradicted-2:#8a4414;--bar-unknown:#e6c65c;--bar-unknown-2:#6b591c}}
.key{display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .45rem}
.key .bt{min-width:0;width:1.4rem;height:.8rem;border-radius:3px}.key .bt i{width:100%}
.key .kw{margin-right:1rem}
.hist{width:100%;height:auto;display:block}.hist rect{fill:var(--accent)}
.hist text{fill:var(--soft);font:11px system-ui,sans-serif}
.hist line{stroke:var(--line)}.hist .axis{stroke:var(--soft)}
@media(max-width:40rem){.bars{grid-template-columns:1fr max-content;gap:.3rem .6rem}
.bar .bt{grid-column:1/3;grid-row:2}.loss{grid-column:1/3}}
"""


@dataclass(frozen=True)
class Bar:
    """One row.

    Attributes:
        label: Plain text.
        parts: Lengths by the class of their colour, in order.
        number: What stands at the end, plain text.
        below: Plain text under the bar.
    """

    label: str
    parts: Mapping[str, float]
    number: str
    below: str = ""


def bars(rows: Sequence[Bar], whole: float) -> str:
    """Horizontal bars; `whole` is the length that fills the width."""
    lines = []
    for row in rows:
        inner = "".join(
            f'<i class="{css}" style="width:{_share(length, whole)}"></i>'
            for css, length in row.parts.items()
            if length
        )
        below = f'<span class="loss">{escaped(row.below)}</span>' if row.below else ""
        lines.append(
            f'<div class="bar"><span class="bl">{escaped(row.label)}</span>'
            f'<span class="bt">{inner}</span><span class="bn">{escaped(row.number)}</span>'
            f"{below}</div>"
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def _share(length: float, whole: float) -> str:
    return f"{100 * length / whole:.2f}%" if whole else "0"


def key(names: Mapping[str, str]) -> str:
    """What the colours of bars mean, by their classes."""
    items = "".join(
        f'<span class="bt"><i class="{css}"></i></span><span class="kw">{escaped(words)}</span> '
        for css, words in names.items()
    )
    return f'<p class="note key">{items}</p>'


@dataclass(frozen=True)
class Bins:
    """A histogram's counts; bin i holds values from `i * width` to under `(i + 1) * width`."""

    counts: tuple[int, ...]
    width: int


def binned(values: Mapping[int, int], most: int = 40) -> Bins:
    """Counts of whole numbers from 0 on in at most `most` equal bins of a round width."""
    highest = max(values, default=0)
    width = next(w * 10**e for e in range(9) for w in (1, 2, 5) if highest < w * 10**e * most)
    counts = [0] * (highest // width + 1)
    for value, count in values.items():
        counts[value // width] += count
    return Bins(tuple(counts), width)


def histogram(values: Mapping[int, int], unit: str, things: str) -> str:
    """Counts of whole numbers as SVG with both axes named."""
    shape = binned(values)
    width, height, left, bottom = 380, 200, 46, 36
    tallest = max(shape.counts, default=0) or 1
    step = (width - left - 8) / len(shape.counts)
    floor = height - bottom
    parts = [_level(share, tallest, left, width, floor) for share in (0, 0.5, 1)]
    for i, count in enumerate(shape.counts):
        tall = (floor - 24) * count / tallest
        title = f"{i * shape.width:,} to {(i + 1) * shape.width - 1:,} {unit}: {count:,} {things}"
        parts.append(
            f'<rect x="{left + i * step + 0.5:.1f}" y="{floor - tall:.1f}" '
            f'width="{max(step - 1, 0.5):.1f}" height="{tall:.1f}"><title>{title}</title></rect>'
        )
    ticks = sorted({0, len(shape.counts) // 2, len(shape.counts)})
    parts += [
        f'<text x="{left + i * step:.1f}" y="{floor + 14}" text-anchor="middle">'
        f"{i * shape.width:,}</text>"
        for i in ticks
    ]
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 5}" text-anchor="middle">{unit}')
    parts.append(f'</text><text x="4" y="11">{things}</text>')
    return (
        f'<svg class="hist" viewBox="0 0 {width + 12} {height}" role="img">{"".join(parts)}</svg>'
    )


def _level(share: float, tallest: int, left: int, width: int, floor: int) -> str:
    y = floor - (floor - 24) * share
    css = ' class="axis"' if share == 0 else ""
    label = f"{tallest * share:,.0f}" if float(tallest * share).is_integer() else ""
    return (
        f'<line{css} x1="{left}" y1="{y:.1f}" x2="{width - 8}" y2="{y:.1f}"/>'
        f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )
