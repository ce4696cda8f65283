"""The loss. Tests that take only `maths` are also run on faulty copies, by test_planted_faults."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import oracles
from tests.support.maths_modules import REAL, Maths

SURROGATES = ("clip", "dual_clip", "gspo", "cispo", "none")
ESTIMATORS = ("k1", "k2", "k3", "ratio_k3")
WEIGHTS = ("sequence", "token", "constant")
FIELDS = ("logprobs", "old_logprobs", "ref_logprobs", "token_weights")


@pytest.fixture
def maths() -> Maths:
    return REAL


def config(surrogate: str = "clip", **changed: Any) -> dict[str, Any]:
    dual = 1.6 if surrogate == "dual_clip" else None
    base = {
        "surrogate": surrogate,
        "clip_low": 0.2,
        "clip_high": 0.35,
        "dual_clip": dual,
        "kl": "k3",
        "beta": 0.0,
    }
    return {**base, **changed}


def padded(rows: oracles.Rows, width: int, fill: float) -> Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.float64)


def ragged(tensor: Tensor, lengths: list[int]) -> list[list[float]]:
    return [line[:length].tolist() for line, length in zip(tensor, lengths, strict=True)]


def batch(seed: int, rows: int = 6, longest: int = 5, spread: float = 0.5) -> dict[str, Any]:
    """Ragged rows off the old policy; the padding is NaN everywhere."""
    rng = np.random.default_rng(seed)
    lengths = [longest, 1, *rng.integers(1, longest + 1, rows - 2).tolist()]
    old = [(-rng.exponential(1.0, n) - 0.1).tolist() for n in lengths]
    new = [(np.array(row) + spread * rng.normal(size=len(row)) + 0.1).tolist() for row in old]
    ref = [(np.array(row) + spread * rng.normal(size=len(row))).tolist() for row in old]
    weights = rng.uniform(0.1, 1.0, rows).tolist()
    width, nan = longest + 1, math.nan
    return {
        "lengths": lengths,
        "rows": {"logprobs": new, "old_logprobs": old, "ref_logprobs": ref},
        "advantages": rng.permutation(np.linspace(-1.5, 1.7, rows)).tolist(),
        "weights": weights,
        "inputs": {
            "logprobs": padded(new, width, nan),
            "old_logprobs": padded(old, width, nan),
            "ref_logprobs": padded(ref, width, nan),
            "completion_mask": torch.arange(width) < torch.tensor(lengths)[:, None],
            "token_weights": padded([[w] * n for w, n in zip(weights, lengths, strict=True)], width, nan),
        },
    }


def inputs_of(drawn: dict[str, Any]) -> dict[str, Tensor]:
    advantages = torch.tensor(drawn["advantages"], dtype=torch.float64)
    return {**drawn["inputs"], "advantages": advantages}


def gradient(maths: Maths, inputs: dict[str, Tensor], **choice: Any) -> tuple[Any, Tensor]:
    """The loss terms and ∂loss/∂logprobs; a gradient that does not reach the logprobs counts as zero."""
    leaf = inputs["logprobs"].detach().clone().requires_grad_()
    terms = maths.loss.grpo_loss(**{**inputs, "logprobs": leaf}, **choice)
    if not terms.loss.requires_grad:
        return terms, torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(terms.loss, leaf, allow_unused=True, materialize_grads=True)
    return terms, grad


def on_policy(drawn: dict[str, Any]) -> dict[str, Tensor]:
    inputs = inputs_of(drawn)
    return {**inputs, "old_logprobs": inputs["logprobs"].clone()}


def test_loss_and_gradient_match_the_oracle(maths: Maths) -> None:
    for seed, surrogate in enumerate(SURROGATES):
        for kl, beta in (("k3", 0.0), *((kl, 0.3) for kl in ESTIMATORS)):
            drawn = batch(seed, spread=0.5)
            choice = config(surrogate, kl=kl, beta=beta)
            terms, grad = gradient(maths, inputs_of(drawn), **choice)
            new, old, ref = (drawn["rows"][name] for name in FIELDS[:3])

            def contributions(rows, new=new, old=old, ref=ref, drawn=drawn, choice=choice):
                return oracles.loss(
                    rows, old, ref, drawn["advantages"], drawn["weights"], choice["surrogate"],
                    choice["clip_low"], choice["clip_high"], choice["dual_clip"], choice["kl"],
                    choice["beta"], frozen=new,
                )  # fmt: skip

            expected = contributions(new)
            lengths, mask = drawn["lengths"], drawn["inputs"]["completion_mask"]
            assert terms.loss.item() == pytest.approx(oracles.total(expected), rel=1e-9)
            for got, lines in zip(ragged(terms.per_token, lengths), expected, strict=True):
                assert got == pytest.approx(lines, rel=1e-9)
            slopes = oracles.slope(lambda rows: oracles.total(contributions(rows)), new)
            for got, lines in zip(ragged(grad, lengths), slopes, strict=True):
                assert got == pytest.approx(lines, abs=1e-7), (surrogate, kl, beta)
            assert (grad[~mask] == 0).all() and (terms.per_token[~mask] == 0).all()


def test_reported_ratio_kl_and_clipping_match_the_oracle(maths: Maths) -> None:
    seen = set()
    for seed, surrogate in itertools.product(range(4), SURROGATES):
        drawn = batch(seed, spread=0.7)
        new, old, ref = (drawn["rows"][name] for name in FIELDS[:3])
        for kl in ESTIMATORS:
            choice = config(surrogate, kl=kl)
            terms, _ = gradient(maths, inputs_of(drawn), **choice)
            for i, length in enumerate(drawn["lengths"]):
                for t in range(length):
                    expected = oracles.clipped(
                        surrogate, new[i], old[i], drawn["advantages"][i], t, 0.2, 0.35, choice["dual_clip"]
                    )
                    got = (bool(terms.clipped_low[i, t]), bool(terms.clipped_high[i, t]))
                    assert got == expected, (surrogate, i, t)
                    seen.add((surrogate, *got))
                    value = oracles.kl_value(kl, new[i][t], old[i][t], ref[i][t])
                    assert terms.kl[i, t].item() == pytest.approx(value, rel=1e-9)
                    if surrogate != "gspo":
                        assert terms.ratio[i, t].item() == pytest.approx(math.exp(new[i][t] - old[i][t]))
                assert not terms.clipped_low[i, length:].any() and not terms.clipped_high[i, length:].any()
    for surrogate in ("clip", "dual_clip", "gspo"):  # the draws exercise both sides
        assert {(surrogate, True, False), (surrogate, False, True), (surrogate, False, False)} <= seen


def test_clipped_is_where_the_gradient_vanishes(maths: Maths) -> None:
    edges = [0.3, 0.79, 0.81, 1.0, 1.34, 1.36, 1.59, 1.61, 3.0]
    ratios = torch.tensor(edges, dtype=torch.float64)
    for surrogate, sign in itertools.product(("clip", "dual_clip", "gspo", "none"), (1.0, -1.0)):
        shape = (len(edges), 1)
        inputs = {
            "logprobs": ratios.log()[:, None],
            "old_logprobs": torch.zeros(shape, dtype=torch.float64),
            "ref_logprobs": None,
            "advantages": torch.full((len(edges),), sign),
            "completion_mask": torch.ones(shape, dtype=torch.bool),
            "token_weights": torch.ones(shape),
        }
        terms, grad = gradient(maths, inputs, **config(surrogate))
        torch.testing.assert_close(terms.clipped_low | terms.clipped_high, grad == 0)
        assert (terms.clipped_low & terms.clipped_high).sum() == 0
        assert (torch.sign(grad[grad != 0]) == -sign).all()


def test_first_pass_is_reinforce(maths: Maths) -> None:
    for surrogate in SURROGATES:
        drawn = batch(11)
        inputs = on_policy(drawn)
        terms, grad = gradient(maths, inputs, **config(surrogate))
        mask = inputs["completion_mask"]
        reinforce = -inputs["token_weights"] * inputs["advantages"][:, None]
        assert (terms.ratio == 1).all()
        assert not terms.clipped_low.any() and not terms.clipped_high.any()
        torch.testing.assert_close(grad[mask], reinforce[mask], rtol=1e-12, atol=0)
        assert (grad[mask] != 0).all()
        if surrogate != "cispo":
            assert terms.loss.item() == pytest.approx(reinforce[mask].sum().item(), rel=1e-12)


def test_clip_of_zero_width_still_learns_on_policy(maths: Maths) -> None:
    _, grad = gradient(maths, on_policy(batch(12)), **config("clip", clip_low=0.0, clip_high=0.0))
    assert (grad[batch(12)["inputs"]["completion_mask"]] != 0).all()


def test_any_cut_into_micro_batches_gives_the_same_gradient(maths: Maths) -> None:
    drawn = batch(13, rows=7)
    for surrogate, kind in itertools.product(SURROGATES, WEIGHTS):
        inputs, choice = inputs_of(drawn), config(surrogate, beta=0.1)
        per_row = maths.loss.token_weights(drawn["lengths"], kind=kind, max_new_tokens=8)
        mask = inputs["completion_mask"]
        inputs["token_weights"] = torch.where(mask, per_row[:, None], 0.0)
        whole, grad = gradient(maths, inputs, **choice)
        for cut in ([1] * 7, [3, 3, 1], [2, 5]):
            pieces, grads = [], []
            for rows in torch.arange(7).split(cut):
                width = int(mask[rows].sum(1).max())
                part = {k: v[rows, :width] if v.ndim == 2 else v[rows] for k, v in inputs.items()}
                terms, part_grad = gradient(maths, part, **choice)
                pieces.append(terms.loss)
                grads.append(torch.nn.functional.pad(part_grad, (0, mask.shape[1] - width)))
            torch.testing.assert_close(torch.stack(pieces).sum(), whole.loss, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-12, atol=1e-15)


def test_padding_never_leaks(maths: Maths) -> None:
    drawn = batch(14)
    for surrogate, kl in itertools.product(SURROGATES, ESTIMATORS):
        choice = config(surrogate, kl=kl, beta=0.2)
        reference = None
        for poison in (0.0, math.nan, math.inf, -math.inf, 1e30):
            inputs = inputs_of(drawn)
            mask = inputs["completion_mask"]
            for name in FIELDS:
                inputs[name] = torch.where(mask, inputs[name], poison)
            terms, grad = gradient(maths, inputs, **choice)
            got = (terms.loss, terms.per_token, terms.kl, terms.ratio, grad)
            assert all(torch.isfinite(value).all() for value in got)
            assert (grad[~mask] == 0).all()
            reference = got if reference is None else reference
            for value, expected in zip(got, reference, strict=True):
                assert torch.equal(value, expected), (surrogate, kl, poison)


def test_empty_mask_gives_zero(maths: Maths) -> None:
    for surrogate in SURROGATES:
        inputs = inputs_of(batch(15))
        for mask, rows in (
            (torch.zeros(6, 6, dtype=torch.bool), 6),
            (torch.zeros(0, 6, dtype=torch.bool), 0),
        ):
            part = {k: v[:rows] for k, v in inputs.items()} | {"completion_mask": mask}
            terms, grad = gradient(maths, part, **config(surrogate, beta=0.1))
            assert terms.loss.item() == 0 and (grad == 0).all()


def test_only_the_policy_gets_a_gradient(maths: Maths) -> None:
    for surrogate, kl in itertools.product(SURROGATES, ESTIMATORS):
        choice = config(surrogate, kl=kl, beta=0.2)
        inputs = inputs_of(batch(16))
        leaves = {k: v.clone().requires_grad_(v.dtype != torch.bool) for k, v in inputs.items()}
        terms = maths.loss.grpo_loss(**leaves, **choice)
        terms.loss.backward()
        assert [k for k, v in leaves.items() if v.grad is not None] == ["logprobs"]
        for field in dataclasses.fields(terms):
            assert getattr(terms, field.name).requires_grad == (field.name == "loss")
        attached = inputs["logprobs"].clone().requires_grad_()
        twice = {**inputs, "logprobs": attached, "old_logprobs": attached}
        (grad,) = torch.autograd.grad(maths.loss.grpo_loss(**twice, **choice).loss, attached)
        _, expected = gradient(maths, {**inputs, "old_logprobs": inputs["logprobs"]}, **choice)
        torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def test_special_cases_reduce_to_each_other(maths: Maths) -> None:
    drawn = batch(17)

    def grad_of(inputs: dict[str, Tensor], surrogate: str, **changed: Any) -> Tensor:
        return gradient(maths, inputs, **config(surrogate, **changed))[1]

    inputs = inputs_of(drawn)
    clip = grad_of(inputs, "clip")
    assert torch.equal(grad_of(inputs, "dual_clip", dual_clip=1e9), clip)
    assert not torch.equal(grad_of(inputs, "dual_clip", dual_clip=1.01), clip)
    wide = {"clip_low": 1.0, "clip_high": 1e9}
    torch.testing.assert_close(grad_of(inputs, "clip", **wide), grad_of(inputs, "none"), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_of(inputs, "cispo", **wide), grad_of(inputs, "none"), rtol=1e-12, atol=0)
    one_token = {k: v[:, :1] if v.ndim == 2 else v for k, v in inputs.items()}
    torch.testing.assert_close(grad_of(one_token, "gspo"), grad_of(one_token, "clip"), rtol=1e-12, atol=0)
    shift = torch.linspace(-0.6, 0.6, 6)[:, None]
    even = {**inputs, "logprobs": inputs["old_logprobs"] + shift}  # every token of a row has the row's ratio
    torch.testing.assert_close(grad_of(even, "gspo"), grad_of(even, "clip"), rtol=1e-9, atol=1e-12)


def test_mirrored_advantages_swap_the_clip_bounds(maths: Maths) -> None:
    """A at ratio 1 + x and -A at 1 - x mirror each other once clip_low and clip_high change places."""
    steps = torch.linspace(-0.9, 0.9, 19, dtype=torch.float64)[:, None]
    for low, high in ((0.2, 0.2), (0.1, 0.3)):
        sides = []
        for sign, bounds in ((1.0, (low, high)), (-1.0, (high, low))):
            inputs = {
                "logprobs": (1 + sign * steps).log(),
                "old_logprobs": torch.zeros_like(steps),
                "ref_logprobs": None,
                "advantages": torch.full((19,), sign, dtype=torch.float64),
                "completion_mask": torch.ones(19, 1, dtype=torch.bool),
                "token_weights": torch.ones(19, 1),
            }
            choice = config("clip", clip_low=bounds[0], clip_high=bounds[1])
            sides.append(gradient(maths, inputs, **choice)[0])
        assert torch.equal(sides[0].clipped_high, sides[1].clipped_low)
        gained = [side.per_token.sum() + sign * 19 for side, sign in zip(sides, (1.0, -1.0), strict=True)]
        torch.testing.assert_close(gained[0], gained[1], rtol=1e-12, atol=1e-12)


def test_token_weights_match_the_oracle(maths: Maths) -> None:
    rng = np.random.default_rng(18)
    for kind, _ in itertools.product(WEIGHTS, range(10)):
        lengths = rng.integers(1, 30, int(rng.integers(1, 9))).tolist()
        include = (rng.random(len(lengths)) < 0.6).tolist()
        for given_mask, mask in ((None, [True] * len(lengths)), (include, include)):
            got = maths.loss.token_weights(lengths, kind=kind, max_new_tokens=32, include=given_mask)
            expected = oracles.token_weights(lengths, kind, 32, mask)
            assert got.dtype == torch.float32 and got.shape == (len(lengths),)
            assert got.tolist() == pytest.approx(expected, rel=1e-6)


def test_left_out_is_as_if_never_in_the_step(maths: Maths) -> None:
    lengths, include = torch.tensor([3, 9, 4, 1, 7]), torch.tensor([True, False, True, True, False])
    for kind in WEIGHTS:
        got = maths.loss.token_weights(lengths, kind=kind, max_new_tokens=9, include=include)
        alone = maths.loss.token_weights(lengths[include], kind=kind, max_new_tokens=9)
        assert torch.equal(got[include], alone) and (got[~include] == 0).all()
        nothing = maths.loss.token_weights(lengths, kind=kind, max_new_tokens=9, include=[False] * 5)
        assert (nothing == 0).all()
        if kind != "constant":  # the weights of all tokens of the step add up to one
            assert float((got * lengths).sum()) == pytest.approx(1.0, rel=1e-6)


def test_token_weights_agree_when_lengths_are_equal(maths: Maths) -> None:
    by_kind = [maths.loss.token_weights([8] * 4, kind=kind, max_new_tokens=8) for kind in WEIGHTS]
    assert torch.equal(by_kind[0], by_kind[1]) and torch.equal(by_kind[1], by_kind[2])
    assert by_kind[0][0].item() == pytest.approx(1 / 32)


def every_outcome(log_p: Tensor, log_old: Tensor, log_ref: Tensor) -> dict[str, Tensor]:
    """Each outcome once, weighted by its probability under the policy that sampled: exact expectations."""
    return {
        "logprobs": log_p[:, None],
        "old_logprobs": log_old[:, None],
        "ref_logprobs": log_ref[:, None],
        "advantages": torch.zeros(len(log_p)),
        "completion_mask": torch.ones(len(log_p), 1, dtype=torch.bool),
        "token_weights": log_old.exp()[:, None],
    }


def test_kl_estimators_against_the_exact_divergence(maths: Maths) -> None:
    rng = np.random.default_rng(19)
    for _ in range(5):
        logits = [torch.tensor(rng.normal(size=5)) for _ in range(3)]
        logits[0].requires_grad_()
        log_p, log_old, log_ref = (z.log_softmax(0) for z in logits)
        new, ref = log_p.tolist(), log_ref.tolist()
        exact = oracles.kl_divergence(new, ref)
        reverse, forward = oracles.reverse_kl_slope(new, ref), oracles.forward_kl_slope(new, ref)
        slopes = {"k1": [0.0] * 5, "k2": reverse, "k3": forward, "ratio_k3": reverse}
        for kl, expected in slopes.items():
            on = every_outcome(log_p, log_p.detach(), log_ref)
            terms = maths.loss.grpo_loss(**on, **config("none", kl=kl, beta=1.0))
            (slope,) = torch.autograd.grad(terms.loss, logits[0], retain_graph=True)
            assert slope.tolist() == pytest.approx(expected, abs=1e-12), kl
            if kl != "k2":
                assert terms.loss.item() == pytest.approx(exact, abs=1e-12), kl
        off = every_outcome(log_p, log_old, log_ref)
        terms = maths.loss.grpo_loss(**off, **config("none", kl="ratio_k3", beta=1.0))
        (slope,) = torch.autograd.grad(terms.loss, logits[0])
        assert terms.loss.item() == pytest.approx(exact, abs=1e-12)
        assert slope.tolist() == pytest.approx(reverse, abs=1e-12)


def test_kl_is_zero_for_the_reference_itself(maths: Maths) -> None:
    for kl in ESTIMATORS:
        inputs = inputs_of(batch(20))
        inputs["ref_logprobs"] = inputs["logprobs"].clone()
        terms, _ = gradient(maths, inputs, **config("clip", kl=kl, beta=0.5))
        assert (terms.kl == 0).all()


def test_beta_zero_reports_the_kl_and_does_not_train_on_it(maths: Maths) -> None:
    inputs = inputs_of(batch(21))
    with_ref, grad = gradient(maths, inputs, **config("clip"))
    without, expected = gradient(maths, {**inputs, "ref_logprobs": None}, **config("clip"))
    assert without.kl is None and (with_ref.kl[inputs["completion_mask"]] > 0).all()
    assert torch.equal(with_ref.loss, without.loss) and torch.equal(grad, expected)
    far = {**inputs, "ref_logprobs": inputs["ref_logprobs"] + 1e4}  # exp overflows
    assert torch.equal(gradient(maths, far, **config("clip"))[1], expected)


def test_low_precision_inputs_are_computed_in_float32(maths: Maths) -> None:
    for surrogate in SURROGATES:
        wide = {k: v if v.dtype == torch.bool else v.bfloat16() for k, v in inputs_of(batch(22)).items()}
        terms, _ = gradient(maths, wide, **config(surrogate, beta=0.1))
        exact = {k: v if v.dtype == torch.bool else v.double() for k, v in wide.items()}
        expected, _ = gradient(maths, exact, **config(surrogate, beta=0.1))
        for name in ("loss", "per_token", "ratio", "kl"):
            got = getattr(terms, name)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_k3_of_a_tiny_step_keeps_its_digits(maths: Maths) -> None:
    zeros = torch.zeros(1, 1)
    step = torch.full((1, 1), 1e-3)
    one = torch.ones(1, 1)
    inputs = {"logprobs": zeros, "old_logprobs": zeros, "ref_logprobs": step, "advantages": torch.ones(1)}
    terms = maths.loss.grpo_loss(**inputs, completion_mask=one.bool(), token_weights=one, **config("clip", beta=0.1))
    assert terms.kl.item() == pytest.approx(5.0016671e-7, rel=1e-3)


def test_refusals(maths: Maths) -> None:
    inputs = inputs_of(batch(23))
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        maths.loss.grpo_loss(**{**inputs, "ref_logprobs": None}, **config(beta=0.1))
    for name in (*FIELDS, "advantages"):
        with pytest.raises(ValueError, match=name):
            maths.loss.grpo_loss(**{**inputs, name: inputs[name][:, None]}, **config())
    with pytest.raises(ValueError, match="expected bool"):
        maths.loss.grpo_loss(**{**inputs, "completion_mask": inputs["completion_mask"].long()}, **config())
    good = {"kind": "token", "max_new_tokens": 8}
    for lengths, changed, message in (
        ([1, 9], {}, "completion 1: expected length 1 .. 8, got 9"),
        ([0, 2], {}, "completion 0"),
        ([1, 2], {"include": [True]}, "include"),
        ([1, 2], {"include": [1, 0]}, "include"),
    ):
        with pytest.raises(ValueError, match=message):
            maths.loss.token_weights(lengths, **{**good, **changed})


# --- properties, on the module itself -----------------------------------------------------------------------

nats = st.floats(-3, 3, width=32)


@settings(max_examples=60, deadline=None)
@given(nats, nats, st.floats(-2, 2), st.floats(0, 0.9), st.floats(0, 2), st.sampled_from(["clip", "dual_clip"]))
def test_surrogate_is_a_lower_bound(
    new: float, old: float, advantage: float, low: float, high: float, surrogate: str
) -> None:
    """Clipping never promises more than ratio·A; dual clipping never less than dual·A for A < 0."""
    one = torch.ones(1, 1, dtype=torch.float64)
    terms = REAL.loss.grpo_loss(
        one * new, one * old, None, torch.tensor([advantage]), one.bool(), one,
        **config(surrogate, clip_low=low, clip_high=high),
    )  # fmt: skip
    objective, ratio = -terms.loss.item(), math.exp(new - old)
    advantage = float(np.float32(advantage))
    if surrogate == "clip":
        assert objective <= ratio * advantage + 1e-9
    elif advantage < 0:
        assert objective >= 1.6 * advantage - 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(nats, nats), min_size=1, max_size=5))
def test_k3_is_never_negative(pairs: list[tuple[float, float]]) -> None:
    new, ref = (torch.tensor([values], dtype=torch.float64) for values in zip(*pairs, strict=True))
    ones = torch.ones_like(new)
    for kl in ("k2", "k3", "ratio_k3"):
        terms = REAL.loss.grpo_loss(new, new, ref, torch.ones(1), ones.bool(), ones, **config(kl=kl))
        assert (terms.kl >= 0).all()
        assert (terms.kl[new == ref] == 0).all() and (terms.kl[(new - ref).abs() > 1e-3] > 0).all()
