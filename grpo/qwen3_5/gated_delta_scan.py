"""The gated delta rule over whole sequences, a chunk of C tokens at a time, from a given state: what training needs.

The rule for one token is in `grpo.qwen3_5.gated_delta_step`. Over a chunk, with γ_t the decay from the chunk's start to
t, every new value δ is linear in the ones before it (Yang et al., arXiv 2412.06464, the WY form):

    (I + L)·δ = β(v - γ·Sᵀk),   L_ij = β_i (k_i·k_j) γ_i/γ_j  below the diagonal,
    o_i = γ_i·Sᵀq_i + Σ_{j ≤ i} (q_i·k_j) γ_i/γ_j δ_j,   S ← γ_C·S + Σ_j γ_C/γ_j k_j δ_jᵀ.

The inverse of I + L is found by halves, and its derivative from itself. Key products are made once for the R value
heads that a key head serves.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, softplus

from grpo.qwen3_5.gated_delta_step import EPSILON
from grpo.qwen3_5.train_ops import wide

CHUNK = {"cpu": 32, "cuda": 64}
"""Tokens a chunk: work grows with it, and the number of steps one after the other falls."""

INVERSE_BASE = {"cpu": 1, "cuda": 16}
"""Size of the blocks that are inverted by substitution, column after column in place, before the inverse grows by
halves. On CUDA those halves would begin with 65,536 products of 2 × 2 (8 rows of 1,024 tokens, 32 heads). On a CPU 8
would be faster too, but the inverse is 3 % of an update, and recorded runs would no longer be repeated to the bit."""

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def gated_delta_scan(
    mixed: Tensor,
    a: Tensor,
    b: Tensor,
    rate: Tensor,
    dt_bias: Tensor,
    heads: tuple[int, int],
    state: Tensor | None,
    kind: str = "plain",
) -> tuple[Tensor, Tensor]:
    """Outputs [n,T,V,d_v] and the state [n,V,d_k,d_v] after T tokens of n rows, both fp32 (fp64 for fp64).

    Args:
        mixed: [n,T, 2·K·d_k + V·d_v], queries, keys and values after the convolution.
        a, b: [n,T,V], the inputs of the decay and of β.
        rate: [V], exp(A_log); dt_bias: [V].
        heads: (K, d_k); each key head serves R = V/K consecutive value heads.
        state: [n,V,d_k,d_v]; None is zeros.
        kind: a name in `SCANS`.

    A column of zeros before the first token changes nothing; columns after the last change only the state.
    """
    key_heads, d_k = heads
    value_heads = len(rate)
    q, k, v = wide(mixed).split([key_heads * d_k, key_heads * d_k, mixed.shape[-1] - 2 * key_heads * d_k], -1)
    q, k = (_unit(x.unflatten(-1, (key_heads, d_k))) for x in (q, k))
    v = v.unflatten(-1, (value_heads, -1))
    decay = -rate * softplus(wide(a) + dt_bias)
    return SCANS[kind](q * d_k**-0.5, k, v, decay, wide(b).sigmoid(), state)


def _unit(x: Tensor) -> Tensor:
    return x * (torch.linalg.vecdot(x, x) + EPSILON).rsqrt().unsqueeze(-1)


def _fla_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], dim=2) for x in (q, k))
    low = torch.bfloat16  # its kernels keep their sums in fp32, and take no fp32 operands at full speed
    out, last = chunk_gated_delta_rule(
        q.to(low), k.to(low), v.to(low), g=decay, beta=beta, scale=1.0, initial_state=state, output_final_state=True
    )
    return out.float(), last


def chunked_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [n,T,V,d_v] and last state [n,V,d_k,d_v] in plain torch, on any device.

    Args:
        q, k: [n,T,K,d_k], of the lengths that are to enter the products.
        v: [n,T,V,d_v]; decay: [n,T,V] ≤ 0, log α; beta: [n,T,V].
        state: [n,V,d_k,d_v] or None.
        chunk: C, a power of two; None takes `CHUNK`'s.
    """
    n, width, key_heads, d_k = k.shape
    value_heads, d_v = v.shape[2:]
    share = value_heads // key_heads
    size = chunk or CHUNK[k.device.type]
    q, k = (_chunks(x, size)[:, :, None] for x in (q, k))  # [n,K,1,c,C,d_k]
    v = _chunks(v, size).unflatten(1, (key_heads, share))  # [n,K,R,c,C,d_v]
    decay, beta = (_chunks(x.unsqueeze(-1), size).unflatten(1, (key_heads, share)) for x in (decay, beta))

    total = decay.cumsum(4)  # log γ, [n,K,R,c,C,1]
    later = torch.ones(size, size, dtype=torch.bool, device=k.device).triu_(1)
    between = (total - total.transpose(4, 5)).masked_fill(later, float("-inf")).exp()  # γ_i/γ_j for j ≤ i, else 0
    inverse = unit_lower_inverse((k @ k.transpose(4, 5)) * between * beta)
    gamma = total.exp()
    fresh = inverse @ (v * beta)
    reads = inverse @ (k * (gamma * beta))
    inside = (q @ k.transpose(4, 5)) * between
    asks = q * gamma
    writes = (k * (total[..., -1:, :] - total).exp()).transpose(4, 5)
    kept = gamma[..., -1:, :]

    memory = k.new_zeros(n, key_heads, share, d_k, d_v) if state is None else state
    given = (fresh, reads, inside, asks, writes, kept, memory.reshape(n, key_heads, share, d_k, d_v))
    out, last = _Recurrence.apply(*given)
    out = out.flatten(3, 4)[:, :, :, :width]
    return out.flatten(1, 2).transpose(1, 2), last.flatten(1, 2)


