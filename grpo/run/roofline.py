"""How fast a step could be: what it must read over the bandwidth, what it must multiply over the matmul rate.

Decoding reads all weights and every row's state for each token; the rest multiplies. For B rows and P + t tokens seen

    a token      max((w·(body + head + lora) + B·(2·state + (P + t)·kv)) / bandwidth, B·2·(body + head + lora) / rate)
    forward      tokens · (2·body + 2·lora + scan + attention) + completion tokens · 2·head             over rate
    train        tokens · (4·body + 6·lora + 3.5·(scan + attention)) + completion tokens · 4·head       over rate

with w bytes a weight. Frozen weights need no gradient of their own: 4·body, not 6. Activations, logits and the
optimiser move bytes too and nothing overlaps fully, so no program reaches 1. Not counted, because it could be saved:
the second forward pass of gradient checkpointing, a prompt's passes for every completion of it instead of once, and
forward passes for old log-probabilities.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo.config import Config
from grpo.loss import silent_rows
from grpo.types import Step

SCAN_FLOPS = 8
"""Of the gated delta rule, a token and number of its state: decay, read with the key, write, read with the query."""
MEASURE_SECONDS = 0.12
MOST_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
MATMUL_SIZE = {"cpu": 384, "cuda": 8192}
REPEATS = 16
"""Copies of a drawn strip that a measured matrix is made of: drawing all of it would take longer than measuring."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Layers of softmax attention that see equally far."""

    window: int | None
    """Tokens back; None sees all."""
    kv_bytes: int
    """Keys and values of a row, a token."""
    flops: int
    """A token and token seen, forward."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a token costs this model, on any machine.

    Example, Qwen3.5-9B in bfloat16: body 6.92e9, head 1.02e9, state 51.9e6, one `Attention` with 32 KiB a token.
    """

    body: int
    """Parameters of the decoder's linear layers, all read for a token. The embedding is only looked up."""
    head: int
    lora: int
    weight_bytes: int
    state_bytes: int
    """Of a row's recurrent states, whatever its length; read and written for a token."""
    scan: int
    """FLOPs of the recurrences, a token, forward."""
    attentions: tuple[Attention, ...]


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a device, as measured."""

    bandwidth: float
    """Bytes a second."""
    matmul: float
    """FLOPs a second of large products in the model's dtype."""


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of a step. Row i answers prompt ``owners[i]``.

    Example, one step of configs/v49.toml: ``Work((200,), (0,) * 8, (1024,) * 8, (True,) * 8)``.
    """

    prompts: tuple[int, ...]
    owners: tuple[int, ...]
    lengths: tuple[int, ...]
    """Completion tokens a row."""
    trained: tuple[bool, ...]
    """Rows that need a backward pass; the others only need log-probabilities."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that no program can do without, by phase."""

    prefill: float
    decode: float
    reference: float
    train: float

    @property
    def rollout(self) -> float:
        return self.prefill + self.decode

    @property
    def update(self) -> float:
        return self.reference + self.train

    @property
    def step(self) -> float:
        return self.rollout + self.update


def step_floor(
    costs: Costs, rates: Rates, work: Work, *, reference: bool, inner_epochs: int = 1, dropped: Sequence[int] = ()
) -> Floor:
    """The floor of one step.

    Args:
        reference: whether reference log-probabilities are computed.
        inner_epochs: μ.
        dropped: lengths of rows that were sampled and left out; their prompts are not counted.

    A model that is nothing but a head of 5 weights of 2 bytes, 10 bytes and 100 FLOPs a second: its second token reads
    10 bytes. The first comes with the prefill. Two tokens are scored and trained with 4·5 FLOPs each:

    >>> floor = step_floor(Costs(0, 5, 0, 2, 0, 0, ()), Rates(10.0, 100.0), Work((3,), (0,), (2,), (True,)),
    ...                    reference=False)
    >>> floor.decode, floor.train
    (1.0, 0.4)
    """
    seen = [work.prompts[b] for b in work.owners]
    once = sum(forward_flops(costs, p, 1) for p in work.prompts)
    trained = shared_flops(costs, work, {True: train_flops, False: forward_flops})
    scored = shared_flops(costs, work, {True: forward_flops, False: forward_flops})
    return Floor(
        prefill=max(once / rates.matmul, weights_read(costs) / rates.bandwidth),
        decode=decode_floor(costs, rates, [*seen, *[0] * len(dropped)], [*work.lengths, *dropped]),
        reference=scored / rates.matmul if reference else 0.0,
        train=inner_epochs * trained / rates.matmul,
    )


