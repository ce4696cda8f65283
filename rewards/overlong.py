"""The soft overlong penalty: a length term that a reward may carry on top of its set."""

import math
from dataclasses import dataclass

from rewards.types import LARGEST, RewardError


@dataclass(frozen=True, slots=True)
class Overlong:
    """How long is too long. What it takes from a total lies in [−penalty, 0], and is −penalty at the whole budget."""

    cache: int
    """Tokens before the budget in which the term falls from 0 to −penalty; at least 1."""
    penalty: float
    """Above 0."""

    def __post_init__(self) -> None:
        if self.cache < 1:
            raise RewardError(f"overlong: expected a cache of at least one token, got {self.cache}")
        if not 0 < self.penalty <= LARGEST:
            raise RewardError(f"overlong: expected a penalty above 0 and at most {LARGEST:g}, got {self.penalty}")


def overlong(length: int, *, budget: int, cache: int, penalty: float) -> float:
    """The term of a completion of L tokens: 0 for L <= budget − cache, else penalty · (budget − cache − L) / cache,
    never below −penalty.

    A completion that the budget cut has L = budget and so gets −penalty; one that ended there by itself does too.

    Args:
        length: L, completion tokens, end token included, >= 0.
        budget: the token budget, >= cache.
        cache: width of the slope, tokens, >= 1. With cache = budget every token costs.
        penalty: what the whole budget costs, >= 0; 0 gives 0 everywhere.

    Raises RewardError for values outside these ranges.

    Source: DAPO, arXiv 2503.14476, equation 13, there with penalty 1 and added, as here, to the rule's reward.

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
    over = min(length, budget) - (budget - cache)
    return 0.0 - penalty * (over / cache) if over > 0 else 0.0
