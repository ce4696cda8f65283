"""The embedded world: triage against an oracle, and what every vignette promises about its text and its split."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tiny_world import lexicon
from benchmarks.tiny_world.lexicon import DONE, FAMILIES, HIGH_RISK, OPEN_INJURIES, STATES
from benchmarks.tiny_world.patients import STRATA, Patient, Vitals, draw_patient, fingerprint, summary, triage
from benchmarks.tiny_world.vignettes import (
    FILES,
    RESIDUES,
    TEST_MIX,
    Vignette,
    draw_vignettes,
    fixed_file,
    main,
    quotas,
    render,
    row,
)
from grpo.config import TINY_WORLD_DIR
from rewards import load_reward

CASES = TINY_WORLD_DIR / "cases"
HARMLESS = {"iv_access", "monitor", "oxygen"}
GOLD = {
    "lifesaving_done": (1, "A"),
    "lifesaving_other": (1, "A"),
    "severe_pain": (2, "B"),
    "open_injury": (2, "B"),
    "high_risk": (2, "B"),
    "danger_vitals": (2, "D"),
    "resources_many": (3, "D"),
    "resource_one": (4, "C"),
    "resource_none": (5, "C"),
}
RULE_STRATA = ("lifesaving_done", "severe_pain", "open_injury")
WELL = Patient(
    family="cold",
    finding=0,
    age_months=360,
    sex="male",
    arrival="walk-in",
    vitals=Vitals(76, 14, 99, 124, 78, 98.4),
    pain=None,
    earlier_pain=None,
    done=(),
    states=(),
    high_risk=(),
    open_injury=None,
    mental="alert",
    resources=frozenset(),
    decoys=(),
    history="none",
    allergy="none",
)


def oracle(p: Patient) -> tuple[int, str]:
    """Level and step, written from the ESI algorithm as a chain of ifs."""
    for intervention in p.done:
        if intervention not in HARMLESS:
            return 1, "A"
    if len(p.states) > 0 or p.vitals.spo2 < 90:
        return 1, "A"
    if len(p.high_risk) > 0 or p.open_injury is not None:
        return 2, "B"
    if p.mental == "confused" or p.mental == "lethargic":
        return 2, "B"
    if p.pain is not None and p.pain >= 7:
        return 2, "B"
    if len(p.resources) == 0:
        return 5, "C"
    if len(p.resources) == 1:
        return 4, "C"
    heart, breaths = 100, 20
    if p.age_months < 8 * 12:
        heart, breaths = 140, 30
    if p.age_months < 3 * 12:
        heart, breaths = 160, 40
    if p.age_months < 3:
        heart, breaths = 180, 50
    if p.vitals.heart_rate > heart or p.vitals.resp_rate > breaths or p.vitals.spo2 < 92:
        return 2, "D"
    return 3, "D"


KINDS = ("labs", "ecg", "xray", "imaging", "iv_fluids", "iv_drug", "procedure", "consult")


@st.composite
def any_patient(draw: st.DrawFn) -> Patient:
    """Facts in any combination, most of them calm, thresholds included."""
    keys = {
        name: st.one_of(st.just(()), st.lists(st.sampled_from(sorted(table)), max_size=2, unique=True).map(tuple))
        for name, table in (("states", STATES), ("high_risk", HIGH_RISK))
    }
    limits = st.sampled_from((60, 99, 100, 101, 140, 141, 160, 161, 180, 181))
    return replace(
        WELL,
        age_months=draw(st.sampled_from((1, 2, 3, 4, 35, 36, 37, 95, 96, 97, 360, 900))),
        vitals=Vitals(
            draw(limits),
            draw(st.sampled_from((14, 20, 21, 30, 31, 40, 41, 50, 51))),
            draw(st.sampled_from((89, 90, 91, 92, 98, 98, 98))),
            120,
            80,
            98.6,
        ),
        pain=draw(st.one_of(st.none(), st.integers(0, 10))),
        earlier_pain=draw(st.one_of(st.none(), st.integers(0, 10))),
        done=draw(st.one_of(st.just(()), st.sampled_from(sorted(HARMLESS) + sorted(DONE)).map(lambda key: (key,)))),
        states=draw(keys["states"]),
        high_risk=draw(keys["high_risk"]),
        open_injury=draw(st.one_of(st.none(), st.none(), st.sampled_from(sorted(OPEN_INJURIES)))),
        mental=draw(st.sampled_from(("alert", "alert", "alert", "confused", "lethargic"))),
        resources=draw(st.frozensets(st.sampled_from(KINDS), max_size=4)),
        decoys=draw(st.sampled_from(((), ("no_stab",), ("not_intubated",), ("earlier_pain",)))),
    )


@settings(max_examples=600, deadline=None)
@given(any_patient())
def test_triage_is_the_algorithm(patient: Patient) -> None:
    decided = triage(patient)
    assert (decided.level, decided.step) == oracle(patient)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (5, "C")),
        ({"resources": frozenset({"xray"})}, (4, "C")),
        ({"resources": frozenset({"xray", "labs"})}, (3, "D")),
        ({"vitals": Vitals(118, 14, 99, 124, 78, 98.4)}, (5, "C")),
        ({"vitals": Vitals(118, 14, 99, 124, 78, 98.4), "resources": frozenset({"xray", "labs"})}, (2, "D")),
        ({"pain": 7}, (2, "B")),
        ({"pain": 6}, (5, "C")),
        ({"pain": 2, "earlier_pain": 9, "decoys": ("earlier_pain",)}, (5, "C")),
        ({"done": ("iv_access",)}, (5, "C")),
        ({"done": ("chest_tube",)}, (1, "A")),
        ({"done": ("central_line",), "pain": 9}, (1, "A")),
        ({"open_injury": "leg_fracture", "states": ("seizing",)}, (1, "A")),
        ({"vitals": Vitals(76, 14, 89, 124, 78, 98.4)}, (1, "A")),
    ],
)
def test_triage_by_hand(change: dict[str, object], expected: tuple[int, str]) -> None:
    decided = triage(replace(WELL, **change))  # type: ignore[arg-type]
    assert (decided.level, decided.step) == expected == oracle(replace(WELL, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("months", [1, 2, 3, 4, 35, 36, 37, 95, 96, 97, 200])
@pytest.mark.parametrize("beyond", [0, 1])
def test_danger_zones_at_their_limits(months: int, beyond: int) -> None:
    """At the limit is calm, one above is danger; 3 months, 3 years and 8 years belong to the older band."""
    band = 0 if months < 3 else 1 if months < 36 else 2 if months < 96 else 3
    heart, breaths = ((180, 50), (160, 40), (140, 30), (100, 20))[band]
    many = replace(WELL, age_months=months, resources=frozenset({"labs", "ecg"}))
    for vitals in (Vitals(heart + beyond, 10, 98, 120, 80, 98.6), Vitals(60, breaths + beyond, 98, 120, 80, 98.6)):
        assert triage(replace(many, vitals=vitals)).level == (2 if beyond else 3)


@settings(max_examples=250, deadline=None)
@given(any_patient())
def test_the_summary_says_what_triage_read(patient: Patient) -> None:
    said = summary(patient)
    level, step = oracle(patient)
    assert (said.lifesaving != "none") == (step == "A")
    if step != "A":
        urgent = said.high_risk != "none" or said.open_injury != "none" or said.pain == "severe"
        assert urgent or patient.mental != "alert" or step != "B"
        assert not urgent or step == "B"
    if step == "D":
        assert (said.resources, said.vitals) == ("2+", "danger" if level == 2 else "stable")
    assert len(said.complaint.split()) <= 3
    assert max(map(len, (said.lifesaving, said.high_risk, said.open_injury))) <= 80


# ---- patients ---------------------------------------------------------------------------------------------------


def patient_of(seed: int, stratum: str, decoy: bool) -> Patient:
    return draw_patient(random.Random(seed), stratum, decoy=decoy and bool(STRATA[stratum].decoys))


drawn = st.builds(patient_of, st.integers(0, 10**9), st.sampled_from(sorted(GOLD)), st.booleans())
seeds = st.integers(0, 10**9)


@settings(max_examples=300, deadline=None)
@given(seeds, st.sampled_from(sorted(GOLD)), st.booleans())
def test_a_stratum_is_decided_at_its_step(seed: int, stratum: str, decoy: bool) -> None:
    patient = patient_of(seed, stratum, decoy)
    assert oracle(patient) == GOLD[stratum]
    bare = replace(patient, decoys=(), earlier_pain=None)
    assert oracle(bare) == GOLD[stratum] and triage(bare).level == triage(patient).level
    three_rules = {"intubation", "chest_tube", "central_line"}
    assert bool(three_rules & set(patient.done)) == (stratum == "lifesaving_done")
    assert ((patient.pain or 0) >= 7) == (stratum == "severe_pain")
    assert not patient.decoys or STRATA[stratum].decoys


@settings(max_examples=200, deadline=None)
@given(seeds, st.sampled_from(RULE_STRATA))
def test_without_its_trigger_a_rule_case_is_less_acute(seed: int, stratum: str) -> None:
    patient = patient_of(seed, stratum, False)
    without = {
        "lifesaving_done": replace(patient, done=tuple(key for key in patient.done if key in HARMLESS)),
        "severe_pain": replace(patient, pain=2),
        "open_injury": replace(patient, open_injury=None),
    }[stratum]
    assert oracle(without)[0] > GOLD[stratum][0]
    assert triage(without).level == oracle(without)[0]


@settings(max_examples=300, deadline=None)
@given(drawn)
def test_patients_are_possible(patient: Patient) -> None:
    family = FAMILIES[patient.family]
    assert family.ages[0] <= patient.age_months <= family.ages[1]
    assert family.sex in (None, patient.sex)
    if patient.age_months < 48 or patient.mental in ("sedated", "unresponsive"):
        assert patient.pain is None and patient.earlier_pain is None
    if patient.age_months < 14 * 12:
        assert patient.arrival in ("family", "ambulance", "helicopter", "transfer")
    if patient.mental == "sedated":
        assert "intubation" in patient.done
    if patient.finding is not None:
        assert patient.resources == family.findings[patient.finding].needs
    else:
        assert len(patient.resources) >= 2 and triage(patient).step in "AB"
    for trigger in [DONE[key] for key in patient.done] + [HIGH_RISK[key] for key in patient.high_risk]:
        assert trigger.ages[0] <= patient.age_months <= trigger.ages[1]


def test_a_stratum_that_is_its_own_trigger_carries_no_decoy() -> None:
    for stratum in (*RULE_STRATA, "lifesaving_other"):
        with pytest.raises(ValueError, match="carries no decoys"):
            draw_patient(random.Random(0), stratum, decoy=True)
    with pytest.raises(ValueError, match="expected one of lifesaving_done"):
        draw_patient(random.Random(0), "nonsense")


def test_the_fingerprint_knows_every_fact() -> None:
    changed = {
        "family": "rash",
        "finding": 1,
        "age_months": 372,
        "sex": "female",
        "arrival": "family",
        "vitals": replace(WELL.vitals, temperature=98.5),
        "pain": 0,
        "earlier_pain": 8,
        "done": ("monitor",),
        "states": ("shock",),
        "high_risk": ("stroke",),
        "open_injury": "leg_fracture",
        "mental": "sedated",
        "resources": frozenset({"labs"}),
        "decoys": ("no_stab",),
        "history": "smoker",
        "allergy": "sulfa",
    }
    assert set(changed) == set(Patient.__slots__)
    prints = [fingerprint(replace(WELL, **{name: value})) for name, value in changed.items()]  # type: ignore[arg-type]
    assert len({fingerprint(WELL), *prints}) == 1 + len(changed)
    one, other = replace(WELL, resources=frozenset({"labs"})), replace(WELL, resources=frozenset({"xray"}))
    assert fingerprint(one) != fingerprint(other)


# ---- texts ------------------------------------------------------------------------------------------------------

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LIFESAVING_WORDS = {
    "intubation": r"intubat|\bETT\b|endotracheal tube|breathing tube",
    "chest_tube": r"chest tube|thoracostomy|thoracic drain",
    "central_line": r"central line|central venous|\bCVC\b|jugular venous",
}
INJURY_WORDS = (
    r"open fracture|stab|gunshot|penetrating|bone|compound fracture|knife|knifed|blade|bullet|shot in|nail|rod|impaled"
    r"|splinter|steel bar|fence post"
)
CARD = r"intubat|chest tube|central line|open fracture|penetrating|gunshot|stab"
SEVERE = (
    r"\b(?:8|9|10)/10|(?:eight|nine|ten) (?:out )?of ten|pain (?:score|rated at) (?:8|9|10)\b|severe, (?:8|9|10) of 10"
    r"|calls it (?:eight|nine|ten)|severe pain|agony"
)


def told(seed: int, stratum: str, decoy: bool) -> tuple[Patient, str]:
    patient = patient_of(seed, stratum, decoy)
    return patient, render(patient, random.Random(seed + 1))


def vital(pattern: str, text: str) -> int | None:
    found = re.findall(rf"\b(?:{pattern}) (\d+)", text, re.IGNORECASE)
    assert len(found) <= 1, "a vital sign is told once"
    return int(found[0]) if found else None


@settings(max_examples=250, deadline=None)
@given(seeds, st.sampled_from(sorted(GOLD)), st.booleans())
def test_texts_are_notes(seed: int, stratum: str, decoy: bool) -> None:
    patient, text = told(seed, stratum, decoy)
    assert text.isascii() and "\n" not in text and "  " not in text
    assert not re.search(r"[{}]|\.\.|\bNone\b|\bnan\b", text)
    assert 25 <= len(text.split()) <= 75
    assert text.endswith(".")
    if patient.sex == "male":
        assert not re.search(r"pregnan|\b(?:woman|female|girl)\b", text)
    if patient.mental in ("sedated", "unresponsive"):
        assert not re.search(r"\b(?:denies|rates|reports|alert)\b|/10\b|pain-free|no pain", text, re.IGNORECASE)
    if patient.age_months < 48:
        assert not re.search(r"out of ten|/10\b|rates|denies", text)
    if patient.age_months >= 24:
        assert re.search(rf"\b{patient.age_months // 12}(?:-year-old| yo)\b", text)
    else:
        assert re.search(rf"\b{patient.age_months}(?:-month-old| mo)\b", text)


@settings(max_examples=250, deadline=None)
@given(seeds, st.sampled_from(sorted(GOLD)), st.booleans())
def test_numbers_are_told_and_clear_of_thresholds(seed: int, stratum: str, decoy: bool) -> None:
    patient, text = told(seed, stratum, decoy)
    heart, breaths, spo2 = vital("HR|P|pulse", text), vital("RR|resp", text), vital("SpO2|sat", text)
    assert (heart, breaths, spo2) == (patient.vitals.heart_rate, patient.vitals.resp_rate, patient.vitals.spo2)
    assert heart is not None and breaths is not None and spo2 is not None
    months = patient.age_months
    limits = (180, 50) if months < 3 else (160, 40) if months < 36 else (140, 30) if months < 96 else (100, 20)
    assert heart <= limits[0] - 8 or heart >= limits[0] + 12
    assert breaths <= limits[1] - 2 or breaths >= limits[1] + 4
    assert spo2 <= 87 or spo2 in (90, 91) or spo2 >= 95
    assert not (3 <= months < 4 or 30 < months < 48 or 90 < months < 108), "an age at the edge of a band"
    assert patient.pain is None or patient.pain <= 5 or patient.pain >= 8
    if spo2 < 90:
        assert patient.states == ("hypoxia",)


@settings(max_examples=500, deadline=None)
@given(seeds, st.sampled_from(sorted(GOLD)), st.booleans())
def test_what_decides_is_in_the_text(seed: int, stratum: str, decoy: bool) -> None:
    patient, text = told(seed, stratum, decoy)
    for key in patient.done:
        if key in LIFESAVING_WORDS:
            assert re.search(LIFESAVING_WORDS[key], text, re.IGNORECASE)
    if patient.open_injury:
        assert re.search(INJURY_WORDS, text, re.IGNORECASE)
    if stratum == "severe_pain":
        assert re.search(SEVERE, text, re.IGNORECASE)
    if patient.earlier_pain is not None:
        before, now = patient.earlier_pain, patient.pain
        assert now is not None
        pair = rf"{before}/10.* {now}/10|{WORDS[before]} out of ten, now {WORDS[now]} out of ten"
        assert re.search(pair, text, re.IGNORECASE)
    triggers = [(DONE, key) for key in patient.done] + [(STATES, key) for key in patient.states]
    triggers += [(HIGH_RISK, key) for key in patient.high_risk]
    for table, key in triggers:
        wordings = table[key].plain + table[key].other
        assert any(re.search(re.sub(r"\\\{\w+\\\}", ".+", re.escape(w)), text, re.IGNORECASE) for w in wordings), key
    if patient.finding is not None:
        says = FAMILIES[patient.family].findings[patient.finding].says
        assert sum(said.lower() in text.lower() for said in says) == 1


@settings(max_examples=250, deadline=None)
@given(seeds, st.sampled_from(sorted(GOLD)), st.booleans())
def test_the_cards_words_occur_only_with_a_trigger_or_a_decoy(seed: int, stratum: str, decoy: bool) -> None:
    patient, text = told(seed, stratum, decoy)
    reasons = {"intubation", "chest_tube", "central_line"} & set(patient.done) or patient.open_injury or patient.decoys
    assert reasons or not re.search(CARD, text, re.IGNORECASE)
    if patient.decoys and "earlier_pain" not in patient.decoys:
        assert re.search(rf"{CARD}|extubat", text, re.IGNORECASE), "a decoy that fools nobody"
    if stratum != "severe_pain" and patient.earlier_pain is None:
        assert not re.search(SEVERE, text, re.IGNORECASE)


def test_resources_follow_from_the_words() -> None:
    """No sentence of a finding stands for two different sets of resources."""
    needs: dict[tuple[str, str], frozenset[str]] = {}
    for family in FAMILIES.values():
        assert len(family.says) >= 3 and len(set(family.says)) == len(family.says)
        for found in family.findings:
            assert len(set(found.says)) >= 3
            for said in found.says:
                assert needs.setdefault((family.key, said), found.needs) == found.needs


def test_every_entry_is_used_and_every_trigger_has_four_wordings() -> None:
    for table in (DONE, STATES, HIGH_RISK, OPEN_INJURIES):
        for key, trigger in table.items():
            assert len(set(trigger.plain)) >= 4, key
            assert set(trigger.families) <= set(FAMILIES)
            assert not trigger.other or len(set(trigger.other)) >= 4, key


def test_no_other_wording_holds_the_cards_words() -> None:
    """The whole lexicon, rare wordings too: the card's patterns match the plain wordings of its rules and decoys."""
    for table in (DONE, STATES, HIGH_RISK, OPEN_INJURIES, lexicon.HISTORIES, lexicon.ALLERGIES):
        for key, trigger in table.items():
            of_a_rule = table is OPEN_INJURIES or key in LIFESAVING_WORDS
            assert bool(trigger.other) == of_a_rule
            assert all(bool(re.search(CARD, said, re.IGNORECASE)) == of_a_rule for said in trigger.plain), key
            assert not any(re.search(CARD, said, re.IGNORECASE) for said in trigger.other), key
    for family in FAMILIES.values():
        for said in (*family.says, family.short, *(words for found in family.findings for words in found.says)):
            assert not re.search(CARD, said, re.IGNORECASE), said


