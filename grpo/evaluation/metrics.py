"""Answers → rates, each with its interval: exact, adjacent, under and over, the three meanings of dangerous, recall.

A rate is a share of all answers, but for ``high_acuity_under``: a share of the answers to cases of ESI 1 and 2. An
answer that does not parse is wrong in every rate; it is no triage, so it is neither under- nor over-triage, and
exact + under_triage + over_triage + no_parse = adjacent + non_adjacent + no_parse = 1.
With several answers to a case, shares are over answers and intervals know which belong together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from grpo.evaluation.statistics import Interval, clustered_wilson, majority, pass_at_k, quadratic_kappa, wilson
from grpo.types import Case
from rewards import Answer, Reward
from rewards.types import LEVELS

MANY_SAMPLES = (1, 2, 4, 8, 16, 32, 64)
"""The k of pass@k that are reported, up to the number of samples, and that number itself."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer to one case."""

    case: Case
    answer: Answer
    finished: bool
    """False: the token budget cut it."""
    tokens: int
    text: str
    sample: int = 0
    """Which of the answers to this case, from 0."""

    @property
    def predicted(self) -> int | None:
        return self.answer.level


def row(verdict: Verdict) -> dict[str, Any]:
    """The answer as a line of JSON holds it: all of the verdict but the case's text."""
    return {
        "id": verdict.case.id,
        "sample": verdict.sample,
        "esi": verdict.case.esi,
        "predicted": verdict.predicted,
        "reason": verdict.answer.reason,
        "finished": verdict.finished,
        "tokens": verdict.tokens,
        "completion": verdict.text,
    }


RateTest = Callable[[int, int | None], bool | None]
"""(gold, predicted level or None) → whether the answer counts towards a rate; None: it is no part of the rate."""
HIGH_ACUITY = 2
"""Gold levels up to this one are what ``high_acuity_under`` is a share of."""

RATES: Mapping[str, RateTest] = MappingProxyType(
    {
        "exact": lambda gold, said: said == gold,
        "adjacent": lambda gold, said: said is not None and abs(said - gold) <= 1,
        "non_adjacent": lambda gold, said: said is not None and abs(said - gold) >= 2,
        "under_triage": lambda gold, said: said is not None and said > gold,
        "over_triage": lambda gold, said: said is not None and said < gold,
        "dangerous_under": lambda gold, said: said is not None and said >= gold + 2,
        "high_acuity_under": lambda gold, said: said is not None and said > gold if gold <= HIGH_ACUITY else None,
        "no_parse": lambda gold, said: said is None,
    }
)
"""Rate → what it counts. Three of them have been called "dangerous": non_adjacent, dangerous_under (two levels or more
less acute than gold) and high_acuity_under (of the cases with gold 1 or 2: less acute than gold)."""


def summarise(verdicts: Sequence[Verdict], reward: Reward) -> dict[str, Any]:
    """The rates of an evaluation, and under ``intervals`` the 95 % interval of each (see `clustered_wilson`).

    ``n``: cases. ``high_acuity_n``: those of ESI 1 and 2, which ``high_acuity_under`` is a share of; without any, the
    rate and its interval are None. ``qwk``: quadratic weighted kappa of gold and predicted over the answers that parse,
    None where it is undefined; ``no_parse`` says how many it leaves out. ``recall``: of the answers to cases of a
    level, how many name it. ``precision``: of the answers that name a level, how many are right. ``by_rule``,
    ``by_tag``: exact over the cases that a rule speaks about, that carry a tag. ``confusion``: gold → [predicted 1 … 5,
    no parse].
    """
    holds = {name: _on_levels(rate) for name, rate in RATES.items()}
    found = {name: share(verdicts, test) for name, test in (holds | {"clipped_ratio": _cut}).items()}
    spoken = [(v.case.esi, v.predicted) for v in verdicts if v.predicted is not None]
    return {
        "n": len({v.case.id for v in verdicts}),
        **{name: value for name, (value, _) in found.items()},
        "high_acuity_n": len({v.case.id for v in verdicts if v.case.esi <= HIGH_ACUITY}),
        "intervals": {name: interval for name, (_, interval) in found.items()},
        "qwk": quadratic_kappa(spoken),
        "mean_length": sum(v.tokens for v in verdicts) / len(verdicts),
        "recall": {str(level): _part("recall", [v for v in verdicts if v.case.esi == level]) for level in LEVELS},
        "precision": {
            str(level): _part("precision", [v for v in verdicts if v.predicted == level]) for level in LEVELS
        },
        "by_rule": {
            rule.name: _part("exact", [v for v in verdicts if reward.applies(rule.name, v.case.text, v.case.esi)])
            for rule in reward.rules
        },
        "by_tag": {
            tag: _part("exact", [v for v in verdicts if tag in v.case.tags])
            for tag in sorted({tag for v in verdicts for tag in v.case.tags})
        },
        "confusion": {
            str(gold): [sum(v.case.esi == gold and v.predicted == said for v in verdicts) for said in (*LEVELS, None)]
            for gold in LEVELS
        },
    }


