"""Build the `Batch` of a step: advantages and token weights are fixed here, for the whole step."""

from collections.abc import Sequence

import numpy as np
import torch

from grpo.advantage import advantages as normalized_advantages
from grpo.config import AdvantageSection, Config
from grpo.loss import token_weights
from grpo.types import Batch, Group
from rewards import Score


def reward_matrix(scores: Sequence[Sequence[Score]]) -> np.ndarray:
    """Return total rewards, [B,G] float64."""
    return np.array([[score.total for score in row] for row in scores])


def group_advantages(groups: Sequence[Group], rewards: np.ndarray, section: AdvantageSection) -> np.ndarray:
    """Return the advantages [B,G] float64 of the configured kind, see `grpo.advantage.advantages`."""
    return configured_advantages(rewards, baseline_mask(finished_matrix(groups), section), section)


def finished_matrix(groups: Sequence[Group]) -> np.ndarray:
    """Return [B,G] bool, True for completions that ended with an end token."""
    return np.array([[completion.finished for completion in group.completions] for group in groups])


def make_batch(groups: Sequence[Group], advantages: np.ndarray, config: Config) -> Batch:
    """Return the rows of all groups in order, with everything the loss needs except the policy's log-probabilities.

    Args:
        groups: B groups of G completions.
        advantages: [B,G] float64, see `group_advantages`.
        config: the sections ``[advantage]``, ``[loss]`` and ``[rollout]`` are used.
    """
    rows = [(group.prompt.ids, completion) for group in groups for completion in group.completions]
    lengths = [len(completion.ids) for _, completion in rows]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    finished = finished_matrix(groups)
    members = baseline_mask(finished, config.advantage)
    weights = token_weights(
        lengths,
        kind=config.loss.token_weights,
        max_new_tokens=config.rollout.max_new_tokens,
        include=finished.flatten().tolist() if config.loss.mask_truncated else None,
    )
    sampler = torch.zeros(mask.shape)
    sampler[mask] = torch.tensor(
        [lp for _, completion in rows for lp in completion.sampler_logprobs], dtype=torch.float32
    )
    return Batch(
        prompt_ids=tuple(ids for ids, _ in rows),
        completion_ids=tuple(completion.ids for _, completion in rows),
        completion_mask=mask,
        sampler_logprobs=sampler,
        baseline_mask=torch.from_numpy(members.flatten()),
        advantages=torch.from_numpy(advantages).flatten(),
        token_weights=torch.where(mask, weights[:, None], 0.0),
    )


def baseline_mask(finished: np.ndarray, section: AdvantageSection) -> np.ndarray:
    """Return [B,G] bool, True for completions that count in the mean and std of their group.

    >>> section = AdvantageSection(kind="mean_only", epsilon=0.0, ddof=1, truncated_in_baseline=False)
    >>> baseline_mask(np.array([[True, False]]), section)
    array([[ True, False]])
    """
    return np.ones_like(finished) if section.truncated_in_baseline else finished


def configured_advantages(rewards: np.ndarray, members: np.ndarray, section: AdvantageSection) -> np.ndarray:
    """Return the advantages [B,G] float64 of the configured kind, given the baseline mask."""
    return normalized_advantages(
        rewards, kind=section.kind, epsilon=section.epsilon, ddof=section.ddof, in_baseline=members
    )
