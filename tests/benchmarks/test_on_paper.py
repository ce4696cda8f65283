"""A step on a CUDA card that is not there (benchmarks/on_paper.py): the paths that no CPU takes, on shapes alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.policy.memory_plan import ACTIVATION_BYTES

ROOT = Path(__file__).parents[2]
BUDGET = 256
FOUR = ("--set", "optim.micro_batch_size=2")
"""Micro-batches, of eight rows."""
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ and triton to pretend a CUDA device"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four layers of the 9B, one of them of full attention, and its whole vocabulary."""
    record = tmp_path_factory.mktemp("paper") / "record.json"
    command = [sys.executable, "benchmarks/on_paper.py", "configs/v49_random.toml", "--layers", "4"]
    done = subprocess.run(
        [*command, "--set", f"rollout.max_new_tokens={BUDGET}", *FOUR, "--record", str(record)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(record.read_text())


def test_a_decode_step_never_waits_and_starts_few_kernels(found: Any) -> None:
    step = found["decode_step"]
    assert step["waits"] == {}
    assert step["launches"] <= 4 * 18 + 8
    kernels = {name: count for name, count in step["most"].items() if name.startswith("triton")}
    assert kernels == {
        "triton _norm": 9,
        "triton _swiglu": 4,
        "triton _convolve": 3,
        "triton _remember": 3,
        "triton _turn": 1,
        "triton _attend": 1,
        "triton _gather": 1,
    }


def test_a_rollout_looks_at_the_card_every_eight_tokens(found: Any) -> None:
    waits = found["phases"]["rollout"]["waits"]
    looks = [count for place, count in waits.items() if place.startswith("nonzero at sampling.py")]
    assert looks == [BUDGET // 8]
    # and reads, once, which prompt each of the eight rows answers; noise, ids, masks and indices are sent, once each
    assert sum(waits.values()) <= BUDGET // 8 + 8 + 8
    assert not any(place.startswith(("synchronize", "empty_cache")) for place in waits), "as torch.cuda.graph would"


def test_when_rows_leave_another_graph_is_captured_and_all_columns_stay_in_reach(found: Any) -> None:
    """Of four tokens of sixteen rows and four of eight, the first of each number of rows is run, the second captured,
    the others replayed."""
    left = found["rows_leave"]
    assert left["rows"] == [16] * 4 + [8] * 4 and left["stepped"] == [16, 16, 8, 8]
    assert all(window == columns >= 3 + 300 for window, columns in left["columns"])


def test_an_update_waits_for_its_figures_alone(found: Any) -> None:
    """And no micro-batch waits: here are four."""
    assert found["tokens"] == 8 * BUDGET and "optim.micro_batch_size=2" in found["overrides"]
    waits = found["phases"]["update"]["waits"]
    assert sum(waits.values()) <= 5 and all("update.py" in place for place in waits)


def test_no_weight_is_read_twice_for_a_token(found: Any) -> None:
    """Bytes of a decode step: body, head and states once, and not a tenth more."""
    body, head, states = 4 * 6.919e9 / 32 * 2, 1.017e9 * 2, 8 * 3 * 2 * 2**21
    assert body + head < found["decode_step"]["bytes"] < 1.1 * (body + head + states)


def test_what_the_backward_pass_keeps_of_a_token(found: Any) -> None:
    """Of four layers, whose scans are computed again, beside a chunk's logits: what a plan says beforehand."""
    tokens = 2 * BUDGET  # of a micro-batch; less than a chunk
    logits = 3 * tokens * 248_320 * 4
    more = found["phases"]["update"]["peak_bytes"] - found["held_bytes"] - logits
    planned = ACTIVATION_BYTES["cuda"] * 4 * (4096 + 12288)
    assert more / (found["prompt_tokens"] + tokens) == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope.toml"], "no such config"),
        (["configs/tiny.toml"], "expected one of random:qwen3.5-9b"),
        (["configs/v49_random.toml", "--set", "rolout.x=1"], "did you mean rollout?"),
        (["configs/v49_random.toml", "--layers", "3"], "expected a multiple of 4"),
        (["configs/v49_random.toml", "--set", "model.device=cpu"], "the device is the card"),
        (["configs/v49_random.toml", "--record", "nowhere/x.json"], "its folder is not there"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    command = [sys.executable, "benchmarks/on_paper.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
