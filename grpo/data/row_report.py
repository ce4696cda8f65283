"""Report on every row of a case file that was dropped or changed.

A loader is an iterator: for each row of its file it yields a `CaseRow`, and a `RowNote` for everything that was
dropped, excluded or omitted. Nothing is ignored silently, and no note or error contains a case's text.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from grpo.runtime.errors import UserError
from grpo.types import Case

MAX_TEXT = 100_000
"""Characters. A longer narrative is a broken file."""
LINES_SHOWN = 10
"""Line numbers listed for each kind of note."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One kind of note."""

    kept: bool
    """Whether the row still became a case."""
    fault: bool
    """Whether the row violates the format, so that ``strict`` refuses the file."""
    text: str
    """What was wrong, and what was done."""


REASONS: dict[str, Reason] = {
    "not_json": Reason(False, True, "not valid JSON: dropped"),
    "not_an_object": Reason(False, True, "not an object with id, text and esi: dropped"),
    "bad_field": Reason(False, True, "a field is not what a case needs: dropped"),
    "ragged": Reason(False, True, "more or fewer fields than the header: dropped"),
    "line_break": Reason(
        False, True, "a line break inside a field, so a stray quotation mark may have hidden rows: dropped"
    ),
    "bad_id": Reason(False, True, "stay_id or subject_id is not a whole number: dropped"),
    "unknown_stay": Reason(False, True, "stay_id is not in edstays: dropped"),
    "other_patient": Reason(False, True, "triage and edstays disagree about the patient of the stay: dropped"),
    "no_acuity": Reason(False, True, "no acuity, so no gold level: dropped"),
    "bad_acuity": Reason(False, True, "acuity is not a level from 1 to 5: dropped"),
    "no_narrative": Reason(False, True, "no narrative: dropped"),
    "long_narrative": Reason(False, True, "narrative too long: dropped"),
    "unreadable": Reason(True, True, "a row of stays or ages that cannot be read: ignored"),
    "not_retained": Reason(False, False, "not retained by the experts: excluded"),
    "not_a_number": Reason(True, True, "not a number: omitted from the narrative"),
    "sentinel": Reason(True, True, "a code for a missing value (negative, or all nines): omitted from the narrative"),
    "impossible": Reason(True, True, "outside the possible range: omitted from the narrative"),
    "celsius": Reason(True, True, "25 to 45 where °F was expected: written as °C, with the number unchanged"),
    "inverted": Reason(True, True, "diastolic not below systolic: both omitted from the narrative"),
    "bad_age": Reason(True, True, "age not between 0 and 130: omitted from the narrative"),
    "long_pain": Reason(True, True, "text too long or with unusual characters: omitted from the narrative"),
    "zero": Reason(True, False, "0, either not measured or an arrest: omitted from the narrative"),
    "words": Reason(True, False, "in words: quoted"),
    "deidentified": Reason(True, False, "___ removed"),
    "no_vital": Reason(True, False, "lacks a vital sign: kept with the tag lacks_vital"),
    "unlisted": Reason(True, False, "a value without a wording in the narrative: omitted"),
    "no_age": Reason(True, False, "no age in patients: omitted from the narrative"),
    "no_triage": Reason(True, False, "a stay that is not in triage"),
    "not_published": Reason(True, False, "level counts differ from the published 14/11/5/4/2"),
}
"""Every kind of note. A row is dropped (not kept, fault), excluded (not kept, no fault), or kept with a note."""


@dataclass(frozen=True, slots=True)
class CaseRow:
    """A case together with its patient, which a split needs and a prompt must not contain.

    Example: ``CaseRow(Case("stay-30000001", "A 67-year-old female …", 2), patient="10000001")``
    """

    case: Case
    patient: str
    """The same for all cases of one patient; "" if unknown."""


@dataclass(frozen=True, slots=True)
class RowNote:
    """A note about one row."""

    path: Path
    line: int
    """The line in which the row begins, from 1."""
    reason: str
    """A key of `REASONS`."""
    column: str = ""
    detail: str = ""
    """Details without a case's text: "esi of case 'a' must be …"."""
    patient: str = ""
    """The patient of an excluded row, if known, so that `grpo prepare --exclude` keeps this patient out too."""