def decode_floor(costs: Costs, rates: Rates, prompts: Sequence[int], lengths: Sequence[int]) -> float:
    """Seconds to decode rows of those completion lengths together, each behind its prompt, every token after its first.

    >>> decode_floor(Costs(10, 0, 0, 1, 0, 0, ()), Rates(10.0, 1e9), [4, 4], [3, 2])
    2.0
    """
    steps = np.arange(1, max(lengths))
    alive = steps < np.array(lengths)[:, None]
    context = np.array(prompts)[:, None] + steps
    moved = np.full(len(steps), float(weights_read(costs)))
    flops = alive.sum(0) * float(2 * (costs.body + costs.head + costs.lora) + costs.scan)
    moved += alive.sum(0) * 2.0 * costs.state_bytes
    for one in costs.attentions:
        columns = (np.minimum(context, one.window or context) * alive).sum(0)
        moved += columns * one.kv_bytes
        flops += columns * one.flops
    return float(np.maximum(moved / rates.bandwidth, flops / rates.matmul).sum())


def weights_read(costs: Costs) -> int:
    """Bytes of weights behind one token."""
    return costs.weight_bytes * (costs.body + costs.head + costs.lora)


def shared_flops(costs: Costs, work: Work, kinds: Mapping[bool, Callable[[Costs, int, int], float]]) -> float:
    """Of passes over all rows, each prompt once: as the first of ``kinds`` for the rows that are trained (and for the
    prompts of such rows), as the other for the rest."""
    flops = 0.0
    for b, prompt in enumerate(work.prompts):
        rows = [i for i, owner in enumerate(work.owners) if owner == b]
        if rows:
            flops += kinds[any(work.trained[i] for i in rows)](costs, prompt, 0)
        for i in rows:
            kind = kinds[work.trained[i]]
            flops += kind(costs, prompt + work.lengths[i], work.lengths[i]) - kind(costs, prompt, 0)
    return flops


def forward_flops(costs: Costs, tokens: int, scored: int) -> float:
    """Of a sequence of ``tokens``, whose last ``scored`` go through the head as well."""
    return 2 * (tokens * (costs.body + costs.lora) + scored * costs.head) + _mixing_flops(costs, tokens)


def train_flops(costs: Costs, tokens: int, scored: int) -> float:
    """Forward and backward of the same."""
    linear = tokens * (4 * costs.body + 6 * costs.lora) + 4 * scored * costs.head
    return linear + 3.5 * _mixing_flops(costs, tokens)


def _mixing_flops(costs: Costs, tokens: int) -> float:
    attention = sum(part.flops * columns_seen(tokens, part.window) for part in costs.attentions)
    return tokens * costs.scan + attention


def columns_seen(tokens: int, window: int | None) -> int:
    """Of causal attention, Σ over positions.

    >>> columns_seen(4, None), columns_seen(4, 2)
    (10, 7)
    """
    wide = min(tokens, window or tokens)
    return wide * (wide + 1) // 2 + (tokens - wide) * wide


