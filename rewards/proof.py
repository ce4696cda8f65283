"""Prove a reward: enumerate everything it can give, before any completion is sampled.

A completion has one of eight `OUTCOMES`: a level, or one of three ways to have none. For every gold level, outcome and
combination of the triggers of the rules for this gold level, the totals are computed by the same `score_parts`
that scores completions. Triggers are independent booleans, and rules with equal triggers share one. Code rules
contribute their declared range, so a total is an interval [low, high].

A soft overlong penalty adds a length term: any value in [−penalty, 0] for a finished completion, exactly −penalty for a
truncated one, and nothing for a timeout, which always gets the floor.

Two invariants compare arbitrary completions: the exact answer is strictly best, and no answer is strictly worst. In
these, code rules and the length term take their least favorable values. The two invariants on the order of errors
compare completions of equal length: the length term cancels; code rules do not, because they may read the level.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rewards.overlong import Overlong
from rewards.reward import Reward, modifier_bounds, trigger_subsets, triggers_for
from rewards.rules import Trigger
from rewards.table import score_parts, total
from rewards.types import LEVELS

NO_ANSWER = ("no parse", "truncated", "timeout")
"""Finished without an answer; truncated without an answer; a pattern timed out (the floor). A completion that was
truncated after its answer counts as that level."""
OUTCOMES: tuple[int | str, ...] = (*LEVELS, *NO_ANSWER)

TIE_TOLERANCE = 1e-9
"""Totals closer than this are equal: decimals such as 0.1 + 0.2 are not exact."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the table.

    Example: ``Row(2, 4, ("severe_pain_missed",), -1.5, -1.5)``: gold 2, answer 4, and the pain trigger fires.
    """

    gold: int
    outcome: int | str
    """A predicted level, or one of `NO_ANSWER`."""
    triggers: tuple[str, ...]
    """The triggers that fire, each given by its rules, joined with "+"."""
    low: float
    high: float
    """Least and greatest total including the length term; equal without code rules and length term."""

    def __str__(self) -> str:
        outcome = f"predicted {self.outcome}" if isinstance(self.outcome, int) else self.outcome
        firing = f" with {', '.join(self.triggers)}" if self.triggers else ""
        value = f"{self.low:+.3g}" if self.low == self.high else f"[{self.low:+.3g}, {self.high:+.3g}]"
        return f"gold {self.gold}, {outcome}{firing}: {value}"


@dataclass(frozen=True, slots=True)
class Invariant:
    """One claim about the table, with the pair of cells that comes closest to violating it.

    margin = least value of ``better`` − greatest value of ``worse`` over all pairs the claim is about.
    """

    name: str
    claim: str
    strict: bool
    """Whether a tie violates the claim."""
    margin: float
    """inf if there is no pair."""
    better: Row | None
    worse: Row | None

    @property
    def holds(self) -> bool:
        """Whether margin > 0 for a strict claim, else margin >= 0, up to `TIE_TOLERANCE`."""
        return self.margin > TIE_TOLERANCE if self.strict else self.margin >= -TIE_TOLERANCE

    @property
    def ties(self) -> bool:
        """Whether the closest pair has equal totals."""
        return abs(self.margin) <= TIE_TOLERANCE

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        margin = "ties" if self.ties else f"by {self.margin:+.3g}"
        pair = f": {self.better} | {self.worse}" if self.better and self.worse else ""
        return f"{verdict} ({margin}), {self.claim}{pair}"


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of the enumeration for one reward."""

    reward: str
    sha256: str
    overlong: Overlong | None
    rows: tuple[Row, ...]
    invariants: tuple[Invariant, ...]

    @property
    def sound(self) -> bool:
        """Whether all invariants hold."""
        return all(invariant.holds for invariant in self.invariants)

    @property
    def violations(self) -> tuple[Invariant, ...]:
        """The invariants that fail, each with its worst counterexample."""
        return tuple(invariant for invariant in self.invariants if not invariant.holds)

    @property
    def smallest_margin(self) -> float:
        """The least margin of the strict invariants."""
        return min(invariant.margin for invariant in self.invariants if invariant.strict)


Pair = tuple[Row, Row]


