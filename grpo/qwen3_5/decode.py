"""Decode Qwen3.5 one token at a time for n rows, in buffers that never move, so that a CUDA graph can replay a step.

Each prompt is prefilled once and its state is copied to its rows. Each further token is one call of `step`, which reads
`grpo.qwen3_5.weights` and updates `State` in place: no modules, cache objects, masks or synchronization.

Prompts are padded for the prefill only, each to its own multiple of 64; in the buffers they begin at column 0. The
columns that a row reads are therefore in the same place in every batch, and zeros after them change no sum: in fp32 on
a CPU the logits of a row are the same bits whatever it is batched with.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

import grpo.qwen3_5.decode_ops as plain
from grpo.engine.sampling import Decoder
from grpo.engine.transformers_engine import padded_width, prefill
from grpo.logprobs import head_logits
from grpo.policy.policy import Policy
from grpo.qwen3_5.decode_state import KeyValues, Recurrent, Rotary, State
from grpo.qwen3_5.weights import Attention, GatedDelta, Joint, Residual, Weights, read_weights
from grpo.types import Prompt

WINDOW = 16
"""On a CPU attention reads the columns in use, rounded up to a multiple of this; on CUDA, where a graph fixes the
shapes, it reads all."""

CAPTURE_BYTES = 1 << 30
"""Free memory that a capture should find. The graph takes its memory from the driver, and during a capture PyTorch
cannot return its unused blocks."""
_latest_graphs: dict[int, torch.cuda.CUDAGraph] = {}
"""The last graph captured on each device, kept so that the next one can reuse its memory pool."""


@cache
def pieces(device: torch.device) -> ModuleType:
    """Return the module with the operations of a step other than its matrix products: `grpo.qwen3_5.decode_ops_triton`
    on CUDA if Triton is installed and can compile, else `grpo.qwen3_5.decode_ops`. Both have the same functions."""
    if device.type != "cuda" or not find_spec("triton"):
        return plain
    import grpo.qwen3_5.decode_ops_triton as fused

    try:
        fused.norm(torch.ones(1, 1, device=device), torch.ones(1, device=device), 0.0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, an old driver, …: plain PyTorch works as well
        reason = " ".join(str(error).split())[:200]
        print(
            f"warning: decoding runs in plain PyTorch, which is slower: Triton cannot compile here ({reason})",
            file=sys.stderr,
        )
        return plain
    return fused


def ops_of(policy: Policy) -> ModuleType:
    """Return the module with the operations of the policy's decode step."""
    return pieces(policy.device) if policy.kernels.triton else plain


def uses_graphs(policy: Policy) -> bool:
    """Return whether the policy's decode step is captured and replayed."""
    return policy.kernels.graphs and policy.device.type == "cuda"


def step(weights: Weights, rotary: Rotary, state: State, window: int, ops: Any = plain) -> Tensor:
    """Return logits [n,V] after ``state.ids`` and advance ``state`` by one token.

    Args:
        window: number of columns that attention may read; greater than any row's position.
        ops: a module with the functions of `grpo.qwen3_5.decode_ops`.
    """
    do, epsilon = ops, weights.epsilon
    x = embedding(state.ids, weights.embedding)
    state.unseen.scatter_(1, state.positions[:, None], 0.0)
    for layer, memory in zip(weights.layers, state.layers, strict=True):
        h, mixer = do.norm(x, layer.mixer_norm, epsilon), layer.mixer
        if isinstance(mixer, Attention):
            mixed = do.attend(*_products(h, mixer.qkv), mixer, memory, state, rotary, window, epsilon)
        else:
            qkv, z, b, a = _products(h, mixer.qkvzba)
            mixed = do.remember(memory, do.convolve(memory, qkv, mixer.conv), a, b, z, mixer, epsilon)
        _add(x, mixed, mixer.out)
        _add(x, do.swiglu(*_products(do.norm(x, layer.mlp_norm, epsilon), layer.gate_up)), layer.down)
    state.positions.add_(1)
    return head_logits(do.norm(x, weights.norm, epsilon), weights.head)


