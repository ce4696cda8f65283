"""The scripts for a machine with a card, as far as a CPU can try them: their parts, records, limits and summaries."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo.qwen3_5.train_forward as training
from benchmarks import gpu_check
from grpo.qwen3_5 import decode_ops as plain
from tests.test_readme import text_of

ROOT = Path(__file__).parent.parent
SCRIPTS = ("gpu_check", "gpu_speed", "gpu_parts")
TINY = ["rollout.max_new_tokens=6", "rollout.prompts_per_step=1", "rollout.group_size=2", "optim.micro_batch_size=2"]
SMALL = ["--device", "cpu", "--small", "--config", "configs/tiny.toml", *(x for v in TINY for x in ("--set", v))]


def run_script(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script on the CPU, with the tiny recipe unless the environment says otherwise."""
    sets = " ".join(f"--set {value}" for value in TINY)
    small = f"--device cpu --small {sets}" if script == "gpu_check" else sets
    tiny = {"PYTHON": sys.executable, "CONFIG": "configs/tiny.toml", "DEVICE": "cpu", "DTYPE": "float32"}
    names = ("WHEELS", "PARTS", "LIMIT", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / f"{script}.sh"), str(folder)],
        cwd=folder.parent,
        env=inherited | tiny | {"OPTIONS": small} | environment,
        capture_output=True,
        text=True,
    )


