"""How much memory a backward pass needs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.forward import forward_of
from grpo.policy.policy import Policy


def kept_bytes(policy: Policy, prompt: Sequence[int], completion: Sequence[int]) -> int:
    """Return the bytes that a training pass of one row keeps for its backward pass, without the weights."""
    weights = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Any:
        return tensor

    was_training = policy.model.training
    policy.model.train()  # otherwise the modules do not checkpoint
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            states = forward_of(policy)(policy, [prompt], [completion])  # the graph is alive: no address is used twice
        del states
    finally:
        policy.model.train(was_training)
    return sum(kept.values())
