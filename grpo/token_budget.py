"""Token-budget accounting: how the budget truncated the completions of a step, and how a smaller budget would have.

Every statistic is a (sum, count) pair, (0.0, 0.0) if there are no completions. Means over completions or tokens can be
merged from parts of a step. Minima, maxima, quantiles and token totals cannot: they are stored as (value, 1.0), which
merges to the mean over the parts.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from grpo.advantage import advantages
from grpo.runtime.errors import UserError
from grpo.stats import Stats, sum_and_count
from grpo.types import Completion, Group
from rewards.parse import END_TOKENS
from rewards.types import Reason, Score

FinishReason = Literal["end", "budget", "other"]

QUANTILES = (10, 50, 90, 99)
"""Percentiles of the completion lengths to log."""
FORECAST_PERCENTS = (25, 50, 75)
"""Smaller budgets for which the clipped ratio is forecast, in percent of the run's budget."""
NO_PARSE_REASONS = tuple(reason for reason in get_args(Reason) if reason != "parsed")
"""Reasons why no level could be parsed from a completion."""


def finish_reason(completion: Completion, max_new_tokens: int) -> FinishReason:
    """Return why a completion of L tokens ended: "end" if its last token is an end token, else "budget" if L equals the
    budget, else "other" (an engine that was aborted or that has stop strings, which this project's engines do not).

    Args:
        max_new_tokens: the budget it was sampled with, >= 1.

    A completion whose end token is exactly at the budget is "end": the budget did not truncate it.

    Raises:
        UserError: the completion is longer than the budget.

    >>> ended, aborted = Completion((5, 2), (0.0, 0.0), True, "a"), Completion((5,), (0.0,), False, "a")
    >>> finish_reason(ended, 2), finish_reason(aborted, 2)
    ('end', 'other')
    """
    length = len(completion.ids)
    if length > max_new_tokens:
        raise UserError(
            f"expected completions of at most max_new_tokens = {max_new_tokens} tokens, got one of {length}: it was "
            "sampled with a larger budget"
        )
    if completion.finished:
        return "end"
    return "budget" if length == max_new_tokens else "other"


def length_stats(completions: Sequence[Completion], *, max_new_tokens: int) -> Stats:
    """Return why the completions of a step ended and how long they are; metrics under ``completions/``.

    ``clipped_ratio`` has TRL's name and definition, so that it can be compared with other logs and model cards: the
    fraction of completions whose last token is not an end token, whatever the cause:
    clipped_ratio = stop_budget + stop_other. (TRL accepts a final pad token as an end token; here it counts as
    clipped.) "Truncated" means clipped, "finished" the opposite.

    stop_end, stop_budget, stop_other   fractions by `finish_reason`; they add up to 1
    mean_, min_, max_length             tokens L, including the end token
    mean_, min_, max_terminated_length  the same over finished completions; null if there are none (TRL logs 0)
    length_p10, _p50, _p90, _p99        the ⌈p·N/100⌉-th smallest L (nearest rank), not interpolated
    tokens, truncated_tokens            ΣL, and ΣL over truncated completions
    truncated_token_share               truncated_tokens / tokens

    Args:
        completions: all N of a step.
        max_new_tokens: the budget they were sampled with, >= 1.

    Raises:
        UserError: as `finish_reason`.

    Source of clipped_ratio: TRL's ``GRPOTrainer``; of nearest rank: Hyndman and Fan 1996, definition 1.

    >>> done, cut = Completion((5, 2), (0.0,) * 2, True, "a"), Completion((5, 6, 7), (0.0,) * 3, False, "abc")
    >>> stats = length_stats([done, cut], max_new_tokens=3)
    >>> stats["completions/clipped_ratio"], stats["completions/truncated_token_share"], stats["completions/length_p50"]
    ((1.0, 2.0), (3.0, 5.0), (2.0, 1.0))
    """
    lengths = [len(c.ids) for c in completions]
    terminated = sorted(len(c.ids) for c in completions if c.finished)
    truncated = [len(c.ids) for c in completions if not c.finished]
    causes = [finish_reason(c, max_new_tokens) for c in completions]
    ordered = sorted(lengths)
    weight = float(bool(lengths))
    return {
        "completions/clipped_ratio": sum_and_count(not c.finished for c in completions),
        **{
            f"completions/stop_{name}": sum_and_count(cause == name for cause in causes)
            for name in get_args(FinishReason)
        },
        "completions/mean_length": sum_and_count(lengths),
        "completions/min_length": sum_and_count(ordered[:1]),
        "completions/max_length": sum_and_count(ordered[-1:]),
        "completions/mean_terminated_length": sum_and_count(terminated),
        "completions/min_terminated_length": sum_and_count(terminated[:1]),
        "completions/max_terminated_length": sum_and_count(terminated[-1:]),
        **{f"completions/length_p{p}": sum_and_count(_nearest_rank(ordered, p)) for p in QUANTILES},
        "completions/tokens": (float(sum(lengths)), weight),
        "completions/truncated_tokens": (float(sum(truncated)), weight),
        "completions/truncated_token_share": (float(sum(truncated)), float(sum(lengths))),
    }


