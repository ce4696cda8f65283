"""The contract that every engine keeps, and what only our own decode step has to prove."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig, LlamaConfig, Qwen3Config

from benchmarks.tiny_world.model import make_tokenizer
from grpo.config import LoraSection, ModelSection
from grpo.engine.sampling import ROW_MULTIPLE, draw, slots_for, uniforms
from grpo.policy.policy import Policy, as_reference, load_policy
from grpo.qwen3_5 import decode, weights
from grpo.qwen3_5.decode_state import State
from grpo.rollout import ENGINES, choose_engine, rollout
from grpo.runtime.errors import UserError
from grpo.token_budget import finish_reason
from grpo.types import Case, Group, Prompt
from tests.conftest import TARGETS
from tests.conftest import TEXTS as CORPUS

LENGTHS = (70, 3, 64, 300, 1, 65)
"""Prompts on both sides of the prefill's grid of 64, one that is nothing but its last token, and one so long that a
matrix product cuts its columns into blocks."""
FEW = (70, 3, 64)
FAST = sorted(set(ENGINES) - {"reference"})
ENDS = tuple(range(0, 300, 9))
"""A random model hardly ever ends: here one token in ten does, so that rows leave early and at different times."""


def prompts_of(policy: Policy, lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    size = policy.model.get_base_model().config.vocab_size
    return [
        Prompt(Case(f"c{i}", "", 2), tuple(torch.randint(10, size, (n,), generator=generator).tolist()), False)
        for i, n in enumerate(lengths)
    ]


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    engine: str | None = None,
    members: int = 3,
    budget: int = 12,
    t: float = 1.0,
) -> list[Group]:
    keys = [[100 * int(p.case.id[1:]) + m for m in range(members)] for p in prompts]
    policy = replace(policy, end_token_ids=ENDS)
    return list(rollout(policy, prompts, keys, max_new_tokens=budget, temperature=t, engine=engine))


def ids(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [c.ids for g in groups for c in g.completions]


def logprobs(groups: Sequence[Group]) -> list[float]:
    return [lp for g in groups for c in g.completions for lp in c.sampler_logprobs]


def assert_same_draws(groups: Sequence[Group], expected: Sequence[Group], atol: float = 2e-5) -> None:
    assert ids(groups) == ids(expected)
    assert logprobs(groups) == pytest.approx(logprobs(expected), abs=atol)


# --- every engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_of() -> Callable[[Policy, float], list[Group]]:
    """The reference's draws; it is slow, and every engine is held against the same."""
    drawn: dict[float, list[Group]] = {}

    def expected(policy: Policy, t: float) -> list[Group]:
        if t not in drawn:
            drawn[t] = sample(policy, prompts_of(policy, FEW), "reference", t=t)
        return drawn[t]

    return expected


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("engine", FAST)
def test_it_draws_what_the_reference_draws(
    make_policy: Callable[..., Policy], expected_of: Callable[..., list[Group]], engine: str, temperature: float
) -> None:
    policy = make_policy()
    expected = expected_of(policy, temperature)
    assert_same_draws(sample(policy, prompts_of(policy, FEW), engine, t=temperature), expected)
    lengths = [len(c) for c in ids(expected)]
    assert min(lengths) < 8 < 12 == max(lengths), "rows leave, and others stay"


@pytest.mark.parametrize("engine", FAST)
def test_a_row_does_not_depend_on_its_batch(make_policy: Callable[..., Policy], engine: str) -> None:
    """The same ids whatever a row is batched with; with our own step the same bits of every log-probability."""
    policy = make_policy()
    prompts = prompts_of(policy)

    def assert_same(groups: Sequence[Group], expected: Sequence[Group]) -> None:
        assert_same_draws(groups, expected, atol=0.0 if engine == "own" else 1e-5)

    together = sample(policy, prompts, engine)
    assert_same(sample(policy, prompts[::-1], engine)[::-1], together)
    for i in (0, 1, 3):
        assert_same(sample(policy, prompts[i : i + 1], engine), together[i : i + 1])
    more = sample(policy, prompts[2:4], engine, members=5)
    assert_same([replace(g, completions=g.completions[:3]) for g in more], together[2:4])


@pytest.mark.parametrize("engine", ENGINES)
def test_it_leaves_the_policy_as_it_was(make_policy: Callable[..., Policy], engine: str) -> None:
    policy = make_policy(dropout=0.5)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    policy.model.train()
    first = sample(policy, prompts_of(policy)[:2], engine, budget=4)
    assert policy.model.training
    assert sample(policy, prompts_of(policy)[:2], engine, budget=4) == first, "dropout is off while sampling"
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in policy.model.named_parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_smaller_budget_cuts_the_same_completions_and_an_end_token_is_last(
    make_policy: Callable[..., Policy], engine: str
) -> None:
    policy = make_policy()
    members = 2 if engine == "reference" else 20
    prompts = prompts_of(policy, (30, 3))
    long, short = (ids(sample(policy, prompts, engine, members, budget)) for budget in (25, 9))
    assert [c[:9] for c in long] == short
    for completion in long:
        assert not set(completion[:-1]) & set(ENDS)
        assert completion[-1] in ENDS or len(completion) == 25
    assert {len(completion) for completion in ids(sample(policy, prompts, engine, budget=1))} == {1}


