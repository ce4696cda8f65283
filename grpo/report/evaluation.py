"""Evaluations before and after: the verdict in a sentence, rates with their intervals, confusion, rules and tags."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from grpo.evaluation.statistics import mcnemar, wilson
from grpo.inspection.run_reader import GOLD, Evaluation, RunRecord, Subset
from grpo.report.charts import Line, Panel, chart
from grpo.report.number_format import percent
from grpo.report.views import View, reading

MODES = {"on": "with thinking", "off": "without thinking"}
SHADES = 6
"""Steps of a confusion cell's shade, 0 … 6, by its share of the row."""
RATES = (
    ("exact", "Exact", "predicted = gold"),
    ("adjacent", "Adjacent", "within one level of gold"),
    ("dangerous_under", "Dangerous", "two or more levels less acute than gold"),
    ("high_acuity_under", "High-acuity under", "of the cases with gold 1 or 2 alone: predicted less acute than gold"),
    ("no_parse", "No parse", "no level could be read"),
    ("clipped_ratio", "Clipped", "cut by the evaluation's budget"),
)
"""(field, heading, definition); each a share of all cases but where it says otherwise, and an answer that does not
parse counts as wrong."""
DENOMINATORS = {"high_acuity_under": "high_acuity_n"}
"""Field → the field that says how many cases it is a share of; ``n`` for the others."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with its 95 % Wilson interval."""

    text: str
    interval: str
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One rate before and, where there is a later evaluation, after."""

    label: str
    n: int
    before: Rate
    after: Rate | None
    track: Markup


@dataclass(frozen=True, slots=True)
class Cell:
    count: int
    shade: int
    diagonal: bool


@dataclass(frozen=True, slots=True)
class Confusion:
    title: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True, slots=True)
class Flips:
    """Case by case: what training fixed and broke."""

    fixed: int
    broken: int
    p: float | None
    """Of the exact McNemar test; None where a case has several answers, which are no independent trials."""

    def __str__(self) -> str:
        test = "" if self.p is None else f"; exact McNemar test, {p_value(self.p)}"
        return f"{self.fixed} fixed, {self.broken} broken{test}"


@dataclass(frozen=True, slots=True)
class Span:
    """The first and the last evaluation of one set in one mode."""

    run: str
    cases: str
    mode: str
    """With or without thinking."""
    steps: tuple[int, ...]
    n: int
    high_acuity_n: int | None
    """Of the n, those of ESI 1 and 2."""
    exact: Pair
    rates: tuple[Pair | None, ...]
    """Beside `RATES`; None where no case counts, or where the record is from before the rate meant this."""
    confusion: tuple[Confusion, ...]
    by_rule: tuple[Pair, ...]
    by_tag: tuple[Pair, ...]
    flips: "Flips | None"
    """None where the answers are not there."""
    constant: str
    """What the best constant answer scores."""
    more: tuple[str, ...]
    """What else is known of the answers: their mean length in tokens, quadratic weighted kappa."""


def spans(run: RunRecord) -> tuple[Span, ...]:
    """A span for each set and mode that was evaluated, sets in the config's order."""
    found: dict[tuple[str, str], list[Evaluation]] = {}
    for record in run.evaluations:
        found.setdefault((record.cases, record.thinking), []).append(record)
    return tuple(_span(run, records) for records in found.values())


def verdict(run: RunRecord, cases: str = "") -> tuple[str, str]:
    """(headline, sentence): what training did to exact answers on a set, mode by mode.

    Args:
        cases: the set; the first of ``evaluate.ends`` that was evaluated where it is "".

    The headline claims a change where the exact McNemar test over the set's cases gives p < 0.05; without the
    answers, only where the 95 % intervals before and after do not overlap.
    """
    main = [span for span in spans(run) if span.cases == (cases or first_set(run))]
    if not main:
        return _progress(
            run, "Not evaluated yet"
        ), "No evaluation is there to judge by: the curves are all that is known."
    first = main[0]
    if any(span.exact.after is None for span in main):
        told = " and ".join(f"{span.exact.before.text} [{span.exact.before.interval}] {span.mode}" for span in main)
        return _progress(run, "Before training only"), (
            f"Before training, the exact answers on {first.cases}, {first.n} cases, are {told}. In brackets: 95 % "
            "Wilson intervals."
        )
    told = " and ".join(f"{_told(span.exact)} {span.mode}" for span in main)
    return _headline(main), (
        f"On {first.cases}, {first.n} cases, exact answers went from {told}. In brackets: 95 % Wilson intervals."
    )


