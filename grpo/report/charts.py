"""Small line and area charts as SVG, drawn by hand: text stays text, colours are the page's.

A chart is 360 units wide, the width of a phone and of a third of a page, so that its letters are never scaled much.
Classes carry all colour: ``c0`` … ``c7`` for what is drawn, named in the style sheet for light, dark and paper.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from grpo.report.number_format import GIB, tick_labels, ticks

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 8.0, 10.0, 24.0
COLOURS = 8

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve over the panel's steps; None leaves a gap."""

    label: str
    values: Values
    colour: int
    faint: Values | None = None
    """Drawn thin behind it: what ``values`` smooths."""
    thin: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """The area between two curves."""

    label: str
    low: Values
    high: Values
    colour: int
    outlined: bool = False
    """Its edges as dashed lines in place of a filled area."""


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal mark, from ``low`` to ``high``: a line where they are equal, else a zone."""

    label: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart, all its data resolved."""

    steps: Sequence[int]
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    levels: Sequence[Level] = ()
    stacked: bool = False
    kind: str = "plain"
    """Of the y axis: a key of `grpo.report.number_format.FORMATS`."""
    floor: float | None = None
    """The y axis begins here at the highest; None: where the data do."""
    ceiling: float | None = None


def chart(panel: Panel, *, title: str) -> Markup:
    """The panel as one ``<svg>`` that reads aloud as ``title``."""
    root = ET.Element(
        "svg", {"viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}", "role": "img", "aria-label": title, "class": "chart"}
    )
    low, high = y_range(panel)
    plot = _Plot(panel.steps, low, high)
    for level in panel.levels:
        _draw_zone(root, plot, level)
    _draw_grid(root, plot, panel)
    for band in panel.bands:
        _draw_band(root, plot, band)
    if panel.stacked:
        _draw_stack(root, plot, panel.lines)
    else:
        for line in reversed(panel.lines):
            _draw_line(root, plot, line)
    for level in panel.levels:
        _draw_level(root, plot, level)
    at = {"class": "at", "x1": "0", "x2": "0", "y1": f"{TOP:g}", "y2": f"{HEIGHT - BOTTOM:g}"}
    ET.SubElement(root, "line", at)
    return Markup(ET.tostring(root, encoding="unicode"))


