"""How much of a batch a device can hold at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.config import OptimSection
from grpo.forward import forward_of
from grpo.policy.policy import Policy
from grpo.qwen3_5.train_forward import shared
from grpo.runtime.free_memory import free_bytes
from grpo.types import Batch

SHARE = 0.6
"""Of the free memory, for what the backward pass keeps; the rest is for what comes and goes."""
PROBE = 64
"""Tokens of prompt and of completion that are tried to see what a token keeps."""
CHUNKS = 3
"""[1024,V] tensors alive while a chunk of log-probabilities is computed."""


@dataclass(frozen=True, slots=True)
class Room:
    """The largest micro-batch: so many rows and, unless None, so many tokens. One row always fits."""

    rows: int
    tokens: int | None
    share_prompts: bool
    """A prompt counts once, whatever the number of its rows; else every row counts as the widest."""

    def __str__(self) -> str:
        return f"{self.rows} rows" + ("" if self.tokens is None else f" or {self.tokens:,} tokens")

    def halved(self) -> "Room":
        """Half of each, at least 1."""
        return replace(self, rows=max(1, self.rows // 2), tokens=self.tokens and max(1, self.tokens // 2))

    def holds(self, batch: Batch, rows: Sequence[int]) -> bool:
        """Whether these rows are one micro-batch."""
        return len(rows) <= self.rows and (self.tokens is None or self.size(batch, rows) <= self.tokens)

    def size(self, batch: Batch, rows: Sequence[int]) -> int:
        """Tokens that are computed for these rows."""
        if not self.share_prompts:
            return len(rows) * max(len(batch.prompt_ids[i]) + len(batch.completion_ids[i]) for i in rows)
        prompts = {batch.prompt_ids[i] for i in rows}
        return sum(len(ids) for ids in prompts) + sum(len(batch.completion_ids[i]) for i in rows)


def room(policy: Policy, section: OptimSection, batch: Batch) -> Room:
    """What ``optim.micro_batch_size`` and ``optim.micro_batch_tokens`` allow; "auto" is chosen from free memory, from
    what the backward pass keeps of the beginning of the longest row: so short a pass fits wherever training does."""
    tokens = section.micro_batch_tokens
    if tokens == "auto":
        lengths = [len(p) + len(c) for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
        row = max(range(len(lengths)), key=lengths.__getitem__)
        prompt, completion = batch.prompt_ids[row][-PROBE:], batch.completion_ids[row][:PROBE]
        kept = kept_bytes(policy, prompt, completion) / (len(prompt) + len(completion))
        spare = free_bytes(policy.device) - CHUNKS * 1024 * policy.lm_head.weight.shape[0] * 4
        tokens = max(lengths[row], int(SHARE * spare / kept))
    return Room(section.micro_batch_size, tokens, shared(policy))


def kept_bytes(policy: Policy, prompt: Sequence[int], completion: Sequence[int]) -> int:
    """What a training pass of one row keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Any:
        return tensor

    forward = forward_of(policy)
    was_training = policy.model.training
    policy.model.train()  # else the modules' checkpointing is off
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            states = forward(policy, [prompt], [completion])  # the graph is alive, so no address is used twice
        del states
    finally:
        policy.model.train(was_training)
    return max(1, sum(kept.values()))
