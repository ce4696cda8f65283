"""What only a CUDA device can show: ``python -m pytest -m gpu`` runs this and the kernel's test."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.batch import make_batch
from grpo.bench import main as bench
from grpo.config import Lora, Model, load_config
from grpo.engine import decode
from grpo.engine.sampling import draw, uniforms
from grpo.groups import sample_step
from grpo.logprobs import head_logits
from grpo.policy import Policy, load_policy
from grpo.setup import build
from grpo.train import main
from grpo.update import update
from tests.conftest import TARGETS
from tests.test_engines import FEW, buffers, logprobs, move, prompts_of, sample, scored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHORT = ("train.steps=2", "evaluate.ends={}", "evaluate.during={}", "rollout.prompts_per_step=2")


@pytest.fixture
def cuda_policy(random_base: Path) -> Callable[[str], Policy]:
    def load(dtype: str) -> Policy:
        model = Model(name=str(random_base), device="cuda", dtype=dtype, gradient_checkpointing=False)
        policy = load_policy(model, Lora(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""), seed=1)
        move(policy)
        return policy

    return load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_the_replayed_graph_is_the_eager_step(cuda_policy: Callable[[str], Policy], dtype: str) -> None:
    """Before and after rows leave; and the buffers stay where they are."""
    near = {"atol": 1e-4 if dtype == "float32" else 0.06, "rtol": 0.0}
    policy = cuda_policy(dtype)
    owners = (0, 1, 2, 2, 3, 4, 5, 5) * 2
    (first, captured), (_, eager) = (decode.start_own(policy, prompts_of(policy), owners, 60) for _ in range(2))
    assert isinstance(captured, decode.GraphDecoder) and isinstance(eager, decode.GraphDecoder)
    noise = torch.from_numpy(uniforms(range(16), 40)).cuda()
    places = [t.data_ptr() for t in buffers(captured._state)]
    logits = first
    for t in range(40):
        drawn, _ = draw(logits, noise[: len(logits), t], 1.0)
        eager._warm = False  # never captured
        logits, expected = captured.step(drawn), eager.step(drawn)
        torch.testing.assert_close(logits, expected, **near, msg=lambda text, t=t: f"token {t}: {text}")
        assert (captured._captured is not None) == (t % 20 > 0)
        if t == 19:
            for decoder in (captured, eager):
                decoder.keep(torch.tensor([0, 3, 5, 9, 12, 13, 14, 15], device="cuda"))
            logits = logits[[0, 3, 5, 9, 12, 13, 14, 15]]
    for mine, theirs in zip(buffers(captured._state), buffers(eager._state), strict=True):
        torch.testing.assert_close(mine, theirs, **near)
    assert [t.data_ptr() for t in buffers(captured._state)] == places


def test_bfloat16_drift_is_bounded(cuda_policy: Callable[[str], Policy]) -> None:
    """The sampler is about as far from fp32 as the trainer's own bfloat16 forward is."""
    half, full = cuda_policy("bfloat16"), cuda_policy("float32")
    groups = sample(half, prompts_of(half, FEW), "own", members=8, budget=24)
    drawn = torch.tensor(logprobs(groups))
    trainer, exact = (torch.tensor(scored(policy, groups)) for policy in (half, full))
    noise = (trainer - exact).square().mean().sqrt()
    assert (drawn - exact).square().mean().sqrt() < 2 * noise
    assert (drawn - trainer).square().mean().sqrt() < 3 * noise < 0.15


def test_a_half_precision_heads_sums_stay_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 256, generator=generator).bfloat16() for n in (7, 1000))
    exact = hidden.double() @ head.double().T
    ours = head_logits(hidden.cuda(), head.cuda())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=1e-5, atol=1e-4)


def test_a_step_that_does_not_fit_is_cut_in_half(capsys: pytest.CaptureFixture[str]) -> None:
    """Out of memory for real: the process may hold less than the whole batch needs, and more than its half."""
    config, _ = load_config("configs/tiny.toml", ["model.device=cuda", "model.dtype=bfloat16"])
    setup = build(config)
    groups, scores, _ = sample_step(setup, 0)
    batch = make_batch(groups, np.array([[one.total for one in row] for row in scores]), config)

    def needed(rows: int) -> int:
        cut = config.model_copy(update={"optim": config.optim.model_copy(update={"micro_batch_size": rows})})
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        done = update(setup.policy, batch, cut, setup.optimizer, setup.reference, step=0)
        assert done.skipped == 0 and done.grad_norm > 0
        return torch.cuda.max_memory_reserved()

    half, whole = needed(32), needed(64)
    assert half < 0.8 * whole
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((half + whole) / 2 / total)
    try:
        assert "does not fit" not in capsys.readouterr().err
        assert needed(64) < whole and "once more with half" in capsys.readouterr().err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_rollouts_give_their_memory_back(cuda_policy: Callable[[str], Policy]) -> None:
    policy = cuda_policy("bfloat16")
    held = []
    for _ in range(4):
        sample(policy, prompts_of(policy), "own", members=12, budget=30)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_steps_on_the_device(tmp_path: Path, dtype: str) -> None:
    """The tiny run on CUDA: finite, and in fp32 the first step's figures are the CPU's."""
    lines = {}
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        values = (*SHORT, f"model.device={device}", f"model.dtype={dtype if device == 'cuda' else 'float32'}")
        assert main(["configs/tiny.toml", "--out", str(out), *(p for v in values for p in ("--set", v))]) == 0
        lines[device] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    cuda, cpu = lines["cuda"][0], lines["cpu"][0]
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in lines["cuda"])
    assert cuda["sampler/abs_logprob_diff"] < (1e-4 if dtype == "float32" else 0.05)
    if dtype == "float32":
        for name in ("reward/mean", "completions/tokens"):
            assert cuda[name] == pytest.approx(cpu[name], rel=0.1), "a few near ties may draw otherwise"
        assert cuda["entropy"] == pytest.approx(cpu["entropy"], rel=0.1)


def test_the_same_step_twice_draws_the_same_tokens() -> None:
    config, _ = load_config("configs/tiny.toml", ["model.device=cuda", "model.dtype=bfloat16"])
    setup = build(config)
    first, second = (sample_step(setup, 0)[0] for _ in range(2))
    same = [
        a.ids == b.ids
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x.completions, y.completions, strict=True)
    ]
    assert sum(same) >= 0.95 * len(same)


def test_the_benchmark_of_the_small_random_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    cuda = ["--set", "model.device=cuda", "--set", "model.dtype=bfloat16"]
    assert bench(["configs/v49_random_small.toml", "--steps", "1", "--against", "generate", *cuda]) == 0
    shown = capsys.readouterr().out
    assert "on the device" in shown and "aim" in shown and "generate" in shown
