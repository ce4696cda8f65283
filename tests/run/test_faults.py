"""A few faults of every kind, by tests/support/faults.py, in a process of its own: its children must not inherit a used
autograd. By hand it runs hundreds; the record is benchmarks/faults.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FEW = {
    "each step": {"kills": 4, "power_cuts": 3, "refusals": 3, "full_disks": 1, "file_limits": 1, "damages": 1,
                  "signals": 3, "scenes": 1},
    "every other": {"kills": 2, "power_cuts": 1, "refusals": 0, "full_disks": 0, "file_limits": 0, "damages": 1,
                    "signals": 1, "scenes": 0},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world", FEW)
def test_a_run_comes_through_faults_of_every_kind_to_the_same_bits(world: str, tmp_path: Path) -> None:
    asked = [part for kind, count in FEW[world].items() for part in (f"--{kind.replace('_', '-')}", str(count))]
    record = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.faults", "--world", world, "--seed", "1", "--record", record, *asked],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())[world]
    assert found["failures"] == []
    for kind, count in FEW[world].items():
        if kind != "scenes" and count and "why" not in found[kind]:
            assert found[kind]["equal"] == count, kind
