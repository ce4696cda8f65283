"""The loss and the advantages against TRL's own code, run on random inputs.

TRL computes both inside methods of its trainer. They are called unbound on a stand-in that has the attributes
they read; the model's forward pass, the generation and the rewards are replaced by given numbers.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.advantage import advantages
from grpo.loss import grpo_loss, token_weights

trl = pytest.importorskip("trl", minversion="1.16")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

ROWS, WIDTH, BUDGET = 6, 5, 9
EPSILON_IN_TRL = 1e-4
RTOL = 1e-6  # ours: float32 token weights; TRL's: the n/(n - 1) of its std in float32


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )


def stand_in(**changed: Any) -> SimpleNamespace:
    """A trainer without a model; `changed` are the settings under test."""
    arguments = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    arguments |= {name: changed.pop(name) for name in list(changed) if name in arguments}
    settings = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": BUDGET,
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator(),
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    return SimpleNamespace(args=SimpleNamespace(**arguments), **{**settings, **changed})


def batch(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lengths = [WIDTH, 1, *rng.integers(1, WIDTH + 1, ROWS - 2).tolist()]
    shape = (ROWS, WIDTH)
    old = torch.tensor(-rng.exponential(1.0, shape))
    return {
        "lengths": lengths,
        "mask": torch.arange(WIDTH) < torch.tensor(lengths)[:, None],
        "logprobs": old + torch.tensor(0.5 * rng.normal(size=shape)),
        "old": old,
        "ref": old + torch.tensor(0.5 * rng.normal(size=shape)),
        "advantages": torch.tensor(rng.permutation(np.linspace(-1.5, 1.7, ROWS))),
    }


def theirs(trainer: SimpleNamespace, drawn: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    leaf = drawn["logprobs"].clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    mask = drawn["mask"].long()
    inputs = {
        "prompt_ids": torch.ones(ROWS, 2, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.long),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": drawn["advantages"],
        "old_per_token_logps": drawn["old"],
        "ref_per_token_logps": drawn["ref"],
        "num_items_in_batch": mask.sum(),
    }
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, torch.autograd.grad(loss, leaf)[0], trainer._metrics["train"]


def ours(drawn: dict[str, Any], weights: str, **changed: Any) -> tuple[Tensor, Tensor, Any]:
    choice = {
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "kl": "k3",
        "beta": 0.0,
    }
    per_row = token_weights(drawn["lengths"], kind=weights, max_new_tokens=BUDGET)
    leaf = drawn["logprobs"].clone().requires_grad_()
    terms = grpo_loss(
        leaf,
        drawn["old"],
        drawn["ref"],
        drawn["advantages"],
        drawn["mask"],
        torch.where(drawn["mask"], per_row[:, None], 0.0),
        **{**choice, **changed},
    )
    return terms.loss, torch.autograd.grad(terms.loss, leaf)[0], terms


LOSSES = {
    "grpo": ({}, "sequence", {}),
    "bnpo": ({"loss_type": "bnpo"}, "token", {}),
    "dapo": ({"loss_type": "dapo"}, "token", {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "constant", {}),
    "clip-higher": ({"loss_type": "dapo", "epsilon_high": 0.4}, "token", {"clip_high": 0.4}),
    "k3": ({"beta": 0.3}, "sequence", {"beta": 0.3}),
    "k3, dapo": ({"loss_type": "dapo", "beta": 0.3}, "token", {"beta": 0.3}),
    "bias-corrected k3": (
        {"beta": 0.3, "use_bias_correction_kl": True},
        "sequence",
        {"beta": 0.3, "kl": "ratio_k3"},
    ),
    # TRL's upper bound of the ratio acts on both signs; above 1 + clip_high that is the dual clip
    "delta": ({"delta": 1.5}, "sequence", {"surrogate": "dual_clip", "dual_clip": 1.5}),
    "sequence ratio": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1},
        "sequence",
        {"surrogate": "gspo", "clip_low": 0.05, "clip_high": 0.1},
    ),
    "sequence ratio, dapo, k3": (
        {"importance_sampling_level": "sequence", "loss_type": "dapo", "beta": 0.3},
        "token",
        {"surrogate": "gspo", "beta": 0.3},
    ),
    # TRL's cispo reads epsilon_high as the cap itself, not as its distance from 1
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        "token",
        {"surrogate": "cispo", "clip_high": 0.3},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name: str) -> None:
    theirs_set, weights, ours_set = LOSSES[name]
    for seed in range(5):
        drawn = batch(seed)
        loss, grad, _ = ours(drawn, weights, **ours_set)
        expected, expected_grad, _ = theirs(stand_in(**theirs_set), drawn)
        assert loss.item() == pytest.approx(expected.item(), rel=RTOL)
        torch.testing.assert_close(grad, expected_grad, rtol=RTOL, atol=1e-9)


def test_first_pass() -> None:
    for name, (theirs_set, weights, ours_set) in LOSSES.items():
        drawn = batch(3)
        drawn["old"] = drawn["logprobs"].clone()
        _, grad, terms = ours(drawn, weights, **ours_set)
        _, expected, _ = theirs(stand_in(**theirs_set), drawn)
        assert (terms.ratio == 1).all(), name
        torch.testing.assert_close(grad, expected, rtol=RTOL, atol=1e-9)


@pytest.mark.parametrize("name", ["dapo", "clip-higher", "k3, dapo"])
def test_clip_ratios_and_kl(name: str) -> None:
    theirs_set, weights, ours_set = LOSSES[name]
    for seed in range(5):
        drawn = batch(seed)
        _, _, terms = ours(drawn, weights, **ours_set)
        _, _, metrics = theirs(stand_in(**theirs_set), drawn)
        mask = drawn["mask"]
        for side in ("low", "high"):
            share = getattr(terms, f"clipped_{side}")[mask].double().mean().item()
            assert share == pytest.approx(metrics[f"clip_ratio/{side}_mean"][0], rel=RTOL)
        if "beta" in ours_set:
            assert terms.kl[mask].mean().item() == pytest.approx(metrics["kl"][0], rel=RTOL)


# --- advantages ---------------------------------------------------------------------------------------------


def their_advantages(rewards: Tensor, scale: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """TRL's `_generate_and_score_completions` with generation and rewards replaced."""

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    count, group = rewards.numel(), rewards.shape[1]
    ids = [[1, 2]] * count
    trainer = stand_in(
        environment_factories=None,
        environments=None,
        tools=None,
        _generate=lambda prompts: (ids, ids, None, [""] * count, None, {}, None, None),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        _calculate_rewards=lambda *_: rewards.reshape(-1, 1),
        num_generations=group,
        reward_weights=torch.ones(1, dtype=rewards.dtype),
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        reward_func_names=["reward"],
        reward_funcs=[None],
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        log_multimodal=False,
    )
    trainer.args.per_device_train_batch_size = count
    trainer.args.gradient_checkpointing_kwargs = None
    trainer.args.gradient_accumulation_steps = 1
    monkeypatch.setattr(grpo_trainer, "disable_gradient_checkpointing", nothing)
    monkeypatch.setattr(grpo_trainer, "gather_object", lambda x: x)
    output = grpo_trainer.GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "x"}] * count)
    return output["advantages"].reshape(rewards.shape).numpy()


OUR_KINDS = {"none": "mean_only"}


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_advantages(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    for _ in range(5):
        rewards = rng.choice([-2.0, -1.0, -0.5, 0.0, 1.0, 1.5], (4, 8))
        rewards[0] = 1.0
        expected = their_advantages(torch.tensor(rewards), scale, monkeypatch)
        got = advantages(rewards, kind=OUR_KINDS.get(scale, scale), epsilon=EPSILON_IN_TRL, ddof=1)
        np.testing.assert_allclose(got, expected, rtol=RTOL, atol=1e-12)
        # rows that no reward function could score are out of TRL's baseline: they reach it as NaN
        scored = rng.random(rewards.shape) < 0.7
        scored[1] = [True] + [False] * 7
        missing = torch.tensor(np.where(scored, rewards, np.nan))
        expected = their_advantages(missing, scale, monkeypatch)
        got = advantages(rewards, kind=OUR_KINDS.get(scale, scale), epsilon=EPSILON_IN_TRL, ddof=1, in_baseline=scored)
        np.testing.assert_allclose(got, expected, rtol=RTOL, atol=1e-12)
