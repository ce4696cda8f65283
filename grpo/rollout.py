"""Prompts → `Group`s: the rollout engine.

Every prompt is prefilled once and its state expanded to the group; all rows are decoded together; finished rows leave.
What a row draws is a function of its key alone (`grpo.cases.row_key` of seed, step, case and member): token t takes the
t-th uniform of a Philox counter under that key and looks it up in the cumulated distribution. Neither neighbours nor
the order of rows nor a resume changes it, up to the rounding of the logits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.logprobs import log_distribution
from grpo.policy import Policy
from grpo.types import Completion, Group, Prompt

PREFILL_GRID = 64
"""Prompts are padded on the left to a multiple of this, the chunk of the gated delta rule: a row's state is then the
same bits whatever it is batched with."""
LOOK_EVERY = 8
"""Decode steps between two looks at which rows have ended: each look waits for the device."""


class PromptError(ValueError):
    """A prompt that cannot be answered within the model's context. Names the case."""


def rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    keys: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> tuple[Group, ...]:
    """Sampled completions of each prompt, as many as it has keys.

    Args:
        prompts: B prompts; each is prefilled once.
        keys: B rows of 128-bit noise keys, one a completion.
        max_new_tokens: the token budget T of a completion.
        temperature: of the sampled distribution softmax(logits / temperature); 0 takes the most likely token. There is
            no top-p and no top-k: what is sampled is what is scored.

    Raises:
        PromptError: a prompt and its budget do not fit the model's context.
    """
    for prompt in prompts:
        check_length(policy, prompt, max_new_tokens)
    was_training = policy.model.training
    policy.model.eval()
    try:
        owners = [b for b, row in enumerate(keys) for _ in row]
        noise = uniforms([key for row in keys for key in row], max_new_tokens)
        ids, logprobs = _decode(policy, prompts, owners, noise, temperature)
    finally:
        policy.model.train(was_training)
    rows = iter(_completion(policy, i, lp) for i, lp in zip(ids, logprobs, strict=True))
    return tuple(Group(prompt, tuple(next(rows) for _ in row)) for prompt, row in zip(prompts, keys, strict=True))


def check_length(policy: Policy, prompt: Prompt, max_new_tokens: int) -> None:
    """Raises `PromptError` if the prompt and its token budget do not fit the model's context."""
    if len(prompt.ids) + max_new_tokens > policy.context:
        raise PromptError(
            f"case {prompt.case.id!r}: {len(prompt.ids)} prompt tokens and a budget of {max_new_tokens} do not fit the "
            f"model's context of {policy.context}"
        )


def uniforms(keys: Sequence[int], count: int) -> np.ndarray:
    """[N, count] float64 in [0, 1): entry t of row i is the t-th number of the Philox counter under ``keys[i]``."""
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys])


def draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverse transform: the first id whose cumulated probability exceeds the noise.

    Args:
        logits: [n,V].
        noise: [n] float64, uniform in [0, 1).
        temperature: 0 takes the arg max, and the log-probabilities are then those at temperature 1.

    Returns:
        ids [n] and their log-probabilities [n], fp32 nats. An id of probability 0 is never drawn.
    """
    logp = log_distribution(logits, temperature or 1.0)
    if temperature == 0:
        ids = logp.argmax(-1, keepdim=True)
    else:
        cumulated = logp.double().exp().cumsum(-1)
        ids = torch.searchsorted(cumulated, (noise * cumulated[:, -1])[:, None], right=True)
    return ids[:, 0], logp.gather(-1, ids)[:, 0]


@torch.inference_mode()
def _decode(
    policy: Policy, prompts: Sequence[Prompt], owners: Sequence[int], noise: np.ndarray, temperature: float
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and log-probabilities of each of N rows, cut after the first end token."""
    device, budget = policy.device, noise.shape[1]
    rows = torch.arange(len(owners), device=device)
    ends = torch.tensor(policy.end_ids, device=device)
    uniform = torch.from_numpy(noise).to(device)
    ids = torch.zeros(len(owners), budget, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(owners), budget, device=device)
    lengths = torch.full((len(owners),), budget, device=device)

    logits, cache, mask = _prefill(policy, prompts)
    expand = torch.tensor(owners, device=device)
    cache.reorder_cache(expand)
    logits, mask = logits[expand], mask[expand]
    for t in range(budget):
        drawn, logp = draw(logits, uniform[rows, t], temperature)
        ids[rows, t], logprobs[rows, t] = drawn, logp
        ended = torch.isin(drawn, ends)
        lengths[rows] = torch.where(ended & (lengths[rows] > t), t + 1, lengths[rows])
        if t + 1 == budget:
            break
        if (t + 1) % LOOK_EVERY == 0:
            keep = torch.nonzero(lengths[rows] > t + 1)[:, 0]
            if len(keep) == 0:
                break
            if len(keep) <= 0.85 * len(rows):
                cache.reorder_cache(keep)
                rows, mask, drawn = rows[keep], mask[keep], drawn[keep]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = _forward(policy, drawn[:, None], mask, cache)
    ends_at = lengths.tolist()
    return (
        [row[:n] for row, n in zip(ids.tolist(), ends_at, strict=True)],
        [row[:n] for row, n in zip(logprobs.tolist(), ends_at, strict=True)],
    )


def _prefill(policy: Policy, prompts: Sequence[Prompt]) -> tuple[Tensor, Any, Tensor]:
    """Logits [B,V] that predict the first completion token, the cache, and the mask [B,P] of real positions."""
    from transformers import DynamicCache

    width = -(-max(len(p.ids) for p in prompts) // PREFILL_GRID) * PREFILL_GRID
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[i, width - len(prompt.ids) :] = 1
    cache = DynamicCache(config=policy.model.get_base_model().config.get_text_config())
    mask = mask.to(policy.device)
    return _forward(policy, ids.to(policy.device), mask, cache), cache, mask


def _forward(policy: Policy, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Logits [n,V] after the last of ``ids`` [n,k]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    hidden = policy.body(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return policy.head(hidden[:, -1])


def _completion(policy: Policy, ids: list[int], logprobs: list[float]) -> Completion:
    finished = ids[-1] in policy.end_ids
    spoken = ids[:-1] if finished else ids
    text = policy.tokenizer.decode(spoken, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Completion(tuple(ids), tuple(logprobs), finished, text)
