"""One token of the gated delta rule: against the formula in loops and transformers' fallback."""

import math
import random

import pytest
import torch
from torch import Tensor

from grpo.qwen3_5.gated_delta_step import gated_delta_step

SHAPES = [(1, 1, 1, 8, 8), (3, 2, 2, 32, 32), (5, 2, 3, 16, 40), (2, 1, 4, 24, 33)]
"""n, key heads, value heads of each, d_k, d_v."""


def drawn(shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    n, heads, repeat, d_k, d_v = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "state": (n, heads, d_k, repeat * d_v),
        "mixed": (n, 2 * heads * d_k + heads * repeat * d_v),
        "a": (n, heads * repeat),
        "b": (n, heads * repeat),
        "dt_bias": (heads * repeat,),
    }
    values = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    values["a"][0, 0] = 40.0  # softplus is linear there
    return values | {"rate": torch.rand(heads * repeat, generator=generator) * 4 + 0.01}


def theirs(values: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Transformers' fallback, and the gate arithmetic of its layer; the state in our layout."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    n, heads, repeat, d_k, d_v = shape
    q, k, v = values["mixed"].split((heads * d_k, heads * d_k, heads * repeat * d_v), 1)
    state = values["state"].view(n, heads, d_k, repeat, d_v).transpose(2, 3).reshape(n, heads * repeat, d_k, d_v)
    out, state = torch_recurrent_gated_delta_rule(
        q.view(n, 1, heads, d_k),
        k.view(n, 1, heads, d_k),
        v.view(n, 1, heads * repeat, d_v),
        g=-values["rate"] * torch.nn.functional.softplus(values["a"] + values["dt_bias"])[:, None],
        beta=values["b"].sigmoid()[:, None],
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out[:, 0], state.view(n, heads, repeat, d_k, d_v).transpose(2, 3).flatten(3)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_transformers_fallback(shape: tuple[int, ...]) -> None:
    for seed in range(3):
        values = drawn(shape, seed)
        expected, new_state = theirs(values, shape)
        out = gated_delta_step(**values)
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(values["state"], new_state, rtol=2e-6, atol=2e-6)


def test_the_formula_with_floats() -> None:
    random.seed(3)
    d_k, d_v = 3, 2
    s = [[random.gauss(0, 1) for _ in range(d_v)] for _ in range(d_k)]
    q, k, v = ([random.gauss(0, 1) for _ in range(d)] for d in (d_k, d_k, d_v))
    a, b, rate, dt = 0.3, -0.4, 0.7, 0.2
    state = torch.tensor(s)[None, None]
    given = (torch.tensor([x]) for x in ([*q, *k, *v], [a], [b]))
    out = gated_delta_step(state, *given, torch.tensor([rate]), torch.tensor([dt]))
    q_hat = [x / math.sqrt(sum(y * y for y in q) + 1e-6) / math.sqrt(d_k) for x in q]
    k_hat = [x / math.sqrt(sum(y * y for y in k) + 1e-6) for x in k]
    alpha, beta = math.exp(-rate * math.log1p(math.exp(a + dt))), 1 / (1 + math.exp(-b))
    for j in range(d_v):
        column = [alpha * s[i][j] for i in range(d_k)]
        delta = beta * (v[j] - sum(x * y for x, y in zip(column, k_hat, strict=True)))
        column = [x + y * delta for x, y in zip(column, k_hat, strict=True)]
        assert out[0, 0, j].item() == pytest.approx(sum(x * y for x, y in zip(column, q_hat, strict=True)), abs=1e-6)
        assert state[0, 0, :, j].tolist() == pytest.approx(column, abs=1e-6)


def test_a_zero_key_leaves_no_trace() -> None:
    """What padding gives: k = v = 0 only lets the state decay."""
    values = drawn((2, 1, 2, 8, 8))
    values["mixed"].zero_()
    before = values["state"].clone()
    assert (gated_delta_step(**values) == 0).all()
    alpha = torch.exp(-values["rate"] * torch.nn.functional.softplus(values["a"] + values["dt_bias"]))
    torch.testing.assert_close(values["state"], before * alpha.repeat_interleave(8, 1)[:, None, None])


def test_slices_of_a_wide_product_and_half_precision() -> None:
    values = drawn((3, 2, 2, 32, 32))
    wide = torch.cat([values["mixed"], values["b"], values["a"]], 1).bfloat16()
    width, gates = values["mixed"].shape[1], values["a"].shape[1]
    sliced = values | dict(zip(("mixed", "b", "a"), wide.split((width, gates, gates), 1), strict=True))
    copied = sliced | {name: sliced[name].float().contiguous() for name in ("mixed", "a", "b")}
    copied["state"] = values["state"].clone()
    assert torch.equal(gated_delta_step(**sliced), gated_delta_step(**copied))
    assert torch.equal(sliced["state"], copied["state"])
