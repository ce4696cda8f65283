"""One optimiser step: the gradient is the whole batch's, however the batch is cut, padded or ordered."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo import update as update_module
from grpo.batch import group_advantages, make_batch
from grpo.config import Config, load_config
from grpo.metrics import compute_token_terms
from grpo.policy.policy import Policy, copy_adapter
from grpo.rollout import rollout
from grpo.types import Batch, Completion, Group
from grpo.update import MicroBatchLimit, learning_rate, micro_batches, update_policy
from tests.test_rollout import keys_of, prompts_of

TINY = Path(__file__).parent.parent / "configs" / "tiny.toml"
REWARDS = np.array([[1.0, -0.5, -2.0, 1.0], [0.0, 1.0, 1.0, -0.5], [-1.0, -1.0, -1.0, -1.0]])


def config_with(*overrides: str) -> Config:
    return load_config(TINY, ["rollout.group_size=4", "rollout.prompts_per_step=3", "optim.micro_batch_size=12",
                              "rollout.max_new_tokens=20", *overrides])[0]  # fmt: skip


def batch_of(policy: Policy, config: Config) -> Batch:
    prompts = prompts_of(policy)
    groups = rollout(policy, prompts, keys_of(prompts, 4), max_new_tokens=20, temperature=config.rollout.temperature)
    return make_batch(groups, group_advantages(groups, REWARDS, config.advantage), config)


def gradients(
    policy: Policy,
    batch: Batch,
    config: Config,
    reference: dict[str, Tensor] | None = None,
    run: Callable[..., Any] = update_policy,
) -> dict[str, Tensor]:
    """Gradients that `update_policy` hands to the optimiser, before the step."""
    seen: dict[str, Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            seen.update({name: p.grad.clone() for name, p in policy.adapter_parameters().items() if p.grad is not None})

    run(policy, batch, config, Recorder(policy.adapter_parameters().values(), lr=0.0), reference, step=0)
    return seen


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys() and a
    assert max(float(g.abs().max()) for g in a.values()) > 1e-3, "a comparison of zeros shows nothing"
    for name, g in a.items():
        torch.testing.assert_close(g, b[name], atol=atol, rtol=1e-4)


def plain_gradients(policy: Policy, batch: Batch, beta: float, temperature: float) -> dict[str, Tensor]:
    """The loss from the formulas, row by row: full logits, no padding, no chunks, no micro-batches."""
    n = len(batch.completion_ids)
    total = torch.zeros(())
    for prompt, ids, advantage in zip(batch.prompt_ids, batch.completion_ids, batch.advantages, strict=True):

        def logprobs(prompt: tuple[int, ...] = prompt, ids: tuple[int, ...] = ids) -> Tensor:
            logits = policy.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].float()
            law = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            return law.gather(1, torch.tensor(ids)[:, None])[:, 0]

        new = logprobs()
        with torch.no_grad(), policy.model.disable_adapter():
            ref = logprobs()
        ratio = (new - new.detach()).exp()
        kl = (ref - new).exp() - (ref - new) - 1
        total = total + (-ratio * advantage + beta * kl).sum() / (n * len(ids))
    names, tensors = zip(*policy.adapter_parameters().items(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, tensors), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_the_gradient_is_the_formulas(make_policy: Callable[..., Policy], beta: float, temperature: float) -> None:
    policy = make_policy()
    config = config_with(f"loss.beta={beta}", f"rollout.temperature={temperature}", "optim.max_grad_norm=1e9")
    batch = batch_of(policy, config)
    close(gradients(policy, batch, config), plain_gradients(policy, batch, beta, temperature), atol=2e-6)


@pytest.mark.parametrize("weights", ["sequence", "token", "constant"])
def test_any_cut_into_micro_batches_gives_the_same_gradient(make_policy: Callable[..., Policy], weights: str) -> None:
    policy = make_policy()
    sizes = [config_with(f"optim.micro_batch_size={n}", f"loss.token_weights={weights}") for n in (12, 5, 1)]
    batch = batch_of(policy, sizes[0])
    whole, fives, ones = (gradients(policy, batch, config) for config in sizes)
    close(whole, fives)
    close(whole, ones)


def test_gradient_checkpointing_changes_nothing(make_policy: Callable[..., Policy]) -> None:
    plain, saving = make_policy(), make_policy(checkpointing=True)
    config = config_with()
    batch = batch_of(plain, config)
    close(gradients(plain, batch, config), gradients(saving, batch, config))


def test_the_clipped_gradient_norm_is_the_configs(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    config = config_with("optim.max_grad_norm=0.001")
    clipped = gradients(policy, batch_of(policy, config), config)
    assert math.sqrt(sum(float(g.square().sum()) for g in clipped.values())) == pytest.approx(0.001, rel=1e-3)


def test_the_first_pass_is_on_policy_and_later_ones_are_not(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    for epochs in (1, 3):
        config = config_with(f"optim.inner_epochs={epochs}", "optim.learning_rate=0.02", "loss.beta=0.0")
        optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.02)
        before = copy_adapter(policy)
        batch = batch_of(policy, config)
        done = update_policy(policy, batch, config, optimizer, None, step=0)
        account = compute_token_terms(done.logprobs, batch, config.loss)
        assert (account.ratio[0] == 1).all(), "the policy has not moved before its first optimiser step"
        assert all((ratio != 1).any() for ratio in account.ratio[1:])
        assert optimizer.state[next(iter(policy.adapter_parameters().values()))]["step"] == epochs
        assert any(not torch.equal(before[name], p) for name, p in policy.adapter_parameters().items())
        assert bool(account.clip_side.any()) == (epochs == 3)


def test_the_base_never_moves(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    config = config_with("optim.learning_rate=0.1")
    base = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.1)
    update_policy(policy, batch_of(policy, config), config, optimizer, None, step=0)
    assert all(torch.equal(base[n], p) for n, p in policy.model.named_parameters() if not p.requires_grad)
    assert all(p.grad is None for p in policy.model.parameters())


def test_beta_zero_never_runs_the_reference(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the reference was run")

    policy = make_policy()
    batch = batch_of(policy, config_with())
    monkeypatch.setattr(update_module, "as_reference", never)
    still = torch.optim.SGD(policy.adapter_parameters().values(), lr=0.0)
    config = config_with("loss.beta=0.0")
    tokens = update_policy(policy, batch, config, still, None, step=0).logprobs
    assert tokens.ref_logprobs is None and compute_token_terms(tokens, batch, config.loss).kl is None
    with pytest.raises(AssertionError, match="reference was run"):
        gradients(policy, batch, config_with())


def test_kl_is_zero_against_oneself_and_positive_against_the_base(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    config = config_with()
    batch = batch_of(policy, config)
    still = torch.optim.SGD(policy.adapter_parameters().values(), lr=0.0)
    oneself = update_policy(policy, batch, config, still, copy_adapter(policy), step=0).logprobs
    assert (compute_token_terms(oneself, batch, config.loss).kl == 0).all()
    base = compute_token_terms(
        update_policy(policy, batch, config, still, None, step=0).logprobs, batch, config.loss
    ).kl
    assert base is not None and (base >= 0).all() and float(base.mean()) > 1e-4


def test_sampler_and_trainer_agree(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    config = config_with("rollout.temperature=0.8")
    batch = batch_of(policy, config)
    tokens = update_policy(
        policy, batch, config, torch.optim.SGD(policy.adapter_parameters().values(), lr=0.0), None, step=0
    ).logprobs
    drawn = batch.sampler_logprobs[batch.completion_mask]
    assert tokens.logprobs.shape == (1, len(drawn)) == (1, len(tokens.entropy))
    assert float((tokens.logprobs[0] - drawn).abs().max()) < 2e-5
    assert float(tokens.entropy.mean()) > 0.1


@pytest.mark.parametrize("micro", [12, 5, 1])
def test_the_record_is_in_the_batchs_order_whatever_the_cut(make_policy: Callable[..., Policy], micro: int) -> None:
    policy = make_policy()
    config = config_with(f"optim.micro_batch_size={micro}")
    batch = batch_of(policy, config)
    assert len({len(ids) for ids in batch.completion_ids}) > 1
    logprobs, entropies = [], []
    for prompt, ids in zip(batch.prompt_ids, batch.completion_ids, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
        law = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logprobs.append(law.gather(1, torch.tensor(ids)[:, None])[:, 0])
        entropies.append(-(law.exp() * law).sum(1))
    tokens = update_policy(
        policy, batch, config, torch.optim.AdamW(policy.adapter_parameters().values()), None, step=0
    ).logprobs
    torch.testing.assert_close(tokens.logprobs[0], torch.cat(logprobs), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.entropy, torch.cat(entropies), atol=2e-5, rtol=1e-5)


def test_the_accounts_loss_is_the_updates(make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    config = config_with("loss.beta=0.3", "optim.inner_epochs=2", "optim.micro_batch_size=5")
    batch = batch_of(policy, config)
    seen: list[float] = []
    true_loss = update_module.grpo_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        terms = true_loss(*args, **kwargs)
        seen.append(terms.loss.item())
        return terms

    monkeypatch.setattr(update_module, "grpo_loss", recorded)
    done = update_policy(
        policy, batch, config, torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.02), None, step=0
    )
    loss = compute_token_terms(done.logprobs, batch, config.loss).loss.sum(1).tolist()
    assert done.loss == pytest.approx(sum(seen[:3]), rel=1e-6)
    assert loss == pytest.approx([sum(seen[:3]), sum(seen[3:])], rel=1e-5, abs=1e-6) and abs(loss[1]) > 1e-3


def test_a_step_that_is_not_finite_is_skipped(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    config = config_with()
    batch = batch_of(policy, config)
    poisoned = dataclasses.replace(batch, advantages=torch.full_like(batch.advantages, math.nan))
    before = copy_adapter(policy)
    done = update_policy(
        policy, poisoned, config, torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.1), None, step=0
    )
    assert done.skipped == 1
    assert all(torch.equal(before[name], p) for name, p in policy.adapter_parameters().items())


def test_a_loss_that_is_not_finite_skips_the_step_whatever_the_gradient(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with()
    batch, before = batch_of(policy, config), copy_adapter(policy)
    true = update_module.forward_backward

    def without_end(*given: Any) -> Any:
        logprobs, entropies, total = true(*given)
        return logprobs, entropies, total + math.inf

    monkeypatch.setattr(update_module, "forward_backward", without_end)
    optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=0.1)
    done = update_policy(policy, batch, config, optimizer, None, step=0)
    assert done.skipped == 1 and math.isfinite(done.grad_norm) and done.grad_norm > 0
    assert all(torch.equal(before[name], p) for name, p in policy.adapter_parameters().items())


def test_the_reference_is_scored_without_dropout(make_policy: Callable[..., Policy]) -> None:
    noisy, still = make_policy(dropout=0.5), make_policy()
    config = config_with("loss.beta=0.1", "lora.dropout=0.5")
    batch, copy = batch_of(still, config), copy_adapter(still)
    found, expected = (
        update_policy(p, batch, config, torch.optim.SGD(p.adapter_parameters().values(), lr=0.0), copy, step=0).logprobs
        for p in (noisy, still)
    )
    torch.testing.assert_close(found.ref_logprobs, expected.ref_logprobs, atol=2e-5, rtol=0)
    assert not torch.allclose(found.logprobs, expected.logprobs, atol=1e-3)


def test_the_recorded_entropy_is_the_first_epochs(make_policy: Callable[..., Policy]) -> None:
    one, two = make_policy(), make_policy()
    found = []
    for policy, epochs in ((one, 1), (two, 3)):
        config = config_with(f"optim.inner_epochs={epochs}")
        optimizer = torch.optim.SGD(policy.adapter_parameters().values(), lr=50.0)
        found.append(update_policy(policy, batch_of(policy, config), config, optimizer, None, step=0).logprobs)
    assert torch.equal(found[0].entropy, found[1].entropy)
    assert not torch.allclose(found[1].logprobs[0], found[1].logprobs[2], atol=1e-3)


def test_a_step_without_a_signal_moves_by_momentum_as_a_gradient_of_zero_does(
    make_policy: Callable[..., Policy],
) -> None:
    """Rows of no advantage have no backward pass: that must not be another rule for AdamW."""
    config = config_with("loss.beta=0.0")

    def moved(second: Callable[[Policy, Batch, Any], object]) -> dict[str, Tensor]:
        policy = make_policy()
        optimizer = torch.optim.AdamW(policy.adapter_parameters().values(), lr=1e-2)
        batch = batch_of(policy, config)
        update_policy(policy, batch, config, optimizer, None, step=0)
        before = copy_adapter(policy)
        second(policy, dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages)), optimizer)
        return {name: tensor - before[name] for name, tensor in copy_adapter(policy).items()}

    def by_hand(policy: Policy, batch: Batch, optimizer: Any) -> None:
        for p in policy.adapter_parameters().values():
            p.grad = torch.zeros_like(p)
        optimizer.step()

    ours = moved(lambda policy, batch, optimizer: update_policy(policy, batch, config, optimizer, None, step=0))
    theirs = moved(by_hand)
    assert max(float(tensor.abs().max()) for tensor in ours.values()) > 1e-4
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_micro_batches_hold_every_row_once_and_longest_first(make_policy: Callable[..., Policy]) -> None:
    batch = batch_of(make_policy(), config_with())
    cuts = micro_batches(batch, MicroBatchLimit(5), beta=0.1)
    rows = [i for cut in cuts for i in cut.rows.tolist()]
    lengths = [len(batch.prompt_ids[i]) + len(batch.completion_ids[i]) for i in rows]
    assert sorted(rows) == list(range(12)) and [len(cut.rows) for cut in cuts] == [5, 5, 2]
    groups = [lengths[i : i + 4] for i in range(0, 12, 4)]
    assert all(len({batch.prompt_ids[i] for i in rows[b : b + 4]}) == 1 for b in (0, 4, 8)), "a prompt is computed once"
    assert all(group == sorted(group, reverse=True) for group in groups)
    assert [group[0] for group in groups] == sorted((group[0] for group in groups), reverse=True)


def test_batch_lays_out_rows_group_by_group(make_policy: Callable[..., Policy]) -> None:
    prompts = prompts_of(make_policy())[:2]
    row = [Completion((5, 6, 7), (-1.0, -2.0, -3.0), False, "abc"), Completion((8,), (-4.0,), True, "")]
    groups = [Group(prompts[0], (row[0], row[1])), Group(prompts[1], (row[1], row[0]))]
    batch = make_batch(
        groups, group_advantages(groups, np.array([[1.0, 0.0], [0.0, 0.0]]), config_with().advantage), config_with()
    )
    assert batch.prompt_ids == (prompts[0].ids, prompts[0].ids, prompts[1].ids, prompts[1].ids)
    assert batch.completion_ids == ((5, 6, 7), (8,), (8,), (5, 6, 7))
    assert batch.completion_mask.tolist() == [
        [True] * 3,
        [True, False, False],
        [True, False, False],
        [True] * 3,
    ]
    assert batch.sampler_logprobs.tolist() == [[-1, -2, -3], [-4, 0, 0], [-4, 0, 0], [-1, -2, -3]]
    torch.testing.assert_close(
        batch.advantages, torch.tensor([0.5, -0.5, 0, 0], dtype=torch.float64) / (0.5**0.5 + 1e-4)
    )
    torch.testing.assert_close(
        batch.token_weights, torch.tensor([[1 / 12] * 3, [0.25, 0, 0], [0.25, 0, 0], [1 / 12] * 3])
    )


def test_learning_rate_schedules() -> None:
    def rates(*overrides: str) -> list[float]:
        config = config_with("optim.learning_rate=1.0", "train.steps=4", *overrides)
        return [learning_rate(config, i) for i in range(4)]

    assert rates("optim.schedule=constant") == [1, 1, 1, 1]
    assert rates("optim.schedule=linear") == [1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(rates("optim.schedule=cosine"), [1, 0.8536, 0.5, 0.1464], atol=1e-4)
    np.testing.assert_allclose(rates("optim.schedule=constant", "optim.warmup_steps=2"), [1 / 3, 2 / 3, 1, 1])
    np.testing.assert_allclose(rates("optim.schedule=linear", "optim.warmup_steps=2"), [1 / 3, 2 / 3, 1, 0.5])
