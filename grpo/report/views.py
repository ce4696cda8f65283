"""Draw `Figure`s: the metrics of one or several runs become charts with legends and captions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from grpo.inspection.run_reader import Metrics, RunRecord
from grpo.report.charts import COLORS, Line, Panel, Values, chart
from grpo.report.figures import Figure
from grpo.report.number_format import format_value

SMOOTH_FROM = 80
"""Number of steps from which single curves are drawn as running means."""
SMOOTHED = "Thin: each step; bold: running mean."
MAX_POINTS = 600
"""More steps than this are averaged in equal stretches."""


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """The legend of one series, with its value at each step."""

    label: str
    color: int
    last: str
    values: str
    """The formatted value of each step, separated by "|"."""


@dataclass(frozen=True, slots=True)
class ChartView:
    """A chart with its legend and caption."""

    title: str
    svg: Markup
    legend: tuple[LegendEntry, ...]
    caption: str
    steps: str
    note: str = ""
    """What is smoothed, averaged or not drawn."""


def draw(figure: Figure, runs: Sequence[RunRecord]) -> tuple[ChartView, ...]:
    """Draw a figure: nothing if no run has a nonzero value for it.

    Several runs are overlaid by the first series. A family of metrics gives one chart per run.
    """
    if all_zero(figure, runs):
        return ()
    if len(runs) == 1:
        return (_draw_run(figure, runs[0], figure.title),) if metric_names(figure, runs[0].metrics) else ()
    first_series = replace(figure, series=figure.series[:1])
    names = list(dict.fromkeys(name for run in runs for name in metric_names(first_series, run.metrics)))
    if len(names) > 1:
        with_values = [run for run in runs if metric_names(figure, run.metrics)]
        return tuple(_draw_run(figure, run, f"{figure.title}: {run.name}") for run in with_values)
    return (_overlay(figure, names[0], runs),) if names else ()


def all_zero(figure: Figure, runs: Sequence[RunRecord]) -> str:
    """Return the title and metrics of a figure whose values are all 0, else ""."""
    names = dict.fromkeys(name for run in runs for name in metric_names(figure, run.metrics))
    if not names or any(row.get(name) for run in runs for row in run.metrics for name in names):
        return ""
    return f"{figure.title} ({_join_names(list(names))})"


def metric_names(figure: Figure, rows: Sequence[Metrics]) -> list[str]:
    """Return the metrics of a figure that have a value in some row, in the figure's order."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return list(dict.fromkeys(name for pattern, _ in figure.series for name in names if re.fullmatch(pattern, name)))


def _draw_run(figure: Figure, run: RunRecord, title: str) -> ChartView:
    rows, note = thinned(run.metrics)
    steps = [int(row["step"] or 0) for row in rows]
    columns = {name: _column(figure, rows, name) for name in metric_names(figure, rows)}
    zero = [name for name, values in columns.items() if not any(values)]
    notes = [note]
    if zero and len(zero) < len(columns):
        columns = {name: values for name, values in columns.items() if name not in zero}
        notes.append(f"Always 0 and not drawn: {_join_names(zero)}.")
    smooth = len(columns) == 1 and len(rows) >= SMOOTH_FROM
    colors = _component_colors(rows)
    lines = [
        Line(
            _label(figure, name),
            running_mean(values) if smooth else values,
            colors.get(_component(name), i) % COLORS,
            values if smooth else None,
        )
        for i, (name, values) in enumerate(columns.items())
    ]
    legend = tuple(legend_entry(line, figure.kind) for line in lines)
    panel = Panel(steps, lines, (), figure.levels(run.config), figure.kind, figure.floor, figure.ceiling)
    notes += [SMOOTHED] if smooth else []
    svg = chart(panel, title=f"{title}, step {steps[0]} to {steps[-1]}")
    return ChartView(title, svg, legend, figure.caption, _joined(steps), " ".join(filter(None, notes)))


