"""The rollout engine against a plain loop that runs the whole sequence again for every token."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from grpo.cases import stable_seed
from grpo.engine.sampling import draw, uniforms
from grpo.policy.policy import Policy
from grpo.prompts import render_prompt
from grpo.rollout import rollout
from grpo.runtime.errors import UserError
from grpo.types import Case, Group, Prompt

TEXTS = (
    "Chest pain.",
    "A 54-year-old male arrived intubated. Central line placed, HR 150.",
    "pain 9/10 " * 9,
)


def prompts_of(policy: Policy, texts: Sequence[str] = TEXTS) -> list[Prompt]:
    return [
        render_prompt(policy.tokenizer, Case(f"c{i}", text, 2), system_prompt="Triage.", thinking=i % 2 == 0)
        for i, text in enumerate(texts)
    ]


def keys_of(prompts: Sequence[Prompt], members: int) -> list[list[int]]:
    return [[stable_seed(0, p.case.id, g) for g in range(members)] for p in prompts]


def sample(
    policy: Policy, prompts: Sequence[Prompt], members: int = 3, budget: int = 30, t: float = 1.0
) -> list[Group]:
    return list(rollout(policy, prompts, keys_of(prompts, members), max_new_tokens=budget, temperature=t))


@torch.no_grad()
def plainly(policy: Policy, prompt: Prompt, key: int, budget: int, temperature: float) -> tuple[list[int], list[float]]:
    """One row, no cache, no batch, no padding: softmax(logits / T) and the first id whose cumulated mass exceeds u."""
    noise = np.random.Generator(np.random.Philox(key=key)).random(budget)
    ids: list[int] = []
    logprobs: list[float] = []
    for u in noise:
        logits = policy.model(input_ids=torch.tensor([[*prompt.ids, *ids]])).logits[0, -1].double().numpy()
        p = np.exp(logits / temperature - np.max(logits / temperature))
        p /= p.sum()
        ids.append(int(np.searchsorted(np.cumsum(p), u, side="right")))
        logprobs.append(float(np.log(p[ids[-1]])))
        if ids[-1] in policy.end_token_ids:
            break
    return ids, logprobs


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_engine_draws_what_a_plain_loop_draws(make_policy: Callable[..., Policy], temperature: float) -> None:
    policy = make_policy()
    prompts = prompts_of(policy)
    groups = sample(policy, prompts, budget=24, t=temperature)
    for prompt, group, keys in zip(prompts, groups, keys_of(prompts, 3), strict=True):
        for key, completion in zip(keys, group.completions, strict=True):
            ids, logprobs = plainly(policy, prompt, key, 24, temperature)
            assert list(completion.ids) == ids
            np.testing.assert_allclose(completion.sampler_logprobs, logprobs, atol=2e-5)


def test_a_row_does_not_depend_on_its_neighbours(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    prompts = prompts_of(policy)
    together = sample(policy, prompts)
    for i in range(3):
        alone = sample(policy, prompts[i : i + 1])[0]
        assert [c.ids for c in alone.completions] == [c.ids for c in together[i].completions]
    backwards = sample(policy, prompts[::-1])[::-1]
    assert [[c.ids for c in g.completions] for g in backwards] == [[c.ids for c in g.completions] for g in together]


def test_members_of_a_group_differ_and_a_step_repeats_itself(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    first, second = sample(policy, prompts_of(policy), 6), sample(policy, prompts_of(policy), 6)
    assert first == second
    assert all(len({c.ids for c in group.completions}) == 6 for group in first)


def test_finished_means_an_end_token_and_the_end_token_is_kept(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    completions = [c for g in sample(policy, prompts_of(policy), 40, budget=40) for c in g.completions]
    assert {c.finished for c in completions} == {True, False}
    for c in completions:
        ends = [i for i, token in enumerate(c.ids) if token in policy.end_token_ids]
        assert ends == ([len(c.ids) - 1] if c.finished else [])
        assert c.finished or len(c.ids) == 40
        assert len(c.sampler_logprobs) == len(c.ids) and max(c.sampler_logprobs) <= 0
        assert "<|im_end|>" not in c.text
    early = next(c for c in completions if c.finished and 8 <= len(c.ids) < 40)
    group = next(g for g in sample(policy, prompts_of(policy), 40, budget=len(early.ids)) if early in g.completions)
    assert next(c for c in group.completions if c == early).finished, "an end token exactly at the budget finishes"


def test_a_smaller_budget_cuts_the_same_completions(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    long = [c for g in sample(policy, prompts_of(policy), 8, budget=30) for c in g.completions]
    short = [c for g in sample(policy, prompts_of(policy), 8, budget=11) for c in g.completions]
    assert [c.ids[:11] for c in long] == [c.ids for c in short]


def test_the_engine_leaves_model_and_mode_as_they_were(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(dropout=0.3)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    policy.model.train()
    first = sample(policy, prompts_of(policy))
    assert policy.model.training
    policy.model.eval()
    assert sample(policy, prompts_of(policy)) == first, "dropout is off while sampling"
    assert not policy.model.training
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())


def test_greedy_takes_the_most_likely_token(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    first, second = sample(policy, prompts_of(policy)[:1], members=2, budget=5, t=0.0)[0].completions
    assert first == second
    logits = policy.model(input_ids=torch.tensor([prompts_of(policy)[0].ids])).logits[0, -1]
    assert first.ids[0] == int(logits.argmax())


def test_a_prompt_longer_than_the_context_is_refused_by_case(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    with pytest.raises(UserError, match=r"case 'c0': \d+ prompt tokens and a budget of 1000 do not fit .* 1024"):
        sample(policy, prompts_of(policy), budget=1000)


def test_draw_follows_the_distribution() -> None:
    logits = torch.tensor([0.0, -1.0, float("-inf"), 2.0])
    noise = torch.arange(10_000, dtype=torch.float64) / 10_000
    ids, logprobs = draw(logits.expand(10_000, 4), noise, 2.0)
    p = (logits / 2).softmax(-1)
    shares = torch.bincount(ids, minlength=4) / 10_000
    torch.testing.assert_close(shares, p, atol=2e-4, rtol=0)
    torch.testing.assert_close(logprobs, p.log()[ids])
    assert int(draw(logits[None], torch.tensor([0.0], dtype=torch.float64), 1.0)[0]) == 0
    assert int(draw(logits[None], torch.tensor([1 - 1e-16], dtype=torch.float64), 1.0)[0]) == 3


def test_noise_is_uniform_per_key_and_independent_of_the_other_keys() -> None:
    noise = uniforms([1, 2, 3], 2000)
    assert noise.shape == (3, 2000) and ((noise >= 0) & (noise < 1)).all()
    np.testing.assert_array_equal(uniforms([2], 100)[0], noise[1, :100])
    assert abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.1
    np.testing.assert_allclose(noise.mean(1), 0.5, atol=0.03)
