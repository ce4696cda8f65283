"""Case files of any format → a training file and a held-out file, as JSONL, in one command.

    python -m grpo prepare mimic-iv-ed FOLDER --out data/mimic --held-out 0.05 --oversample 1=5
    python -m grpo prepare mietic-validate FILE --out data/mietic36

The parts are cut by patient: no patient is in both, nor in a file named with ``--exclude``, nor a narrative word for
word. What was read, dropped and written is printed and kept in prepare.json; nothing there is a case's text. A folder
that exists is never written into.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo.cases import LOADERS, load, row_key
from grpo.data.row_report import REASONS, Banded, Loaded, Record, Report, Tally, settled
from grpo.preflight.checks import plain
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import error_lines, say_anyhow, visible
from grpo.types import Case

LEVELS = (1, 2, 3, 4, 5)
SPLITTING = ("held_out", "exclude", "oversample", "balance", "each_case_a_patient")
"""Options that mean nothing to ``--prompts``, as argparse spells them."""


@dataclass(frozen=True, slots=True)
class Split:
    """Two parts that share no patient and no narrative, and what had to go for it."""

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    excluded: int
    """Cases of patients, or with narratives, of an excluded file."""
    repeated: int
    """Training cases dropped because a held-out case reads the same."""


def split(
    records: Sequence[Record],
    *,
    share: float,
    seed: int,
    excluded: Iterable[Record] = (),
    set_aside: Iterable[str] = (),
) -> Split:
    """The training and the held-out part, cut by patient: a patient is held out if hash(seed, patient) < share.

    So a patient's part depends on the seed and on nothing else, and a file with more patients moves none of the old
    ones; the held-out part holds ``share`` of the patients on average, not exactly. Where somebody is held out or
    excluded, every record must have a patient (see `with_patients`).

    Args:
        records: all of them.
        share: in [0, 1). 0 holds nobody out.
        seed: any integer.
        excluded: records whose patients and narratives must be in neither part.
        set_aside: more patients who must be in neither part.

    Raises:
        UserError: a part that should not be empty is.

    >>> records = [Record(Case(f"c{i}", f"Note {i}.", 3), patient=str(i // 2)) for i in range(12)]
    >>> parts = split(records, share=0.5, seed=0)
    >>> {r.patient for r in parts.train} & {r.patient for r in parts.held_out}
    set()
    """
    gone = list(excluded)
    patients, texts = {*(record.patient for record in gone), *set_aside} - {""}, {plain(r.case.text) for r in gone}
    kept = [r for r in records if not gone or (r.patient not in patients and plain(r.case.text) not in texts)]
    held = tuple(record for record in kept if row_key("held out", seed, record.patient) < share * 2**128)
    held_patients = {record.patient for record in held}
    held_texts = {plain(record.case.text) for record in held}
    rest = [record for record in kept if not held or record.patient not in held_patients]
    train = tuple(record for record in rest if plain(record.case.text) not in held_texts)
    if not train or (share > 0 and not held):
        part = "held-out" if train else "training"
        raise UserError(
            f"the {part} part is empty: {len(kept):,} cases are left of {len(records):,}; change --held-out"
        )
    return Split(train, held, len(records) - len(kept), len(rest) - len(train))


def leak(train: Iterable[Record], other: Iterable[Record]) -> tuple[int, int]:
    """How many (patients, narratives) two parts have in common; letter case and blanks make no difference.

    >>> one, other = Record(Case("a", "Rash.", 5), "p"), Record(Case("b", "RASH.", 5), "q")
    >>> leak([one], [one, other]), leak([one], [other])
    ((1, 1), (0, 1))
    """
    ours, theirs = list(train), list(other)
    return (
        len(({record.patient for record in ours} & {record.patient for record in theirs}) - {""}),
        len({plain(record.case.text) for record in ours} & {plain(record.case.text) for record in theirs}),
    )


def with_patients(records: Sequence[Record], *, each_its_own: bool) -> tuple[Record, ...]:
    """The records, each with a patient.

    Raises:
        UserError: for records without one, unless ``each_its_own`` says that no two cases are of one patient.
    """
    unknown = [record.case.id for record in records if not record.patient]
    if unknown and not each_its_own:
        raise UserError(
            f"{len(unknown):,} of {len(records):,} cases, the first {unknown[0]!r}, name no patient: a split could put "
            "one patient in both parts. Give each case a patient, or say --each-case-a-patient if that is so"
        )
    return tuple(record if record.patient else Record(record.case, f"case {record.case.id}") for record in records)


def oversampled(records: Sequence[Record], times: Mapping[int, int]) -> tuple[Record, ...]:
    """Every record as often as its level is to stand there, 1 unless named; the copies of ``a`` are ``a#2``, ``a#3`` …

    >>> [r.case.id for r in oversampled([Record(Case("a", "…", 1), "p"), Record(Case("b", "…", 3), "q")], {1: 3})]
    ['a', 'a#2', 'a#3', 'b']
    """
    return tuple(_copy(record, n) for record in records for n in range(times.get(record.case.esi, 1)))


def balanced(records: Sequence[Record], *, per_level: int | None, seed: int) -> tuple[Record, ...]:
    """As many records of each level, in their order: ``per_level``, or the size of the rarest level.

    A level with more is sampled without replacement; one with n fewer repeats each of its cases ⌊per_level/n⌋ or
    ⌈per_level/n⌉ times. Which cases, depends on the seed and their ids alone.

    Raises:
        UserError: a level without a case.
    """
    of_level = {level: [record for record in records if record.case.esi == level] for level in LEVELS}
    if empty := [str(level) for level in LEVELS if not of_level[level]]:
        raise UserError(f"no case of ESI {', '.join(empty)} in the training part: it cannot be balanced")
    size = per_level or min(map(len, of_level.values()))
    times: dict[str, int] = {}
    for members in of_level.values():
        lucky = sorted(members, key=lambda record: row_key("balance", seed, record.case.id))
        every, more = divmod(size, len(members))
        times |= {record.case.id: every + (place < more) for place, record in enumerate(lucky)}
    return tuple(_copy(record, n) for record in records for n in range(times[record.case.id]))


def write(folder: Path, files: Mapping[str, Iterable[str]]) -> None:
    """Writes all files into a new folder or none: mode 0700, each file 0600.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    try:
        _refuse_existing(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, lines in files.items():
                with open(
                    os.open(aside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
                ) as file:
                    file.writelines(f"{line}\n" for line in lines)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a preparation has to say: the table for people and prepare.json are both made from it."""

    source: str
    settings: Mapping[str, object]
    report: Report
    parts: Mapping[str, Sequence[Record]]
    """"read", "training part", "written" and "held out", as far as there are."""
    notes: tuple[str, ...] = ()
    files: Mapping[str, Iterable[str]] = field(default_factory=dict)


def prepare(arguments: argparse.Namespace) -> Prepared:
    """What the command writes and says, nothing written yet.

    Raises `UserError` for every input that cannot be used.
    """
    source = f"{arguments.loader} {arguments.file}"
    settings = {key: value for key, value in vars(arguments).items() if key not in ("loader", "file", "out")}
    if arguments.prompts:
        if unmet := [option for option in SPLITTING if getattr(arguments, option) not in (None, False, 0.0, [])]:
            named = ", ".join(f"--{option.replace('_', '-')}" for option in unmet)
            raise UserError(f"--prompts writes every row once and cuts nothing: leave out {named}")
        return _prompts(source, settings, arguments)
    loaded = load(arguments.loader, arguments.file, strict=arguments.strict)
    others = {file: _to_exclude(loader, file) for loader, file in arguments.exclude}
    excluded = [record for other in others.values() for record in other.records]
    aside = frozenset().union(*(other.set_aside for other in others.values()))
    records: Sequence[Record] = loaded.records
    if arguments.held_out or excluded:
        records = with_patients(records, each_its_own=arguments.each_case_a_patient)
        excluded = list(with_patients(excluded, each_its_own=arguments.each_case_a_patient))
    parts = split(records, share=arguments.held_out, seed=arguments.seed, excluded=excluded, set_aside=aside)
    written: Sequence[Record] = parts.train
    if arguments.oversample:
        written = oversampled(parts.train, dict(arguments.oversample))
    elif arguments.balance is not None:
        written = balanced(parts.train, per_level=arguments.balance or None, seed=arguments.seed)
    if len({record.case.id for record in written}) < len(written):
        raise UserError(
            f"{arguments.file}: an id ends in #2 like the copies that --oversample and --balance make: rename"
        )
    notes = (
        *_exclusions(others),
        *_no_leak(written, parts.held_out, excluded, aside),
        f"removed   {parts.excluded:,} cases by --exclude, {parts.repeated:,} that read like a held-out one",
    )
    table = {"read": loaded.records, "training part": parts.train, "written": written}
    table |= {"held out": parts.held_out} if parts.held_out else {}
    files = {"train.jsonl": map(_line, written)} | (
        {"held_out.jsonl": map(_line, parts.held_out)} if parts.held_out else {}
    )
    return Prepared(source, settings, loaded.report, table, notes, files)


def render(prepared: Prepared) -> str:
    """The table for people."""
    report = prepared.report
    lines = [f"source    {prepared.source}: {report.rows:,} rows, {report.cases:,} cases"]
    for finding in report.findings:
        reason = REASONS[finding.reason]
        lines.append(f"{'note' if reason.kept else 'dropped' if reason.fault else 'set aside':<10}{finding}")
    lines.extend(prepared.notes)
    if prepared.parts:
        lines.append(
            f"{'':<16}" + "".join(f"{f'ESI {level}':>10}" for level in LEVELS) + f"{'cases':>11}{'patients':>11}"
        )
    for name, records in prepared.parts.items():
        by_level = Counter(record.case.esi for record in records)
        patients = len({record.patient for record in records} - {""})
        counts = "".join(f"{by_level[level]:>10,}" for level in LEVELS)
        lines.append(f"{name:<16}{counts}{len(records):>11,}{f'{patients:,}' if patients else '–':>11}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m grpo prepare", description="Write a training file and a held-out file from cases of any format."
    )
    one = made.add_argument
    one("loader", choices=sorted(LOADERS), metavar="FORMAT", help=", ".join(sorted(LOADERS)))
    one("file", metavar="FILE", help="the file, or the folder of mimic-iv-ed")
    one("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    one("--held-out", type=_share, default=0.0, metavar="SHARE", help="share of patients, 0 to below 1 (default 0)")
    mix = made.add_mutually_exclusive_group()
    mix.add_argument("--oversample", type=_times, nargs="+", default=[], metavar="LEVEL=TIMES", help="such as 1=5")
    mix.add_argument("--balance", type=_size, metavar="N|rarest", help="training cases of each level")
    one("--exclude", type=_other, nargs="+", default=[], metavar="FORMAT:FILE", help="keep these cases' patients out")
    one("--seed", type=int, default=0)
    one("--strict", action="store_true", help="refuse the file for any faulty row")
    one("--each-case-a-patient", action="store_true", help="no two cases without a patient are of the same one")
    one("--prompts", action="store_true", help="write id, text and band only: no gold, nothing to train on")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 2 for input that cannot be used, or 130 where it was interrupted."""
    say_anyhow()
    arguments = parser().parse_args(argv)
    try:
        _refuse_existing(arguments.out)
        prepared = prepare(arguments)
        write(arguments.out, {**prepared.files, "prepare.json": [_manifest(prepared)]})
    except UserError as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was left behind", file=sys.stderr)
        return 130
    print("\n".join(visible(line) for line in render(prepared).splitlines()))
    written = ", ".join(str(arguments.out / name) for name in (*prepared.files, "prepare.json"))
    print(f"wrote     {visible(written)}")
    return 0


def _to_exclude(loader: str, file: str) -> Loaded:
    """A file of cases to keep out: a row dropped here would be a patient let in, so none may be."""
    loaded = load(loader, file, strict=False)
    if lost := [str(finding) for finding in loaded.report.faults if not REASONS[finding.reason].kept]:
        raise UserError(
            f"--exclude {loader}:{file}: {'; '.join(lost)}: whoever these rows speak of could get into training: "
            "mend the file"
        )
    return loaded


def _exclusions(others: Mapping[str, Loaded]) -> tuple[str, ...]:
    """What the files of ``--exclude`` held."""
    notes = []
    for file, other in others.items():
        notes.append(f"exclude   {file}: {other.report.rows:,} rows, {other.report.cases:,} cases")
        notes += [f"{'':<10}{finding}" for finding in other.report.findings]
        if set_aside := other.report.dropped:
            known = len(other.set_aside)
            notes.append(
                f"{'':<10}{set_aside:,} rows set aside: the {known:,} patients that they name are excluded too"
            )
    return tuple(notes)


def _no_leak(
    train: Sequence[Record], held_out: Sequence[Record], excluded: Sequence[Record], aside: frozenset[str]
) -> tuple[str, ...]:
    """The check on what is about to be written, apart from the code that cut it."""
    notes = []
    if let_in := {record.patient for record in (*train, *held_out)} & aside:
        raise UserError(f"{len(let_in)} patients of rows set aside are in a part: a fault of this program")
    for name, part, other in (
        ("training and held out", train, held_out),
        ("training and excluded", train, excluded),
        ("held out and excluded", held_out, excluded),
    ):
        if part and other:
            patients, texts = leak(part, other)
            if patients or texts:
                raise UserError(f"{name}: {patients} patients and {texts} narratives in both: a fault of this program")
            notes.append(f"leak      {name}: 0 patients, 0 narratives in both")
    return tuple(notes)


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):  # a link to nowhere too
        raise UserError(f"{folder}: exists: prepared files are never overwritten; name another folder or remove it")


def _prompts(source: str, settings: Mapping[str, object], arguments: argparse.Namespace) -> Prepared:
    tally = Tally()
    rows = [
        row if isinstance(row, Banded) else Banded(row.case.id, row.case.text, row.case.esi, row.case.esi)
        for row in tally.watch(LOADERS[arguments.loader](arguments.file))
    ]
    report = settled(arguments.file, tally, strict=arguments.strict)
    bands = Counter((row.low, row.high) for row in rows)
    notes = tuple(f"band      ESI {low} to {high}: {count:,} prompts" for (low, high), count in sorted(bands.items()))
    lines = (json.dumps({"id": r.id, "text": r.text, "band": [r.low, r.high]}, ensure_ascii=False) for r in rows)
    return Prepared(source, settings, report, {}, notes, {"prompts.jsonl": lines})


def _manifest(prepared: Prepared) -> str:
    counts = {
        name: {str(level): sum(record.case.esi == level for record in records) for level in LEVELS}
        for name, records in prepared.parts.items()
    }
    return json.dumps(
        {
            "source": prepared.source,
            "settings": prepared.settings,
            "rows": prepared.report.rows,
            "cases": prepared.report.cases,
            "findings": [str(finding) for finding in prepared.report.findings],
            "notes": [" ".join(note.split()) for note in prepared.notes],
            "levels": counts,
        },
        ensure_ascii=False,
        indent=1,
    )


def _line(record: Record) -> str:
    case = record.case
    row = {"id": case.id, "text": case.text, "esi": case.esi, "patient": record.patient}
    return json.dumps(row | ({"tags": case.tags} if case.tags else {}), ensure_ascii=False)


def _copy(record: Record, n: int) -> Record:
    case = record.case
    return record if n == 0 else Record(Case(f"{case.id}#{n + 1}", case.text, case.esi, case.tags), record.patient)


def _typed(pattern: str, expected: str) -> Callable[[str], re.Match[str]]:
    def read(argument: str) -> re.Match[str]:
        if not (found := re.fullmatch(pattern, argument)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {argument!r}")
        return found

    return read


def _times(argument: str) -> tuple[int, int]:
    found = _typed(r"([1-5])=([1-9]\d{0,2})", "LEVEL=TIMES such as 1=5")(argument)
    return int(found[1]), int(found[2])


def _size(argument: str) -> int:
    return int(
        _typed(r"rarest|[1-9]\d{0,8}", "a number of cases or the word rarest")(argument)[0].replace("rarest", "0")
    )


def _share(argument: str) -> float:
    return float(_typed(r"0?\.\d{1,9}|0", "a share from 0 to below 1, such as 0.05")(argument)[0])


def _other(argument: str) -> tuple[str, str]:
    formats = "|".join(map(re.escape, LOADERS))
    found = _typed(rf"({formats}):(.+)", f"FORMAT:FILE with one of {', '.join(LOADERS)}")(argument)
    return found[1], found[2]


if __name__ == "__main__":
    sys.exit(main())
