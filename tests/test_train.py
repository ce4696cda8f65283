"""The whole loop on the embedded model: what it leaves, that it resumes to the bit, and how it refuses."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import stat
import struct
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from grpo import dynamic_sampling as groups
from grpo import train as train_module
from grpo.commands.replay import main as replay
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.rollout import sampling_keys
from grpo.run import step_record
from grpo.run.ledger import read_step, recorded_steps
from grpo.runtime.terminal import display_width
from grpo.train import main
from grpo.types import Case, Prompt

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.toml")


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    """Overrides that make the tiny run short: ten cases, two of each level, four steps."""
    rows = [
        json.loads(line) for line in (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chosen = [row for level in range(1, 6) for row in [r for r in rows if r["esi"] == level][:2]]
    cases = tmp_path / "cases.jsonl"
    cases.write_text("".join(json.dumps(row | {"id": f"c{i}"}) + "\n" for i, row in enumerate(chosen)))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[100:105]))
    values = {
        "cases.train": cases,
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 3,
        "rollout.max_new_tokens": 40,
        "optim.micro_batch_size": 4,
        "train.steps": 4,
        "checkpoint.every": 2,
        "evaluate.every": 2,
        "evaluate.max_new_tokens": 40,
        "evaluate.before_and_after": f'{{test = "{held_out}"}}',
        "evaluate.periodic": f'{{validation = "{held_out}"}}',
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def run(world: list[str], out: Path, *more: str) -> int:
    return main([TINY, "--out", str(out), *world, *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_cost(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if not k.startswith(("time/", "tokens_per_s/", "roofline/", "memory/"))}
        for r in records
    ]


def test_a_run_leaves_what_the_readme_says(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "x"
    assert run(world, out) == 0
    assert {p.name for p in out.iterdir()} == {
        "config.json", "reward.json", "metrics.jsonl", "eval.json", "eval", "checkpoints", "adapter", "ledger", ".lock",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["train"]["steps"] == 4 and "train.steps=4" in config["source"]["overrides"]
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] or config["versions"]["torch"]

    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    wanted = {
        "loss", "grad_norm", "lr", "reward/mean", "reward/std_batch", "reward/std_group", "groups/zero_variance",
        "completions/clipped_ratio", "completions/mean_length", "completions/mean_terminated_length", "kl/k3",
        "clip_ratio/low", "clip_ratio/high", "entropy", "sampler/abs_logprob_diff", "time/rollout_s", "time/update_s",
        "tokens_per_s/rollout", "memory/peak_bytes",
    }  # fmt: skip
    assert all(wanted <= set(m) for m in metrics)
    assert any(name.startswith("reward/") and name.endswith("/mean") and name.count("/") == 2 for name in metrics[0])
    assert all(m["kl/k3"] > 0 for m in metrics), "the warm start is not the base"

    records = json.loads((out / "eval.json").read_text())
    assert [(r["step"], r["cases"], r["thinking"]) for r in records] == [
        (0, "test", "on"), (0, "test", "off"), (0, "validation", "on"), (0, "validation", "off"),
        (2, "validation", "on"), (2, "validation", "off"),
        (4, "test", "on"), (4, "test", "off"), (4, "validation", "on"), (4, "validation", "off"),
    ]  # fmt: skip
    assert all(0 <= r["exact"] <= r["adjacent"] <= 1 and r["n"] == 5 for r in records)
    assert 0 < records[0]["by_tag"]["adult"]["n"] <= 5 and sum(map(sum, records[0]["confusion"].values())) == 5
    answers = lines(out / "eval" / "step_000004_test_on.jsonl")
    assert [a["id"] for a in answers] == [f"train-{i:06d}" for i in range(100, 105)]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_000002", "step_000004"]

    shown = capsys.readouterr().out
    assert "2 prompts × 3 completions; inner epochs: 1\n" in shown
    assert "40 tokens per completion, 240 per step\n" in shown
    assert (
        "\n\n% of cases" in shown and "\ntest, thinking on, n = 5\n  step 0 " in shown and str(out / "adapter") in shown
    )
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert stat.S_IMODE((out / "metrics.jsonl").stat().st_mode) == 0o600


def test_everything_a_run_prints_fits_a_terminal_of_80_columns(world: list[str], tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "grpo.train", TINY, *world, "--set", "train.steps=2", "--out", "out"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": follower, "stderr": follower}
    path = {"PYTHONPATH": str(Path(TINY).parents[1])}
    with subprocess.Popen(command, **streams, cwd=tmp_path, env={**os.environ, **path}) as process:
        os.close(follower)
        said = bytearray()
        with contextlib.suppress(OSError):  # the last writer has closed it
            while part := os.read(leader, 1 << 16):
                said += part
    os.close(leader)
    text = said.decode()
    assert process.returncode == 0, text
    drawn = [line for line in re.split(r"[\r\n]+|\x1b\[A", text) if line.strip()]
    assert max(map(display_width, drawn)) <= 80, [line for line in drawn if display_width(line) > 80]
    for complete in (
        r"evaluate validation, thinking off: +\d+%\|.+\| +\d+/20 \[\d\d:\d\d<\d\d:\d\d\]",
        r"100%\|.+\| 2/2 \[.*, reward [+-]\d\.\d\d, clipped \d+ %, KL \d\.\d{4}\]",
    ):
        assert any(re.fullmatch(complete, line) for line in drawn), complete


@pytest.mark.parametrize(("step", "steps", "seconds"), [(60, 60, 251), (100, 300, 4_070), (30, 1_000, 12_000)])
def test_the_bar_of_a_long_run_fits_80_columns(step: int, steps: int, seconds: int) -> None:
    config, _ = load_config(TINY)
    record = {"reward/mean": -12.251, "completions/clipped_ratio": 1.0, f"kl/{config.loss.kl}": 12.01681}
    shown = step_record.progress_text(record, config)
    bar = tqdm.format_meter(step, steps, seconds, ncols=79, postfix=shown, bar_format=step_record.BAR_FORMAT)
    assert len(bar) == 79 and bar.endswith(", reward -12.25, clipped 100 %, KL 12.0168]")


def test_without_a_terminal_progress_is_one_plain_line_per_step(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = ("--set", "evaluate.before_and_after={}", "--set", "evaluate.periodic={}")
    assert run(world, tmp_path / "run", "--set", "train.steps=2", *without) == 0
    printed = [line for line in capsys.readouterr().err.split("\n") if line.startswith("step ")]
    line = r"step [12]/2  reward [+-]\d\.\d\d, clipped \d+ %, KL \d\.\d{4}, \d+\.\d s"
    assert len(printed) == 2 and all(re.fullmatch(line, text) for text in printed), printed


def test_a_run_that_recorded_its_roofline_is_resumed_and_replayed(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions measured the device at the start and wrote shares of its roofline into every line."""
    out, short = (
        tmp_path / "run",
        ("--set", "evaluate.before_and_after={}", "--set", "evaluate.periodic={}", "--set", "train.steps=3"),
    )
    assert run(world, out, *short) == 0
    shutil.rmtree(out / "checkpoints" / "step_000003")
    shutil.rmtree(out / "adapter")
    shares = {f"roofline/{phase}": 0.25 for phase in ("rollout", "update", "step")}
    records = [json.dumps(record | shares) + "\n" for record in lines(out / "metrics.jsonl")]
    (out / "metrics.jsonl").write_text("".join(records))
    config = json.loads((out / "config.json").read_text())
    config["machine"] |= {"bandwidth": 1e10, "matmul": 1e11}
    (out / "config.json").write_text(json.dumps(config))
    assert run(world, out, *short, "--resume") == 0
    assert [record.get("roofline/step") for record in lines(out / "metrics.jsonl")] == [0.25, 0.25, None]
    assert replay([str(out)]) == 0


