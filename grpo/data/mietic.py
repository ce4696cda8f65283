"""Load MIETIC-36: the expert-reviewed samples of the MIETIC triage corpus, which was drawn from MIMIC-IV.

This loader is built on published descriptions of the file (grade K); its rows were never seen. Columns are therefore
found by name. The file is credentialed: no part of it may be redistributed.
"""

from collections import Counter
from collections.abc import Iterator

from grpo.config import resolve_path
from grpo.data.csv_rows import acuity, identifier, missing, table
from grpo.data.row_report import MAX_TEXT, BadRow, CaseRow, RowNote
from grpo.runtime.errors import UserError
from grpo.types import Case

VITALS = ("temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp")
PUBLISHED_LEVELS = {1: 14, 2: 11, 3: 5, 4: 4, 5: 2}
"""Retained samples by acuity, 36 in all."""
RETAINED = "retain"
LACKS_VITAL = "lacks_vital"


def read_validate(name: str) -> Iterator[CaseRow | RowNote]:
    """Yield the rows of ``MIETIC-validate-samples.csv`` that the experts decided to RETAIN.

    Gold is ``acuity``. The narrative is ``tiragecase`` (sic; ``triagecase`` is accepted too), unchanged. It is the only
    column that reaches a prompt: ``disposition`` and all columns from ``invasive_ventilation`` on (interventions,
    outcomes, resource counts, expert opinions) are known only after triage. The first header of the published file is
    ``锘縮ubject_id``, a byte-order mark decoded as GBK; `grpo.data.csv_rows.table` corrects it.

    Rows that were not retained are excluded and counted, but are not faults. A row without a vital sign (11 of the 36)
    is kept with the tag ``lacks_vital``, the only use of the vital columns. The id is ``mietic-STAY_ID``, or the row
    number if there is no stay_id. The patient is SUBJECT_ID, as in MIMIC-IV-ED (I), so that `grpo prepare --exclude`
    can keep these patients out of a training file. A note is added if the level counts are not the published ones.

    Raises:
        UserError: a column is missing, a stay_id is repeated, or the file is damaged.
    """
    path = resolve_path(name)
    first_line: dict[str, int] = {}
    levels: Counter[int] = Counter()
    columns = ("subject_id", "acuity", "tiragecase", "final_decision")
    aliases = {"triagecase": "tiragecase", "triage_case": "tiragecase"}
    for number, (line, row) in enumerate(table(path, columns, ("stay_id", *VITALS), aliases), 1):
        if row and row["final_decision"].strip().casefold() != RETAINED:
            patient = _patient(row)  # --exclude needs the patient
            yield RowNote(path, line, "not_retained" if patient else "bad_id", patient=patient)
            continue
        try:
            record = _validated(row, number)
        except BadRow as bad:
            yield RowNote(path, line, bad.reason)
            continue
        case_id = record.case.id
        if case_id in first_line:
            raise UserError(f"{path}:{line}: {case_id} was already used in line {first_line[case_id]}")
        first_line[case_id] = line
        levels[record.case.gold_level] += 1
        if record.case.tags:
            yield RowNote(path, line, "no_vital")
        yield record
    if levels and levels != PUBLISHED_LEVELS:
        yield RowNote(path, 1, "not_published")


def _patient(row: dict[str, str]) -> str:
    try:
        return str(identifier(row["subject_id"]))
    except BadRow:
        return ""


def _validated(row: dict[str, str] | None, number: int) -> CaseRow:
    if row is None:
        raise BadRow("ragged")
    subject, level, text = identifier(row["subject_id"]), acuity(row["acuity"]), row["tiragecase"].strip()
    stay = row.get("stay_id", "")
    case_id = f"mietic-row-{number:06d}" if missing(stay) else f"mietic-{identifier(stay)}"
    if missing(text) or len(text) > MAX_TEXT:
        raise BadRow("no_narrative" if missing(text) else "long_narrative")
    lacks = any(missing(row[column]) for column in VITALS if column in row)
    return CaseRow(Case(case_id, text, level, (LACKS_VITAL,) if lacks else ()), str(subject))