def over_steps(run: RunRecord) -> tuple[View, ...]:
    """Exact answers over training, a chart for each set that was evaluated three times or more."""
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
        readings = tuple(reading(line, "percent") for line in lines)
        title = f"Exact answers on {cases}"
        svg = chart(Panel(steps, lines, kind="percent", ceiling=1.0), title=title)
        caption = f"Share of the {records[0].n} cases of {cases} answered exactly, evaluated during training."
        views.append(View(title, svg, readings, caption, " ".join(map(str, steps))))
    return tuple(views)


def common_set(runs: Sequence[RunRecord]) -> str:
    """The set to judge these runs by: the first that all of them evaluated, else ""."""
    shared = [{record.cases for record in run.evaluations} for run in runs]
    names = dict.fromkeys(name for run in runs for name in (*run.config.evaluate.ends, *run.config.evaluate.during))
    return next((name for name in names if all(name in there for there in shared)), "")


def first_set(run: RunRecord) -> str:
    """The first set of ``evaluate.ends`` that was evaluated, else any that was."""
    there = [record.cases for record in run.evaluations]
    return next((name for name in run.config.evaluate.ends if name in there), there[0] if there else "")


def _progress(run: RunRecord, otherwise: str) -> str:
    done, steps = int(run.metrics[-1]["step"] or 0) if run.metrics else 0, run.config.train.steps
    if done == steps or not done:
        return otherwise
    return f"At step {done} of {steps}"


def _told(pair: Pair) -> str:
    assert pair.after is not None  # the caller has looked
    return f"{pair.before.text} [{pair.before.interval}] to {pair.after.text} [{pair.after.interval}]"


def _headline(main: Sequence[Span]) -> str:
    moves = [_move(span) for span in main]
    where = "in both thinking modes" if len(main) > 1 else main[0].mode
    if len(set(moves)) == 1:
        said = {1: "Exact answers rose", -1: "Exact answers fell", 0: "No clear change in exact answers"}
        return f"{said[moves[0]]} {where}"
    verbs = {1: "rose", -1: "fell", 0: "did not clearly change"}
    return "Exact answers " + ", ".join(f"{verbs[move]} {span.mode}" for move, span in zip(moves, main, strict=True))


def _move(span: Span) -> int:
    """+1 for a clear rise, −1 for a clear fall, else 0."""
    before, after, flips = span.exact.before, span.exact.after, span.flips
    if after is None:
        return 0
    if flips is not None and flips.p is not None:
        return ((flips.fixed > flips.broken) - (flips.fixed < flips.broken)) * (flips.p < 0.05)
    return (after.low > before.high) - (after.high < before.low)


def _span(run: RunRecord, records: Sequence[Evaluation]) -> Span:
    first, last = records[0], records[-1]
    later = last if len(records) > 1 else None
    mode = MODES[first.thinking]
    exact = _rate_pair(mode, "exact", first, later)
    assert exact is not None  # of all cases, and there is one
    return Span(
        run=run.name,
        cases=first.cases,
        mode=mode,
        steps=tuple(record.step for record in records),
        n=first.n,
        high_acuity_n=first.high_acuity_n,
        exact=exact,
        rates=tuple(_rate_pair(heading, field, first, later) for field, heading, _ in RATES),
        confusion=tuple(
            _confusion(f"{'before' if record is first else 'after'}, step {record.step}", record)
            for record in ([first, last] if later else [first])
        ),
        by_rule=_subsets(first.by_rule, later.by_rule if later else {}),
        by_tag=_subsets(first.by_tag, later.by_tag if later else {}),
        flips=_flips(run, first, later),
        constant=_constant(first),
        more=tuple(_more(first, later)),
    )


