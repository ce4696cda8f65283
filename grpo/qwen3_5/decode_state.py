"""The state of decoded rows: buffers that never move, so that a CUDA graph can replay the step that updates them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Keys and values of a full-attention layer, [n, kv_heads, S, d]; column = position."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Recurrent:
    """State of a gated-delta layer: the latest inputs of the convolution [n, kernel - 1, channels], oldest first, and
    the memory [n,K,d_k,R·d_v] fp32."""

    conv: Tensor
    memory: Tensor


@dataclass(frozen=True, slots=True)
class State:
    """The state of n rows. The buffers do not move while rows are decoded."""

    ids: Tensor
    """[n], the next input tokens."""
    positions: Tensor
    """[n], the positions of ``ids``."""
    unseen: Tensor
    """[n,S] fp32: 0 at columns that the row has written, -inf beyond."""
    layers: tuple[KeyValues | Recurrent, ...]


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin [positions, r] for the first r numbers of a head; the first half of sin is negated."""

    cos: Tensor
    sin: Tensor
