"""Load MIMIC-IV-ED: triage joined with edstays, and with patients for the age. Gold is ``acuity``, the nurse's level.

Columns as documented by MIMIC-IV-ED 2.2 and MIMIC-IV (grade K): triage ``subject_id, stay_id, temperature, heartrate,
resprate, o2sat, sbp, dbp, pain, acuity, chiefcomplaint``; edstays ``subject_id, hadm_id, stay_id, intime, outtime,
gender, race, arrival_transport, disposition``; patients ``subject_id, gender, anchor_age, anchor_year,
anchor_year_group, dod``. How often each irregularity occurs in the real files is unknown (U); the report counts them.
"""

import re
from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo.config import resolve_path
from grpo.data.csv_rows import ID, acuity, identifier, missing, table
from grpo.data.narrative import (
    ARRIVALS,
    GROUPED_AGE,
    MAX_COMPLAINT_CHARS,
    SEXES,
    Presentation,
    narrative,
)
from grpo.data.row_report import BadRow, CaseRow, RowNote
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards.safe_files import is_regular

SEEN_AT_TRIAGE = ("chiefcomplaint", "temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp", "pain")
"""Columns of triage that may enter a prompt. Of edstays: gender and arrival_transport. Of patients: the age."""
TRIAGE = ("subject_id", "stay_id", "acuity", *SEEN_AT_TRIAGE)
EDSTAYS = ("subject_id", "stay_id", "intime", "gender", "arrival_transport")
"""Only the year of ``intime`` is read, to turn an anchor age into an age."""
PATIENTS = ("subject_id", "anchor_age", "anchor_year")
NO_AGE, BAD_AGE = -1, -2
MAX_AGE = 130
GENDER_CODES, ARRIVAL_CODES = ("", *SEXES), ("", *ARRIVALS)
UNKNOWN_ARRIVALS = ("UNKNOWN", "OTHER")
"""Published values without information."""
AGE = re.compile(r"\d{1,3}", re.ASCII)
ANCHOR_YEAR = re.compile(r"\d{4}", re.ASCII)
YEAR = re.compile(r"(\d{4})-\d\d-\d\d", re.ASCII)


def read_mimic_iv_ed(name: str) -> Iterator[CaseRow | RowNote]:
    """Yield a case for each triage row with an acuity, in the order of triage; id ``stay-STAY_ID``, patient SUBJECT_ID.

    The narrative is `grpo.data.narrative.narrative` of the columns in `Presentation`; other columns never leave the CSV
    reader. Age = anchor_age + year of intime - anchor_year, exact to a year; without a patients file it is unknown.
    (Anchor age 91 means "over 89": for a year before the anchor the age is unknown.)

    Files may be in any order. Triage is streamed. The join keeps 36 bytes per stay of edstays (ids, lines, age, two
    codes), sorted by stay_id and searched by bisection: 15 MB for the published 425,087 stays.

    Args:
        name: a folder with ``triage.csv``, ``edstays.csv`` and, optionally, ``patients.csv``, each plain or ``.gz``,
            directly or in ``ed/`` and ``hosp/`` as published.

    Raises:
        UserError: a file is missing or damaged, a column is missing, or a stay_id occurs twice in a file.
    """
    folder = resolve_path(name)
    triage, edstays = _required(folder, "triage"), _required(folder, "edstays")
    ages = yield from _read_ages(_find(folder, "patients"))
    stays = yield from _read_stays(edstays, ages)
    used_in_line = array("q", bytes(8 * len(stays.ids)))
    for line, row in table(triage, TRIAGE):
        try:
            record, notes = _record(row, stays, used_in_line, triage, line)
        except BadRow as bad:
            yield RowNote(triage, line, bad.reason, detail=bad.detail)
            continue
        for reason, column in notes:
            yield RowNote(triage, line, reason, column)
        yield record
    for place, line in enumerate(used_in_line):
        if not line:
            yield RowNote(edstays, int(stays.lines[place]), "no_triage")


@dataclass(frozen=True, slots=True)
class _Stays:
    """Columns of edstays in ascending order of stay_id."""

    ids: memoryview
    subjects: memoryview
    lines: memoryview
    ages: memoryview
    sexes: memoryview
    """Indices into `GENDER_CODES`."""
    arrivals: memoryview
    """Indices into `ARRIVAL_CODES`."""


@dataclass(frozen=True, slots=True)
class _Ages:
    """Columns of patients in ascending order of subject_id."""

    subjects: memoryview
    ages: memoryview
    years: memoryview

    def at(self, subject: int, year: int) -> int:
        """Return the age in ``year``, `NO_AGE` or `BAD_AGE`; the caller checks the upper limit."""
        place = bisect_left(self.subjects, subject)
        if place == len(self.subjects) or self.subjects[place] != subject or not year:
            return NO_AGE
        anchor, since = self.ages[place], year - self.years[place]
        if anchor > GROUPED_AGE and since < 0:
            return NO_AGE
        return anchor + since if anchor + since >= 0 else BAD_AGE


