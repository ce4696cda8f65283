"""Patients of the embedded world: facts first, and the level that the ESI algorithm gives to those facts.

The algorithm runs A → B → C → D and stops at the first hit. Where the handbook says "consider", this world decides:

- A lifesaving intervention already performed is level 1, whatever the vital signs are now. So are a chest tube and a
  central line already placed: the v49 author's convention, not the handbook's. IV access, oxygen by cannula and a
  monitor are not lifesaving.
- SpO2 below 90 is level 1.
- Current pain of 7 or more is always level 2. Earlier pain never counts.
- An open fracture or a penetrating injury, wherever it is, is always level 2.
- New confusion or lethargy is level 2, and so is a fever in the first three months of life.
- Danger-zone vital signs with two or more kinds of resources are always level 2; with fewer they change nothing.
- A simple procedure is one resource. Oral and topical drugs, tetanus boosters, finger-stick tests, splints and wound
  cleaning are none.

Numbers stay clear of every threshold (see `MARGINS`), so that no gold level hangs on one beat or one breath.
Source: the ESI algorithm as public fact, version 5 vital signs; not for clinical use.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar

from benchmarks.tiny_world.lexicon import (
    AGES,
    ALLERGIES,
    DECOYS,
    DONE,
    FAMILIES,
    HIGH_RISK,
    HISTORIES,
    MONTHS,
    OPEN_INJURIES,
    STATES,
    Family,
    Finding,
    Trigger,
)

T = TypeVar("T")
Step = Literal["A", "B", "C", "D"]

SEVERE_PAIN = 7
LOWEST_SPO2 = 90
"""Below: step A."""
DANGER_SPO2 = 92
"""Below: danger zone, at any age."""
DANGER_ZONES: tuple[tuple[float, int, int], ...] = (
    (3, 180, 50),
    (36, 160, 40),
    (96, 140, 30),
    (math.inf, 100, 20),
)
"""(younger than, in months; heart rate above; respiratory rate above)."""

MARGINS: Mapping[str, tuple[int, int]] = MappingProxyType({"heart_rate": (8, 12), "resp_rate": (2, 4)})
"""How far calm values stay below the danger-zone limit, and raised ones above it. Pain is at most 5 or at least 8;
SpO2 is at least 95, or 90-91 (danger), or at most 87 (step A)."""

FULL_WORK_UP = frozenset({"labs", "imaging", "iv_drug"})
"""What a patient with a trigger of step A or B needs in this world: two or more resources, always."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """Vital signs at triage: beats and breaths a minute, percent, mmHg, degrees Fahrenheit."""

    heart_rate: int
    resp_rate: int
    spo2: int
    systolic: int | None
    """None below four years: not taken."""
    diastolic: int | None
    temperature: float


@dataclass(frozen=True, slots=True)
class Patient:
    """Facts only, no wording. Keys are those of the lexicon's tables."""

    family: str
    finding: int | None
    """Which of the family's findings; None where a trigger takes its place."""
    age_months: int
    sex: str
    arrival: str
    vitals: Vitals
    pain: int | None
    """Now, 0 to 10. None: not stated."""
    earlier_pain: int | None
    done: tuple[str, ...]
    """Interventions already performed, the lifesaving ones first."""
    states: tuple[str, ...]
    high_risk: tuple[str, ...]
    open_injury: str | None
    mental: str
    """alert, confused, lethargic, sedated or unresponsive."""
    resources: frozenset[str]
    decoys: tuple[str, ...]
    history: str
    allergy: str


