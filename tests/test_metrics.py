"""A step's account: token terms from the formulas by loop, sums to the last bit, shares that add up."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.batch import group_advantages, make_batch
from grpo.config import Config, load_config
from grpo.metrics import (
    advantage_by_component,
    compute_token_terms,
    fsum_or_nan,
    rewards_of,
    step_metrics,
    token_slices,
)
from grpo.types import Case, Completion, Group, Prompt, ReplacedGroup, StepLogprobs, StepRecord
from rewards import Answer, FiredRule, Score

TINY = Path(__file__).parent.parent / "configs" / "tiny.toml"
PARTS = {
    "outcome": [[1.0, -0.5, 1.0], [-0.1, 0.3, 0.0]],
    "no_parse": [[0.0, 0.0, 0.0], [0.0, 0.0, -2.0]],
    "open_injury": [[0.0, -0.5, 0.0], [0.1, -0.2, 0.0]],
}
LENGTHS = [3, 1, 4, 2, 4, 4]
FINISHED = [True, True, False, True, True, False]


def config_with(*overrides: str) -> Config:
    return load_config(TINY, ["rollout.prompts_per_step=2", "rollout.group_size=3", "rollout.max_new_tokens=4",
                              "optim.micro_batch_size=6", *overrides])[0]  # fmt: skip


def make_step(config: Config, *, epochs: int = 1, seed: int = 0, dropped: tuple[ReplacedGroup, ...] = ()) -> StepRecord:
    """Two groups of three, with log-probabilities as if the policy had moved between the inner epochs."""
    noise = np.random.default_rng(seed)
    scores, groups, row = [], [], 0
    for b in range(2):
        completions = []
        for _ in range(3):
            n = LENGTHS[row]
            completions.append(
                Completion(tuple(range(n)), tuple((-noise.random(n)).tolist()), FINISHED[row], "ANSWER: ESI 2")
            )
            row += 1
        groups.append(Group(Prompt(Case(f"c{b}", "A 40-year-old.", 2), (1, 2), b == 0), tuple(completions)))
        scores.append(
            tuple(
                Score(
                    math.fsum(parts.values()),
                    MappingProxyType(parts),
                    Answer(2, "parsed", (0, 13)),
                    (FiredRule("open_injury", None, -0.5),),
                    False,
                )
                for g in range(3)
                for parts in [{name: values[b][g] for name, values in PARTS.items()}]
            )
        )
    count = sum(LENGTHS)
    old = -noise.random(count)
    moved = [old + 0.5 * epoch * noise.standard_normal(count) for epoch in range(epochs)]
    tokens = StepLogprobs(
        logprobs=torch.tensor(np.array(moved), dtype=torch.float32),
        ref_logprobs=torch.tensor(old + 0.3 * noise.standard_normal(count), dtype=torch.float32),
        entropy=torch.tensor(noise.random(count), dtype=torch.float32),
    )
    rewards = np.array([[score.total for score in row] for row in scores])
    batch = make_batch(groups, group_advantages(groups, rewards, config.advantage), config)
    return StepRecord(3, tuple(groups), tuple(scores), batch, tokens, dropped, 0.5, 0.25, 0)


def test_every_token_term_is_the_formulas() -> None:
    config = config_with("loss.beta=0.3", "optim.inner_epochs=3")
    step = make_step(config, epochs=3)
    account = compute_token_terms(step.logprobs, step.batch, config.loss)
    advantages = step.batch.advantages.tolist()
    new, ref = step.logprobs.logprobs.tolist(), step.logprobs.ref_logprobs.tolist()
    sides = set()
    for e in range(3):
        at = 0
        for i, length in enumerate(LENGTHS):
            weight = float(torch.tensor(1 / (6 * length), dtype=torch.float32))
            for _ in range(length):
                ratio = math.exp(new[e][at] - new[0][at])
                d = ref[at] - new[e][at]
                kl = math.exp(d) - d - 1
                a = advantages[i]
                surrogate = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                side = 1 if a > 0 and ratio > 1.2 else -1 if a < 0 and ratio < 0.8 else 0
                assert account.ratio[e, at].item() == pytest.approx(ratio, rel=1e-14)
                assert account.kl is not None and account.kl[e, at].item() == pytest.approx(kl, rel=1e-9, abs=1e-15)
                assert account.loss[e, at].item() == pytest.approx(-weight * (surrogate - 0.3 * kl), rel=1e-9)
                assert account.clip_side[e, at].item() == side
                sides.add(side)
                at += 1
    assert sides == {-1, 0, 1}, "the fixture must meet both sides of the clip"


def test_the_token_terms_are_the_logged_loss_to_the_last_bit() -> None:
    config = config_with("loss.beta=0.3")
    step = make_step(config)
    account = compute_token_terms(step.logprobs, step.batch, config.loss)
    record = step_metrics(step, account, advantage_by_component(step, config.advantage), config)
    terms = account.loss[0].tolist()
    assert record["loss"] == math.fsum(terms) == math.fsum(reversed(terms)) != 0.0


@pytest.mark.parametrize("kind", ["group", "mean_only", "batch", "leave_one_out"])
def test_the_shares_add_up_to_the_advantage(kind: str) -> None:
    config = config_with(f'advantage.kind="{kind}"')
    step = make_step(config)
    shares = advantage_by_component(step, config.advantage)
    assert list(shares) == list(PARTS)
    total = np.sum(list(shares.values()), axis=0)
    largest = np.abs(list(shares.values())).max()
    assert np.abs(total - step.batch.advantages.numpy().reshape(2, 3)).max() <= len(PARTS) * largest * 2**-52
    assert np.abs(shares["open_injury"]).max() > 0.1


def test_equal_totals_of_different_parts_have_no_shares() -> None:
    """0.1 + 0.2 + 0.3 rounds differently in another order; fsum's total does not, and the split follows the total."""
    config = config_with()
    step = make_step(config)
    orders = [(0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (0.2, 0.3, 0.1)]
    row = tuple(
        dataclasses.replace(
            step.scores[0][0], total=math.fsum(values), parts=MappingProxyType(dict(zip(PARTS, values, strict=True)))
        )
        for values in orders
    )
    even = dataclasses.replace(step, scores=(row, step.scores[1]))
    assert len({sum(values) for values in orders}) == 2 and len(set(rewards_of(even)[0])) == 1
    assert all((share[0] == 0).all() for share in advantage_by_component(even, config.advantage).values())


def test_metrics_by_hand() -> None:
    config = config_with("loss.beta=0.3")
    dropped = (ReplacedGroup("c9", (2, 2, 3), (True, True, False), (1.0, 1.0, -0.5)),)
    step = make_step(config, dropped=dropped)
    account = compute_token_terms(step.logprobs, step.batch, config.loss)
    m = step_metrics(step, account, advantage_by_component(step, config.advantage), config)
    rewards = rewards_of(step)
    assert (m["step"], m["loss/trained"], m["grad_norm"], m["skipped"]) == (3, 0.5, 0.25, 0)
    assert m["reward/mean"] == pytest.approx(sum([1.0, -1.0, 1.0, 0.0, 0.1, -2.0]) / 6)
    assert m["reward/mean_sampled"] == pytest.approx((-1.9 + 1.0 + 1.5) / 9)
    assert m["reward/mean_finished"] == pytest.approx(0.1 / 4) and m["reward/mean_truncated"] == pytest.approx(-0.5)
    assert m["reward/std_batch"] == pytest.approx(np.std(rewards, ddof=1))
    assert m["reward/std_group"] == pytest.approx(np.mean([np.std(r, ddof=1) for r in rewards]))
    assert m["reward/open_injury/mean"] == pytest.approx(-0.6 / 6)
    assert m["completions/clipped_ratio"] == pytest.approx(2 / 6)
    assert m["completions/clipped_ratio_at/50"] == pytest.approx(4 / 6)
    assert (m["groups/dropped"], m["groups/dropped_tokens"]) == (1.0, 7.0)
    assert m["groups/zero_variance"] == 0.0 and m["reward/timed_out"] == 0.0
    assert m["ratio"] == 1.0 and m["clip_ratio/low"] == m["clip_ratio/high"] == 0.0
    ref, new = step.logprobs.ref_logprobs.double(), step.logprobs.logprobs[0].double()
    assert m["kl/k3"] == pytest.approx(float(((ref - new).exp() - (ref - new) - 1).mean()), rel=1e-9)
    assert m["entropy"] == pytest.approx(float(step.logprobs.entropy.double().mean()))
    shares = advantage_by_component(step, config.advantage)
    assert m["advantage/no_parse/abs_mean"] == pytest.approx(np.abs(shares["no_parse"]).mean())


def test_the_sampler_mismatch_is_of_the_first_inner_epoch() -> None:
    config = config_with("optim.inner_epochs=2")
    step = make_step(config, epochs=2)
    account = compute_token_terms(step.logprobs, step.batch, config.loss)
    m = step_metrics(step, account, advantage_by_component(step, config.advantage), config)
    drawn = [lp for group in step.groups for c in group.completions for lp in c.sampler_logprobs]
    apart = [a - np.float32(b) for a, b in zip(step.logprobs.logprobs[0].tolist(), drawn, strict=True)]
    assert m["sampler/abs_logprob_diff"] == pytest.approx(np.mean(np.abs(apart)), rel=1e-5)
    assert m["sampler/kl_k3"] == pytest.approx(np.mean([math.exp(x) - 1 - x for x in apart]), rel=1e-4)
    assert m["ratio"] == pytest.approx(float(account.ratio.mean())) and m["ratio"] != 1.0


def test_masked_completions_weigh_nothing_and_are_in_no_denominator() -> None:
    config = config_with("loss.mask_truncated=true", "loss.beta=0.3")
    step = make_step(config)
    account = compute_token_terms(step.logprobs, step.batch, config.loss)
    for i, where in enumerate(token_slices(LENGTHS)):
        terms = account.loss[0, where]
        assert bool(terms.any()) == FINISHED[i]
    weights = step.batch.token_weights[:, 0].tolist()
    assert weights == pytest.approx([1 / 12, 1 / 4, 0, 1 / 8, 1 / 16, 0])


def test_truncated_completions_can_leave_the_baseline() -> None:
    inside = make_step(config_with())
    outside = make_step(config_with("advantage.truncated_in_baseline=false"))
    assert outside.batch.baseline_mask.tolist() == FINISHED and all(inside.batch.baseline_mask.tolist())
    a = outside.batch.advantages.reshape(2, 3)
    assert a[0, 2] == 0 and a[1, 2] == 0 and float(a[0].sum()) == pytest.approx(0)
    assert a[0].tolist() == pytest.approx([2 / (math.sqrt(2) + 1e-4) / 2, -2 / (math.sqrt(2) + 1e-4) / 2, 0.0])
    assert not torch.equal(inside.batch.advantages, outside.batch.advantages)
    shares = advantage_by_component(outside, config_with("advantage.truncated_in_baseline=false").advantage)
    assert np.allclose(np.sum(list(shares.values()), axis=0), a.numpy())


def test_a_loss_that_is_not_finite_is_nan_and_not_an_error() -> None:
    assert math.isnan(fsum_or_nan(torch.tensor([math.inf, -math.inf], dtype=torch.float64)))


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=30), st.randoms())
def test_sums_do_not_depend_on_the_order(values: list[float], random: object) -> None:
    shuffled = values.copy()
    shuffle: Callable[[list[float]], None] = random.shuffle  # type: ignore[attr-defined]
    shuffle(shuffled)
    assert fsum_or_nan(torch.tensor(values, dtype=torch.float64)) == fsum_or_nan(
        torch.tensor(shuffled, dtype=torch.float64)
    )
