"""Write the narrative of a MIMIC-IV-ED triage row, which becomes the user turn.

`Presentation` is the allow-list: only its fields can reach a prompt. Excluded on purpose: everything known only after
triage (disposition, outtime, hadm_id, diagnoses, death), the level itself, identifiers and dates, and race, which the
ESI algorithm does not use. No number is ever changed: a value is written as recorded, or omitted with a note.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from grpo.data.csv_rows import missing

MAX_COMPLAINT_CHARS = 1_000
"""Characters; the published column has at most 255."""
MAX_PAIN_CHARS = 30
DEIDENTIFIED = re.compile(r"_{2,}")
NUMBER = re.compile(r"[+-]?\d{1,9}(?:\.\d{1,9})?", re.ASCII)
PAIN_SCORE = re.compile(r"(-?\d{1,4}(?:\.\d{1,4})?)(?:\s*/\s*10)?", re.ASCII)
PAIN_RANGE = re.compile(r"(\d{1,2})\s*(?:-|to)\s*(\d{1,2})(?:\s*/\s*10)?", re.ASCII)
QUOTABLE = re.compile(r"[A-Za-z0-9 ,.:'()/+<>=?!&%*#~-]+")

LIMITS = {
    "temperature": (50.0, 115.0),
    "heartrate": (0.0, 350.0),
    "resprate": (0.0, 120.0),
    "o2sat": (0.0, 100.0),
    "sbp": (0.0, 370.0),
    "dbp": (0.0, 360.0),
}
"""Possible values of a living patient, in °F, per minute, per minute, %, mmHg, mmHg. Wide on purpose, so that only
typing errors are excluded (our choice, grade U)."""
CELSIUS = (25.0, 45.0)
"""A temperature in this range cannot be in °F, the unit of the column, but can be in °C."""
SEXES = {"F": "female", "M": "male"}
ARRIVALS = {
    "AMBULANCE": "arrived by ambulance",
    "HELICOPTER": "arrived by helicopter",
    "WALK IN": "walked in",
}
GROUPED_AGE = 90
"""MIMIC-IV records every age over 89 as 91; from this age on the narrative is "90 or older"."""

Note = tuple[str, str]
"""(reason, column) of a note on one value: a key of `grpo.data.row_report.REASONS` and a field of `Presentation`."""


@dataclass(frozen=True, slots=True)
class Presentation:
    """What a triage nurse sees: the only columns that may enter a prompt, as recorded."""

    chiefcomplaint: str
    temperature: str = ""
    """°F, documented as such by MIMIC-IV-ED."""
    heartrate: str = ""
    resprate: str = ""
    o2sat: str = ""
    sbp: str = ""
    dbp: str = ""
    pain: str = ""
    """Free text: "8", "8-9", "13", "uta", "Critical"."""
    age: int | None = None
    """Years at the time of the stay; all from `GROUPED_AGE` on are treated alike."""
    gender: str = ""
    arrival_transport: str = ""


def narrative(presentation: Presentation) -> tuple[str, tuple[Note, ...]]:
    """Return the narrative, and notes on values that were omitted or are doubtful.

    ``A AGE-year-old SEX ARRIVAL. Chief complaint: AS WRITTEN. Vital signs: T, HR, RR, SpO2, BP. Pain n/10.`` Parts that
    were not recorded are omitted; without an age it begins "A female patient …", without an arrival "… came to triage".
    The narrative is "" if no chief complaint is left after removing de-identification marks.

    - ``___`` is removed from chief complaint and pain, together with blanks and punctuation around the gap.
    - 0, negative numbers, codes such as 999, and values outside `LIMITS` are omitted. A temperature in `CELSIUS` is
      written with C. If the diastolic pressure is not below the systolic, both are omitted.
    - Pain: a number from 0 to 10 or a range is written "Pain 8/10" or "Pain 8-9/10"; 13 or -1 is omitted. Words of up
      to 30 plain characters are quoted, "Pain: uta.", and not interpreted.

    >>> text, notes = narrative(
    ...     Presentation("CHEST PAIN, Transfer", "98.6", "104.0", "18", "97", "132", "84", "8", 67, "F", "AMBULANCE")
    ... )
    >>> print(text.replace(". ", ".\\n"))
    A 67-year-old female arrived by ambulance.
    Chief complaint: CHEST PAIN, Transfer.
    Vital signs: T 98.6 F, HR 104, RR 18, SpO2 97%, BP 132/84.
    Pain 8/10.
    >>> narrative(Presentation("s/p FALL AT ___", temperature="36.8", o2sat="999", pain="uta", gender="M"))[0]
    'A male patient came to triage. Chief complaint: s/p FALL AT. Vital signs: T 36.8 C. Pain: uta.'
    """
    notes: list[Note] = []
    complaint = _clean_text("chiefcomplaint", presentation.chiefcomplaint, notes)
    if not complaint:
        return "", ()
    arrival = ARRIVALS.get(_key(presentation.arrival_transport), "came to triage")
    parts = [f"{_who(presentation.age, presentation.gender)} {arrival}."]
    parts.append(f"Chief complaint: {complaint}.")
    if vitals := ", ".join(_vitals(presentation, notes)):
        parts.append(f"Vital signs: {vitals}.")
    if pain := _pain(presentation.pain, notes):
        parts.append(pain)
    return " ".join(parts), tuple(notes)


def _who(age: int | None, gender: str) -> str:
    sex = SEXES.get(_key(gender), "")
    if age is None:
        return f"A {sex} patient".replace("  ", " ")
    if age >= GROUPED_AGE:
        return f"A {sex or 'patient'} aged {GROUPED_AGE} or older"
    article = "An" if age in (8, 11, 18) or 80 <= age < 90 else "A"
    return f"{article} {age}-year-old {sex or 'patient'}"


def _vitals(presentation: Presentation, notes: list[Note]) -> Iterator[str]:
    degrees = _plain_number(presentation.temperature)
    if degrees is not None and CELSIUS[0] <= degrees <= CELSIUS[1]:
        notes.append(("celsius", "temperature"))
        yield f"T {degrees:.15g} C"
    elif temperature := _vital("temperature", presentation.temperature, notes):
        yield f"T {temperature} F"
    if heartrate := _vital("heartrate", presentation.heartrate, notes):
        yield f"HR {heartrate}"
    if resprate := _vital("resprate", presentation.resprate, notes):
        yield f"RR {resprate}"
    if o2sat := _vital("o2sat", presentation.o2sat, notes):
        yield f"SpO2 {o2sat}%"
    sbp, dbp = _vital("sbp", presentation.sbp, notes), _vital("dbp", presentation.dbp, notes)
    if sbp and dbp and float(dbp) >= float(sbp):
        notes.append(("inverted", "dbp"))
    elif sbp and dbp:
        yield f"BP {sbp}/{dbp}"
    elif sbp or dbp:
        yield f"systolic BP {sbp}" if sbp else f"diastolic BP {dbp}"


def _vital(column: str, value: str, notes: list[Note]) -> str:
    """Return the number as recorded, without trailing zeros, or "" with a note."""
    number = _plain_number(value)
    if number is None:
        if not missing(value):
            notes.append(("not_a_number", column))
        return ""
    low, high = LIMITS[column]
    if number == 0:
        notes.append(("zero", column))
    elif number < 0 or number in (999, 9_999, 99_999, 999_999):
        notes.append(("sentinel", column))
    elif not low <= number <= high:
        notes.append(("impossible", column))
    else:
        return f"{number:.15g}"
    return ""


def _plain_number(value: str) -> float | None:
    return float(value) if NUMBER.fullmatch(value := value.strip()) else None


def _pain(value: str, notes: list[Note]) -> str:
    if missing(value) and value.strip().casefold() != "none":  # for pain, "none" is an answer
        return ""
    text = _clean_text("pain", value, notes)
    if score := PAIN_SCORE.fullmatch(text):
        if 0 <= float(score[1]) <= 10:
            return f"Pain {float(score[1]):.15g}/10."
        notes.append(("impossible", "pain"))
        return ""
    bounds = PAIN_RANGE.fullmatch(text)
    if bounds and int(bounds[1]) < int(bounds[2]) <= 10:
        return f"Pain {int(bounds[1])}-{int(bounds[2])}/10."
    if not text:
        return ""
    if len(text) > MAX_PAIN_CHARS or not QUOTABLE.fullmatch(text):
        notes.append(("long_pain", "pain"))
        return ""
    notes.append(("words", "pain"))
    return f"Pain: {text}."


def _clean_text(column: str, value: str, notes: list[Note]) -> str:
    """Return free text without de-identification marks, line ends and a final full stop."""
    if missing(value) and column != "pain":
        return ""
    text, marks = DEIDENTIFIED.subn(" ", value)
    if marks:
        notes.append(("deidentified", column))
        text = re.sub(r"\s+([,.;:)])", r"\1", text)
        text = re.sub(r"([,.;:(])(?:\s*[,.;:])+", r"\1", text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split()).strip(" ,.;:")


def _key(value: str) -> str:
    return " ".join(value.upper().split())
