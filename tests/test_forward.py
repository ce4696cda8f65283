"""The forward pass that is trained through: its pieces against autograd and loops, the whole against transformers'."""

import random
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from grpo.policy.policy import Policy
from grpo.policy.transformers_forward import transformers_hidden_states
from grpo.qwen3_5 import train_forward as shared_prefix
from grpo.qwen3_5.gated_delta_scan import (
    CHUNK,
    INVERSE_BASE,
    _fla_scan,
    chunked_scan,
    gated_delta_scan,
    unit_lower_inverse,
)
from grpo.qwen3_5.gated_delta_step import gated_delta_step
from grpo.qwen3_5.train_forward import lay_out, predicting_states_shared, read_linear, shared
from grpo.qwen3_5.train_ops import Linear, causal_conv, from_grid, linear, recomputed, rms_norm, swiglu, to_grid
from tests.conftest import TARGETS
from tests.support.saved_tensors import kept_bytes

Ids = list[tuple[int, ...]]


def drawn(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


# --- pieces ---------------------------------------------------------------------------------------------------


def test_the_written_derivatives_are_the_true_ones() -> None:
    x = drawn(5, 6)
    adapted = [drawn(*shape, seed=i) for i, shape in enumerate([(2, 6), (4, 2), (3, 6), (7, 3)])]

    def two(x: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        weights = [drawn(n, 6, seed=n, grad=False) for n in (4, 7, 3)]
        return linear(x, [Linear(weights[0], a, b, 0.5), Linear(weights[1], a2, b2, 2.0), Linear(weights[2])])

    assert gradcheck(two, (x, *adapted))
    assert gradcheck(lambda x: rms_norm(x, drawn(6, grad=False), 1e-3), (x,))
    assert gradcheck(swiglu, (drawn(4, 3), drawn(4, 3, seed=1)))
    assert gradcheck(lambda x: causal_conv(x, drawn(3, 2, grad=False)), (drawn(2, 7, 2),))
    slots = torch.tensor([4, 1, 3])
    assert gradcheck(lambda x: to_grid(x, slots, 2, 3), (drawn(3, 2),))
    assert gradcheck(lambda x: from_grid(x, slots), (drawn(2, 3, 2),))
    assert gradcheck(unit_lower_inverse, (drawn(2, 8, 8),))
    assert gradcheck(lambda x, y: recomputed(lambda x, y: (x * y, y.exp()), x, y), (drawn(3), drawn(3, seed=1)))
    assert gradcheck(lambda y: recomputed(lambda x, y: (x * y,), drawn(3, grad=False), y), (drawn(3, seed=1),))


def test_the_adapters_own_gradients_do_not_need_the_inputs() -> None:
    x = drawn(5, 6, grad=False)  # as after the embedding, where nothing before is trained
    a, b = drawn(2, 6), drawn(4, 2, seed=1)
    weight = drawn(4, 6, seed=2, grad=False)
    assert gradcheck(lambda a, b: linear(x, [Linear(weight, a, b, 0.5)]), (a, b))


def test_linear_is_the_formula() -> None:
    x, w, a, b = drawn(5, 6), drawn(4, 6, seed=1), drawn(2, 6, seed=2), drawn(4, 2, seed=3)
    (plain,) = linear(x, [Linear(w)])
    (adapted,) = linear(x, [Linear(w, a, b, 0.25)])
    torch.testing.assert_close(plain, x @ w.T)
    torch.testing.assert_close(adapted, x @ (w + 0.25 * b @ a).T)


def test_chunks_are_powers_of_two_as_the_inverse_by_halves_asks() -> None:
    assert all(size.bit_count() == 1 for size in (*CHUNK.values(), *INVERSE_BASE.values()))


@pytest.fixture(params=sorted(INVERSE_BASE.values()), ids=lambda base: f"base{base}")
def inverse_base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base case of each device type, on the CPU."""
    monkeypatch.setitem(INVERSE_BASE, "cpu", request.param)


@pytest.mark.usefixtures("inverse_base")
@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64])
def test_the_inverse_by_halves_is_the_inverse(size: int) -> None:
    lower = drawn(3, size, size, grad=False)
    whole = torch.eye(size, dtype=lower.dtype) + lower.tril(-1)
    torch.testing.assert_close(unit_lower_inverse(lower) @ whole, torch.eye(size).double().expand(3, -1, -1))


@pytest.mark.usefixtures("inverse_base")
def test_the_inverse_is_exact_where_powers_would_cancel() -> None:
    ones = torch.ones(1, 64, 64)  # equal keys, beta 1: (I + L)⁻¹ is the identity minus its first subdiagonal
    expected = torch.eye(64) - torch.eye(63, 63).new_zeros(64, 64).diagonal_scatter(torch.ones(63), -1)
    assert torch.equal(unit_lower_inverse(ones)[0], expected)


@pytest.mark.usefixtures("inverse_base")
def test_the_inverse_is_as_exact_as_substitution() -> None:
    """Of triangles as they occur, in fp32, against fp64: both bases err by a few units in the last place."""
    keys = torch.nn.functional.normalize(drawn(8, 64, 16, grad=False), dim=-1).float()
    lower = keys @ keys.mT
    exact = torch.linalg.inv(torch.eye(64).double() + lower.double().tril(-1))
    torch.testing.assert_close(unit_lower_inverse(lower).double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("inverse_base")
def test_the_inverse_leaves_its_argument_alone_and_reads_below_the_diagonal_only() -> None:
    lower = drawn(2, 32, 32, grad=False)
    before = lower.clone()
    inverse = unit_lower_inverse(lower)
    assert torch.equal(lower, before) and torch.equal(inverse, unit_lower_inverse(lower.tril(-1)))
    assert torch.equal(inverse.triu(1), torch.zeros_like(inverse))


# --- the gated delta rule -------------------------------------------------------------------------------------

SHAPES = [(2, 37, 1, 1, 4, 3), (3, 64, 2, 2, 8, 5), (1, 5, 2, 3, 4, 4), (2, 1, 1, 2, 3, 6)]
"""n, T, key heads, value heads of each, d_k, d_v."""


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple[int, int]]:
    n, t, heads, share, d_k, d_v = shape
    values = heads * share
    sizes = [(n, t, 2 * heads * d_k + values * d_v), (n, t, values), (n, t, values), (n, values, d_k, d_v)]
    mixed, a, b, state = (drawn(*size, seed=i, grad=False).to(dtype) for i, size in enumerate(sizes))
    a[:, ::3] += 20.0  # a decay that forgets everything
    return [mixed, a, b, torch.linspace(0.05, 4, values, dtype=dtype), torch.linspace(-1, 1, values, dtype=dtype),
            state], (heads, d_k)  # fmt: skip


def token_by_token(values: list[Tensor], heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """With the step that the rollout takes, in its layout of the state."""
    mixed, a, b, rate, dt_bias, state = (x.float() for x in values)
    n, t, _ = mixed.shape
    key_heads, value_heads = heads[0], len(rate)
    memory = state.unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(3).contiguous()
    out = [gated_delta_step(memory, mixed[:, i], a[:, i], b[:, i], rate, dt_bias) for i in range(t)]
    last = memory.unflatten(3, (value_heads // key_heads, -1)).transpose(2, 3).flatten(1, 2)
    return torch.stack(out, 1).view(n, t, value_heads, -1), last


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scan_is_the_rule_token_by_token(shape: tuple[int, ...]) -> None:
    values, heads = inputs(shape)
    out, last = gated_delta_scan(*values[:5], heads, values[5])
    assert out.dtype == torch.float64
    expected, memory = token_by_token(values, heads)
    torch.testing.assert_close(out.float(), expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(last.float(), memory, atol=3e-6, rtol=1e-5)


def scan_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    n, t, heads, share, d_k, d_v = shape
    q, k, v = drawn(n, t, heads, d_k), drawn(n, t, heads, d_k, seed=1), drawn(n, t, heads * share, d_v, seed=2)
    k = k.detach() / k.detach().norm(dim=-1, keepdim=True)
    decay, beta = -drawn(n, t, heads * share, seed=3).detach().abs(), drawn(n, t, heads * share, seed=4).sigmoid()
    return [x.detach().requires_grad_() for x in (q, k, v, decay, beta, drawn(n, heads * share, d_k, d_v, seed=5))]


@pytest.mark.parametrize("shape", [(1, 5, 1, 2, 2, 2), (2, 3, 2, 1, 2, 3), (1, 8, 1, 1, 2, 2)])
def test_the_gradient_of_a_scan_is_the_true_one(shape: tuple[int, ...]) -> None:
    assert gradcheck(lambda *x: chunked_scan(*x, chunk=2), scan_inputs(shape))


def test_neither_chunk_size_nor_a_cut_nor_zeros_before_change_a_scan() -> None:
    q, k, v, decay, beta, state = scan_inputs((2, 23, 2, 2, 4, 3))
    whole, last = chunked_scan(q, k, v, decay, beta, state, chunk=64)
    for chunk in (1, 8, 32):
        out, end = chunked_scan(q, k, v, decay, beta, state, chunk=chunk)
        torch.testing.assert_close(out, whole)
        torch.testing.assert_close(end, last)
    first, between = chunked_scan(*(x[:, :9] for x in (q, k, v, decay, beta)), state, chunk=8)
    second, end = chunked_scan(*(x[:, 9:] for x in (q, k, v, decay, beta)), between, chunk=8)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)
    padded = [torch.cat([x.new_zeros(2, 5, *x.shape[2:]), x], 1) for x in (q, k, v, decay, beta)]
    out, end = chunked_scan(*padded, None, chunk=8)
    fresh, fresh_end = chunked_scan(q, k, v, decay, beta, None, chunk=8)
    torch.testing.assert_close(out[:, 5:], fresh)
    torch.testing.assert_close(end, fresh_end)


def test_flash_linear_attention_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to its documented contract, token by token: it is not installed here, and runs on CUDA alone."""

    def chunk_gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert q.shape[2] == k.shape[2] == v.shape[2] and q.dtype == v.dtype == torch.bfloat16 and output_final_state
        state = torch.zeros(len(q), v.shape[2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
        out = []
        for t in range(q.shape[1]):
            state = state * g[:, t].exp()[..., None, None]
            delta = beta[:, t, :, None] * (v[:, t].float() - torch.einsum("nhd,nhde->nhe", k[:, t].float(), state))
            state = state + k[:, t].float()[..., None] * delta[:, :, None]
            out.append(scale * torch.einsum("nhd,nhde->nhe", q[:, t].float(), state))
        return torch.stack(out, 1).bfloat16(), state

    module = types.ModuleType("fla.ops.gated_delta_rule")
    vars(module)["chunk_gated_delta_rule"] = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    q, k, v, decay, beta, state = (x.detach().float() for x in scan_inputs((2, 21, 2, 3, 4, 5)))
    for start in (None, state):
        found = _fla_scan(q, k, v, decay, beta, start)
        for ours, theirs in zip(chunked_scan(q, k, v, decay, beta, start), found, strict=True):
            torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0.02)


# --- the whole ------------------------------------------------------------------------------------------------


def rows_of(policy: Policy, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Random rows: prompts of these lengths, each with completions of those."""
    rng = random.Random(3)
    size = policy.model.get_base_model().config.vocab_size

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, size) for _ in range(n))

    heads = [ids(n) for n in prompts]
    pairs = [(head, ids(n)) for head, lengths in zip(heads, completions, strict=True) for n in lengths]
    return [p for p, _ in pairs], [c for _, c in pairs]


Pass = Callable[[Policy, Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]


def states_and_gradients(policy: Policy, forward: Pass, rows: tuple[Ids, Ids]) -> tuple[Tensor, dict[str, Tensor]]:
    policy.model.zero_grad()
    states = forward(policy, *rows)
    weights = torch.sin(torch.arange(states.numel(), dtype=states.dtype)).view_as(states)
    (states * weights).sum().backward()
    return states.detach(), {
        name: p.grad.clone() for name, p in policy.adapter_parameters().items() if p.grad is not None
    }


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=3e-5, rtol=1e-4)
    assert ours[1].keys() == theirs[1].keys() and len(theirs[1]) > 10
    for name, gradient in theirs[1].items():
        apart = (ours[1][name] - gradient).norm()
        assert float(apart) <= 2e-5 * float(gradient.norm()) + 1e-7, name


MIXED = ([70, 3, 64, 1], [[5, 1, 40], [33, 2], [1, 1, 1], [65]])
ONE_TOKEN = ([9, 4], [[1, 1], [1]])


@pytest.mark.parametrize("lengths", [MIXED, ONE_TOKEN, ([130], [[1]]), ([2], [[70, 70]])])
def test_the_shared_pass_is_the_models_own(make_policy: Callable[..., Policy], lengths: Any) -> None:
    policy = make_policy()
    assert shared(policy)
    rows = rows_of(policy, *lengths)
    assert_same(
        states_and_gradients(policy, predicting_states_shared, rows),
        states_and_gradients(policy, transformers_hidden_states, rows),
    )


def test_checkpointing_keeps_less_and_changes_nothing(make_policy: Callable[..., Policy]) -> None:
    plain, saving = make_policy(), make_policy(checkpointing=True)
    rows = rows_of(plain, *MIXED)
    for policy in (plain, saving):
        policy.model.train()
    ours, theirs = (states_and_gradients(policy, predicting_states_shared, rows) for policy in (saving, plain))
    few, many = (kept_bytes(policy, rows[0][0], rows[1][0]) for policy in (saving, plain))
    assert few < 0.5 * many
    assert torch.equal(ours[0], theirs[0]) and all(torch.equal(ours[1][n], g) for n, g in theirs[1].items())


def test_a_scan_that_is_recomputed_keeps_less_and_changes_nothing(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA."""
    policy = make_policy(target_modules=(*TARGETS, "in_proj_qkv", "in_proj_a", "in_proj_b"))
    rows = rows_of(policy, *MIXED)
    plain, many = (
        states_and_gradients(policy, predicting_states_shared, rows),
        kept_bytes(policy, rows[0][0], rows[1][0]),
    )
    monkeypatch.setitem(shared_prefix.RECOMPUTED, "cpu", True)
    saving, few = (
        states_and_gradients(policy, predicting_states_shared, rows),
        kept_bytes(policy, rows[0][0], rows[1][0]),
    )
    assert few < 0.7 * many
    assert torch.equal(saving[0], plain[0]) and all(torch.equal(saving[1][n], g) for n, g in plain[1].items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_scan_runs_a_third_time(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """As on CUDA: the backward pass computes a scan once more, by itself or with its whole checkpointed layer."""
    monkeypatch.setitem(shared_prefix.RECOMPUTED, "cpu", True)
    policy = make_policy(target_modules=(*TARGETS, "in_proj_qkv"), checkpointing=checkpointing)
    policy.model.train()
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return gated_delta_scan(*given)

    monkeypatch.setattr(shared_prefix, "gated_delta_scan", counted)
    linear_layers = sum(layer.block_type == "linear_attention" for layer in policy.decoder.layers)
    states_and_gradients(policy, predicting_states_shared, rows_of(policy, *MIXED))
    assert len(calls) == 2 * 2 * linear_layers, "forward and backward, prompts and completions"


def test_a_row_is_the_same_alone_and_in_any_order(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    prompts, completions = rows_of(policy, *MIXED)
    with torch.no_grad():
        whole = predicting_states_shared(policy, prompts, completions).split([len(ids) for ids in completions])
        order = [6, 2, 0, 8, 5, 1, 4, 3, 7]
        shuffled = predicting_states_shared(policy, [prompts[i] for i in order], [completions[i] for i in order])
        for i, states in zip(order, shuffled.split([len(completions[i]) for i in order]), strict=True):
            torch.testing.assert_close(states, whole[i], atol=1e-5, rtol=1e-5)
            alone = predicting_states_shared(policy, [prompts[i]], [completions[i]])
            torch.testing.assert_close(alone, whole[i], atol=1e-5, rtol=1e-5)


def test_the_adapter_switched_off_is_the_base(make_policy: Callable[..., Policy]) -> None:
    policy, fresh = make_policy(), make_policy(moved=False)
    rows = rows_of(policy, *MIXED)
    with torch.no_grad():
        moved = predicting_states_shared(policy, *rows)
        with policy.model.disable_adapter():
            off = predicting_states_shared(policy, *rows)
        base = predicting_states_shared(fresh, *rows)  # B = 0
    assert torch.equal(off, base) and not torch.allclose(moved, off, atol=1e-3)


def test_a_merged_adapter_is_refused(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    policy.model.merge_adapter()
    with pytest.raises(ValueError, match="unmerged"):
        predicting_states_shared(policy, [(1, 2)], [(3,)])


def test_what_the_pass_does_not_know_it_leaves_to_the_modules(make_policy: Callable[..., Policy]) -> None:
    assert not shared(make_policy(dropout=0.1))
    policy = make_policy()
    policy.model.add_adapter("second", policy.model.peft_config["default"])
    policy.model.base_model.set_adapter(["default", "second"])
    assert not shared(policy)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_peft(make_policy: Callable[..., Policy]) -> None:
    exact, low = make_policy(), make_policy()
    for name, p in low.model.named_parameters():
        if "lora_" not in name:  # a bfloat16 base under fp32 masters, as configs/v49.toml loads them
            p.data = p.data.to(torch.bfloat16)
    for p, q in zip(exact.model.parameters(), low.model.parameters(), strict=True):
        p.data = q.data.float()
    rows = rows_of(exact, [70, 64], [[30, 50], [40, 20]])
    truth = states_and_gradients(exact, transformers_hidden_states, rows)
    ours = states_and_gradients(low, predicting_states_shared, rows)
    peft = states_and_gradients(low, transformers_hidden_states, rows)
    assert ours[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in ours[1].values())

    def off(found: tuple[Tensor, dict[str, Tensor]]) -> tuple[float, float]:
        states = (found[0].double() - truth[0].double()).norm() / truth[0].double().norm()
        gradients = torch.cat([(found[1][n] - g).flatten() for n, g in truth[1].items()]).norm()
        return float(states), float(gradients / torch.cat([g.flatten() for g in truth[1].values()]).norm())

    (ours_states, ours_gradients), (peft_states, peft_gradients) = off(ours), off(peft)
    assert 0 < ours_states < max(0.02, 1.2 * peft_states)
    assert 0 < ours_gradients < max(0.05, 1.2 * peft_gradients)


def test_layers_without_an_adapter_read_as_plain() -> None:
    layer = torch.nn.Linear(2, 3, bias=False)
    assert read_linear(layer) == Linear(layer.weight)


def test_equal_prompts_are_laid_out_once() -> None:
    layout = lay_out([(1, 2), (3,), (1, 2)], [(4, 5), (6,), (7, 8, 9)], torch.device("cpu"))
    assert layout.prompts == (2, 2) and layout.completions == (3, 2)
    assert layout.ids.tolist() == [1, 2, 3, 4, 7, 8] and layout.prompt_slots.tolist() == [0, 1, 3]
    assert layout.completion_slots.tolist() == [0, 4, 5]
    assert layout.prompt_seen[1, 0].tolist() == [[True, False], [False, True]]  # padding sees itself, nobody sees it
    assert layout.completion_seen[2, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert layout.completion_seen[1, 0, 0].tolist() == [False, True, True, False]


def test_a_pass_leaves_every_weight_as_it_was(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    rows = rows_of(policy, [5], [[3]])
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    states_and_gradients(policy, predicting_states_shared, rows)
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())


def test_attention_dropout_is_left_to_the_modules(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    policy.model.get_base_model().config.get_text_config().attention_dropout = 0.1
    assert not shared(policy)
