"""The slow reference engine: one row at a time, with the whole sequence recomputed for every token.

It shares no cache, batch, padding or loop with the other engines, so that it can be their oracle in tests.
"""

from collections.abc import Sequence

import numpy as np
import torch

from grpo.engine.sampling import Drawn, draw
from grpo.policy.policy import Policy
from grpo.types import Prompt


@torch.inference_mode()
def sample_plainly(
    policy: Policy, prompts: Sequence[Prompt], owners: Sequence[int], noise: np.ndarray, temperature: float
) -> Drawn:
    """Sample N completions; see `grpo.engine.sampling.sample` for the arguments."""
    rows = [_row(policy, prompts[b], u, temperature) for b, u in zip(owners, noise, strict=True)]
    return [ids for ids, _ in rows], [logprobs for _, logprobs in rows]


def _row(policy: Policy, prompt: Prompt, noise: np.ndarray, temperature: float) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    logprobs: list[float] = []
    for u in torch.from_numpy(noise).to(policy.device):
        sequence = torch.tensor([[*prompt.ids, *ids]], device=policy.device)
        logits = policy.model(input_ids=sequence, use_cache=False, logits_to_keep=1).logits[:, -1]
        drawn, logp = draw(logits, u[None], temperature)
        ids.append(int(drawn))
        logprobs.append(float(logp))
        if ids[-1] in policy.end_token_ids:
            break
    return ids, logprobs
