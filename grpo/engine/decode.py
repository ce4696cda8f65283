"""One token of Qwen3.5 for n rows at a time, over buffers that never move: so a CUDA graph can replay it.

Every prompt is prefilled once and its state copied to its rows. From there each token is one call of `step`, which
reads `grpo.engine.weights` and updates `State` where it lies: no modules, no cache objects, no masks, no sync.

A row's prompt is padded for the prefill alone, to its own multiple of 64; in the buffers it begins at column 0. What a
row sees then lies in the same place in every batch, and zeros at its end change no sum: in fp32 on a CPU its logits are
the same bits whatever it is batched with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from grpo.engine.gated_delta import gated_delta_step
from grpo.engine.generic import padded_width, prefill
from grpo.engine.sampling import Decoder
from grpo.engine.weights import Attention, GatedDelta, Joint, Residual, Weights, read_weights
from grpo.policy import Policy
from grpo.types import Prompt

WINDOW = 16
"""On a CPU attention reads the columns in use, rounded up to this; on CUDA, where a graph fixes its shapes, all."""


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Of a full-attention layer: keys and values [n, kv_heads, S, d]; column = position."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Recurrent:
    """Of a gated-delta layer: the latest inputs of the convolution [n, kernel - 1, channels], oldest first, and the
    state [n,K,d_k,R·d_v] fp32."""

    conv: Tensor
    memory: Tensor


@dataclass(frozen=True, slots=True)
class State:
    """All that n rows know. The buffers stay where they are while rows are decoded."""

    ids: Tensor
    """[n], the tokens to read next."""
    positions: Tensor
    """[n], theirs."""
    unseen: Tensor
    """[n,S] fp32: 0 at the columns a row has written, -inf beyond."""
    layers: tuple[KeyValues | Recurrent, ...]


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin [positions, r] for the first r numbers of a head; sin's first half has its sign turned."""

    cos: Tensor
    sin: Tensor


def step(weights: Weights, rotary: Rotary, state: State, window: int) -> Tensor:
    """Logits [n,V] after ``state.ids``; ``state`` moves one token on.

    Args:
        window: columns that attention reads, more than any row's position.
    """
    x = embedding(state.ids, weights.embedding)
    state.unseen.scatter_(1, state.positions[:, None], 0.0)
    turn = Rotary(rotary.cos[state.positions][:, None], rotary.sin[state.positions][:, None])
    for layer, memory in zip(weights.layers, state.layers, strict=True):
        h = _norm(x, layer.mixer_norm, weights.epsilon)
        if isinstance(layer.mixer, Attention) and isinstance(memory, KeyValues):
            mixed = _attend(h, layer.mixer, memory, state, turn, window, weights.epsilon)
        else:
            assert isinstance(layer.mixer, GatedDelta) and isinstance(memory, Recurrent)
            mixed = _recur(h, layer.mixer, memory, weights.epsilon)
        _add(x, mixed, layer.mixer.out)
        gate, up = _products(_norm(x, layer.mlp_norm, weights.epsilon), layer.gate_up)
        _add(x, silu(gate).mul_(up), layer.down)
    state.positions.add_(1)
    return _norm(x, weights.norm, weights.epsilon) @ weights.head


