"""What a loader yields, and the account of every row that did not become a case as it stood.

A loader is an iterator: for each row of its file it yields what it could make of it (a `Record`, or a `Banded` where
the file holds no gold level) and a `Remark` for whatever was dropped, set aside or left out. Nothing is passed over in
silence, and neither a remark nor an error ever carries a case's text.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from grpo.runtime.errors import UserError
from grpo.types import Case

MAX_TEXT = 100_000
"""Characters. A longer narrative is a broken file, not a patient."""
LINES_SHOWN = 10
"""Line numbers kept for each kind of remark."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One kind of remark."""

    kept: bool
    """The row became a case all the same."""
    fault: bool
    """Not as the format says it should be: ``strict`` refuses the file."""
    says: str
    """What was the matter, and what was done."""


REASONS: dict[str, Reason] = {
    "not_json": Reason(False, True, "not valid JSON: dropped"),
    "not_an_object": Reason(False, True, "not an object with id, text and esi: dropped"),
    "bad_field": Reason(False, True, "a field is not what a case needs: dropped"),
    "ragged": Reason(False, True, "more or fewer fields than the header: dropped"),
    "line_break": Reason(
        False, True, "a line break inside a field, so a stray quotation mark may have swallowed rows: dropped"
    ),
    "bad_id": Reason(False, True, "stay_id or subject_id is not a whole number: dropped"),
    "unknown_stay": Reason(False, True, "its stay_id is not in edstays: dropped"),
    "other_patient": Reason(False, True, "triage and edstays give its stay to different patients: dropped"),
    "no_acuity": Reason(False, True, "no acuity, so no gold level: dropped"),
    "bad_acuity": Reason(False, True, "acuity is not a level from 1 to 5: dropped"),
    "no_narrative": Reason(False, True, "nothing that could be a presentation: dropped"),
    "long_narrative": Reason(False, True, "too long for a presentation: dropped"),
    "no_band": Reason(False, True, "the instruction names no known band: dropped"),
    "unreadable": Reason(True, True, "a row that stays or ages were to be read from, and cannot: passed over"),
    "not_retained": Reason(False, False, "the experts did not retain it: set aside"),
    "not_a_number": Reason(True, True, "not a number: left out of the narrative"),
    "sentinel": Reason(True, True, "a code for a missing value (negative, or all nines): left out of the narrative"),
    "impossible": Reason(True, True, "outside the range it can have: left out of the narrative"),
    "celsius": Reason(True, True, "25 to 45 where °F was expected: written as °C, the number untouched"),
    "inverted": Reason(True, True, "diastolic not below systolic: both left out of the narrative"),
    "bad_age": Reason(True, True, "age not between 0 and 130: left out of the narrative"),
    "long_pain": Reason(True, True, "a text too long or too odd to quote: left out of the narrative"),
    "zero": Reason(True, False, "0, either not measured or an arrest: left out of the narrative"),
    "words": Reason(True, False, "in words: quoted"),
    "deidentified": Reason(True, False, "___ was taken out"),
    "no_vital": Reason(True, False, "lacks a vital sign: kept, tagged lacks_vital"),
    "unlisted": Reason(True, False, "a value that the narrative has no words for: left out"),
    "no_age": Reason(True, False, "no age to be had from patients: left out of the narrative"),
    "no_triage": Reason(True, False, "a stay that triage does not have"),
    "not_published": Reason(True, False, "levels are not the published file's 14/11/5/4/2"),
}
"""Every kind of remark. Three outcomes: dropped (kept no, fault yes), set aside (no, no), kept with a note (yes, …)."""


@dataclass(frozen=True, slots=True)
class Record:
    """A case with what a split must know of it and a prompt must not.

    Example: ``Record(Case("stay-30000001", "A 67-year-old female …", 2), patient="10000001")``
    """

    case: Case
    patient: str
    """Equal for all cases of one patient; "" where the file does not say."""


@dataclass(frozen=True, slots=True)
class Banded:
    """A presentation whose level is known only to lie in a band. It has no ``esi``, so it cannot be taken for gold."""

    id: str
    text: str
    low: int
    high: int
    """Inclusive: ESI low to high."""


@dataclass(frozen=True, slots=True)
class Remark:
    """What a loader has to say about one row."""

    path: Path
    line: int
    """Where the row begins, counted from 1."""
    reason: str
    """A key of `REASONS`."""
    column: str = ""
    detail: str = ""
    """More than the reason says, without a case's text: "esi of case 'a' must be …"."""
    patient: str = ""
    """Whose row it is, if it was set aside and says so: `grpo prepare --exclude` keeps this patient out too."""


Row = Record | Banded | Remark


