"""The loop that drives every decoder: draw a token per row, record it, and remove finished rows.

What a row draws depends on its key alone: token t uses the t-th uniform number of a Philox counter with that key and
looks it up in the cumulative distribution. Other rows, their order and a resume do not change it.

A decoder runs its rows in *slots*, whose number is always a multiple of `ROW_MULTIPLE`: a matrix product then gives a
row the same bits in every batch. A slot without a row repeats the first row, and its result is never read.
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
"""Decode steps between two checks which rows have ended: each check waits for the device."""
ROW_MULTIPLE = {"cpu": 16, "cuda": 8}
"""Slots are a multiple of this. On CPUs with AVX-512 or AMX, MKL computes a product of 8 rows with another kernel than
one of 12 or more rows, so that the last bits of a row would depend on how many rows are left; with multiples of 16 they
do not. On CUDA it is the smallest number of slots; see `slots_for`."""
BLOCK = 512
"""Ids whose probabilities are summed before the sums are cumulated: of a vocabulary of 248,320 only the 485 sums and
one block are held in float64."""

Drawn = tuple[list[list[int]], list[list[float]]]
"""Ids of each of N rows, cut after the first end token, and their log-probabilities."""


class Decoder(Protocol):
    """State of the rows whose completions are not finished."""

    def step(self, ids: Tensor) -> Tensor:
        """Append one token ``ids`` [n] per row; return the next logits [n,V], which the next step may overwrite."""

    def keep(self, slots: Tensor) -> None:
        """Continue with the rows in ``slots`` [m], m ≤ n, in that order."""


Start = Callable[[Policy, Sequence[Prompt], Sequence[int], int], tuple[Tensor, Decoder]]
"""(policy, B prompts, n owners, budget T) → logits [n,V] of the first token, and the decoder for the next T - 1; slot i
continues prompt ``owners[i]``."""


def uniforms(keys: Sequence[int], count: int) -> np.ndarray:
    """Return [N, count] float64 in [0, 1): entry t of row i is number t of the Philox counter with key ``keys[i]``."""
    rows = [np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]
    return np.array(rows).reshape(len(rows), count)


def draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse transform: the first id whose cumulative probability exceeds the noise.

    Args:
        logits: [n,V].
        noise: [n] float64, uniform in [0, 1).
        temperature: 0 takes the most likely token; its log-probability is then that at temperature 1.

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
    """Return [n,1], the first id with Σ_{j ≤ id} p_j > noise · Σ p. Sums are in float64, first over blocks of ids, then
    within the block that contains the target."""
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
    # the block's sum and its last cumulative sum may round differently: stay below it, so that p > 0 for the id
    rest = torch.minimum(target - before, _below(inside[:, -1:]))
    return block * width + torch.searchsorted(inside, rest, right=True)


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def slots_for(rows: int, device: torch.device) -> int:
    """Return the number of slots for so many rows: the next multiple of `ROW_MULTIPLE`, and on CUDA the next power of
    two, so that few CUDA graphs of the step are captured.

    >>> slots_for(33, torch.device("cpu")), slots_for(33, torch.device("cuda")), slots_for(1, torch.device("cuda"))
    (48, 64, 8)
    """
    multiple = ROW_MULTIPLE[device.type]
    return -(-rows // multiple) * multiple if device.type == "cpu" else max(multiple, 1 << (rows - 1).bit_length())


@torch.inference_mode()
def sample(
    start: Start,
    policy: Policy,
    prompts: Sequence[Prompt],
    owners: Sequence[int],
    noise: np.ndarray,
    temperature: float,
) -> Drawn:
    """Sample N completions with a decoder.

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


def _padded(rows: Tensor, device: torch.device) -> Tensor:
    spare = slots_for(len(rows), device) - len(rows)
    return torch.cat([rows, rows[:1].expand(spare)])


def _cut(ids: Tensor, logprobs: Tensor, ends: Tensor) -> Drawn:
    """Cut each row after its first end token."""
    ended = torch.isin(ids, ends)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1]).tolist()
    return (
        [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)],
        [row[:n] for row, n in zip(logprobs.tolist(), lengths, strict=True)],
    )