def _attend(
    h: Tensor, mixer: Attention, memory: KeyValues, state: State, turn: Rotary, window: int, epsilon: float
) -> Tensor:
    """What gated full attention reads, [n, heads·d]; this token's key and value are written first."""
    n, kv_heads, d = len(h), mixer.kv_heads, mixer.norm.shape[1]
    queries_and_gates, k, v = _products(h, mixer.qkv)
    q, gate = queries_and_gates.view(n, -1, 2, d).unbind(2)
    heads = rms_norm(torch.cat((q, k.view(n, kv_heads, d)), 1).float(), (d,), None, epsilon).mul_(mixer.norm)
    part = heads[..., : turn.cos.shape[-1]]
    part.copy_(torch.addcmul(part * turn.cos, part.roll(part.shape[-1] // 2, -1), turn.sin))
    heads = heads.to(h.dtype)

    at = state.positions[:, None, None, None].expand(n, kv_heads, 1, d)
    memory.keys.scatter_(2, at, heads[:, -kv_heads:, None])
    memory.values.scatter_(2, at, v.view(n, kv_heads, 1, d))
    keys, values = memory.keys[:, :, :window].flatten(0, 1), memory.values[:, :, :window].flatten(0, 1)
    queries = heads[:, :-kv_heads].reshape(n * kv_heads, -1, d)
    scores = torch.bmm(queries, keys.transpose(1, 2)).float().view(n, -1, window).add_(state.unseen[:, None, :window])
    shares = scores.softmax(-1).to(h.dtype).view(n * kv_heads, -1, window)
    return torch.bmm(shares, values).view(n, -1, d).mul_(gate.sigmoid()).view(n, -1)


def _recur(h: Tensor, mixer: GatedDelta, memory: Recurrent, epsilon: float) -> Tensor:
    """What gated linear attention reads, [n, heads·d]; this token enters convolution and state first."""
    qkv, z, b, a = _products(h, mixer.qkvzba)
    inputs = torch.cat((memory.conv, qkv[:, None]), 1)
    memory.conv.copy_(inputs[:, 1:])
    mixed = silu((inputs * mixer.conv).sum(1))
    out = gated_delta_step(memory.memory, mixed, a, b, mixer.rate, mixer.dt_bias)
    return rms_norm(out, out.shape[-1:], mixer.norm, epsilon).view(len(h), -1).mul_(silu(z.float())).to(h.dtype)


def _norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    return rms_norm(x.float(), scale.shape, scale, epsilon).to(x.dtype)


def _products(x: Tensor, joint: Joint) -> list[Tensor]:
    """The outputs [n,o] of each layer."""
    wide = x @ joint.fused
    low = wide[:, joint.width :]
    if joint.block is not None:
        wide[:, : joint.width].addmm_(low, joint.block)
    alone = iter(zip(joint.alone, joint.ups, strict=True))
    return [_alone(x, low, *next(alone)) if span is None else wide[:, span] for span in joint.spans]


def _alone(x: Tensor, low: Tensor, weight: Tensor, up: tuple[slice, Tensor] | None) -> Tensor:
    y = x @ weight
    return y if up is None else y.addmm_(low[:, up[0]], up[1])


def _add(x: Tensor, h: Tensor, layer: Residual) -> None:
    """x += layer(h)."""
    x.addmm_(h, layer.weight)
    if layer.adapter:
        down, up = layer.adapter
        x.addmm_(h @ down, up)


class GraphDecoder:
    """Drives `step`. On CUDA the first step of a number of rows runs eagerly, the second is captured, and the graph is
    replayed from then on."""

    def __init__(self, weights: Weights, rotary: Rotary, state: State, longest: int) -> None:
        self._weights, self._rotary, self._state = weights, rotary, state
        self._columns = longest
        self._warm = False
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def step(self, ids: Tensor) -> Tensor:
        """Logits [n,V] after one more token each; written over by the next step."""
        self._state.ids.copy_(ids)
        self._columns += 1
        if ids.is_cuda and self._warm:
            return self._replayed()
        self._warm = True
        return step(self._weights, self._rotary, self._state, self._window())

    def keep(self, slots: Tensor) -> None:
        """Goes on with the rows in ``slots``, moved to the front of the same buffers."""
        self._state = front(self._state, slots, self._columns)
        self._warm, self._captured = False, None

    def _window(self) -> int:
        width = self._state.unseen.shape[1]
        return width if self._state.ids.is_cuda else min(width, -(-self._columns // WINDOW) * WINDOW)

    def _replayed(self) -> Tensor:
        if self._captured is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = step(self._weights, self._rotary, self._state, self._window())
            self._captured = graph, logits
        graph, logits = self._captured
        graph.replay()
        return logits


def start_own(policy: Policy, prompts: Sequence[Prompt], owners: Sequence[int], budget: int) -> tuple[Tensor, Decoder]:
    """Logits [n,V] of the first token and the decoder of the next.

    Each prompt is prefilled once, together with those of its own padded width, and its state copied to its rows.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    weights = read_weights(policy)
    state = blank(policy, weights, len(owners), longest + budget)
    hidden = state.unseen.new_empty(len(owners), len(weights.norm), dtype=weights.embedding.dtype)
    for width in sorted({padded_width(prompt) for prompt in prompts}):
        members = [b for b, prompt in enumerate(prompts) if padded_width(prompt) == width]
        last, cache, _ = prefill(policy, [prompts[b] for b in members])
        for i, b in enumerate(members):
            rows = torch.tensor([row for row, owner in enumerate(owners) if owner == b], device=policy.device)
            hidden[rows] = last[i]
            fill(state, rows, weights, cache, i, len(prompts[b].ids))
    decoder = GraphDecoder(weights, rotary_table(policy, longest + budget), state, longest)
    return hidden @ weights.head, decoder


def blank(policy: Policy, weights: Weights, rows: int, columns: int) -> State:
    """The buffers of so many rows and at least so many columns, nothing written yet."""
    columns = -(-columns // WINDOW) * WINDOW
    zeros = partial(torch.zeros, device=policy.device, dtype=weights.embedding.dtype)
    layers: list[KeyValues | Recurrent] = []
    for layer in weights.layers:
        if isinstance(layer.mixer, Attention):
            shape = (rows, layer.mixer.kv_heads, columns, layer.mixer.norm.shape[1])
            layers.append(KeyValues(zeros(shape), zeros(shape)))
        else:
            kernel, channels = layer.mixer.conv.shape
            memory = zeros((rows, layer.mixer.key_heads, layer.mixer.d_k, layer.mixer.d_v), dtype=torch.float32)
            layers.append(Recurrent(zeros((rows, kernel - 1, channels)), memory))
    return State(
        ids=zeros(rows, dtype=torch.long),
        positions=zeros(rows, dtype=torch.long),
        unseen=torch.full((rows, columns), float("-inf"), device=policy.device),
        layers=tuple(layers),
    )


def fill(state: State, rows: Tensor, weights: Weights, cache: Any, member: int, length: int) -> None:
    """Writes what a prefill left of prompt ``member``, whose last ``length`` columns are real, into ``rows`` [m]."""
    state.positions[rows] = length
    state.unseen[rows, :length] = 0.0
    for layer, memory, left in zip(weights.layers, state.layers, cache.layers, strict=True):
        if isinstance(memory, KeyValues):
            memory.keys[rows, :, :length] = left.keys[member, :, -length:]
            memory.values[rows, :, :length] = left.values[member, :, -length:]
        else:
            assert isinstance(layer.mixer, GatedDelta)
            heads = left.recurrent_states[0][member].unflatten(0, (layer.mixer.key_heads, -1))
            memory.memory[rows] = heads.transpose(1, 2).flatten(2)
            memory.conv[rows] = left.conv_states[0][member, :, 1:].T


def front(state: State, slots: Tensor, columns: int) -> State:
    """The state of the rows in ``slots`` [m], copied to the front of its own buffers; ``columns`` are in use."""
    n = len(slots)

    def move(buffer: Tensor) -> Tensor:
        buffer[:n].copy_(buffer[slots])
        return buffer[:n]

    layers: list[KeyValues | Recurrent] = []
    for memory in state.layers:
        if isinstance(memory, KeyValues):
            move(memory.keys[:, :, :columns])
            move(memory.values[:, :, :columns])
            layers.append(KeyValues(memory.keys[:n], memory.values[:n]))
        else:
            layers.append(Recurrent(move(memory.conv), move(memory.memory)))
    return State(move(state.ids), move(state.positions), move(state.unseen), tuple(layers))


def rotary_table(policy: Policy, positions: int) -> Rotary:
    """cos and sin of positions 0 .. positions - 1, as the model computes them, in fp32."""
    at = torch.arange(positions, device=policy.device).expand(3, 1, -1)
    cos, sin = policy.body.rotary_emb(torch.zeros(1, device=policy.device), at)
    half = cos.shape[-1] // 2
    return Rotary(cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], 1))
