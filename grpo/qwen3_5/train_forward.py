"""Qwen3.5's forward pass for training, which computes each prompt once and continues its completions from its end.

Tokens are packed: norms, projections and MLPs run on the real tokens of prompts and completions together, and nothing
is computed for padding. Only the operations that mix tokens use a grid: prompts in the left-padded [B,P], completions
in the right-padded [N,T]; each completion continues from the convolution, state, keys and values of its prompt. The
gradient flows back through them, so it is exactly that of the N whole sequences. A prompt of 200 tokens with eight
completions costs 200 tokens instead of 1,600.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from grpo.policy.optional_kernels import has_fla
from grpo.policy.policy import Policy
from grpo.qwen3_5.decode import rotary_table
from grpo.qwen3_5.decode_state import Rotary
from grpo.qwen3_5.gated_delta_scan import gated_delta_scan
from grpo.qwen3_5.train_ops import Linear, causal_conv, from_grid, linear, recomputed, rms_norm, swiglu, to_grid, wide
from grpo.qwen3_5.weights import readable

RECOMPUTED = {"cpu": False, "cuda": True}
"""Whether the backward pass recomputes a scan instead of keeping its intermediate values: a GPU is short of memory, a
CPU of time. For Qwen3.5-9B 6.3 MB per token are kept instead of 12.6. If a checkpoint recomputes the whole layer, the
scan is not computed a third time."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Positions of m packed tokens: B prompts one after the other, then N completions without their last tokens."""

    ids: Tensor
    """[m] long."""
    positions: Tensor
    """[m] long, from 0 in each sequence."""
    prompt_slots: Tensor
    """[ΣP] flat indices into the grid [B,P]; prompts end in its last column."""
    completion_slots: Tensor
    """[m - ΣP] flat indices into the grid [N,T]; completions begin in its first column. Their last tokens predict
    nothing, so T is one less than the longest."""
    prompts: tuple[int, int]
    completions: tuple[int, int]
    owners: Tensor
    """[N], the prompt of each completion."""
    predicts: Tensor
    """[M] packed index of the token whose hidden state predicts each completion token, row after row."""
    prompt_seen: Tensor
    """[B,1,P,P] bool: the positions that each query of a prompt attends to. Padding attends to itself only."""
    completion_seen: Tensor
    """[N,1,T,P+T] bool: each query of a completion attends to its prompt and to its earlier tokens."""


def shared(policy: Policy) -> bool:
    """Return whether this pass supports the model: Qwen3.5's text layers, with at most one adapter and no dropout."""
    config = policy.model.get_base_model().config.get_text_config()
    return (
        readable(policy)
        and not config.attention_dropout
        and all(
            len(module.active_adapters) == 1 and all(getattr(d, "p", 0) == 0 for d in module.lora_dropout.values())
            for module in policy.model.modules()
            if hasattr(module, "lora_dropout")
        )
    )


def uses_fla(policy: Policy) -> bool:
    """Return whether this pass runs flash-linear-attention's kernels."""
    return policy.kernels.fla and policy.device.type == "cuda" and has_fla()


