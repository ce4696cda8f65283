"""What a run leaves on disk, and what a person sees at its end.

runs/NAME/
    config.json      resolved config, its TOML source, overrides, commit, versions
    reward.json      the reward set, resolved: what every score of this run follows from
    metrics.jsonl    one line a step
    ledger/          every step, complete: see grpo.run.ledger
    eval.json        a list of evaluations
    eval/            one JSONL a evaluation: every case's answer
    checkpoints/     step_NNNNNN/
    adapter/         the result, in PEFT's layout: there once the run is done
    .lock            who writes here
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError

from grpo.config import Config, Source
from grpo.run.checkpoint import Progress, prune
from grpo.run.ledger import cut_ledger
from grpo.runtime.atomic_files import append_line, discard, make_folder, write_whole, writing
from grpo.runtime.errors import UserError
from rewards import Reward, dump_reward
from rewards.safe_files import MEBIBYTE, Unreadable, check_contents, is_regular, parse_json, raw_lines, read_json

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "pydantic", "regex")

FREE = {"model.kernels", "model.shard", "train.rank_timeout_s"}
"""Keys that a resume may change: nothing in a checkpoint depends on them."""


_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Intervals(BaseModel):
    model_config = ConfigDict(strict=True)

    exact: Annotated[list[_Share], FailFast()]


class _Evaluation(BaseModel):
    """What a record of ``eval.json`` is sorted and shown by; what else it holds is kept as it is."""

    model_config = ConfigDict(strict=True)

    cases: str
    thinking: str
    step: _Count
    n: _Count
    exact: _Share
    adjacent: _Share
    dangerous_under: _Share
    no_parse: _Share
    clipped_ratio: _Share
    intervals: _Intervals = _Intervals(exact=[])
    """A record written before there were any has none."""


_EVALUATIONS = TypeAdapter(Annotated[list[_Evaluation], FailFast()])


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval.json"


def check_folder(path: Path, config: Config, *, resume: bool) -> None:
    """Refuses to start over an existing run, and to resume a missing one, one of another config, or one whose files
    lie elsewhere. Touches nothing.

    Raises:
        UserError: says which, and what to do.
    """
    if path.is_dir() and _is_unstarted(path):
        return
    if not resume:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"{path}: already there, and a run is never overwritten: name another folder with --out, continue "
                f"with --resume, or delete it"
            )
        return
    if not is_regular(path / "config.json"):
        raise UserError(f"{path}: no run to resume here; leave out --resume to start one")
    for found in path.rglob("*"):
        if found.is_symlink():
            raise UserError(f"{found}: a symlink: a run writes in its own folder alone; put in its place what it names")
    try:
        check_contents(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    held = _record(path).get("config")
    if changed := sorted(_differences(held, config.model_dump(mode="json")) - FREE):
        raise UserError(
            f"{path}: was started with other values of {', '.join(changed) or 'everything'}: resume with the "
            f"config and --set it has, or start a new run with --out"
        )


def is_started(path: Path) -> bool:
    """Whether a run was begun here: its config.json, which is written last, is there."""
    return (path / "config.json").is_file()


def start_run(
    path: Path,
    config: Config,
    source: Source,
    reward: Reward,
    *,
    device: str,
    rates: Mapping[str, float] | None = None,
    inputs: Mapping[str, str] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> Run:
    """A new run folder, readable by its owner alone, with its resolved config and reward. ``config.json`` is written
    last: killed before, the folder is one where no run was begun.

    Args:
        device: what the policy runs on, for people.
        rates: its measured bandwidth (bytes a second) and matmul rate (FLOPs a second).
        inputs: key of the config → sha256 of what it names; `continue_run` holds them against those of a resume.
        kernels: the record of `grpo.run.self_check`; None if none was checked.
    """
    make_folder(path)
    with writing(path):
        path.chmod(0o700)
    record = {
        "config": config.model_dump(mode="json"),
        "source": {"path": str(source.path), "toml": source.text, "overrides": source.overrides},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(device, rates),
        "kernels": None if kernels is None else dict(kernels),
        "reward": {"name": reward.name, "sha256": reward.sha256},
        "inputs": dict(inputs or {}),
    }
    write_json(path / "reward.json", dump_reward(config.reward.set))
    write_json(path / "config.json", record)
    return Run(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The run folder as this process's alone, by a lock that the system takes back when the process ends, however it
    does. The file ``.lock`` stays, and blocks nobody.

    Raises:
        UserError: another process holds it; names that process.
    """
    make_folder(path)
    with writing(path / ".lock"):
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 100, 0).decode("utf-8", "replace").strip()
            raise UserError(f"{path}: in use by {holder or 'another process'}: wait for it, or stop it") from None
        except OSError as error:
            print(f"note: {path}: no lock on this file system ({error.strerror}): start no second run", file=sys.stderr)
        else:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def provenance(device: str, rates: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The program and the machine that figures come from: commit, versions, platform, and the device as named."""
    processor = {"platform": platform.platform(), "processor": platform.processor()}
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {**processor, "device": device, **(rates or {})},
    }


def continue_run(path: Path, progress: Progress, config: Config, inputs: Mapping[str, str] | None = None) -> Run:
    """An existing run folder, cut back to what its checkpoint holds: steps, evaluations and half-written files of
    afterwards are taken out.

    Args:
        inputs: as `start_run` was given them.

    Raises:
        UserError: an input is not what it was.
    """
    before = _record(path).get("inputs") or {}
    if not isinstance(before, dict):
        raise UserError(f"{path / 'config.json'}: inputs: expected what each key's files were, by sha256")
    if changed := sorted(key for key, sha256 in (inputs or {}).items() if before.get(key, sha256) != sha256):
        raise UserError(
            f"{path}: what {', '.join(changed)} names has changed since the run was started: put it back, or start a "
            f"new run with --out"
        )
    run, step = Run(path), progress.step
    metrics, records = _metrics(run), evaluations(run)  # all that may be refused, before anything is touched
    with writing(path):
        path.chmod(0o700)
    prune(run.checkpoints, step=step, section=config.checkpoint)
    recorded = cut_ledger(run.ledger, step=step)
    every = config.ledger.every
    _remark(run.ledger, set(range(every, step + 1, every) if every else ()) - set(recorded))
    if run.metrics.exists():
        kept = {number: line for number, line in metrics if number <= step}
        write_whole(run.metrics, "".join(line + "\n" for line in kept.values()))
        _remark(run.metrics, set(range(1, step + 1)) - set(kept))
    if run.evaluations.is_file():
        write_json(run.evaluations, [record for record in records if record["step"] <= step])
    for answers in (path / "eval").glob("*"):
        found = re.fullmatch(r"step_(\d{6,})_.*\.jsonl|\..*\.partial", answers.name)
        if found and int(found[1] or step + 1) > step:
            discard(answers)
    return run


def add_metrics(run: Run, record: dict[str, Any]) -> None:
    """Appends one line to ``metrics.jsonl``; a figure that is not finite is written as null."""
    append_line(run.metrics, json.dumps(finite(record), allow_nan=False))


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with None for every figure that is not finite: JSON has no NaN.

    >>> finite({"step": 3, "loss": float("nan")})
    {'step': 3, 'loss': None}
    """
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The records of ``eval.json``. Raises `UserError` where it holds anything else."""
    records: list[dict[str, Any]] = _read_json(run.evaluations) if os.path.lexists(run.evaluations) else []
    try:
        _EVALUATIONS.validate_python(records)
    except ValidationError as error:
        where = error.errors(include_input=False, include_url=False)[0]["loc"]
        odd = f"{(*where, 'the keys')[1]} of record {int(where[0]) + 1}" if where else "expected a list"
        raise UserError(f"{run.evaluations}: not the evaluations of a run: {odd}") from None
    return records


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(
        path, text.encode("utf-8", "backslashreplace")
    )  # half a surrogate pair, as in a path: JSON's own escape


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, most=64 * MEBIBYTE)
    except Unreadable as error:
        raise UserError(f"{path}: cannot be read: {str(error).removeprefix('cannot be read: ')}") from None


def _metrics(run: Run) -> list[tuple[float, str]]:
    """(step, line) of ``metrics.jsonl``; a line torn by a crash counts as after every checkpoint."""
    try:
        lines = list(raw_lines(run.metrics)) if os.path.lexists(run.metrics) else []
    except Unreadable as error:
        raise UserError(f"{run.metrics}: {error}") from None
    return [(_step(line), line.decode("utf-8", "replace").rstrip("\r\n")) for line in lines]


def _step(line: bytes) -> float:
    try:
        step = parse_json(line)["step"]
    except (Unreadable, KeyError, TypeError, IndexError):
        return math.inf
    return step if type(step) is int else math.inf


def _record(path: Path) -> dict[str, Any]:
    record = _read_json(path / "config.json")
    return record if isinstance(record, dict) else {}


def _is_unstarted(path: Path) -> bool:
    """Only what a run leaves that was killed before it had begun, and at least one file of it."""
    names = {found.name for found in path.iterdir()}
    return bool(names) and names <= {".lock", "reward.json", ".reward.json.partial", ".config.json.partial"}


def _remark(where: Path, missing: set[int]) -> None:
    if missing:
        shown = ", ".join(map(str, sorted(missing)[:10])) + (", …" if len(missing) > 10 else "")
        print(f"note: {where}: holds no step {shown}, which the checkpoint comes after", file=sys.stderr)


def _differences(before: Any, now: Any, prefix: str = "") -> set[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = set(before) | set(now)
        return {d for k in keys for d in _differences(before.get(k), now.get(k), f"{prefix}.{k}" if prefix else k)}
    return set() if before == now else {prefix}


def _commit() -> str | None:
    """The commit of the checkout this program runs from; None from an installed wheel."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
