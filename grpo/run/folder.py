"""The run folder: creating it, resuming it, and the files in it.

runs/NAME/
    config.json      resolved config, its TOML source, overrides, commit, versions
    reward.json      the resolved reward set, from which every score of this run follows
    metrics.jsonl    one line per step
    ledger/          every step, complete: see grpo.run.ledger
    eval.json        a list of evaluations
    eval/            one JSONL file per evaluation, with the answer to every case
    checkpoints/     step_NNNNNN/
    adapter/         the result, in PEFT's layout, written at the end of the run
    .lock            the process that writes here
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from grpo.config import Config, ConfigSource, upgrade_recorded_config
from grpo.run.checkpoint import Progress, delete_old_checkpoints
from grpo.run.ledger import file_errors, lines_up_to, remove_later_files, truncate_ledger
from grpo.runtime.atomic_files import (
    append_line_synced,
    disk_errors,
    make_private_folder,
    write_atomic,
)
from grpo.runtime.distributed import differing_keys
from grpo.runtime.errors import UserError
from rewards import Reward, dump_reward
from rewards.safe_files import MEBIBYTE, check_no_links_out, is_regular, read_json

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "pydantic", "regex")

CHANGEABLE_ON_RESUME = {"model.kernels", "train.rank_timeout_s"}
"""Keys on which nothing in a checkpoint depends."""


Rate = Annotated[float, Field(ge=0, le=1)]


class _Intervals(BaseModel):
    model_config = ConfigDict(strict=True)
    exact: list[Rate]


class _Evaluation(BaseModel):
    """The keys of a record in ``eval.json`` that a run reads; other keys are kept unchanged."""

    model_config = ConfigDict(strict=True)
    cases: str
    thinking: str
    step: NonNegativeInt
    n: NonNegativeInt
    exact: Rate
    adjacent: Rate
    dangerous_under: Rate
    no_parse: Rate
    clipped_ratio: Rate
    intervals: _Intervals = _Intervals(exact=[])
    """Missing in records of older versions."""


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.metrics = path / "metrics.jsonl"
        self.ledger = path / "ledger"
        self.evaluations = path / "eval.json"


def check_folder(path: Path, config: Config, *, resume: bool) -> None:
    """Check that a run can be started or resumed in a folder, without changing anything in it.

    Raises:
        UserError: the folder contains a run and ``resume`` is false; it contains none, one of another config, or one
            with a symlink, and ``resume`` is true.
    """
    if path.is_dir() and _is_unstarted(path):
        return
    if not resume:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} already exists. Use --resume to continue, --out for another folder, or delete it")
        return
    if not is_regular(path / "config.json"):
        raise UserError(f"{path}: no run to resume here; omit --resume to start one")
    for file in path.rglob("*"):
        if file.is_symlink():
            raise UserError(f"{file}: is a symlink; run folders must not contain symlinks. Replace it with its target")
    with file_errors(path):
        check_no_links_out(path)
    record = _read_record(path)
    try:
        recorded = upgrade_recorded_config(record.get("config"))
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from None
    keys = differing_keys(recorded, config.model_dump(mode="json"))
    if changed := [key for key in keys if key not in CHANGEABLE_ON_RESUME]:
        raise UserError(
            f"{path}: was started with a different {', '.join(changed) or 'config'}. Resume with the original config "
            f"and --set, or use --out to start a new run"
        )


def has_started(path: Path) -> bool:
    """Return whether a run was started in a folder: its config.json is written last."""
    return (path / "config.json").is_file()


def create_run(
    path: Path,
    config: Config,
    source: ConfigSource,
    reward: Reward,
    *,
    device: str,
    inputs: Mapping[str, str] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Create a run folder, readable by its owner only, with the resolved config and reward. ``config.json`` is written
    last: if the process is killed earlier, no run has started.

    Args:
        device: name of the policy's device, for people.
        inputs: sha256 of the file or folder behind each key of the config; `rewind_run` compares them on a resume.
        kernels: the record of `grpo.run.self_check`; None if none was checked.
    """
    make_private_folder(path)
    with disk_errors(path):
        path.chmod(0o700)
    record = {
        "config": config.model_dump(mode="json"),
        "source": {"path": str(source.path), "toml": source.text, "overrides": source.overrides},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(device),
        "kernels": None if kernels is None else dict(kernels),
        "reward": {"name": reward.name, "sha256": reward.sha256},
        "inputs": dict(inputs or {}),
    }
    write_json(path / "reward.json", dump_reward(config.reward.set))
    write_json(path / "config.json", record)
    return RunFolder(path)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the run folder's lock, which the system releases however the process ends. The file ``.lock`` remains.

    Raises:
        UserError: another process holds the lock; names that process.
    """
    make_private_folder(path)
    with disk_errors(path / ".lock"):
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 100, 0).decode("utf-8", "replace").strip()
            raise UserError(f"{path}: in use by {holder or 'another process'}: wait for it or stop it") from None
        except OSError as error:
            reason = f"this file system does not support locks ({error.strerror})"
            print(f"warning: {path}: {reason}; do not start a second run in it", file=sys.stderr)
        else:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def provenance(device: str) -> dict[str, Any]:
    """Return the commit, package versions and machine that results were computed with."""
    processor = {"platform": platform.platform(), "processor": platform.processor()}
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {**processor, "device": device},
    }


def rewind_run(path: Path, progress: Progress, config: Config, inputs: Mapping[str, str] | None = None) -> RunFolder:
    """Rewind an existing run folder to the step of its checkpoint: remove later steps, evaluations and unfinished
    files.

    Args:
        inputs: see `create_run`.

    Raises:
        UserError: an input has changed since the run started.
    """
    before = _read_record(path).get("inputs") or {}
    if not isinstance(before, dict):
        raise UserError(f"{path / 'config.json'}: inputs: expected an object with the sha256 of each input")
    if changed := sorted(key for key, sha256 in (inputs or {}).items() if before.get(key, sha256) != sha256):
        raise UserError(
            f"{path}: the file behind {', '.join(changed)} has changed since the run started: restore it, or use "
            f"--out to start a new run"
        )
    run, step = RunFolder(path), progress.step
    # everything that may raise comes before anything is changed
    metrics, records = lines_up_to(run.metrics, step), read_evaluations(run)
    with disk_errors(path):
        path.chmod(0o700)
    delete_old_checkpoints(run.checkpoints, step=step, section=config.checkpoint)
    truncate_ledger(run.ledger, step=step)
    if run.metrics.exists():
        write_atomic(run.metrics, metrics)
    if run.evaluations.is_file():
        write_json(run.evaluations, [record for record in records if record["step"] <= step])
    remove_later_files(path / "eval", step)
    return run


def append_metrics(run: RunFolder, record: dict[str, Any]) -> None:
    """Append one line to ``metrics.jsonl``; non-finite numbers become null."""
    append_line_synced(run.metrics, json.dumps(nan_to_none(record), allow_nan=False))


def nan_to_none(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with None for each non-finite number, since JSON has no NaN.

    >>> nan_to_none({"step": 3, "loss": float("nan")})
    {'step': 3, 'loss': None}
    """
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def read_evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """Return the records of ``eval.json``; raise `UserError` if they are invalid."""
    records: list[dict[str, Any]] = _read_json(run.evaluations) if os.path.lexists(run.evaluations) else []
    try:
        TypeAdapter(list[_Evaluation]).validate_python(records)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{run.evaluations}: not the evaluations of a run: {key}: {first['msg']}") from None
    return records


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # a lone surrogate, as in a path, becomes JSON's escape
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def _read_json(path: Path) -> Any:
    with file_errors(path):
        return read_json(path, most=64 * MEBIBYTE)


def _read_record(path: Path) -> dict[str, Any]:
    record = _read_json(path / "config.json")
    return record if isinstance(record, dict) else {}


def _is_unstarted(path: Path) -> bool:
    """Return whether a folder contains only files of a run that was killed before it started, and at least one."""
    names = {file.name for file in path.iterdir()}
    return bool(names) and names <= {".lock", "reward.json", ".reward.json.partial", ".config.json.partial"}


def _commit() -> str | None:
    """Return the commit of the checkout this program runs from; None for an installed wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
