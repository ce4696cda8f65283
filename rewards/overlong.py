"""The soft overlong penalty: an optional length term on top of a reward set."""

import math
from dataclasses import dataclass

from rewards.types import LARGEST, RewardError


@dataclass(frozen=True, slots=True)
class Overlong:
    """Settings of the penalty. The term is in [−penalty, 0], and −penalty at the full budget."""

    cache: int
    """Tokens before the budget over which the term falls from 0 to −penalty; at least 1."""
    penalty: float
    """Greater than 0."""

    def __post_init__(self) -> None:
        if self.cache < 1:
            raise RewardError(f"overlong: expected a cache of at least 1 token, got {self.cache}")
        if not 0 < self.penalty <= LARGEST:
            raise RewardError(f"overlong: expected a penalty in (0, {LARGEST:g}], got {self.penalty}")


def overlong(length: int, *, budget: int, cache: int, penalty: float) -> float:
    """Return the term for a completion of L tokens: 0 for L <= budget − cache, else
    penalty · (budget − cache − L) / cache, but at least −penalty.

    A truncated completion has L = budget and gets −penalty; so does one that ended exactly there.

    Args:
        length: L, completion tokens including the end token, >= 0.
        budget: the token budget, >= cache.
        cache: width of the slope in tokens, >= 1. With cache = budget every token is penalized.
        penalty: the penalty at the full budget, >= 0.

    Raises RewardError for values outside these ranges.

    Source: DAPO, arXiv 2503.14476, equation 13, where the penalty is 1.

    >>> [overlong(length, budget=100, cache=20, penalty=0.5) for length in (79, 80, 85, 90, 100)]
    [0.0, 0.0, -0.125, -0.25, -0.5]
    """
    if length < 0 or not 1 <= cache <= budget:
        raise RewardError(
            f"overlong: expected 0 <= length and 1 <= cache <= budget, got length {length}, cache {cache} and "
            f"budget {budget}"
        )
    if not (math.isfinite(penalty) and penalty >= 0):
        raise RewardError(f"overlong: expected a finite penalty >= 0, got {penalty}")
    excess = min(length, budget) - (budget - cache)
    return 0.0 - penalty * (excess / cache) if excess > 0 else 0.0
