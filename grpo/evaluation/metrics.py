"""Judged answers → rates with intervals: exact, adjacent, under- and over-triage, three "dangerous" rates, recall.

The denominator of a rate is all answers; for ``high_acuity_under`` it is the answers to cases of ESI 1 and 2. An answer
that does not parse is wrong in every rate, but is neither under- nor over-triage:
exact + under_triage + over_triage + no_parse = adjacent + non_adjacent + no_parse = 1.
With several answers per case, rates are over answers, and intervals account for the answers that share a case.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from grpo.evaluation.statistics import Interval, clustered_wilson, majority, pass_at_k, quadratic_kappa, wilson
from grpo.types import Case
from rewards import Answer, Reward
from rewards.types import LEVELS

PASS_AT = (1, 2, 4, 8, 16, 32, 64)
"""The values of k for which pass@k is reported, up to the number of samples; that number itself is added."""


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer to one case."""

    case: Case
    answer: Answer
    finished: bool
    """False if the token budget cut it."""
    tokens: int
    text: str
    sample: int = 0
    """Index among the answers to this case, from 0."""

    @property
    def predicted(self) -> int | None:
        return self.answer.level


def answer_row(answer: JudgedAnswer, *, text: bool = True) -> dict[str, Any]:
    """Return the answer as a JSON object, without the case's text.

    Args:
        text: whether to include the answer's own text, as ``completion``.
    """
    row = {
        "id": answer.case.id,
        "sample": answer.sample,
        "esi": answer.case.gold_level,
        "predicted": answer.predicted,
        "reason": answer.answer.reason,
        "finished": answer.finished,
        "tokens": answer.tokens,
    }
    return row | {"completion": answer.text} if text else row


RateTest = Callable[[int, int | None], bool | None]
"""(gold level, predicted level or None) → whether the answer counts; None if it is not in the rate's denominator."""
HIGH_ACUITY = 2
"""The highest gold level in the denominator of ``high_acuity_under``."""

RATES: Mapping[str, RateTest] = MappingProxyType(
    {
        "exact": lambda gold, level: level == gold,
        "adjacent": lambda gold, level: level is not None and abs(level - gold) <= 1,
        "non_adjacent": lambda gold, level: level is not None and abs(level - gold) >= 2,
        "under_triage": lambda gold, level: level is not None and level > gold,
        "over_triage": lambda gold, level: level is not None and level < gold,
        "dangerous_under": lambda gold, level: level is not None and level >= gold + 2,
        "high_acuity_under": lambda gold, level: level is not None and level > gold if gold <= HIGH_ACUITY else None,
        "no_parse": lambda gold, level: level is None,
    }
)
"""Rate → what it counts. Three of them have been called "dangerous": non_adjacent, dangerous_under (at least two levels
less acute than gold) and high_acuity_under (less acute than gold, among the cases of gold level 1 or 2)."""


def summarize(answers: Sequence[JudgedAnswer], reward: Reward) -> dict[str, Any]:
    """Return the rates of an evaluation and, under ``intervals``, the 95 % interval of each (see `clustered_wilson`).

    ``n``: number of cases. ``high_acuity_n``: cases of ESI 1 and 2; without any, ``high_acuity_under`` and its interval
    are None. ``qwk``: quadratic weighted kappa of gold and predicted level over the answers that parse, None if
    undefined. ``recall``: exact over the cases of a level. ``precision``: exact over the answers that name a level.
    ``by_rule``, ``by_tag``: exact over the cases to which a rule applies, that have a tag. ``confusion``: gold →
    [predicted 1 … 5, no parse].
    """
    rates = _rates_of([(a.case.id, a.case.gold_level, a.predicted) for a in answers])
    clipped, interval = rate_with_interval((a.case.id, not a.finished) for a in answers)
    return {
        "n": len({a.case.id for a in answers}),
        **rates,
        "clipped_ratio": clipped,
        "high_acuity_n": len({a.case.id for a in answers if a.case.gold_level <= HIGH_ACUITY}),
        "intervals": rates["intervals"] | {"clipped_ratio": interval},
        "qwk": quadratic_kappa([(a.case.gold_level, a.predicted) for a in answers if a.predicted is not None]),
        "mean_length": sum(a.tokens for a in answers) / len(answers),
        "recall": {
            str(level): _exact("recall", [a for a in answers if a.case.gold_level == level]) for level in LEVELS
        },
        "precision": {
            str(level): _exact("precision", [a for a in answers if a.predicted == level]) for level in LEVELS
        },
        "by_rule": {
            rule.name: _exact(
                "exact", [a for a in answers if reward.applies(rule.name, a.case.text, a.case.gold_level)]
            )
            for rule in reward.rules
        },
        "by_tag": {
            tag: _exact("exact", [a for a in answers if tag in a.case.tags])
            for tag in sorted({tag for a in answers for tag in a.case.tags})
        },
        "confusion": {
            str(gold): [
                sum(a.case.gold_level == gold and a.predicted == level for a in answers) for level in (*LEVELS, None)
            ]
            for gold in LEVELS
        },
    }


