"""When a reward makes it pay to answer too acutely, and when to say nothing: two thresholds, and what GRPO's std does
to the first.

A policy that is certain has nothing to hedge. Where a case is level k with probability P and level k + 1 otherwise, as
far as the policy can tell, naming k earns more than naming k + 1 exactly if

    P > g / (g + h),   g = r(k+1 | k+1) − r(k | k+1),   h = r(k | k) − r(k+1 | k)

where r(said | gold) is the reward. With +1, a valve of 0 and −u for one level too mild it is 1 / (2 + u): 0.4 for v46.
"""

import math

from rewards.table import Table


def hedging_threshold(table: Table, *, normalised: bool, missed: float = 0.0, obeyed: float = 0.0) -> float:
    """P(k) above which the more acute of two neighbouring levels, k, is what the updates push to.

    Args:
        table: the base table.
        normalised: advantages are divided by their group's std. A group has one gold level; if its completions name
            two levels, the std takes away *how much* they differ and leaves which is better, so every price cancels
            and the threshold is a half, whatever the table says. Exact for groups in which nothing else occurs.
        missed: modifier, ≤ 0, of a rule that punishes naming k + 1 where gold is k.
        obeyed: modifier, ≥ 0, of a rule that pays for naming k where gold is k.

    1.0 where the milder level is never the worse one; 0.0 where the acute one never is.

    >>> v46 = {-1: 0.0, 0: 1.0, 1: -0.5}
    >>> table = Table(v46, -0.5, "sum", "sum", -math.inf, math.inf)
    >>> hedging_threshold(table, normalised=False), hedging_threshold(table, normalised=True)
    (0.4, 0.5)
    >>> round(hedging_threshold(table, normalised=False, missed=-0.5), 4)
    0.3333
    """
    milder = table.by_error[0] - table.by_error[-1]
    acute = table.by_error[0] + obeyed - table.by_error[1] - missed
    if normalised:
        milder, acute = float(milder > 0), float(acute > 0)
    return milder / (milder + acute) if milder + acute > 0 else 1.0


def silence_threshold(table: Table) -> float:
    """The share of dangerous answers (two levels too mild) above which no answer at all earns more, where all other
    answers are exact: (r(exact) − r(silence)) / (r(exact) − r(dangerous)). Above 1: never.

    >>> v46 = Table({0: 1.0, 2: -1.0}, -0.5, "sum", "sum", -math.inf, math.inf)
    >>> v49 = Table({0: 1.0, 2: -1.0}, -2.0, "worst", "sum", -math.inf, math.inf)
    >>> silence_threshold(v46), silence_threshold(v49)
    (0.75, 1.5)
    """
    spread = table.by_error[0] - table.by_error[2]
    return (table.by_error[0] - table.no_parse) / spread if spread > 0 else math.inf
