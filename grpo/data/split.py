"""Split cases by patient, and change the mix of levels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from grpo.data.row_report import CaseRow
from grpo.runtime.errors import UserError
from grpo.runtime.seeds import stable_seed
from grpo.types import Case

LEVELS = (1, 2, 3, 4, 5)


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


def repeat_by_level(records: Sequence[CaseRow], times: Mapping[int, int]) -> tuple[CaseRow, ...]:
    """Repeat every record as often as ``times`` gives for its level (default 1); copies of ``a`` are ``a#2``, ``a#3`` …

    >>> [r.case.id for r in repeat_by_level([CaseRow(Case("a", "…", 1), "p"), CaseRow(Case("b", "…", 3), "q")], {1: 3})]
    ['a', 'a#2', 'a#3', 'b']
    """
    return tuple(_copy(record, n) for record in records for n in range(times.get(record.case.gold_level, 1)))


def balance_levels(records: Sequence[CaseRow], *, per_level: int | None, seed: int) -> tuple[CaseRow, ...]:
    """Return the same number of records for each level: ``per_level``, or the size of the rarest level.

    A level with more records is sampled without replacement; in one with n fewer, each case occurs ⌊per_level/n⌋ or
    ⌈per_level/n⌉ times. The choice depends only on the seed and the case ids.

    Raises:
        UserError: a level has no case.
    """
    of_level = {level: [record for record in records if record.case.gold_level == level] for level in LEVELS}
    if empty := [str(level) for level in LEVELS if not of_level[level]]:
        raise UserError(f"no case of ESI {', '.join(empty)} in the training part: it cannot be balanced")
    size = per_level or min(map(len, of_level.values()))
    times: dict[str, int] = {}
    for members in of_level.values():
        shuffled = sorted(members, key=lambda record: stable_seed("balance", seed, record.case.id))
        every, extra = divmod(size, len(members))
        times |= {record.case.id: every + (place < extra) for place, record in enumerate(shuffled)}
    return tuple(_copy(record, n) for record in records for n in range(times[record.case.id]))


def _copy(record: CaseRow, n: int) -> CaseRow:
    case = record.case
    return (
        record if n == 0 else CaseRow(Case(f"{case.id}#{n + 1}", case.text, case.gold_level, case.tags), record.patient)
    )
