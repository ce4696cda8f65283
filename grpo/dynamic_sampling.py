"""Dynamic sampling (arXiv 2503.14476): replace groups of equal rewards, which give no gradient. Off in v49."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from grpo.advantage import zero_variance
from grpo.batch import baseline_mask
from grpo.config import Config
from grpo.prompts import prompts_for_step
from grpo.rollout import sample_groups, sampling_keys
from grpo.run.setup import Setup
from grpo.scoring import score_groups
from grpo.types import Group, ReplacedGroup
from rewards import Score

Scores = tuple[tuple[Score, ...], ...]
"""[B][G], in the order of the groups."""


def replace_uniform_groups(
    setup: Setup, groups: Sequence[Group], scores: Scores, step: int
) -> tuple[tuple[Group, ...], Scores, tuple[ReplacedGroup, ...]]:
    """Return the groups of the step, their scores, and the groups that were replaced or not used.

    Each of up to ``rollout.resample_rounds`` rounds samples as many new prompts as there are groups with uniform
    rewards; new groups with unequal rewards replace them. Samples are a function of (seed, step, round, case, member).
    """
    config, policy = setup.config, setup.policy
    current, current_scores, dropped = list(groups), list(scores), []
    members_so_far = Counter(group.prompt.case.id for group in groups for _ in group.completions)
    for resample_round in range(1, 1 + config.rollout.resample_rounds):
        uniform = [b for b, group in enumerate(current) if has_uniform_rewards(group, current_scores[b], config)]
        if not uniform:
            break
        prompts = prompts_for_step(setup.cases, setup.epoch_indices, policy.tokenizer, config, step, resample_round)
        prompts = prompts[: len(uniform)]
        new_groups = sample_groups(policy, prompts, sampling_keys(prompts, config, step, members_so_far), config)
        new_scores = score_groups(setup.reward, new_groups, config, policy.world)
        for group, row in zip(new_groups, new_scores, strict=True):
            if has_uniform_rewards(group, row, config):
                dropped.append(dropped_group(group, row))
            else:
                b = uniform.pop(0)
                dropped.append(dropped_group(current[b], current_scores[b]))
                current[b], current_scores[b] = group, row
    return tuple(current), tuple(current_scores), tuple(dropped)


def sample_step(setup: Setup, step: int) -> tuple[tuple[Group, ...], Scores, tuple[ReplacedGroup, ...]]:
    """Return what one step trains on: groups, scores, and the groups that were replaced or not used."""
    config, policy = setup.config, setup.policy
    prompts = prompts_for_step(setup.cases, setup.epoch_indices, policy.tokenizer, config, step)
    groups = sample_groups(policy, prompts, sampling_keys(prompts, config, step), config)
    scores = score_groups(setup.reward, groups, config, policy.world)
    return replace_uniform_groups(setup, groups, scores, step)


def has_uniform_rewards(group: Group, scores: Sequence[Score], config: Config) -> bool:
    """Return whether every completion of the group would have an advantage of 0."""
    finished = np.array([[completion.finished for completion in group.completions]])
    members = baseline_mask(finished, config.advantage)
    return bool(zero_variance([[score.total for score in scores]], in_baseline=members)[0])


def dropped_group(group: Group, scores: Sequence[Score]) -> ReplacedGroup:
    """Return the record of a group that is not trained on."""
    return ReplacedGroup(
        group.prompt.case.id,
        tuple(len(completion.ids) for completion in group.completions),
        tuple(completion.finished for completion in group.completions),
        tuple(score.total for score in scores),
    )
