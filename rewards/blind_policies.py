"""Compare blind policies with an honest one: what a reward pays on real cases, before a model is trained.

A policy is a list of (probability, completion) for each case. Its expected reward is the weighted mean of the scores of
its completions, computed with the real parser and the real triggers: a hack that the parser accepts shows up here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rewards.reward import Reward
from rewards.types import LEVELS, RewardError


@dataclass(frozen=True, slots=True)
class WeightedCase:
    """A case of the training stream.

    Example: ``WeightedCase("train-000017", "A 34-year-old male ...", 2, 5.0)``
    """

    id: str
    """Used in errors and audits instead of the text."""
    text: str
    gold: int
    weight: float
    """How often the case occurs in the stream."""


Draws = list[tuple[float, str]]
"""(probability, completion) pairs of one policy on one case; the prompt has opened ``<think>``."""


def answer_text(level: int) -> str:
    """Return a completion that closes its thinking and commits to the level."""
    return f"</think>\nANSWER: ESI {level}"


def honest_responses(gold: int, accuracy: float) -> Draws:
    """Return the exact level with probability ``accuracy``; errors are spread equally over the adjacent levels.

    >>> honest_responses(1, 0.75)
    [(0.75, '</think>\\nANSWER: ESI 1'), (0.25, '</think>\\nANSWER: ESI 2')]
    """
    neighbours = [level for level in (gold - 1, gold + 1) if level in LEVELS]
    share = (1 - accuracy) / len(neighbours)
    return [(accuracy, answer_text(gold)), *((share, answer_text(level)) for level in neighbours)]


BLIND_POLICIES: dict[str, str] = {
    **{f"always {level}": answer_text(level) for level in LEVELS},
    "never answer": "</think>\nThis patient should be seen by a physician.",
    "list all five": "</think>\nANSWER: ESI " + ", ".join(map(str, LEVELS)),
    "list all five, blanks between": "</think>\nANSWER: ESI " + " ".join(map(str, LEVELS)),
    "answer inside <think> only": "ANSWER: ESI 2",
    "two different answers": f"{answer_text(1)}\nANSWER: ESI 2",
}
"""Policies that ignore the case: name → completion."""


@dataclass(frozen=True, slots=True)
class PolicyReward:
    """Weighted mean and standard deviation of one policy's reward over the cases."""

    policy: str
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """The rewards of all policies on one set of cases."""

    accuracy: float
    """Accuracy of the honest policy."""
    honest: PolicyReward
    ranked: tuple[PolicyReward, ...]
    """Every policy including the honest one, the highest mean first."""

    @property
    def policies_that_beat_honest(self) -> tuple[str, ...]:
        """Policies that earn at least as much as the honest one, which makes the reward unsound for these cases."""
        return tuple(
            expectation.policy
            for expectation in self.ranked
            if expectation.policy != self.honest.policy and expectation.mean >= self.honest.mean
        )


def expected_rewards(reward: Reward, cases: Sequence[WeightedCase], *, accuracy: float = 0.7) -> PolicyReport:
    """Return the expected reward E = Σ w·E[r | case] / Σ w of every blind policy and of an honest one.

    Args:
        reward: the reward to probe.
        cases: weights >= 0 and not all 0; oversampling is part of the weights.
        accuracy: fraction of exact answers of the honest policy, in (0, 1]; its errors are one level off.

    Code rules are called with the policies' short answers, to which no length term applies.

    Raises RewardError if there are no cases, if weights are negative or sum to 0, if the accuracy is outside (0, 1],
    and if a code rule fails.

    >>> from dataclasses import replace
    >>> from rewards import load_reward
    >>> arrest, sprain = WeightedCase("a", "arrest", 1, 20.0), WeightedCase("b", "sprain", 4, 1.0)
    >>> expected_rewards(load_reward("v45c"), [arrest, sprain]).policies_that_beat_honest
    ('always 1',)
    >>> expected_rewards(load_reward("v49"), [replace(arrest, weight=1.0), sprain]).policies_that_beat_honest
    ()
    """
    _check_cases(cases)
    check_accuracy(accuracy)
    honest = _expectation(f"honest, {accuracy:.0%} exact", reward, cases, partial(honest_responses, accuracy=accuracy))
    blind = [_expectation(name, reward, cases, partial(_always, text)) for name, text in BLIND_POLICIES.items()]
    ranked = sorted([honest, *blind], key=lambda expectation: -expectation.mean)
    return PolicyReport(accuracy, honest, tuple(ranked))


def check_accuracy(accuracy: float) -> None:
    """Raise RewardError unless the accuracy of the honest policy is in (0, 1]."""
    if not 0 < accuracy <= 1:
        raise RewardError(f"accuracy of the honest policy: expected a value in (0, 1], got {accuracy}")


def _always(completion: str, gold: int) -> Draws:
    return [(1.0, completion)]


def _expectation(
    name: str, reward: Reward, cases: Sequence[WeightedCase], draws: Callable[[int], Draws]
) -> PolicyReward:
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
    return PolicyReward(name, mean, math.sqrt(variance))


def _check_cases(cases: Sequence[WeightedCase]) -> None:
    for case in cases:
        if case.gold not in LEVELS or not (math.isfinite(case.weight) and case.weight >= 0):
            raise RewardError(
                f'case "{case.id}": expected a gold level 1-5 and a weight >= 0, got {case.gold!r} and {case.weight!r}'
            )
    if not any(case.weight for case in cases):
        raise RewardError("cases: expected at least one with a weight above 0, got none")
