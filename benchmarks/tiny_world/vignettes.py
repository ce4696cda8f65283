"""Vignettes of the embedded world: patients told as emergency-department triage notes, with the gold level.

    python -m benchmarks.tiny_world.vignettes --write DIR

writes the four fixed files: train, validation, test and mietic36 (MIETIC-36's level mix, none of its cases).

No two splits share a patient: the fingerprint of the facts decides which split a patient may be in (`RESIDUES`), and
whoever does not fit is drawn again. No two vignettes share a seed: patient and wording are drawn from a hash of
(split, seed, index, purpose).
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.tiny_world.lexicon import (
    ALLERGIES,
    DECOYS,
    DONE,
    FAMILIES,
    HIGH_RISK,
    HISTORIES,
    MONTHS,
    OPEN_INJURIES,
    STATES,
    Trigger,
)
from benchmarks.tiny_world.patients import SEVERE_PAIN, STRATA, Patient, Step, draw_patient, fingerprint, triage
from grpo.runtime.terminal import tolerate_narrow_encodings

RESIDUES: Mapping[str, frozenset[int]] = MappingProxyType(
    {
        "test": frozenset({0}),
        "validation": frozenset({1}),
        "mietic36": frozenset({2}),
        "train": frozenset(range(3, 16)),
    }
)
"""Split → remainders by 16 of the fingerprints that may be in it."""

TEST_MIX: Mapping[str, int] = MappingProxyType(
    {
        "lifesaving_done": 70,
        "lifesaving_other": 35,
        "severe_pain": 65,
        "open_injury": 55,
        "high_risk": 65,
        "danger_vitals": 25,
        "resources_many": 85,
        "resource_one": 60,
        "resource_none": 40,
    }
)
MIETIC36_MIX: Mapping[str, int] = MappingProxyType(
    {
        "lifesaving_done": 5,
        "lifesaving_other": 9,
        "severe_pain": 3,
        "open_injury": 3,
        "high_risk": 4,
        "danger_vitals": 1,
        "resources_many": 5,
        "resource_one": 4,
        "resource_none": 2,
    }
)
"""Levels 14/11/5/4/2, as MIETIC-36 has them."""

SEED = 49
FILES: Mapping[str, tuple[int, Mapping[str, int]]] = MappingProxyType(
    {
        "train": (3000, TEST_MIX),
        "validation": (200, TEST_MIX),
        "test": (500, TEST_MIX),
        "mietic36": (36, MIETIC36_MIX),
    }
)
"""Fixed file → number of vignettes and mix."""

DECOY_SHARE = (9, 20)
"""Of the strata that carry decoys, 9 in 20 vignettes have one."""

PLAIN_SHARE = 2 / 3
"""Of the triggers with two kinds of wording, the share told in words that the card's patterns match."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

CARD_PATTERNS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "lifesaving_done": re.compile(r"intubat|chest tube|central line", re.IGNORECASE),
        "open_injury": re.compile(r"open fracture|penetrating|gunshot|stab", re.IGNORECASE),
        "severe_pain": re.compile(
            r"\bpain(?:: | score | rated at | described as severe, | )(?:[7-9]|10)\b|\b(?:[7-9]|10)/10 pain"
            r"|\bpain (?:seven|eight|nine|ten) out of ten",
            re.IGNORECASE,
        ),
    }
)
"""What a pattern in the card's style finds, by stratum: a case it misses is a paraphrase."""


@dataclass(frozen=True, slots=True)
class Vignette:
    """A patient, told. ``tags`` name the stratum, adult or child, the wording and the decoys."""

    id: str
    text: str
    esi: int
    step: Step
    reason: str
    stratum: str
    family: str
    tags: tuple[str, ...]
    patient: Patient


def draw_vignettes(split: str, n: int, *, mix: Mapping[str, int], seed: int) -> list[Vignette]:
    """``n`` vignettes of a split, strata in the proportions of ``mix`` (largest remainders), shuffled.

    The same arguments give the same vignettes; a longer list does not begin with a shorter one.

    Raises:
        ValueError: for an unknown split or stratum, a negative count, or a mix without any weight.

    >>> [v.esi for v in draw_vignettes("train", 2, mix={"resource_none": 1}, seed=0)]
    [5, 5]
    """
    if split not in RESIDUES:
        raise ValueError(f"split {split!r}: expected one of {', '.join(RESIDUES)}")
    strata = [name for name, count in quotas(n, mix).items() for _ in range(count)]
    seen = dict.fromkeys(STRATA, 0)
    plan: list[tuple[str, bool]] = []
    for stratum in strata:
        plan.append((stratum, bool(STRATA[stratum].decoys) and _every(seen[stratum], *DECOY_SHARE)))
        seen[stratum] += 1
    _rng(split, seed, n, "order").shuffle(plan)
    return [_draw(split, seed, index, stratum, decoy) for index, (stratum, decoy) in enumerate(plan)]


