"""The benchmark of a config: it takes the loop's own steps, and what it says adds up."""

import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.bench as benchmark
import grpo.dynamic_sampling as sampling
import grpo.train as loop
import grpo.update as updating
from benchmarks.bench import main
from benchmarks.kernels import main as kernels
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.policy.base_model import load_base
from grpo.policy.memory_plan import RANDOM_SHAPES
from grpo.rollout import ENGINES
from grpo.run import step_record
from grpo.run.setup import load_setup


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a step of few tokens on few cases."""
    cases = tmp_path_factory.mktemp("cases") / "few.jsonl"
    lines = (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    cases.write_text("\n".join(lines[:12]) + "\n", encoding="utf-8")
    return [
        f"cases.train={cases}",
        "reward.allow_unsound=true",
        "reward.unsound_reason=a dozen cases",
        "rollout.prompts_per_step=2",
        "rollout.group_size=3",
        "rollout.max_new_tokens=8",
        "optim.micro_batch_size=4",
    ]


def with_set(overrides: list[str]) -> list[str]:
    return [part for value in overrides for part in ("--set", value)]


def test_it_times_the_loop_and_leaves_everything_as_it_was(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    before = (dict(ENGINES), step_record.timing_metrics, loop.score_groups, updating.reference_logprobs)
    more = ["--steps", "2", "--against", "generate", "--json", "figures.json"]
    assert main([str(root / "configs" / "tiny.toml"), *with_set([*few, "optim.warmup_steps=1"]), *more]) == 0
    assert before == (dict(ENGINES), step_record.timing_metrics, loop.score_groups, updating.reference_logprobs)
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"], "the run folder is gone"

    found = json.loads((tmp_path / "figures.json").read_text())
    seconds, achieved = found["seconds"], found["achieved"]
    assert all(seconds[part] > 0 for part in ("prefill", "decode", "reward", "reference", "train", "optimizer"))
    assert len(found["step_seconds"]) == 2 and found["first_step_seconds"] > 0
    assert all(0 < share < 1 for share in achieved.values()), achieved
    assert found["drift_nats"]["mean_abs"] <= found["drift_nats"]["rms"] <= found["drift_nats"]["max_abs"] < 1e-4
    assert found["peak_bytes"] > 1e8 and found["machine"]["bandwidth"] > 0
    assert found["generate"]["times_ours"]["step"] > 0 and found["generate"]["seconds"]["prefill"] == 0

    shown = capsys.readouterr().out
    for word in ("prefill", "decode", "reference forward", "forward and backward", "optimiser", "drift", "generate"):
        assert word in shown


def test_its_own_figures_are_written_before_the_peer_starts(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "figures.json"

    def no_peer(*_: Any) -> Any:
        assert json.loads(record.read_text())["seconds"]["step"] > 0
        assert "phase" in capsys.readouterr().out
        raise RuntimeError("the peer does not start")

    monkeypatch.setattr(benchmark, "beside", no_peer)
    with pytest.raises(RuntimeError, match="does not start"):
        more = ["--steps", "1", "--against", "generate", "--json", str(record)]
        main(["configs/tiny.toml", *with_set(few), *more])
    assert "generate" not in json.loads(record.read_text())


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/tiny.toml", "--set", "rollout.group_size=1"]) == 2
    assert main(["configs/tiny.toml", "--set", "model.name=random:nothing"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "rollout.group_size" in errors[0] and "no such random model; choose from random:qwen3.5-9b" in errors[1]


@pytest.fixture
def random_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU-sized random model with a vocabulary for quick tests, still larger than the tokenizer's."""
    monkeypatch.setitem(RANDOM_SHAPES, "random:test", replace(RANDOM_SHAPES["random:qwen3.5-small"], vocab_size=20_000))
    return "random:test"


@pytest.fixture
def random_step(few: list[str], random_name: str) -> Any:
    """A step of the CPU-sized random recipe with few tokens."""
    config, _ = load_config("configs/v49_random_small.toml", [*few, f"model.name={random_name}"])
    return config, sampling.sample_step(load_setup(config), 0)


def test_figures_that_have_nowhere_to_go_are_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["configs/tiny.toml", "--json", str(tmp_path / "nowhere" / "x.json")])
    assert "its folder is not there" in capsys.readouterr().err


def test_a_signal_ends_it_and_leaves_no_folder(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain = loop.score_groups

    def asked_to_leave(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(loop, "score_groups", asked_to_leave)
    config = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
    assert main([config, *with_set(few), "--steps", "1"]) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith("torchinductor")]  # torch's own cache


def test_the_kernels_of_a_step_are_told_by_phase(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "kernels.json"
    config = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
    monkeypatch.setattr(sys, "argv", ["kernels.py", config, *with_set(few), "--most", "3", "--record", str(record)])
    assert kernels() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::4]] == ["rollout", "update"] and len(lines) == 8
    found = json.loads(record.read_text())
    for phase in ("rollout", "update"):
        spent = [one["us"] for one in found[phase]]
        assert spent == sorted(spent, reverse=True) and min(spent) > 0
        assert any(one["name"] == "aten::mm" and one["calls"] > 10 for one in found[phase])


def test_random_answers_take_the_whole_budget_and_count_as_cut(random_step: Any) -> None:
    _, (groups, _, _) = random_step
    completions = [c for g in groups for c in g.completions]
    assert len(completions) == 6 and {len(c.ids) for c in completions} == {8}
    assert not any(c.finished for c in completions)


def test_random_answers_are_told_apart_by_v49s_reward(random_step: Any) -> None:
    """Else the advantages are 0, and a program may rightly skip the backward pass that is to be timed."""
    config, (_, scores, _) = random_step
    assert config.reward.set == "v49"
    assert {score.answer.reason for row in scores for score in row} == {"parsed"}
    assert len({score.total for row in scores for score in row}) > 1


def test_a_random_base_is_the_same_every_time(random_name: str) -> None:
    kind = {"device": torch.device("cpu"), "dtype": torch.float32}
    (one, tokenizer), (two, _) = (load_base(random_name, **kind) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not any(p.requires_grad for p in one.parameters())
    assert tokenizer.decode([200_000, 3]).endswith("</think>\nANSWER: ESI 4")
    assert tokenizer.decode([200_000]) == "</think>\nANSWER: ESI 1"
    assert tokenizer.decode([[200_000], [200_000, 3]]) == [tokenizer.decode([200_000]), tokenizer.decode([200_000, 3])]


def test_the_full_size_recipe_is_v49s() -> None:
    """But for what its header says."""
    own, real = (load_config(f"configs/{name}.toml")[0].model_dump() for name in ("v49_random", "v49"))
    different = {f"{s}.{k}" for s, v in own.items() if isinstance(v, dict) for k in v if v[k] != real[s][k]}
    assert different == {
        "model.name", "lora.warm_start", "cases.train", "cases.oversample",
        "rollout.ignore_eos", "train.steps", "evaluate.before_and_after",
    }  # fmt: skip
