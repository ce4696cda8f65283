"""Line charts as SVG.

A chart is 360 units wide, about the width of a phone, so that its text is hardly scaled. Its colours are the CSS
classes ``c0`` … ``c7`` of ``page.css``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 352, 10, 166
"""Edges of the plot."""
COLORS = 8
NOTHING = "–"
"""Shown for a missing value."""

Points = Sequence[tuple[int, float | None]]
"""(step, value); None leaves a gap."""


class Zone(NamedTuple):
    """A horizontal zone to compare the lines with; a line if ``low`` = ``high``."""

    label: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """A curve, with thinner ones of the same colour behind it."""

    label: str
    points: Points
    color: int
    faint: tuple[Points, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its legend. Only ``svg`` is markup, and it contains no text of a run."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, int, str], ...]
    """(label, colour, last value) of each line."""
    caption: str


def line_chart(
    title: str, caption: str, lines: Sequence[Line], *, percent: bool = False, zones: Sequence[Zone] = ()
) -> Chart:
    """Draw lines over steps. The y axis contains 0; without lines, the chart is only its caption."""
    legend = []
    for line in lines:
        last = next((value for _, value in reversed(line.points) if value is not None), None)
        legend.append((line.label, line.color, number(last, percent=percent)))
    svg = Markup("\n").join(_draw(lines, percent, zones)) if lines else Markup()
    return Chart(title, svg, tuple(legend), caption)


def number(value: float | None, *, percent: bool = False) -> str:
    """Format a value with three significant digits, or a fraction in percent with one decimal.

    >>> number(0.01234), number(1532.4), number(4.6172e-7), number(0.0625, percent=True), number(None)
    ('0.0123', '1,532', '4.62e-07', '6.2 %', '–')
    """
    if value is None:
        return NOTHING
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def ticks(low: float, high: float) -> list[float]:
    """Return at most six round values in [low, high], spaced by 1, 2 or 5 times a power of ten.

    >>> ticks(0, 0.19), ticks(-2, 1)
    ([0.0, 0.05, 0.1, 0.15], [-2.0, -1.0, 0.0, 1.0])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    spacing = next((s for s in (power, 2 * power, 5 * power) if (high - low) / s <= 5), 10 * power)
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [float(f"{i * spacing:.12g}") for i in range(first, last + 1)]


def _draw(lines: Sequence[Line], percent: bool, zones: Sequence[Zone]) -> Iterator[Markup]:
    """Yield the elements of a chart."""
    curves = [curve for line in lines for curve in (line.points, *line.faint)]
    values = [value for curve in curves for _, value in curve if value is not None]
    values += [edge for zone in zones for edge in (zone.low, zone.high)]
    low, high = min([0.0, *values]), max([0.0, *values])
    high = high if high - low > 1e-290 else 1.0
    steps = [step for curve in curves for step, _ in curve]
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first or 1) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    yield Markup('<svg viewBox="0 0 {} {}" aria-hidden="true" class="chart">').format(WIDTH, HEIGHT)
    for zone in zones:
        box = Markup('<rect class="zone" x="{}" width="{}" y="{:.1f}" height="{:.1f}"/>')
        yield box.format(LEFT, RIGHT - LEFT, y(zone.high), max(1.0, y(zone.low) - y(zone.high)))
        yield _text(RIGHT - 3, y(zone.high) + 11, zone.label, "note")
    for value in ticks(low, high):
        grid_line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        yield grid_line.format(LEFT, RIGHT, y(value), y(value))
        yield _text(LEFT - 6, y(value) + 3.5, f"{100 * value:.6g} %" if percent else f"{value:,.6g}", "tick")
    for step in sorted({first, (first + last) // 2, last}):
        yield _text(x(step), HEIGHT - 8, f"{step:,}", "tick middle")
    for line in reversed(lines):
        for kind, points in [*(("faint", curve) for curve in line.faint), ("line", line.points)]:
            path, command = "", "M"
            for at, height in points:
                if height is None:
                    command = "M"
                    continue
                point = f"{x(at):.1f},{y(height):.1f}"
                path += f"L{point}" if command == "L" else f"M{point}L{point}"  # a single point is a dot
                command = "L"
            yield Markup('<path class="{} c{}" d="{}"/>').format(kind, line.color, path)
    yield Markup("</svg>")


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, kind, text)
