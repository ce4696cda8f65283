"""Figures drawn: the metrics of one run or several → charts, legends and what is said beneath."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from grpo.config import Config
from grpo.inspection.run_reader import Metrics, RunRecord
from grpo.report.charts import COLOURS, Band, Line, Panel, Values, chart
from grpo.report.figures import Figure
from grpo.report.number_format import shown

SMOOTHED_FROM = 80
"""Steps from which single curves are drawn as running means, the steps themselves thin behind."""
SMOOTHED = "Thin: each step; bold: running mean."
STRETCHES = 20
"""Shares of the advantage are those of so many stretches of the run."""
MOST_POINTS = 600
"""More steps than this are averaged in equal stretches."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a figure came to."""

    views: tuple["View", ...]
    quiet: str = ""
    """The figure's title and metrics where there is nothing to see: all of them 0 throughout."""


@dataclass(frozen=True, slots=True)
class Reading:
    """An entry of a chart's legend, and what it reads at every step."""

    label: str
    colour: int
    mark: str
    """"line", "area", "band", "edge" or "thin"."""
    last: str
    values: str
    """One text a step, separated by "|"."""


@dataclass(frozen=True, slots=True)
class View:
    """A figure drawn."""

    title: str
    svg: Markup
    readings: tuple[Reading, ...]
    caption: str
    steps: str
    note: str = ""
    """What is not drawn, and why."""
    apart: bool = False
    """Across is not the training step."""


def draw(figure: Figure, runs: Sequence[RunRecord]) -> Drawn:
    """The figure for these runs: one chart for one run. Of several runs, the first series is overlaid in one chart;
    stacked ones and families of metrics stand side by side. Nothing where no run has the metric."""
    kept = [run for run in runs if _names(figure, run.metrics)]
    if not kept:
        return Drawn(())
    names = list(dict.fromkeys(name for run in kept for name in _names(figure, run.metrics)))
    if not any(row.get(name) for run in kept for row in run.metrics for name in names):
        return Drawn((), f"{figure.title} ({_listed(names)})")
    if len(runs) == 1:
        return Drawn((_alone(figure, kept[0], figure.title),))
    if figure.stacked or (len(names) > 1 and "(" in figure.series[0][0]):
        return Drawn(tuple(_alone(figure, run, f"{figure.title}: {run.name}") for run in kept))
    return Drawn((_overlaid(figure, runs),))


def _alone(figure: Figure, run: RunRecord, title: str) -> View:
    rows, note = thinned(run.metrics)
    steps = [int(row["step"] or 0) for row in rows]
    columns: dict[str, Values] = {name: [row.get(name) for row in rows] for name in _names(figure, rows)}
    idle = [name for name, values in columns.items() if not any(values)]
    if len(columns) > 1 and len(idle) < len(columns):
        columns = {name: values for name, values in columns.items() if name not in idle}
        note = " ".join(filter(None, (note, f"Always 0 and not drawn: {_listed(idle)}." if idle else "")))
    if figure.stacked == "to one":
        columns = _to_one(columns)
    labels = {name: _label(figure, name) for name in columns}
    smooth = not figure.stacked and len(columns) == 1 and len(rows) >= SMOOTHED_FROM
    note = " ".join(filter(None, (note, SMOOTHED if smooth else "")))
    order = _components(rows) if figure.by_component else list(columns)
    lines = [
        Line(
            labels[name],
            running_mean(values) if smooth else values,
            order.index(_component(name) if figure.by_component else name) % COLOURS,
            values if smooth else None,
        )
        for name, values in columns.items()
    ]
    bands = [_band(label, [edges(row) for row in rows], outlined) for label, edges, outlined in figure.bands]
    panel = _panel(figure, steps, lines, bands, run.config)
    mark = "area" if figure.stacked else "line"
    readings = [reading(line, figure.kind, mark) for line in lines]
    readings += [Reading(band.label, 0, "edge" if band.outlined else "band", "", "") for band in bands]
    svg = chart(panel, title=f"{title}, step {steps[0]} to {steps[-1]}")
    return View(title, svg, tuple(readings), figure.caption, " ".join(map(str, steps)), note)


