"""Lower bounds on the time of a step: bytes to read / bandwidth and FLOPs / matmul rate, whichever takes longer.

Decoding reads all weights and the state of every row for each token; the other phases multiply. For B rows, a prompt of
P tokens and t completion tokens so far:

    per token    max((w·(body + head + lora) + B·(2·state + (P + t)·kv)) / bandwidth, B·2·(body + head + lora) / rate)
    forward      tokens · (2·body + 2·lora + scan + attention) + completion tokens · 2·head             over rate
    train        tokens · (4·body + 6·lora + 3.5·(scan + attention)) + completion tokens · 4·head       over rate

with w bytes per weight. Frozen weights need no gradient: 4·body, not 6. Activations, logits and the optimizer move
bytes too and nothing overlaps fully, so no program reaches the bound. Not counted, because they can be avoided: the
second forward pass of gradient checkpointing, passes over a prompt for each of its completions instead of once, and
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
from grpo.policy.policy import Policy
from grpo.types import StepRecord

SCAN_FLOPS = 8
"""FLOPs of the gated delta rule per token and element of its state: decay, read by key, write, read by query."""
MEASURE_SECONDS = 0.12
MOST_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
MATMUL_SIZE = {"cpu": 384, "cuda": 8192}
REPEATS = 16
"""Copies of a random strip that form the measured matrix: drawing all of it would take longer than measuring."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention layers with the same window."""

    window: int | None
    """Tokens attended to; None is all."""
    kv_bytes: int
    """Bytes of keys and values per row and token, all layers."""
    flops: int
    """Forward FLOPs per token and attended token, all layers."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Cost per token of a model, on any machine.

    Example, Qwen3.5-9B in bfloat16: body 6.92e9, head 1.02e9, state 51.9e6, one `Attention` with 32 KiB a token.
    """

    body: int
    """Parameters of the decoder's linear layers, all read for each token. The embedding is only indexed."""
    head: int
    lora: int
    weight_bytes: int
    state_bytes: int
    """Bytes of a row's recurrent states, at any length; read and written for each token."""
    scan: int
    """Forward FLOPs of the recurrences per token."""
    attentions: tuple[Attention, ...]


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates of a device."""

    bandwidth: float
    """Bytes per second."""
    matmul: float
    """FLOPs per second of large matrix products in the model's dtype."""


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of a step. Row i answers prompt ``owners[i]``.

    Example, one step of configs/v49.toml: ``Work((200,), (0,) * 8, (1024,) * 8, (True,) * 8)``.
    """

    prompts: tuple[int, ...]
    owners: tuple[int, ...]
    lengths: tuple[int, ...]
    """Completion tokens of each row."""
    trained: tuple[bool, ...]
    """Whether each row needs a backward pass; the others only need log-probabilities."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Least possible seconds of each phase."""

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
    """Return the floor of one step.

    Args:
        reference: whether reference log-probabilities are computed.
        inner_epochs: μ.
        dropped: lengths of rows that were sampled and replaced; their prompts are not counted.

    A model that is only a head of 5 weights of 2 bytes, on a device with 10 bytes and 100 FLOPs per second: the second
    token reads 10 bytes, the first comes with the prefill. Two tokens are trained with 4·5 FLOPs each:

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
    """Return the least seconds to decode rows of the given prompt and completion lengths together, without their first
    tokens.

    >>> decode_floor(Costs(10, 0, 0, 1, 0, 0, ()), Rates(10.0, 1e9), [4, 4], [3, 2])
    2.0
    """
    steps = np.arange(1, max(lengths))
    alive = steps < np.array(lengths)[:, None]
    context = np.array(prompts)[:, None] + steps
    moved = np.full(len(steps), float(weights_read(costs)))
    flops = alive.sum(0) * float(2 * (costs.body + costs.head + costs.lora) + costs.scan)
    moved += alive.sum(0) * 2.0 * costs.state_bytes
    for attention in costs.attentions:
        columns = (np.minimum(context, attention.window or context) * alive).sum(0)
        moved += columns * attention.kv_bytes
        flops += columns * attention.flops
    return float(np.maximum(moved / rates.bandwidth, flops / rates.matmul).sum())


def weights_read(costs: Costs) -> int:
    """Return the bytes of weights read per token."""
    return costs.weight_bytes * (costs.body + costs.head + costs.lora)


def shared_flops(costs: Costs, work: Work, kinds: Mapping[bool, Callable[[Costs, int, int], float]]) -> float:
    """Return the FLOPs of one pass over all rows, with each prompt counted once.

    Args:
        kinds: whether a row is trained → FLOPs of its pass; a prompt counts as trained if any of its rows is.
    """
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
    """Return the FLOPs of a forward pass over ``tokens``, of which the last ``scored`` also go through the head."""
    return 2 * (tokens * (costs.body + costs.lora) + scored * costs.head) + _mixing_flops(costs, tokens)


def train_flops(costs: Costs, tokens: int, scored: int) -> float:
    """Return the FLOPs of the forward and backward pass over the same tokens."""
    linear = tokens * (4 * costs.body + 6 * costs.lora) + 4 * scored * costs.head
    return linear + 3.5 * _mixing_flops(costs, tokens)


def _mixing_flops(costs: Costs, tokens: int) -> float:
    attention = sum(part.flops * columns_seen(tokens, part.window) for part in costs.attentions)
    return tokens * costs.scan + attention


def columns_seen(tokens: int, window: int | None) -> int:
    """Return the attended tokens of causal attention, summed over positions.

    >>> columns_seen(4, None), columns_seen(4, 2)
    (10, 7)
    """
    wide = min(tokens, window or tokens)
    return wide * (wide + 1) // 2 + (tokens - wide) * wide


def work_of(step: StepRecord, config: Config) -> Work:
    """Return the work of a recorded step. Rows without a gradient need no backward pass."""
    groups = step.groups
    silent = silent_rows(step.batch.advantages, step.batch.token_weights, beta=config.loss.beta).tolist()
    return Work(
        prompts=tuple(len(group.prompt.ids) for group in groups),
        owners=tuple(b for b, group in enumerate(groups) for _ in group.completions),
        lengths=tuple(len(completion.ids) for group in groups for completion in group.completions),
        trained=tuple(not row for row in silent),
    )


def floor_of(step: StepRecord, config: Config, costs: Costs, rates: Rates) -> Floor:
    """Return the floor of a recorded step."""
    return step_floor(
        costs,
        rates,
        work_of(step, config),
        reference=config.loss.beta > 0,
        inner_epochs=config.optim.inner_epochs,
        dropped=[length for group in step.replaced_groups for length in group.lengths],
    )


def costs_of(base: Any) -> Costs:
    """Return the costs of a causal language model of transformers, with or without PEFT adapters, on any device
    including meta.

    Linear layers, softmax attention by ``layer_types`` and the states of Gated DeltaNet are counted. Other recurrences,
    and experts that are not `torch.nn.Linear`, are not, so their floor is too low.
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
    """Return the bytes of state per row and the FLOPs per token of Gated DeltaNet, with fp32 states and convolutions in
    the model's dtype."""
    if not layers:
        return 0, 0
    numbers = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    channels = keys + config.linear_num_value_heads * config.linear_value_head_dim
    convolution = channels * config.linear_conv_kernel_dim * width
    return layers * (4 * numbers + convolution), layers * SCAN_FLOPS * numbers


# --- the device ------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, dtype: torch.dtype, size: int) -> Rates:
    """Measure a device in about half a second; return the best of a few copies, sums and products.

    Args:
        size: bytes that the model reads per token: a small model is in a CPU's caches, so the measurement must be too.
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


def limits_of(policy: Policy) -> tuple[Costs, Rates]:
    """Return the costs per token of a policy and the measured rates of its device."""
    base = policy.model.get_base_model()
    costs = costs_of(base)
    return costs, measure_rates(policy.device, base.dtype, weights_read(costs))


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest run within `MEASURE_SECONDS`, after one to warm up."""
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
    """Return the seconds of a monotonic clock after all work on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
