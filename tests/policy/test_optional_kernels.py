"""flash-linear-attention and causal-conv1d compute CUDA tensors, in a version that is right, and nothing else.

The packages are put in place before transformers is imported, in a process of their own: it chooses at import.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recorded_runs import TINY

RAISES = 'raise RuntimeError("0 active drivers ([]). There should only be one.")'
LOADS = """
import torch
from grpo.policy.base_model import load_base
base, tokenizer = load_base("embedded:base", device=torch.device("cpu"), dtype=torch.float32)
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with flash-linear-attention 0.6.0 and causal-conv1d, as far as transformers looks. All kernels raise."""
    make_fla(tmp_path, "0.6.0")
    (tmp_path / "causal_conv1d.py").write_text(
        f"def causal_conv1d_fn(x, *given, **named): {RAISES}\ncausal_conv1d_update = causal_conv1d_fn\n"
    )
    return tmp_path


def make_fla(folder: Path, version: str) -> None:
    ops = folder / "fla" / "ops" / "gated_delta_rule"
    ops.mkdir(parents=True)
    for package in (ops.parent, ops.parent.parent):
        (package / "__init__.py").write_text("")
    (ops / "__init__.py").write_text(
        f"def chunk_gated_delta_rule(q, *given, **named): {RAISES}\n"
        f"fused_recurrent_gated_delta_rule = chunk_gated_delta_rule\n"
    )
    for name in ("fla_core", "flash_linear_attention"):
        made = folder / f"{name}-{version}.dist-info"
        made.mkdir()
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


def python(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    path = f"{packages}:{root}"
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(packages)},
        cwd=packages,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_packages_are_what_transformers_takes(packages: Path) -> None:
    """Without `load_base`, all four functions are theirs and raise: else the other tests show nothing."""
    code = """
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling
for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn",
             "causal_conv1d_update"):
    try:
        getattr(modeling, name)(torch.zeros(1))
    except RuntimeError as error:
        print("active drivers" in str(error))
"""
    done = python(packages, "-c", code)
    assert done.stdout.split() == ["True"] * 4, done.stderr


def test_a_run_on_a_cpu_does_not_notice_them(packages: Path) -> None:
    """Head check, prefill, decode, the engine that calls the modules for every token, and the update."""
    values = ("model.device=cpu", "train.steps=1", "rollout.prompts_per_step=2", "rollout.group_size=2")
    values += (
        "optim.micro_batch_size=4",
        "rollout.max_new_tokens=4",
        "evaluate.before_and_after={}",
        "evaluate.periodic={}",
    )
    more = [part for value in values for part in ("--set", value)]
    done = python(packages, "-m", "grpo.train", TINY, "--out", str(packages / "run"), *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels" not in done.stderr
    cached = """
from grpo.engine.transformers_engine import padded_width
ids = torch.tensor([tokenizer("ESI").input_ids[:3]])
cache = base(input_ids=ids, use_cache=True).past_key_values
print(base(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits.isfinite().all().item())
"""
    done = python(packages, "-c", LOADS + cached)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize(("version", "used"), [("0.4.0", False), ("0.5.1", False), ("0.6.0", True), ("0.10.2", True)])
def test_cuda_tensors_are_theirs_in_a_version_that_is_right(tmp_path: Path, version: str, used: bool) -> None:
    make_fla(tmp_path, version)
    asks = """
from unittest import mock
from grpo.policy.optional_kernels import has_fla
x = mock.Mock(is_cuda=True)
try:
    modeling.torch_chunk_gated_delta_rule(x)
except Exception as error:
    print("active drivers" in str(error), has_fla(), has_fla())
"""
    done = python(tmp_path, "-c", LOADS + asks)
    assert done.stdout.split() == [str(used)] * 3, done.stderr
    line = f"kernels   fla-core {version} is not used: version 0.6 or later is required\n"
    assert done.stderr.count(line) == (not used)


def test_none_is_installed(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", "from grpo.policy.optional_kernels import has_fla; print(has_fla())")
    assert (done.stdout, done.stderr) == ("False\n", "")