def _more(first: Evaluation, later: Evaluation | None) -> Iterator[str]:
    records = [first, later] if later else [first]
    yield f"mean length {' → '.join(f'{record.mean_length:.0f}' for record in records)}"
    if all(record.qwk is not None for record in records):
        yield f"kappa {' → '.join(f'{record.qwk:.3f}' for record in records)}"


def _rate_pair(label: str, field: str, first: Evaluation, later: Evaluation | None) -> Pair | None:
    before, after = _rate_of(first, field), _rate_of(later, field) if later else None
    return None if before is None else _pair(label, first.n, before, after)


def _rate_of(record: Evaluation, field: str) -> Rate | None:
    share, n = getattr(record, field), getattr(record, DENOMINATORS.get(field, "n"))
    return _rate(share, n, record.intervals.get(field)) if share is not None and n else None


def _rate(share: float, n: int, interval: tuple[float, float] | None = None) -> Rate:
    low, high = interval or wilson(share * n, n)
    return Rate(percent(share), f"{100 * low:.1f}–{100 * high:.1f}", share, low, high)


def _pair(label: str, n: int, before: Rate, after: Rate | None) -> Pair:
    return Pair(label, n, before, after, track(before, after))


def _subsets(before: Mapping[str, Subset], after: Mapping[str, Subset]) -> tuple[Pair, ...]:
    pairs = []
    for name, subset in before.items():
        if not subset.n or subset.exact is None:
            continue
        later = after.get(name)
        known = later is not None and later.n and later.exact is not None
        pairs.append(_pair(name, subset.n, _subset_rate(subset), _subset_rate(later) if later and known else None))
    return tuple(pairs)


def _subset_rate(subset: Subset) -> Rate:
    return _rate(subset.exact or 0.0, subset.n)


def _confusion(title: str, record: Evaluation) -> Confusion:
    rows = []
    for gold in GOLD:
        counts = record.confusion.get(gold, (0,) * 6)
        total = sum(counts)
        rows.append(
            (
                gold,
                tuple(
                    Cell(count, -(-SHADES * count // total) if total else 0, str(level) == gold)
                    for level, count in enumerate(counts, 1)
                ),
            )
        )
    return Confusion(title, tuple(rows))


def _flips(run: RunRecord, first: Evaluation, last: Evaluation | None) -> Flips | None:
    before, after = run.right.get(first.key, {}), run.right.get(last.key, {}) if last else {}
    both = before.keys() & after.keys()
    if not both:
        return None
    fixed = sum(after[case] and not before[case] for case in both)
    broken = sum(before[case] and not after[case] for case in both)
    return Flips(fixed, broken, None if any(sample for _, sample in both) else mcnemar(fixed, broken))


def p_value(p: float) -> str:
    """A p-value to the digits that mean something.

    >>> p_value(0.21875), p_value(0.004), p_value(1e-9)
    ('p = 0.22', 'p = 0.004', 'p < 0.001')
    """
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2f}" if p >= 0.01 else f"p = {p:.3f}"


def _constant(record: Evaluation) -> str:
    if not any(map(sum, record.confusion.values())):
        return "unknown"
    count, gold = max((sum(counts), gold) for gold, counts in record.confusion.items())
    return f"always {gold}: {percent(count / sum(map(sum, record.confusion.values())))}"


def track(before: Rate, after: Rate | None) -> Markup:
    """A rate from 0 to 100 % with its interval: hollow before, filled after."""
    root = ET.Element("svg", {"viewBox": "0 0 200 20", "class": "track", "aria-hidden": "true"})
    ET.SubElement(root, "line", {"class": "rail", "x1": "8", "x2": "192", "y1": "10", "y2": "10"})
    rates = [("before", before), *([("after", after)] if after else [])]
    for kind, rate in rates:
        ends = {"x1": f"{_x(rate.low):.1f}", "x2": f"{_x(rate.high):.1f}", "y1": "10", "y2": "10"}
        ET.SubElement(root, "line", {"class": f"reach {kind}", **ends})
    for kind, rate in rates:
        ET.SubElement(root, "circle", {"class": f"point {kind}", "cx": f"{_x(rate.share):.1f}", "cy": "10", "r": "4.5"})
    return Markup(ET.tostring(root, encoding="unicode"))


def _x(share: float) -> float:
    return 8 + 184 * share
