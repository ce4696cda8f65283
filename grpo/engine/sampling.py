"""The loop that every decoder is driven by: draw, write down, let finished rows leave.

What a row draws is a function of its key alone: token t takes the t-th uniform of a Philox counter under that key and
looks it up in the cumulated distribution. Neither neighbours nor the order of rows nor a resume changes it.

A decoder runs its rows in *slots*, of which there are always a multiple of `SLOT_GRID`: a matrix product gives a row
the same bits in every batch of that kind. A slot that no row needs repeats the first row, and is never read.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grpo.logprobs import log_distribution
from grpo.policy.policy import Policy
from grpo.types import Prompt

LOOK_EVERY = 8
"""Decode steps between two looks at which rows have ended: each look waits for the device."""
SLOT_GRID = 8
BLOCK = 512
"""Ids whose probabilities are summed before they are cumulated: over a vocabulary of 248,320 only the 485 sums and one
block are ever held in float64."""

Drawn = tuple[list[list[int]], list[list[float]]]
"""Ids of each of N rows, cut after the first end token, and the log-probability of each."""


class Decoder(Protocol):
    """Rows in the middle of a completion."""

    def step(self, ids: Tensor) -> Tensor:
        """Logits [n,V] after one more token each, ``ids`` [n]. The decoder may write over them in its next step."""

    def keep(self, slots: Tensor) -> None:
        """From now on the rows are those in ``slots`` [m], m ≤ n, in that order."""


Start = Callable[[Policy, Sequence[Prompt], Sequence[int], int], tuple[Tensor, Decoder]]
"""(policy, B prompts, n owners, budget T) → logits [n,V] of the first token, and the decoder that gives the next T - 1:
slot i continues prompt ``owners[i]``."""


def uniforms(keys: Sequence[int], count: int) -> np.ndarray:
    """[N, count] float64 in [0, 1): entry t of row i is the t-th number of the Philox counter under ``keys[i]``."""
    rows = [np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]
    return np.array(rows).reshape(len(rows), count)


def draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverse transform: the first id whose cumulated probability exceeds the noise.

    Args:
        logits: [n,V].
        noise: [n] float64, uniform in [0, 1).
        temperature: 0 takes the arg max, and the log-probabilities are then those at temperature 1.

    Returns:
        ids [n] and their log-probabilities [n], fp32 nats. An id of probability 0 is never drawn.

    >>> ids, logprobs = draw(torch.tensor([[0.0, 0.0]] * 2), torch.tensor([0.49, 0.5], dtype=torch.float64), 1.0)
    >>> ids.tolist(), logprobs.exp().tolist()
    ([0, 1], [0.5, 0.5])
    """
    logp = log_distribution(logits, temperature or 1.0)
    ids = logp.argmax(-1, keepdim=True) if temperature == 0 else _invert(logp.exp(), noise[:, None])
    return ids[:, 0], logp.gather(-1, ids)[:, 0]


def _invert(p: Tensor, noise: Tensor) -> Tensor:
    """[n,1]: the first id at which Σ_{j ≤ id} p_j > noise · Σ p. Sums in float64: first over blocks of ids, then within
    the block that the noise falls into."""
    n, size = p.shape
    width = min(BLOCK, 1 << (max(size - 1, 1).bit_length() + 1) // 2)
    if size % width:
        p = torch.nn.functional.pad(p, (0, width - size % width))
    blocks = p.view(n, -1, width)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = torch.minimum(noise * ends[:, -1:], _below(ends[:, -1:]))
    block = torch.searchsorted(ends, target, right=True)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(n, 1, width))[:, 0].cumsum(-1, dtype=torch.float64)
    # the block's sum and the end of its cumulation may round apart: stay below the end, so that p > 0 for what is found
    rest = torch.minimum(target - before, _below(inside[:, -1:]))
    return block * width + torch.searchsorted(inside, rest, right=True)


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def slots_for(rows: int, device: torch.device) -> int:
    """Slots that hold so many rows: the next multiple of `SLOT_GRID`, and on CUDA the next power of two, so that few
    graphs of the step are ever captured.

    >>> slots_for(33, torch.device("cpu")), slots_for(33, torch.device("cuda")), slots_for(1, torch.device("cuda"))
    (40, 64, 8)
    """
    grid = -(-rows // SLOT_GRID) * SLOT_GRID
    return grid if device.type == "cpu" else max(SLOT_GRID, 1 << (rows - 1).bit_length())


@torch.no_grad()
def sample_without_grad(
    start: Start,
    policy: Policy,
    prompts: Sequence[Prompt],
    owners: Sequence[int],
    noise: np.ndarray,
    temperature: float,
) -> Drawn:
    """N completions, drawn with a decoder.

    Args:
        owners: N indices into ``prompts``, N ≥ 1.
        noise: [N,T] float64 in [0, 1).
    """
    device, (count, budget) = policy.device, noise.shape
    uniform = torch.from_numpy(noise).to(device).T.contiguous()
    ends = torch.tensor(policy.end_token_ids, dtype=torch.long, device=device)
    ids = torch.zeros(count, budget, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, budget, device=device)

    slots = _padded(torch.arange(count, device=device), device)
    rows, live, fresh = slots, count, uniform[:, slots]
    logits, decoder = start(policy, prompts, [owners[row] for row in slots.tolist()], budget)
    stretch: list[tuple[Tensor, Tensor]] = []
    for t in range(budget):
        drawn, logp = draw(logits, fresh[t], temperature)
        stretch.append((drawn[:live], logp[:live]))
        if (t + 1) % LOOK_EVERY == 0 or t + 1 == budget:
            span = slice(t + 1 - len(stretch), t + 1)
            ids[rows[:live], span] = torch.stack([i for i, _ in stretch], 1)
            logprobs[rows[:live], span] = torch.stack([lp for _, lp in stretch], 1)
            stretch.clear()
            going = torch.isin(ids[rows[:live], : t + 1], ends).logical_not_().all(1).nonzero()[:, 0]
            if len(going) == 0 or t + 1 == budget:
                break
            if slots_for(len(going), device) < len(rows):
                slots = _padded(going, device)
                decoder.keep(slots)
                rows, live, drawn, fresh = rows[slots], len(going), drawn[slots], fresh[:, slots]
        logits = decoder.step(drawn)
    return _cut(ids, logprobs, ends)


sample = torch.inference_mode()(sample_without_grad)
"""Faster, where no weight is made anew on the way: one that is could not be trained through afterwards."""


def _padded(rows: Tensor, device: torch.device) -> Tensor:
    spare = slots_for(len(rows), device) - len(rows)
    return torch.cat([rows, rows[:1].expand(spare)])


def _cut(ids: Tensor, logprobs: Tensor, ends: Tensor) -> Drawn:
    """Each row up to its first end token, that one included."""
    ended = torch.isin(ids, ends)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1]).tolist()
    return (
        [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)],
        [row[:n] for row, n in zip(logprobs.tolist(), lengths, strict=True)],
    )