def y_range(panel: Panel) -> tuple[float, float]:
    """The y axis's ends: the data's, widened to the panel's floor, ceiling and levels, and never empty."""
    if panel.stacked:
        columns = zip(*(line.values for line in panel.lines), strict=True)
        values = [sum(v or 0.0 for v in column) for column in columns]
    else:
        drawn: list[Values] = [line.values for line in panel.lines]
        drawn += [line.faint for line in panel.lines if line.faint is not None]
        drawn += [edge for band in panel.bands for edge in (band.low, band.high)]
        values = [v for row in drawn for v in row if v is not None]
    values += [edge for level in panel.levels for edge in (level.low, level.high)]
    values += [edge for edge in (panel.floor, panel.ceiling) if edge is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        low, high = (low, low + 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    room = 0.06 * (high - low)
    headroom = 2 * room if any(level.label and level.low == level.high == high for level in panel.levels) else room
    at_floor = panel.floor is not None and low >= panel.floor
    at_ceiling = panel.ceiling is not None and high <= panel.ceiling
    return low if at_floor else low - room, high if at_ceiling else high + headroom


@dataclass(frozen=True, slots=True)
class _Plot:
    """Steps and values → places in the drawing."""

    steps: Sequence[int]
    low: float
    high: float

    def x(self, step: float) -> float:
        first, last = self.steps[0], self.steps[-1]
        share = (step - first) / (last - first) if last > first else 0.5 + (step - first)
        share = min(1.0, max(0.0, share))
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def points(self, steps: Iterable[float], values: Iterable[float]) -> list[str]:
        return [f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in zip(steps, values, strict=True)]


def _draw_grid(root: ET.Element, plot: _Plot, panel: Panel) -> None:
    grid = ET.SubElement(root, "g", {"class": "grid"})
    unit = GIB if panel.kind == "gibibytes" else 1
    marks = [unit * mark for mark in ticks(plot.low / unit, plot.high / unit)]
    for value, label in zip(marks, tick_labels(marks, panel.kind), strict=True):
        y = plot.y(value)
        ET.SubElement(grid, "line", {"x1": f"{LEFT:g}", "x2": f"{WIDTH - RIGHT:g}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"})
        _text(grid, LEFT - 6, y + 3.5, label, anchor="end")
    first, last = panel.steps[0], panel.steps[-1]
    inner = [t for t in ticks(first, last, 6) if t == int(t) and min(t - first, last - t) > 0.1 * (last - first)]
    for step in dict.fromkeys([first, *inner, last]):
        anchor = "middle" if first == last else {first: "start", last: "end"}.get(int(step), "middle")
        _text(grid, plot.x(step), HEIGHT - 8, f"{int(step):,}", anchor=anchor)


def _draw_band(root: ET.Element, plot: _Plot, band: Band) -> None:
    for run in _runs(plot.steps, band.low, band.high):
        steps, lows, highs = ([part[i] for part in run] for i in range(3))
        up, down = plot.points(steps, highs), plot.points(steps, lows)
        if band.outlined:
            for edge in (up, down):
                ET.SubElement(root, "path", {"class": f"edge c{band.colour}", "d": f"M{' '.join(edge)}"})
        else:
            d = f"M{' '.join(up + down[::-1])}Z"
            ET.SubElement(root, "path", {"class": f"band f{band.colour}", "d": d})


def _draw_stack(root: ET.Element, plot: _Plot, lines: Sequence[Line]) -> None:
    """Areas on top of each other; a step without any value is a gap."""
    there = [None if all(v is None for v in column) else 0.0 for column in zip(*(o.values for o in lines), strict=True)]
    base = [0.0] * len(there)
    for line in lines:
        top = [b + (v or 0.0) for b, v in zip(base, line.values, strict=True)]
        for run in _runs(plot.steps, there, base, top):
            if len(run) == 1:  # as wide as half a step either side
                run = [(run[0][0] + side, *run[0][1:]) for side in (-0.5, 0.5)]
            steps, low, high = ([part[i] for part in run] for i in (0, 2, 3))
            d = f"M{' '.join(plot.points(steps, high) + plot.points(steps, low)[::-1])}Z"
            ET.SubElement(root, "path", {"class": f"area f{line.colour}", "d": d})
        base = top


def _draw_line(root: ET.Element, plot: _Plot, line: Line) -> None:
    for values, kind in ((line.faint, "faint"), (line.values, "thin" if line.thin else "line")):
        for run in _runs(plot.steps, values or ()) if values else ():
            points = plot.points([part[0] for part in run], [part[1] for part in run])
            if len(points) == 1:
                x, y = points[0].split(",")
                ET.SubElement(root, "circle", {"class": f"dot f{line.colour}", "cx": x, "cy": y, "r": "2.5"})
            else:
                ET.SubElement(root, "path", {"class": f"{kind} c{line.colour}", "d": f"M{' '.join(points)}"})


def _draw_zone(root: ET.Element, plot: _Plot, level: Level) -> None:
    if level.high > level.low:
        top, bottom = plot.y(level.high), plot.y(level.low)
        box = {
            "x": f"{LEFT:g}",
            "width": f"{WIDTH - LEFT - RIGHT:g}",
            "y": f"{top:.1f}",
            "height": f"{bottom - top:.1f}",
        }
        ET.SubElement(root, "rect", {"class": "zone", **box})


def _draw_level(root: ET.Element, plot: _Plot, level: Level) -> None:
    y = plot.y(level.high)
    if level.high == level.low:
        place = {"x1": f"{LEFT:g}", "x2": f"{WIDTH - RIGHT:g}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        ET.SubElement(root, "line", {"class": "level", **place})
    below = y < TOP + 12 or level.high > level.low
    _text(root, WIDTH - RIGHT - 3, y + 11 if below else y - 4, level.label, anchor="end", kind="note")


def _text(parent: ET.Element, x: float, y: float, text: str, *, anchor: str, kind: str = "tick") -> None:
    where = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": kind}
    ET.SubElement(parent, "text", where).text = text


def _runs(steps: Sequence[int], *rows: Values) -> list[list[tuple[float, ...]]]:
    """Stretches of (step, values …) in which no value is missing.

    >>> _runs([1, 2, 3], [0.5, None, 0.7])
    [[(1, 0.5)], [(3, 0.7)]]
    """
    found: list[list[tuple[float, ...]]] = [[]]
    for step, *values in zip(steps, *rows, strict=True):
        whole = tuple(v for v in values if v is not None)
        if len(whole) == len(values):
            found[-1].append((step, *whole))
        else:
            found.append([])
    return [run for run in found if run]
