"""What a run is, saved whole or not at all: adapter, optimiser state, step. Safetensors and JSON, no pickle.

Data order and sampling noise are functions of (seed, step, case, member), so nothing else needs saving.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo.policy import Policy, save_adapter


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from. Names the file."""


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, *, step: int, keep: int) -> Path:
    """Writes ``folder/step_NNNNNN`` aside, renames it into place, then drops all but the last ``keep``.

    Args:
        step: steps done so far.
    """
    target, aside = folder / f"step_{step:06d}", folder / f".step_{step:06d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_adapter(policy, aside / "adapter")
    save_file(_optimizer_tensors(policy, optimizer), aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    for file in sorted(aside.rglob("*")):
        _sync(file)
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)
    _sync(folder)
    for old in _saved(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a run, or None."""
    return next(reversed(_saved(folder)), None)


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Puts the saved adapter and optimiser state in place; the number of steps done.

    Raises:
        CheckpointError: a file is missing, torn, or does not fit the adapter.
    """
    try:
        step = json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]
        adapter = load_file(path / "adapter" / "adapter_model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        trainable = policy.trainable()
        with torch.no_grad():
            for name, p in trainable.items():
                p.copy_(adapter[name.replace(".default.", ".")])
        state = {
            i: {key: moments[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for i, name in enumerate(trainable)
            if f"step/{name}" in moments
        }
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be continued from: {error}; delete this folder to use the one before"
        ) from None
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(step)


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, p in policy.trainable().items():
        state: dict[str, Any] = optimizer.state.get(p, {})
        tensors |= {f"{key}/{name}": value.detach().cpu().contiguous() for key, value in state.items()}
    return tensors


def _saved(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name)) if folder.is_dir() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