@pytest.mark.parametrize("engine", ENGINES)
def test_where_end_tokens_are_ignored_every_row_takes_the_budget(
    make_policy: Callable[..., Policy], engine: str
) -> None:
    """The draws are the same, and go on; no row counts as finished, whatever it ends on."""
    policy = replace(make_policy(), end_token_ids=ENDS)
    prompts, keys = prompts_of(policy, (30, 3)), [[1, 2], [5, 6]] if engine == "reference" else [range(9), range(9, 18)]
    forced, free = (
        rollout(policy, prompts, keys, max_new_tokens=14, temperature=1.0, engine=engine, ignore_eos=ignore)
        for ignore in (True, False)
    )
    pairs = zip((c for g in forced for c in g.completions), (c for g in free for c in g.completions), strict=True)
    for long, short in pairs:
        assert len(long.ids) == len(long.sampler_logprobs) == 14 and not long.finished
        assert long.ids[: len(short.ids)] == short.ids
        assert finish_reason(long, 14) == "budget"
    assert any(set(c.ids) & set(ENDS) for g in forced for c in g.completions)


@pytest.mark.parametrize("engine", FAST)
def test_a_switched_off_adapter_is_not_sampled(make_policy: Callable[..., Policy], engine: str) -> None:
    policy, fresh = make_policy(), make_policy(moved=False)
    prompts = prompts_of(policy, FEW)
    bare = sample(fresh, prompts, engine)
    with as_reference(policy, None):
        assert_same_draws(sample(policy, prompts, engine), bare)
    assert ids(sample(policy, prompts, engine)) != ids(bare)


