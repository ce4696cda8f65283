"""Tiny runs, trained once a session: what the tests of everything that reads a ledger start from."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.config import TINY_WORLD_DIR
from grpo.run.ledger import LedgerStep, read_step, recorded_steps, write_step
from grpo.train import main as train

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.toml")
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    # everything that changes what a step is: two inner epochs, refills, penalties, masks, dropout
    "rich": (
        "train.seed=4",
        "rollout.temperature=1.6",
        "optim.inner_epochs=2",
        "lora.dropout=0.1",
        "rollout.resample_rounds=1",
        "rollout.max_new_tokens=72",
        "reward.overlong={cache_tokens = 12, penalty = 0.25}",
        "loss.mask_truncated=true",
        "advantage.truncated_in_baseline=false",
        "loss.clip_low=0.0001",
        "loss.clip_high=0.0001",
    ),
}


@functools.cache
def recorded(base: Path, kind: str) -> Path:
    """The run folder of one of `KINDS`, under the session's own folder: three steps of two groups of four."""
    folder = base / "recorded"
    folder.mkdir(exist_ok=True)
    rows = [
        json.loads(line) for line in (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chosen = [row for level in range(1, 6) for row in [r for r in rows if r["esi"] == level][:2]]
    cases, held_out = folder / "cases.jsonl", folder / "held_out.jsonl"
    cases.write_text("".join(json.dumps(row | {"id": f"c{i}"}) + "\n" for i, row in enumerate(chosen)))
    held_out.write_text(json.dumps(rows[100]) + "\n")
    values = (
        f"cases.train={cases}",
        "rollout.prompts_per_step=2",
        "rollout.group_size=4",
        "rollout.max_new_tokens=76",
        "optim.micro_batch_size=3",
        "train.steps=3",
        "checkpoint.every=2",
        f'evaluate.before_and_after={{test = "{held_out}"}}',
        "evaluate.periodic={}",
        'evaluate.thinking=["off"]',
        "evaluate.max_new_tokens=8",
        *KINDS[kind],
    )
    run = folder / kind
    assert train([TINY, "--out", str(run), *(part for value in values for part in ("--set", value))]) == 0
    return run


def rewritten(
    run: Path,
    target: Path,
    edit: Callable[[LedgerStep], LedgerStep] = lambda entry: entry,
    *,
    step: int | None = None,
    text: str | None = None,
    metrics: Callable[[dict[str, Any]], dict[str, Any]] = lambda metrics: metrics,
) -> Path:
    """A copy of a run whose ledger was written anew, sha256 and all: only computing it again can tell.

    Args:
        edit: of the step's entry; of every step if ``step`` is None.
        text: another ``ledger.text``, in the config as well.
        metrics: edits the step's metrics in both of their copies.
    """
    shutil.copytree(run, target)
    shutil.rmtree(target / "ledger")
    record = json.loads((target / "config.json").read_text())
    if text:
        record["config"]["ledger"]["text"] = text
        (target / "config.json").write_text(json.dumps(record))
    for number in recorded_steps(run / "ledger"):
        entry = read_step(run / "ledger", number)
        figures = entry.metrics
        if step in (None, number):
            entry, figures = edit(entry), metrics(dict(entry.metrics))
        write_step(target / "ledger", entry.step, entry.account, entry.shares, figures, text=text or entry.text)
    lines = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    lines = [metrics(line) if step in (None, line["step"]) else line for line in lines]
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target
