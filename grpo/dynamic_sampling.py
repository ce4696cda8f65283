"""A step's cases → prompts → groups of completions and their scores, drop-and-refill included."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import TypeAdapter

from grpo.advantage import zero_variance
from grpo.batch import baseline
from grpo.cases import cases_for_step, row_key
from grpo.config import Config
from grpo.prompts import render_prompt
from grpo.rollout import rollout
from grpo.run.setup import Setup
from grpo.runtime.out_of_memory import ROLLOUT, memory_errors
from grpo.scoring import score_groups
from grpo.types import Completion, Dropped, Group, Prompt
from rewards import Score

Sampled = tuple[tuple[Completion, ...], tuple[Score, ...]]
"""A group's completions and their scores."""
SAMPLED = TypeAdapter(list[Sampled])


def sample_step(
    setup: Setup, step: int
) -> tuple[tuple[Group, ...], tuple[tuple[Score, ...], ...], tuple[Dropped, ...]]:
    """The groups of a step (0-based), their scores, and what drop-and-refill left out.

    Round 0 samples the step's cases. Each of up to ``rollout.refill_rounds`` more samples further cases, as many as
    there are groups whose rewards are all equal, and those of them that vary take the equal ones' places. What is
    drawn is a function of (seed, step, round, case, member) alone.
    """
    config = setup.config
    met: Counter[str] = Counter()
    groups: list[Group] = []
    scores: list[tuple[Score, ...]] = []
    dropped: list[Dropped] = []
    for round_ in range(1 + config.rollout.refill_rounds):
        silent = [b for b, group in enumerate(groups) if is_silent(group, scores[b], config)]
        wanted = len(silent) if round_ else config.rollout.prompts_per_step
        if not wanted:
            break
        prompts = prompts_for_step(setup, step, round_)[:wanted]
        fresh, fresh_scores = sample_prompts(setup, prompts, noise_keys(prompts, config, step, met))
        if not round_:
            groups, scores = list(fresh), list(fresh_scores)
            continue
        for group, row in zip(fresh, fresh_scores, strict=True):
            if is_silent(group, row, config):
                dropped.append(left_out(group, row))
            else:
                b = silent.pop(0)
                dropped.append(left_out(groups[b], scores[b]))
                groups[b], scores[b] = group, row
    return tuple(groups), tuple(scores), tuple(dropped)


def sample_prompts(
    setup: Setup, prompts: Sequence[Prompt], keys: Sequence[Sequence[int]]
) -> tuple[list[Group], list[tuple[Score, ...]]]:
    """A group and its scores for every prompt, the same on every rank: each samples and scores its share."""
    config, ranks = setup.config, setup.policy.ranks
    share = ranks.mine(len(prompts))
    with memory_errors("rollout", ROLLOUT, setup.policy.independent_ranks):
        groups = rollout(
            setup.policy,
            [prompts[i] for i in share],
            [keys[i] for i in share],
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            ignore_end=config.rollout.ignore_end,
        )
    scores = score_groups(setup.reward, groups, config)
    own = [(group.completions, row) for group, row in zip(groups, scores, strict=True)]
    everyone = ranks.gather(own, SAMPLED)
    found = [Group(prompt, completions) for prompt, (completions, _) in zip(prompts, everyone, strict=True)]
    return found, [row for _, row in everyone]


def is_silent(group: Group, scores: Sequence[Score], config: Config) -> bool:
    """No completion of the group will have an advantage."""
    finished = np.array([[completion.finished for completion in group.completions]])
    members = baseline(finished, config.advantage)
    return bool(zero_variance([[score.total for score in scores]], in_baseline=members)[0])


def left_out(group: Group, scores: Sequence[Score]) -> Dropped:
    """What is kept of a group that is not trained on."""
    return Dropped(
        group.prompt.case.id,
        tuple(len(completion.ids) for completion in group.completions),
        tuple(completion.finished for completion in group.completions),
        tuple(score.total for score in scores),
    )


def prompts_for_step(setup: Setup, step: int, round_: int = 0) -> list[Prompt]:
    """The prompts of a step; ``round_`` > 0 gives those that refill it, from a shuffle of their own. With
    ``thinking = "mixed"`` every other one thinks, the phase changing with the step."""
    config = setup.config
    seed = row_key("refill", config.train.seed, round_) if round_ else config.train.seed
    cases = cases_for_step(setup.cases, setup.epoch, seed=seed, step=step, count=config.rollout.prompts_per_step)
    thinks = {"on": lambda i: True, "off": lambda i: False, "mixed": lambda i: (i + step) % 2 == 0}
    return [
        render_prompt(
            setup.policy.tokenizer,
            case,
            system_prompt=config.cases.system_prompt,
            thinking=thinks[config.rollout.thinking](i),
        )
        for i, case in enumerate(cases)
    ]


def noise_keys(prompts: Sequence[Prompt], config: Config, step: int, met: Counter[str]) -> list[list[int]]:
    """Keys of (seed, step, case, member). A case that a step meets again counts its members on: ``met`` remembers how
    many it has had."""
    keys = []
    for prompt in prompts:
        first = met[prompt.case.id]
        met[prompt.case.id] += config.rollout.group_size
        members = range(first, met[prompt.case.id])
        keys.append([row_key("rollout", config.train.seed, step, prompt.case.id, member) for member in members])
    return keys