@dataclass(frozen=True, slots=True)
class Triage:
    """The level, the step that decided and why, in a few words."""

    level: int
    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The facts as a model answer names them: short strings, "none" where there is nothing to name."""

    complaint: str
    lifesaving: str
    high_risk: str
    open_injury: str
    pain: str
    """none, mild or severe; none too where no score is stated."""
    vitals: str
    """stable or danger."""
    resources: str
    """0, 1 or 2+."""


def danger_limits(age_months: int) -> tuple[int, int]:
    """The heart rate and the respiratory rate above which an age is in the danger zone.

    >>> danger_limits(30 * 12), danger_limits(5)
    ((100, 20), (160, 40))
    """
    return next((heart, breaths) for below, heart, breaths in DANGER_ZONES if age_months < below)


def in_danger_zone(age_months: int, vitals: Vitals) -> bool:
    """Step D's question: a heart rate, respiratory rate or SpO2 in the danger zone of the age.

    >>> in_danger_zone(30 * 12, Vitals(118, 16, 98, 124, 80, 98.6))
    True
    >>> in_danger_zone(12, Vitals(118, 26, 98, None, None, 98.6))
    False
    """
    heart, breaths = danger_limits(age_months)
    return vitals.heart_rate > heart or vitals.resp_rate > breaths or vitals.spo2 < DANGER_SPO2


def triage(patient: Patient) -> Triage:
    """The ESI level of the facts, by the first of the steps A, B, C, D that hits; conventions in the module's header.

    >>> well = Patient("cold", 0, 360, "male", "walk-in", Vitals(76, 14, 99, 124, 78, 98.4), None, None,
    ...                (), (), (), None, "alert", frozenset(), (), "none", "none")
    >>> triage(well)
    Triage(level=5, step='C', reason='no resources')
    >>> triage(replace(well, pain=9)).level, triage(replace(well, done=("chest_tube",), pain=9)).level
    (2, 1)
    """
    lifesaving = _lifesaving(patient)
    if lifesaving != "none":
        return Triage(1, "A", lifesaving)
    urgent = _urgent(patient)
    if urgent is not None:
        return Triage(2, "B", urgent)
    count = len(patient.resources)
    if count < 2:
        return Triage(5 - count, "C", ("no resources", "one resource")[count])
    if in_danger_zone(patient.age_months, patient.vitals):
        return Triage(2, "D", "danger-zone vitals")
    return Triage(3, "D", "two or more resources")


def summary(patient: Patient) -> Summary:
    """The facts in the short strings that a model answer uses."""
    pain = patient.pain or 0
    return Summary(
        complaint=FAMILIES[patient.family].short,
        lifesaving=_lifesaving(patient),
        high_risk=", ".join(HIGH_RISK[key].label for key in patient.high_risk) or "none",
        open_injury=OPEN_INJURIES[patient.open_injury].label if patient.open_injury else "none",
        pain="severe" if pain >= SEVERE_PAIN else "mild" if pain else "none",
        vitals="danger" if in_danger_zone(patient.age_months, patient.vitals) else "stable",
        resources=("0", "1", "2+")[min(2, len(patient.resources))],
    )


def fingerprint(patient: Patient) -> str:
    """64 bits, in hex, of all the facts: equal exactly for patients with the same facts."""
    vitals = [getattr(patient.vitals, name) for name in Vitals.__slots__]
    facts = {name: getattr(patient, name) for name in Patient.__slots__}
    facts |= {"vitals": vitals, "resources": sorted(patient.resources)}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _lifesaving(patient: Patient) -> str:
    """Labels of what decides step A, or "none"."""
    labels = [DONE[key].label for key in patient.done if DONE[key].lifesaving]
    labels += [STATES[key].label for key in patient.states]
    return ", ".join(labels) or ("hypoxia" if patient.vitals.spo2 < LOWEST_SPO2 else "none")


def _urgent(patient: Patient) -> str | None:
    """What decides step B, or None."""
    if patient.high_risk:
        return HIGH_RISK[patient.high_risk[0]].label
    if patient.open_injury:
        return OPEN_INJURIES[patient.open_injury].label
    if patient.mental in ("confused", "lethargic"):
        return patient.mental
    if patient.pain is not None and patient.pain >= SEVERE_PAIN:
        return "severe pain"
    return None


# ---- drawing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """What a stratum fixes before the rest of the patient is drawn."""

    family: Family
    triggers: tuple[Trigger, ...] = ()
    finding: int | None = None
    severe_pain: bool = False
    danger: bool = False


DRAW_DONE: tuple[tuple[tuple[str, ...], int], ...] = (
    (("intubation",), 34),
    (("chest_tube",), 22),
    (("central_line",), 22),
    (("intubation", "central_line"), 12),
    (("intubation", "chest_tube"), 10),
)
"""Interventions of the stratum lifesaving_done, with weights."""

OTHER_LIFESAVING: tuple[Trigger, ...] = (
    *(t for key, t in DONE.items() if t.lifesaving and key not in ("intubation", "chest_tube", "central_line")),
    *STATES.values(),
)
NOT_LIFESAVING = tuple(key for key, t in DONE.items() if not t.lifesaving)


def _draft_done(rng: random.Random) -> Draft:
    keys = rng.choices([keys for keys, _ in DRAW_DONE], [weight for _, weight in DRAW_DONE])[0]
    triggers = tuple(DONE[key] for key in keys)
    family = rng.choice([f for f in FAMILIES if all(f in t.families for t in triggers)])
    if rng.random() < 0.3:
        besides = [t for t in OPEN_INJURIES.values() if family in t.families]
        if all(t.mental == "alert" for t in triggers):
            besides += [t for t in HIGH_RISK.values() if family in t.families and t.mental == "alert"]
        triggers += (rng.choice(besides),) if besides else ()
    return Draft(FAMILIES[family], triggers)


def _draft_trigger(triggers: Sequence[Trigger]) -> Callable[[random.Random], Draft]:
    def draft(rng: random.Random) -> Draft:
        trigger = rng.choice(triggers)
        return Draft(FAMILIES[rng.choice(trigger.families)], (trigger,))

    return draft


def _draft_finding(
    counts: tuple[int, ...], *, painful: bool = False, danger: bool = False
) -> Callable[[random.Random], Draft]:
    """A draft from a family with a finding of one of these counts of resources (2 stands for two or more)."""

    def fits(found: Finding) -> bool:
        return min(2, len(found.needs)) in counts and not (painful and found.mild)

    fitting = [
        (family, [i for i, found in enumerate(family.findings) if fits(found)])
        for family in FAMILIES.values()
        if (family.painful or not painful) and not (danger and family.kind in ("minor", "psych"))
    ]
    fitting = [(family, findings) for family, findings in fitting if findings]

    def draft(rng: random.Random) -> Draft:
        family, findings = rng.choice(fitting)
        return Draft(family, (), rng.choice(findings), severe_pain=painful, danger=danger)

    return draft


@dataclass(frozen=True, slots=True)
class Stratum:
    """A quota of the generator: how its patients begin, where the algorithm must stop, how they arrive."""

    draft: Callable[[random.Random], Draft]
    level: int
    step: Step
    arrivals: Mapping[str, int]
    """Weights."""
    decoys: Mapping[str, int]
    """Weights of what a decoy is about; empty: this stratum carries none."""


FROM_THE_FIELD = {"ambulance": 6, "helicopter": 1, "transfer": 3}
CRASH = {"ambulance": 8, "family": 2, "helicopter": 1}
URGENT = {"ambulance": 4, "wheelchair": 2, "family": 2, "walk-in": 2, "police": 0}
WALKING = {"walk-in": 6, "family": 2, "wheelchair": 1, "ambulance": 1}
FEW_RULES = {"lifesaving": 8, "injury": 1, "pain": 1}
ALL_RULES = {"lifesaving": 4, "injury": 3, "pain": 3}

STRATA: Mapping[str, Stratum] = MappingProxyType(
    {
        "lifesaving_done": Stratum(_draft_done, 1, "A", FROM_THE_FIELD, {}),
        "lifesaving_other": Stratum(_draft_trigger(OTHER_LIFESAVING), 1, "A", CRASH, {}),
        "severe_pain": Stratum(_draft_finding((0, 1, 2), painful=True), 2, "B", URGENT, {}),
        "open_injury": Stratum(_draft_trigger(tuple(OPEN_INJURIES.values())), 2, "B", URGENT, {}),
        "high_risk": Stratum(_draft_trigger(tuple(HIGH_RISK.values())), 2, "B", URGENT, FEW_RULES),
        "danger_vitals": Stratum(_draft_finding((2,), danger=True), 2, "D", URGENT, FEW_RULES),
        "resources_many": Stratum(_draft_finding((2,)), 3, "D", URGENT, ALL_RULES),
        "resource_one": Stratum(_draft_finding((1,)), 4, "C", WALKING, ALL_RULES),
        "resource_none": Stratum(_draft_finding((0,)), 5, "C", WALKING, ALL_RULES),
    }
)


def draw_patient(rng: random.Random, stratum: str, *, decoy: bool = False) -> Patient:
    """A patient whom the algorithm decides at the stratum's step, and by nothing else.

    Args:
        rng: all the randomness there is.
        stratum: a key of `STRATA`.
        decoy: True for a hard negative: something in the notes reads like a trigger of one of the card's three rules.

    Raises:
        ValueError: for an unknown stratum, or a decoy in a stratum that carries none.
    """
    if stratum not in STRATA:
        raise ValueError(f"stratum {stratum!r}: expected one of {', '.join(STRATA)}")
    quota = STRATA[stratum]
    if decoy and not quota.decoys:
        raise ValueError(f"stratum {stratum!r} carries no decoys: its own trigger is what they imitate")
    about = rng.choices(list(quota.decoys), list(quota.decoys.values()))[0] if decoy else None
    while True:
        patient = _draw(rng, quota)
        if patient is not None and about is not None:
            patient = _with_decoy(rng, patient, about)
        if patient is not None:
            decided = triage(patient)
            assert (decided.level, decided.step) == (quota.level, quota.step), (stratum, decided)
            return patient


def _draw(rng: random.Random, quota: Stratum) -> Patient | None:
    """A patient without decoys, or None if the draft's parts fit no age or no arrival."""
    draft = quota.draft(rng)
    family, triggers = draft.family, draft.triggers
    finding = None if draft.finding is None else family.findings[draft.finding]
    ranges = [family.ages, *(t.ages for t in triggers), *([finding.ages] if finding else [])]
    if draft.severe_pain:
        ranges.append((4 * MONTHS, math.inf))
    age = _draw_age(rng, max(low for low, _ in ranges), min(high for _, high in ranges))
    ways = [t.arrivals for t in triggers] + ([finding.arrivals] if finding else [])
    arrival = _draw_arrival(rng, quota.arrivals, ways, age)
    if age is None or arrival is None:
        return None
    fever = family.fever or any(t.fever for t in triggers) or (finding is not None and finding.fever)
    mental = next((t.mental for t in triggers if t.mental != "alert"), "alert")
    keys = {id(t): t.key for t in triggers}
    chosen = {name: _keys(table, keys) for name, table in TABLES.items()}
    return Patient(
        family=family.key,
        finding=draft.finding,
        age_months=age,
        sex=family.sex or rng.choice(("male", "female")),
        arrival=arrival,
        vitals=_draw_vitals(rng, age, triggers, danger=draft.danger, fever=fever),
        pain=_draw_pain(rng, draft, age, mental),
        earlier_pain=None,
        done=chosen["done"] + _draw_care(rng, arrival, mental, quota.level),
        states=chosen["states"],
        high_risk=chosen["high_risk"],
        open_injury=next(iter(chosen["open_injury"]), None),
        mental=mental,
        resources=FULL_WORK_UP if finding is None else finding.needs,
        decoys=(),
        history=_draw_fitting(rng, HISTORIES, age),
        allergy=_draw_fitting(rng, ALLERGIES, age),
    )


