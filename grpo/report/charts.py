"""Line and area charts as SVG.

A chart is 360 units wide, about the width of a phone or of a third of a page, so that its text is hardly scaled.
Colours are CSS classes, ``c0`` … ``c7`` for strokes and ``f0`` … ``f7`` for fills, defined in ``page.css``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from grpo.report.number_format import tick_labels, ticks

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 8.0, 10.0, 24.0
COLORS = 8

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with one value per step of the panel; None leaves a gap."""

    label: str
    values: Values
    color: int
    faint: Values | None = None
    """The unsmoothed values, drawn as a thin line behind."""


@dataclass(frozen=True, slots=True)
class Band:
    """The area between two curves."""

    label: str
    low: Values
    high: Values
    color: int


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line at ``low`` = ``high``, or the zone between the two."""

    label: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    """The data of one chart."""

    steps: Sequence[int]
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    levels: Sequence[Level] = ()
    kind: str = "plain"
    """Format of the y axis: a key of `grpo.report.number_format.FORMATS`."""
    floor: float | None = None
    """The y axis starts here, or lower if the data do; None: at the data's minimum."""
    ceiling: float | None = None


def chart(panel: Panel, *, title: str) -> Markup:
    """Draw the panel as one ``<svg>`` element labelled ``title`` for screen readers."""
    root = ET.Element(
        "svg", {"viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}", "role": "img", "aria-label": title, "class": "chart"}
    )
    plot = _Plot(panel.steps, *y_range(panel))
    for level in panel.levels:
        _draw_level(root, plot, level)
    _draw_grid(root, plot, panel)
    for band in panel.bands:
        for part in _contiguous(plot.steps, band.low, band.high):
            steps, lows, highs = zip(*part, strict=True)
            outline = plot.points(steps, highs) + plot.points(steps, lows)[::-1]
            ET.SubElement(root, "path", {"class": f"band f{band.color}", "d": f"M{' '.join(outline)}Z"})
    for line in reversed(panel.lines):
        _draw_line(root, plot, line)
    cursor = {"class": "at", "x1": "0", "x2": "0", "y1": f"{TOP:g}", "y2": f"{HEIGHT - BOTTOM:g}"}
    ET.SubElement(root, "line", cursor)
    return Markup(ET.tostring(root, encoding="unicode"))


def y_range(panel: Panel) -> tuple[float, float]:
    """Return the ends of the y axis: the range of data, floor, ceiling and levels with a margin; never empty."""
    curves = [curve for line in panel.lines for curve in (line.values, line.faint or ())]
    curves += [edge for band in panel.bands for edge in (band.low, band.high)]
    values = [v for curve in curves for v in curve if v is not None]
    values += [edge for level in panel.levels for edge in (level.low, level.high)]
    values += [edge for edge in (panel.floor, panel.ceiling) if edge is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        low, high = (low, low + 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    margin = 0.06 * (high - low)
    at_floor = panel.floor is not None and low >= panel.floor
    at_ceiling = panel.ceiling is not None and high <= panel.ceiling
    return low if at_floor else low - margin, high if at_ceiling else high + margin


@dataclass(frozen=True, slots=True)
class _Plot:
    """Map steps and values to SVG coordinates."""

    steps: Sequence[int]
    low: float
    high: float

    def x(self, step: float) -> float:
        first, last = self.steps[0], self.steps[-1]
        fraction = (step - first) / (last - first) if last > first else 0.5 + (step - first)
        return LEFT + min(1.0, max(0.0, fraction)) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)

    def points(self, steps: Iterable[float], values: Iterable[float]) -> list[str]:
        return [f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in zip(steps, values, strict=True)]


def _draw_grid(root: ET.Element, plot: _Plot, panel: Panel) -> None:
    grid = ET.SubElement(root, "g", {"class": "grid"})
    marks = ticks(plot.low, plot.high)
    for value, label in zip(marks, tick_labels(marks, panel.kind), strict=True):
        y = plot.y(value)
        _horizontal(grid, y)
        _text(grid, LEFT - 6, y + 3.5, label, anchor="end")
    first, last = panel.steps[0], panel.steps[-1]
    inner = [t for t in ticks(first, last, 6) if t == int(t) and min(t - first, last - t) > 0.1 * (last - first)]
    for step in dict.fromkeys([first, *inner, last]):
        anchor = "middle" if first == last else {first: "start", last: "end"}.get(int(step), "middle")
        _text(grid, plot.x(step), HEIGHT - 8, f"{int(step):,}", anchor=anchor)


def _draw_level(root: ET.Element, plot: _Plot, level: Level) -> None:
    top, bottom = plot.y(level.high), plot.y(level.low)
    if bottom > top:
        box = {
            "x": f"{LEFT:g}",
            "width": f"{WIDTH - LEFT - RIGHT:g}",
            "y": f"{top:.1f}",
            "height": f"{bottom - top:.1f}",
        }
        ET.SubElement(root, "rect", {"class": "zone", **box})
    else:
        _horizontal(root, top, {"class": "level"})
    below = top < TOP + 12 or bottom > top
    _text(root, WIDTH - RIGHT - 3, top + 11 if below else top - 4, level.label, anchor="end", kind="note")


def _draw_line(root: ET.Element, plot: _Plot, line: Line) -> None:
    for values, kind in ((line.faint, "faint"), (line.values, "line")):
        for part in _contiguous(plot.steps, values) if values else ():
            points = plot.points(*zip(*part, strict=True))
            if len(points) == 1:
                x, y = points[0].split(",")
                ET.SubElement(root, "circle", {"class": f"dot f{line.color}", "cx": x, "cy": y, "r": "2.5"})
            else:
                ET.SubElement(root, "path", {"class": f"{kind} c{line.color}", "d": f"M{' '.join(points)}"})


def _horizontal(parent: ET.Element, y: float, attributes: dict[str, str] | None = None) -> None:
    ends = {"x1": f"{LEFT:g}", "x2": f"{WIDTH - RIGHT:g}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
    ET.SubElement(parent, "line", (attributes or {}) | ends)


def _text(parent: ET.Element, x: float, y: float, text: str, *, anchor: str, kind: str = "tick") -> None:
    ET.SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": kind}).text = text


def _contiguous(steps: Sequence[int], *rows: Values) -> list[list[tuple[float, ...]]]:
    """Split (step, value …) at the steps that lack a value.

    >>> _contiguous([1, 2, 3], [0.5, None, 0.7])
    [[(1, 0.5)], [(3, 0.7)]]
    """
    parts: list[list[tuple[float, ...]]] = [[]]
    for step, *column in zip(steps, *rows, strict=True):
        values = tuple(v for v in column if v is not None)
        if len(values) == len(column):
            parts[-1].append((step, *values))
        else:
            parts.append([])
    return [part for part in parts if part]