def predicting_states_shared(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> Tensor:
    """Return the hidden states [M,H] that predict the M completion tokens, row after row, with a graph to the adapter.

    Args:
        prompt_ids: N lists; equal prompts are computed once.
        completion_ids: N lists of at least one token.
    """
    layout = lay_out(prompt_ids, completion_ids, policy.device)
    body = policy.decoder
    turns = rotary_table(policy, int(layout.prompts[1] + layout.completions[1]))
    x = embedding(layout.ids, body.embed_tokens.weight)
    checkpointed = torch.is_grad_enabled() and bool(getattr(body, "gradient_checkpointing", False))
    recompute_scan = RECOMPUTED[x.device.type] and not checkpointed
    scan = "fla" if uses_fla(policy) else "plain"
    for layer in body.layers:
        x = (
            checkpoint(_layer, layer, x, layout, turns, scan, recompute_scan, use_reentrant=False)
            if checkpointed
            else _layer(layer, x, layout, turns, scan, recompute_scan)
        )
    return _norm(body.norm, x.index_select(0, layout.predicts))


def lay_out(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], device: torch.device
) -> Layout:
    """Return the layout of N rows on their device.

    >>> layout = lay_out([(7, 8), (9,), (7, 8)], [(1,), (2, 3), (4, 5, 6)], torch.device("cpu"))
    >>> layout.ids.tolist(), layout.positions.tolist(), layout.owners.tolist()
    ([7, 8, 9, 2, 4, 5], [0, 1, 0, 1, 2, 3], [0, 1, 0])
    >>> layout.predicts.tolist()
    [1, 2, 3, 1, 4, 5]
    """
    distinct = list(dict.fromkeys(tuple(ids) for ids in prompt_ids))
    number = {ids: b for b, ids in enumerate(distinct)}
    owners = [number[tuple(ids)] for ids in prompt_ids]
    columns, width = max(len(ids) for ids in distinct), max(len(ids) for ids in completion_ids) - 1
    ends = torch.tensor([len(ids) for ids in distinct]).cumsum(0) - 1
    packed = int(ends[-1]) + 1
    predicts: list[int] = []
    for owner, ids in zip(owners, completion_ids, strict=True):
        said = len(ids) - 1
        predicts += [int(ends[owner]), *range(packed, packed + said)]
        packed += said
    long = [len(distinct[owner]) for owner in owners]
    prompt_lengths = torch.tensor([len(ids) for ids in distinct])
    seen = torch.arange(columns) >= columns - prompt_lengths[:, None]  # [B,P]
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()
    prompt_seen = (seen[:, None, :] & causal) | torch.eye(columns, dtype=torch.bool)
    own = torch.ones(width, width, dtype=torch.bool).tril().expand(len(owners), -1, -1)
    before = seen[torch.tensor(owners)][:, None, :].expand(-1, width, -1)

    def put(values: Any) -> Tensor:
        return torch.as_tensor(values).to(device, non_blocking=True)  # without waiting for earlier work

    return Layout(
        ids=put([i for ids in distinct for i in ids] + [i for ids in completion_ids for i in ids[:-1]]),
        positions=put(
            [t for ids in distinct for t in range(len(ids))]
            + [start + t for start, ids in zip(long, completion_ids, strict=True) for t in range(len(ids) - 1)]
        ),
        prompt_slots=put(
            [b * columns + columns - len(ids) + t for b, ids in enumerate(distinct) for t in range(len(ids))]
        ),
        completion_slots=put(
            torch.tensor([i * width + t for i, ids in enumerate(completion_ids) for t in range(len(ids) - 1)]).long()
        ),
        prompts=(len(distinct), columns),
        completions=(len(owners), width),
        owners=put(owners),
        predicts=put(predicts),
        prompt_seen=put(prompt_seen[:, None]),
        completion_seen=put(torch.cat([before, own], 2)[:, None]),
    )


def _layer(layer: Any, x: Tensor, layout: Layout, turns: Rotary, scan: str, recompute_scan: bool) -> Tensor:
    h = _norm(layer.input_layernorm, x)
    if layer.block_type == "linear_attention":
        x = x + _recur(layer.linear_attn, h, layout, scan, recompute_scan)
    else:
        x = x + _attend(layer.self_attn, h, layout, turns)
    h = _norm(layer.post_attention_layernorm, x)
    mlp = layer.mlp
    gate, up = linear(h, [read_linear(mlp.gate_proj), read_linear(mlp.up_proj)])
    return x + linear(swiglu(gate, up), [read_linear(mlp.down_proj)])[0]


