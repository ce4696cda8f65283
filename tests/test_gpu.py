"""The CUDA path. ``python -m pytest -m gpu`` runs these tests, and that of the kernels, on a card.

All but what a card alone can show runs on the CPU as well, so that the tests themselves cannot rot.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench import main as bench
from grpo.batch import group_advantages, make_batch, reward_matrix
from grpo.config import LoraSection, ModelSection, load_config
from grpo.dynamic_sampling import sample_step
from grpo.engine.sampling import draw, uniforms
from grpo.logprobs import head_logits
from grpo.policy.policy import Kernels, Policy, load_policy
from grpo.qwen3_5 import decode
from grpo.run.self_check import self_check
from grpo.run.setup import load_setup
from grpo.train import main
from grpo.update import update_policy
from tests.conftest import TARGETS
from tests.engine.test_engines import FEW, buffers, logprobs, move, prompts_of, sample, scored

NEEDS_CARD = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHORT = (
    "train.steps=2",
    "evaluate.before_and_after={}",
    "evaluate.periodic={}",
    "rollout.prompts_per_step=2",
    "optim.micro_batch_size=16",
)
"""Two steps of 16 rows without evaluations."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_CARD)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device_policy(random_base: Path, device: str) -> Callable[[str], Policy]:
    def load(dtype: str) -> Policy:
        model = ModelSection(name=str(random_base), device=device, dtype=dtype, gradient_checkpointing=False)
        policy = load_policy(
            model, LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""), seed=1
        )
        move(policy)
        return policy

    return load


def tiny_on(device: str, *overrides: str) -> list[str]:
    """Overrides that put the tiny recipe on the device in bfloat16; on a CPU with fewer rows."""
    fewer = SHORT if device == "cpu" else ()
    return [f"model.device={device}", "model.dtype=bfloat16", *fewer, *overrides]


def held_bytes(device: str) -> int:
    """Bytes of all tensors alive on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_the_replayed_graph_is_the_eager_step(device_policy: Callable[[str], Policy], device: str, dtype: str) -> None:
    """Before and after rows leave; and the buffers stay where they are."""
    near = {"atol": 1e-4 if dtype == "float32" else 0.06, "rtol": 0.0}
    policy = device_policy(dtype)
    owners = (0, 1, 2, 2, 3, 4, 5, 5) * 2
    (first, captured), (_, eager) = (decode.start_own(policy, prompts_of(policy), owners, 60) for _ in range(2))
    assert isinstance(captured, decode.GraphDecoder) and isinstance(eager, decode.GraphDecoder)
    noise = torch.from_numpy(uniforms(range(16), 40)).to(device)
    places = [t.data_ptr() for t in buffers(captured._state)]
    logits = first
    for t in range(40):
        drawn, _ = draw(logits, noise[: len(logits), t], 1.0)
        eager._warm = False  # never captured
        logits, expected = captured.step(drawn), eager.step(drawn)
        torch.testing.assert_close(logits, expected, **near, msg=lambda text, t=t: f"token {t}: {text}")
        assert (captured._captured is not None) == (device == "cuda" and t % 20 > 0)
        if t == 19:
            kept = torch.tensor([0, 3, 5, 9, 12, 13, 14, 15], device=device)
            for decoder in (captured, eager):
                decoder.keep(kept)
            logits = logits[kept]
    for mine, theirs in zip(buffers(captured._state), buffers(eager._state), strict=True):
        torch.testing.assert_close(mine, theirs, **near)
    assert [t.data_ptr() for t in buffers(captured._state)] == places


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_passes_and_is_fast(device_policy: Callable[[str], Policy], dtype: str) -> None:
    """The second time: the first compiles the kernels, which the run needs anyway."""
    policy = device_policy(dtype)
    check = self_check(policy)
    assert check.kernels == Kernels() and not check.warnings, check
    assert {"logprob", "gradient", *(("graphs",) if policy.device.type == "cuda" else ())} <= set(check.figures)
    started = time.perf_counter()
    self_check(policy)
    assert time.perf_counter() - started < 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_capture_that_fails_on_the_card_gives_way(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: a step that waits for the device cannot be captured. The card still works afterwards."""
    model = ModelSection(name=str(random_base), device="cuda", dtype="float32", gradient_checkpointing=False)
    policy = load_policy(model, LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""), seed=1)
    step = decode.step

    def waits(*given: Any) -> torch.Tensor:
        logits = step(*given)
        float(logits.sum())
        return logits

    monkeypatch.setattr(decode, "step", waits)
    check = self_check(policy)
    assert check.kernels.triton and not check.kernels.graphs and "no CUDA graphs" in check.warnings[0], check
    sample(replace(policy, kernels=check.kernels), prompts_of(policy), "own", members=2, budget=5)


