"""Groups → scores: the only place where a reward sees completions, as text and lengths without tensors."""

from collections.abc import Sequence

from grpo.config import Config
from grpo.runtime.distributed import SINGLE_PROCESS, World
from grpo.types import Group
from rewards import Reward, Score, overlong


def score_groups(
    reward: Reward, groups: Sequence[Group], config: Config, ranks: World = SINGLE_PROCESS
) -> tuple[tuple[Score, ...], ...]:
    """Return the scores [B][G] of the groups, the same on every rank: each scores its slice.

    Raises:
        RewardError: a code rule failed; gives the rule and the case.
    """
    rows = [
        tuple(
            reward.score(
                text=group.prompt.case.text,
                gold=group.prompt.case.gold_level,
                completion=completion.text,
                thinking=group.prompt.thinking,
                finished=completion.finished,
                case_id=group.prompt.case.id,
                length_penalty=overlong_term(len(completion.ids), config),
            )
            for completion in group.completions
        )
        for group in (groups[i] for i in ranks.slice_of(len(groups)))
    ]
    return tuple(ranks.all_gather(rows))


def overlong_term(length: int, config: Config) -> float:
    """Return what ``[reward.overlong]`` adds to the reward of a completion of ``length`` tokens; 0 without it."""
    section = config.reward.overlong
    if section is None:
        return 0.0
    return overlong(length, budget=config.rollout.max_new_tokens, cache=section.cache_tokens, penalty=section.penalty)
