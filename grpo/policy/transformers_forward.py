"""The forward pass of any causal language model, through its transformers modules."""

from collections.abc import Sequence

from torch import Tensor

from grpo.logprobs import join, predicting_states
from grpo.policy.policy import Policy


def transformers_hidden_states(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> Tensor:
    """Return the hidden states [M,H] that predict the M completion tokens, row by row; differentiable in the adapter.

    Prompt and completion form one right-padded sequence. A causal model never attends to padding on the right, so no
    mask is needed.
    """
    joined = join(prompt_ids, completion_ids, pad_id=0)
    hidden = policy.decoder(input_ids=joined.input_ids.to(policy.device), use_cache=False).last_hidden_state
    return predicting_states(hidden, joined)
