"""Prompts → `Group`s: what the rest of the project knows of the engines.

Every prompt is prefilled once and its state expanded to the group; all rows are decoded together; finished rows leave.
What a row draws is a function of its key alone (`grpo.cases.stable_seed` of seed, step, case and member).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from grpo.cases import stable_seed
from grpo.config import Config
from grpo.engine.reference_engine import sample_plainly
from grpo.engine.sampling import Drawn, sample, uniforms
from grpo.engine.transformers_engine import start_cached
from grpo.policy.policy import Policy
from grpo.qwen3_5.decode import start_own
from grpo.qwen3_5.weights import readable
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import ROLLOUT, memory_errors
from grpo.types import Completion, Group, Prompt

Engine = Callable[[Policy, Sequence[Prompt], Sequence[int], np.ndarray, float], Drawn]
"""(policy, B prompts, N owners, noise [N,T], temperature) → ids and log-probabilities of N rows; row i answers prompt
``owners[i]``."""
ENGINES: dict[str, Engine] = {
    "own": partial(sample, start_own),
    "generic": partial(sample, start_cached),
    "reference": sample_plainly,
}
"""Qwen3.5 at full speed; any causal language model; the slow oracle of both."""


def sample_groups(
    policy: Policy, prompts: Sequence[Prompt], keys: Sequence[Sequence[int]], config: Config
) -> tuple[Group, ...]:
    """Return the sampled completions of each prompt, the same on every rank: each samples its slice of the prompts."""
    section, part = config.rollout, policy.world.slice_of(len(prompts))
    with memory_errors("rollout", ROLLOUT, policy.world):
        groups = rollout(
            policy,
            [prompts[i] for i in part],
            [keys[i] for i in part],
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            ignore_eos=section.ignore_eos,
        )
    completions = policy.world.all_gather([group.completions for group in groups])
    return tuple(Group(prompt, members) for prompt, members in zip(prompts, completions, strict=True))


def sampling_keys(
    prompts: Sequence[Prompt], config: Config, step: int, members_so_far: Counter[str] | None = None
) -> list[list[int]]:
    """Return a key of (seed, step, case, member) for each completion of each prompt.

    Args:
        members_so_far: completions that the step has of each case already; a case met again counts its members on. It
            is updated.
    """
    counts = Counter() if members_so_far is None else members_so_far
    keys = []
    for prompt in prompts:
        first = counts[prompt.case.id]
        counts[prompt.case.id] += config.rollout.group_size
        members = range(first, counts[prompt.case.id])
        keys.append([stable_seed("rollout", config.train.seed, step, prompt.case.id, member) for member in members])
    return keys


def rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    keys: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    engine: str | None = None,
    ignore_eos: bool = False,
) -> tuple[Group, ...]:
    """Sampled completions of each prompt, as many as it has keys.

    Args:
        prompts: B prompts; each is prefilled once. A rank may have none.
        keys: B rows of 128-bit noise keys, one a completion.
        max_new_tokens: the token budget T of a completion.
        temperature: of the sampled distribution softmax(logits / temperature); 0 takes the most likely token. There is
            no top-p and no top-k: what is sampled is what is scored.
        engine: a name in `ENGINES`; None chooses the fastest that knows the model.
        ignore_eos: no token ends a completion: all are T long and none is finished.

    Raises:
        UserError: a prompt and its budget do not fit the model's context.
    """
    for prompt in prompts:
        check_length(policy, prompt, max_new_tokens)
    if ignore_eos:
        policy = replace(policy, end_token_ids=())
    was_training = policy.model.training
    policy.model.eval()
    try:
        owners = [b for b, row in enumerate(keys) for _ in row]
        noise = uniforms([key for row in keys for key in row], max_new_tokens)
        ids: list[list[int]] = []
        logprobs: list[list[float]] = []
        if owners:
            ids, logprobs = ENGINES[engine or choose_engine(policy)](policy, prompts, owners, noise, temperature)
    finally:
        policy.model.train(was_training)
    rows = iter(_completion(policy, i, lp) for i, lp in zip(ids, logprobs, strict=True))
    return tuple(Group(prompt, tuple(next(rows) for _ in row)) for prompt, row in zip(prompts, keys, strict=True))


def choose_engine(policy: Policy) -> str:
    """The name of the fastest engine that knows the model."""
    return "own" if readable(policy) else "generic"


def check_length(policy: Policy, prompt: Prompt, max_new_tokens: int) -> None:
    """Raises `UserError` if the prompt and its token budget do not fit the model's context."""
    if len(prompt.ids) + max_new_tokens > policy.context_length:
        raise UserError(
            f"case {prompt.case.id!r}: {len(prompt.ids)} prompt tokens and a budget of {max_new_tokens} do not fit the "
            f"model's context of {policy.context_length}"
        )


def _completion(policy: Policy, ids: list[int], logprobs: list[float]) -> Completion:
    finished = ids[-1] in policy.end_token_ids
    spoken = ids[:-1] if finished else ids
    text = policy.tokenizer.decode(spoken, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Completion(tuple(ids), tuple(logprobs), finished, text)
