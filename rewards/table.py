"""The arithmetic of a reward: outcome, no-parse, rule values, stacking and bounds.

Scoring and the proof both call `score_parts`, so the proof holds for what is scored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SIGNED_ERRORS = (-4, -3, -2, -1, 0, 1, 2, 3, 4)
"""Signed error = predicted − gold; negative is over-triage (too acute), positive under-triage."""


def _keep_one(pick: Callable[[list[float]], float]) -> Callable[[list[float]], list[float]]:
    def keep(values: list[float]) -> list[float]:
        chosen = values.index(pick(values))
        return [value if i == chosen else 0.0 for i, value in enumerate(values)]

    return keep


PENALTY_STACKING: dict[str, Callable[[list[float]], list[float]]] = {"sum": list, "worst": _keep_one(min)}
"""How several negative values combine: all of them count, or only the worst (the first if equal)."""

BONUS_STACKING: dict[str, Callable[[list[float]], list[float]]] = {"sum": list, "best": _keep_one(max)}
"""How several positive values combine: all of them count, or only the best (the first if equal)."""


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of a set: the value of each outcome, and how modifiers combine."""

    by_error: Mapping[int, float]
    """Signed error → value, all nine of `SIGNED_ERRORS`."""
    no_parse: float
    penalties: str
    """Key of `PENALTY_STACKING`."""
    bonuses: str
    """Key of `BONUS_STACKING`."""
    low: float
    """Bounds of the total; infinite if the set has none."""
    high: float


def score_parts(table: Table, error: int | None, modifiers: Mapping[str, float]) -> dict[str, float]:
    """Return the parts of one score: outcome or no_parse, each modifier after stacking, and the effect of the bounds.

    total = clip(base + Σ stacked modifiers, low, high); the ``bounds`` part is what clipping added.

    Args:
        table: the set's numbers.
        error: predicted − gold, or None for a completion without an answer, to which no modifier applies.
        modifiers: rule name → value before stacking.

    The total is monotone in every modifier, so the proof needs only the two ends of a range.

    >>> table = Table({0: 1.0, 2: -1.0}, -2.0, "worst", "sum", -math.inf, math.inf)
    >>> score_parts(table, 2, {"open_injury": -0.5, "severe_pain": -0.5})
    {'outcome': -1.0, 'no_parse': 0.0, 'open_injury': -0.5, 'severe_pain': 0.0, 'bounds': 0.0}
    """
    if error is None:
        parts = {"outcome": 0.0, "no_parse": table.no_parse}
    else:
        parts = {"outcome": table.by_error[error], "no_parse": 0.0, **modifiers}
        for names, policy in (
            ([name for name, value in modifiers.items() if value < 0], PENALTY_STACKING[table.penalties]),
            ([name for name, value in modifiers.items() if value > 0], BONUS_STACKING[table.bonuses]),
        ):
            if len(names) > 1:
                parts |= dict(zip(names, policy([modifiers[name] for name in names]), strict=True))
    raw = math.fsum(parts.values())
    parts["bounds"] = min(max(raw, table.low), table.high) - raw
    return parts


def total(parts: Mapping[str, float]) -> float:
    """Return the exactly rounded sum of the parts, independent of their order."""
    return math.fsum(parts.values())