def _recur(module: Any, h: Tensor, layout: Layout, kind: str, recompute_scan: bool) -> Tensor:
    """Gated linear attention of m packed tokens, [m,H]."""
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    qkv, z, b, a = linear(h, [read_linear(getattr(module, name)) for name in names])
    taps = module.conv1d.weight[:, 0].T
    rest = wide(module.A_log).exp(), wide(module.dt_bias), (module.num_k_heads, module.head_k_dim)

    def mix(inputs: Tensor, a: Tensor, b: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.nn.functional.silu(causal_conv(inputs, taps))
        return gated_delta_scan(mixed, a, b, *rest, state[0] if state else None, kind)

    grid, answers = _grids(qkv, layout)
    before = len(taps) - 1
    inputs = torch.cat([grid.new_zeros(len(grid), before, grid.shape[-1]), grid], 1)
    (b_grid, b_answers), (a_grid, a_answers) = _grids(b, layout), _grids(a, layout)
    scan = partial(recomputed, mix) if recompute_scan else mix
    out, state = scan(inputs, a_grid, b_grid)
    packed = [from_grid(out, layout.prompt_slots)]
    if layout.completions[1]:
        inputs = torch.cat([inputs[:, -before:].index_select(0, layout.owners), answers], 1)
        out, _ = scan(inputs, a_answers, b_answers, state.index_select(0, layout.owners))
        packed.append(from_grid(out, layout.completion_slots))
    read = rms_norm(torch.cat(packed), wide(module.norm.weight), module.norm.variance_epsilon)
    gated = swiglu(wide(z).view(read.shape), read).to(h.dtype).flatten(1)
    return linear(gated, [read_linear(module.out_proj)])[0]


def _attend(module: Any, h: Tensor, layout: Layout, turns: Rotary) -> Tensor:
    """Gated full attention of m packed tokens, [m,H]."""
    d = module.head_dim
    q, k, v = linear(h, [read_linear(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj")])
    q, gate = q.view(len(h), -1, 2, d).unbind(2)
    k, v = k.view(len(h), -1, d), v.view(len(h), -1, d)
    q, k = (
        _turn(rms_norm(wide(x), 1.0 + wide(norm.weight), norm.eps), turns, layout.positions).to(h.dtype)
        for x, norm in ((q, module.q_norm), (k, module.k_norm))
    )
    (q, q_answers), (k, k_answers), (v, v_answers) = (_grids(x, layout) for x in (q, k, v))
    packed = [from_grid(_mix(q, k, v, layout.prompt_seen, module.scaling), layout.prompt_slots)]
    if layout.completions[1]:
        keys, values = (
            torch.cat([x.index_select(0, layout.owners), own], 1) for x, own in ((k, k_answers), (v, v_answers))
        )
        out = _mix(q_answers, keys, values, layout.completion_seen, module.scaling)
        packed.append(from_grid(out, layout.completion_slots))
    gated = torch.cat(packed) * gate.sigmoid()
    return linear(gated.flatten(1), [read_linear(module.o_proj)])[0]


def _mix(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(scale·q·kᵀ where seen)·v: q [n,t,h,d], k and v [n,s,g,d], seen [n,1,t,s] → [n,t,h,d]. The h/g queries
    that share a key stand one after the other, so that keys are not repeated."""
    width, heads = q.shape[1:3]
    groups = k.shape[2]
    share = heads // groups
    q = q.unflatten(2, (groups, share)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    seen = seen.repeat(1, 1, share, 1) if share > 1 else seen
    out = scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, scale=scale)
    return out.unflatten(2, (share, width)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _grids(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the grids [B,P,…] of the prompts and [N,T,…] of the completions from packed tokens [m,…]."""
    count = len(layout.prompt_slots)
    return (
        to_grid(packed[:count], layout.prompt_slots, *layout.prompts),
        to_grid(packed[count:], layout.completion_slots, *layout.completions),
    )


def _turn(x: Tensor, turns: Rotary, positions: Tensor) -> Tensor:
    """Return x [m,h,d] with the first r numbers of each head rotated by their position."""
    cos, sin = turns.cos[positions][:, None], turns.sin[positions][:, None]
    part, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    return torch.cat([part * cos + part.roll(part.shape[-1] // 2, -1) * sin, rest], -1)


def _norm(module: Any, x: Tensor) -> Tensor:
    """Apply a norm whose weights are stored as w - 1."""
    return rms_norm(x, 1.0 + wide(module.weight), module.eps)


def read_linear(module: Any) -> Linear:
    """Return a layer and its adapter, without the adapter if it is disabled.

    Raises:
        ValueError: the adapter is merged into the weight.
    """
    if not hasattr(module, "lora_A"):
        return Linear(module.weight)
    if module.merged:
        raise ValueError("expected an unmerged adapter; call unmerge_adapter() on the model")
    weight = module.base_layer.weight
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names or module.disable_adapters:
        return Linear(weight)
    (name,) = names
    return Linear(weight, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
