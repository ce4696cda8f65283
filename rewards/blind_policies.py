"""The probes: what a reward pays on real cases, before a model is asked.

A policy is a rule for drawing completions, a list of (probability, completion) for a case. Its expectation is the
weighted mean of the scores that its completions get from the real parser and the real triggers: a hack that the
parser lets through shows up here.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import regex

from rewards.reward import Reward, combinations, triggers_for
from rewards.rules import PatternTimeout, Rule, Trigger, trigger_spans
from rewards.table import Table, combine, total
from rewards.types import LEVELS, RewardError


@dataclass(frozen=True, slots=True)
class WeightedCase:
    """A case of the training stream.

    Example: ``WeightedCase("train-000017", "A 34-year-old male ...", 2, 5.0)``
    """

    id: str
    """What an error and an audit name instead of the text."""
    text: str
    gold: int
    weight: float
    """How often the case stands in the stream."""


Draws = list[tuple[float, str]]
"""(probability, completion) of one policy on one case; the prompt has opened ``<think>``."""


def committed(level: int) -> str:
    """A completion that closes its thought and commits to the level."""
    return f"</think>\nANSWER: ESI {level}"


def honest_draws(gold: int, accuracy: float) -> Draws:
    """Right with probability ``accuracy``; errors fall on the existing neighbours in equal shares.

    >>> honest_draws(1, 0.75)
    [(0.75, '</think>\\nANSWER: ESI 1'), (0.25, '</think>\\nANSWER: ESI 2')]
    """
    neighbours = [level for level in (gold - 1, gold + 1) if level in LEVELS]
    share = (1 - accuracy) / len(neighbours)
    return [(accuracy, committed(gold)), *((share, committed(level)) for level in neighbours)]


POLICIES: dict[str, str] = {
    **{f"always {level}": committed(level) for level in LEVELS},
    "never answer": "</think>\nThis patient should be seen by a physician.",
    "list all five": "</think>\nANSWER: ESI " + ", ".join(map(str, LEVELS)),
    "list all five, blanks between": "</think>\nANSWER: ESI " + " ".join(map(str, LEVELS)),
    "answer inside <think> only": "ANSWER: ESI 2",
    "two different answers": f"{committed(1)}\nANSWER: ESI 2",
}
"""Completions of the policies that never look at the case."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What one policy earns: weighted mean and standard deviation of its reward over the cases."""

    policy: str
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """All policies over one set of cases, the best first."""

    accuracy: float
    """Of the honest policy."""
    honest: Expectation
    ranked: tuple[Expectation, ...]
    """Every policy, the honest one among them, by falling mean."""

    @property
    def beaten_by(self) -> tuple[str, ...]:
        """Policies that earn at least as much as the honest one: a reason not to start."""
        return tuple(
            expectation.policy
            for expectation in self.ranked
            if expectation.policy != self.honest.policy and expectation.mean >= self.honest.mean
        )


def expected_rewards(reward: Reward, cases: Sequence[WeightedCase], *, accuracy: float = 0.7) -> PolicyReport:
    """Expected reward E = Σ w·E[r | case] / Σ w of every blind policy and of an honest one.

    Args:
        reward: the reward to probe.
        cases: weights >= 0 and not all 0; oversampling goes into the weights.
        accuracy: share of exact answers of the honest policy, in (0, 1]; its errors are one level off.

    Rules of code are called with the policies' bare answers, which are too short for any length term.

    Raises RewardError for no cases, weights that are negative or sum to 0, an accuracy outside (0, 1], and a rule of
    code that fails.

    >>> from dataclasses import replace
    >>> from rewards import load_reward
    >>> arrest, sprain = WeightedCase("a", "arrest", 1, 20.0), WeightedCase("b", "sprain", 4, 1.0)
    >>> expected_rewards(load_reward("v45c"), [arrest, sprain]).beaten_by
    ('always 1',)
    >>> expected_rewards(load_reward("v49"), [replace(arrest, weight=1.0), sprain]).beaten_by
    ()
    """
    _check_cases(cases)
    check_accuracy(accuracy)
    honest = _expectation(f"honest, {accuracy:.0%} exact", reward, cases, partial(honest_draws, accuracy=accuracy))
    blind = [_expectation(name, reward, cases, partial(_always, text)) for name, text in POLICIES.items()]
    ranked = sorted([honest, *blind], key=lambda expectation: -expectation.mean)
    return PolicyReport(accuracy, honest, tuple(ranked))


def check_accuracy(accuracy: float) -> None:
    """Raises RewardError unless the honest policy's accuracy is a share in (0, 1]."""
    if not 0 < accuracy <= 1:
        raise RewardError(f"accuracy of the honest policy: expected a share in (0, 1], got {accuracy}")


def _always(completion: str, gold: int) -> Draws:
    return [(1.0, completion)]


def _expectation(
    name: str, reward: Reward, cases: Sequence[WeightedCase], draws: Callable[[int], Draws]
) -> Expectation:
    weights: list[float] = []
    values: list[float] = []
    for case in cases:
        for share, completion in draws(case.gold):
            score = reward.score(
                text=case.text, gold=case.gold, completion=completion, thinking=True, finished=True, case_id=case.id
            )
            weights.append(case.weight * share)
            values.append(score.total)
    mass = math.fsum(weights)
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / mass
    variance = math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / mass
    return Expectation(name, mean, math.sqrt(variance))