def test_bfloat16_drift_is_bounded(device_policy: Callable[[str], Policy]) -> None:
    """The sampler is about as far from fp32 as the trainer's own bfloat16 forward is."""
    half, full = device_policy("bfloat16"), device_policy("float32")
    groups = sample(half, prompts_of(half, FEW), "own", members=8, budget=24)
    drawn = torch.tensor(logprobs(groups))
    trainer, exact = (torch.tensor(scored(policy, groups)) for policy in (half, full))
    noise = (trainer - exact).square().mean().sqrt()
    assert (drawn - exact).square().mean().sqrt() < 2 * noise
    assert (drawn - trainer).square().mean().sqrt() < 3 * noise < 0.15


def test_a_half_precision_heads_sums_stay_in_fp32_on_cuda(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 256, generator=generator).bfloat16() for n in (7, 1000))
    exact = hidden.double() @ head.double().T
    logits = head_logits(hidden.to(device), head.to(device))
    assert logits.dtype == torch.float32
    rtol = 1e-5 if device == "cuda" else 2**-8  # the CPU's product rounds to bfloat16
    torch.testing.assert_close(logits.double().cpu(), exact, rtol=rtol, atol=1e-4)


def test_a_step_that_does_not_fit_is_cut_in_half(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Out of memory for real: the process may hold less than the whole batch needs, and more than its half. On a CPU,
    whose memory nobody bounds, only that the halves make the same update."""
    config, _ = load_config("configs/tiny.toml", tiny_on(device))
    setup = load_setup(config)
    groups, scores, _ = sample_step(setup, 0)
    batch = make_batch(
        groups,
        group_advantages(groups, reward_matrix(scores), config.advantage),
        config,
    )
    rows = len(batch.completion_ids)
    norms = []

    def needed(micro_batch: int) -> int:
        """Bytes reserved for an update in micro-batches of so many rows."""
        optim = config.optim.model_copy(update={"micro_batch_size": micro_batch, "learning_rate": 1e-12})
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
        done = update_policy(
            setup.policy, batch, config.model_copy(update={"optim": optim}), setup.optimizer, setup.reference, step=0
        )
        assert done.skipped == 0 and done.grad_norm > 0
        norms.append(done.grad_norm)
        return torch.cuda.max_memory_reserved() if device == "cuda" else 0

    half, whole = needed(rows // 2), needed(rows)
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    if device == "cpu":
        return
    assert half < 0.8 * whole
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((half + whole) / 2 / total)
    try:
        assert "does not fit" not in capsys.readouterr().err
        assert needed(rows) < whole and f"limited to {rows // 2} for the rest" in capsys.readouterr().err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_rollouts_give_their_memory_back(device_policy: Callable[[str], Policy], device: str) -> None:
    policy = device_policy("bfloat16")
    held = []
    for _ in range(4):
        sample(policy, prompts_of(policy), "own", members=12, budget=30)
        held.append(held_bytes(device))
    assert held[-1] == held[1]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_CARD)])
def test_a_capture_leaves_the_allocators_cache_alone(device_policy: Callable[[str], Policy]) -> None:
    """What an update has reserved, the next one finds again; and graphs hand their pool on."""
    policy = device_policy("bfloat16")
    reserved = []
    for _ in range(4):
        torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
        sample(policy, prompts_of(policy), "own", members=12, budget=30)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] >= 1 << 29 and reserved[3] == reserved[1] >= reserved[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_steps_on_the_device(tmp_path: Path, device: str, dtype: str) -> None:
    """Finite, the sampler near the trainer; in bfloat16, and on another device, about what the CPU does in fp32."""
    lines = {}
    for name, place in {"device": (device, dtype), "cpu": ("cpu", "float32")}.items():
        values = (*SHORT, f"model.device={place[0]}", f"model.dtype={place[1]}")
        overrides = [part for value in values for part in ("--set", value)]
        assert main(["configs/tiny.toml", "--out", str(tmp_path / name), *overrides]) == 0
        lines[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    steps, expected = lines["device"], lines["cpu"][0]
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in steps)
    assert steps[0]["sampler/abs_logprob_diff"] < (1e-4 if dtype == "float32" else 0.05)
    if dtype == "float32":
        for key in ("reward/mean", "completions/tokens", "entropy"):
            assert steps[0][key] == pytest.approx(expected[key], rel=0.1), "a few near ties may draw otherwise"


def test_the_same_step_twice_draws_the_same_tokens(device: str) -> None:
    config, _ = load_config("configs/tiny.toml", tiny_on(device))
    setup = load_setup(config)
    first, second = (sample_step(setup, 0)[0] for _ in range(2))
    same = [
        a.ids == b.ids
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x.completions, y.completions, strict=True)
    ]
    assert sum(same) >= 0.95 * len(same)


def test_the_benchmark_of_the_small_random_recipe(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    on_cuda = ["model.device=cuda", "model.dtype=bfloat16"]
    values = on_cuda if device == "cuda" else ["rollout.max_new_tokens=4", "model.dtype=bfloat16"]
    overrides = [part for value in values for part in ("--set", value)]
    assert bench(["configs/v49_random_small.toml", "--steps", "1", "--against", "generate", *overrides]) == 0
    shown = capsys.readouterr().out
    assert ("on the device" in shown and "aim" in shown) == (device == "cuda") and "generate" in shown
