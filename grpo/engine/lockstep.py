"""A policy whose layers lie spread over the ranks: a layer is put together for all of them at once, so every call of
the model is made by all ranks, whether they have rows or not.

The first call is the prefill. Then, before each stretch of `LOOK_EVERY` calls, the ranks agree whether anyone has rows
left, and if so all make that many; a rank without rows makes them on one token. So a step takes as many calls as the
rank with the longest completion needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.engine.sampling import LOOK_EVERY, Decoder, Drawn, sample_without_grad
from grpo.engine.transformers_engine import start_cached
from grpo.policy.policy import Policy
from grpo.types import Prompt


class Pace:
    """The calls of one rank after the prefill, each met by one on every other."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._left = 0
        """Of this stretch."""

    def call(self) -> None:
        """This rank is about to make one."""
        self._left = (self._left or self._agree(True)) - 1

    def rest(self) -> None:
        """This rank has no rows left: it goes along until nobody has."""
        while True:
            for _ in range(self._left):
                idle(self._policy)
            self._left = self._agree(False)
            if not self._left:
                return

    def _agree(self, going: bool) -> int:
        return LOOK_EVERY if any(self._policy.world.all_gather_object(going)) else 0


class PacedDecoder:
    """A decoder that keeps `Pace`."""

    def __init__(self, decoder: Decoder, pace: Pace) -> None:
        self._decoder, self._pace = decoder, pace

    def step(self, ids: Tensor) -> Tensor:
        self._pace.call()
        return self._decoder.step(ids)

    def keep(self, slots: Tensor) -> None:
        self._decoder.keep(slots)


@torch.no_grad()
def sample_in_step(
    policy: Policy, prompts: Sequence[Prompt], owners: Sequence[int], noise: np.ndarray, temperature: float
) -> Drawn:
    """N completions, N = 0 included; the arguments are those of `grpo.engine.sampling.sample`, which this equals."""
    pace = Pace(policy)

    def start(*given: Any) -> tuple[Tensor, Decoder]:
        logits, decoder = start_cached(*given)
        return logits, PacedDecoder(decoder, pace)

    if owners:
        drawn = sample_without_grad(start, policy, prompts, owners, noise, temperature)
    else:
        idle(policy)
        drawn = [], []
    pace.rest()
    return drawn


def idle(policy: Policy) -> None:
    """One call of the model that nobody needs, on one token."""
    policy.decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device), use_cache=False)
