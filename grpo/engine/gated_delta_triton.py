"""The gated delta step as one kernel: the state is read once and written once. See `grpo.engine.gated_delta`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""Columns of a value head's state that one program holds: d_k · BLOCK fp32 numbers in registers."""


def gated_delta_step_triton(
    state: Tensor, mixed: Tensor, a: Tensor, b: Tensor, rate: Tensor, dt_bias: Tensor
) -> Tensor:
    """`grpo.engine.gated_delta.gated_delta_step` on CUDA, or under TRITON_INTERPRET=1 on a CPU.

    Any d_k and d_v; the rows of ``mixed``, ``a`` and ``b`` may lie apart, as slices of one wide product do.
    """
    n, heads, d_k, width = state.shape
    value_heads = len(rate)
    d_v = width * heads // value_heads
    out = torch.empty(n, value_heads, d_v, dtype=torch.float32, device=state.device)
    _step[(n, value_heads, triton.cdiv(d_v, BLOCK))](
        state, mixed, a, b, rate, dt_bias, out,
        mixed.stride(0), a.stride(0), b.stride(0), d_k**-0.5,
        heads, value_heads, d_k, d_v, triton.next_power_of_2(d_k), BLOCK,
    )  # fmt: skip
    return out


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    state, mixed, a, b, rate, dt_bias, out,
    mixed_stride, a_stride, b_stride, scale,
    HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    D_K_UP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, D_K_UP)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    in_k, in_v = i < D_K, j < D_V
    REPEAT: tl.constexpr = VALUE_HEADS // HEADS
    key_head = head // REPEAT

    x = mixed + row * mixed_stride
    q = tl.load(x + key_head * D_K + i, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(x + (HEADS + key_head) * D_K + i, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(x + 2 * HEADS * D_K + head * D_V + j, mask=in_v, other=0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    z = tl.load(a + row * a_stride + head).to(tl.float32) + tl.load(dt_bias + head)
    softplus = tl.where(z > 20.0, z, tl.log(1.0 + tl.exp(tl.minimum(z, 20.0))))
    alpha = tl.exp(-tl.load(rate + head) * softplus)
    beta = tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))

    at = ((row * HEADS + key_head) * D_K + i[:, None]) * (REPEAT * D_V) + (head % REPEAT) * D_V + j[None, :]
    inside = in_k[:, None] & in_v[None, :]
    s = tl.load(state + at, mask=inside, other=0.0) * alpha
    delta = beta * (v - tl.sum(s * k[:, None], 0))
    s += k[:, None] * delta[None, :]
    tl.store(state + at, s, mask=inside)
    tl.store(out + (row * VALUE_HEADS + head) * D_V + j, tl.sum(s * q[:, None], 0), mask=in_v)
