"""What the ledger of a finished run cost: ``python benchmarks/ledger.py runs/tiny --record benchmarks/ledger.json``.

Seconds a step for accounting and writing, bytes a token under each ``ledger.text``, and the projection for
configs/v49.toml (300 steps of 8 completions of at most 1024 tokens).
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from grpo.run.ledger import read_step, recorded_steps, write_step

V49_TOKENS = 300 * 8 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    if not (arguments.run / "metrics.jsonl").is_file():
        parser.error(f"{arguments.run}: not a run folder: it holds no metrics.jsonl")
    lines = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shares = [
        line["time/account_s"] / sum(line[f"time/{p}_s"] for p in ("rollout", "update", "account")) for line in lines
    ]
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "steps": len(lines),
        "account_s": statistics.median(line["time/account_s"] for line in lines),
        "share_of_step": {"median": statistics.median(shares), "max": max(shares)},
        "bytes_a_token": {text: bytes_a_token(arguments.run / "ledger", text) for text in ("full", "redacted", "off")},
    }
    record["v49_bytes"] = {text: round(size * V49_TOKENS) for text, size in record["bytes_a_token"].items()}
    print(json.dumps(record, indent=2))
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def bytes_a_token(ledger: Path, text: str) -> float:
    """Of all files of a ledger written again with this much text."""
    tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in recorded_steps(ledger):
            entry = read_step(ledger, number)
            write_step(Path(folder), entry.step, entry.account, entry.shares, entry.metrics, text=text)
            tokens += entry.step.logprobs.entropy.numel()
        return sum(path.stat().st_size for path in Path(folder).iterdir()) / tokens


if __name__ == "__main__":
    main()
