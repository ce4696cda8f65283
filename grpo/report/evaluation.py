"""Evaluations before and after training: verdict, rates with intervals, confusion matrices, rules and tags."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from grpo.evaluation.statistics import mcnemar, wilson
from grpo.inspection.run_reader import GOLD, Evaluation, RunRecord, Subset
from grpo.report.charts import Line, Panel, chart
from grpo.report.number_format import percent
from grpo.report.views import ChartView, legend_entry

MODES = {"on": "with thinking", "off": "without thinking"}
SHADES = 6
"""A confusion cell has a shade from 0 to this by its fraction of the row."""
RATES = (
    ("exact", "Exact", "predicted = gold"),
    ("adjacent", "Adjacent", "within one level of gold"),
    ("dangerous_under", "Dangerous", "two or more levels less acute than gold"),
    ("high_acuity_under", "High-acuity under", "predicted less acute than gold, among cases with gold 1 or 2"),
    ("no_parse", "No parse", "no level could be read"),
    ("clipped_ratio", "Clipped", "cut by the evaluation's budget"),
)
"""(field, heading, definition). Fractions of all cases unless stated; an answer that does not parse counts as wrong."""
DENOMINATORS = {"high_acuity_under": "high_acuity_n"}
"""Rate → field with its number of cases; ``n`` for the others."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A fraction with its 95 % interval."""

    text: str
    interval: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A rate before training and, if there is a later evaluation, after."""

    label: str
    n: int
    before: Rate
    after: Rate | None
    track: Markup


@dataclass(frozen=True, slots=True)
class Flips:
    """Number of cases that training fixed and broke."""

    fixed: int
    broken: int
    p: float | None
    """Exact McNemar test; None if cases have several answers, which are not independent trials."""

    def __str__(self) -> str:
        test = "" if self.p is None else f"; exact McNemar test, {p_value(self.p)}"
        return f"{self.fixed} fixed, {self.broken} broken{test}"


ConfusionRows = tuple[tuple[str, tuple[tuple[int, int, bool], ...]], ...]
"""(gold, (count, shade, whether on the diagonal) for each predicted level and no parse)."""


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """The first and the last evaluation of one set in one thinking mode."""

    run: str
    cases: str
    mode: str
    """"with thinking" or "without thinking"."""
    first: Evaluation
    last: Evaluation | None
    """None if there is only one evaluation."""
    exact: Pair
    rates: tuple[Pair | None, ...]
    """In the order of `RATES`; None without any case, or in a record from before the rate had this meaning."""
    confusion: tuple[tuple[str, ConfusionRows], ...]
    """(title, rows)."""
    by_rule: tuple[Pair, ...]
    by_tag: tuple[Pair, ...]
    flips: Flips | None
    """None if the answers are missing."""
    constant: str
    """The best constant answer and its score."""


def before_after(run: RunRecord) -> tuple[BeforeAfter, ...]:
    """Return one `BeforeAfter` per evaluated set and mode, sets in the config's order."""
    by_set: dict[tuple[str, str], list[Evaluation]] = {}
    for record in run.evaluations:
        by_set.setdefault((record.cases, record.thinking), []).append(record)
    return tuple(_compare(run, records[0], records[-1] if len(records) > 1 else None) for records in by_set.values())


def verdict(run: RunRecord, cases: str) -> tuple[str, str]:
    """Return (headline, sentence): what training did to exact answers on a set in each thinking mode.

    The headline claims a change if the exact McNemar test over the cases gives p < 0.05, or, without the answers, if
    the 95 % intervals before and after do not overlap.
    """
    compared = [item for item in before_after(run) if item.cases == cases]
    done, steps = int(run.metrics[-1]["step"] or 0) if run.metrics else 0, run.config.train.steps
    progress = f"At step {done} of {steps}" if 0 < done < steps else ""
    if not compared:
        return progress or "Not evaluated yet", "There is no evaluation to judge by, only the curves."
    on_set = f"{cases}, {compared[0].first.n} cases"
    note = "In brackets: 95 % Wilson intervals."
    if any(item.last is None for item in compared):
        rates = " and ".join(f"{_with_interval(item.exact.before)} {item.mode}" for item in compared)
        return progress or "Before training only", f"Exact answers before training on {on_set}: {rates}. {note}"
    changes = " and ".join(
        f"{_with_interval(item.exact.before)} to {_with_interval(item.exact.after)} {item.mode}" for item in compared
    )
    return _headline(compared), f"On {on_set}, exact answers went from {changes}. {note}"


