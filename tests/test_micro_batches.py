"""Micro-batches: what fits, what is skipped, and what happens when the device says no."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import grpo.policy.base_model
import grpo.update
from grpo.policy.base_model import load_base
from grpo.policy.policy import Policy
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.types import Batch
from grpo.update import MicroBatch, MicroBatchLimit, OutOfMemory, micro_batch_limit, micro_batches, update_policy
from tests.support.saved_tensors import kept_bytes
from tests.test_update import batch_of, close, config_with, gradients


def with_lengths(batch: Batch, lengths: list[int]) -> Batch:
    """Two prompts of 10 and 20 tokens, answered in turn by completions of these lengths."""
    prompts = [(1,) * 10, (2,) * 20]
    return replace(
        batch,
        prompt_ids=tuple(prompts[i % 2] for i in range(len(lengths))),
        completion_ids=tuple((7,) * n for n in lengths),
        advantages=torch.arange(len(lengths), dtype=torch.float64) % 3,
        token_weights=(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float(),
    )


@pytest.fixture
def batch(make_policy: Callable[..., Policy]) -> Batch:
    return with_lengths(batch_of(make_policy(), config_with()), [5, 6, 7, 8, 9, 10])


def rows_of(cuts: tuple[MicroBatch, ...]) -> list[list[int]]:
    return [cut.rows.tolist() for cut in cuts]


def test_tokens_are_counted_with_each_prompt_once(batch: Batch) -> None:
    assert MicroBatchLimit(9, 35).count_tokens(batch, [1, 3, 5]) == 20 + 6 + 8 + 10
    assert MicroBatchLimit(9, 35, share_prompts=False).count_tokens(batch, [1, 3, 5]) == 3 * 30
    assert rows_of(micro_batches(batch, MicroBatchLimit(9, 44), beta=1.0)) == [[5, 3, 1], [4, 2, 0]]
    assert rows_of(micro_batches(batch, MicroBatchLimit(9, 43), beta=1.0)) == [[5, 3], [1], [4, 2, 0]]
    assert rows_of(micro_batches(batch, MicroBatchLimit(9, 60, share_prompts=False), beta=1.0)) == [
        [5, 3],
        [1, 4],
        [2, 0],
    ]
    assert rows_of(micro_batches(batch, MicroBatchLimit(2), beta=1.0)) == [[5, 3], [1, 4], [2, 0]]


def test_a_row_that_is_too_long_stands_alone(batch: Batch) -> None:
    assert rows_of(micro_batches(batch, MicroBatchLimit(9, 1), beta=1.0)) == [[5], [3], [1], [4], [2], [0]]


def test_rows_without_signal_come_last_unless_the_kl_moves_them(batch: Batch) -> None:
    cuts = micro_batches(batch, MicroBatchLimit(9), beta=0.0)
    assert [(cut.rows.tolist(), cut.silent) for cut in cuts] == [([5, 1, 4, 2], False), ([3, 0], True)]
    assert not any(cut.silent for cut in micro_batches(batch, MicroBatchLimit(9), beta=0.1))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rows_without_weight_are_silent_whatever_moves_the_others(batch: Batch, beta: float) -> None:
    batch.token_weights[[1, 5]] = 0
    cuts = micro_batches(batch, MicroBatchLimit(9), beta=beta)
    assert [sorted(cut.rows.tolist()) for cut in cuts if cut.silent] == [[1, 5] if beta else [0, 1, 3, 5]]


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_masked_rows_cost_no_backward_and_change_nothing(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    """Nor what is recorded of them."""
    policy, config = make_policy(), config_with(f"loss.beta={beta}", "optim.inner_epochs=2")
    batch = batch_of(policy, config)
    masked = [0, 5, 6, 10]
    weights = batch.token_weights.clone()
    weights[masked] = 0
    batch = replace(batch, token_weights=weights)
    trained: set[int] = set()
    plain = grpo.update.micro_batch_logprobs

    def watched(policy: Policy, batch: Batch, cut: MicroBatch, temperature: float) -> Any:
        if torch.is_grad_enabled():
            trained.update(cut.rows.tolist())
        return plain(policy, batch, cut, temperature)

    monkeypatch.setattr(grpo.update, "micro_batch_logprobs", watched)
    done: list[Any] = []

    def keeping(*args: Any, **kwargs: Any) -> None:
        done.append(update_policy(*args, **kwargs))

    skipped = gradients(policy, batch, config, run=keeping)
    assert trained == set(range(12 if beta else 8)) - set(masked), "the third group has no advantage"
    monkeypatch.setattr(grpo.update, "micro_batches", lambda *_, **__: (MicroBatch(torch.arange(12)),))
    close(skipped, gradients(policy, batch, config, run=keeping))
    assert trained == set(range(12))
    silent, whole = (result.logprobs for result in done)
    for name in ("logprobs", "entropy", "ref_logprobs")[: 3 if beta else 2]:
        torch.testing.assert_close(getattr(silent, name), getattr(whole, name), atol=2e-5, rtol=1e-5)
    assert done[0].figures == pytest.approx(done[1].figures, rel=1e-5, abs=1e-7)


def test_silent_rows_cost_no_backward_and_change_nothing(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with("loss.beta=0.0")
    batch = batch_of(policy, config)
    assert [bool(a) for a in batch.advantages.view(3, 4).abs().sum(1)] == [True, True, False]
    recorded: list[tuple[int, bool]] = []
    plain = grpo.update.micro_batch_logprobs

    def watched(policy: Policy, batch: Batch, cut: MicroBatch, temperature: float) -> Any:
        recorded.append((len(cut.rows), torch.is_grad_enabled()))
        return plain(policy, batch, cut, temperature)

    monkeypatch.setattr(grpo.update, "micro_batch_logprobs", watched)
    skipped = gradients(policy, batch, config)
    assert recorded == [(8, True), (4, False)]
    monkeypatch.setattr(grpo.update, "micro_batches", lambda *_, **__: (MicroBatch(torch.arange(12)),))
    close(skipped, gradients(policy, batch, config))


def test_tokens_bound_the_micro_batch_and_not_the_gradient(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    whole, few = config_with(), config_with("optim.micro_batch_tokens=100")
    batch = batch_of(policy, whole)
    assert len(micro_batches(batch, micro_batch_limit(policy, few.optim), beta=0.1)) > 3
    close(gradients(policy, batch, whole), gradients(policy, batch, few))


def test_what_is_kept_grows_with_the_row_and_holds_no_weights(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    short, long = (kept_bytes(policy, (1,) * n, (2,) * n) for n in (64, 128))
    assert 1.5 * short < long < 2.5 * short
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    assert kept_bytes(policy, (1,), (2,)) < weights


def test_what_checkpointing_saves_is_seen_on_every_path(make_policy: Callable[..., Policy]) -> None:
    for dropout in (0.0, 0.1):  # with dropout the modules are gone through
        plain, saving = (make_policy(dropout=dropout, checkpointing=c) for c in (False, True))
        kept = [kept_bytes(policy, (1,) * 64, (2,) * 64) for policy in (plain, saving)]
        assert kept[1] < 0.5 * kept[0] and not saving.model.training


def test_a_random_model_larger_than_the_machine_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.policy.base_model, "host_memory", lambda: 1 << 30)
    with pytest.raises(UserError, match=r"needs 35,815,213,056 bytes for its weights; this machine has 1,073,741,824"):
        load_base("random:qwen3.5-9b", device=torch.device("cpu"), dtype=torch.float32)


def simulate_memory(monkeypatch: pytest.MonkeyPatch, rows: int, *, free: int = 0) -> list[int]:
    """Let every backward pass of more than ``rows`` rows run out of memory, except the first ``free`` ones. Returns the
    list to which the size of each attempted micro-batch is appended."""
    attempts: list[int] = []
    plain = grpo.update.micro_batch_logprobs

    def limited(policy: Policy, batch: Batch, cut: MicroBatch, temperature: float) -> Any:
        result = plain(policy, batch, cut, temperature)
        if torch.is_grad_enabled():
            attempts.append(len(cut.rows))
            if len(cut.rows) > rows and len(attempts) > free:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(grpo.update, "micro_batch_logprobs", limited)
    return attempts


def test_out_of_memory_halves_the_micro_batch_for_the_rest_of_the_run(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, config = make_policy(), config_with()
    batch = batch_of(policy, config)
    whole = gradients(policy, batch, config)
    attempts, limit = simulate_memory(monkeypatch, 3), micro_batch_limit(policy, config.optim)
    close(gradients(policy, batch, config, run=partial(update_policy, limit=limit)), whole)
    assert (attempts, limit.rows) == ([12, 6, 3, 3, 3, 3], 3)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: a micro-batch of {n} rows does not fit the device's memory: limited to {n // 2} "
        "for the rest of this run"
        for n in (12, 6)
    ]
    attempts.clear()
    close(gradients(policy, batch, config, run=partial(update_policy, limit=limit)), whole)
    assert attempts == [3] * 4, "the next step starts with the smaller limit"


def test_a_limit_in_tokens_is_halved_by_the_rows_that_were_tried(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with("optim.micro_batch_tokens=100")
    batch = batch_of(policy, config)
    largest = max(len(cut.rows) for cut in micro_batches(batch, micro_batch_limit(policy, config.optim), beta=0.1))
    assert 1 < largest < 12
    simulate_memory(monkeypatch, largest // 2)
    limit = micro_batch_limit(policy, config.optim)
    gradients(policy, batch, config, run=partial(update_policy, limit=limit))
    assert limit.rows == largest // 2


def test_a_pass_that_failed_midway_leaves_no_gradient_behind(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with("optim.micro_batch_size=6")
    batch = batch_of(policy, config)
    whole = gradients(policy, batch, config)
    attempts = simulate_memory(monkeypatch, 3, free=1)
    close(gradients(policy, batch, config), whole)
    assert attempts == [6, 6, 3, 3, 3, 3]


def test_a_single_row_that_does_not_fit_is_one_error(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(), config_with()
    batch = batch_of(policy, config)
    attempts = simulate_memory(monkeypatch, 0)
    before = {name: p.clone() for name, p in policy.adapter_parameters().items()}
    with pytest.raises(
        OutOfMemory,
        match=r"a single row does not fit the device's memory: set model.gradient",
    ):
        update_policy(policy, batch, config, torch.optim.AdamW(policy.adapter_parameters().values()), None, step=0)
    assert attempts == [12, 6, 3, 1]
    assert all(torch.equal(before[name], p) for name, p in policy.adapter_parameters().items())
    assert issubclass(OutOfMemory, INPUT_ERRORS)


def test_the_reference_is_halved_as_well(make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = make_policy(), config_with("loss.beta=0.4")
    batch, plain = batch_of(policy, config), grpo.update.batch_logprobs
    whole = gradients(policy, batch, config)
    sizes: list[int] = []

    def limited(policy: Policy, batch: Batch, cuts: Sequence[MicroBatch], temperature: float) -> Any:
        sizes.append(len(cuts[0].rows))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(policy, batch, cuts, temperature)

    monkeypatch.setattr(grpo.update, "batch_logprobs", limited)
    close(gradients(policy, batch, config), whole)
    assert sizes == [12, 6]
