"""Token-budget accounting: what the budget did to the completions of a step, and what a smaller one would have done.

Every statistic is (sum, count), and no completions at all give (0.0, 0.0) under every name. Merging the parts of a
step gives the figures of the whole for everything that is a mean over completions or tokens. It does not for minima,
maxima, quantiles and totals of tokens, which are written (value, 1.0): those merge to the mean over the parts.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from grpo.advantage import advantages
from grpo.runtime.errors import UserError
from grpo.stats import Stats, mean_of
from grpo.types import Completion, Group
from rewards.parse import END_TOKENS
from rewards.types import Reason, Score

StopCause = Literal["end", "budget", "other"]

QUANTILES = (10, 50, 90, 99)
"""Percentiles of the lengths that are logged."""
FORECASTS = (25, 50, 75)
"""Smaller budgets that are forecast, in percent of the run's."""
NO_PARSE = tuple(reason for reason in get_args(Reason) if reason != "parsed")
"""Why a completion has no level."""


def stop_cause(completion: Completion, max_new_tokens: int) -> StopCause:
    """What ended a completion of L tokens: "end" if its last token is an end token, else "budget" if L has reached
    the budget, else "other" (an engine that was aborted or obeys a stop string; this project's own has no such stop).

    Args:
        max_new_tokens: the budget it was drawn under, >= 1.

    One that ends exactly at the budget with an end token is "end": the budget cost it nothing.

    Raises:
        UserError: a budget below 1, or a completion longer than the budget.

    >>> stop_cause(Completion((5, 2), (0.0, 0.0), True, "a"), 2), stop_cause(Completion((5,), (0.0,), False, "a"), 2)
    ('end', 'other')
    """
    _check_lengths([len(completion.ids)], max_new_tokens)
    if completion.finished:
        return "end"
    return "budget" if len(completion.ids) >= max_new_tokens else "other"


def budget_stats(completions: Sequence[Completion], *, max_new_tokens: int) -> Stats:
    """What stopped the completions of a step and how long they are; names under ``completions/``.

    ``clipped_ratio`` is TRL's, under TRL's name, so that it compares with the logs and cards of other runs: the share
    of completions whose last token is not an end token. TRL never asks for the cause, so every other stop counts as
    clipped as well: clipped_ratio = stop_budget + stop_other. (TRL lets a last pad token pass for an end token; a pad
    token that ends nothing counts as clipped here.) "Truncated" means clipped, "finished" the opposite.

    stop_end, stop_budget, stop_other   shares of `stop_cause`; they add up to 1
    mean_, min_, max_length             tokens L, end token included
    mean_, min_, max_terminated_length  the same over finished ones; nothing counted if there are none (TRL writes 0)
    length_p10, _p50, _p90, _p99        the ⌈p·N/100⌉-th smallest L (nearest rank), never interpolated
    tokens, truncated_tokens            ΣL, and ΣL over truncated completions
    truncated_token_share               truncated_tokens / tokens

    Args:
        completions: all N of a step.
        max_new_tokens: the budget T they were drawn under, >= 1.

    Raises:
        UserError: as `stop_cause`.

    Source of clipped_ratio: TRL's ``GRPOTrainer``; of nearest rank: Hyndman and Fan 1996, definition 1.

    >>> done, cut = Completion((5, 2), (0.0,) * 2, True, "a"), Completion((5, 6, 7), (0.0,) * 3, False, "abc")
    >>> stats = budget_stats([done, cut], max_new_tokens=3)
    >>> stats["completions/clipped_ratio"], stats["completions/truncated_token_share"], stats["completions/length_p50"]
    ((1.0, 2.0), (3.0, 5.0), (2.0, 1.0))
    """
    lengths = [len(c.ids) for c in completions]
    _check_lengths(lengths, max_new_tokens)
    terminated = sorted(len(c.ids) for c in completions if c.finished)
    truncated = [len(c.ids) for c in completions if not c.finished]
    causes = [stop_cause(c, max_new_tokens) for c in completions]
    ordered = sorted(lengths)
    some = float(bool(lengths))
    return {
        "completions/clipped_ratio": mean_of(not c.finished for c in completions),
        **{f"completions/stop_{one}": mean_of(cause == one for cause in causes) for one in get_args(StopCause)},
        "completions/mean_length": mean_of(lengths),
        "completions/min_length": mean_of(ordered[:1]),
        "completions/max_length": mean_of(ordered[-1:]),
        "completions/mean_terminated_length": mean_of(terminated),
        "completions/min_terminated_length": mean_of(terminated[:1]),
        "completions/max_terminated_length": mean_of(terminated[-1:]),
        **{f"completions/length_p{p}": mean_of(_nearest_rank(ordered, p)) for p in QUANTILES},
        "completions/tokens": (float(sum(lengths)), some),
        "completions/truncated_tokens": (float(sum(truncated)), some),
        "completions/truncated_token_share": (float(sum(truncated)), float(sum(lengths))),
    }


