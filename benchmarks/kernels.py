"""Where the microseconds go: the kernels of captured decode steps, and of an update, each with its share.

    python benchmarks/kernels.py configs/v49_random.toml --set rollout.max_new_tokens=64

One step warms up: it compiles and captures. The next is watched by torch's profiler, rollout and update apart; a
graph's kernels are seen one by one. On a CPU the operations stand in the kernels' place.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import bench_config
from grpo.batch import group_advantages, make_batch, reward_matrix
from grpo.dynamic_sampling import sample_step
from grpo.run.setup import Setup, device_name, load_setup
from grpo.runtime.errors import INPUT_ERRORS
from grpo.update import update_policy

T = TypeVar("T")


def watched(run: Callable[[], T], device: torch.device) -> tuple[T, list[dict[str, Any]]]:
    """What ``run`` returns, and of each kind of kernel its name, calls and microseconds, the dearest first."""
    on_card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as seen:
        result = run()
        if on_card:
            torch.cuda.synchronize(device)
    kernels = [
        {"name": one.key, "calls": one.count, "us": one.self_device_time_total if on_card else one.self_cpu_time_total}
        for one in seen.key_averages()
    ]
    return result, sorted((one for one in kernels if one["us"] > 0), key=lambda one: -one["us"])


def step(setup: Setup, number: int) -> dict[str, list[dict[str, Any]]]:
    """One step of the loop, by phase."""
    config, device = setup.config, setup.policy.device
    (groups, scores, _), rollout = watched(lambda: sample_step(setup, number), device)
    batch = make_batch(
        groups,
        group_advantages(groups, reward_matrix(scores), config.advantage),
        config,
    )
    _, trained = watched(
        lambda: update_policy(setup.policy, batch, config, setup.optimizer, setup.reference, step=number), device
    )
    return {"rollout": rollout, "update": trained}


def table(phase: str, kernels: list[dict[str, Any]], most: int) -> str:
    """The dearest kernels of a phase.

    >>> print(table("rollout", [{"name": "a", "calls": 2, "us": 30.0}, {"name": "b", "calls": 1, "us": 10.0}], 1))
    rollout   3 kernels of 2 kinds, 0.0 ms in all
           0.0 ms   75.0%       2 ×    15.0 µs  a
    """
    whole = sum(one["us"] for one in kernels)
    calls = sum(one["calls"] for one in kernels)
    lines = [f"{phase:<9} {calls:,} kernels of {len(kernels):,} kinds, {whole / 1000:,.1f} ms in all"]
    for one in kernels[:most]:
        ms, share, each = one["us"] / 1000, one["us"] / whole, one["us"] / one["calls"]
        lines.append(f"{ms:>10,.1f} ms {share:>7.1%} {one['calls']:>7,} × {each:>7,.1f} µs  {one['name'][:90]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--most", type=int, default=20, help="kinds of kernel to show of each phase (default: 20)")
    parser.add_argument("--record", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.record and not arguments.record.absolute().parent.is_dir():
        parser.error(f"--record {arguments.record}: its folder is not there; make it first")
    try:
        config, source = bench_config(arguments.config, arguments.set, 2)
        setup = load_setup(config)
        step(setup, 0)
        found = step(setup, 1)
    except INPUT_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(phase, kernels, arguments.most) for phase, kernels in found.items()))
    if arguments.record:
        device = device_name(setup.policy.device)
        facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "device": device}
        facts |= {"config": str(source.path), "overrides": source.overrides}
        arguments.record.write_text(json.dumps(facts | found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