class BadRow(ValueError):
    """Inside a loader: this row is to be dropped."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Finding:
    """All remarks of one file with one reason about one column."""

    path: Path
    reason: str
    column: str
    count: int
    lines: tuple[int, ...]
    """The first `LINES_SHOWN`."""

    @property
    def what(self) -> str:
        """Count, column and reason, without the lines."""
        return f"{self.count:,} × {f'{self.column} {REASONS[self.reason].says}'.strip()}"

    def __str__(self) -> str:
        """One line for people.

        >>> str(Finding(Path("ed/triage.csv.gz"), "zero", "o2sat", 1_200, (5, 17)))
        '1,200 × o2sat 0, either not measured or an arrest: left out of the narrative (triage.csv.gz, lines 5, 17, …)'
        """
        more = ", …" if self.count > len(self.lines) else ""
        word = "line" if self.count == 1 else "lines"
        return f"{self.what} ({self.path.name}, {word} {', '.join(map(str, self.lines))}{more})"


@dataclass(frozen=True, slots=True)
class Report:
    """The account of a file: ``rows == cases + dropped``, and a `Finding` for every reason."""

    cases: int
    findings: tuple[Finding, ...]

    @property
    def dropped(self) -> int:
        """Rows that became no case, set-aside ones included."""
        return sum(finding.count for finding in self.findings if not REASONS[finding.reason].kept)

    @property
    def rows(self) -> int:
        return self.cases + self.dropped

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What ``strict`` refuses."""
        return tuple(finding for finding in self.findings if REASONS[finding.reason].fault)


@dataclass(slots=True)
class Tally:
    """Counts remarks as they pass, in memory that does not grow with the file.

    >>> tally = Tally()
    >>> rows = tally.watch([Record(Case("a", "Rash.", 5), "p"), Remark(Path("t.csv"), 3, "no_acuity")])
    >>> [record.case.id for record in rows], tally.report().rows, [str(f) for f in tally.report().faults]
    (['a'], 2, ['1 × no acuity, so no gold level: dropped (t.csv, line 3)'])
    """

    cases: int = 0
    counts: dict[tuple[Path, str, str], int] = field(default_factory=dict)
    lines: dict[tuple[Path, str, str], list[int]] = field(default_factory=dict)
    first_fault: Remark | None = None
    set_aside: set[str] = field(default_factory=set)

    def watch(self, rows: Iterable[Row]) -> Iterator[Record | Banded]:
        """The rows that are cases; the remarks are counted on the way."""
        for row in rows:
            if not isinstance(row, Remark):
                self.cases += 1
                yield row
                continue
            self.set_aside |= {row.patient} - {""}
            key = (row.path, row.reason, row.column)
            self.counts[key] = self.counts.get(key, 0) + 1
            shown = self.lines.setdefault(key, [])
            if len(shown) < LINES_SHOWN:
                shown.append(row.line)
            if self.first_fault is None and REASONS[row.reason].fault:
                self.first_fault = row

    def report(self) -> Report:
        """The account so far, the dropped rows first."""
        order = sorted(self.counts, key=lambda key: list(REASONS).index(key[1]))
        return Report(
            self.cases, tuple(Finding(*key, count=self.counts[key], lines=tuple(self.lines[key])) for key in order)
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """The tuple form of a file: all its cases, and the account of what did not become one."""

    records: tuple[Record, ...]
    report: Report
    set_aside: frozenset[str] = frozenset()
    """Patients of rows that were set aside, as far as those say."""

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(record.case for record in self.records)


def gather(name: str, rows: Iterable[Row], *, strict: bool) -> Loaded:
    """All records of a loader, refusing bands as gold.

    Args:
        name: of the file, for the message of an empty one.
        rows: from a loader.
        strict: refuse the file if any row was dropped or any value left out because of a fault.

    Raises:
        UserError: for a file without cases, for a `Banded`, and under ``strict`` for the first fault, with the count of
            the others.
    """
    tally = Tally()
    records = []
    for row in tally.watch(rows):
        if isinstance(row, Banded):
            raise UserError(
                f"{name}: case {row.id!r} has a band, ESI {row.low} to {row.high}, and no gold level: the band is read "
                "off the wording of an instruction and nobody confirmed it. Such cases can be prompts "
                "(grpo prepare --prompts writes them without a level), but neither train nor evaluate"
            )
        records.append(row)
    return Loaded(tuple(records), settled(name, tally, strict=strict), frozenset(tally.set_aside))


def settled(name: str, tally: Tally, *, strict: bool) -> Report:
    """The report of a file that has been read, or `UserError` if it may not be used (see `gather`)."""
    report, first = tally.report(), tally.first_fault
    if first and strict:
        what = first.detail or f"{first.column} {REASONS[first.reason].says}".strip()
        total = sum(finding.count for finding in report.faults)
        all_of_it = (
            f"; strict refuses all {total:,}: {'; '.join(fault.what for fault in report.faults)}" if total > 1 else ""
        )
        raise UserError(f"{first.path}:{first.line}: {what}{all_of_it}")
    if not report.cases:
        raise UserError(f"{name}: no cases in it: {'; '.join(map(str, report.findings)) or 'no rows'}")
    return report
