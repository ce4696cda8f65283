"""What a run is, saved whole or not at all: adapter, optimiser state, progress. Safetensors and JSON, no pickle.

checkpoints/step_NNNNNN/
    adapter/                 in PEFT's layout
    optimizer.safetensors    AdamW's moments by parameter
    state.json               see `Progress`
    manifest.json            bytes and sha256 of each of these files

Data order and sampling noise are functions of (seed, step, case, member), so nothing else needs saving.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo.config import Checkpoint
from grpo.policy.policy import Policy, save_adapter
from grpo.runtime.atomic_files import discard, placed, write_whole, writing
from grpo.runtime.errors import UserError
from rewards.safe_files import Unreadable, open_regular, read_json

CHECKPOINT_VERSION = 1
"""Raised when the files change their meaning; a checkpoint of another version is not continued from."""
FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: its state beside adapter and optimiser."""

    step: int = 0
    """Steps done."""
    skipped_in_a_row: int = 0
    """The last so many of them had an update that was not finite."""

    def after(self, skipped: int) -> "Progress":
        """Return the progress one step later, whose update skipped so many optimizer steps."""
        return Progress(self.step + 1, self.skipped_in_a_row + 1 if skipped else 0)


def save_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress, section: Checkpoint
) -> None:
    """Writes ``folder/step_NNNNNN`` aside, renames it into place, reads it back, and only then drops old ones: see
    `prune`.

    Raises:
        DiskError: it could not be written. The checkpoints before it are untouched.
        UserError: what is read back is not what was written.
    """
    target = folder / f"step_{progress.step:06d}"
    with placed(target) as aside:
        save_adapter(policy, aside / "adapter")
        save_file(_optimizer_tensors(policy, optimizer), aside / "optimizer.safetensors")
        write_whole(aside / "state.json", json.dumps(asdict(progress)) + "\n")
        manifest = {"version": CHECKPOINT_VERSION, "files": {name: _measured(aside / name) for name in FILES}}
        write_whole(aside / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if fault := damage(target):
        raise UserError(f"{target}: {fault}, right after it was written: look after the disk; no other was dropped")
    prune(folder, step=progress.step, section=section)


def prune(folder: Path, *, step: int, section: Checkpoint) -> None:
    """Drops the checkpoints of before ``step`` but for the last ``keep`` that ``every`` asks for, that of ``step``
    counted, and what a crash left half written or half dropped. Those after ``step`` stay: they are to be done again.

    The checkpoint of ``step`` must be whole.
    """
    old = [path for path in _saved(folder) if _number(path) < step]
    asked = [path for path in old if _number(path) % section.every == 0]
    kept = asked[len(asked) - section.keep + 1 :] if section.keep > 1 else []
    for path in old:
        if path not in kept:
            aside = path.with_name(f".{path.name}.dropped")  # at once: one half dropped must not pass for a torn one
            discard(aside)
            with writing(path):
                os.replace(path, aside)
    for path in folder.glob(".step_*") if folder.is_dir() else ():
        discard(path)


def latest_checkpoint(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The last checkpoint that is what was written, and a line for each later one that is not. None where nothing was
    saved yet.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of checkpoints: move away what is there")
    found: list[str] = []
    for path in reversed(_saved(folder)):
        fault = damage(path)
        if fault is None:
            return path, tuple(found)
        found.append(f"{path}: {fault}: not used")
    if found:
        told = "\n       ".join(found)
        raise UserError(f"{told}\n       no other is there: delete {folder} to start again from step 0")
    return None, ()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None where every file is what was written."""
    if not path.is_dir():
        return "is no folder"
    if not os.path.lexists(path / MANIFEST):
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(path / MANIFEST)
        version, files = manifest["version"], {name: dict(told) for name, told in manifest["files"].items()}
    except Unreadable as error:
        return f"{MANIFEST} {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} does not list files with their bytes and sha256"
    if version != CHECKPOINT_VERSION or set(files) != set(FILES):
        return f"{MANIFEST} is not one of version {CHECKPOINT_VERSION}"
    for name, told in files.items():
        try:
            found = _measured(path / name)
        except Unreadable as error:
            return f"{name} {error}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found["bytes"] != told.get("bytes"):
            return f"{name} has {found['bytes']:,} bytes, not those that were written"
        if found != told:
            return f"{name} was altered since it was written"
    return None


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts the saved adapter and optimiser state in place; how far they are.

    Raises:
        UserError: a file is not what was written, or does not fit the adapter.
    """
    if fault := damage(path):
        raise UserError(f"{path}: {fault}: cannot be continued from")
    try:
        told = read_json(path / "state.json")
        if not isinstance(told, dict) or told.keys() != {field.name for field in fields(Progress)}:
            raise ValueError("state.json does not say how far the run was")
        progress = Progress(**told)
        if not all(type(count) is int and count >= 0 for count in asdict(progress).values()):
            raise ValueError("state.json counts what cannot be counted")
        adapter = load_file(path / "adapter" / "adapter_model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        trainable = policy.trainable()
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
        if progress.step != _number(path):
            raise ValueError(f"state.json is of step {progress.step}")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be continued from: {error}") from None
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def _measured(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256}


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, p in policy.trainable().items():
        state: dict[str, Any] = optimizer.state.get(p, {})
        tensors |= {f"{key}/{name}": value.detach().cpu().contiguous() for key, value in state.items()}
    return tensors


def _saved(folder: Path) -> list[Path]:
    found = (p for p in folder.iterdir() if re.fullmatch(r"step_\d{6,}", p.name)) if folder.is_dir() else ()
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
