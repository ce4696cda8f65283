"""The wheel alone, in an empty environment and from another folder, trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*command: object, cwd: Path) -> str:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=plain, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_environment(tmp_path: Path) -> None:
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 10 * 2**20
    call(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    where = call(python, "-c", "import grpo, rewards; print(grpo.__file__, rewards.__file__)", cwd=tmp_path)
    assert where.count(str(tmp_path / "env")) == 2

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    small = {
        "train.steps": 2,
        "evaluate.before_and_after": "{mietic36='embedded:cases/mietic36.jsonl'}",
        "evaluate.periodic": "{}",
    }
    overrides = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    shown = call(python, "-m", "grpo.train", "configs/tiny.toml", *overrides, cwd=elsewhere)
    assert "mietic36" in shown
    assert (elsewhere / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").is_file()