def answer_stats(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> Stats:
    """How thinking and parsing fared; names under ``completions/``, shares of all completions but for the third.

    opened_thinking                     the prompt or the completion opened ``<think>``
    unclosed_thinking                   … and never closed the last one; / opened_thinking: among those that did
    truncated_parsed                    share *of the truncated ones* that parsed all the same
    no_parse                            no level, for whatever reason
    no_parse/unclosed_thinking, …       for that reason, each of `NO_PARSE` (underscores for blanks); they add up

    A completion can leave a thought open and still parse, by an answer before it opened: unclosed_thinking is at least
    no_parse/unclosed_thinking. As in `rewards.parse`, text after an end token is not read.

    Args:
        groups: B groups of G completions.
        scores: [B][G], of the same completions in the same order.

    Raises:
        UserError: groups and scores of different sizes.

    >>> from grpo.types import Case, Prompt
    >>> from rewards import load_reward
    >>> thought = Completion((5,), (0.0,), False, "Chest pain, so")
    >>> score = load_reward("v49").score(
    ...     text="Chest pain.", gold=2, completion=thought.text, thinking=True, finished=False, case_id="c1")
    >>> stats = answer_stats([Group(Prompt(Case("c1", "Chest pain.", 2), (1,), True), (thought,))], [[score]])
    >>> stats["completions/unclosed_thinking"], stats["completions/no_parse/unclosed_thinking"]
    ((1.0, 1.0), (1.0, 1.0))
    """
    scored = _scored(groups, scores)
    thoughts = [_thought(c.text, group.prompt.thinking) for group in groups for c in group.completions]
    return {
        "completions/opened_thinking": mean_of(opened for opened, _ in thoughts),
        "completions/unclosed_thinking": mean_of(unclosed for _, unclosed in thoughts),
        "completions/truncated_parsed": mean_of(s.answer.level is not None for c, s in scored if not c.finished),
        "completions/no_parse": mean_of(s.answer.level is None for _, s in scored),
        **{
            f"completions/no_parse/{reason.replace(' ', '_')}": mean_of(s.answer.reason == reason for _, s in scored)
            for reason in NO_PARSE
        },
    }


def reward_by_status(completions: Sequence[Completion], rewards: ArrayLike) -> Stats:
    """``reward/mean_finished`` and ``reward/mean_truncated``: mean total reward of those that ended with an end token
    and of those that did not. Additive up to the rounding of the sums.

    Args:
        completions: N.
        rewards: [N] finite totals, in the same order.

    Nothing finished, or nothing truncated: (0.0, 0.0) there.

    Raises:
        UserError: rewards that are not [N] or not finite.

    >>> done, cut = Completion((5, 2), (0.0, 0.0), True, "a"), Completion((5, 6), (0.0, 0.0), False, "ab")
    >>> reward_by_status([done, done, cut], [1.0, -0.5, -2.0])
    {'reward/mean_finished': (0.5, 2.0), 'reward/mean_truncated': (-2.0, 1.0)}
    """
    totals = np.asarray(rewards, dtype=np.float64)
    if totals.shape != (len(completions),) or not np.isfinite(totals).all():
        raise UserError(
            f"rewards: expected {len(completions)} finite values, one a completion, got shape {list(totals.shape)} "
            f"with {int((~np.isfinite(totals)).sum())} not finite; flatten [B,G] in the order of the completions"
        )
    finished = np.array([c.finished for c in completions], dtype=np.bool_)
    return {
        "reward/mean_finished": mean_of(totals[finished]),
        "reward/mean_truncated": mean_of(totals[~finished]),
    }


def truncation_pull(rewards: ArrayLike, finished: ArrayLike, *, kind: str, epsilon: float, ddof: int) -> Stats:
    """What truncated completions add to the advantages of the finished ones: A(everybody in the baseline) − A(truncated
    ones out of it), mean over the finished completions of the groups that hold a truncated one, signed as
    ``advantage/truncation_pull`` and in absolute value as ``advantage/truncation_pull_abs``.

    Truncated completions mostly score low, so they lower the mean that the others are measured against: the signed
    mean is then above 0, praise for having ended at all. Without the truncated ones a group's advantages sum to 0, so
    the signed mean is also the mean of A(everybody) over the same completions; what only the spread changes shows in
    the absolute one. Both are reported whichever baseline the run itself uses.

    Args:
        rewards: [B,G] finite, G >= 2.
        finished: [B,G] bool; False for the truncated ones.
        kind, epsilon, ddof: as in `grpo.advantage.advantages`. "batch" divides by the std of all groups, so its pull is
            not additive over parts of the batch, and what it does to groups without a truncated one is not counted.

    A group with a single finished completion has no advantage once the truncated ones are out: its pull is all of A.
    Nothing truncated, or nothing finished in any group that holds a truncated one: (0.0, 0.0).

    Raises:
        ValueError: ``finished`` is not bool [B,G], and all that `advantages` refuses.

    >>> truncation_pull([[-1, -1, -1, 1]], [[False, False, False, True]], kind="group", epsilon=0.0, ddof=1)
    {'advantage/truncation_pull': (1.5, 1.0), 'advantage/truncation_pull_abs': (1.5, 1.0)}
    """
    done, values = np.asarray(finished), np.asarray(rewards, dtype=np.float64)
    if done.dtype != np.bool_ or done.shape != values.shape:
        raise UserError(f"finished: expected bool {list(values.shape)}, got {done.dtype} {list(done.shape)}")
    everybody = advantages(values, kind=kind, epsilon=epsilon, ddof=ddof)
    alone = advantages(values, kind=kind, epsilon=epsilon, ddof=ddof, in_baseline=done)
    pull = (everybody - alone)[done & ~done.all(axis=1, keepdims=True)]
    return {
        "advantage/truncation_pull": mean_of(pull),
        "advantage/truncation_pull_abs": mean_of(np.abs(pull)),
    }


def clipped_ratio_at(
    lengths: Sequence[int], finished: Sequence[bool], budgets: Sequence[int], *, max_new_tokens: int
) -> list[float]:
    """The clipped ratio that the same policy would have had under each smaller budget b: 1 − #{finished, L ≤ b} / N.

    Exact, not an estimate: what a row draws at token t follows from its key and the tokens before it, never from the
    budget, so a smaller budget draws the same prefix (as long as the rounding of the logits, in a batch that shrinks at
    other moments, flips no draw). A completion of L tokens whose last is an end token is finished at b if and only if
    L ≤ b; one that no end token ended is finished at no budget up to the recorded one. It says nothing about a policy
    *trained* under b, which learns other lengths.

    Args:
        lengths, finished: N >= 1 completions, end token included in L.
        budgets: each in 1 … max_new_tokens, in any order; the answers come in the same.
        max_new_tokens: the budget that was recorded. Beyond it nothing is known of the completions it cut. It cannot be
            read off the lengths: a step in which all ended early does not show it.

    Raises:
        UserError: no completions, lists of different sizes, a completion longer than the recorded budget, a budget
            below 1 or above the recorded one.

    >>> clipped_ratio_at([3, 5, 8, 8], [True, True, True, False], [8, 5, 4, 2], max_new_tokens=8)
    [0.25, 0.5, 0.75, 1.0]
    """
    if not lengths or len(lengths) != len(finished):
        raise UserError(
            f"expected a length and a finished flag for each of at least one completion, got {len(lengths)} lengths "
            f"and {len(finished)} flags"
        )
    _check_lengths(lengths, max_new_tokens)
    for budget in budgets:
        if not 1 <= budget <= max_new_tokens:
            raise UserError(
                f"expected budgets from 1 to the recorded {max_new_tokens}, got {budget}: the recorded completions do "
                "not tell how those that were cut would have gone on; sample with a larger max_new_tokens"
            )
    return [_clipped(lengths, finished, budget) / len(lengths) for budget in budgets]


def forecast_stats(completions: Sequence[Completion], *, max_new_tokens: int) -> Stats:
    """``completions/clipped_ratio_at/25``, ``…/50``, ``…/75``: the clipped ratio under that percentage of the budget,
    by `clipped_ratio_at`. The smaller budget is ⌊percent · max_new_tokens / 100⌋, and at least 1.

    Args:
        completions: all N of a step.
        max_new_tokens: the budget T they were drawn under, >= 1.

    Raises:
        UserError: a budget below 1, or a completion longer than the budget.

    >>> done, cut = Completion((5, 2), (0.0,) * 2, True, "a"), Completion((5,) * 6, (0.0,) * 6, False, "…")
    >>> list(forecast_stats([done, cut], max_new_tokens=6).values())  # budgets 1, 3 and 4
    [(2.0, 2.0), (1.0, 2.0), (1.0, 2.0)]
    """
    lengths, finished = [len(c.ids) for c in completions], [c.finished for c in completions]
    _check_lengths(lengths, max_new_tokens)
    budgets = {percent: max(1, max_new_tokens * percent // 100) for percent in FORECASTS}
    return {
        f"completions/clipped_ratio_at/{percent}": (float(_clipped(lengths, finished, budget)), float(len(lengths)))
        for percent, budget in budgets.items()
    }


def _clipped(lengths: Sequence[int], finished: Sequence[bool], budget: int) -> int:
    return sum(not (done and length <= budget) for length, done in zip(lengths, finished, strict=True))


def _nearest_rank(ordered: Sequence[int], percent: int) -> Sequence[int]:
    """The ⌈percent·N/100⌉-th smallest, alone in a list; nothing of nothing. Integers, so that no rounding picks it."""
    rank = -(-percent * len(ordered) // 100)
    return ordered[rank - 1 : rank]


def _thought(text: str, thinking: bool) -> tuple[bool, bool]:
    """(opened, unclosed): whether a thought was opened, and whether the last one opened is still open at the end."""
    read = END_TOKENS.split(text, maxsplit=1)[0]
    opens, closes = read.rfind("<think>"), read.rfind("</think>")
    return thinking or opens >= 0, opens > closes or (thinking and closes < 0)


def _scored(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> list[tuple[Completion, Score]]:
    """Each completion with its score."""
    if len(groups) != len(scores):
        raise UserError(f"expected a row of scores for each of {len(groups)} groups, got {len(scores)}")
    pairs: list[tuple[Completion, Score]] = []
    for group, row in zip(groups, scores, strict=True):
        case, size = group.prompt.case.id, len(group.completions)
        if size != len(row):
            raise UserError(f"case {case!r}: expected a score for each of {size} completions, got {len(row)}")
        pairs += zip(group.completions, row, strict=True)
    return pairs


def _check_lengths(lengths: Sequence[int], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"expected max_new_tokens >= 1, got {max_new_tokens}")
    if max(lengths, default=0) > max_new_tokens:
        raise UserError(
            f"expected completions of at most max_new_tokens = {max_new_tokens} tokens, got one of {max(lengths)}: "
            "these completions were drawn under another budget"
        )