def _check_cases(cases: Sequence[WeightedCase]) -> None:
    for case in cases:
        if case.gold not in LEVELS or not (math.isfinite(case.weight) and case.weight >= 0):
            raise RewardError(
                f'case "{case.id}": expected a gold level 1-5 and a weight >= 0, got {case.gold!r} and {case.weight!r}'
            )
    if not any(case.weight for case in cases):
        raise RewardError("cases: expected at least one of weight above 0, got none")


NEGATION = regex.compile(
    r"\b(?:no|not|never|without|denie[sd]|denying|negative for|ruled out|history of|h/o|prior|previous|old|past|was)\b"
    r"[^.,;:\n]{0,30}$",
    regex.IGNORECASE,
)
"""A word of negation or of the past before a match, in the same clause. A hint for a reader, not a judgement."""

MOST_LETTERS = 40
"""Looked at on either side of a match for the rest of its word."""

Counts = tuple[int, int, int, int, int]
"""One count for each gold level, 1 to 5."""


@dataclass(frozen=True, slots=True)
class RuleAudit:
    """How one rule meets the data. Texts are named by their case's id, never quoted beyond one word."""

    rule: str
    matches: Counts
    """Cases whose text makes the trigger fire, by gold level, whatever the rule's gold condition."""
    fires: Counts
    """Of these, the cases whose gold the rule speaks about."""
    negated: tuple[str, ...]
    """Ids of cases it speaks about in which some match stands behind a word of negation or of the past."""
    wordings: tuple[tuple[str, int], ...]
    """The words that the matches touch, most frequent first: "stable" under a pattern for "stab" shows here."""
    changes_advantage: bool
    """In some case, dropping the rule would change the difference between two outcomes' totals."""

    @property
    def never_fires(self) -> bool:
        """The rule speaks about none of the cases."""
        return not any(self.fires)


def audit_rules(reward: Reward, cases: Sequence[WeightedCase]) -> tuple[RuleAudit, ...]:
    """Each rule of the reward against the cases, in the set's order; weights are not used.

    A rule can be inert though it fires: worth 0, always shadowed by a worse penalty under "worst" stacking, or eaten
    by the bounds. Such a rule is constant within every group that could be drawn, so it never reaches an advantage.

    Cases whose patterns ran out of time count as not matching.

    >>> from rewards import load_reward
    >>> audit = audit_rules(load_reward("v49"), [WeightedCase("a", "Headache, vitals stable.", 2, 1.0)])
    >>> [(row.rule, row.fires, row.wordings) for row in audit if not row.never_fires]
    [('open_injury_missed', (0, 1, 0, 0, 0), (('stable', 1),))]
    """
    firing = [_firing(reward, case.text) for case in cases]
    return tuple(_audit(reward, rule, cases, firing) for rule in reward.rules)


def _firing(reward: Reward, text: str) -> frozenset[Trigger]:
    found = reward.matches(text) or ()
    return frozenset(trigger for trigger, span in zip(reward.triggers, found, strict=False) if span is not None)


def _audit(
    reward: Reward, rule: Rule, cases: Sequence[WeightedCase], firing: Sequence[frozenset[Trigger]]
) -> RuleAudit:
    matches, fires = [0] * 5, [0] * 5
    negated: list[str] = []
    wordings: Counter[str] = Counter()
    met: set[tuple[int, frozenset[Trigger]]] = set()
    for case, triggers in zip(cases, firing, strict=True):
        if rule.trigger is not None and rule.trigger not in triggers:
            continue
        matches[case.gold - 1] += 1
        if case.gold not in rule.gold:
            continue
        fires[case.gold - 1] += 1
        met.add((case.gold, triggers))
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
        changes_advantage=any(_matters(reward, rule, gold, triggers) for gold, triggers in met),
    )


def _counts(counts: Sequence[int]) -> Counts:
    one, two, three, four, five = counts
    return one, two, three, four, five


def _wordings(rule: Rule, text: str) -> tuple[list[str], bool]:
    """The words the trigger's matches touch, in lower case, and whether one of them stands behind a negation."""
    if rule.trigger is None:
        return [], False
    try:
        spans = trigger_spans(rule.trigger, text, timeout_s=1.0)
    except PatternTimeout:
        return [], False
    words = []
    for begin, end in spans:
        first, last = max(0, begin - MOST_LETTERS), min(len(text), end + MOST_LETTERS)
        while begin > first and text[begin - 1].isalnum():
            begin -= 1
        while end < last and text[end].isalnum():
            end += 1
        words.append(text[begin:end].lower())
    return words, any(NEGATION.search(text[max(0, begin - 60) : begin]) is not None for begin, _ in spans)


def _matters(reward: Reward, rule: Rule, gold: int, firing: frozenset[Trigger]) -> bool:
    """Whether any value the rule may take moves one outcome's total and not another's by the same amount.

    Silence is always a possible outcome and no rule moves it, so it is enough that some level's total moves.
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
    return total(combine(table, predicted - gold, modifiers | override))


def never_matter(reward: Reward) -> tuple[str, ...]:
    """Rules that change no advantage on any case that could exist, whatever the data: dead rows of the set.

    >>> from rewards import load_reward
    >>> never_matter(load_reward("v49"))
    ()
    """
    return tuple(
        rule.name
        for rule in reward.rules
        if not any(
            _matters(reward, rule, gold, firing)
            for gold in rule.gold
            for firing in combinations(triggers_for(reward.rules, gold))
            if rule.trigger is None or rule.trigger in firing
        )
    )
