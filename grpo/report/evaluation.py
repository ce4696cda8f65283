"""Evaluations before and after training: rates with intervals, constant answers, confusion matrices, rules and tags."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo.evaluation.metrics import baselines
from grpo.evaluation.statistics import mcnemar, wilson
from grpo.inspection.run_reader import GOLD, Evaluation, RunRecord, Subset
from grpo.report.charts import NOTHING, Chart, Line, line_chart, number

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
MAX_CASES = 1_000_000
"""Size of a case set up to which constant answers are scored."""

ConfusionRows = list[tuple[str, list[tuple[int, int, bool]]]]
"""(gold, (count, shade, whether on the diagonal) for each predicted level and no parse)."""


class SubsetRow(NamedTuple):
    """Exact answers among the cases of one rule or tag."""

    name: str
    thinking: str
    n: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class EvaluatedSet:
    """The first and the last evaluation of one case set in each thinking mode, as the rows of tables."""

    cases: str
    n: int
    high_acuity_n: int | None
    rows: list[dict[str, Any]]
    """model, thinking, cells in the order of `RATES`, mean length, kappa; then the five constant answers."""
    rules: list[SubsetRow]
    tags: list[SubsetRow]
    changes: list[str]
    """Number of cases that training fixed and broke in each mode whose answers are recorded."""
    confusion: list[tuple[str, ConfusionRows]]
    """(title, rows)."""


def evaluated_sets(run: RunRecord) -> list[EvaluatedSet]:
    """Return the evaluated case sets of a run in the config's order."""
    sets = []
    for cases in dict.fromkeys(record.cases for record in run.evaluations):
        first, *_ = records = [record for record in run.evaluations if record.cases == cases]
        shown = EvaluatedSet(cases, first.n, first.high_acuity_n, [], [], [], [], [])
        for mode in dict.fromkeys(record.thinking for record in records):
            of_mode = [record for record in records if record.thinking == mode]
            before, after = of_mode[0], of_mode[-1] if len(of_mode) > 1 else None
            for record in (before, after) if after else (before,):
                shown.rows.append(_evaluation_row(record))
                shown.confusion.append((f"thinking {mode}, step {record.step}", _confusion(record)))
            shown.rules.extend(_subset_rows(mode, before.by_rule, after.by_rule if after else {}))
            shown.tags.extend(_subset_rows(mode, before.by_tag, after.by_tag if after else {}))
            if after and (change := _change(run, before, after)):
                shown.changes.append(f"thinking {mode}: {change}")
        shown.rows.extend(_constant_rows(first))
        sets.append(shown)
    return sets


def exact_over_steps(run: RunRecord) -> Iterator[Chart]:
    """Chart exact answers over training for each set that was evaluated at three steps or more."""
    for cases in dict.fromkeys(record.cases for record in run.evaluations):
        records = [record for record in run.evaluations if record.cases == cases]
        if len({record.step for record in records}) >= 3:
            lines = [
                Line(f"thinking {mode}", [(r.step, r.exact) for r in records if r.thinking == mode], color)
                for color, mode in enumerate(dict.fromkeys(record.thinking for record in records))
            ]
            caption = f"Fraction of the {records[0].n} cases answered exactly."
            yield line_chart(f"{run.name}: exact answers on {cases}", caption, lines, percent=True)


def _evaluation_row(record: Evaluation) -> dict[str, Any]:
    cells = []
    for field, _, _ in RATES:
        value, n = getattr(record, field), record.high_acuity_n if field == "high_acuity_under" else record.n
        # without high_acuity_n, the rate of an old record is a fraction of all cases
        cells.append(_rate(value, n, record.intervals.get(field)) if value is not None and n else NOTHING)
    model = f"step {record.step}" if record.step else "before training"
    other = {"mean_length": number(record.mean_length), "kappa": number(record.qwk)}
    return {"model": model, "thinking": record.thinking, "cells": cells} | other


def _rate(value: float, n: int, interval: tuple[float, float] | None = None) -> str:
    """Return a fraction with its recorded 95 % interval, else with Wilson's."""
    low, high = interval or wilson(value * n, n)
    return f"{number(value, percent=True)} ({100 * low:.1f}–{100 * high:.1f})"


def _subset_rows(mode: str, before: Mapping[str, Subset], after: Mapping[str, Subset]) -> Iterator[SubsetRow]:
    """Yield the exact answers of each rule or tag that has cases."""
    for name, subset in before.items():
        if subset.n:
            rates = [
                NOTHING if part is None or part.exact is None or not part.n else _rate(part.exact, part.n)
                for part in (subset, after.get(name))
            ]
            yield SubsetRow(name, mode, subset.n, *rates)


def _constant_rows(record: Evaluation) -> list[dict[str, Any]]:
    """Return what always answering one level scores on the same cases; nothing if the confusion matrix lacks some."""
    totals = {int(level): sum(counts) for level, counts in record.confusion.items()}
    if sum(totals.values()) != record.n or min(totals.values()) < 0 or record.n > MAX_CASES:
        return []
    scores = baselines([level for level, total in totals.items() for _ in range(total)])
    rows = []
    for level in range(1, 6):
        rates = [None if field == "no_parse" else scores[f"always_{level}"].get(field) for field, _, _ in RATES]
        row = {"model": f"always {level}", "thinking": NOTHING, "mean_length": NOTHING, "kappa": NOTHING}
        rows.append(row | {"cells": [number(rate, percent=True) for rate in rates]})
    return rows


def _change(run: RunRecord, first: Evaluation, last: Evaluation) -> str:
    """Count the cases that training fixed and broke; "" if the answers are missing.

    McNemar's test needs independent trials, hence one answer per case.
    """
    before, after = run.exact_answers.get(first.key, {}), run.exact_answers.get(last.key, {})
    both = before.keys() & after.keys()
    if not both:
        return ""
    fixed = sum(after[case] and not before[case] for case in both)
    broken = sum(before[case] and not after[case] for case in both)
    test = "" if any(sample for _, sample in both) else f"; exact McNemar test, p = {mcnemar(fixed, broken):.2g}"
    return f"{fixed} fixed, {broken} broken{test}"


def _confusion(record: Evaluation) -> ConfusionRows:
    rows: ConfusionRows = []
    for gold in GOLD:
        counts: Sequence[int] = record.confusion.get(gold, (0,) * 6)
        total = sum(counts) or 1
        rows.append((gold, [(n, -(-SHADES * n // total), str(level) == gold) for level, n in enumerate(counts, 1)]))
    return rows