def _overlaid(figure: Figure, runs: Sequence[RunRecord]) -> View:
    """The first series of each run in one chart; a run keeps its colour in all charts."""
    thin = [thinned(run.metrics) for run in runs]
    steps = sorted({int(row["step"] or 0) for rows, _ in thin for row in rows})
    lines = []
    for i, (run, (rows, _)) in enumerate(zip(runs, thin, strict=True)):
        names = _names(figure, rows, first=True)
        by_step = {int(row["step"] or 0): row.get(names[0]) for row in rows} if names else {}
        own = [by_step.get(step) for step in sorted(by_step)]
        drawn = dict(zip(sorted(by_step), running_mean(own) if len(own) >= SMOOTHED_FROM else own, strict=True))
        faint = [by_step.get(step) for step in steps] if len(own) >= SMOOTHED_FROM else None
        lines.append(Line(run.name, [drawn.get(step) for step in steps], i % COLOURS, faint))
    lines = [line for line in lines if any(v is not None for v in line.values)]
    levels = {level for run in runs for level in figure.levels(run.config)}
    shared = sorted(levels, key=lambda level: level.high)
    panel = Panel(steps, lines, (), shared, False, figure.kind, figure.floor, figure.ceiling)
    readings = [reading(line, figure.kind) for line in lines]
    label = _label(figure, _names(figure, runs[0].metrics or runs[-1].metrics, first=True)[0])
    more = len(figure.series) > 1 or bool(figure.bands)
    said = [f"Shown of each run: {label}." if more else "", *sorted({note for _, note in thin})]
    said.append(SMOOTHED if any(line.faint for line in lines) else "")
    note = " ".join(filter(None, said))
    svg = chart(panel, title=f"{figure.title} of {len(lines)} runs")
    return View(figure.title, svg, tuple(readings), figure.caption, " ".join(map(str, steps)), note)


def thinned(rows: Sequence[Metrics], most: int = MOST_POINTS) -> tuple[list[Metrics], str]:
    """At most ``most`` rows, each the mean of equally many consecutive ones, and what to say about it.

    >>> thinned([{"step": 1, "kl": 1.0}, {"step": 2, "kl": 3.0}, {"step": 3, "kl": None}], 2)
    ([{'step': 2, 'kl': 2.0}, {'step': 3, 'kl': None}], 'Each point is the mean of 2 steps.')
    """
    size = -(-len(rows) // most)
    if size <= 1:
        return list(rows), ""
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [_mean_row(part) for part in parts], f"Each point is the mean of {size} steps."


def _mean_row(part: Sequence[Metrics]) -> Metrics:
    row: Metrics = {}
    for name in dict.fromkeys(name for one in part for name in one):
        values = [v for one in part if (v := one.get(name)) is not None]
        row[name] = sum(values) / len(values) if values else None
    return row | {"step": part[-1]["step"]}


def running_mean(values: Values) -> list[float | None]:
    """Centred means over a thirtieth of the values either side taken together, at least 5; None stays None.

    >>> running_mean([0.0, 0.0, 5.0, 0.0, None])
    [1.6666666666666667, 1.25, 1.25, 1.6666666666666667, None]
    """
    reach = max(2, len(values) // 60)
    means: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if v is not None]
        means.append(None if value is None else sum(near) / len(near))
    return means


def _panel(figure: Figure, steps: list[int], lines: list[Line], bands: list[Band], config: Config) -> Panel:
    return Panel(
        steps, lines, bands, figure.levels(config), bool(figure.stacked), figure.kind, figure.floor, figure.ceiling
    )


def _band(label: str, edges: Sequence[tuple[float, float] | None], outlined: bool) -> Band:
    lows, highs = ([None if pair is None else pair[side] for pair in edges] for side in (0, 1))
    return Band(label, lows, highs, 0, outlined)


def reading(line: Line, kind: str, mark: str = "line") -> Reading:
    """The legend of a line: what it reads at each step and at the last one that has a value."""
    values = line.faint or line.values
    texts = [shown(value, kind) for value in values]
    last = next((shown(v, kind) for v in reversed(values) if v is not None), "")
    return Reading(line.label, line.colour, mark, last, "|".join(texts))


def _names(figure: Figure, rows: Sequence[Metrics], *, first: bool = False) -> list[str]:
    """Metrics of the figure that have a value in some row, in its order; with ``first`` those of its first series."""
    seen = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    series = figure.series[:1] if first else figure.series
    return list(dict.fromkeys(name for pattern, _ in series for name in seen if re.fullmatch(pattern, name)))


def _components(rows: Sequence[Metrics]) -> list[str]:
    """The components that ever said anything come first; the others need no colour of their own."""
    names = dict.fromkeys(
        name for row in rows for name in row if re.fullmatch("reward/.+/mean|advantage/.+/abs_mean", name)
    )
    spoke = [_component(name) for name in names if any(row.get(name) for row in rows)]
    return list(dict.fromkeys([*spoke, *map(_component, names)]))


def _component(name: str) -> str:
    return name.split("/")[1]


def _label(figure: Figure, name: str) -> str:
    for pattern, label in figure.series:
        if found := re.fullmatch(pattern, name):
            return label.format(*(group.replace("_", " ") for group in found.groups()))
    return name


def _to_one(columns: dict[str, Values]) -> dict[str, Values]:
    """Shares by stretch, at every step of it; None where all is 0.

    >>> _to_one({"a": [1.0, 0.0], "b": [3.0, None]})
    {'a': [0.25, None], 'b': [0.75, None]}
    """
    length = max(len(values) for values in columns.values())
    size = -(-length // STRETCHES)
    stretches = [slice(i, i + size) for i in range(0, length, size)]
    sums = {name: [sum(v or 0.0 for v in values[at]) for at in stretches] for name, values in columns.items()}
    totals = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    return {
        name: [own[i // size] / totals[i // size] if totals[i // size] else None for i in range(length)]
        for name, own in sums.items()
    }


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