def judged_set(runs: Sequence[RunRecord]) -> str:
    """Return the first set, in the order of the configs, that all runs evaluated, else ""."""
    names = [name for run in runs for name in (*run.config.evaluate.before_and_after, *run.config.evaluate.periodic)]
    names += [record.cases for run in runs for record in run.evaluations]
    evaluated = [{record.cases for record in run.evaluations} for run in runs]
    return next((name for name in names if all(name in sets for sets in evaluated)), "")


def over_steps(run: RunRecord) -> tuple[ChartView, ...]:
    """Chart exact answers over training for each set that was evaluated three times or more."""
    views = []
    for cases in dict.fromkeys(record.cases for record in run.evaluations):
        records = [record for record in run.evaluations if record.cases == cases]
        steps = sorted({record.step for record in records})
        if len(steps) < 3:
            continue
        lines = []
        for i, mode in enumerate(dict.fromkeys(record.thinking for record in records)):
            by_step = {record.step: record.exact for record in records if record.thinking == mode}
            lines.append(Line(MODES[mode], [by_step.get(step) for step in steps], i))
        title = f"Exact answers on {cases}"
        svg = chart(Panel(steps, lines, kind="percent", ceiling=1.0), title=title)
        caption = f"Fraction of the {records[0].n} cases of {cases} answered exactly, evaluated during training."
        legend = tuple(legend_entry(line, "percent") for line in lines)
        views.append(ChartView(title, svg, legend, caption, " ".join(map(str, steps))))
    return tuple(views)


def _with_interval(rate: Rate | None) -> str:
    return f"{rate.text} [{rate.interval}]" if rate else ""


def _headline(compared: Sequence[BeforeAfter]) -> str:
    changes = [_change(item) for item in compared]
    if len(set(changes)) == 1:
        where = "in both thinking modes" if len(compared) > 1 else compared[0].mode
        claims = {1: "Exact answers rose", -1: "Exact answers fell", 0: "No clear change in exact answers"}
        return f"{claims[changes[0]]} {where}"
    verbs = {1: "rose", -1: "fell", 0: "did not clearly change"}
    parts = (f"{verbs[change]} {item.mode}" for change, item in zip(changes, compared, strict=True))
    return f"Exact answers {', '.join(parts)}"


def _change(item: BeforeAfter) -> int:
    """+1 for a clear rise, −1 for a clear fall, else 0."""
    before, after, flips = item.exact.before, item.exact.after, item.flips
    if after is None:
        return 0
    if flips is not None and flips.p is not None:
        return ((flips.fixed > flips.broken) - (flips.fixed < flips.broken)) * (flips.p < 0.05)
    return (after.low > before.high) - (after.high < before.low)


def _compare(run: RunRecord, first: Evaluation, last: Evaluation | None) -> BeforeAfter:
    pairs = []
    for field, heading, _ in RATES:
        before, after = rate_of(first, field), rate_of(last, field) if last else None
        pairs.append(_pair(heading, first.n, before, after) if before else None)
    mode, exact = MODES[first.thinking], pairs[0]
    assert exact is not None  # a fraction of all cases, of which there is at least one
    return BeforeAfter(
        run=run.name,
        cases=first.cases,
        mode=mode,
        first=first,
        last=last,
        exact=exact,
        rates=tuple(pairs),
        confusion=tuple(
            (f"{when}, step {record.step}", _confusion(record))
            for when, record in (("before", first), ("after", last))
            if record
        ),
        by_rule=_subsets(first.by_rule, last.by_rule if last else {}),
        by_tag=_subsets(first.by_tag, last.by_tag if last else {}),
        flips=_flips(run, first, last) if last else None,
        constant=_best_constant(first),
    )


