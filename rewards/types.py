"""The frozen values of the package and its one exception."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LEVELS = (1, 2, 3, 4, 5)
"""ESI levels; 1 is the most acute."""

LARGEST = 1e6
"""Largest absolute value of any number in a reward: sums stay finite, with rounding below `proof.TIE_TOLERANCE`."""

Reason = Literal["parsed", "no answer", "unclosed thinking", "conflicting answers", "range", "out of range"]
Span = tuple[int, int]


class RewardError(ValueError):
    """An invalid reward set, case or code rule. The message gives files, rows and case ids, never a case's text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The level a completion commits to, or the reason why there is none.

    Example: ``Answer(2, "parsed", (31, 44))``; the span is the position of the commitment in the completion.
    """

    level: int | None
    reason: Reason
    span: Span | None


@dataclass(frozen=True, slots=True)
class FiredRule:
    """A rule that applied. ``Score.parts`` has its value after stacking."""

    rule: str
    span: Span | None
    """Position of the trigger's match in the case text; None for a rule without a trigger."""
    value: float
    """The rule's value before stacking and bounds."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one completion.

    ``total`` is ``math.fsum(parts.values())``, the exactly rounded sum in any order.
    """

    total: float
    parts: Mapping[str, float]
    """One entry for each of ``Reward.components``, in that order; 0.0 for a component that does not apply."""
    answer: Answer
    fired: tuple[FiredRule, ...]
    timed_out: bool
    """Whether a pattern timed out on this case; the total is then the set's floor, without a length term."""


@dataclass(frozen=True, slots=True)
class RuleInput:
    """The input of a code rule. Rules see only completions that commit to a level."""

    text: str
    gold: int
    predicted: int
    completion: str
    finished: bool
