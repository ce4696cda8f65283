"""The operations of a decode step between two matrix products, in plain PyTorch on any device."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from grpo.qwen3_5.decode_state import KeyValues, Recurrent, Rotary, State
from grpo.qwen3_5.gated_delta_step import gated_delta_step
from grpo.qwen3_5.weights import Attention, GatedDelta


def norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + ε) · scale, [n,H], computed in fp32."""
    return rms_norm(x.float(), scale.shape, scale, epsilon).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, [n,I]."""
    return silu(gate).mul_(up)


def convolve(memory: Recurrent, qkv: Tensor, taps: Tensor) -> Tensor:
    """Return silu of the causal convolution, [n,C]; append the latest input to ``memory.conv``.

    Args:
        qkv: [n,C], the latest input.
        taps: [k,C].
    """
    inputs = torch.cat((memory.conv, qkv[:, None]), 1)
    memory.conv.copy_(inputs[:, 1:])
    return silu((inputs * taps).sum(1))


def remember(
    memory: Recurrent, mixed: Tensor, a: Tensor, b: Tensor, z: Tensor, mixer: GatedDelta, epsilon: float
) -> Tensor:
    """Apply one token of the gated delta rule to ``memory.memory``; return its output, normalized per head and gated by
    z, [n,V·d_v].

    Args:
        mixed: [n, 2·K·d_k + V·d_v], queries, keys and values.
        a, b: [n,V], the inputs of the decay and of β.
        z: [n,V·d_v].
    """
    out = gated_delta_step(memory.memory, mixed, a, b, mixer.rate, mixer.dt_bias)
    return rms_norm(out, out.shape[-1:], mixer.norm, epsilon).view(len(z), -1).mul_(silu(z.float())).to(z.dtype)


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
    """Write the key and value of this token, then return the output of gated full attention, [n,heads·d].

    Args:
        queries_and_gates: [n, heads·2·d], for each head its query, then its gate.
        k, v: [n, kv_heads·d].
        window: number of columns that attention reads; greater than any row's position.
    """
    n, kv_heads, d = len(k), mixer.kv_heads, mixer.norm.shape[1]
    q, gate = queries_and_gates.view(n, -1, 2, d).unbind(2)
    heads = rms_norm(torch.cat((q, k.view(n, kv_heads, d)), 1).float(), (d,), None, epsilon).mul_(mixer.norm)
    cos, sin = rotary.cos[state.positions][:, None], rotary.sin[state.positions][:, None]
    part = heads[..., : cos.shape[-1]]
    part.copy_(torch.addcmul(part * cos, part.roll(part.shape[-1] // 2, -1), sin))
    heads = heads.to(k.dtype)

    at = state.positions[:, None, None, None].expand(n, kv_heads, 1, d)
    memory.keys.scatter_(2, at, heads[:, -kv_heads:, None])
    memory.values.scatter_(2, at, v.view(n, kv_heads, 1, d))
    keys, values = memory.keys[:, :, :window].flatten(0, 1), memory.values[:, :, :window].flatten(0, 1)
    queries = heads[:, :-kv_heads].reshape(n * kv_heads, -1, d)
    scores = torch.bmm(queries, keys.transpose(1, 2)).float().view(n, -1, window).add_(state.unseen[:, None, :window])
    shares = scores.softmax(-1).to(k.dtype).view(n * kv_heads, -1, window)
    return torch.bmm(shares, values).view(n, -1, d).mul_(gate.sigmoid()).view(n, -1)