def run_parts(folder: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of made-up parts."""
    lines = (
        f'set -uo pipefail\n. benchmarks/gpu_parts.sh\nbegin made_up "$SECONDS_IN_ALL" "{folder}"\n{body}\nsummarize\n'
    )
    environment = {"SECONDS_IN_ALL": "60", "PYTHON": sys.executable} | environment
    return subprocess.run(["bash", "-c", lines], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def outcomes(folder: Path, script: str) -> dict[str, str]:
    lines = (folder / f"{script}.txt").read_text().splitlines()
    return {line.split()[0]: line.split(maxsplit=3)[3] for line in lines}


def record_of(folder: Path, part: str) -> Any:
    return json.loads((folder / f"check_{part}.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_them(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / f"{script}.sh")], check=True)


@pytest.mark.parametrize("script", ["gpu_check", "gpu_speed"])
def test_a_folder_is_needed(script: str) -> None:
    command = ["bash", str(ROOT / "benchmarks" / f"{script}.sh")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"usage: bash benchmarks/{script}.sh FOLDER\n"


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(tmp_path: Path) -> None:
    body = """
        part first 10 touch "$folder/first"
        part broken 10 "$python" -c 'import sys; print("no such kernel"); sys.exit(3)'
        part slow 4 bash -c 'echo begun; touch "$0/slow"; setsid sleep 30 & sleep 60' "$folder"
        part last 10 touch "$folder/last"
    """
    started = time.monotonic()
    done = run_parts(tmp_path / "records", body)
    assert time.monotonic() - started < 25, "a process that a part leaves behind is not waited for"
    folder = tmp_path / "records"
    assert done.returncode == 1
    assert outcomes(folder, "made_up") == {
        "first": "done",
        "broken": "failed (exit code 3)",
        "slow": "timed out",
        "last": "done",
    }
    assert all((folder / name).is_file() for name in ("first", "slow", "last"))
    log = (folder / "made_up.log").read_text()
    assert "no such kernel" in log and "begun" in log
    assert done.stdout.endswith((folder / "made_up.txt").read_text())


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("false", 1), ("sleep 60", 1)])
def test_the_exit_code_tells_whether_all_parts_ended_well(tmp_path: Path, command: str, code: int) -> None:
    assert run_parts(tmp_path, f"part only 4 {command}\npart last 4 true").returncode == code


def test_all_parts_together_keep_their_limit(tmp_path: Path) -> None:
    """A part has no more time than is left, and does not start with less than it could use."""
    body = "part slow 60 sleep 60\npart late 60 touch $folder/never"
    done = run_parts(tmp_path, body, LIMIT="6")
    assert done.returncode == 1
    assert outcomes(tmp_path, "made_up") == {"slow": "timed out", "late": "not started: no time left"}


def test_parts_are_chosen_and_skipped_by_name(tmp_path: Path) -> None:
    body = """
        part one 10 touch "$folder/one"
        needs no_such_package two && part two 10 touch "$folder/two"
        needs torch three && part three 10 touch "$folder/three"
    """
    assert run_parts(tmp_path, body, PARTS="two three").returncode == 0
    skipped = "skipped: no_such_package is not installed"
    assert outcomes(tmp_path, "made_up") == {"two": skipped, "three": "done"}
    assert sorted(p.name for p in tmp_path.iterdir() if not p.suffix) == ["three"]


@pytest.mark.parametrize("packed", [True, False])
def test_wheels_are_importable_without_an_installation(tmp_path: Path, packed: bool) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    if packed:
        with zipfile.ZipFile(wheels / "extra-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("extra_package.py", "VALUE = 3\n")
    else:
        (wheels / "extra_package.py").write_text("VALUE = 3\n")
    body = """part imports 60 "$python" -c 'import extra_package, grpo; print(extra_package.VALUE, grpo.__file__)'"""
    done = run_parts(tmp_path / "records", body, WHEELS=str(wheels), PYTHONPATH="")
    assert done.returncode == 0 and f"3 {ROOT / 'grpo'}" in done.stdout


def test_the_limits_are_those_that_the_page_states() -> None:
    page = text_of("benchmarks/README.md")
    for script, seconds in (("gpu_check", 150), ("gpu_speed", 400)):
        assert f"begin {script} {seconds} " in text_of(f"benchmarks/{script}.sh")
        assert f"bash benchmarks/{script}.sh FOLDER" in page and f"{seconds} s" in page


# --- gpu_check -------------------------------------------------------------------------------------------------------


def test_the_check_runs_on_a_cpu_from_any_folder(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    done = run_script("gpu_check", folder, PARTS="machine step")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(folder, "gpu_check") == {"machine": "done", "step": "done"}
    for part in ("machine", "step", "capture"):
        record = record_of(folder, part)
        assert record["part"] == part and record["ok"] and record["problems"] == []
        assert {"date", "torch", "card", "seconds"} <= record.keys()


def test_every_part_writes_its_record(tmp_path: Path) -> None:
    assert gpu_check.main([str(tmp_path), *gpu_check.PARTS, *SMALL]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"check_{part}.json" for part in gpu_check.PARTS}
    machine, attention, kernels, step, capture = (record_of(tmp_path, part) for part in gpu_check.PARTS)
    assert machine["versions"]["pydantic"] and machine["versions"]["torch"] == torch.__version__
    assert len(attention["cases"]) == 16 and set(attention["enabled"]) == {"flash", "efficient", "math", "cudnn"}
    assert {case["backend"] for case in attention["cases"]} == {"_scaled_dot_product_flash_attention_for_cpu"}
    pieces = {
        f"{name} {dtype}" for name in ("norm", "swiglu", "convolve", "remember", "attend") for dtype in gpu_check.DTYPES
    }
    assert kernels["kernels"].keys() == pieces
    assert step["tokens"] == 12 and step["skipped"] == 0 and 0 < step["drift_nats"]["max_abs"] < 1e-4
    assert step["gradient_tensors"] == 32 and step["loss"] and step["grad_norm"] > 0
    assert {len(values) for values in capture["max_abs_diff"].values()} == {gpu_check.CAPTURE_TOKENS}


def test_a_sampler_whose_kernel_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain.swiglu
    monkeypatch.setattr(plain, "swiglu", lambda gate, up: right(gate, up).mul_(0.7))
    longer = ["--set", "rollout.max_new_tokens=30"]  # the first tokens are all but certain, whatever the kernels do
    assert gpu_check.main([str(tmp_path), "step", *SMALL, *longer]) == 1
    problems = record_of(tmp_path, "step")["problems"]
    assert [problem.split()[3] for problem in problems] == ["mean_abs", "max_abs"], problems


def test_gradients_that_are_zero_or_not_finite_are_found() -> None:
    facts = {
        "skipped": 0,
        "loss": 0.1,
        "grad_norm": 1.0,
        "dtype": "float32",
        "drift_nats": {"mean_abs": 0, "max_abs": 0},
    }
    assert gpu_check.step_problems(facts, {"a": 1.0}) == []
    assert "1 gradients are zero or not finite, the first of them b" in gpu_check.step_problems(
        facts, {"a": 1.0, "b": 0.0}
    )
    for norm in (float("nan"), float("inf")):
        assert len(gpu_check.step_problems(facts | {"grad_norm": norm}, {"a": norm})) == 2
    assert len(gpu_check.step_problems(facts | {"skipped": 1}, {"a": 1.0})) == 1
    for drift in (1.0, float("nan")):
        assert len(gpu_check.step_problems(facts | {"drift_nats": {"mean_abs": drift, "max_abs": drift}}, {})) == 2


@pytest.mark.parametrize(
    "fault",
    [
        lambda right: lambda q, k, v, seen, scale: right(q, k, v, seen, scale) * 0.9,
        lambda right: lambda q, k, v, seen, scale: right(q, k, v, torch.ones_like(seen), scale),
        lambda right: lambda q, k, v, seen, scale: right(q, k, v, seen, scale) * torch.tensor(float("nan")),
        lambda right: lambda q, k, v, seen, scale: right(q, k, v, seen, scale) + 0 * (0 * q).sqrt().sum(),
        lambda right: lambda q, k, v, seen, scale: right(q, k.detach(), v, seen, scale) + 0 * k.sum(),
    ],
    ids=["scaled", "without its mask", "NaN", "NaN in a gradient", "without a gradient"],
)
def test_attention_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(training, "_mix", fault(training._mix))
    assert gpu_check.main([str(tmp_path), "attention", *SMALL]) == 1
    assert record_of(tmp_path, "attention")["problems"][0].startswith("attention differs from softmax")


def test_a_difference_is_a_share_of_the_tolerance() -> None:
    exact, near = torch.tensor([1.0, -2.0]), {"rtol": 0.1, "atol": 0.1}

    def share(ours: Any) -> Any:
        return gpu_check.worst_of(iter([("output", torch.tensor(ours), exact)]), **near)["of_tolerance"]

    assert share([1.0, -2.0]) == 0 and share([1.1, -2.0]) == pytest.approx(0.5) and share([1.0, -1.4]) > 1
    assert share([float("nan"), -2.0]) == share([1.0, float("inf")]) == float("inf")


def test_a_replay_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.copy_decoder

    def astray(decoder: Any) -> Any:
        copied = right(decoder)
        copied._state.positions.sub_(1)
        return copied

    monkeypatch.setattr(gpu_check, "copy_decoder", astray)
    assert gpu_check.main([str(tmp_path), "capture", *SMALL]) == 1
    assert record_of(tmp_path, "capture")["problems"][0].startswith("captured against eager")


def test_a_part_that_raises_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_: Any) -> Any:
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setitem(gpu_check.PARTS, "attention", raises)
    assert gpu_check.main([str(tmp_path), "attention", "machine", *SMALL]) == 1
    assert record_of(tmp_path, "attention")["problems"] == ["RuntimeError: no kernel image"]
    assert record_of(tmp_path, "machine")["ok"]


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "REQUIRED", ("numpy", "no_such_package"))
    assert gpu_check.main([str(tmp_path), "machine", "--device", "cuda"]) == 1
    problems = record_of(tmp_path, "machine")["problems"]
    assert problems[0] == "no_such_package is not installed"
    assert torch.cuda.is_available() or problems[1] == "torch sees no CUDA device"


# --- gpu_speed -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_speed_script_runs_on_a_cpu(tmp_path: Path) -> None:
    """All its parts but the marked tests, which have none to run here."""
    folder = tmp_path / "records"
    done = run_script("gpu_speed", folder, PARTS="bench kernels trl generate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(folder, "gpu_speed") == dict.fromkeys(("bench", "kernels", "trl", "generate"), "done")
    records = {part: json.loads((folder / f"speed_{part}.json").read_text()) for part in outcomes(folder, "gpu_speed")}
    assert "generate" not in records["bench"] and records["generate"]["generate"]["times_ours"]["step"] > 0
    assert records["kernels"]["rollout"] and records["trl"]["summary"]["engine"]["step"]["ratio"]