def rate_with_interval(outcomes: Iterable[tuple[Hashable, bool]]) -> tuple[float, Interval] | tuple[None, None]:
    """Return the fraction of true outcomes and its interval, with outcomes of the same case in one cluster.

    Args:
        outcomes: (case id, outcome) of each answer. Without any, both values are None.
    """
    by_case: dict[Hashable, list[bool]] = defaultdict(list)
    for case_id, outcome in outcomes:
        by_case[case_id].append(outcome)
    if not by_case:
        return None, None
    return clustered_wilson([sum(members) for members in by_case.values()], [len(m) for m in by_case.values()])


def _rates_of(answers: Sequence[tuple[Hashable, int, int | None]]) -> dict[str, Any]:
    """Return each rate of `RATES` over (case id, gold, level), and their ``intervals``."""
    rates = {
        name: rate_with_interval((i, counts) for i, gold, level in answers if (counts := rate(gold, level)) is not None)
        for name, rate in RATES.items()
    }
    return {**{name: value for name, (value, _) in rates.items()}, "intervals": {k: v for k, (_, v) in rates.items()}}


def baselines(golds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the rates and intervals of answering these cases with one constant level, as ``always_1`` … ``always_5``.
    The kappa of a constant is 0.

    >>> constant = baselines([1, 1, 3])["always_2"]
    >>> constant["exact"], constant["adjacent"], constant["high_acuity_under"]
    (0.0, 1.0, 1.0)
    """
    return {f"always_{level}": _rates_of([(i, gold, level) for i, gold in enumerate(golds)]) for level in LEVELS}


def multi_sample_stats(answers: Sequence[JudgedAnswer]) -> dict[str, Any]:
    """Return statistics of K answers per case, taken together.

    ``majority``: rates of the most frequent level of each case (see `majority`), with intervals over cases.
    ``unanimous``: fraction of cases whose answers are all equal; no parse is an answer of its own. ``mean_spread``:
    levels between the most and the least acute answer, mean over the cases with a parsed answer. ``pass_at_k``: mean
    over cases, with Wilson's interval over cases.
    """
    by_case = levels_by_case(answers)
    gold = {a.case.id: a.case.gold_level for a in answers}
    n, samples = len(by_case), len(answers) // len(by_case)
    unanimous = sum(len(set(levels)) == 1 for levels in by_case.values())
    parsed = [[level for level in levels if level is not None] for levels in by_case.values()]
    spreads = [max(levels) - min(levels) for levels in parsed if levels]
    passed = {
        k: sum(pass_at_k(samples, levels.count(gold[case_id]), k) for case_id, levels in by_case.items())
        for k in sorted({k for k in PASS_AT if k <= samples} | {samples})
    }
    return {
        "majority": _rates_of([(case_id, gold[case_id], majority(levels)) for case_id, levels in by_case.items()]),
        "unanimous": {"n": n, "share": unanimous / n, "interval": wilson(unanimous, n)},
        "mean_spread": sum(spreads) / len(spreads) if spreads else None,
        "pass_at_k": {
            str(k): {"share": total / n, "interval": wilson(min(total, n), n)} for k, total in passed.items()
        },
    }


def levels_by_case(answers: Iterable[JudgedAnswer]) -> dict[str, list[int | None]]:
    """Return case id → the levels of its answers, in order."""
    levels: dict[str, list[int | None]] = defaultdict(list)
    for answer in answers:
        levels[answer.case.id].append(answer.predicted)
    return levels


def _exact(name: str, answers: Sequence[JudgedAnswer]) -> dict[str, Any]:
    """Return the exact rate of some answers under ``name``; None if there are none."""
    value, interval = rate_with_interval((a.case.id, a.predicted == a.case.gold_level) for a in answers)
    return {"n": len({a.case.id for a in answers}), name: value, "interval": interval}
