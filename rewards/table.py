"""The arithmetic of a reward: outcome, no-parse, rule values, stacking and bounds, in one place.

Scoring and the proof both go through `combine`, so the proof speaks of what is scored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ERRORS = (-4, -3, -2, -1, 0, 1, 2, 3, 4)
"""Signed error = predicted − gold; negative is over-triage (too acute), positive under-triage."""


def _keep_one(pick: Callable[[list[float]], float]) -> Callable[[list[float]], list[float]]:
    def keep(values: list[float]) -> list[float]:
        kept = values.index(pick(values))
        return [value if i == kept else 0.0 for i, value in enumerate(values)]

    return keep


PENALTIES: dict[str, Callable[[list[float]], list[float]]] = {"sum": list, "worst": _keep_one(min)}
"""What stands of several negative values: all of them, or only the worst (the first of equals)."""

BONUSES: dict[str, Callable[[list[float]], list[float]]] = {"sum": list, "best": _keep_one(max)}
"""What stands of several positive values: all of them, or only the best (the first of equals)."""


@dataclass(frozen=True, slots=True)
class Table:
    """The part of a set that is numbers: what each outcome is worth and how modifiers combine."""

    by_error: Mapping[int, float]
    """Signed error → value, all nine of `ERRORS`."""
    no_parse: float
    penalties: str
    """Key of `PENALTIES`."""
    bonuses: str
    """Key of `BONUSES`."""
    low: float
    """Bounds of the total; infinite where the set names none."""
    high: float


def combine(table: Table, error: int | None, modifiers: Mapping[str, float]) -> dict[str, float]:
    """The parts of one score: outcome or no_parse, each modifier after stacking, and what the bounds took.

    total = clip(base + Σ stacked modifiers, low, high); the ``bounds`` part is what the clip added.

    Args:
        table: the set's numbers.
        error: predicted − gold, or None for a completion without an answer, which no modifier touches.
        modifiers: rule name → value before stacking.

    Monotone in every modifier, which is what lets the proof treat a range by its two ends.

    >>> table = Table({0: 1.0, 2: -1.0}, -2.0, "worst", "sum", -math.inf, math.inf)
    >>> combine(table, 2, {"open_injury": -0.5, "severe_pain": -0.5})
    {'outcome': -1.0, 'no_parse': 0.0, 'open_injury': -0.5, 'severe_pain': 0.0, 'bounds': 0.0}
    """
    if error is None:
        parts = {"outcome": 0.0, "no_parse": table.no_parse}
    else:
        parts = {"outcome": table.by_error[error], "no_parse": 0.0, **modifiers}
        for names, policy in (
            ([name for name, value in modifiers.items() if value < 0], PENALTIES[table.penalties]),
            ([name for name, value in modifiers.items() if value > 0], BONUSES[table.bonuses]),
        ):
            if len(names) > 1:
                parts |= dict(zip(names, policy([modifiers[name] for name in names]), strict=True))
    raw = math.fsum(parts.values())
    parts["bounds"] = min(max(raw, table.low), table.high) - raw
    return parts


def total(parts: Mapping[str, float]) -> float:
    """The exactly rounded sum of the parts, independent of their order."""
    return math.fsum(parts.values())