# ---- splits and files -------------------------------------------------------------------------------------------


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text(encoding="ascii").splitlines()]


@pytest.fixture(scope="module")
def sample() -> list[Vignette]:
    return draw_vignettes("train", 3000, mix=TEST_MIX, seed=5)


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_fixed_files_are_what_the_generator_writes(name: str) -> None:
    assert (CASES / f"{name}.jsonl").read_bytes() == fixed_file(name).encode("ascii")


def test_the_command_writes_all_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: (4, mix) for name, (_, mix) in FILES.items()}
    monkeypatch.setattr("benchmarks.tiny_world.vignettes.FILES", small)
    assert main(["--write", str(tmp_path / "cases")]) == 0
    assert {p.name: len(p.read_text().splitlines()) for p in (tmp_path / "cases").iterdir()} == {
        f"{name}.jsonl": 4 for name in FILES
    }


def test_the_mixes_are_exact() -> None:
    counts = {name: Counter(r["stratum"] for r in rows(name)) for name in FILES}
    assert counts["test"] == {
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
    assert [len(rows(name)) for name in ("train", "validation", "test", "mietic36")] == [3000, 200, 500, 36]
    assert counts["validation"]["severe_pain"] == 26 and counts["train"]["severe_pain"] == 390
    levels = Counter(r["esi"] for r in rows("mietic36"))
    assert [levels[level] for level in range(1, 6)] == [14, 11, 5, 4, 2]
    assert [counts["mietic36"][stratum] for stratum in RULE_STRATA] == [5, 3, 3]


def test_rows_agree_with_their_strata() -> None:
    for name in FILES:
        for r in rows(name):
            assert set(r) == {"id", "text", "esi", "step", "stratum", "family", "patient", "tags"}
            assert (r["esi"], r["step"]) == GOLD[str(r["stratum"])]
            assert str(r["id"]).startswith(f"{name}-") and r["stratum"] in r["tags"]  # type: ignore[operator]


def test_the_test_set_carries_hard_negatives_of_every_level_but_one() -> None:
    hard = [r for r in rows("test") if "hard_negative" in r["tags"]]  # type: ignore[operator]
    assert len(hard) >= 110
    assert {r["stratum"] for r in hard} == {s for s in GOLD if s not in (*RULE_STRATA, "lifesaving_other")}
    kinds = {tag for r in hard for tag in r["tags"] if tag.startswith("hard_negative:")}  # type: ignore[attr-defined]
    assert len(kinds) >= 9


def test_splits_share_no_patient_no_text_and_no_seed() -> None:
    patients = {name: [str(r["patient"]) for r in rows(name)] for name in FILES}
    texts = {name: [r["text"] for r in rows(name)] for name in FILES}
    for name in FILES:
        assert len(set(patients[name])) == len(patients[name]) == len(set(texts[name]))
        assert {int(p, 16) % 16 for p in patients[name]} <= RESIDUES[name]
        for other in set(FILES) - {name}:
            assert not RESIDUES[name] & RESIDUES[other]
            assert not set(patients[name]) & set(patients[other])
            assert not set(texts[name]) & set(texts[other])
    assert sorted(residue for residues in RESIDUES.values() for residue in residues) == list(range(16))


def test_vignettes_are_a_function_of_their_arguments(sample: list[Vignette]) -> None:
    again = draw_vignettes("train", 3000, mix=TEST_MIX, seed=5)
    assert [row(v) for v in again] == [row(v) for v in sample]
    other = {v.text for v in draw_vignettes("train", 300, mix=TEST_MIX, seed=6)}
    assert not other & {v.text for v in sample}


def test_the_world_is_wide(sample: list[Vignette]) -> None:
    assert len({v.family for v in sample}) >= 60
    assert (
        {v.esi for v in sample if "child" in v.tags} == {v.esi for v in sample if "adult" in v.tags} == {1, 2, 3, 4, 5}
    )
    assert 0.1 < sum("child" in v.tags for v in sample) / len(sample) < 0.4
    assert len({v.text for v in sample}) == len(sample)
    words = Counter(word for v in sample for word in re.findall(r"[a-z]+", v.text.lower()))
    assert len(words) < 2500, "a lexicon that a small model can learn"


def test_plain_and_paraphrase_are_what_the_cards_patterns_see(sample: list[Vignette]) -> None:
    reward = load_reward("v49")
    rules = {
        "lifesaving_done": "lifesaving_missed",
        "severe_pain": "severe_pain_missed",
        "open_injury": "open_injury_missed",
    }
    for stratum, rule in rules.items():
        of_stratum = [v for v in sample if v.stratum == stratum]
        for v in of_stratum:
            assert ("plain" in v.tags) != ("paraphrase" in v.tags)
            assert reward.applies(rule, v.text, v.esi) == ("plain" in v.tags), v.id
        share = sum("plain" in v.tags for v in of_stratum) / len(of_stratum)
        assert 0.6 < share < 0.78
    for v in sample:
        if v.stratum not in rules:
            assert not {"plain", "paraphrase"} & set(v.tags)


@given(st.integers(0, 500), st.dictionaries(st.sampled_from(sorted(GOLD)), st.integers(0, 40), min_size=1))
def test_quotas_are_proportional(n: int, mix: dict[str, int]) -> None:
    if not sum(mix.values()):
        with pytest.raises(ValueError, match="positive sum"):
            quotas(n, mix)
        return
    counts = quotas(n, mix)
    assert sum(counts.values()) == n
    assert all(abs(counts[s] - n * mix[s] / sum(mix.values())) < 1 for s in mix)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of test, validation"):
        draw_vignettes("held-out", 1, mix=TEST_MIX, seed=0)
    with pytest.raises(ValueError, match="unknown strata nonsense"):
        draw_vignettes("train", 1, mix={"nonsense": 1}, seed=0)
    with pytest.raises(ValueError, match="n >= 0"):
        draw_vignettes("train", -1, mix=TEST_MIX, seed=0)
