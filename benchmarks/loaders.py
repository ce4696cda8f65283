"""Reads a MIMIC-IV-ED of the published size, made up here, and measures time and memory of the process that reads.

    python benchmarks/loaders.py --stays 425087 --record benchmarks/loaders.json

The files are gzip with the published column names, rows in no order, and carry every oddity that the loader knows.
Each reading runs in a process of its own; its peak is VmHWM of /proc/self/status (Linux), imports included.
"""

import argparse
import csv
import datetime
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from grpo.cases import LOADERS, load_cases
from grpo.data.row_report import CaseRow

COMPLAINTS = ("CHEST PAIN", "ABD PAIN", "s/p FALL AT ___", "DYSPNEA, Transfer", "N/V", "BACK PAIN, WEAKNESS", "___", "")
PAINS = (
    "0",
    "3",
    "5",
    "8",
    "10",
    "13",
    "uta",
    "8-9",
    "denies",
    "Critical",
    "",
    "7.5",
    "unable to assess at this time, ___",
)
ARRIVALS = ("WALK IN",) * 59 + ("AMBULANCE",) * 37 + ("UNKNOWN",) * 3 + ("HELICOPTER",)
TRIAGE = "subject_id stay_id temperature heartrate resprate o2sat sbp dbp pain acuity chiefcomplaint"
EDSTAYS = "subject_id hadm_id stay_id intime outtime gender race arrival_transport disposition"
PATIENTS = "subject_id gender anchor_age anchor_year anchor_year_group dod"
LEVELS = ("",) * 2 + ("1",) * 6 + ("2",) * 33 + ("3",) * 53 + ("4",) * 6 + ("5",)


def triage_row(draw: random.Random, subject: int, stay: int) -> list[object]:
    odd = draw.random()
    return [
        subject,
        stay,
        "" if odd < 0.05 else "36.8" if odd < 0.06 else f"{draw.gauss(98.2, 0.9):.1f}",
        "" if odd < 0.04 else f"{draw.gauss(85, 17):.1f}",
        "999" if odd < 0.001 else f"{draw.gauss(17.5, 2):.1f}",
        "9999" if odd < 0.001 else min(100, round(draw.gauss(98, 2))),
        sbp := max(60, round(draw.gauss(135, 22))),
        sbp + 4 if odd > 0.999 else round(sbp * 0.58),
        draw.choice(PAINS),
        draw.choice(LEVELS),
        draw.choice(COMPLAINTS[:6] if odd < 0.99 else COMPLAINTS),
    ]


def synthesise(folder: Path, stays: int, *, seed: int = 0) -> None:
    """triage, edstays and patients as gzip CSV: ``stays`` stays of about half as many patients."""
    draw = random.Random(seed)
    subjects = [10_000_000 + draw.randrange(stays // 2 + 1) * 31 % 9_000_000 for _ in range(stays)]
    order = list(range(stays))
    draw.shuffle(order)
    written(folder / "triage.csv.gz", TRIAGE, (triage_row(draw, subjects[i], 30_000_000 + i) for i in order))
    draw.shuffle(order)
    rows: Iterator[list[object]] = (
        [
            subjects[i], 20_000_000 + i if i % 2 else "", 30_000_000 + i,
            f"{2110 + subjects[i] % 60 + i % 5}-05-06 19:17:00", f"{2110 + subjects[i] % 60 + i % 5}-05-06 23:30:00",
            draw.choice("MF"), "WHITE", draw.choice(ARRIVALS), draw.choice(("HOME", "ADMITTED", "EXPIRED")),
        ]
        for i in order
    )  # fmt: skip
    written(folder / "edstays.csv.gz", EDSTAYS, rows)
    written(
        folder / "patients.csv.gz",
        PATIENTS,
        ([s, "F", draw.choice((*range(18, 90), 91)), 2110 + s % 60, "2011 - 2013", ""] for s in sorted(set(subjects))),
    )


def written(path: Path, columns: str, rows: Iterator[list[object]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", newline="", compresslevel=6) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns.split())
        table.writerows(rows)


def streamed(folder: str) -> dict[str, object]:
    """One pass that keeps nothing."""
    cases, characters, kinds = 0, 0, set()
    for row in LOADERS["mimic-iv-ed"](folder):
        if isinstance(row, CaseRow):
            cases, characters = cases + 1, characters + len(row.case.text)
        else:
            kinds.add((row.path, row.reason, row.column))
    return {"cases": cases, "characters": characters, "kinds": len(kinds)}


def held(folder: str) -> dict[str, object]:
    """All cases at once, as training holds them."""
    loaded = load_cases("mimic-iv-ed", folder, strict=False)
    return {"rows": loaded.row_count, "cases": len(loaded.rows)}


READINGS: dict[str, Callable[[str], dict[str, object]]] = {"streamed": streamed, "held": held}


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stays", type=int, default=425_087)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--reading", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reading:
        name, folder = arguments.reading
        before, started, cpu_started = peak_bytes(), time.perf_counter(), time.process_time()
        found = READINGS[name](folder)
        took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        took = {key: round(value, 1) for key, value in took.items()}
        print(json.dumps(found | took | {"peak_bytes": peak_bytes(), "peak_bytes_before": before}))
        return 0
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        synthesise(Path(folder), arguments.stays)
        size = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
        readings = {}
        for name in READINGS:
            command = [sys.executable, __file__, "--reading", name, folder]
            readings[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{name:<10}{json.dumps(readings[name])}")
    if arguments.record:
        facts = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "machine": f"{platform.machine()}, {cpu()}, {os.cpu_count()} cores",
            "load_average": {"before": round(load_before, 1), "after": round(os.getloadavg()[0], 1)},
            "stays": arguments.stays,
            "file_bytes": size,
            "readings": readings,
        }
        arguments.record.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    sys.exit(main())
