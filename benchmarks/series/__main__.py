"""``python -m benchmarks.series``: train the series, judge its claims, write one page and one record.

Exit codes: 0 done, 1 some runs failed, 2 bad input, 130 (143, 129) interrupted: the same command goes on.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.series.claims import LAB
from benchmarks.series.page import render
from benchmarks.series.plan import PlanError, chosen
from benchmarks.series.record import lab_record
from benchmarks.series.run_results import Seen, read_seen
from benchmarks.series.runner import Job, LabError, check_place, cost_of, damaged, jobs, work
from grpo.commands.report import write
from grpo.config import Config, load_config
from grpo.run.folder import provenance, write_json
from grpo.runtime.distributed import require_single_process
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import tolerate_narrow_encodings
from rewards.safe_files import read_json

SEEDS = (42, 43, 44)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.series",
        description="Run the series of the model card again on the embedded world, and say what was reproduced.",
        epilog="Exit codes: 0 done, 1 some runs failed, 2 bad input, 130 (143, 129) stopped: the same command goes on.",
    )
    made.add_argument(
        "--runs", default="all", help="comma-separated: names, series, contrast, ablation, all (default: %(default)s)"
    )
    made.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="comma-separated (default: %(default)s)")
    made.add_argument("--short", action="store_true", help="the series alone, under one seed: minutes")
    made.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread (default: %(default)s)")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs, lab.json and lab.html")
    made.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key in every run"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    tolerate_narrow_encodings()
    require_single_process("benchmarks.series")
    arguments = parser().parse_args(argv)
    os.umask(0o077)
    try:
        entries = chosen(
            ("series" if arguments.short and arguments.runs == "all" else arguments.runs).replace(" ", "").split(",")
        )
        seeds = _seeds(arguments.seeds)[: 1 if arguments.short else None]
        if arguments.jobs < 1:
            raise PlanError(f"--jobs {arguments.jobs}: expected a whole number from 1")
        configs = {e.name: load_config(e.config, [*e.overrides, *arguments.set])[0] for e in entries}
        check_overrides(arguments.set, configs)
        todo = jobs(entries, seeds, arguments.out, arguments.set)
        check_place(arguments.out, todo)
        print(
            f"lab       {len(entries)} recipes × {len(seeds)} seeds, {sum(job.done for job in todo)} done", flush=True
        )
        with workers_ended():
            failed = work(todo, at_once=arguments.jobs, tell=lambda line: print(line, flush=True))
        runs = [seen(job) for job in todo if job not in failed]
        if not runs:
            raise LabError("no run was finished:\n" + "\n".join(f"{j.name}: {why}" for j, why in failed.items()))
        record = {
            "command": " ".join(["python -m benchmarks.series", *(argv if argv is not None else sys.argv[1:])]),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **provenance(f"cpu, {arguments.jobs} runs at once, 1 thread each"),
            "commits_of_runs": commits(todo),
            **lab_record(entries, configs, runs),
            "failed": {job.name: why for job, why in failed.items()},
        }
        write_json(arguments.out / "lab.json", record)
        write(arguments.out / "lab.html", render(record))
    except (UserError, PlanError, LabError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130
    for claim in record["claims"]:
        print(f"{claim['run']:<6}{claim['verdict']:<16}{claim['says']}")
    for job, why in failed.items():
        print(f"FAILED    {job.name}: {why}", file=sys.stderr)
    print(f"record    {arguments.out / 'lab.json'}\nreport    {arguments.out / 'lab.html'}")
    return 1 if failed else 0


def check_overrides(overrides: Sequence[str], configs: Mapping[str, Config]) -> None:
    """Refuses what the lab sets itself, and runs that would not be evaluated on what it judges them by.

    Raises:
        PlanError: says which.
    """
    for override in overrides:
        key = ".".join(part.strip() for part in override.partition("=")[0].split("."))
        if key in ("train.seed", "lora.warm_start", "train", "lora"):  # a whole table would replace them
            raise PlanError(
                f"--set {key}: the lab sets the seed and the warm start of each run itself: see --seeds and "
                f"benchmarks/series/plan.py"
            )
    if without := [name for name, config in configs.items() if LAB not in config.evaluate.before_and_after]:
        raise PlanError(
            f"evaluate.before_and_after of {', '.join(without)} names no set {LAB!r}, by which the lab judges"
        )
    if without := [name for name, config in configs.items() if not config.ledger.every]:
        raise PlanError(f"ledger.every of {', '.join(without)} is 0: the lab reads what was sampled from the ledger")


def commits(todo: Sequence[Job]) -> dict[str, int]:
    """Commit → how many of the runs were started with it; another than the record's where the lab was continued."""
    files = [job.folder / "config.json" for job in todo]
    return dict(Counter(str(read_json(file).get("commit") or "unknown") for file in files if file.is_file()))


def seen(job: Job) -> Seen:
    """What a finished run shows. Raises `LabError` where its folder is not whole any more."""
    cost = cost_of(job)
    assert cost is not None
    try:
        found = read_seen(job.folder, job.entry.name, job.seed, seconds=cost.seconds, cpu_s=cost.cpu_s)
        if not (found.before and found.after):
            raise ValueError("it holds no evaluations")
        return found
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, IndexError) as error:
        raise damaged(job, error) from None


@contextlib.contextmanager
def workers_ended() -> Iterator[None]:
    """SIGTERM and SIGHUP leave by way of what ends the workers, with the customary exit code."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, leave) for number in numbers if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seeds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise PlanError(f"--seeds {text}: expected distinct whole numbers from 0, separated by commas")
    return found


if __name__ == "__main__":
    sys.exit(main())
