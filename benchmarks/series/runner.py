"""Trains the lab's runs: single-threaded workers, a run a worker, each run finished once and never again."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.series.plan import Entry
from grpo.config import load_config
from grpo.run.folder import check_folder, write_json
from grpo.runtime.errors import UserError
from rewards.safe_files import InvalidFile, is_regular, read_json

DONE = "lab.json"
"""In a run's folder: the lab's own mark that it is finished, with its seconds."""
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be: an entry under a seed."""

    entry: Entry
    seed: int
    folder: Path
    command: tuple[str, ...]
    """Without ``--resume``."""

    @property
    def name(self) -> str:
        return f"{self.entry.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> bool:
        return cost_of(self) is not None


@dataclass(slots=True)
class _Working:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float
    resumed: bool


class LabError(ValueError):
    """The lab's folder cannot be used as asked."""


def jobs(entries: Sequence[Entry], seeds: Sequence[int], out: Path, overrides: Sequence[str]) -> tuple[Job, ...]:
    """Every entry under every seed: the series first, ablations last, so that an interrupted lab has what matters."""
    return tuple(
        _job(entry, seed, out, overrides)
        for kind in ("series", "contrast", "ablation")
        for seed in seeds
        for entry in entries
        if entry.kind == kind
    )


def _job(entry: Entry, seed: int, out: Path, overrides: Sequence[str]) -> Job:
    folder = folder_of(out, entry.name, seed)
    laid = [f"train.seed={seed}", *entry.overrides, *overrides]
    if entry.after:
        laid.append(f'lora.warm_start="{folder_of(out, entry.after, seed) / "adapter"}"')
    command = [sys.executable, "-m", "grpo.train", entry.config, "--out", str(folder)]
    return Job(entry, seed, folder, (*command, *(part for text in laid for part in ("--set", text))))


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a run lies."""
    return out / "runs" / name / f"seed-{seed}"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a finished run took."""

    seconds: float
    """By the clock, from its last start on."""
    cpu_s: float
    """Of the processor, from its last start on."""
    resumed: bool
    """There were earlier starts, whose cost is not in it."""


def cost_of(job: Job) -> Cost | None:
    """None for a run that is not finished.

    Raises:
        LabError: it was finished by another command than this one.
    """
    mark = job.folder / DONE
    if not mark.is_file():
        return None
    try:
        told = read_json(mark)
        cost, command = Cost(told["seconds"], told["cpu_s"], told["resumed"]), list(told["command"])
        adapter = job.folder / "adapter" / "adapter_model.safetensors"
        if not (is_regular(adapter) and adapter.stat().st_size):
            raise ValueError("its adapter is gone")
    except (InvalidFile, ValueError, KeyError, TypeError) as error:
        raise damaged(job, error) from None
    if command != list(job.command[1:]):
        raise LabError(
            f"{job.folder}: was trained with other settings: `{' '.join(map(str, command))}`; name another --out, or "
            f"delete that folder"
        )
    return cost


def damaged(job: Job, error: Exception) -> LabError:
    """What to say of a finished run whose folder is not whole any more."""
    told = str(error).replace(f"{job.folder}{os.sep}", "")  # which folder, the line says once
    what = f"{type(error).__name__}: {told}".splitlines()[0][:200]
    return LabError(
        f"{job.folder}: finished, but not whole any more ({what}): delete it, and the same command trains it"
    )


