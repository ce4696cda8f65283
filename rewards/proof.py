"""The proof over the finite table: what a reward can say, enumerated before any completion is drawn.

A completion ends as one of eight `OUTCOMES`: a level, or one of three kinds of silence. For every gold level, every
outcome and every combination of the triggers that rows for this gold have, the totals are computed by the same
`combine` that scores. Triggers are independent booleans, rows with equal triggers share one; rules of code
contribute their declared range, so a total is an interval [low, high].

A soft overlong penalty adds a length term: anything in [−penalty, 0] to a finished completion, exactly −penalty to one
that was cut, nothing to a timeout, which is the floor whatever the length.

Two invariants compare completions that may differ in everything: the exact answer is the strict best, silence the
strict worst. There, code rules and the length term take their least favourable values. The two about the order of
errors compare like with like: the same length term cancels, code rules do not, for they may read the level.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rewards.overlong import Overlong
from rewards.reward import Reward, combinations, modifiers_range, triggers_for
from rewards.rules import Trigger
from rewards.table import combine, total
from rewards.types import LEVELS

SILENCES = ("no parse", "truncated", "timeout")
"""Finished without an answer; cut by the budget without an answer; a pattern ran out of time (the floor). A completion
that was cut after its answer is among the levels."""
OUTCOMES: tuple[int | str, ...] = (*LEVELS, *SILENCES)

TIE = 1e-9
"""Totals closer than this are equal: decimals such as 0.1 + 0.2 leave dust that no advantage can see."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the whole table.

    Example: ``Row(2, 4, ("severe_pain_missed",), -1.5, -1.5)``: gold 2, answer 4, the pain trigger fires.
    """

    gold: int
    outcome: int | str
    """A predicted level, or one of `SILENCES`."""
    triggers: tuple[str, ...]
    """The triggers that fire, each named by the rules that share it, joined with "+"."""
    low: float
    high: float
    """The least and greatest total, length term included; equal without code rules and length term."""

    def __str__(self) -> str:
        outcome = f"predicted {self.outcome}" if isinstance(self.outcome, int) else self.outcome
        firing = f" with {', '.join(self.triggers)}" if self.triggers else ""
        value = f"{self.low:+.3g}" if self.low == self.high else f"[{self.low:+.3g}, {self.high:+.3g}]"
        return f"gold {self.gold}, {outcome}{firing}: {value}"


@dataclass(frozen=True, slots=True)
class Invariant:
    """One claim about the table, with the pair of rows that comes closest to breaking it.

    margin = least value of ``better`` − greatest value of ``worse`` over all pairs the claim is about.
    """

    name: str
    claim: str
    strict: bool
    """A tie breaks it."""
    margin: float
    """inf when no pair exists."""
    better: Row | None
    worse: Row | None

    @property
    def holds(self) -> bool:
        """margin > 0 for a strict claim, margin >= 0 otherwise, dust below `TIE` aside."""
        return self.margin > TIE if self.strict else self.margin >= -TIE

    @property
    def ties(self) -> bool:
        """The closest pair is worth the same, which only a strict claim minds."""
        return abs(self.margin) <= TIE

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        margin = "ties" if self.ties else f"by {self.margin:+.3g}"
        pair = f": {self.better} | {self.worse}" if self.better and self.worse else ""
        return f"{verdict} ({margin}), {self.claim}{pair}"


@dataclass(frozen=True, slots=True)
class Proof:
    """What the enumeration found for one reward."""

    reward: str
    sha256: str
    overlong: Overlong | None
    rows: tuple[Row, ...]
    invariants: tuple[Invariant, ...]

    @property
    def sound(self) -> bool:
        """All invariants hold."""
        return all(invariant.holds for invariant in self.invariants)

    @property
    def violations(self) -> tuple[Invariant, ...]:
        """The invariants that fail, each with its worst counterexample."""
        return tuple(invariant for invariant in self.invariants if not invariant.holds)

    @property
    def smallest_margin(self) -> float:
        """The least margin of the strict invariants: by how much the reward is sound."""
        return min(invariant.margin for invariant in self.invariants if invariant.strict)


Pair = tuple[Row, Row]


def prove(reward: Reward, *, overlong: Overlong | None = None) -> Proof:
    """The proof of a reward: the whole table and the margin of each invariant.

    Args:
        reward: any loaded reward.
        overlong: the soft overlong penalty that is added to its totals after the bounds, or None.

    >>> from rewards import load_reward
    >>> prove(load_reward("v49")).sound, prove(load_reward("v49")).smallest_margin
    (True, 0.5)
    >>> [invariant.name for invariant in prove(load_reward("v46")).violations]
    ['silence_worst']
    >>> [str(one) for one in prove(load_reward("v49"), overlong=Overlong(cache=20, penalty=0.5)).violations]
    ... # doctest: +ELLIPSIS
    ['FAILS (ties), every commitment is worth more than any silence: ...: [-2, -1.5] | ...: [-2.5, -2]']
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
    silent = combine(reward.table, None, {})
    for firing in combinations(triggers_for(reward.rules, gold)):
        names = _names(reward, gold, firing)
        for predicted in LEVELS:
            low, high = (
                combine(reward.table, predicted - gold, modifiers)
                for modifiers in modifiers_range(reward.rules, gold, predicted, firing)
            )
            yield Row(gold, predicted, names, _lengthened(low, penalty), total(high))
        yield Row(gold, "no parse", names, _lengthened(silent, penalty), total(silent))
        yield Row(gold, "truncated", names, _lengthened(silent, penalty), _lengthened(silent, penalty))
        yield Row(gold, "timeout", names, reward.floor, reward.floor)


def _lengthened(parts: dict[str, float], penalty: float) -> float:
    return total(parts | {"overlong": -penalty})


def _names(reward: Reward, gold: int, firing: frozenset[Trigger]) -> tuple[str, ...]:
    return tuple(
        "+".join(rule.name for rule in reward.rules if rule.trigger == trigger and gold in rule.gold)
        for trigger in triggers_for(reward.rules, gold)
        if trigger in firing
    )


Table = dict[tuple[int, tuple[str, ...], int | str], Row]


def _exact_and_the_rest(table: Table) -> Iterator[Pair]:
    for (gold, triggers, outcome), row in table.items():
        if outcome != gold:
            yield table[gold, triggers, gold], row


def _committed_and_silent(table: Table) -> Iterator[Pair]:
    # across all golds and triggers the closest pair is the least commitment and the greatest of each silence
    worst_commitment = min((row for row in table.values() if row.outcome in LEVELS), key=lambda row: row.low)
    for silence in SILENCES:
        yield worst_commitment, max((row for row in table.values() if row.outcome == silence), key=lambda row: row.high)


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
    "exact_best": ("the exact level is worth more than everything else", True, False, _exact_and_the_rest),
    "silence_worst": ("every commitment is worth more than any silence", True, False, _committed_and_silent),
    "larger_error_no_better": ("a larger error in one direction is worth no more", False, True, _nearer_and_farther),
    "under_below_over": ("under-triage is worth less than over-triage as far", True, True, _over_and_under),
}


def _invariant(name: str, claim: str, strict: bool, pairs: Iterator[Pair], given_back: float) -> Invariant:
    """The claim at its closest pair; ``given_back`` undoes the spread of a length term that both rows share."""
    better, worse = min(pairs, key=lambda pair: pair[0].low - pair[1].high, default=(None, None))
    if better is None or worse is None:
        return Invariant(name, claim, strict, math.inf, None, None)
    return Invariant(name, claim, strict, better.low - worse.high + given_back, better, worse)
