"""A device without memory, met outside the update too: one line that says where, and no finished step is lost."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo.commands.evaluate
import grpo.commands.merge
import grpo.commands.triage
import grpo.update
from benchmarks import bench
from grpo import train as loop
from grpo.commands import replay
from grpo.config import TINY_WORLD_DIR
from grpo.qwen3_5 import decode
from grpo.run.checkpoint import find_damage
from grpo.runtime.out_of_memory import OutOfMemory, memory_errors
from tests.support import ranked
from tests.support.recorded_runs import TINY, recorded

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB."
Pytest = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run of three short steps that saves no checkpoint by itself before its end."""
    folder = tmp_path_factory.mktemp("memory")
    rows = (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, chosen in (("cases", rows[:8]), ("held_out", rows[100:102])):
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
    return [
        f"cases.train={folder / 'cases.jsonl'}",
        "reward.allow_unsound=true",
        "reward.unsound_reason=eight cases",
        "rollout.prompts_per_step=2",
        "rollout.group_size=3",
        "rollout.max_new_tokens=12",
        "optim.micro_batch_size=4",
        "train.steps=3",
        "checkpoint.every=100",
        "evaluate.every=2",
        'evaluate.thinking=["off"]',
        "evaluate.max_new_tokens=8",
        f'evaluate.periodic={{test = "{folder / "held_out.jsonl"}"}}',
        "evaluate.before_and_after={}",
    ]


def command(overrides: list[str], *more: str) -> list[str]:
    return [TINY, *(part for value in (*overrides, *more) for part in ("--set", value))]


def full(monkeypatch: Pytest, owner: Any, name: str, *, after: int = 0) -> None:
    """Let the device be full in the call of a function that follows ``after`` calls."""
    calls, true = [0], getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise torch.OutOfMemoryError(FULL)
        return true(*given, **named)

    monkeypatch.setattr(owner, name, called)


def full_in(monkeypatch: Pytest, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Let the device be full while it decodes, inside those calls of a function that ``when`` accepts."""
    true_step, true, inside = decode.step, getattr(owner, name), [False]

    def step(*given: Any) -> Any:
        if inside[0]:
            raise torch.OutOfMemoryError(FULL)
        return true_step(*given)

    def called(*given: Any, **named: Any) -> Any:
        inside[0] = when(*given)
        try:
            return true(*given, **named)
        finally:
            inside[0] = False

    monkeypatch.setattr(decode, "step", step)
    monkeypatch.setattr(owner, name, called)


def call_number(number: int) -> Callable[..., bool]:
    """Return a function that is true the given time, from 0, it is called."""
    calls = itertools.count()
    return lambda *given: next(calls) == number


def only_error(said: str) -> str:
    assert "Traceback" not in said and said.count("error: ") == 1
    return said[said.index("error: ") :]


@pytest.mark.parametrize(
    ("owner", "name", "when", "says", "kept"),
    [
        (loop, "sample_groups", call_number(0), "rollout: ", 0),
        (loop, "sample_groups", call_number(2), "rollout: ", 2),
        (loop, "evaluate_if_due", lambda setup, run, step: step == 0, "evaluation: ", 0),
        (loop, "evaluate_if_due", lambda setup, run, step: step == 2, "evaluation: ", 2),
        (loop, "evaluate_if_due", lambda setup, run, step: step == 3, "evaluation: ", 3),
    ],
)
def test_training_keeps_the_last_step_and_goes_on_from_it(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Pytest,
    owner: Any, name: str, when: Callable[..., bool], says: str, kept: int,
) -> None:  # fmt: skip
    out = ["--out", str(tmp_path / "run")]
    with monkeypatch.context() as broken:
        full_in(broken, owner, name, when)
        assert loop.main([*command(overrides), *out]) == 2
    error = only_error(capsys.readouterr().err)
    keys = {"rollout: ": "rollout.group_size, rollout.prompts_per_step", "evaluation: ": "evaluate.batch_size"}[says]
    assert error.startswith(f"error: {says}out of memory on the device (2.00 GiB more): lower {keys} or ")
    if not kept:
        assert "No step is saved yet" in error
        return
    assert not find_damage(tmp_path / "run" / "checkpoints" / f"step_{kept:06d}")
    assert f"step_{kept:06d} is saved. Resume with: python -m grpo train" in error and "--resume" in error
    assert loop.main([*command(overrides), *out, "--resume"]) == 0
    assert loop.main([*command(overrides), "--out", str(tmp_path / "whole")]) == 0
    adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(("epoch", "kept"), [(1, True), (2, False)])
def test_an_update_that_has_moved_the_policy_is_not_saved_as_the_step_before(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Pytest,
    epoch: int, kept: bool,
) -> None:  # fmt: skip
    """Out of memory in an inner epoch of step 2, whole and halved micro-batches alike."""
    done, true = [0], grpo.update.learning_rate
    monkeypatch.setattr(grpo.update, "learning_rate", lambda *given: (done.append(1), true(*given))[1])
    true_backward = grpo.update.forward_backward

    def backward(*given: Any) -> Any:
        if len(done) - 1 >= 2 + epoch - 1:  # optimiser steps so far
            raise torch.OutOfMemoryError(FULL)
        return true_backward(*given)

    monkeypatch.setattr(grpo.update, "forward_backward", backward)
    argv = command(overrides, "optim.inner_epochs=2", "evaluate.periodic={}")
    assert loop.main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert "a micro-batch of a single row does not fit" in only_error(capsys.readouterr().err)
    assert (tmp_path / "run" / "checkpoints" / "step_000001").exists() is kept


@pytest.mark.parametrize("fault", ["full in the second rollout", "full in the second update"])
def test_on_two_ranks_there_is_one_error_and_the_step_is_kept(overrides: list[str], tmp_path: Path, fault: str) -> None:
    argv = [*command(overrides, "evaluate.periodic={}"), "--out", str(tmp_path / "run")]
    assert ranked.on_ranks(2, ranked.train_otherwise, argv, [], fault, log=tmp_path) == [2, 2]
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert "error: rank 1: " in only_error(said[0]) and "step_000001 is saved" in said[0] and "lower " in said[0]
    assert "error" not in said[1] and not find_damage(tmp_path / "run" / "checkpoints" / "step_000001")


@pytest.mark.parametrize("place", ["from_pretrained", "adapter", "head"])
def test_a_model_that_does_not_fit_is_said_before_the_folder_is_made(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Pytest, place: str
) -> None:
    import peft
    import transformers

    import grpo.policy.policy

    owner, name = {
        "from_pretrained": (transformers.AutoModelForCausalLM, "from_pretrained"),
        "adapter": (peft.PeftModel, "from_pretrained"),
        "head": (grpo.policy.policy, "_check_head"),
    }[place]
    full(monkeypatch, owner, name)
    assert loop.main([*command(overrides), "--out", str(tmp_path / "run")]) == 2
    error = only_error(capsys.readouterr().err)
    assert re.search(
        r"(loading the model|setup): out of memory on the device \(2.00 GiB more\): use a smaller dtype", error
    )
    assert not (tmp_path / "run").exists()


def test_an_evaluation_keeps_its_answers(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Pytest
) -> None:
    argv = [*command(overrides), "--out", str(tmp_path / "eval"), "--batch-size", "1"]
    with monkeypatch.context() as broken:
        full(broken, decode, "step", after=8)
        assert grpo.commands.evaluate.main(argv) == 2
    assert only_error(capsys.readouterr().err).startswith("error: evaluation: out of memory on the device")
    (answers,) = (tmp_path / "eval" / "answers").iterdir()
    assert len(answers.read_text().splitlines()) == 1
    assert grpo.commands.evaluate.main(argv) == 0 and len(answers.read_text().splitlines()) == 2


def test_one_answer(capsys: pytest.CaptureFixture[str], monkeypatch: Pytest) -> None:
    full(monkeypatch, decode, "step")
    assert grpo.commands.triage.main(["Cough.", "--device", "cpu"]) == 2
    assert "lower --max-new-tokens, or use another --device" in only_error(capsys.readouterr().err)


def test_a_replay_with_the_model(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], monkeypatch: Pytest
) -> None:
    from grpo.inspection import recompute_logprobs as recompute

    run = recorded(tmp_path_factory.getbasetemp(), "plain")
    full(monkeypatch, recompute, "batch_logprobs")
    assert replay.main([str(run), "--model", "--step", "1"]) == 2
    assert "step 1: out of memory" in only_error(capsys.readouterr().err)


def test_the_check_of_a_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Pytest) -> None:
    full(monkeypatch, grpo.commands.merge, "_logits")
    assert grpo.commands.merge.main(["embedded:v46", "--out", str(tmp_path / "merged")]) == 2
    error = only_error(capsys.readouterr().err)
    assert "the check: out of memory on the device (2.00 GiB more): choose another device with --device" in error
    assert not (tmp_path / "merged").exists()


def test_a_benchmark(overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Pytest) -> None:
    full(monkeypatch, decode, "step")
    assert bench.main([*command(overrides), "--steps", "1"]) == 2
    assert "rollout: out of memory" in only_error(capsys.readouterr().err)


def test_only_memory_is_translated() -> None:
    with pytest.raises(RuntimeError, match="^illegal") as raised, memory_errors("x", "y"):
        raise RuntimeError("illegal memory access")
    assert not isinstance(raised.value, OutOfMemory)
    with pytest.raises(OutOfMemory, match=r"^x: out of memory on the device: y$"), memory_errors("x", "y"):
        raise torch.OutOfMemoryError("no size given")