def _products(x: Tensor, joint: Joint) -> list[Tensor]:
    """Return the output [n,o] of each layer."""
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


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what ``run`` launches as a CUDA graph; return its replay and the tensor that each replay writes.

    `torch.cuda.graph` would synchronise and empty the allocator's cache first, and each update would allocate its tens
    of gigabytes anew. Nothing here waits for the device. Other threads may use CUDA meanwhile.
    """
    device = torch.cuda.current_device()
    if torch.cuda.mem_get_info(device)[0] < CAPTURE_BYTES:
        torch.cuda.empty_cache()
    graph, latest = torch.cuda.CUDAGraph(), _latest_graphs.get(device)
    current, side = torch.cuda.current_stream(), _capture_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        graph.capture_begin(pool=latest.pool() if latest else None, capture_error_mode="thread_local")
        try:
            out = run()
        except BaseException:
            with suppress(RuntimeError):  # the first error says more
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(side)
    _latest_graphs[device] = graph
    return graph.replay, out


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return the stream for all captures: cuBLAS keeps a workspace for each stream it has used."""
    return torch.cuda.Stream(device)


class GraphDecoder:
    """The decoder that calls `step`. With ``graphs``, the first step for a number of rows runs eagerly, the second is
    captured, and the graph is replayed from then on."""

    def __init__(
        self, weights: Weights, rotary: Rotary, state: State, longest: int, ops: Any = plain, graphs: bool = False
    ) -> None:
        self._weights, self._rotary, self._state = weights, rotary, state
        self.ops, self._graphs = ops, graphs
        self._columns = longest
        self._warm = False
        self._captured: tuple[Callable[[], None], Tensor] | None = None

    def step(self, ids: Tensor) -> Tensor:
        """Append one token per row; return the next logits [n,V], which the next step overwrites."""
        self._state.ids.copy_(ids)
        self._columns += 1
        if self._graphs and self._warm:
            return self._replayed()
        self._warm = True
        return self._eager()

    @property
    def state(self) -> State:
        """The buffers of the current rows."""
        return self._state

    def keep(self, slots: Tensor) -> None:
        """Continue with the rows in ``slots``, moved to the front of the same buffers."""
        self._state = front(self._state, slots, self._columns)
        self._warm, self._captured = False, None

    def _window(self) -> int:
        width = self._state.unseen.shape[1]
        return width if self._graphs or self._state.ids.is_cuda else min(width, -(-self._columns // WINDOW) * WINDOW)

    def _eager(self) -> Tensor:
        return step(self._weights, self._rotary, self._state, self._window(), self.ops)

    def _replayed(self) -> Tensor:
        if self._captured is None:
            self._captured = capture(self._eager)
        replay, logits = self._captured
        replay()
        return logits


def start_own(policy: Policy, prompts: Sequence[Prompt], owners: Sequence[int], budget: int) -> tuple[Tensor, Decoder]:
    """Return logits [n,V] of the first token and the decoder for the next.

    Each prompt is prefilled once, together with the prompts of the same padded width, and its state is copied to its
    rows.
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
    rotary = rotary_table(policy, longest + budget)
    decoder = GraphDecoder(weights, rotary, state, longest, ops_of(policy), uses_graphs(policy))
    return head_logits(hidden, weights.head), decoder


def blank(policy: Policy, weights: Weights, rows: int, columns: int) -> State:
    """Allocate empty buffers for so many rows and at least so many columns."""
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
    """Copy the prefilled state of prompt ``member``, whose last ``length`` columns are real, into ``rows`` [m]."""
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
    """Move the rows in ``slots`` [m] to the front of the buffers and return their state; ``columns`` are in use."""
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
    """Return cos and sin of positions 0 .. positions - 1 in fp32, as the model computes them."""
    at = torch.arange(positions, device=policy.device).expand(3, 1, -1)
    cos, sin = policy.decoder.rotary_emb(torch.zeros(1, device=policy.device), at)
    half = cos.shape[-1] // 2
    return Rotary(cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], 1))