def quotas(n: int, mix: Mapping[str, int]) -> dict[str, int]:
    """How many of ``n`` each stratum gets: its share rounded down, the rest to the largest remainders.

    >>> quotas(10, {"high_risk": 2, "resource_one": 1})
    {'high_risk': 7, 'resource_one': 3}
    """
    if unknown := sorted(set(mix) - set(STRATA)):
        raise ValueError(f"mix: unknown strata {', '.join(unknown)}; expected some of {', '.join(STRATA)}")
    total = sum(mix.values())
    if n < 0 or total <= 0 or min(mix.values()) < 0:
        raise ValueError(f"expected n >= 0 and weights >= 0 with a positive sum, got n = {n}, weights {dict(mix)}")
    counts = {name: n * weight // total for name, weight in mix.items()}
    by_remainder = sorted(mix, key=lambda name: (-(n * mix[name] % total), list(mix).index(name)))
    for name in by_remainder[: n - sum(counts.values())]:
        counts[name] += 1
    return counts


def _every(index: int, share: int, of: int) -> bool:
    """True for exactly ``share`` of any ``of`` consecutive indices, evenly spread."""
    return (index + 1) * share // of > index * share // of


def _rng(*parts: int | str) -> random.Random:
    return random.Random(hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest())


def _draw(split: str, seed: int, index: int, stratum: str, decoy: bool) -> Vignette:
    rng = _rng(split, seed, index, "patient")
    patient = draw_patient(rng, stratum, decoy=decoy)
    while int(fingerprint(patient), 16) % 16 not in RESIDUES[split]:
        patient = draw_patient(rng, stratum, decoy=decoy)
    text = render(patient, _rng(split, seed, index, "wording"))
    decided = triage(patient)
    return Vignette(
        id=f"{split}-{index:06d}",
        text=text,
        esi=decided.level,
        step=decided.step,
        reason=decided.reason,
        stratum=stratum,
        family=patient.family,
        tags=_tags(patient, stratum, text),
        patient=patient,
    )


def _tags(patient: Patient, stratum: str, text: str) -> tuple[str, ...]:
    tags = [stratum, "child" if patient.age_months < 18 * MONTHS else "adult"]
    if stratum in CARD_PATTERNS:
        tags.append("plain" if CARD_PATTERNS[stratum].search(text) else "paraphrase")
    if patient.decoys:
        tags += ["hard_negative", *(f"hard_negative:{key}" for key in patient.decoys)]
    return tuple(tags)


# ---- telling ----------------------------------------------------------------------------------------------------

ARRIVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ambulance": ("arrived by ambulance", "brought in by EMS", "came by ambulance", "brought in by paramedics"),
        "helicopter": ("flown in by helicopter", "arrived by helicopter", "airlifted in", "came by helicopter"),
        "transfer": (
            "transferred from an outside hospital",
            "sent over from a small hospital",
            "arrived in transfer from another hospital",
            "transferred in from a rural hospital",
        ),
        "walk-in": ("walked in", "walked into triage", "came in on foot", "self-presented"),
        "wheelchair": ("came to triage in a wheelchair", "wheeled in", "arrived in a wheelchair", "wheeled to triage"),
        "family": ("brought in by family", "driven in by family", "came by car with family", "arrived with family"),
        "police": ("brought in by police", "escorted in by police", "arrived with police", "came with officers"),
    }
)

WHERE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ambulance": ("in the field", "by EMS", "on scene", "en route"),
        "helicopter": ("by the flight crew", "before the flight", "on scene", "in the field"),
        "transfer": ("at the outside hospital", "before transfer", "at the other hospital", "prior to transfer"),
    }
)

OPENINGS: tuple[str, ...] = (
    "{age} {noun} {arrived} {link} {complaint}.",
    "{age} {noun}, {bare}. {Arrived}.",
    "{Arrived}: {age} {noun} {link} {complaint}.",
    "{Bare} in {article} {age} {noun}. {Arrived}.",
    "{Article} {age} {noun} {arrived} {link} {complaint}.",
    "Chief complaint: {bare}. {age} {noun}, {arrived}.",
)

SKELETONS: tuple[tuple[str, ...], ...] = (
    ("finding", "triggers", "care", "decoys", "mental", "history", "allergy", "vitals", "pain"),
    ("vitals", "triggers", "finding", "pain", "history", "allergy", "care", "decoys", "mental"),
    ("history", "allergy", "finding", "triggers", "pain", "decoys", "mental", "care", "vitals"),
    ("triggers", "decoys", "care", "vitals", "finding", "mental", "pain", "history", "allergy"),
    ("pain", "finding", "history", "allergy", "triggers", "vitals", "mental", "care", "decoys"),
)
"""Orders of what follows the opening."""

MENTAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "alert": ("awake and alert", "alert", "alert, answers questions", "GCS 15"),
        "small child": ("alert", "awake, consolable", "alert, looks around", "awake and interactive"),
        "confused": ("GCS 14", "not oriented", "answers are muddled", "oriented to name only"),
        "lethargic": ("GCS 12", "sleepy", "hard to rouse", "slow to rouse"),
        "sedated": ("sedated", "sedated, GCS 3T", "under sedation", "sedated for transport"),
        "unresponsive": ("GCS 3", "unresponsive", "eyes closed, no response", "does not wake"),
    }
)

PAIN: tuple[str, ...] = (
    "pain {n}/10",
    "rates pain {word} out of ten",
    "pain score {n}",
    "{n}/10 pain",
    "pain rated at {n} out of 10",
    "pain: {n}/10",
    "pain described as {strength}, {n} of 10",
)
FACES: tuple[str, ...] = (
    "pain {n}/10 on the faces scale",
    "pain score {n} by faces",
    "{n}/10 pain on the faces scale",
    "points to faces, pain {n}/10",
)
PAIN_IN_OTHER_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "severe": (
            "severe ache, gives it {word} of ten",
            "calls it {word} on the ten scale",
            "in severe pain, crying out",
            "hurts terribly, {word} of ten",
            "agony, writhing on the stretcher",
        ),
        "mild": (
            "mild ache, gives it {word} of ten",
            "calls it {word} on the ten scale",
            "in mild pain only, at ease",
            "hurts a little, {word} of ten",
            "slight ache, sits at ease",
        ),
        "none": ("denies pain", "no pain", "pain 0/10", "pain-free"),
    }
)


LEAST_WORDS = 25
"""Shorter notes are told again, with more in them."""


def render(patient: Patient, rng: random.Random) -> str:
    """The patient as a triage note: one paragraph of ASCII, every fact that decides the level among its words."""
    text = ""
    while len(text.split()) < LEAST_WORDS:
        text = f"{_opening(patient, rng)} {_body(patient, rng)}"
    return text


def _body(patient: Patient, rng: random.Random) -> str:
    """What follows the opening, in the order of a skeleton; what decides nothing may be left out."""
    told = {slot: TELL[slot](patient, rng) for slot in TELL}
    words = sum(len(text.split()) for text in told.values())
    for slot in rng.sample(("mental", "history", "allergy"), 3):
        optional = slot != "mental" or patient.mental == "alert"
        if optional and words - len(told[slot].split()) >= LEAST_WORDS and rng.random() < 0.7:
            words -= len(told[slot].split())
            told[slot] = ""
    return " ".join(told[slot] for slot in rng.choice(SKELETONS) if told[slot])


def _opening(patient: Patient, rng: random.Random) -> str:
    family = FAMILIES[patient.family]
    months, years = patient.age_months, patient.age_months // MONTHS
    number, unit = (months, "month") if months < 24 else (years, "year")
    age = rng.choice((f"{number}-{unit}-old", f"{number} {'mo' if unit == 'month' else 'yo'}"))
    nouns = NOUNS[patient.sex, "child" if years < 18 else "adult"]
    complaint, arrived = rng.choice(family.says), rng.choice(ARRIVED[patient.arrival])
    bare = re.sub(r"^(?:an?|the) ", "", complaint)
    article = "an" if str(number)[0] == "8" or number in (11, 18) else "a"
    return rng.choice(OPENINGS).format(
        age=age,
        noun=rng.choice(nouns),
        link=family.link,
        complaint=complaint,
        bare=bare,
        Bare=_capital(bare),
        arrived=arrived,
        Arrived=_capital(arrived),
        article=article,
        Article=_capital(article),
    )


NOUNS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("male", "adult"): ("male", "man"),
        ("female", "adult"): ("female", "woman"),
        ("male", "child"): ("male", "boy"),
        ("female", "child"): ("female", "girl"),
    }
)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentences(parts: Iterable[str]) -> str:
    return " ".join(f"{_capital(part)}." for part in parts)


def _say(trigger: Trigger, patient: Patient, rng: random.Random) -> str:
    """One wording of a trigger, its blanks filled."""
    wordings = trigger.other if trigger.other and rng.random() >= PLAIN_SHARE else trigger.plain
    before, now = patient.earlier_pain or 0, patient.pain or 0
    return rng.choice(wordings).format(
        side=rng.choice(("left", "right")),
        where=rng.choice(WHERE.get(patient.arrival, ("before arrival",))),
        year=rng.randint(2014, 2021),
        before=before,
        now=now,
        before_word=NUMBERS[before],
        now_word=NUMBERS[now],
    )