def work_of(step: Step, config: Config) -> Work:
    """The tokens of a step that was taken. Rows that cannot move the policy need no backward pass."""
    groups = step.groups
    silent = silent_rows(step.batch.advantages, step.batch.token_weights, beta=config.loss.beta).tolist()
    return Work(
        prompts=tuple(len(group.prompt.ids) for group in groups),
        owners=tuple(b for b, group in enumerate(groups) for _ in group.completions),
        lengths=tuple(len(completion.ids) for group in groups for completion in group.completions),
        trained=tuple(not one for one in silent),
    )


def floor_of(step: Step, config: Config, costs: Costs, rates: Rates) -> Floor:
    """`step_floor` of a step that was taken."""
    return step_floor(
        costs,
        rates,
        work_of(step, config),
        reference=config.loss.beta > 0,
        inner_epochs=config.optim.inner_epochs,
        dropped=[length for one in step.dropped for length in one.lengths],
    )


def costs_of(base: Any) -> Costs:
    """Of a causal language model of transformers, adapters of PEFT inside it or not; the meta device will do.

    Counted are linear layers, softmax attention by ``layer_types``, and the states of Gated DeltaNet. Another kind of
    recurrence, and experts that are not `torch.nn.Linear`, are left out: the floor is then lower than it could be.
    """
    linear = {name: m.weight for name, m in base.base_model.named_modules() if isinstance(m, nn.Linear)}
    lora = sum(w.numel() for name, w in linear.items() if ".lora_" in name)
    head = base.get_output_embeddings().weight
    config = base.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    state, scan = _delta(config, kinds.count("linear_attention"), head.element_size())
    return Costs(
        body=sum(w.numel() for w in linear.values()) - lora,
        head=head.numel(),
        lora=lora,
        weight_bytes=head.element_size(),
        state_bytes=state,
        scan=scan,
        attentions=tuple(
            _attention(config, kinds.count(kind), window, head.element_size())
            for kind, window in (
                ("full_attention", None),
                ("sliding_attention", getattr(config, "sliding_window", None)),
            )
            if kind in kinds
        ),
    )


def _attention(config: Any, layers: int, window: int | None, width: int) -> Attention:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Attention(window, layers * 2 * kv_heads * d * width, layers * 4 * heads * d)


def _delta(config: Any, layers: int, width: int) -> tuple[int, int]:
    """(bytes of state a row, FLOPs a token) of Gated DeltaNet: fp32 states, convolutions in the model's dtype."""
    if not layers:
        return 0, 0
    numbers = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    channels = keys + config.linear_num_value_heads * config.linear_value_head_dim
    convolution = channels * config.linear_conv_kernel_dim * width
    return layers * (4 * numbers + convolution), layers * SCAN_FLOPS * numbers


# --- the device ------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, dtype: torch.dtype, size: int) -> Rates:
    """What the device does now, in about half a second: the best of a few copies, sums and products.

    Args:
        size: bytes that the model reads for a token: on a CPU a small model lives in the caches, and so must what
            measures them.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    free = torch.cuda.mem_get_info(device)[0] if kind == "cuda" else MOST_BYTES["cpu"] * 8
    count = max(1 << 10, min(size, MOST_BYTES[kind], free // 8) // 4)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    edge = MATMUL_SIZE[kind] if free > 1 << 32 or kind == "cpu" else 2048
    # random: some cards multiply ones and zeros faster than real numbers
    strip = torch.randn(edge, edge // REPEATS, generator=torch.Generator().manual_seed(0))
    matrix = strip.to(device, dtype).repeat(1, REPEATS)
    copied = 8 * count / _best(lambda: target.copy_(source), device)
    read = 4 * count / _best(source.sum, device)
    return Rates(max(copied, read), 2 * edge**3 / _best(lambda: matrix @ matrix, device))


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of the runs that `MEASURE_SECONDS` allow, after one to warm up."""
    run()
    best, until = float("inf"), now(device) + MEASURE_SECONDS
    while True:
        started = now(device)
        run()
        ended = now(device)
        best = min(best, ended - started)
        if ended > until:
            return best


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, the device having finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