def rate_of(record: Evaluation, field: str) -> Rate | None:
    """Return a rate of an evaluation, with the recorded interval if there is one, else Wilson's; None without cases."""
    value, n = getattr(record, field), getattr(record, DENOMINATORS.get(field, "n"))
    return _rate(value, n, record.intervals.get(field)) if value is not None and n else None


def _rate(value: float, n: int, interval: tuple[float, float] | None = None) -> Rate:
    low, high = interval or wilson(value * n, n)
    return Rate(percent(value), f"{100 * low:.1f}–{100 * high:.1f}", value, low, high)


def _pair(label: str, n: int, before: Rate, after: Rate | None) -> Pair:
    return Pair(label, n, before, after, _track(before, after))


def _subsets(before: Mapping[str, Subset], after: Mapping[str, Subset]) -> tuple[Pair, ...]:
    """Pair the exact answers of each rule or tag that has cases."""
    rates = [
        {
            name: _rate(subset.exact, subset.n)
            for name, subset in subsets.items()
            if subset.n and subset.exact is not None
        }
        for subsets in (before, after)
    ]
    return tuple(_pair(name, before[name].n, rate, rates[1].get(name)) for name, rate in rates[0].items())


def _confusion(record: Evaluation) -> ConfusionRows:
    rows = []
    for gold in GOLD:
        counts = record.confusion.get(gold, (0,) * 6)
        total = sum(counts) or 1
        cells = ((n, -(-SHADES * n // total), str(level) == gold) for level, n in enumerate(counts, 1))
        rows.append((gold, tuple(cells)))
    return tuple(rows)


def _flips(run: RunRecord, first: Evaluation, last: Evaluation) -> Flips | None:
    before, after = run.exact_answers.get(first.key, {}), run.exact_answers.get(last.key, {})
    both = before.keys() & after.keys()
    if not both:
        return None
    fixed = sum(after[case] and not before[case] for case in both)
    broken = sum(before[case] and not after[case] for case in both)
    return Flips(fixed, broken, None if any(sample for _, sample in both) else mcnemar(fixed, broken))


def p_value(p: float) -> str:
    """
    >>> p_value(0.21875), p_value(0.004), p_value(1e-9)
    ('p = 0.22', 'p = 0.004', 'p < 0.001')
    """
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2f}" if p >= 0.01 else f"p = {p:.3f}"


def _best_constant(record: Evaluation) -> str:
    totals = {gold: sum(counts) for gold, counts in record.confusion.items()}
    if not any(totals.values()):
        return "unknown"
    count, gold = max((count, gold) for gold, count in totals.items())
    return f"always {gold}: {percent(count / sum(totals.values()))}"


def _track(before: Rate, after: Rate | None) -> Markup:
    """Draw a rate from 0 to 100 % with its interval: hollow before, filled after."""
    root = ET.Element("svg", {"viewBox": "0 0 200 20", "class": "track", "aria-hidden": "true"})
    ET.SubElement(root, "line", {"class": "rail", "x1": "8", "x2": "192", "y1": "10", "y2": "10"})
    rates = [("before", before), *([("after", after)] if after else [])]
    for kind, rate in rates:
        ends = {"x1": f"{8 + 184 * rate.low:.1f}", "x2": f"{8 + 184 * rate.high:.1f}", "y1": "10", "y2": "10"}
        ET.SubElement(root, "line", {"class": f"reach {kind}", **ends})
    for kind, rate in rates:
        ET.SubElement(
            root, "circle", {"class": f"point {kind}", "cx": f"{8 + 184 * rate.value:.1f}", "cy": "10", "r": "4.5"}
        )
    return Markup(ET.tostring(root, encoding="unicode"))