def share(
    verdicts: Sequence[Verdict], holds: Callable[[Verdict], bool | None]
) -> tuple[float, Interval] | tuple[None, None]:
    """The share of the answers for which something holds, and its interval, answers to one case taken together. Those
    of which it says None are left out; (None, None) where no other is there."""
    successes: dict[str, int] = {}
    trials: dict[str, int] = {}
    for v in verdicts:
        if (held := holds(v)) is not None:
            successes[v.case.id] = successes.get(v.case.id, 0) + held
            trials[v.case.id] = trials.get(v.case.id, 0) + 1
    return clustered_wilson(list(successes.values()), list(trials.values())) if trials else (None, None)


def rates_of(pairs: Sequence[tuple[int, int | None]]) -> dict[str, Any]:
    """Every rate of `RATES` over (gold, level) pairs, one a case, and under ``intervals`` Wilson's of each.

    >>> rates_of([(1, 2), (2, 2), (3, 4)])["high_acuity_under"], rates_of([(3, 4)])["high_acuity_under"]
    (0.5, None)
    """
    shares: dict[str, float | None] = {}
    intervals: dict[str, Interval | None] = {}
    for name, rate in RATES.items():
        counted = [held for pair in pairs if (held := rate(*pair)) is not None]
        shares[name] = sum(counted) / len(counted) if counted else None
        intervals[name] = wilson(sum(counted), len(counted)) if counted else None
    return {**shares, "intervals": intervals}


def baselines(golds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What naming one level always would score on these cases: ``always_1`` … ``always_5``, each with the rates of
    `RATES` and their intervals. Its kappa is 0 by construction.

    >>> constant = baselines([1, 1, 3])["always_2"]
    >>> constant["exact"], constant["adjacent"], constant["high_acuity_under"]
    (0.0, 1.0, 1.0)
    """
    return {f"always_{said}": rates_of([(gold, said) for gold in golds]) for said in LEVELS}


def over_samples(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What K answers to each case say together.

    ``majority``: the rates of the level that most of a case's answers name (see `majority`), with Wilson's interval
    over cases. ``unanimous``: the share of cases whose answers are all the same, no parse being an
    answer of its own. ``mean_spread``: levels between the most and the least acute answer, mean over the cases that
    have one. ``pass_at_k``: mean over cases, its interval Wilson's over cases.
    """
    answers = levels_by_case(verdicts)
    gold = {v.case.id: v.case.esi for v in verdicts}
    n, samples = len(answers), len(verdicts) // len(answers)
    unanimous = sum(len(set(levels)) == 1 for levels in answers.values())
    spoken = [[level for level in levels if level is not None] for levels in answers.values()]
    spreads = [max(levels) - min(levels) for levels in spoken if levels]
    passed = {
        k: sum(
            pass_at_k(samples, sum(level == gold[ident] for level in levels), k) for ident, levels in answers.items()
        )
        for k in sorted({k for k in MANY_SAMPLES if k <= samples} | {samples})
    }
    return {
        "majority": rates_of([(gold[ident], majority(levels)) for ident, levels in answers.items()]),
        "unanimous": {"n": n, "share": unanimous / n, "interval": wilson(unanimous, n)},
        "mean_spread": sum(spreads) / len(spreads) if spreads else None,
        "pass_at_k": {
            str(k): {"share": total / n, "interval": wilson(min(total, n), n)} for k, total in passed.items()
        },
    }


def levels_by_case(verdicts: Iterable[Verdict]) -> dict[str, list[int | None]]:
    """Case id → the levels of its answers, in the order of the verdicts."""
    found: dict[str, list[int | None]] = {}
    for v in verdicts:
        found.setdefault(v.case.id, []).append(v.predicted)
    return found


def _on_levels(rate: RateTest) -> Callable[[Verdict], bool | None]:
    return lambda v: rate(v.case.esi, v.predicted)


def _cut(verdict: Verdict) -> bool:
    return not verdict.finished


def _part(name: str, members: Sequence[Verdict]) -> dict[str, Any]:
    """How many of some answers are right, under ``name``: None where there are none."""
    value, interval = share(members, _on_levels(RATES["exact"]))
    return {"n": len({v.case.id for v in members}), name: value, "interval": interval}
