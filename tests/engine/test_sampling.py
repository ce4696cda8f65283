"""The loop that drives a decoder, with a decoder that follows a script."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.engine.sampling import BLOCK, LOOK_EVERY, draw, sample, slots_for

VOCABULARY, END = 50, 7


class Scripted:
    """Row i says script[i][t] at step t, and nothing else is possible. Remembers how many rows each step had."""

    def __init__(self, script: np.ndarray, owners: Sequence[int]) -> None:
        self.rows, self.script, self.t, self.seen = torch.tensor(owners), torch.from_numpy(script), 0, []

    def logits(self) -> Tensor:
        row = torch.full((len(self.rows), VOCABULARY), float("-inf"))
        return row.scatter_(1, self.script[self.rows, self.t][:, None], 0.0)

    def step(self, ids: Tensor) -> Tensor:
        assert torch.equal(ids, self.script[self.rows, self.t]), "every row reads the token it drew"
        self.t += 1
        self.seen.append(len(self.rows))
        return self.logits()

    def keep(self, slots: Tensor) -> None:
        self.rows = self.rows[slots]


def spoken(lengths: Sequence[int], budget: int) -> tuple[list[list[int]], list[int], np.ndarray]:
    """What rows that end after so many tokens say, the rows of each step, and the script."""
    script = np.random.default_rng(0).integers(8, VOCABULARY, (len(lengths), budget))
    for row, length in zip(script, lengths, strict=True):
        row[length - 1 :] = END if length <= budget else row[length - 1 :]
        row[length:] = 9  # whoever decodes on past its end must not be heard
    decoders: list[Scripted] = []

    def start(_policy: Any, _prompts: Any, owners: Sequence[int], _budget: int) -> tuple[Tensor, Scripted]:
        decoders.append(Scripted(script, owners))
        return decoders[0].logits(), decoders[0]

    policy: Any = SimpleNamespace(device=torch.device("cpu"), end_token_ids=(END,))
    ids, logprobs = sample(start, policy, [], range(len(lengths)), np.full((len(lengths), budget), 0.5), 1.0)
    assert logprobs == [[0.0] * len(row) for row in ids]
    return ids, decoders[0].seen, script


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 26))
def test_rows_are_cut_at_their_end_and_leave_at_the_next_look(lengths: list[int], budget: int) -> None:
    ids, seen, script = spoken(lengths, budget)
    assert ids == [row[:length].tolist() for row, length in zip(script, lengths, strict=True)]
    expected = []
    for t in range(1, budget):  # the step after token t decodes the rows alive at the last look
        look = t // LOOK_EVERY * LOOK_EVERY
        alive = sum(length > look for length in lengths)
        if not alive:
            break
        expected.append(slots_for(alive, torch.device("cpu")))
    assert seen == expected


@pytest.mark.parametrize("size", [1, 2, 3, 50, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_draw_is_the_inverse_of_the_cumulated_distribution(size: int) -> None:
    """Also where the vocabulary fills no block, and where most of it has no probability."""
    generator = torch.Generator().manual_seed(size)
    logits = 4 * torch.randn(40, size, generator=generator)
    logits[20:] = torch.where(torch.rand(20, size, generator=generator) < 0.9, float("-inf"), logits[20:])
    logits[:, size // 2] = 0.0
    noise = torch.rand(40, generator=generator, dtype=torch.float64)
    noise[[3, 23]], noise[[4, 24]] = 0.0, 1 - 2.0**-53
    ids, logprobs = draw(logits, noise, 1.0)
    for row, u, i, lp in zip(logits.tolist(), noise.tolist(), ids.tolist(), logprobs.tolist(), strict=True):
        weights = np.exp(np.array(row) - max(row))
        cumulated = np.cumsum(weights) / weights.sum()
        assert weights[i] > 0
        assert cumulated[i] > u - 1e-6 and (i == 0 or cumulated[i - 1] <= u + 1e-6)
        assert lp == pytest.approx(np.log(weights[i] / weights.sum()), abs=1e-5)
