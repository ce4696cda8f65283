"""The metrics of a step, and what every token and every reward component contributed to them.

Everything is computed from a `StepRecord` alone, on the CPU, in float64: the training loop and a replay of its ledger
call the same functions on the same numbers. `math.fsum` rounds sums exactly in any order, so the token contributions
add up to the logged loss bit for bit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.advantage import advantages_by_component, zero_variance
from grpo.config import AdvantageSection, Config, LossSection
from grpo.loss import grpo_loss
from grpo.stats import Stats, sum_and_count, to_means
from grpo.token_budget import (
    clipped_ratio_forecast,
    length_stats,
    parse_stats,
    reward_by_truncation,
    truncation_advantage_shift,
)
from grpo.types import Batch, StepLogprobs, StepRecord


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """The loss terms of M packed tokens in E inner epochs, [E,M] each."""

    ratio: Tensor
    """fp64; exp(logprob − old logprob), for "gspo" that of the whole completion."""
    clip_side: Tensor
    """int8; −1 where the lower bound zeroed the surrogate's gradient, +1 where the upper bound did, else 0."""
    kl: Tensor | None
    """fp64 nats, unweighted; None without a reference."""
    loss: Tensor
    """fp64; the token's term in the loss, with weight and sign. `fsum` over an epoch gives that epoch's loss."""


def compute_token_terms(tokens: StepLogprobs, batch: Batch, section: LossSection) -> TokenTerms:
    """Compute the loss terms of every token from the recorded log-probabilities."""
    mask = batch.completion_mask
    old = _unpack(tokens.logprobs[0], mask)
    ref = None if tokens.ref_logprobs is None else _unpack(tokens.ref_logprobs, mask)
    epochs = [
        grpo_loss(
            _unpack(logprobs, mask),
            old,
            ref,
            batch.advantages,
            mask,
            batch.token_weights,
            surrogate=section.surrogate,
            clip_low=section.clip_low,
            clip_high=section.clip_high,
            dual_clip=section.dual_clip,
            kl=section.kl,
            beta=section.beta,
        )
        for logprobs in tokens.logprobs
    ]
    return TokenTerms(
        ratio=torch.stack([terms.ratio[mask] for terms in epochs]),
        clip_side=torch.stack([terms.clipped_high[mask].char() - terms.clipped_low[mask].char() for terms in epochs]),
        kl=None if ref is None else torch.stack([terms.kl[mask] for terms in epochs if terms.kl is not None]),
        loss=torch.stack([terms.per_token[mask] for terms in epochs]),
    )


def advantage_by_component(step: StepRecord, section: AdvantageSection) -> dict[str, np.ndarray]:
    """Return component → [B,G] fp64, the part of each advantage that is due to that component.

    See `grpo.advantage.advantages_by_component`. The parts add up to the advantage up to rounding: at most K·a·2⁻⁵² for
    K components of magnitude a.
    """
    names = list(step.scores[0][0].parts)
    shape = rewards_of(step).shape
    return advantages_by_component(
        {name: np.array([[score.parts[name] for score in row] for row in step.scores]) for name in names},
        kind=section.kind,
        epsilon=section.epsilon,
        ddof=section.ddof,
        in_baseline=step.batch.baseline_mask.numpy().reshape(shape),
        total=rewards_of(step),
    )


def rewards_of(step: StepRecord) -> np.ndarray:
    """Return the total rewards, [B,G] fp64."""
    return np.array([[score.total for score in row] for row in step.scores])


