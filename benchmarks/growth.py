"""How the cost of a step grows with group size, token budget and depth, on a model for a CPU.

    python benchmarks/growth.py --record benchmarks/growth.json --picture benchmarks/growth.svg

A random Qwen3.5 (hidden 128, vocabulary 4,096) takes steps of the v49 recipe in which every completion fills the
budget. One of the three is varied at a time, the others stay at 8 completions, 64 tokens, 4 layers. Every point is
measured in a process of its own: median seconds of rollout and update over the steps after the first, and peak resident
memory (Linux) above what the process held before its first step. The line through each curve is the least-squares fit
of a + b·x, given with its greatest relative residual. The picture needs matplotlib (extra ``bench``).
"""

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench import bench_config, limits_of, take
from grpo.policy.memory_plan import RANDOM_SHAPES
from grpo.run.setup import load_setup
from grpo.runtime.interrupts import Interrupts

CONFIG = Path(__file__).parent.parent / "configs" / "v49_random_small.toml"
BASE = {"group_size": 8, "budget": 64, "layers": 4}
AXES = {"group_size": (4, 8, 16, 32), "budget": (32, 64, 128, 256), "layers": (4, 8, 12, 16)}
LABELS = {"group_size": "completions a prompt", "budget": "tokens a completion", "layers": "layers"}
CURVES = {"rollout_s": "rollout", "update_s": "update", "peak_bytes": "peak memory"}
STEPS = 4


def measured(point: dict[str, int]) -> dict[str, float]:
    """Seconds by phase and peak bytes of one point; runs in a process of its own."""
    layers = point["layers"]
    small = RANDOM_SHAPES["random:qwen3.5-small"]
    RANDOM_SHAPES["random:growth"] = replace(
        small, vocab_size=4096, num_hidden_layers=layers, full_attention_layers=layers // 4
    )
    config, source = bench_config(
        str(CONFIG),
        [
            'model.name="random:growth"',
            f"rollout.group_size={point['group_size']}",
            f"rollout.max_new_tokens={point['budget']}",
            f"optim.micro_batch_size={point['group_size']}",
        ],
        STEPS,
    )
    setup = load_setup(config)
    gc.collect()
    before = resident()
    steps = take(setup, limits_of(setup.policy), source, Interrupts())[1:]
    return {
        "rollout_s": statistics.median(one.seconds["rollout"] for one in steps),
        "update_s": statistics.median(one.seconds["update"] for one in steps),
        "peak_bytes": peak() - before,
    }


def resident() -> int:
    """Bytes this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes it ever held. getrusage will not do: its maximum begins with the starting process's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def fitted(x: list[int], y: list[float]) -> dict[str, float]:
    """The least-squares line a + b·x and its greatest residual as a share of y.

    >>> {name: round(value, 9) for name, value in fitted([1, 2, 3], [3.0, 5.0, 7.0]).items()}
    {'a': 1.0, 'b': 2.0, 'worst_residual': 0.0}
    """
    b, a = np.polyfit(x, y, 1)
    apart = np.abs(a + b * np.array(x) - y) / np.array(y)
    return {"a": float(a), "b": float(b), "worst_residual": float(apart.max())}


def measure_all() -> dict[str, Any]:
    """Every point, the base point once; then the fits."""
    seen: dict[str, dict[str, float]] = {}
    found: dict[str, Any] = {}
    for axis, values in AXES.items():
        rows = []
        for value in values:
            key = json.dumps({**BASE, axis: value})
            if key not in seen:
                command = [sys.executable, __file__, "--point", key]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                seen[key] = json.loads(done.stdout.splitlines()[-1])
                print(f"{axis} {value:>4}  {seen[key]}  load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            rows.append(seen[key])
        curves = {name: [row[name] for row in rows] for name in CURVES}
        found[axis] = {"values": list(values), **curves}
        found[axis]["fits"] = {name: fitted(list(values), curve) for name, curve in curves.items()}
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: what one more of each costs."""
    lines = ["| one more | rollout | update | peak memory |", "|---|---|---|---|"]
    for axis, one in found.items():
        fits = one["fits"]
        cells = [f"{1000 * fits[name]['b']:.1f} ms" for name in ("rollout_s", "update_s")]
        cells.append(f"{fits['peak_bytes']['b'] / 1e6:.2f} MB")
        worst = [f"{cell} (±{fits[name]['worst_residual']:.0%})" for cell, name in zip(cells, CURVES, strict=True)]
        lines.append(f"| {LABELS[axis].rstrip('s').replace('completions a', 'completion a')} | {' | '.join(worst)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Seconds above, memory below, a column for each axis; dots are measured, lines fitted."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9})
    figure, panels = plt.subplots(2, len(found), figsize=(9, 4.6), sharex="col", sharey="row", layout="constrained")
    colours = {"rollout_s": "#1f6feb", "update_s": "#d1570a", "peak_bytes": "#3d7a3d"}
    for column, (axis, one) in enumerate(found.items()):
        x = np.array(one["values"])
        line = np.linspace(0, x.max(), 2)
        for name, label in CURVES.items():
            panel = panels[int(name == "peak_bytes"), column]
            scale = 1e-6 if name == "peak_bytes" else 1.0
            fit = one["fits"][name]
            panel.plot(x, np.array(one[name]) * scale, "o", color=colours[name], label=label, markersize=4)
            panel.plot(line, (fit["a"] + fit["b"] * line) * scale, color=colours[name], linewidth=1)
            panel.spines[["top", "right"]].set_visible(False)
        panels[1, column].set_xlabel(LABELS[axis])
    for panel in panels[:, 0]:
        panel.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("seconds a step")
    panels[0, 0].legend(frameon=False)
    panels[1, 0].set_ylabel("peak memory of a step, MB")
    figure.savefig(path, metadata={"Date": None})


def facts() -> dict[str, Any]:
    """Where and with what."""
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "base": BASE,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--from-record", type=Path, help="measure nothing: table and picture of a record")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measured(json.loads(arguments.point))))
        return 0
    if arguments.picture and not find_spec("matplotlib"):
        parser.error("--picture needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    if arguments.from_record and not arguments.from_record.is_file():
        parser.error(f"--from-record {arguments.from_record}: no such file")
    if arguments.from_record:
        found = json.loads(arguments.from_record.read_text(encoding="utf-8"))["growth"]
    else:
        record = facts()
        found = measure_all()
        if arguments.record:
            text = json.dumps(record | {"growth": found}, indent=1) + "\n"
            arguments.record.write_text(text, encoding="utf-8")
    print(table(found))
    if arguments.picture:
        draw(found, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
