"""The weights that a decode step of Qwen3.5 reads: the tensors of the base, and beside them the unmerged adapter.

Merging an adapter into bfloat16 weights would round most of a small update away, and sampler and trainer would be
different policies. Here y = x·Wᵀ + (x·Aᵀ)·(s·B)ᵀ, with A and s·B cast from their fp32 masters to the base's dtype once
per rollout. The base is never modified.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.policy.policy import Policy

FUSE_BELOW = 16 << 20
"""Bytes. Smaller layers with the same input share one product, on a copy of their weights. A larger layer fills the
device by itself, and a copy would take memory that the cache needs."""


@dataclass(frozen=True, slots=True)
class Joint:
    """Linear layers with the same input, including their adapters.

    The small layers and x·Aᵀ of all adapters are columns of one product; each large layer has its own product.
    """

    fused: Tensor
    """[i, F+R]: Wᵀ of the small layers, then Aᵀ of every adapter."""
    width: int
    """F."""
    block: Tensor | None
    """[R,F], (s·B)ᵀ of the small layers on the diagonal; None if none of them is adapted."""
    spans: tuple[slice | None, ...]
    """The columns of ``fused`` of each layer; None for a layer with its own product."""
    alone: tuple[Tensor, ...]
    """[i,o] of each layer with its own product, in order."""
    ups: tuple[tuple[slice, Tensor] | None, ...]
    """For each layer with its own product, its rows of R and (s·B)ᵀ; None if it is not adapted."""


@dataclass(frozen=True, slots=True)
class Residual:
    """A linear layer whose output is added to the residual stream: W [i,o], and Aᵀ [i,r] and (s·B)ᵀ [r,o]."""

    weight: Tensor
    adapter: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class Attention:
    """Gated full attention: queries with their gates, keys and values, with a norm over each head."""

    qkv: Joint
    out: Residual
    norm: Tensor
    """[heads + kv_heads, d]: norm weights of the queries, including 1/√d, then of the keys."""
    kv_heads: int


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """Linear attention: queries, keys and values through a short causal convolution; z gates the output."""

    qkvzba: Joint
    out: Residual
    conv: Tensor
    """[kernel, channels]."""
    rate: Tensor
    dt_bias: Tensor
    norm: Tensor
    key_heads: int
    d_k: int
    """Width of a key head."""
    d_v: int
    """Total width of the value heads that share a key head."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A token mixer and an MLP, each after a norm."""

    mixer_norm: Tensor
    mixer: Attention | GatedDelta
    mlp_norm: Tensor
    gate_up: Joint
    down: Residual


@dataclass(frozen=True, slots=True)
class Weights:
    """A complete text model."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor
    """[V,H]."""
    epsilon: float


def readable(policy: Policy) -> bool:
    """Return whether this module supports the model: Qwen3.5's text layers, as published."""
    base = policy.model.get_base_model()
    config = base.config.get_text_config()
    return (
        type(base).__name__ == "Qwen3_5ForCausalLM"
        and config.hidden_act == "silu"
        and not config.attention_bias
        and config.rope_parameters.get("rope_type", "default") == "default"
        and getattr(policy.lm_head, "bias", None) is None
    )


@torch.inference_mode()
def read_weights(policy: Policy) -> Weights:
    """Read the current weights of the policy, including the adapter unless it is disabled.

    Norm weights are stored as w - 1 and returned as w, in fp32.
    """
    body = policy.decoder
    return Weights(
        embedding=body.embed_tokens.weight,
        layers=tuple(_layer(layer) for layer in body.layers),
        norm=_scale(body.norm),
        head=policy.lm_head.weight,
        epsilon=body.norm.eps,
    )


def _layer(layer: Any) -> Layer:
    linear = layer.block_type == "linear_attention"
    return Layer(
        mixer_norm=_scale(layer.input_layernorm),
        mixer=_gated_delta(layer.linear_attn) if linear else _attention(layer.self_attn),
        mlp_norm=_scale(layer.post_attention_layernorm),
        gate_up=_joint([layer.mlp.gate_proj, layer.mlp.up_proj]),
        down=_residual(layer.mlp.down_proj),
    )


def _attention(module: Any) -> Attention:
    d, groups = module.head_dim, module.num_key_value_groups
    kv_heads = module.k_proj.out_features // d
    q_norm = (_scale(module.q_norm) * module.scaling).expand(kv_heads * groups, d)
    return Attention(
        qkv=_joint([module.q_proj, module.k_proj, module.v_proj]),
        out=_residual(module.o_proj),
        norm=torch.cat([q_norm, _scale(module.k_norm).expand(kv_heads, d)]),
        kv_heads=kv_heads,
    )


def _gated_delta(module: Any) -> GatedDelta:
    return GatedDelta(
        qkvzba=_joint([module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a]),
        out=_residual(module.out_proj),
        conv=module.conv1d.weight[:, 0].T.contiguous(),
        rate=module.A_log.float().exp(),
        dt_bias=module.dt_bias.float(),
        norm=module.norm.weight.float(),
        key_heads=module.num_k_heads,
        d_k=module.head_k_dim,
        d_v=module.value_dim // module.num_k_heads,
    )


def _scale(norm: Any) -> Tensor:
    return 1.0 + norm.weight.float()


def _weight(module: Any) -> Tensor:
    return getattr(module, "base_layer", module).weight


def _adapter(module: Any) -> tuple[Tensor, Tensor] | None:
    """Return A [r,i] and s·B [o,r] in the base's dtype; None if no adapter is active."""
    names = [name for name in getattr(module, "active_adapters", ()) if name in module.lora_A]
    if not names or module.disable_adapters or module.merged:
        return None
    dtype = _weight(module).dtype
    a = torch.cat([module.lora_A[name].weight for name in names])
    b = torch.cat([module.lora_B[name].weight * module.scaling[name] for name in names], 1)
    return a.to(dtype), b.to(dtype)


def _residual(module: Any) -> Residual:
    adapter = _adapter(module)
    return Residual(_weight(module).T, adapter and (adapter[0].T, adapter[1].T))


def _joint(modules: Sequence[Any]) -> Joint:
    weights, adapters = [_weight(m) for m in modules], [_adapter(m) for m in modules]
    spans: list[slice | None] = []
    ups: list[tuple[slice, Tensor] | None] = []
    blocks: list[tuple[slice, slice, Tensor]] = []
    column = rank = 0
    for weight, adapter in zip(weights, adapters, strict=True):
        ranks = slice(rank, rank := rank + (len(adapter[0]) if adapter else 0))
        if weight.numel() * weight.element_size() >= FUSE_BELOW:
            spans.append(None)
            ups.append((ranks, adapter[1].T) if adapter else None)
            continue
        span = slice(column, column := column + len(weight))
        spans.append(span)
        if adapter:
            blocks.append((ranks, span, adapter[1].T))
    together = [weight for weight, span in zip(weights, spans, strict=True) if span]
    downs = [adapter[0] for adapter in adapters if adapter]
    fused = torch.cat([*together, *downs, weights[0][:0]]).T
    alone = tuple(weight.T for weight, span in zip(weights, spans, strict=True) if span is None)
    return Joint(fused, column, _diagonal(blocks, fused[0].new_zeros(rank, column)), tuple(spans), alone, tuple(ups))


def _diagonal(blocks: Sequence[tuple[slice, slice, Tensor]], zeros: Tensor) -> Tensor | None:
    for rows, columns, block in blocks:
        zeros[rows, columns] = block
    return zeros if blocks else None
