"""Whether a long run stays flat: memory, threads and file handles of a tiny run of 2,000 steps.

    python -m benchmarks.long_run --steps 2000 --record benchmarks/long_run.json

The run is `python -m grpo.train` as anybody starts it, with a ledger record and metrics each step, a checkpoint each
tenth and an evaluation each hundredth; only model, prompts, completions and budget are small. It is watched from
outside, by /proc. Lines are fitted to what it holds after a first tenth, in which allocators and caches fill.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.faults import small_base

ROOT = Path(__file__).parent.parent
VALUES = (
    "lora.r=4",
    "lora.warm_start=",
    "rollout.prompts_per_step=1",
    "rollout.group_size=2",
    "rollout.max_new_tokens=4",
    "optim.micro_batch_size=2",
    "checkpoint.every=10",
    "evaluate.every=100",
    "evaluate.max_new_tokens=4",
    'evaluate.thinking=["off"]',
)


def watch(command: list[str], run: Path, every_s: float) -> list[tuple[int, int, int, int]]:
    """(step, resident bytes, file handles, threads) of a command until it ends."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (run.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        proc, page, samples = Path(f"/proc/{process.pid}"), os.sysconf("SC_PAGE_SIZE"), []
        while process.poll() is None:
            time.sleep(every_s)
            try:
                resident = int((proc / "statm").read_text().split()[1]) * page
                handles, threads = (len(list((proc / name).iterdir())) for name in ("fd", "task"))
                step = (run / "metrics.jsonl").read_bytes().count(b"\n")
            except (OSError, IndexError):  # not begun, or just ended
                continue
            if resident and handles:  # else it is just ending
                samples.append((step, resident, handles, threads))
    if process.returncode:
        sys.exit((run.parent / "log").read_text()[-2000:])
    return samples


def line(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    centred = steps - steps.mean()
    slope = float((centred * values).sum() / (centred**2).sum())
    left = values - values.mean() - slope * centred
    return slope, float(np.sqrt((left**2).sum() / (len(steps) - 2) / (centred**2).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every-s", type=float, default=1.0, help="between two looks")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases, run = Path(folder) / "few.jsonl", Path(folder) / "run"
        rows = (ROOT / "grpo" / "tiny" / "cases" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        cases.write_text("\n".join(rows[:2]) + "\n", encoding="utf-8")
        sets = (f'evaluate.before_and_after={{test = "{cases}"}}', f'evaluate.periodic={{validation = "{cases}"}}')
        base = small_base(Path(folder) / "base")
        values = (*VALUES, *sets, f"model.name={base}", f"train.steps={arguments.steps}")
        command = [sys.executable, "-m", "grpo.train", "configs/tiny.toml", "--out", str(run)]
        started = time.time()
        samples = watch([*command, *(part for v in values for part in ("--set", v))], run, arguments.every_s)
        wall = time.time() - started
        files = sum(len(names) for _, _, names in os.walk(run))
    kept = np.array([sample for sample in samples if sample[0] >= arguments.steps / 10], dtype=np.float64)
    slope, error = line(kept[:, 0], kept[:, 1])
    tenths = np.array_split(kept[:, 1], 10)
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.long_run --steps {arguments.steps}",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "steps": arguments.steps,
        "wall_s": round(wall),
        "looks": len(kept),
        "resident_bytes": {
            "slope_a_step": round(slope, 1),
            "standard_error": round(error, 1),
            "median_by_tenth": [int(np.median(tenth)) for tenth in tenths],
            "least": int(kept[:, 1].min()),
            "most": int(kept[:, 1].max()),
        },
        "file_handles": {"least": int(kept[:, 2].min()), "most": int(kept[:, 2].max()),
                         "slope_a_step": line(kept[:, 0], kept[:, 2])[0]},
        "threads": {"least": int(kept[:, 3].min()), "most": int(kept[:, 3].max())},
        "files_left": files,
    }  # fmt: skip
    print(json.dumps(record, indent=2))
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