def prove(reward: Reward, *, overlong: Overlong | None = None) -> Proof:
    """Return the proof of a reward: the whole table and the margin of each invariant.

    Args:
        reward: any loaded reward.
        overlong: the soft overlong penalty added to its totals after the bounds, or None.

    >>> from rewards import load_reward
    >>> prove(load_reward("v49")).sound, prove(load_reward("v49")).smallest_margin
    (True, 0.5)
    >>> [invariant.name for invariant in prove(load_reward("v46")).violations]
    ['no_answer_is_worst']
    >>> [str(failure) for failure in prove(load_reward("v49"), overlong=Overlong(cache=20, penalty=0.5)).violations]
    ... # doctest: +ELLIPSIS
    ['FAILS (ties), every answer is worth more than no answer: ...: [-2, -1.5] | ...: [-2.5, -2]']
    """
    penalty = overlong.penalty if overlong else 0.0
    rows = tuple(row for gold in LEVELS for row in _rows(reward, gold, penalty))
    table = {(row.gold, row.triggers, row.outcome): row for row in rows}
    return Proof(
        reward=reward.name,
        sha256=reward.sha256,
        overlong=overlong,
        rows=rows,
        invariants=tuple(
            _invariant(name, claim, strict, pairs(table), penalty if equal_length else 0.0)
            for name, (claim, strict, equal_length, pairs) in INVARIANTS.items()
        ),
    )


def _rows(reward: Reward, gold: int, penalty: float) -> Iterator[Row]:
    no_answer = score_parts(reward.table, None, {})
    for firing in trigger_subsets(triggers_for(reward.rules, gold)):
        names = _names(reward, gold, firing)
        for predicted in LEVELS:
            low, high = (
                score_parts(reward.table, predicted - gold, modifiers)
                for modifiers in modifier_bounds(reward.rules, gold, predicted, firing)
            )
            yield Row(gold, predicted, names, _with_penalty(low, penalty), total(high))
        yield Row(gold, "no parse", names, _with_penalty(no_answer, penalty), total(no_answer))
        yield Row(gold, "truncated", names, _with_penalty(no_answer, penalty), _with_penalty(no_answer, penalty))
        yield Row(gold, "timeout", names, reward.floor, reward.floor)


def _with_penalty(parts: dict[str, float], penalty: float) -> float:
    return total(parts | {"overlong": -penalty})


def _names(reward: Reward, gold: int, firing: frozenset[Trigger]) -> tuple[str, ...]:
    return tuple(
        "+".join(rule.name for rule in reward.rules if rule.trigger == trigger and gold in rule.gold)
        for trigger in triggers_for(reward.rules, gold)
        if trigger in firing
    )


Table = dict[tuple[int, tuple[str, ...], int | str], Row]


def _exact_and_others(table: Table) -> Iterator[Pair]:
    for (gold, triggers, outcome), row in table.items():
        if outcome != gold:
            yield table[gold, triggers, gold], row


def _answered_and_unanswered(table: Table) -> Iterator[Pair]:
    # over all gold levels and triggers, the closest pair is the least answer and the greatest total without one
    worst_commitment = min((row for row in table.values() if row.outcome in LEVELS), key=lambda row: row.low)
    for outcome in NO_ANSWER:
        yield (
            worst_commitment,
            max((row for row in table.values() if row.outcome == outcome), key=lambda row: row.high),
        )


def _nearer_and_farther(table: Table) -> Iterator[Pair]:
    for (gold, triggers, outcome), row in table.items():
        if isinstance(outcome, int):
            for farther in range(outcome + 1, 6) if outcome >= gold else ():
                yield row, table[gold, triggers, farther]
            for farther in range(1, outcome) if outcome <= gold else ():
                yield row, table[gold, triggers, farther]


def _over_and_under(table: Table) -> Iterator[Pair]:
    for (gold, triggers, outcome), row in table.items():
        if isinstance(outcome, int) and outcome < gold and 2 * gold - outcome in LEVELS:
            yield row, table[gold, triggers, 2 * gold - outcome]


INVARIANTS: dict[str, tuple[str, bool, bool, Callable[[Table], Iterator[Pair]]]] = {
    # name: (claim, strict, compared at equal length, pairs of (better, worse))
    "exact_is_best": ("the exact level is worth more than everything else", True, False, _exact_and_others),
    "no_answer_is_worst": ("every answer is worth more than no answer", True, False, _answered_and_unanswered),
    "reward_falls_with_error": ("a larger error in one direction is worth no more", False, True, _nearer_and_farther),
    "undertriage_costs_more": ("under-triage is worth less than equal over-triage", True, True, _over_and_under),
}


def _invariant(name: str, claim: str, strict: bool, pairs: Iterator[Pair], shared_length_term: float) -> Invariant:
    """Return the claim with its closest pair; ``shared_length_term`` cancels the length term that both cells have."""
    better, worse = min(pairs, key=lambda pair: pair[0].low - pair[1].high, default=(None, None))
    if better is None or worse is None:
        return Invariant(name, claim, strict, math.inf, None, None)
    return Invariant(name, claim, strict, better.low - worse.high + shared_length_term, better, worse)
