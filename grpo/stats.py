"""Statistics as (sum, count): added over micro-batches, prompts or ranks, divided once.

A mean of means weighs a short micro-batch like a long one; a sum and a count cannot.
"""

import math
from collections.abc import Iterable, Mapping

Stats = dict[str, tuple[float, float]]
"""Name → (sum, count)."""


def mean_of(values: Iterable[float]) -> tuple[float, float]:
    """The (sum, count) of some values.

    >>> mean_of([1.0, 2.0, 6.0])
    (9.0, 3.0)
    """
    listed = [float(value) for value in values]
    return math.fsum(listed), float(len(listed))


def merge(parts: Iterable[Mapping[str, tuple[float, float]]]) -> Stats:
    """Sums and counts added up by name.

    >>> merge([{"kl": (1.0, 2.0)}, {"kl": (5.0, 1.0)}])
    {'kl': (6.0, 3.0)}
    """
    total: Stats = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


def means(stats: Mapping[str, tuple[float, float]]) -> dict[str, float | None]:
    """Each sum divided by its count; None where nothing was counted, never a NaN.

    >>> means({"kl": (6.0, 3.0), "completions/mean_terminated_length": (0.0, 0.0)})
    {'kl': 2.0, 'completions/mean_terminated_length': None}
    """
    return {name: value / count if count else None for name, (value, count) in stats.items()}
