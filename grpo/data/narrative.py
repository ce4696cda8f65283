"""Triage columns of MIMIC-IV-ED → the narrative that becomes the user turn.

`Presentation` is the allow-list: what is no field of it cannot reach a prompt. Left out on purpose: everything that is
known only after triage (disposition, outtime, hadm_id, diagnoses, death), the level itself, the identifiers and dates,
and race, which the ESI algorithm does not ask for. No number is ever changed: a value is written as recorded, or left
out with a remark.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from grpo.data.csv_fields import missing

LONGEST_COMPLAINT = 1_000
"""Characters; the published column holds 255."""
LONGEST_PAIN = 30
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
"""What a living patient can have; °F, a minute, a minute, %, mmHg, mmHg. Wide on purpose: beyond the extremes that were
ever survived, so that only slips of the keyboard fall out (our choice, grade U)."""
CELSIUS = (25.0, 45.0)
"""A temperature in here cannot be °F, the column's unit, and can be °C."""
SEXES = {"F": "female", "M": "male"}
ARRIVALS = {
    "AMBULANCE": "arrived by ambulance",
    "HELICOPTER": "arrived by helicopter",
    "WALK IN": "walked in",
}
GROUPED_AGE = 90
"""MIMIC-IV writes 91 for every age over 89: from here on the narrative says "90 or older"."""

Note = tuple[str, str]
"""(reason, column) of a remark about one value: a key of `REASONS` in report.py, a field of `Presentation`."""


@dataclass(frozen=True, slots=True)
class Presentation:
    """What a triage nurse sees: the only columns that may enter a prompt, as the files have them."""

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
    """Years at the stay; any from `GROUPED_AGE` on are one."""
    gender: str = ""
    arrival_transport: str = ""


def narrative(seen: Presentation) -> tuple[str, tuple[Note, ...]]:
    """(the narrative, the notes on what was left out or cannot be taken at its face).

    ``A AGE-year-old SEX ARRIVAL. Chief complaint: AS WRITTEN. Vital signs: T, HR, RR, SpO2, BP. Pain n/10.`` A part
    that was not recorded is not mentioned; without age it is "A female patient …", without an arrival "… came to
    triage". The text is "" where no chief complaint is left after the de-identification marks are taken out.

    - ``___`` is taken out of chief complaint and pain, and blanks and punctuation around the gap closed up.
    - 0, negative numbers, 999 and the like, values beyond `LIMITS`: left out. A temperature in `CELSIUS` is written
      with C. A diastolic pressure not below the systolic takes both out.
    - pain: a number from 0 to 10 or a range of two is written "Pain 8/10", "Pain 8-9/10"; 13 or -1 is left out; words
      of up to 30 plain characters are quoted, "Pain: uta.", and not read: whether "denies" is 0 is not decided here.

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
    complaint = _told("chiefcomplaint", seen.chiefcomplaint, notes)
    if not complaint:
        return "", ()
    parts = [f"{_who(seen.age, seen.gender)} {ARRIVALS.get(_key(seen.arrival_transport), 'came to triage')}."]
    parts.append(f"Chief complaint: {complaint}.")
    if vitals := ", ".join(_vitals(seen, notes)):
        parts.append(f"Vital signs: {vitals}.")
    if pain := _pain(seen.pain, notes):
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


def _vitals(seen: Presentation, notes: list[Note]) -> Iterator[str]:
    degrees = _plain_number(seen.temperature)
    if degrees is not None and CELSIUS[0] <= degrees <= CELSIUS[1]:
        notes.append(("celsius", "temperature"))
        yield f"T {degrees:.15g} C"
    elif temperature := _vital("temperature", seen.temperature, notes):
        yield f"T {temperature} F"
    if heartrate := _vital("heartrate", seen.heartrate, notes):
        yield f"HR {heartrate}"
    if resprate := _vital("resprate", seen.resprate, notes):
        yield f"RR {resprate}"
    if o2sat := _vital("o2sat", seen.o2sat, notes):
        yield f"SpO2 {o2sat}%"
    sbp, dbp = _vital("sbp", seen.sbp, notes), _vital("dbp", seen.dbp, notes)
    if sbp and dbp and float(dbp) >= float(sbp):
        notes.append(("inverted", "dbp"))
    elif sbp and dbp:
        yield f"BP {sbp}/{dbp}"
    elif sbp or dbp:
        yield f"systolic BP {sbp}" if sbp else f"diastolic BP {dbp}"


def _vital(column: str, value: str, notes: list[Note]) -> str:
    """The number as recorded, trailing zeros aside, or "" with a note."""
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
    if missing(value) and value.strip().casefold() != "none":  # here an answer
        return ""
    said = _told("pain", value, notes)
    if score := PAIN_SCORE.fullmatch(said):
        if 0 <= float(score[1]) <= 10:
            return f"Pain {float(score[1]):.15g}/10."
        notes.append(("impossible", "pain"))
        return ""
    bounds = PAIN_RANGE.fullmatch(said)
    if bounds and int(bounds[1]) < int(bounds[2]) <= 10:
        return f"Pain {int(bounds[1])}-{int(bounds[2])}/10."
    if not said:
        return ""
    if len(said) > LONGEST_PAIN or not QUOTABLE.fullmatch(said):
        notes.append(("long_pain", "pain"))
        return ""
    notes.append(("words", "pain"))
    return f"Pain: {said}."


def _told(column: str, value: str, notes: list[Note]) -> str:
    """Free text without de-identification marks, line ends and a full stop at its end."""
    if missing(value) and column != "pain":
        return ""
    kept, marks = DEIDENTIFIED.subn(" ", value)
    if marks:
        notes.append(("deidentified", column))
        kept = re.sub(r"\s+([,.;:)])", r"\1", kept)
        kept = re.sub(r"([,.;:(])(?:\s*[,.;:])+", r"\1", kept)
    if not kept.isprintable():
        kept = "".join(c if c.isprintable() else " " for c in kept)
    return " ".join(kept.split()).strip(" ,.;:")


def _key(value: str) -> str:
    return " ".join(value.upper().split())
