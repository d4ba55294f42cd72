"""Draw curves as inline SVG, in the colors of the page and with the values at the pointer."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from vlm_sft.utils.escape import escape_control

MAX_POINTS: Final = 300
"""Points per curve; a longer one is drawn as the means of equally long sections."""

NUM_COLORS: Final = 8
"""Colors of `page.css`; a ninth curve has the first color again."""

_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 24
_NUM_TICKS = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: Its name in the legend.
        points: Position (a step) and value, by rising position; all finite.
        dots: Mark every point, for curves of few.
    """

    name: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves in one diagram.

    Attributes:
        title: What the values are, with their unit.
        series: The curves; those without points are left out.
    """

    title: str
    series: Sequence[Series]

    @property
    def shown(self) -> list[tuple[int, Series]]:
        """The curves with points, thinned, each with the number of its color."""
        return [
            (number % NUM_COLORS, Series(s.name, thinned(s.points), s.dots))
            for number, s in enumerate(self.series)
            if s.points
        ]

    @property
    def note(self) -> str:
        """How many values a point stands for, if a curve has too many to draw each."""
        longest = max((len(s.points) for s in self.series), default=0)
        if longest <= MAX_POINTS:
            return ""
        return f"Each point is the mean of up to {math.ceil(longest / MAX_POINTS)} logged values."

    @property
    def svg(self) -> Markup:
        """The diagram as an SVG element; `run_report.js` shows the values at the pointer."""
        points = [point for _, series in self.shown for point in series.points]
        if not points:
            return Markup("")
        x_scale = _Scale.of([x for x, _ in points], _LEFT, _WIDTH - _RIGHT, snug=True)
        y_scale = _Scale.of([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
        parts = [*_axes(x_scale, y_scale)]
        for color, series in self.shown:
            places = [(x_scale(x), y_scale(y)) for x, y in series.points]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(Markup('<polyline class="c{}" points="{}"/>').format(color, line))
            if series.dots or len(places) == 1:
                dot = Markup('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="3"/>')
                parts += [dot.format(color, x, y) for x, y in places]
        values = [
            {
                "name": escape_control(series.name),
                "color": color,
                "x": [x for x, _ in series.points],
                "y": [shown_number(y) for _, y in series.points],
            }
            for color, series in self.shown
        ]
        scale = {"from": x_scale.low, "to": x_scale.high, "left": _LEFT, "right": _WIDTH - _RIGHT}
        return Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-scale="{}" '
            'data-series="{}">{}</svg>'
        ).format(
            _WIDTH,
            _HEIGHT,
            escape_control(self.title),
            json.dumps(scale),
            json.dumps(values),
            Markup("").join(parts),
        )


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return at most `limit` points: the means of sections of equal length.

    The first and the last point of a curve that is thinned are kept as they are.
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 2) / (limit - 2))
    inner = points[1:-1]
    sections = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in sections
    ]
    return [points[0], *means, points[-1]]


def shown_number(value: float) -> str:
    """Return a value with four digits: `0.5012`, `1.4e-05`, `12,340`."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Scale:
    """Maps values to pixels.

    Attributes:
        low, high: Smallest and largest value.
        start, end: Their pixels.
    """

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(
        cls, values: Sequence[float], start: float, end: float, *, snug: bool = False
    ) -> "_Scale":
        """Return a scale that holds the values, with some room unless it is to be snug."""
        low, high = min(values), max(values)
        room = 0.0 if snug else 0.05 * (high - low)
        if high == low:
            room = abs(low) / 10 or 1.0
        bottom = low - room
        return cls(0.0 if low >= 0 > bottom else bottom, high + room, start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Return round values inside, about `_NUM_TICKS` of them."""
        rough = (self.high - self.low) / _NUM_TICKS
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.6)
        step = max(step, 1.0) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _axes(x_scale: _Scale, y_scale: _Scale) -> list[Markup]:
    line = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    text = Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>')
    parts = []
    for value in y_scale.ticks():
        y = y_scale(value)
        parts.append(line.format(_LEFT, _WIDTH - _RIGHT, y, y))
        parts.append(text.format("y", _LEFT - 6, y + 4, shown_number(value)))
    for value in x_scale.ticks(whole=True):
        # Text in the middle of its tick, but not beyond the edge.
        x = min(x_scale(value), _WIDTH - _RIGHT - 12)
        parts.append(text.format("x", x, _HEIGHT - 7, shown_number(value)))
    return parts
