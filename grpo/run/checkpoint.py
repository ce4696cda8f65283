"""Checkpoints, saved completely or not at all: adapter, optimizer state and progress, as safetensors and JSON.

checkpoints/step_NNNNNN/
    adapter/                 in PEFT's layout
    optimizer.safetensors    AdamW's moments by parameter
    state.json               see `Progress`
    manifest.json            size and sha256 of each of these files

Data order and sampling noise are functions of (seed, step, case, member), so nothing else needs saving.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo.config import CheckpointSection
from grpo.policy.policy import Policy, save_adapter
from grpo.runtime.atomic_files import atomic_folder, disk_errors, remove_if_present, write_atomic
from grpo.runtime.errors import UserError
from rewards.safe_files import InvalidFile, open_regular, read_json

CHECKPOINT_VERSION = 1
"""Incremented when the files change their meaning; a checkpoint of another version cannot be resumed."""
CHECKPOINT_FILES = (
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
)
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True, extra="forbid"))
class Progress:
    """The progress of a run."""

    step: NonNegativeInt = 0
    """Completed steps."""
    skipped_in_a_row: NonNegativeInt = 0
    """How many of the latest steps in a row had a non-finite update."""

    def after(self, skipped: int) -> "Progress":
        """Return the progress after one more step, given how many of its optimizer steps were skipped."""
        return Progress(self.step + 1, self.skipped_in_a_row + 1 if skipped else 0)


def save_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress, section: CheckpointSection
) -> None:
    """Write ``folder/step_NNNNNN`` atomically, read it back, and only then delete old checkpoints.

    Raises:
        DiskError: it could not be written. Earlier checkpoints are untouched.
        UserError: the files read back differ from those written.
    """
    target = folder / f"step_{progress.step:06d}"
    with atomic_folder(target) as staging:
        save_adapter(policy, staging / "adapter")
        save_file(_optimizer_tensors(policy, optimizer), staging / "optimizer.safetensors")
        write_atomic(staging / "state.json", json.dumps(asdict(progress)) + "\n")
        files = {name: _size_and_sha256(staging / name) for name in CHECKPOINT_FILES}
        write_atomic(staging / MANIFEST, json.dumps({"version": CHECKPOINT_VERSION, "files": files}, indent=2) + "\n")
    if damage := find_damage(target):
        raise UserError(f"{target}: {damage} right after it was written: check the disk; older checkpoints were kept")
    delete_old_checkpoints(folder, step=progress.step, section=section)


def delete_old_checkpoints(folder: Path, *, step: int, section: CheckpointSection) -> None:
    """Delete the checkpoints before ``step`` except the last ``keep`` scheduled ones (including that of ``step``, which
    must be undamaged), and what a crash left half written or half deleted. Those after ``step`` will be replaced."""
    old = [path for path in _checkpoint_folders(folder) if _step_of(path) < step]
    scheduled = [path for path in old if _step_of(path) % section.every == 0]
    keep = scheduled[len(scheduled) - section.keep + 1 :] if section.keep > 1 else []
    for path in old:
        if path not in keep:
            dropped = path.with_name(f".{path.name}.dropped")  # renamed first: half deleted, it would look damaged
            remove_if_present(dropped)
            with disk_errors(path):
                os.replace(path, dropped)
    for path in folder.glob(".step_*") if folder.is_dir() else ():
        remove_if_present(path)


def latest_checkpoint(folder: Path) -> tuple[Path | None, tuple[tuple[Path, str], ...]]:
    """Return the last undamaged checkpoint and (path, damage) of each later one; None if nothing was saved yet.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of checkpoints: move this file away")
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_checkpoint_folders(folder)):
        damage = find_damage(path)
        if damage is None:
            return path, tuple(damaged)
        damaged.append((path, damage))
    if damaged:
        lines = "\n       ".join(f"{path}: {damage}" for path, damage in damaged)
        raise UserError(f"{lines}\n       no checkpoint is undamaged: delete {folder} to start again from step 0")
    return None, ()


def find_damage(path: Path) -> str | None:
    """Return how the files of a checkpoint differ from its manifest, or None."""
    if not path.is_dir():
        return "is not a folder"
    name, current = MANIFEST, {}
    try:
        manifest = read_json(path / MANIFEST)
        for name in CHECKPOINT_FILES:
            current[name] = _size_and_sha256(path / name)
    except InvalidFile as error:
        return f"{name} {error}"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    header = manifest if isinstance(manifest, dict) else {}
    files = header.get("files")
    if header.get("version") != CHECKPOINT_VERSION or not isinstance(files, dict) or files.keys() != current.keys():
        return f"{MANIFEST} is not of version {CHECKPOINT_VERSION}"
    return next((f"{name} changed" for name in CHECKPOINT_FILES if files[name] != current[name]), None)


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress:
    """Load the saved adapter and optimizer state; return the progress.

    Raises:
        UserError: a file is damaged or does not fit the adapter.
    """
    if damage := find_damage(path):
        raise UserError(f"{path}: cannot be resumed: {damage}")
    try:
        progress = Progress(**read_json(path / "state.json"))
        if progress.step != _step_of(path):
            raise ValueError(f"state.json is of step {progress.step}")
        adapter = load_file(path / "adapter" / "adapter_model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        trainable = policy.adapter_parameters()
        state = {
            i: {key: moments[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for i, name in enumerate(trainable)
            if f"step/{name}" in moments
        }
        with torch.no_grad():
            for i, (name, p) in enumerate(trainable.items()):
                saved = adapter[name.replace(".default.", ".")]
                shapes = {saved.shape, *(moment.shape for key, moment in state.get(i, {}).items() if key != "step")}
                if shapes != {p.shape}:
                    raise ValueError(f"{name} has another shape")
                p.copy_(saved)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be resumed: {error}") from None
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def _size_and_sha256(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256}


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, p in policy.adapter_parameters().items():
        state: dict[str, Any] = optimizer.state.get(p, {})
        tensors |= {f"{key}/{name}": value.detach().cpu().contiguous() for key, value in state.items()}
    return tensors


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in ascending order of their steps."""
    paths = (p for p in folder.iterdir() if re.fullmatch(r"step_\d{6,}", p.name)) if folder.is_dir() else ()
    return sorted(paths, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
