"""MIETIC, the triage corpus drawn from MIMIC-IV: 50 expert-reviewed samples, and 9,629 instructions.

The facts of the published files that this is built on are what their readers have written of them (K); the rows were
not seen. So columns are found by name, and nothing is claimed of a row that its own columns do not say. Both files are
credentialed: nothing of them may be redistributed.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from grpo.config import resolve
from grpo.data.csv_fields import acuity, identifier, missing
from grpo.data.csv_rows import table
from grpo.data.row_report import MAX_TEXT, BadRow, Banded, Record, Remark
from grpo.runtime.errors import UserError
from grpo.types import Case

VITALS = ("temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp")
PUBLISHED_LEVELS = {1: 14, 2: 11, 3: 5, 4: 4, 5: 2}
"""Retained samples by acuity, 36 in all."""
RETAINED = "retain"
LACKS_VITAL = "lacks_vital"
BANDS = {
    "immediate life-saving interventions": (1, 1),
    "esi level 2": (2, 2),
    "resources likely required": (3, 5),
}
"""What an instruction asks about, casefolded → the ESI levels it was written for; the first that occurs decides (I)."""


def read_validate(name: str) -> Iterator[Record | Remark]:
    """MIETIC-36: the rows of ``MIETIC-validate-samples.csv`` that the experts decided to RETAIN.

    Gold is ``acuity``; the narrative is ``tiragecase`` (sic; ``triagecase`` is taken too), untouched. It is the only
    column that reaches a prompt: everything from ``invasive_ventilation`` on (interventions, outcomes, resource counts,
    the experts' opinions) knows how the stay went on, and ``disposition`` before it too. The first header of the
    published file is ``锘縮ubject_id``, a byte-order mark read as GBK; `grpo.data.csv_rows.table` undoes that.

    Rows not retained are set aside and counted, which is no fault. A row without a vital sign (11 of the 36) is kept
    and tagged ``lacks_vital``: the vital columns are looked at for that and for nothing else. Id: ``mietic-STAY_ID``,
    or the row's number where the file has no stay_id; patient: SUBJECT_ID, the same as in MIMIC-IV-ED (I), so that
    `grpo prepare --exclude` can keep these patients out of a training file. Level counts other than the published 36's
    are remarked on.

    Raises:
        UserError: a missing column, a repeated stay_id, a file damaged as a file.
    """
    path = resolve(name)
    first_line: dict[str, int] = {}
    levels: Counter[int] = Counter()
    columns = ("subject_id", "acuity", "tiragecase", "final_decision")
    aliases = {"triagecase": "tiragecase", "triage_case": "tiragecase"}
    for number, (line, row) in enumerate(table(path, columns, ("stay_id", *VITALS), aliases), 1):
        if row and row["final_decision"].strip().casefold() != RETAINED:
            patient = _patient(row)  # without one, nobody could be kept out of a training file by it
            yield Remark(path, line, "not_retained" if patient else "bad_id", patient=patient)
            continue
        try:
            record = _validated(row, number)
        except BadRow as bad:
            yield Remark(path, line, bad.reason)
            continue
        ident = record.case.id
        if ident in first_line:
            raise UserError(f"{path}:{line}: {ident} was already used in line {first_line[ident]}")
        first_line[ident] = line
        levels[record.case.esi] += 1
        if record.case.tags:
            yield Remark(path, line, "no_vital")
        yield record
    if levels and levels != PUBLISHED_LEVELS:
        yield Remark(path, 1, "not_published")


def read_instructions(name: str) -> Iterator[Banded | Remark]:
    """Presentations of ``MIETIC.csv`` (``instruction,input,output``) with the band their instruction speaks of.

    The text is ``input``, the vignette; ``output``, a model's reasoning towards a level, never enters a prompt, and the
    instruction, which gives the band away, does not either. The file has no level: see `BANDS`. That is why `gather`
    refuses these rows as gold: 3-5 is no level, and 1 and 2 are read off a question's wording, not off a decision. Nor
    is there a subject_id: a split by patient is not possible. Id: ``mietic-instruction-ROW``, rows counted from 1.

    Raises:
        UserError: a missing column, a file damaged as a file.
    """
    path: Path = resolve(name)
    for number, (line, row) in enumerate(table(path, ("instruction", "input")), 1):
        if row is None:
            yield Remark(path, line, "ragged")
            continue
        asked, text = " ".join(row["instruction"].casefold().split()), row["input"].strip()
        band = next((levels for phrase, levels in BANDS.items() if phrase in asked), None)
        if band is None:
            yield Remark(path, line, "no_band")
        elif missing(text) or len(text) > MAX_TEXT:
            yield Remark(path, line, "no_narrative" if missing(text) else "long_narrative")
        else:
            yield Banded(f"mietic-instruction-{number:06d}", text, *band)


def _patient(row: dict[str, str]) -> str:
    try:
        return str(identifier(row["subject_id"]))
    except BadRow:
        return ""


def _validated(row: dict[str, str] | None, number: int) -> Record:
    if row is None:
        raise BadRow("ragged")
    subject, level, text = identifier(row["subject_id"]), acuity(row["acuity"]), row["tiragecase"].strip()
    stay = row.get("stay_id", "")
    ident = f"mietic-row-{number:06d}" if missing(stay) else f"mietic-{identifier(stay)}"
    if missing(text) or len(text) > MAX_TEXT:
        raise BadRow("no_narrative" if missing(text) else "long_narrative")
    lacks = any(missing(row[column]) for column in VITALS if column in row)
    return Record(Case(ident, text, level, (LACKS_VITAL,) if lacks else ()), str(subject))