def step_metrics(
    step: StepRecord, account: TokenTerms, shares: dict[str, np.ndarray], config: Config
) -> dict[str, Any]:
    """Return a step's line in ``metrics.jsonl``, except time and memory. grpo/run/README.md defines every name."""
    rewards = rewards_of(step)
    completions = [completion for group in step.groups for completion in group.completions]
    all_scores = [score for row in step.scores for score in row]
    finished = np.array([completion.finished for completion in completions]).reshape(rewards.shape)
    section, budget = config.advantage, config.rollout.max_new_tokens
    stats: Stats = {
        "reward/mean": sum_and_count(rewards.flatten()),
        "reward/std_group": sum_and_count(rewards.std(axis=1, ddof=1)),
        "groups/zero_variance": sum_and_count(
            zero_variance(rewards, in_baseline=step.batch.baseline_mask.numpy().reshape(rewards.shape))
        ),
        **length_stats(completions, max_new_tokens=budget),
        **clipped_ratio_forecast(completions, max_new_tokens=budget),
        **parse_stats(step.groups, step.scores),
        **reward_by_truncation(completions, rewards.flatten()),
        **truncation_advantage_shift(rewards, finished, kind=section.kind, epsilon=section.epsilon, ddof=section.ddof),
        "reward/timed_out": sum_and_count(score.timed_out for score in all_scores),
        **{
            f"reward/{name}/mean": sum_and_count(score.parts[name] for score in all_scores)
            for name in all_scores[0].parts
        },
        **{f"advantage/{name}/abs_mean": sum_and_count(np.abs(share).flatten()) for name, share in shares.items()},
        **_dropped_stats(step),
        **_token_stats(step, account, config.loss.kl),
    }
    return {
        "step": step.number,
        "loss": fsum_or_nan(account.loss[0]),
        "loss/trained": step.backward_loss,
        "grad_norm": step.grad_norm,
        "skipped": step.skipped_updates,
        "reward/std_batch": float(rewards.std(ddof=1)),
        **to_means(stats),
    }


def fsum_or_nan(values: Tensor) -> float:
    """Return the exactly rounded sum, or NaN if a value is not finite.

    >>> fsum_or_nan(torch.tensor([1e16, 1.0, -1e16], dtype=torch.float64))
    1.0
    """
    return math.fsum(values.tolist()) if bool(torch.isfinite(values).all()) else math.nan


def _token_stats(step: StepRecord, account: TokenTerms, estimator: str) -> Stats:
    """Token statistics of the first inner epoch; ratios and clipping of all inner epochs."""
    tokens = step.logprobs
    count = float(tokens.entropy.numel())
    logprob_diff = (tokens.logprobs[0] - step.batch.sampler_logprobs[step.batch.completion_mask]).double()
    stats: Stats = {
        "clip_ratio/low": (float((account.clip_side == -1).sum()), float(account.clip_side.numel())),
        "clip_ratio/high": (float((account.clip_side == 1).sum()), float(account.clip_side.numel())),
        "ratio": (fsum_or_nan(account.ratio.flatten()), float(account.ratio.numel())),
        "entropy": (fsum_or_nan(tokens.entropy.double()), count),
        "sampler/abs_logprob_diff": (fsum_or_nan(logprob_diff.abs()), count),
        "sampler/max_abs_logprob_diff": (float(logprob_diff.abs().max()), 1.0),
        "sampler/kl_k3": (fsum_or_nan(torch.expm1(logprob_diff) - logprob_diff), count),
    }
    if account.kl is not None:
        stats[f"kl/{estimator}"] = (fsum_or_nan(account.kl[0]), count)
    return stats


def _dropped_stats(step: StepRecord) -> Stats:
    """The cost of replacing groups, and the mean reward of everything sampled, of which the batch is a selection."""
    trained = rewards_of(step).flatten().tolist()
    replaced = [reward for group in step.replaced_groups for reward in group.rewards]
    return {
        "groups/dropped": (float(len(step.replaced_groups)), 1.0),
        "groups/dropped_tokens": (float(sum(sum(group.lengths) for group in step.replaced_groups)), 1.0),
        "reward/mean_sampled": sum_and_count([*trained, *replaced]),
    }


def _unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Return packed values [M] as [N,T] fp64, zero at padding."""
    padded = torch.zeros(mask.shape, dtype=torch.float64)
    padded[mask] = values.double()
    return padded


def group_member_pairs(step: StepRecord) -> Iterator[tuple[int, int]]:
    """Yield (group, member) of each of the N rows, in the order of the batch."""
    for b, group in enumerate(step.groups):
        for g in range(len(group.completions)):
            yield b, g


def token_slices(lengths: Sequence[int]) -> list[slice]:
    """Return the position of each row's tokens among the M packed ones.

    >>> token_slices([2, 3])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