SCANS: dict[str, Scan] = {"plain": chunked_scan, "fla": _fla_scan}
"""In plain torch; flash-linear-attention's kernels, on CUDA alone."""


class _Recurrence(torch.autograd.Function):
    """From chunk to chunk, the one part that cannot be done at once for all, [n,K,R,c,·,·] each:

        δ_i = fresh_i - reads_i·S,   out_i = asks_i·S + inside_i·δ_i,   S ← kept_i·S + writes_i·δ_i.

    Backward it is the same kind of loop over G = ∂S; with the S, δ and G of all chunks at hand, the rest is one product
    each. Autograd through the loop would fill a gradient of the whole length for each chunk: quadratic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fresh: Tensor,
        reads: Tensor,
        inside: Tensor,
        asks: Tensor,
        writes: Tensor,
        kept: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        memory, memories, deltas = state, [], []
        for fresh_i, reads_i, writes_i, kept_i in zip(
            *(x.unbind(3) for x in (fresh, reads, writes, kept)), strict=True
        ):
            memories.append(memory)
            deltas.append(fresh_i - reads_i @ memory)
            memory = (memory * kept_i).add_(writes_i @ deltas[-1])
        states, delta = torch.stack(memories, 3), torch.stack(deltas, 3)
        ctx.save_for_backward(reads, inside, asks, writes, kept, states, delta)
        return (asks @ states).add_(inside @ delta), memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        reads, inside, asks, writes, kept, states, delta = ctx.saved_tensors
        into_delta, into_state = _t(inside) @ grad_out, _t(asks) @ grad_out
        grad, after, deltas = grad_last, [], []
        chunks = zip(*(x.unbind(3) for x in (into_delta, into_state, reads, writes, kept)), strict=True)
        for into_delta_i, into_state_i, reads_i, writes_i, kept_i in reversed(list(chunks)):
            after.append(grad)
            deltas.append(_t(writes_i) @ grad + into_delta_i)
            grad = (grad * kept_i).add_(into_state_i).sub_(_t(reads_i) @ deltas[-1])
        grad_after, grad_delta = torch.stack(after[::-1], 3), torch.stack(deltas[::-1], 3)
        return (
            grad_delta,
            (grad_delta @ _t(states)).neg_(),
            grad_out @ _t(delta),
            grad_out @ _t(states),
            grad_after @ _t(delta),
            (grad_after * states).sum((-2, -1), keepdim=True),
            grad,
        )


def _t(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


def _chunks(x: Tensor, size: int) -> Tensor:
    """[n,T,h,d] → [n,h,c,C,d], zeros at the end."""
    n, width, heads, d = x.shape
    x = pad(x, (0, 0, 0, 0, 0, -width % size))
    return x.transpose(1, 2).reshape(n, heads, -1, size, d)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ of what stands below the diagonal of ``lower`` [..., C, C]; C a power of two.

    Blocks of `INVERSE_BASE` by substitution, then by halves: [[P, 0], [Q, R]]⁻¹ = [[P⁻¹, 0], [-R⁻¹QP⁻¹, R⁻¹]]. Both are
    as exact as substitution. (The product (I - L)(I + L²)(I + L⁴)… is not: with equal keys its terms grow like
    binomials and cancel.)

    >>> unit_lower_inverse(torch.tensor([[9.0, 9.0], [2.0, 9.0]]))
    tensor([[ 1.,  0.],
            [-2.,  1.]])
    """
    return cast(Tensor, _UnitLowerInverse.apply(lower))


class _UnitLowerInverse(torch.autograd.Function):
    """∂L = -(Tᵀ ∂T Tᵀ) below the diagonal, T the inverse."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        inverse = torch.eye(size, dtype=lower.dtype, device=lower.device).expand(lower.shape).contiguous()
        half = min(INVERSE_BASE[lower.device.type], size)
        blocks, coefficients = _diagonal_blocks(inverse, half), _diagonal_blocks(lower, half)
        for j in range(half - 1):  # row i > j: X_i -= L_ij X_j, whose first j + 1 entries alone are not zero
            row, column = blocks[..., j : j + 1, : j + 1], coefficients[..., j + 1 :, j : j + 1]
            blocks[..., j + 1 :, : j + 1].addcmul_(column, row, value=-1)
        while half < size:
            blocks = _diagonal_blocks(inverse, 2 * half)
            corner = _diagonal_blocks(lower, 2 * half)[..., half:, :half]
            top, bottom = blocks[..., :half, :half], blocks[..., half:, half:]
            blocks[..., half:, :half] = -(corner if half == 1 else bottom @ corner @ top)
            half *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        t = inverse.transpose(-1, -2)
        return (t @ grad @ t).tril_(-1).neg_()


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """A view of the blocks on the diagonal, [..., C/size, size, size]."""
    count = matrix.shape[-1] // size
    rows, columns = matrix.stride()[-2:]
    return matrix.as_strided(
        (*matrix.shape[:-2], count, size, size),
        (*matrix.stride()[:-2], size * (rows + columns), rows, columns),
        matrix.storage_offset(),
    )
