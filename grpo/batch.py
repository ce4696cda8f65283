"""Groups and their rewards → one `Batch`: advantages and token weights are fixed here for the whole step."""

from collections.abc import Sequence

import numpy as np
import torch

from grpo.advantage import advantages as normalized_advantages
from grpo.config import Advantage, Config
from grpo.loss import token_weights
from grpo.types import Batch, Group
from rewards import Score


def reward_matrix(scores: Sequence[Sequence[Score]]) -> np.ndarray:
    """Return the total rewards [B,G] float64."""
    return np.array([[score.total for score in row] for row in scores])


def group_advantages(groups: Sequence[Group], rewards: np.ndarray, section: Advantage) -> np.ndarray:
    """Return `grpo.advantage.advantages` as the config asks for it, [B,G] float64."""
    return normalised(rewards, baseline(finished_matrix(groups), section), section)


def finished_matrix(groups: Sequence[Group]) -> np.ndarray:
    """Return which completions [B,G] bool ended by themselves."""
    return np.array([[completion.finished for completion in group.completions] for group in groups])


def make_batch(groups: Sequence[Group], advantages: np.ndarray, config: Config) -> Batch:
    """The rows of all groups, group by group, with everything the loss needs but the policy's log-probabilities.

    Args:
        groups: B groups of G completions.
        advantages: [B,G] float64, in the same order, see `group_advantages`.
        config: its ``[advantage]``, ``[loss]`` and ``[rollout]`` sections are used.
    """
    rows = [(group.prompt.ids, completion) for group in groups for completion in group.completions]
    lengths = [len(completion.ids) for _, completion in rows]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    finished = finished_matrix(groups)
    members = baseline(finished, config.advantage)
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
        in_baseline=torch.from_numpy(members.flatten()),
        advantages=torch.from_numpy(advantages).flatten(),
        token_weights=torch.where(mask, weights[:, None], 0.0),
    )


def baseline(finished: np.ndarray, section: Advantage) -> np.ndarray:
    """Which of the completions [B,G] bool their group's mean and std are made of.

    >>> baseline(np.array([[True, False]]), Advantage(kind="none", epsilon=0.0, ddof=1, truncated_in_baseline=False))
    array([[ True, False]])
    """
    return np.ones_like(finished) if section.truncated_in_baseline else finished


def normalised(rewards: np.ndarray, members: np.ndarray, section: Advantage) -> np.ndarray:
    """`grpo.advantage.advantages` as the config asks for it, [B,G] float64."""
    return normalized_advantages(
        rewards, kind=section.kind, epsilon=section.epsilon, ddof=section.ddof, in_baseline=members
    )