Row = CaseRow | RowNote


class BadRow(ValueError):
    """Raised inside a loader to drop the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class NoteCount:
    """The number of notes with one reason on one column of a file."""

    path: Path
    reason: str
    column: str
    count: int
    lines: tuple[int, ...]
    """The first `LINES_SHOWN` lines."""

    @property
    def summary(self) -> str:
        """Count, column and reason, without the lines."""
        return f"{self.count:,} × {f'{self.column} {REASONS[self.reason].text}'.strip()}"

    def __str__(self) -> str:
        """Return one line of text.

        >>> str(NoteCount(Path("ed/triage.csv.gz"), "zero", "o2sat", 1_200, (5, 17)))
        '1,200 × o2sat 0, either not measured or an arrest: omitted from the narrative (triage.csv.gz, lines 5, 17, …)'
        """
        more = ", …" if self.count > len(self.lines) else ""
        word = "line" if self.count == 1 else "lines"
        return f"{self.summary} ({self.path.name}, {word} {', '.join(map(str, self.lines))}{more})"


@dataclass(frozen=True, slots=True)
class Loaded:
    """All cases of a file, and what was dropped or changed: ``row_count == len(rows) + dropped``."""

    rows: tuple[CaseRow, ...]
    notes: tuple[NoteCount, ...]
    """One per file, reason and column, those of dropped rows first."""
    set_aside: frozenset[str] = frozenset()
    """Known patients of excluded rows."""

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(record.case for record in self.rows)

    @property
    def dropped(self) -> int:
        """Number of rows that did not become a case, including excluded ones."""
        return sum(note.count for note in self.notes if not REASONS[note.reason].kept)

    @property
    def row_count(self) -> int:
        return len(self.rows) + self.dropped

    @property
    def faults(self) -> tuple[NoteCount, ...]:
        """The notes for which ``strict`` refuses the file."""
        return tuple(note for note in self.notes if REASONS[note.reason].fault)


def read_rows(name: str, rows: Iterable[Row], *, strict: bool) -> Loaded:
    """Read all rows of a loader; notes are counted in constant memory.

    Args:
        name: the file name, for the message if it is empty.
        rows: the iterator of a loader.
        strict: refuse the file if any row was dropped or any value omitted because of a fault.

    Raises:
        UserError: the file has no cases; if ``strict``, the first fault, with the number of the others.

    >>> rows = [CaseRow(Case("a", "Rash.", 5), "p"), RowNote(Path("t.csv"), 3, "no_acuity")]
    >>> loaded = read_rows("t.csv", rows, strict=False)
    >>> loaded.row_count, [str(note) for note in loaded.notes]
    (2, ['1 × no acuity, so no gold level: dropped (t.csv, line 3)'])
    """
    records: list[CaseRow] = []
    counts: Counter[tuple[Path, str, str]] = Counter()
    lines: dict[tuple[Path, str, str], list[int]] = defaultdict(list)
    set_aside: set[str] = set()
    first_fault: RowNote | None = None
    for row in rows:
        if isinstance(row, CaseRow):
            records.append(row)
            continue
        key = (row.path, row.reason, row.column)
        counts[key] += 1
        if counts[key] <= LINES_SHOWN:
            lines[key].append(row.line)
        set_aside |= {row.patient} - {""}
        if first_fault is None and REASONS[row.reason].fault:
            first_fault = row
    order = sorted(counts, key=lambda key: list(REASONS).index(key[1]))
    notes = tuple(NoteCount(*key, count=counts[key], lines=tuple(lines[key])) for key in order)
    loaded = Loaded(tuple(records), notes, frozenset(set_aside))
    if first_fault and strict:
        reason = first_fault.detail or f"{first_fault.column} {REASONS[first_fault.reason].text}".strip()
        total = sum(note.count for note in loaded.faults)
        others = f"; strict refuses all {total:,}: {'; '.join(f.summary for f in loaded.faults)}" if total > 1 else ""
        raise UserError(f"{first_fault.path}:{first_fault.line}: {reason}{others}")
    if not records:
        raise UserError(f"{name}: contains no cases: {'; '.join(map(str, notes)) or 'no rows'}")
    return loaded
