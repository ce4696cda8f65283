"""Sample from any causal language model with its own forward pass and cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.engine.sampling import Decoder
from grpo.logprobs import head_logits
from grpo.policy.policy import Policy
from grpo.types import Prompt

PREFILL_GRID = 64
"""Prompts are padded on the left to a multiple of this, the chunk of the gated delta rule, so that a row's state does
not depend on the other rows of its batch."""


class CachedDecoder:
    """A decoder with transformers' cache and the mask [n,S] of positions that are not padding."""

    def __init__(self, policy: Policy, cache: Any, mask: Tensor) -> None:
        self._policy, self._cache, self._mask = policy, cache, mask

    def step(self, ids: Tensor) -> Tensor:
        """Append one token per row; return the next logits [n,V]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], 1)
        return _logits(self._policy, _hidden(self._policy, ids[:, None], self._mask, self._cache))

    def keep(self, slots: Tensor) -> None:
        """Continue with the rows in ``slots``."""
        self._cache.reorder_cache(slots)
        self._mask = self._mask[slots]


def start_cached(
    policy: Policy, prompts: Sequence[Prompt], owners: Sequence[int], budget: int
) -> tuple[Tensor, Decoder]:
    """Return logits [n,V] of the first token and the decoder for the next. Each prompt is prefilled once."""
    hidden, cache, mask = prefill(policy, prompts)
    decoder = CachedDecoder(policy, cache, mask)
    rows = torch.tensor(owners, device=policy.device)
    decoder.keep(rows)
    return _logits(policy, hidden[rows]), decoder


def prefill(policy: Policy, prompts: Sequence[Prompt]) -> tuple[Tensor, Any, Tensor]:
    """Return last hidden states [B,H], the cache and the mask [B,P] of real positions. Prompts are padded on the left
    to the next multiple of `PREFILL_GRID`."""
    from transformers import DynamicCache

    width = max(padded_width(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[i, width - len(prompt.ids) :] = 1
    cache = DynamicCache(config=policy.model.get_base_model().config.get_text_config())
    mask = mask.to(policy.device)
    return _hidden(policy, ids.to(policy.device), mask, cache), cache, mask


def padded_width(prompt: Prompt) -> int:
    """Return the length of the prompt rounded up to a multiple of `PREFILL_GRID`."""
    return -(-len(prompt.ids) // PREFILL_GRID) * PREFILL_GRID


def _logits(policy: Policy, hidden: Tensor) -> Tensor:
    """Compute logits as the loss does."""
    logits, bias = head_logits(hidden, policy.lm_head.weight), getattr(policy.lm_head, "bias", None)
    return logits if bias is None else logits + bias


def _hidden(policy: Policy, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Return hidden states [n,H] after the last of ``ids`` [n,k]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = policy.decoder(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state[:, -1]