def test_the_adapter_loads_as_any_peft_adapter(world: list[str], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert run(world, tmp_path / "run", "--set", "train.steps=1") == 0
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY_WORLD_DIR / "base"), tmp_path / "run" / "adapter"
    )
    ids = torch.tensor([[10, 20, 30]])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.equal(adapted, model(input_ids=ids).logits)


def test_interrupted_and_resumed_is_bit_identical(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--set", "optim.inner_epochs=2", "--set", "lora.dropout=0.1", "--set", "rollout.resample_rounds=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(world, whole, *more) == 0

    true_update, steps = train_module.update_policy, iter(range(100))

    def dies_in_the_fourth(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return true_update(*args, **kwargs)

    monkeypatch.setattr(train_module, "update_policy", dies_in_the_fourth)
    assert run(world, parts, *more) == 130
    assert [m["step"] for m in lines(parts / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.setattr(train_module, "update_policy", true_update)
    assert run(world, parts, *more, "--resume") == 0

    for file in ("adapter/adapter_model.safetensors", "checkpoints/step_000004/optimizer.safetensors"):
        a, b = load_file(whole / file), load_file(parts / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert without_cost(lines(whole / "metrics.jsonl")) == without_cost(lines(parts / "metrics.jsonl"))
    assert {p.name: p.read_bytes() for p in (whole / "ledger").iterdir()} == {
        p.name: p.read_bytes() for p in (parts / "ledger").iterdir()
    }
    assert json.loads((whole / "eval.json").read_text()) == json.loads((parts / "eval.json").read_text())


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(world: list[str], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(world, tmp_path / name, "--set", f"train.seed={seed}", "--set", "train.steps=1") == 0
    a, b, c = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "optim.learning_rte=1"], "did you mean learning_rate?"),
        (["--set", "cases.train=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--set", "model.name=Qwen/Qwen3.5-9B"], "hf download Qwen/Qwen3.5-9B"),
        (["--set", "lora.warm_start=nowhere"], "adapter_config.json: cannot be read"),
        (["--set", "reward.set=v99"], "v99"),
        (["--set", "rollout.max_new_tokens=1020"], "do not fit the model's context of 1024"),
        (["--resume"], "no run to resume here"),
    ],
)
def test_bad_input_ends_with_one_error_exit_code_2_and_nothing_written(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    out = tmp_path / "run"
    assert run(world, out, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and "Traceback" not in error
    assert not out.exists()


def test_an_existing_run_is_never_overwritten(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(world, out, "--set", "train.steps=1") == 0
    before = (out / "metrics.jsonl").read_text()
    assert run(world, out, "--set", "train.steps=1") == 2
    assert "already exists. Use --resume" in capsys.readouterr().err
    assert run(world, out, "--set", "train.steps=1", "--set", "loss.beta=0.5", "--resume") == 2
    assert "was started with a different loss.beta." in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == before


def test_a_torn_checkpoint_is_named(world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(world, out, "--set", "train.steps=2") == 0
    (out / "checkpoints" / "step_000002" / "optimizer.safetensors").write_bytes(b"torn")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert run(world, out, "--set", "train.steps=2", "--resume") == 2
    error = capsys.readouterr().err
    assert "step_000002: optimizer.safetensors changed" in error
    assert f"delete {out / 'checkpoints'} to start again from step 0" in error
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


def test_too_many_updates_that_are_not_finite_stop_the_run(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "run", ("--set", "train.max_nonfinite_steps=1", "--set", "checkpoint.every=100")
    with monkeypatch.context() as broken:
        broken.setattr(train_module.torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
        assert run(world, out, *settings) == 2
        assert "step 2: 2 steps in a row had a loss or gradient that is not finite" in capsys.readouterr().err
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"], (
            "nothing that was done is lost"
        )
        assert run(world, out, *settings, "--resume") == 2
        assert "step 3: 3 steps in a row" in capsys.readouterr().err, "counted across the resume"
    assert run(world, out, *settings, "--resume") == 0
    assert [json.loads(line)["skipped"] for line in (out / "metrics.jsonl").read_text().splitlines()][:4] == [
        1,
        1,
        1,
        0,
    ]


def test_a_checkpoint_from_beyond_the_run_is_refused(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(world, out, "--set", "train.steps=1") == 0
    saved, later = (out / "checkpoints" / f"step_{step:06d}" for step in (1, 50))
    saved.rename(later)
    (later / "state.json").write_text('{"step": 50, "skipped_in_a_row": 0}\n')
    manifest = json.loads((later / "manifest.json").read_text())
    content = (later / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (later / "manifest.json").write_text(json.dumps(manifest))
    assert run(world, out, "--set", "train.steps=1", "--resume") == 2
    assert "step_000050: is beyond the last step of this run, train.steps = 1" in capsys.readouterr().err


def test_a_run_goes_on_when_nobody_reads_what_it_says(world: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "grpo.train",
        TINY,
        *world,
        "--out",
        str(tmp_path / "run"),
        "--set",
        "train.steps=1",
    ]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 0, said
    assert "Traceback" not in said and (tmp_path / "run" / "adapter").is_dir()


def test_groups_without_variance_are_refilled(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that only case c0 to c4 can vary under: the others' groups are silent."""
    true_scores = train_module.score_groups
    sampled: list[list[str]] = []

    def only_half_vary(reward: Any, groups: Any, config: Any, ranks: Any) -> Any:
        sampled.append([group.prompt.case.id for group in groups])
        return tuple(
            tuple(
                dataclasses.replace(
                    score,
                    total=float(g) if group.prompt.case.id < "c5" else 1.0,
                    parts=dict.fromkeys(score.parts, 0.0)
                    | {"outcome": float(g) if group.prompt.case.id < "c5" else 1.0},
                )
                for g, score in enumerate(row)
            )
            for group, row in zip(groups, true_scores(reward, groups, config, ranks), strict=True)
        )

    for module in (train_module, groups):
        monkeypatch.setattr(module, "score_groups", only_half_vary)
    out = tmp_path / "run"
    assert run(world, out, "--set", "rollout.resample_rounds=3", "--set", "train.steps=8") == 0
    metrics = lines(out / "metrics.jsonl")
    rounds, dropped = iter(sampled), []
    for m in metrics:
        entry = read_step(out / "ledger", m["step"])
        kept = [group.prompt.case.id for group in entry.step.groups]
        slots = list(next(rounds))
        left: list[str] = []
        for _ in range(3):
            silent = [b for b, case in enumerate(slots) if case >= "c5"]
            if not silent:
                break
            for case in next(rounds):
                if case >= "c5":
                    left.append(case)
                else:
                    left.append(slots[silent[0]])
                    slots[silent.pop(0)] = case
        assert kept == slots and [one.case_id for one in entry.step.replaced_groups] == left
        assert m["groups/dropped"] == len(left) and m["groups/zero_variance"] == sum(c >= "c5" for c in kept) / 2
        tokens = sum(sum(one.lengths) for one in entry.step.replaced_groups)
        assert m["groups/dropped_tokens"] == tokens and (tokens > 0) == bool(left)
        assert m["reward/mean_sampled"] == pytest.approx((6 * m["reward/mean"] + 3 * len(left)) / (6 + 3 * len(left)))
        dropped.append(len(left))
    assert next(rounds, None) is None and any(dropped), "nothing was refilled: the test shows nothing"


def test_a_case_met_twice_in_a_step_draws_other_completions(world: list[str], tmp_path: Path) -> None:
    config, _ = load_config(TINY, ["rollout.group_size=2", "optim.micro_batch_size=1"])
    prompt = Prompt(Case("c0", "A 40-year-old.", 2), (1, 2), False)
    met: Counter[str] = Counter()
    keys = sampling_keys([prompt, prompt], config, 0, met) + sampling_keys([prompt], config, 0, met)
    assert len({key for row in keys for key in row}) == 6


def test_texts_stay_out_of_the_ledger_when_the_config_says_so(world: list[str], tmp_path: Path) -> None:
    for text in ("redacted", "off"):
        out = tmp_path / text
        assert run(world, out, "--set", "train.steps=1", "--set", f"ledger.text={text}") == 0
        written = b"".join(path.read_bytes() for path in (out / "ledger").iterdir())
        answers = b"".join(path.read_bytes() for path in (out / "eval").iterdir())
        assert b"year-old" not in written and b"ANSWER" not in written and b"rewards" in written
        assert b"predicted" in answers and b"completion" not in answers
    assert run(world, tmp_path / "none", "--set", "train.steps=1", "--set", "ledger.every=0") == 0
    assert not (tmp_path / "none" / "ledger").exists()
    assert run(world, tmp_path / "second", "--set", "train.steps=4", "--set", "ledger.every=2") == 0
    assert recorded_steps(tmp_path / "second" / "ledger") == (2, 4)


def test_the_overlong_penalty_reaches_the_reward_and_the_proof(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"reward.overlong={{cache_tokens = 20, penalty = {penalty}}}" for penalty in (0.4, 0.2)]
    means = []
    for i, override in enumerate(more):
        out = tmp_path / str(i)
        assert run(world, out, "--set", "train.steps=1", "--set", override) == 0
        entry = read_step(out / "ledger", 1)
        for group, row in zip(entry.step.groups, entry.step.scores, strict=True):
            for completion, score in zip(group.completions, row, strict=True):
                over = max(0, len(completion.ids) - 20) / 20
                assert score.parts["overlong"] == pytest.approx(-(0.4, 0.2)[i] * over)
        means.append(lines(out / "metrics.jsonl")[0]["reward/overlong/mean"])
    capsys.readouterr()
    assert run(world, tmp_path / "tie", "--set", "reward.overlong={cache_tokens = 20, penalty = 0.5}") == 2
    assert "a tie of gold 1, predicted 3" in capsys.readouterr().err, "v49's smallest margin is 0.5"
    assert means[0] == pytest.approx(2 * means[1]) and means[0] < 0
