"""One token of the gated delta rule, the linear attention of Qwen3.5, on a state that is updated where it lies.

With a key k and a query q of length 1 (q then divided by √d_k), a value v, a decay α = exp(-rate·softplus(a + dt_bias))
and a step width β = sigmoid(b), each value head does

    S ← αS,   δ = β(v - Sᵀk),   S ← S + k δᵀ,   o = Sᵀq

(Yang et al., Gated Delta Networks, arXiv 2412.06464). Transformers' fallback passes over S fourteen times. Here

    [Sᵀk, Sᵀq] in one product,   δ = β(v - αSᵀk),   o = αSᵀq + (k·q)δ,   S ← αS + k δᵀ

is five passes in plain torch. The kernel of `grpo.qwen3_5.decode_ops_triton` makes two.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

EPSILON = 1e-6
"""Under the root of the length of k and q: what the model was trained with."""


def gated_delta_step(state: Tensor, mixed: Tensor, a: Tensor, b: Tensor, rate: Tensor, dt_bias: Tensor) -> Tensor:
    """The output [n,V,d_v] of V value heads for one token of n rows, in fp32; ``state`` becomes the new state.

    Each of the K key heads serves R = V/K consecutive value heads, whose states lie side by side.

    Args:
        state: [n,K,d_k,R·d_v] fp32, contiguous; overwritten.
        mixed: [n, 2·K·d_k + V·d_v], queries, keys and values after the convolution, any float dtype.
        a, b: [n,V], the inputs of the decay and of β.
        rate: [V] fp32 > 0, exp(A_log).
        dt_bias: [V] fp32.

    The state is 8, q = k = 1, v = 6, α = exp(-softplus(0)) = ½, β = σ(0) = ½. So δ = ½(6 - 4) and S = 4 + 1:

    >>> state, zero = torch.full((1, 1, 1, 1), 8.0), torch.zeros(1, 1)
    >>> out = gated_delta_step(state, torch.tensor([[1.0, 1.0, 6.0]]), zero, zero, torch.ones(1), torch.zeros(1))
    >>> round(out.item(), 4), round(state.item(), 4)
    (5.0, 5.0)
    """
    n, heads, d_k, width = state.shape
    rows, keys, value_heads = n * heads, 2 * heads * d_k, len(rate)
    both = mixed[:, :keys].float().view(n, 2, heads, d_k)
    unit = both * (torch.linalg.vecdot(both, both) + EPSILON).rsqrt_()[..., None]
    pair = unit.transpose(1, 2).reshape(rows, 2, d_k)
    q, k = pair[:, 0], pair[:, 1]
    v = mixed[:, keys:].float().reshape(rows, width)
    decay = torch.exp(softplus(a.float() + dt_bias).mul_(-rate))
    gates = torch.stack((decay, b.float().sigmoid()))[..., None].expand(2, n, value_heads, width * heads // value_heads)
    alpha, beta = gates.reshape(2, rows, width)

    flat = state.view(rows, d_k, width)
    read = torch.bmm(pair, flat).mul_(alpha[:, None])
    delta = (v - read[:, 1]).mul_(beta)
    out = torch.addcmul(read[:, 0], torch.linalg.vecdot(q, k)[:, None], delta).mul_(d_k**-0.5)
    flat.mul_(alpha[:, None]).addcmul_(k[:, :, None], delta[:, None])
    return out.view(n, value_heads, -1)
