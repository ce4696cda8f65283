"""The pieces of a decode step as Triton kernels: what lies between two matrix products is one launch.

A captured step replays its kernels one after the other, and the smallest takes about as long as reading ten megabytes
would. In plain torch a step of Qwen3.5-9B has 1,574 operations, of which 409 are products; with these it has 581. Each
function computes what its namesake in `grpo.qwen3_5.decode_ops` does, in fp32 between reading and writing. The tests
hold them together in triton's interpreter, and compile them for cards that are not there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.qwen3_5.decode_state import KeyValues, Recurrent, Rotary, State
from grpo.qwen3_5.weights import Attention, GatedDelta

BLOCK = 1024
"""Numbers a program of an elementwise kernel takes."""
COLUMNS = 32
"""Keys that attention takes at a time: with two such blocks under way, in fp32 too, it fits the shared memory of small
cards (99 KB)."""
SPLIT = 256
"""Columns of the buffers that one program of attention reads at most, while they are few enough for `MOST_SPLITS`."""
MOST_SPLITS = 16


def norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + ε) · scale, [n,H]."""
    n, width = x.shape
    out = torch.empty_like(x)
    _norm[(n,)](x, scale, out, epsilon, width, triton.next_power_of_2(width), num_warps=8)
    return out


@triton.jit
def _norm(x, scale, out, epsilon, WIDTH: tl.constexpr, UP: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, UP)
    inside = i < WIDTH
    value = tl.load(x + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    rho = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + epsilon)
    value = value * rho * tl.load(scale + i, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + i, value.to(out.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, [n,I]; rows may lie apart."""
    n, width = gate.shape
    out = torch.empty(n, width, dtype=gate.dtype, device=gate.device)
    _swiglu[(n, triton.cdiv(width, BLOCK))](gate, up, out, gate.stride(0), up.stride(0), width, BLOCK)
    return out


@triton.jit
def _swiglu(gate, up, out, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    g = tl.load(gate + row * gate_stride + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


def convolve(memory: Recurrent, qkv: Tensor, taps: Tensor) -> Tensor:
    """silu of the causal convolution, [n,C]; the latest input enters ``memory.conv``."""
    n, width = qkv.shape
    out = torch.empty(n, width, dtype=qkv.dtype, device=qkv.device)
    _convolve[(n, triton.cdiv(width, BLOCK))](memory.conv, qkv, taps, out, qkv.stride(0), len(taps), width, BLOCK)
    return out


@triton.jit
def _convolve(conv, qkv, taps, out, qkv_stride, TAPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    new = tl.load(qkv + row * qkv_stride + i, mask=inside, other=0.0)
    total = new.to(tl.float32) * tl.load(taps + (TAPS - 1) * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    at = conv + row * (TAPS - 1) * WIDTH + i
    for j in tl.static_range(TAPS - 1):
        old = tl.load(at + j * WIDTH, mask=inside, other=0.0)
        total += old.to(tl.float32) * tl.load(taps + j * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(at + (j - 1) * WIDTH, old, mask=inside)
    if TAPS > 1:
        tl.store(at + (TAPS - 2) * WIDTH, new, mask=inside)
    tl.store(out + row * WIDTH + i, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=inside)


def remember(
    memory: Recurrent, mixed: Tensor, a: Tensor, b: Tensor, z: Tensor, mixer: GatedDelta, epsilon: float
) -> Tensor:
    """One token of the gated delta rule, normed by head and gated by z, [n,V·d_v]; the state is read once and written
    once."""
    n, heads, d_k, width = memory.memory.shape
    value_heads = len(mixer.rate)
    d_v = width * heads // value_heads
    out = torch.empty(n, value_heads * d_v, dtype=z.dtype, device=z.device)
    _remember[(n, value_heads)](
        memory.memory, mixed, a, b, z, mixer.rate, mixer.dt_bias, mixer.norm, out,
        mixed.stride(0), a.stride(0), b.stride(0), z.stride(0), d_k**-0.5, epsilon,
        heads, value_heads, d_k, d_v, triton.next_power_of_2(d_k), triton.next_power_of_2(d_v), num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _remember(  # type: ignore[no-untyped-def]
    state, mixed, a, b, z, rate, dt_bias, norm, out,
    mixed_stride, a_stride, b_stride, z_stride, scale, epsilon,
    HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    D_K_UP: tl.constexpr, D_V_UP: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, D_K_UP), tl.arange(0, D_V_UP)
    in_k, in_v = i < D_K, j < D_V
    REPEAT: tl.constexpr = VALUE_HEADS // HEADS
    key_head = head // REPEAT

    x = mixed + row * mixed_stride
    q = tl.load(x + key_head * D_K + i, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(x + (HEADS + key_head) * D_K + i, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(x + 2 * HEADS * D_K + head * D_V + j, mask=in_v, other=0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    open_ = tl.load(a + row * a_stride + head).to(tl.float32) + tl.load(dt_bias + head)
    softplus = tl.where(open_ > 20.0, open_, tl.log(1.0 + tl.exp(tl.minimum(open_, 20.0))))
    alpha = tl.exp(-tl.load(rate + head) * softplus)
    beta = tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))

    at = ((row * HEADS + key_head) * D_K + i[:, None]) * (REPEAT * D_V) + (head % REPEAT) * D_V + j[None, :]
    inside = in_k[:, None] & in_v[None, :]
    s = tl.load(state + at, mask=inside, other=0.0) * alpha
    delta = beta * (v - tl.sum(s * k[:, None], 0))
    s += k[:, None] * delta[None, :]
    tl.store(state + at, s, mask=inside)

    read = tl.sum(s * q[:, None], 0)
    read *= tl.rsqrt(tl.sum(read * read, 0) / D_V + epsilon) * tl.load(norm + j, mask=in_v, other=0.0)
    gate = tl.load(z + row * z_stride + head * D_V + j, mask=in_v, other=0.0).to(tl.float32)
    value = read * gate * tl.sigmoid(gate)
    tl.store(out + (row * VALUE_HEADS + head) * D_V + j, value.to(out.dtype.element_ty), mask=in_v)


def attend(
    queries_and_gates: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Attention,
    memory: KeyValues,
    state: State,
    rotary: Rotary,
    window: int,
    epsilon: float,
) -> Tensor:
    """What gated full attention reads, [n,heads·d]; this token's key and value are written first. Only the columns that
    a row has written are read, by up to `MOST_SPLITS` programs at once."""
    n, kv_heads, _, d = memory.keys.shape
    heads = len(mixer.norm) - kv_heads
    share, up = heads // kv_heads, max(16, triton.next_power_of_2(d))  # of a matrix product, at least 16
    queries = torch.empty(n, heads, d, dtype=k.dtype, device=k.device)
    _turn[(n, heads + kv_heads)](
        queries_and_gates, k, v, mixer.norm, rotary.cos, rotary.sin, state.positions, queries, memory.keys,
        memory.values, queries_and_gates.stride(0), k.stride(0), v.stride(0), epsilon, memory.keys.stride(0),
        memory.keys.stride(1), heads, kv_heads, d, rotary.cos.shape[1], up,
    )  # fmt: skip

    splits = max(1, min(MOST_SPLITS, triton.cdiv(window, SPLIT)))
    parts = torch.empty(n, heads, splits, d, dtype=torch.float32, device=k.device)
    tops, sums = torch.empty(2, n, heads, splits, dtype=torch.float32, device=k.device)
    _attend[(n, kv_heads, splits)](
        queries, memory.keys, memory.values, state.positions, parts, tops, sums, memory.keys.stride(0),
        memory.keys.stride(1), share, d, max(16, triton.next_power_of_2(share)), up, splits, COLUMNS,
        "ieee" if k.dtype == torch.float32 else "tf32",
        num_warps=8 if k.dtype == torch.float32 else 4,  # with 4, ptxas spills 5.8 KB a thread on sm_100 and sm_103
        num_stages=2,
    )  # fmt: skip

    out = torch.empty(n, heads * d, dtype=k.dtype, device=k.device)
    _gather[(n, heads)](
        parts, tops, sums, queries_and_gates, out, queries_and_gates.stride(0), heads, d, up, splits,
        triton.next_power_of_2(splits),
    )  # fmt: skip
    return out


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    queries_and_gates, k, v, norm, cos, sin, positions, queries, keys, values,
    q_stride, k_stride, v_stride, epsilon, row_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Queries and keys: normed by head, their first R numbers turned by the position."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, UP)
    inside, turned = i < D, i < R
    position = tl.load(positions + row)
    group = head - HEADS
    if head < HEADS:
        x = queries_and_gates + row * q_stride + head * 2 * D
        to = queries + (row * HEADS + head) * D
    else:
        x = k + row * k_stride + group * D
        to = keys + row * row_stride + group * head_stride + position * D
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    rho = tl.rsqrt(tl.sum(value * value, 0) / D + epsilon)
    value *= rho * tl.load(norm + head * D + i, mask=inside, other=0.0)
    across = (i + R // 2) % R
    other = tl.load(x + across, mask=turned, other=0.0).to(tl.float32)
    other *= rho * tl.load(norm + head * D + across, mask=turned, other=0.0)
    c = tl.load(cos + position * R + i, mask=turned, other=1.0)
    s = tl.load(sin + position * R + i, mask=turned, other=0.0)
    tl.store(to + i, (value * c + other * s).to(to.dtype.element_ty), mask=inside)
    if head >= HEADS:
        said = tl.load(v + row * v_stride + group * D + i, mask=inside, other=0.0)
        tl.store(values + row * row_stride + group * head_stride + position * D + i, said, mask=inside)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries, keys, values, positions, parts, tops, sums, row_stride, head_stride,
    SHARE: tl.constexpr, D: tl.constexpr, SHARE_UP: tl.constexpr, UP: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over this program's columns, not yet divided: Σ e^(s - top)·value, top, and Σ e^(s - top)."""
    row, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    r, i, c = tl.arange(0, SHARE_UP), tl.arange(0, UP), tl.arange(0, COLUMNS)
    head = (row * tl.num_programs(1) + group) * SHARE + r
    mine = (r[:, None] < SHARE) & (i[None, :] < D)
    q = tl.load(queries + head[:, None] * D + i[None, :], mask=mine, other=0.0)
    seen = tl.load(positions + row).to(tl.int32) + 1
    each = tl.cdiv(tl.cdiv(seen, SPLITS), COLUMNS) * COLUMNS
    first = split * each
    last = tl.minimum(first + each, seen)
    base = row * row_stride + group * head_stride
    top = tl.full((SHARE_UP,), float("-inf"), tl.float32)
    total = tl.zeros((SHARE_UP,), tl.float32)
    read = tl.zeros((SHARE_UP, UP), tl.float32)
    for start in tl.range(first, last, COLUMNS):
        at = start + c
        there = (at[:, None] < last) & (i[None, :] < D)
        place = base + at[:, None] * D + i[None, :]
        key = tl.load(keys + place, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        scores = tl.where(at[None, :] < last, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        value = tl.load(values + place, mask=there, other=0.0)
        read = read * fade[:, None] + tl.dot(shares.to(value.dtype), value, input_precision=PRECISION)
        total = total * fade + tl.sum(shares, 1)
        top = higher
    tl.store(parts + (head[:, None] * SPLITS + split) * D + i[None, :], read, mask=mine)
    tl.store(tops + head * SPLITS + split, top, mask=r < SHARE)
    tl.store(sums + head * SPLITS + split, total, mask=r < SHARE)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    parts, tops, sums, queries_and_gates, out, gate_stride,
    HEADS: tl.constexpr, D: tl.constexpr, UP: tl.constexpr, SPLITS: tl.constexpr, SPLITS_UP: tl.constexpr,
):  # fmt: skip
    """The programs' parts together, and the gate."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, p = tl.arange(0, UP), tl.arange(0, SPLITS_UP)
    here = (row * HEADS + head) * SPLITS + p
    inside = i < D
    top = tl.load(tops + here, mask=p < SPLITS, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sums + here, mask=p < SPLITS, other=0.0), 0)
    there = (p[:, None] < SPLITS) & inside[None, :]
    part = tl.load(parts + here[:, None] * D + i[None, :], mask=there, other=0.0)
    value = tl.sum(part * weight[:, None], 0) / total
    gate = tl.load(queries_and_gates + row * gate_stride + (head * 2 + 1) * D + i, mask=inside, other=0.0)
    value *= tl.sigmoid(gate.to(tl.float32))
    tl.store(out + (row * HEADS + head) * D + i, value.to(out.dtype.element_ty), mask=inside)