def _overlay(figure: Figure, name: str, runs: Sequence[RunRecord]) -> ChartView:
    """Draw one metric of each run in one chart. A run has the same colour in all charts."""
    thinned_runs = [thinned(run.metrics) for run in runs]
    steps = sorted({int(row["step"] or 0) for rows, _ in thinned_runs for row in rows})
    lines = []
    for i, (run, (rows, _)) in enumerate(zip(runs, thinned_runs, strict=True)):
        values = _column(figure, rows, name)
        if all(value is None for value in values):
            continue
        smooth = len(values) >= SMOOTH_FROM
        run_steps = [int(row["step"] or 0) for row in rows]
        drawn, faint = (
            dict(zip(run_steps, curve, strict=True)) for curve in (running_mean(values) if smooth else values, values)
        )
        lines.append(Line(run.name, [*map(drawn.get, steps)], i % COLORS, [*map(faint.get, steps)] if smooth else None))
    levels = sorted({level for run in runs for level in figure.levels(run.config)}, key=lambda level: level.high)
    notes = [f"Shown of each run: {_label(figure, name)}."] if len(figure.series) > 1 else []
    notes += sorted({note for _, note in thinned_runs if note}) + [SMOOTHED] * any(line.faint for line in lines)
    panel = Panel(steps, lines, (), levels, figure.kind, figure.floor, figure.ceiling)
    svg = chart(panel, title=f"{figure.title} of {len(lines)} runs")
    legend = tuple(legend_entry(line, figure.kind) for line in lines)
    return ChartView(figure.title, svg, legend, figure.caption, _joined(steps), " ".join(notes))


def legend_entry(line: Line, kind: str) -> LegendEntry:
    """The legend of a line, with its unsmoothed value at each step and at the last step that has one."""
    values = line.faint or line.values
    last = next((format_value(v, kind) for v in reversed(values) if v is not None), "")
    return LegendEntry(line.label, line.color, last, "|".join(format_value(v, kind) for v in values))


def thinned(rows: Sequence[Metrics], limit: int = MAX_POINTS) -> tuple[list[Metrics], str]:
    """Average equal stretches of rows so that at most ``limit`` remain; also return a note about it.

    >>> thinned([{"step": 1, "kl": 1.0}, {"step": 2, "kl": 3.0}, {"step": 3, "kl": None}], 2)
    ([{'step': 2, 'kl': 2.0}, {'step': 3, 'kl': None}], 'Each point is the mean of 2 steps.')
    """
    size = -(-len(rows) // limit)
    if size <= 1:
        return list(rows), ""
    stretches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [_mean_row(stretch) for stretch in stretches], f"Each point is the mean of {size} steps."


def _mean_row(rows: Sequence[Metrics]) -> Metrics:
    means: Metrics = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [v for row in rows if (v := row.get(name)) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means | {"step": rows[-1]["step"]}


def running_mean(values: Values) -> list[float | None]:
    """Centred means over a thirtieth of the values, at least 5; None stays None.

    >>> running_mean([0.0, 0.0, 5.0, 0.0, None])
    [1.6666666666666667, 1.25, 1.25, 1.6666666666666667, None]
    """
    reach = max(2, len(values) // 60)
    means: list[float | None] = []
    for i, value in enumerate(values):
        window = [v for v in values[max(0, i - reach) : i + reach + 1] if v is not None]
        means.append(None if value is None else sum(window) / len(window))
    return means


def _column(figure: Figure, rows: Sequence[Metrics], name: str) -> list[float | None]:
    return [None if (value := row.get(name)) is None else value / figure.unit for row in rows]


def _component_colors(rows: Sequence[Metrics]) -> dict[str, int]:
    """Number the components of the reward, those with a nonzero value first: one colour in all charts of a run."""
    names = dict.fromkeys(name for row in rows for name in row if _component(name))
    nonzero = [_component(name) for name in names if any(row.get(name) for row in rows)]
    return {name: i for i, name in enumerate(dict.fromkeys([*nonzero, *map(_component, names)]))}


def _component(name: str) -> str:
    """
    >>> _component("advantage/no_parse/abs_mean"), _component("loss")
    ('no_parse', '')
    """
    match = re.fullmatch("reward/(.+)/mean|advantage/(.+)/abs_mean", name)
    return (match[1] or match[2]) if match else ""


def _label(figure: Figure, name: str) -> str:
    matches = ((re.fullmatch(pattern, name), label) for pattern, label in figure.series)
    return next(label.format(*(g.replace("_", " ") for g in match.groups())) for match, label in matches if match)


def _join_names(names: Sequence[str], limit: int = 4) -> str:
    text = ", ".join(f"`{name}`" for name in names[:limit])
    return f"{text} and {len(names) - limit} more" if len(names) > limit else text


def _joined(steps: Sequence[int]) -> str:
    return " ".join(map(str, steps))