def parse_stats(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> Stats:
    """Return how many completions closed their thinking and could be parsed; metrics under ``completions/``.

    Fractions of all completions, except truncated_parsed:

    opened_thinking          the prompt or the completion opened ``<think>``
    unclosed_thinking        … and did not close the last one; opened_thinking is the number of candidates
    truncated_parsed         fraction *of the truncated completions* that could be parsed
    no_parse                 no level was found, for any reason
    no_parse/REASON          for that reason, one of `NO_PARSE_REASONS` (with underscores); they add up to no_parse

    A completion can leave its thinking open and still parse, if the answer came before: unclosed_thinking is at least
    no_parse/unclosed_thinking. As in `rewards.parse`, text after an end token is ignored.

    Args:
        groups: B groups of G completions.
        scores: [B][G], in the same order.

    >>> from grpo.types import Case, Prompt
    >>> from rewards import load_reward
    >>> thought = Completion((5,), (0.0,), False, "Chest pain, so")
    >>> score = load_reward("v49").score(
    ...     text="Chest pain.", gold=2, completion=thought.text, thinking=True, finished=False, case_id="c1")
    >>> stats = parse_stats([Group(Prompt(Case("c1", "Chest pain.", 2), (1,), True), (thought,))], [[score]])
    >>> stats["completions/unclosed_thinking"], stats["completions/no_parse/unclosed_thinking"]
    ((1.0, 1.0), (1.0, 1.0))
    """
    scored = [
        pair for group, row in zip(groups, scores, strict=True) for pair in zip(group.completions, row, strict=True)
    ]
    thoughts = [_thought(c.text, group.prompt.thinking) for group in groups for c in group.completions]
    return {
        "completions/opened_thinking": sum_and_count(opened for opened, _ in thoughts),
        "completions/unclosed_thinking": sum_and_count(unclosed for _, unclosed in thoughts),
        "completions/truncated_parsed": sum_and_count(s.answer.level is not None for c, s in scored if not c.finished),
        "completions/no_parse": sum_and_count(s.answer.level is None for _, s in scored),
        **{
            f"completions/no_parse/{reason.replace(' ', '_')}": sum_and_count(
                s.answer.reason == reason for _, s in scored
            )
            for reason in NO_PARSE_REASONS
        },
    }


def reward_by_truncation(completions: Sequence[Completion], rewards: ArrayLike) -> Stats:
    """Return ``reward/mean_finished`` and ``reward/mean_truncated``: the mean total reward of completions that ended
    with an end token, and of those that did not.

    Args:
        completions: N.
        rewards: [N] finite totals, in the same order.

    If none finished, or none was truncated, that entry is (0.0, 0.0).

    >>> done, cut = Completion((5, 2), (0.0, 0.0), True, "a"), Completion((5, 6), (0.0, 0.0), False, "ab")
    >>> reward_by_truncation([done, done, cut], [1.0, -0.5, -2.0])
    {'reward/mean_finished': (0.5, 2.0), 'reward/mean_truncated': (-2.0, 1.0)}
    """
    totals = np.asarray(rewards, dtype=np.float64)
    finished = np.array([c.finished for c in completions], dtype=np.bool_)
    return {
        "reward/mean_finished": sum_and_count(totals[finished]),
        "reward/mean_truncated": sum_and_count(totals[~finished]),
    }


def truncation_advantage_shift(
    rewards: ArrayLike, finished: ArrayLike, *, kind: str, epsilon: float, ddof: int
) -> Stats:
    """Return how truncated completions shift the advantages of the finished ones: A(all in the baseline) − A(truncated
    ones excluded from the baseline), averaged over the finished completions of groups that contain a truncated one;
    signed as ``advantage/truncation_pull`` and in absolute value as ``advantage/truncation_pull_abs``.

    Truncated completions mostly score low and so lower the mean the others are compared with: the signed mean is then
    above 0, an advantage for having ended at all. Without the truncated ones a group's advantages sum to 0, so the
    signed mean is also the mean of A(all) over these completions; a change of the std alone shows only in the absolute
    mean. Both are reported whichever baseline the run uses.

    Args:
        rewards: [B,G] finite, G >= 2.
        finished: [B,G] bool; False for truncated completions.
        kind, epsilon, ddof: as in `grpo.advantage.advantages`. "batch" divides by the std of all groups, so its shift
            is not additive over parts of the batch, and its effect on groups without a truncated one is not counted.

    A group with a single finished completion has no advantage without the truncated ones: its shift is all of A. If
    nothing was truncated, or no such group has a finished completion, the result is (0.0, 0.0).

    >>> truncation_advantage_shift([[-1, -1, -1, 1]], [[False, False, False, True]], kind="group", epsilon=0.0, ddof=1)
    {'advantage/truncation_pull': (1.5, 1.0), 'advantage/truncation_pull_abs': (1.5, 1.0)}
    """
    mask, values = np.asarray(finished), np.asarray(rewards, dtype=np.float64)
    with_truncated = advantages(values, kind=kind, epsilon=epsilon, ddof=ddof)
    without_truncated = advantages(values, kind=kind, epsilon=epsilon, ddof=ddof, in_baseline=mask)
    shift = (with_truncated - without_truncated)[mask & ~mask.all(axis=1, keepdims=True)]
    return {
        "advantage/truncation_pull": sum_and_count(shift),
        "advantage/truncation_pull_abs": sum_and_count(np.abs(shift)),
    }


def clipped_ratio_forecast(completions: Sequence[Completion], *, max_new_tokens: int) -> Stats:
    """Return ``completions/clipped_ratio_at/25``, ``…/50``, ``…/75``: the clipped ratio 1 − #{finished, L ≤ b} / N that
    the same policy would have had with b = ⌊percent · max_new_tokens / 100⌋, but at least 1.

    This is exact, not an estimate: token t of a row depends on the row's key and the tokens before it but not on the
    budget, so a smaller budget samples the same prefix (unless rounding of the logits, in a batch that shrinks at other
    times, changes a token). It does not predict a policy *trained* with b, which learns other lengths.

    Args:
        completions: all N of a step.
        max_new_tokens: the budget they were sampled with, >= 1.

    >>> done, cut = Completion((5, 2), (0.0,) * 2, True, "a"), Completion((5,) * 6, (0.0,) * 6, False, "…")
    >>> list(clipped_ratio_forecast([done, cut], max_new_tokens=6).values())  # budgets 1, 3 and 4
    [(2.0, 2.0), (1.0, 2.0), (1.0, 2.0)]
    """
    budgets = {percent: max(1, max_new_tokens * percent // 100) for percent in FORECAST_PERCENTS}
    return {
        f"completions/clipped_ratio_at/{percent}": sum_and_count(
            not (c.finished and len(c.ids) <= budget) for c in completions
        )
        for percent, budget in budgets.items()
    }


def _nearest_rank(ordered: Sequence[int], percent: int) -> Sequence[int]:
    """Return the ⌈percent·N/100⌉-th smallest in a list of one, or an empty list if ``ordered`` is empty."""
    rank = -(-percent * len(ordered) // 100)
    return ordered[rank - 1 : rank]


def _thought(text: str, thinking: bool) -> tuple[bool, bool]:
    """Return (opened, unclosed): whether thinking was opened, and whether the last one opened is open at the end."""
    read = END_TOKENS.split(text, maxsplit=1)[0]
    opens, closes = read.rfind("<think>"), read.rfind("</think>")
    return thinking or opens >= 0, opens > closes or (thinking and closes < 0)
