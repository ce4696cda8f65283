"""Groups → scores: the one place where a reward meets completions. Text and lengths only, no tensors."""

from collections.abc import Sequence

from grpo.config import Config
from grpo.types import Group
from rewards import Reward, Score, overlong


def score_groups(reward: Reward, groups: Sequence[Group], config: Config) -> tuple[tuple[Score, ...], ...]:
    """[B][G] scores, beside the groups.

    Raises:
        RewardError: a code rule failed; names rule and case.
    """
    return tuple(
        tuple(
            reward.score(
                text=group.prompt.case.text,
                gold=group.prompt.case.esi,
                completion=completion.text,
                thinking=group.prompt.thinking,
                finished=completion.finished,
                case_id=group.prompt.case.id,
                length_penalty=length_penalty(len(completion.ids), config),
            )
            for completion in group.completions
        )
        for group in groups
    )


def length_penalty(length: int, config: Config) -> float:
    """What ``[reward.overlong]`` adds to the reward of a completion of that many tokens; 0 without the section."""
    section = config.reward.overlong
    if section is None:
        return 0.0
    return overlong(length, budget=config.rollout.max_new_tokens, cache=section.cache_tokens, penalty=section.penalty)
