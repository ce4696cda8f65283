"""The frozen values of the package, and its one error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LEVELS = (1, 2, 3, 4, 5)
"""The ESI levels, 1 the most acute."""

LARGEST = 1e6
"""No number of a reward lies farther from 0: sums stay finite, and `rewards.proof.TIE` stays above their rounding."""

Reason = Literal["parsed", "no answer", "unclosed thinking", "conflicting answers", "range", "out of range"]
Span = tuple[int, int]


class RewardError(ValueError):
    """A reward set, a case or a code rule that cannot be used. Names files, rows and case ids, never a case's text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The level a completion commits to, or why there is none.

    Example: ``Answer(2, "parsed", (31, 44))``; the span is in the completion and covers the whole commitment.
    """

    level: int | None
    reason: Reason
    span: Span | None


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule whose trigger and conditions held. ``Score.parts`` says what stacking left of its value."""

    rule: str
    span: Span | None
    """Of the trigger's match in the case text; None for a rule without a trigger."""
    value: float
    """What the row says, before stacking and bounds."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one completion.

    ``total`` is ``math.fsum(parts.values())``: the exactly rounded sum, whatever the order.
    """

    total: float
    parts: Mapping[str, float]
    """One entry for each of ``Reward.components``, in that order; 0.0 where a component said nothing."""
    answer: Answer
    fired: tuple[Fired, ...]
    timed_out: bool
    """A trigger's pattern ran out of time on this case: the total is the set's floor, without any length term."""


@dataclass(frozen=True, slots=True)
class View:
    """What a code rule may look at. Only completions that commit to a level are shown."""

    text: str
    gold: int
    predicted: int
    completion: str
    finished: bool
