"""Audit the rules of a reward on real cases: which fire, on which words, and which can change an advantage."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from rewards.blind_policies import WeightedCase
from rewards.reward import Reward, trigger_subsets, triggers_for
from rewards.rules import PatternTimeout, Rule, Trigger, trigger_spans
from rewards.table import Table, score_parts, total
from rewards.types import LEVELS

NEGATION = regex.compile(
    r"\b(?:no|not|never|without|denie[sd]|denying|negative for|ruled out|history of|h/o|prior|previous|old|past|was)\b"
    r"[^.,;:\n]{0,30}$",
    regex.IGNORECASE,
)
"""Negation or past tense before a match in the same clause; a hint for the reader only."""

MAX_WORD_CHARS = 40
"""Characters on either side of a match that are searched for the rest of its word."""

Counts = tuple[int, int, int, int, int]
"""One count per gold level, 1 to 5."""


@dataclass(frozen=True, slots=True)
class RuleAudit:
    """How one rule applies to the cases. Texts are identified by case id and never quoted beyond one word."""

    rule: str
    matches: Counts
    """Cases in which the trigger fires, by gold level, regardless of the rule's gold condition."""
    fires: Counts
    """Those of them that satisfy the rule's gold condition."""
    negated: tuple[str, ...]
    """Ids of applicable cases in which a match follows a word of negation or of the past."""
    wordings: tuple[tuple[str, int], ...]
    """The matched words, most frequent first: reveals "stable" under a pattern for "stab"."""
    changes_advantage: bool
    """Whether, in some case, dropping the rule would change the difference between the totals of two outcomes."""

    @property
    def never_fires(self) -> bool:
        """Whether the rule applies to none of the cases."""
        return not any(self.fires)


def audit_rules(reward: Reward, cases: Sequence[WeightedCase]) -> tuple[RuleAudit, ...]:
    """Audit each rule of the reward on the cases, in the order of the set; weights are not used.

    A rule that fires can still have no effect: its value is 0, a worse penalty always overrides it under "worst"
    stacking, or the bounds cancel it. It then changes no advantage in any group.

    Cases whose patterns timed out count as not matching.

    >>> from rewards import load_reward
    >>> audit = audit_rules(load_reward("v49"), [WeightedCase("a", "Headache, vitals stable.", 2, 1.0)])
    >>> [(row.rule, row.fires, row.wordings) for row in audit if not row.never_fires]
    [('open_injury_missed', (0, 1, 0, 0, 0), (('stable', 1),))]
    """
    firing = [_firing(reward, case.text) for case in cases]
    return tuple(_audit(reward, rule, cases, firing) for rule in reward.rules)


def _firing(reward: Reward, text: str) -> frozenset[Trigger]:
    spans = reward.matches(text) or ()
    return frozenset(trigger for trigger, span in zip(reward.triggers, spans, strict=False) if span is not None)


def _audit(
    reward: Reward, rule: Rule, cases: Sequence[WeightedCase], firing: Sequence[frozenset[Trigger]]
) -> RuleAudit:
    matches, fires = [0] * 5, [0] * 5
    negated: list[str] = []
    wordings: Counter[str] = Counter()
    combinations_seen: set[tuple[int, frozenset[Trigger]]] = set()
    for case, triggers in zip(cases, firing, strict=True):
        if rule.trigger is not None and rule.trigger not in triggers:
            continue
        matches[case.gold - 1] += 1
        if case.gold not in rule.gold:
            continue
        fires[case.gold - 1] += 1
        combinations_seen.add((case.gold, triggers))
        words, behind_negation = _wordings(rule, case.text)
        wordings.update(words)
        if behind_negation:
            negated.append(case.id)
    return RuleAudit(
        rule=rule.name,
        matches=_counts(matches),
        fires=_counts(fires),
        negated=tuple(negated),
        wordings=tuple(wordings.most_common(8)),
        changes_advantage=any(_matters(reward, rule, gold, triggers) for gold, triggers in combinations_seen),
    )


def _counts(counts: Sequence[int]) -> Counts:
    esi_1, esi_2, esi_3, esi_4, esi_5 = counts
    return esi_1, esi_2, esi_3, esi_4, esi_5


def _wordings(rule: Rule, text: str) -> tuple[list[str], bool]:
    """Return the words that the trigger's matches touch, in lower case, and whether one follows a negation."""
    if rule.trigger is None:
        return [], False
    try:
        spans = trigger_spans(rule.trigger, text, timeout_s=1.0)
    except PatternTimeout:
        return [], False
    words = []
    for begin, end in spans:
        first, last = max(0, begin - MAX_WORD_CHARS), min(len(text), end + MAX_WORD_CHARS)
        while begin > first and text[begin - 1].isalnum():
            begin -= 1
        while end < last and text[end].isalnum():
            end += 1
        words.append(text[begin:end].lower())
    return words, any(NEGATION.search(text[max(0, begin - 60) : begin]) is not None for begin, _ in spans)


def _matters(reward: Reward, rule: Rule, gold: int, firing: frozenset[Trigger]) -> bool:
    """Return whether some value of the rule changes the difference between the totals of two outcomes.

    No rule changes the total of a completion without an answer, so it is enough that the total of some level changes.
    """
    return any(
        _total(reward.table, reward.rules, gold, predicted, firing, {rule.name: value})
        != _total(reward.table, reward.rules, gold, predicted, firing, {rule.name: 0.0})
        for predicted in LEVELS
        if rule.concerns(gold, predicted)
        for value in (rule.low, rule.high)
    )


def _total(
    table: Table,
    rules: Sequence[Rule],
    gold: int,
    predicted: int,
    firing: frozenset[Trigger],
    override: dict[str, float],
) -> float:
    modifiers = {
        rule.name: rule.low
        for rule in rules
        if rule.concerns(gold, predicted) and (rule.trigger is None or rule.trigger in firing)
    }
    return total(score_parts(table, predicted - gold, modifiers | override))


def rules_without_effect(reward: Reward) -> tuple[str, ...]:
    """Return the rules that cannot change an advantage on any possible case.

    >>> from rewards import load_reward
    >>> rules_without_effect(load_reward("v49"))
    ()
    """
    return tuple(
        rule.name
        for rule in reward.rules
        if not any(
            _matters(reward, rule, gold, firing)
            for gold in rule.gold
            for firing in trigger_subsets(triggers_for(reward.rules, gold))
            if rule.trigger is None or rule.trigger in firing
        )
    )