def check_place(out: Path, todo: Sequence[Job]) -> None:
    """Refuses a folder that cannot be made, one that holds finished runs which this lab was not asked for (its record
    would lose them), and runs whose config has changed since.

    Raises:
        LabError: says which, and what to do.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--out {out}: cannot be made: {error.strerror}") from None
    asked = {job.folder for job in todo}
    if others := sorted(mark.parent for mark in out.glob(f"runs/*/seed-*/{DONE}") if mark.parent not in asked):
        named = ", ".join(f"{folder.parent.name} {folder.name}" for folder in others[:5])
        raise LabError(
            f"{out}: holds {len(others)} finished runs that are not asked for ({named}{', …' * (len(others) > 5)}): "
            f"its record would lose them; ask for them as well, or name another --out"
        )
    for job in todo:
        cost_of(job)
        if (job.folder / "config.json").is_file():
            laid = [text for flag, text in itertools.pairwise(job.command) if flag == "--set"]
            try:
                check_folder(job.folder, load_config(job.entry.config, laid)[0], resume=True)
            except UserError as error:
                raise LabError(f"{error}; or delete {job.folder}, to have it trained again") from None


def work(todo: Sequence[Job], *, at_once: int, tell: Callable[[str], None]) -> dict[Job, str]:
    """Trains what is not finished, a run after the one it starts from; the failed ones with the end of their logs.

    A run that stands behind a failed one fails with it. On an interrupt the workers are stopped, each to be resumed
    from its last checkpoint by the next call.
    """
    waiting = [job for job in todo if not job.done]
    failed: dict[Job, str] = {}
    working: list[_Working] = []
    by_place = {(job.entry.name, job.seed): job for job in todo}
    count = len(todo) - len(waiting)
    try:
        while waiting or working:
            for one, cpu_s in _ended(working):
                working.remove(one)
                count += 1
                error = _finish(one, cpu_s)
                if error:
                    failed[one.job] = error
                tell(f"{count}/{len(todo)}  {one.job.name}: {'FAILED' if error else _told(one.job)}")
            for job in _startable(waiting, working, by_place, failed)[: at_once - len(working)]:
                waiting.remove(job)
                working.append(_start(job))
            for job in [j for j in waiting if by_place.get((j.entry.after, j.seed)) in failed]:
                waiting.remove(job)
                count += 1
                failed[job] = f"its warm start, {job.entry.after}, failed"
                tell(f"{count}/{len(todo)}  {job.name}: left out, {failed[job]}")
            time.sleep(LOOK_S if working else 0)
    except BaseException:
        for one in working:
            one.process.terminate()
        for one in working:
            one.process.wait()
            one.log.close()
        raise
    return failed


def _ended(working: Sequence[_Working]) -> list[tuple[_Working, float]]:
    """Workers that have ended, each with its processor seconds: what the account of waited-for children grew by."""
    found = []
    for one in working:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if one.process.poll() is not None:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append((one, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return found


def _startable(
    waiting: Sequence[Job],
    working: Sequence[_Working],
    by_place: Mapping[tuple[str, int], Job],
    failed: Mapping[Job, str],
) -> list[Job]:
    def ready(job: Job) -> bool:
        before = by_place.get((job.entry.after, job.seed))
        return before is None or (before.done and before not in failed)

    return [job for job in waiting if ready(job)]


def _start(job: Job) -> _Working:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (job.folder / "config.json").is_file() else []
    log = job.log.open("ab")
    single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    process = subprocess.Popen(
        [*job.command, *resume],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **single},
        start_new_session=True,  # a terminal's interrupt is the lab's alone, which then stops its workers
    )
    return _Working(job, process, log, time.monotonic(), bool(resume))


def _finish(one: _Working, cpu_s: float) -> str:
    """Marks a run that ended well; else the last words of its log."""
    one.log.close()
    if one.process.returncode == 0:
        cost = {"seconds": round(time.monotonic() - one.started, 1), "cpu_s": round(cpu_s, 1), "resumed": one.resumed}
        write_json(one.job.folder / DONE, cost | {"command": list(one.job.command[1:])})
        return ""
    if one.process.returncode < 0:
        return f"ended by {signal.Signals(-one.process.returncode).name}; the same command goes on from its checkpoint"
    text = one.job.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-6:]) or f"exit {one.process.returncode}"


def _told(job: Job) -> str:
    cost = cost_of(job)
    assert cost is not None
    records = json.loads((job.folder / "eval.json").read_text(encoding="utf-8"))
    same = [r for r in records if (r["cases"], r["thinking"]) == (records[0]["cases"], records[0]["thinking"])]
    return f"exact {100 * same[0]['exact']:.1f} → {100 * same[-1]['exact']:.1f} % in {cost.seconds:.0f} s"
