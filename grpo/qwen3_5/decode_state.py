"""What decoded rows know: buffers that never move, so that a CUDA graph can replay the step that updates them."""

from dataclasses import dataclass

from torch import Tensor


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