def _record(
    row: dict[str, str] | None, stays: _Stays, used_in_line: "array[int]", triage: Path, line: int
) -> tuple[CaseRow, tuple[tuple[str, str], ...]]:
    if row is None:
        raise BadRow("ragged")
    if any("\n" in value or "\r" in value for value in row.values()):
        raise BadRow("line_break")
    subject, stay = identifier(row["subject_id"]), identifier(row["stay_id"])
    place = bisect_left(stays.ids, stay)
    if place == len(stays.ids) or stays.ids[place] != stay:
        raise BadRow("unknown_stay")
    if used_in_line[place]:
        raise UserError(f"{triage}:{line}: stay_id {stay} was already used in line {used_in_line[place]}")
    used_in_line[place] = line
    if stays.subjects[place] != subject:
        raise BadRow("other_patient")
    level = acuity(row["acuity"])
    if len(row["chiefcomplaint"]) > MAX_COMPLAINT_CHARS:
        raise BadRow("long_narrative")
    age = stays.ages[place]
    known = 0 <= age <= MAX_AGE
    text, notes = narrative(
        Presentation(
            **{column: row[column] for column in SEEN_AT_TRIAGE},
            age=age if known else None,
            gender=GENDER_CODES[stays.sexes[place]],
            arrival_transport=ARRIVAL_CODES[stays.arrivals[place]],
        )
    )
    if not text:
        raise BadRow("no_narrative")
    if not known:
        notes = (*notes, ("no_age" if age == NO_AGE else "bad_age", ""))
    return CaseRow(Case(f"stay-{stay}", text, level), str(subject)), notes


def _read_stays(path: Path, ages: _Ages) -> Generator[RowNote, None, _Stays]:
    ids, subjects, lines, years = array("q"), array("q"), array("q"), array("h")
    sexes, arrivals = array("B"), array("B")
    for line, row in table(path, EDSTAYS):
        if row is None or not ID.fullmatch(row["subject_id"].strip()) or not ID.fullmatch(row["stay_id"].strip()):
            yield RowNote(path, line, "unreadable")
            continue
        gender, arrival = row["gender"].strip().upper(), " ".join(row["arrival_transport"].upper().split())
        if gender not in SEXES and not missing(gender):
            yield RowNote(path, line, "unlisted", "gender")
        if arrival not in (*ARRIVALS, *UNKNOWN_ARRIVALS) and not missing(arrival):
            yield RowNote(path, line, "unlisted", "arrival_transport")
        year = YEAR.match(row["intime"].strip())
        subject = int(row["subject_id"])
        ids.append(int(row["stay_id"]))
        subjects.append(subject)
        lines.append(line)
        years.append(ages.at(subject, int(year[1]) if year else 0))
        sexes.append(GENDER_CODES.index(gender) if gender in SEXES else 0)
        arrivals.append(ARRIVAL_CODES.index(arrival) if arrival in ARRIVALS else 0)
    return _Stays(*_in_order(path, "stay_id", lines, ids, subjects, lines, years, sexes, arrivals))


def _read_ages(path: Path | None) -> Generator[RowNote, None, _Ages]:
    subjects, lines, ages, years = array("q"), array("q"), array("h"), array("h")
    if path is None:
        return _Ages(*(memoryview(column) for column in (subjects, ages, years)))
    for line, row in table(path, PATIENTS):
        subject, age, year = (row[column].strip() for column in PATIENTS) if row else ("", "", "")
        if not ID.fullmatch(subject) or not AGE.fullmatch(age) or not ANCHOR_YEAR.fullmatch(year):
            yield RowNote(path, line, "unreadable")
            continue
        subjects.append(int(subject))
        lines.append(line)
        ages.append(int(age))
        years.append(int(year))
    return _Ages(*_in_order(path, "subject_id", lines, subjects, ages, years))


def _in_order(
    path: Path, key: str, lines: "array[int]", keys: "array[int]", *others: "array[int]"
) -> tuple[memoryview, ...]:
    """Return the columns in ascending order of ``keys``; equal keys are refused."""
    values = np.asarray(keys)
    order = np.argsort(values, kind="stable")
    repeated = np.flatnonzero(np.diff(values[order]) == 0)
    if repeated.size:
        first, second = lines[order[repeated[0]]], lines[order[repeated[0] + 1]]
        raise UserError(f"{path}:{second}: {key} {values[order[repeated[0]]]} was already used in line {first}")
    return tuple(np.asarray(column)[order].data for column in (keys, *others))


def _required(folder: Path, stem: str) -> Path:
    path = _find(folder, stem)
    if path is None:
        raise UserError(f"{folder}: expected {stem}.csv or {stem}.csv.gz in it or in its ed/ or hosp/, found neither")
    return path


def _find(folder: Path, stem: str) -> Path | None:
    places = [folder / inner / f"{stem}{end}" for inner in ("", "ed", "hosp") for end in (".csv", ".csv.gz")]
    files = [place for place in places if is_regular(place)]
    if len(files) > 1:
        raise UserError(f"{folder}: contains both {files[0]} and {files[1]}: keep one")
    return files[0] if files else None
