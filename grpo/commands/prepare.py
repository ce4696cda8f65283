"""Write a training file and a held-out file, as JSONL, from cases of any format.

The parts are split by patient: no patient is in both or in a file given to ``--exclude``, and no narrative is either.
What was read, dropped and written is printed and kept in prepare.json, without any text of a case. An existing folder
is never written to.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.cases import LOADERS, load_cases
from grpo.data.row_report import REASONS, CaseRow, Loaded
from grpo.data.split import count_overlap, require_patients, split_by_patient
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import escape_control
from rewards.types import LEVELS


@dataclass(frozen=True, slots=True)
class Prepared:
    """The result of a preparation, from which both the printed table and prepare.json are made."""

    source: str
    settings: Mapping[str, object]
    loaded: Loaded
    parts: Mapping[str, Sequence[CaseRow]]
    """"read", "training" and, if there is one, "held out"."""
    notes: tuple[str, ...]
    files: Mapping[str, Iterable[str]]


def prepare(arguments: argparse.Namespace) -> Prepared:
    """Read and split the cases; nothing is written yet.

    Raises:
        UserError: the input cannot be used.
    """
    loaded = load_cases(arguments.loader, arguments.file, strict=arguments.strict)
    others = {file: _load_excluded(loader, file) for loader, file in arguments.exclude}
    excluded: Sequence[CaseRow] = [record for other in others.values() for record in other.rows]
    set_aside = frozenset().union(*(other.set_aside for other in others.values()))
    records: Sequence[CaseRow] = loaded.rows
    if arguments.held_out or excluded:
        records = require_patients(records, each_its_own=arguments.each_case_a_patient)
        excluded = require_patients(excluded, each_its_own=arguments.each_case_a_patient)
    parts = split_by_patient(
        records, share=arguments.held_out, seed=arguments.seed, excluded=excluded, set_aside=set_aside
    )
    notes = (
        *_exclusion_notes(others),
        *_check_overlap(parts.train, parts.held_out, excluded, set_aside),
        f"removed   {parts.excluded:,} cases by --exclude, {parts.repeated:,} with the narrative of a held-out case",
    )
    table = {"read": loaded.rows, "training": parts.train}
    files = {"train.jsonl": map(_to_json, parts.train)}
    if parts.held_out:
        table["held out"] = parts.held_out
        files["held_out.jsonl"] = map(_to_json, parts.held_out)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("loader", "file", "out")}
    return Prepared(f"{arguments.loader} {arguments.file}", settings, loaded, table, notes, files)


def write(folder: Path, files: Mapping[str, Iterable[str]]) -> None:
    """Write all files into a new folder or none of them: mode 0700, each file 0600.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    try:
        _refuse_existing(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, lines in files.items():
                handle = os.open(staging / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(handle, "w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def render(prepared: Prepared) -> str:
    """Return the printed report."""
    loaded = prepared.loaded
    lines = [f"source    {prepared.source}: {loaded.row_count:,} rows, {len(loaded.rows):,} cases"]
    for note in loaded.notes:
        reason = REASONS[note.reason]
        lines.append(f"{'note' if reason.kept else 'dropped' if reason.fault else 'excluded':<10}{note}")
    lines += prepared.notes
    lines.append(f"{'':<16}" + "".join(f"{f'ESI {level}':>10}" for level in LEVELS) + f"{'cases':>11}{'patients':>11}")
    for name, records in prepared.parts.items():
        by_level = Counter(record.case.gold_level for record in records)
        patients = len({record.patient for record in records} - {""})
        counts = "".join(f"{by_level[level]:>10,}" for level in LEVELS)
        lines.append(f"{name:<16}{counts}{len(records):>11,}{f'{patients:,}' if patients else '–':>11}")
    return "\n".join(lines)


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "prepare",
        "Write a training file and a held-out file from cases of any format.",
        examples=(
            "grpo prepare mimic-iv-ed DOWNLOADS/mimic-iv-ed --out data/mimic --held-out 0.05",
            "grpo prepare mietic-validate MIETIC-validate-samples.csv --out data/mietic36",
        ),
    )
    add = parser.add_argument
    add("loader", choices=sorted(LOADERS), metavar="FORMAT", help=", ".join(sorted(LOADERS)))
    add("file", metavar="FILE", help="the file, or the folder for mimic-iv-ed")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    add("--held-out", type=_share, default=0.0, metavar="SHARE", help="share of patients, 0 to below 1 (default: 0)")
    add("--exclude", type=_other, nargs="+", default=[], metavar="FORMAT:FILE", help="keep the patients of these out")
    add("--seed", type=int, default=0)
    add("--strict", action="store_true", help="refuse the file if any row is faulty")
    add("--each-case-a-patient", action="store_true", help="treat each case without a patient as one of its own")
    return parser


def run(arguments: argparse.Namespace) -> int:
    _refuse_existing(arguments.out)
    prepared = prepare(arguments)
    write(arguments.out, {**prepared.files, "prepare.json": [_manifest(prepared)]})
    print("\n".join(escape_control(line) for line in render(prepared).splitlines()))
    written = ", ".join(str(arguments.out / name) for name in (*prepared.files, "prepare.json"))
    print(f"wrote     {escape_control(written)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(argument_parser(), run, argv, if_interrupted="nothing was written")


def _load_excluded(loader: str, file: str) -> Loaded:
    """Load a file of cases to keep out. No row may be dropped, because its patient could then be in a part."""
    loaded = load_cases(loader, file, strict=False)
    if dropped := [str(note) for note in loaded.faults if not REASONS[note.reason].kept]:
        raise UserError(
            f"--exclude {loader}:{file}: {'; '.join(dropped)}: the patients of these rows could get into training: "
            "correct the file"
        )
    return loaded


def _exclusion_notes(others: Mapping[str, Loaded]) -> list[str]:
    notes = []
    for file, other in others.items():
        notes.append(f"exclude   {file}: {other.row_count:,} rows, {len(other.rows):,} cases")
        notes += [f"{'':<10}{note}" for note in other.notes]
        if other.dropped:
            notes.append(
                f"{'':<10}{other.dropped:,} rows excluded; their {len(other.set_aside):,} known patients are kept out"
            )
    return notes


def _check_overlap(
    train: Sequence[CaseRow], held_out: Sequence[CaseRow], excluded: Sequence[CaseRow], set_aside: frozenset[str]
) -> list[str]:
    """Check the parts that are about to be written, independently of the code that split them."""
    notes = []
    if leaked := {record.patient for record in (*train, *held_out)} & set_aside:
        raise UserError(f"{len(leaked)} patients of excluded rows are in a part: this is a bug")
    for name, part, other in (
        ("training and held out", train, held_out),
        ("training and excluded", train, excluded),
        ("held out and excluded", held_out, excluded),
    ):
        if part and other:
            patients, texts = count_overlap(part, other)
            if patients or texts:
                raise UserError(f"{name}: {patients} patients and {texts} narratives in both: this is a bug")
            notes.append(f"leak      {name}: 0 patients, 0 narratives in both")
    return notes


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):  # also a dangling link
        raise UserError(f"{folder}: already exists and is never overwritten: choose another folder or remove it")


def _manifest(prepared: Prepared) -> str:
    counts = {
        name: {str(level): sum(record.case.gold_level == level for record in records) for level in LEVELS}
        for name, records in prepared.parts.items()
    }
    return json.dumps(
        {
            "source": prepared.source,
            "settings": prepared.settings,
            "rows": prepared.loaded.row_count,
            "cases": len(prepared.loaded.rows),
            "findings": [str(note) for note in prepared.loaded.notes],
            "notes": [" ".join(note.split()) for note in prepared.notes],
            "levels": counts,
        },
        ensure_ascii=False,
        indent=1,
    )


def _to_json(record: CaseRow) -> str:
    case = record.case
    row = {"id": case.id, "text": case.text, "esi": case.gold_level, "patient": record.patient}
    return json.dumps(row | ({"tags": case.tags} if case.tags else {}), ensure_ascii=False)


def _match(pattern: str, expected: str, argument: str) -> re.Match[str]:
    if not (match := re.fullmatch(pattern, argument)):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {argument!r}")
    return match


def _share(argument: str) -> float:
    return float(_match(r"0?\.\d{1,9}|0", "a share from 0 to below 1, such as 0.05", argument)[0])


def _other(argument: str) -> tuple[str, str]:
    formats = "|".join(map(re.escape, LOADERS))
    match = _match(rf"({formats}):(.+)", f"FORMAT:FILE with one of {', '.join(LOADERS)}", argument)
    return match[1], match[2]