def _finding(patient: Patient, rng: random.Random) -> str:
    if patient.finding is None:
        return ""
    return _sentences([rng.choice(FAMILIES[patient.family].findings[patient.finding].says)])


def _triggers(patient: Patient, rng: random.Random) -> str:
    triggers = [DONE[key] for key in patient.done if DONE[key].lifesaving]
    triggers += [STATES[key] for key in patient.states] + [HIGH_RISK[key] for key in patient.high_risk]
    triggers += [OPEN_INJURIES[patient.open_injury]] if patient.open_injury else []
    rng.shuffle(triggers)
    return _sentences(_say(trigger, patient, rng) for trigger in triggers)


def _care(patient: Patient, rng: random.Random) -> str:
    return _sentences(_say(DONE[key], patient, rng) for key in patient.done if not DONE[key].lifesaving)


def _decoys(patient: Patient, rng: random.Random) -> str:
    return _sentences(_say(DECOYS[key], patient, rng) for key in patient.decoys if key != "earlier_pain")


def _mental(patient: Patient, rng: random.Random) -> str:
    if patient.mental == "alert" and (patient.states or patient.high_risk):
        return ""
    if patient.mental == "unresponsive" and patient.states:
        return ""
    small = patient.mental == "alert" and patient.age_months < 4 * MONTHS
    return _sentences([rng.choice(MENTAL["small child" if small else patient.mental])])


def _history(patient: Patient, rng: random.Random) -> str:
    return _sentences([_say(HISTORIES[patient.history], patient, rng)])


def _allergy(patient: Patient, rng: random.Random) -> str:
    return _sentences([_say(ALLERGIES[patient.allergy], patient, rng)])


def _pain(patient: Patient, rng: random.Random) -> str:
    if patient.pain is None:
        return ""
    if patient.earlier_pain is not None:
        return _sentences([_say(DECOYS["earlier_pain"], patient, rng)])
    if patient.pain == 0:
        return _sentences([rng.choice(PAIN_IN_OTHER_WORDS["none"])])
    strength = "severe" if patient.pain >= SEVERE_PAIN else "mild"
    plain = FACES if patient.age_months < 9 * MONTHS else PAIN
    wordings = plain if rng.random() < PLAIN_SHARE else PAIN_IN_OTHER_WORDS[strength]
    return _sentences([rng.choice(wordings).format(n=patient.pain, word=NUMBERS[patient.pain], strength=strength)])


def _vitals(patient: Patient, rng: random.Random) -> str:
    vitals = patient.vitals
    normal_air = "" if "oxygen" in patient.done or patient.mental == "sedated" else rng.choice(("", " on room air"))
    parts = [
        f"{rng.choice(('HR', 'P', 'pulse'))} {vitals.heart_rate}",
        f"{rng.choice(('RR', 'resp'))} {vitals.resp_rate}",
        f"{rng.choice(('SpO2', 'O2 sat', 'sat'))} {vitals.spo2}%{normal_air}",
    ]
    if vitals.systolic is not None:
        parts.append(f"BP {vitals.systolic}/{vitals.diastolic}")
    if vitals.temperature > 100 or vitals.systolic is None or rng.random() < 0.6:
        parts.append(f"{rng.choice(('T', 'temp'))} {vitals.temperature:.1f} F")
    if rng.random() < 0.5:
        rng.shuffle(parts)
    return _capital(rng.choice(("vitals: ", "VS ", "triage vitals ", "on arrival ")) + ", ".join(parts)) + "."


TELL: Mapping[str, Callable[[Patient, random.Random], str]] = MappingProxyType(
    {
        "finding": _finding,
        "triggers": _triggers,
        "care": _care,
        "decoys": _decoys,
        "mental": _mental,
        "history": _history,
        "allergy": _allergy,
        "pain": _pain,
        "vitals": _vitals,
    }
)


# ---- the fixed files --------------------------------------------------------------------------------------------


def row(vignette: Vignette) -> str:
    """The vignette as a line of JSON; of the patient only the fingerprint."""
    fields = {name: getattr(vignette, name) for name in ("id", "text", "esi", "step", "stratum", "family")}
    fields |= {"patient": fingerprint(vignette.patient), "tags": list(vignette.tags)}
    return json.dumps(fields, ensure_ascii=True) + "\n"


def fixed_file(name: str) -> str:
    """The content of one of `FILES`, the same on every machine."""
    count, mix = FILES[name]
    return "".join(row(vignette) for vignette in draw_vignettes(name, count, mix=mix, seed=SEED))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    tolerate_narrow_encodings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_world.vignettes", description="Write the fixed case files."
    )
    parser.add_argument("--write", type=Path, required=True, metavar="DIR", help="folder for the four JSONL files")
    folder = parser.parse_args(argv).write
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / f"{name}.jsonl").write_text(fixed_file(name), encoding="ascii", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
