"""Statistics as (sum, count) pairs: added over micro-batches, prompts or ranks and divided once at the end.

A mean of means would weigh a short micro-batch like a long one.
"""

import math
from collections.abc import Iterable, Mapping

Stats = dict[str, tuple[float, float]]
"""Name → (sum, count)."""


def sum_and_count(values: Iterable[float]) -> tuple[float, float]:
    """Return (sum, count) of the values.

    >>> sum_and_count([1.0, 2.0, 6.0])
    (9.0, 3.0)
    """
    floats = [float(value) for value in values]
    return math.fsum(floats), float(len(floats))


def to_means(stats: Mapping[str, tuple[float, float]]) -> dict[str, float | None]:
    """Divide each sum by its count; None for a count of 0, never NaN.

    >>> to_means({"kl": (6.0, 3.0), "completions/mean_terminated_length": (0.0, 0.0)})
    {'kl': 2.0, 'completions/mean_terminated_length': None}
    """
    return {name: value / count if count else None for name, (value, count) in stats.items()}
