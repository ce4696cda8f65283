"""Fuzzing: `python benchmarks/fuzz.py TARGET … --seconds 300`, all targets without one.

    valid files → mutated (tests/support/fuzz_targets.py) → the reader → content, a named error, or a fault of ours

Engines: `random` (seeded, needs nothing) and `atheris` (coverage-guided, `pip install -e '.[fuzz]'`). A fault is what
is no named error, or takes longer than --hang seconds, or more memory than --memory; each is kept once by its place,
with the input that met it. Counts and faults are recorded with `--record benchmarks/fuzz.json`.
"""

import argparse
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


class Hang(BaseException):
    """A reader that does not come back."""


class Attack:
    """One target, and what came of it."""

    def __init__(self, name: str, hang: float, keep: Path) -> None:
        from tests.support.fuzz_targets import TARGETS

        self.name, self.target, self.hang, self.keep = name, TARGETS[name], hang, keep
        self.seeds = self.target.seeds()
        self.inputs, self.refused, self.slowest = 0, 0, 0.0
        self.faults: Counter[str] = Counter()
        self.started = time.monotonic()

    def one(self, data: bytes) -> None:
        """The reader on these bytes."""
        self.inputs += 1
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self.hang)
        try:
            self.target.read(data)
        except self.target.allowed:
            self.refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.fault(error, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def fault(self, error: BaseException, data: bytes) -> None:
        """Kept once by kind and place."""
        own = [
            f for f in traceback.extract_tb(error.__traceback__) if "/grpo/" in f.filename or "/rewards/" in f.filename
        ]
        frame = (own or traceback.extract_tb(error.__traceback__))[-1]
        place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        self.faults[place] += 1
        if self.faults[place] == 1:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{self.name}-{len(self.faults)}.bin").write_bytes(data)
            print(f"{self.name}: {place}: {str(error)[:200]!r}", file=sys.stderr, flush=True)

    def record(self, engine: str) -> dict[str, Any]:
        return {
            "target": self.name,
            "engine": engine,
            "inputs": self.inputs,
            "refused_by_name": self.refused,
            "seconds": round(time.monotonic() - self.started, 1),
            "slowest_input_s": round(self.slowest, 2),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "faults": dict(self.faults),
        }


def attack(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One target for as long as asked, in this process."""
    if arguments.memory:
        most = int(arguments.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def ring(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    one = Attack(name, arguments.hang, arguments.keep)
    for seed in one.seeds:  # each must be valid, or what follows from it says little
        one.one(seed)
    if one.refused or one.faults:
        print(f"{name}: {one.refused} of {len(one.seeds)} seeds are refused", file=sys.stderr)
    {"random": by_chance, "atheris": by_coverage}[arguments.engine](one, arguments)
    return one.record(arguments.engine)


def by_chance(one: Attack, arguments: argparse.Namespace) -> None:
    """Mutants of the seeds and, every other time, of those that were taken in: they lie deeper."""
    rng = random.Random(arguments.seed)
    pool = list(one.seeds)
    while time.monotonic() - one.started < arguments.seconds:
        data = one.target.mutated(rng.choice(rng.choice((one.seeds, pool))), rng)
        refused = one.refused + sum(one.faults.values())
        one.one(data)
        if refused == one.refused + sum(one.faults.values()) and len(pool) < 2000:
            pool.append(data)


def by_coverage(one: Attack, arguments: argparse.Namespace) -> None:
    """libFuzzer's choice of inputs by the lines they reach; half of its mutants are ours. Ends the process."""
    import atheris

    from tests.support.fuzz_targets import LONGEST

    corpus = arguments.keep / f"corpus-{one.name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(one.seeds):
        (corpus / f"seed-{i}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, most))[:most]
        return one.target.mutated(data, random.Random(seed))[:most]

    def test(data: bytes) -> None:
        one.one(data)
        if one.inputs % 500 == 0 or time.monotonic() - one.started > arguments.seconds:
            print(json.dumps(one.record("atheris")), flush=True)
        if time.monotonic() - one.started > arguments.seconds:
            os._exit(0)

    flags = [f"-seed={arguments.seed}", f"-max_len={LONGEST}", "-rss_limit_mb=0", "-timeout=600", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], test, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fuzz every reader of a file that somebody else may have written.")
    parser.add_argument("targets", nargs="*", help="names in tests/support/fuzz_targets.py (default: all)")
    parser.add_argument("--engine", choices=["random", "atheris"], default="random")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hang", type=float, default=20.0, help="seconds an input may take (default: 20)")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB of address space; 0 for no limit (default: 6)")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder of the inputs that met a fault")
    parser.add_argument("--record", type=Path, help="write the counts here, beside those of other engines")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        if arguments.engine == "atheris":
            import atheris

            with atheris.instrument_imports(include=["grpo", "rewards", "tomllib"]):
                import tests.support.fuzz_targets  # noqa: F401 — what is imported here is what coverage is counted in
        print(json.dumps(attack(arguments.targets[0], arguments)), flush=True)
        return 0
    from tests.support.fuzz_targets import TARGETS

    found = []
    for name in arguments.targets or TARGETS:
        passed = [
            f"--{key}={getattr(arguments, key)}" for key in ("engine", "seconds", "seed", "hang", "memory", "keep")
        ]
        command = [sys.executable, __file__, name, "--one", *passed]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # each with a memory of its own
        print(done.stderr, end="", file=sys.stderr)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            print(f"{name}: ended with {done.returncode}", file=sys.stderr)
            return 1
        found.append(json.loads(lines[-1]))
        print(json.dumps(found[-1]), flush=True)
    if arguments.record:
        write(arguments.record, found)
    return int(any(one["faults"] for one in found))


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """Adds these counts to the record, in place of earlier ones of the same target and engine."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    ours = {(one["target"], one["engine"]) for one in found}
    runs = [one for one in held["runs"] if (one["target"], one["engine"]) not in ours] + found
    facts = {
        "command": "python benchmarks/fuzz.py --engine ENGINE --seconds SECONDS --record benchmarks/fuzz.json",
        "python": platform.python_version(),
        "inputs": sum(one["inputs"] for one in runs),
        "seconds": round(sum(one["seconds"] for one in runs), 1),
        "faults": sum(len(one["faults"]) for one in runs),
    }
    path.write_text(
        json.dumps(facts | {k: v for k, v in held.items() if k not in facts} | {"runs": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