# --- any causal language model ---------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
OTHERS = {
    "qwen3": (Qwen3Config, {}),
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "gemma": (GemmaConfig, {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "gemma 2": (Gemma2Config, {"sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": None}),
    "gemma 3": (Gemma3TextConfig, {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
}
"""Tied embeddings, attention that sees 16 tokens back, attention scores that are capped."""


def other_policy(kind: Any, folder: Path, **more: Any) -> Policy:
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(CORPUS, 400)
    torch.manual_seed(0)
    config = kind(**SIZES, **more, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = load_policy(
        ModelSection(name=str(folder), device="cpu", dtype="float32", gradient_checkpointing=False),
        LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""),
        seed=1,
    )
    move(policy)
    return policy


@pytest.mark.parametrize("name", OTHERS)
def test_any_causal_language_model(name: str, tmp_path: Path) -> None:
    kind, more = OTHERS[name]
    policy = other_policy(kind, tmp_path, **more)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    assert choose_engine(policy) == "generic"
    prompts = prompts_of(policy, FEW)
    expected = sample(policy, prompts, "reference", 2)
    assert_same_draws(sample(policy, prompts, members=2), expected)
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path: Path) -> None:
    """Its log-probabilities are not those of the head's products, which is all that the loss and the engines know."""
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM: logits ≠ lm_head\(hidden states\).*softcapping"):
        other_policy(Gemma2Config, tmp_path, final_logit_softcapping=1.0)


def move(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.adapter_parameters().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


# --- our own decode step ---------------------------------------------------------------------------------------------


def test_qwen35_is_decoded_by_our_own_step(make_policy: Callable[..., Policy]) -> None:
    assert choose_engine(make_policy()) == "own"


DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")


@pytest.mark.parametrize(
    ("fuse_below", "targets"),
    [
        (0, (*TARGETS, *DELTA)),  # every layer has a product of its own
        (0, ("v_proj", "down_proj")),
        (1 << 30, (*TARGETS, *DELTA)),  # layers of one input share one
        (1 << 30, ("q_proj",)),
        (1 << 30, ("in_proj_qkv", "in_proj_a", "up_proj", "o_proj")),
        (40_000, (*TARGETS, *DELTA)),  # keys, values and gates share one, the others do not
        (40_000, ("k_proj", "gate_proj", "out_proj")),
    ],
)
def test_any_set_of_adapted_layers_fused_or_not(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, fuse_below: int, targets: tuple[str, ...]
) -> None:
    monkeypatch.setattr(weights, "FUSE_BELOW", fuse_below)
    policy = make_policy(target_modules=targets)
    prompts = prompts_of(policy, FEW)
    groups = sample(policy, prompts, "own", budget=6)
    assert_same_draws(groups, sample(policy, prompts, "generic", budget=6))
    bare = make_policy(target_modules=targets, moved=False)
    assert logprobs(sample(bare, prompts, "own", budget=6)) != logprobs(groups)


def start(policy: Policy, owners: Sequence[int] = (0, 1, 2, 2, 3, 4, 5, 5)) -> tuple[torch.Tensor, Any]:
    return decode.start_own(policy, prompts_of(policy), owners, 40)


def buffers(state: State) -> list[torch.Tensor]:
    layers = [t for m in state.layers for t in ((m.keys, m.values) if hasattr(m, "keys") else (m.conv, m.memory))]
    return [state.ids, state.positions, state.unseen, *layers]


@torch.inference_mode()
def test_the_buffers_stay_where_they_are(make_policy: Callable[..., Policy]) -> None:
    """What a graph replays are addresses."""
    _, decoder = start(make_policy())
    before = [t.data_ptr() for t in buffers(decoder._state)]
    for _ in range(3):
        decoder.step(torch.arange(8) + 20)
    assert [t.data_ptr() for t in buffers(decoder._state)] == before
    decoder.keep(torch.tensor([1, 4, 6]))
    decoder.step(torch.arange(3) + 20)
    assert [t.data_ptr() for t in buffers(decoder._state)] == before


@torch.no_grad()
def test_a_recording_of_one_step_decodes_all_others(make_policy: Callable[..., Policy]) -> None:
    """A CUDA graph in miniature: the operations of one step, recorded with their tensors, replayed without our code.
    Nothing that changes from token to token may live outside the buffers, and nothing may wait for the device."""
    policy = make_policy()
    (first, eager), (_, recorded) = start(policy), start(policy)
    state, width = recorded._state, recorded._state.unseen.shape[1]
    kept = [t.clone() for t in buffers(state)]
    replay = make_fx(lambda: decode.step(recorded._weights, recorded._rotary, state, width))()
    for t, value in zip(buffers(state), kept, strict=True):
        t.copy_(value)
    called = {str(node.target) for node in replay.graph.nodes}
    assert not called & {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"}
    noise = torch.from_numpy(uniforms(range(8), 12))
    logits = first
    for t in range(12):
        drawn, _ = draw(logits, noise[:, t], 1.0)
        state.ids.copy_(drawn)
        logits = eager.step(drawn)
        torch.testing.assert_close(replay(), logits, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_rows_that_stay_are_not_touched_by_those_that_leave(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    (_, all_rows), (_, some) = start(policy), start(policy)
    tokens = torch.arange(8) + 30
    for _ in range(2):
        all_rows.step(tokens), some.step(tokens)
    kept = torch.tensor([0, 2, 3, 6, 7, 0, 0, 0])
    some.keep(kept)
    for _ in range(3):
        expected = all_rows.step(tokens)
        assert torch.equal(some.step(tokens[kept]), expected[kept])


def test_bfloat16_stays_near_the_trainer_and_the_base_keeps_its_bits(random_base: Path) -> None:
    """Products in bfloat16 on fp32 masters. The trainer's own forward in bfloat16 is as far from fp32 as we are."""

    def load(dtype: str) -> Policy:
        model = ModelSection(name=str(random_base), device="cpu", dtype=dtype, gradient_checkpointing=False)
        lora = LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start="")
        policy = load_policy(model, lora, seed=1)
        move(policy)
        return policy

    half, full = load("bfloat16"), load("float32")
    before = {name: p.detach().clone() for name, p in half.model.named_parameters()}
    groups = sample(half, prompts_of(half, FEW), "own", members=8)
    assert all(torch.equal(before[name], p) for name, p in half.model.named_parameters())
    assert {p.dtype for p in half.adapter_parameters().values()} == {torch.float32}
    drawn = torch.tensor(logprobs(groups))
    trainer, exact = (torch.tensor(scored(policy, groups)) for policy in (half, full))
    noise = (trainer - exact).square().mean().sqrt()
    assert (drawn - exact).square().mean().sqrt() < 1.5 * noise
    assert (drawn - trainer).square().mean().sqrt() < 2 * noise < 0.1


@torch.no_grad()
def scored(policy: Policy, groups: Sequence[Group]) -> list[float]:
    values = []
    for group in groups:
        for completion in group.completions:
            sequence = torch.tensor([[*group.prompt.ids, *completion.ids]], device=policy.device)
            logp = policy.model(input_ids=sequence).logits[0, len(group.prompt.ids) - 1 : -1].float().log_softmax(-1)
            said = sequence[0, len(group.prompt.ids) :, None]
            values += logp.gather(1, said)[:, 0].tolist()
    return values


def test_slots() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for rows in range(1, 70):
        assert rows <= slots_for(rows, cpu) < rows + ROW_MULTIPLE["cpu"]
        assert slots_for(rows, cpu) % ROW_MULTIPLE["cpu"] == 0
        assert rows <= slots_for(rows, cuda) <= max(ROW_MULTIPLE["cuda"], 2 * rows - 1)
        assert slots_for(rows, cuda).bit_count() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_captured_graph_draws_what_transformers_cache_draws(random_base: Path) -> None:
    model = ModelSection(name=str(random_base), device="cuda", dtype="float32", gradient_checkpointing=False)
    policy = load_policy(model, LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""), seed=1)
    move(policy)
    prompts = prompts_of(policy)
    for members in (2, 12):
        expected = sample(policy, prompts, "generic", members, budget=30)
        assert_same_draws(sample(policy, prompts, "own", members, budget=30), expected, atol=2e-4)
