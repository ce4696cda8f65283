"""Trains a config under several seeds and prints the before/after table of the README.

    python benchmarks/seeds.py configs/tiny.toml --seeds 42 43 44 --out runs/seeds --record benchmarks/tiny_seeds.json

A finished run is not trained again. The record holds every evaluation that the table shows.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from grpo.train import main as train

RULES = ("lifesaving_done", "severe_pain", "open_injury", "hard_negative", "paraphrase")


def run(config: str, seed: int, out: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Evaluations of one seed's run."""
    if not (out / "adapter").is_dir():
        started = time.time()
        more = [part for override in overrides for part in ("--set", override)]
        if code := train([config, "--out", str(out), "--set", f"train.seed={seed}", *more]):
            sys.exit(code)
        (out / "wall_s").write_text(f"{time.time() - started:.0f}")
    return json.loads((out / "eval.json").read_text())


def percent(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{100 * before:.1f} → {100 * after:.1f}"


def table(records: dict[int, list[dict[str, Any]]], cases: str) -> str:
    """Markdown: one row a seed and mode."""
    titles = ["seed", "thinking", "exact", "adjacent", "dangerous", "no parse", "clipped"]
    titles += [name.replace("_", " ") for name in RULES]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for seed, evaluations in records.items():
        for thinking in ("on", "off"):
            span = [e for e in evaluations if (e["cases"], e["thinking"]) == (cases, thinking)]
            first, last = span[0], span[-1]
            rates = ("exact", "adjacent", "dangerous_under", "no_parse", "clipped_ratio")
            cells = [percent(first[key], last[key]) for key in rates]
            cells += [percent(first["by_tag"][t]["exact"], last["by_tag"][t]["exact"]) for t in RULES]
            lines.append("| " + " | ".join([str(seed), thinking, *cells]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="test")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    records = {
        seed: run(arguments.config, seed, arguments.out / f"seed-{seed}", arguments.set) for seed in arguments.seeds
    }
    print(table(records, arguments.cases))
    if arguments.record:
        facts = {
            "date": datetime.date.today().isoformat(),
            "config": arguments.config,
            "overrides": arguments.set,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "seconds": {s: float((arguments.out / f"seed-{s}" / "wall_s").read_text()) for s in records},
            "evaluations": records,
        }
        arguments.record.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
