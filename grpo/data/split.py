"""Split cases by patient."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grpo.data.row_report import CaseRow
from grpo.runtime.errors import UserError
from grpo.runtime.seeds import stable_seed


@dataclass(frozen=True, slots=True)
class PatientSplit:
    """Two parts without a common patient or narrative, and how many cases were removed to achieve this."""

    train: tuple[CaseRow, ...]
    held_out: tuple[CaseRow, ...]
    excluded: int
    """Cases whose patient or narrative is in an excluded file."""
    repeated: int
    """Training cases with the narrative of a held-out case."""


def normalized_text(text: str) -> str:
    """Return a narrative for comparison, ignoring letter case and blanks."""
    return " ".join(text.casefold().split())


def split_by_patient(
    records: Sequence[CaseRow],
    *,
    share: float,
    seed: int,
    excluded: Iterable[CaseRow] = (),
    set_aside: Iterable[str] = (),
) -> PatientSplit:
    """Split into a training and a held-out part: a patient is held out if hash(seed, patient) < share.

    The part of a patient depends only on the seed, so adding patients moves none of the others; the held-out part has
    ``share`` of the patients on average, not exactly. If anybody is held out or excluded, every record must have a
    patient (see `require_patients`).

    Args:
        records: all cases.
        share: in [0, 1); 0 holds nobody out.
        seed: any integer.
        excluded: records whose patients and narratives must be in neither part.
        set_aside: further patients who must be in neither part.

    Raises:
        UserError: a part is unexpectedly empty.

    >>> from grpo.types import Case
    >>> records = [CaseRow(Case(f"c{i}", f"Note {i}.", 3), patient=str(i // 2)) for i in range(12)]
    >>> parts = split_by_patient(records, share=0.5, seed=0)
    >>> {r.patient for r in parts.train} & {r.patient for r in parts.held_out}
    set()
    """
    others = list(excluded)
    patients = {*(record.patient for record in others), *set_aside} - {""}
    texts = {normalized_text(record.case.text) for record in others}
    allowed = [
        record
        for record in records
        if not others or (record.patient not in patients and normalized_text(record.case.text) not in texts)
    ]
    held_out = tuple(record for record in allowed if stable_seed("held out", seed, record.patient) < share * 2**128)
    held_out_patients = {record.patient for record in held_out}
    held_out_texts = {normalized_text(record.case.text) for record in held_out}
    remaining = [record for record in allowed if not held_out or record.patient not in held_out_patients]
    train = tuple(record for record in remaining if normalized_text(record.case.text) not in held_out_texts)
    if not train or (share > 0 and not held_out):
        part = "held-out" if train else "training"
        raise UserError(
            f"the {part} part is empty: {len(allowed):,} of {len(records):,} cases remain; change --held-out"
        )
    return PatientSplit(train, held_out, len(records) - len(allowed), len(remaining) - len(train))


def count_overlap(part: Iterable[CaseRow], other: Iterable[CaseRow]) -> tuple[int, int]:
    """Return how many (patients, narratives) two parts have in common.

    >>> from grpo.types import Case
    >>> a, b = CaseRow(Case("a", "Rash.", 5), "p"), CaseRow(Case("b", "RASH.", 5), "q")
    >>> count_overlap([a], [a, b]), count_overlap([a], [b])
    ((1, 1), (0, 1))
    """
    part, other = list(part), list(other)
    return (
        len(({record.patient for record in part} & {record.patient for record in other}) - {""}),
        len({normalized_text(r.case.text) for r in part} & {normalized_text(r.case.text) for r in other}),
    )


def require_patients(records: Sequence[CaseRow], *, each_its_own: bool) -> tuple[CaseRow, ...]:
    """Return the records, each with a patient.

    Raises:
        UserError: a record has none, unless ``each_its_own`` states that no two cases are of one patient.
    """
    unknown = [record.case.id for record in records if not record.patient]
    if unknown and not each_its_own:
        raise UserError(
            f"{len(unknown):,} of {len(records):,} cases, the first {unknown[0]!r}, have no patient, so a split could "
            "put one patient in both parts. Add a patient to each case, or use --each-case-a-patient if that is true"
        )
    return tuple(record if record.patient else CaseRow(record.case, f"case {record.case.id}") for record in records)
