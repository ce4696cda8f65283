"""The choice of the forward pass that a policy is trained with."""

from collections.abc import Callable, Sequence

from torch import Tensor

from grpo.policy.policy import Policy
from grpo.policy.transformers_forward import transformers_hidden_states
from grpo.qwen3_5.train_forward import predicting_states_shared, shared

Forward = Callable[[Policy, Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]
"""(policy, N prompts, N completions) → the hidden states [M,H] that predict the completion tokens."""
FORWARDS: dict[str, Forward] = {"shared": predicting_states_shared, "modules": transformers_hidden_states}
"""Qwen3.5, computing each prompt once; any causal language model, computing each row completely."""


def forward_of(policy: Policy) -> Forward:
    """Return the pass for Qwen3.5 if it supports the policy, else the one with transformers' modules."""
    return FORWARDS["shared" if shared(policy) else "modules"]