TABLES = {"done": DONE, "states": STATES, "high_risk": HIGH_RISK, "open_injury": OPEN_INJURIES}


def _keys(table: Mapping[str, Trigger], chosen: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(key for key, trigger in table.items() if id(trigger) in chosen)


def _draw_fitting(rng: random.Random, table: Mapping[str, Trigger], age: int) -> str:
    return rng.choice([key for key, entry in table.items() if entry.ages[0] <= age <= entry.ages[1]])


def _draw_age(rng: random.Random, low: float, high: float) -> int | None:
    """An age in months; where all ages fit, a third are children."""
    fitting = [age for age in AGES if low <= age <= high]
    return rng.choices(fitting, [1 if age >= 18 * MONTHS or age < 48 else 2 for age in fitting])[0] if fitting else None


def _draw_arrival(
    rng: random.Random, weights: Mapping[str, int], ways: Sequence[tuple[str, ...]], age: int | None
) -> str | None:
    """How the patient came, within what triggers and finding allow; children under 14 do not come alone."""
    allowed = dict(weights)
    for among in ways:
        if among:
            allowed = {way: allowed[way] or 1 for way in among if way in allowed}
    allowed = {way: weight for way, weight in allowed.items() if weight}
    if not allowed:
        return None
    way = rng.choices(list(allowed), list(allowed.values()))[0]
    return "family" if age is not None and age < 14 * MONTHS and way in ("walk-in", "wheelchair", "police") else way


def _draw_vitals(rng: random.Random, age: int, triggers: Sequence[Trigger], *, danger: bool, fever: bool) -> Vitals:
    """Vital signs; with a trigger any may be raised, without one only if ``danger`` asks for it."""
    raised = {sign for t in triggers for sign in t.raised}
    if danger:
        raised |= set(rng.sample(("heart_rate", "resp_rate", "spo2"), rng.choice((1, 1, 2))))
    elif triggers and rng.random() < 0.3 and not any(t.key in OPEN_INJURIES for t in triggers):
        raised.add(rng.choice(("heart_rate", "resp_rate")))
    ranges = {sign: span for t in triggers for sign, span in t.ranges.items()}
    heart, breaths = danger_limits(age)
    spo2 = (78, 87) if any(t is STATES["hypoxia"] for t in triggers) else (90, 91) if "spo2" in raised else (95, 100)
    pressure = age >= 4 * MONTHS
    child = age < 14 * MONTHS
    systolic = rng.randint(*ranges.get("systolic", (94, 116) if child else (108, 158)))
    diastolic = round(systolic * rng.uniform(0.58, 0.68))
    return Vitals(
        heart_rate=rng.randint(*ranges.get("heart_rate", _span("heart_rate", heart, "heart_rate" in raised))),
        resp_rate=rng.randint(*ranges.get("resp_rate", _span("resp_rate", breaths, "resp_rate" in raised))),
        spo2=rng.randint(*spo2),
        systolic=systolic if pressure else None,
        diastolic=diastolic if pressure else None,
        temperature=round(rng.uniform(100.9, 103.4) if fever else rng.uniform(97.3, 99.2), 1),
    )


def _span(sign: str, limit: int, raised: bool) -> tuple[int, int]:
    """Where a vital sign is drawn from: clear of the danger-zone limit on either side.

    >>> _span("heart_rate", 100, False), _span("heart_rate", 100, True)
    ((62, 92), (112, 140))
    """
    below, above = MARGINS[sign]
    width = {"heart_rate": (30, 28), "resp_rate": (6, 10)}[sign]
    if raised:
        return limit + above, limit + above + width[1]
    return limit - below - width[0], limit - below


def _draw_pain(rng: random.Random, draft: Draft, age: int, mental: str) -> int | None:
    """A current score from those who can give one."""
    if mental != "alert" or age < 4 * MONTHS or any(t.key in STATES or t.key in HIGH_RISK for t in draft.triggers):
        return None
    if any(t.lifesaving and t.key not in ("chest_tube", "central_line") for t in draft.triggers):
        return None
    if draft.severe_pain:
        return rng.choice((8, 8, 9, 9, 10))
    if any(t.key in OPEN_INJURIES for t in draft.triggers):
        return rng.choice((3, 4, 5, None))
    if draft.family.painful:
        return rng.choice((1, 2, 3, 4, 5, None))
    return rng.choice((0, None))


def _draw_care(rng: random.Random, arrival: str, mental: str, level: int) -> tuple[str, ...]:
    """Care that is not lifesaving, from an ambulance crew, for some."""
    if arrival != "ambulance" or mental != "alert" or level > 3 or rng.random() > 0.35:
        return ()
    return (rng.choice(NOT_LIFESAVING),)


def _with_decoy(rng: random.Random, patient: Patient, about: str) -> Patient | None:
    """The patient with one decoy about lifesaving care, injury or pain; None if none fits."""
    family = FAMILIES[patient.family]
    fitting = [
        key
        for key, decoy in DECOYS.items()
        if decoy.about == about
        and family.kind in decoy.kinds
        and decoy.ages[0] <= patient.age_months <= decoy.ages[1]
        and (not decoy.arrivals or patient.arrival in decoy.arrivals)
        and (not decoy.after or decoy.after in patient.resources)
        and (not decoy.speaks or patient.mental == "alert")
        and (about != "pain" or family.painful)
    ]
    if not fitting:
        return None
    if about != "pain":
        return replace(patient, decoys=(rng.choice(fitting),))
    return replace(patient, decoys=("earlier_pain",), earlier_pain=rng.randint(8, 10), pain=rng.randint(1, 3))
