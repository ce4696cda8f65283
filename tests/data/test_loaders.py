"""Loaders of published files: every quirk, every kind of damage, no outcome and no case's text where it must not be."""

import csv
import dataclasses
import gzip
import io
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.cases import LOADERS, load_cases, load_jsonl_cases
from grpo.config import load_config
from grpo.data import mimic_iv_ed as mimic
from grpo.data.csv_rows import MAX_LINE, plain_name
from grpo.data.narrative import LIMITS, Presentation, narrative
from grpo.data.row_report import REASONS, CaseRow, Loaded, RowNote
from grpo.preflight.checks import load_inputs
from grpo.runtime.errors import UserError
from rewards import load_reward

VITALS = ["temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp"]
TRIAGE = ["subject_id", "stay_id", *VITALS, "pain", "acuity", "chiefcomplaint"]
VALIDATE = ["subject_id", "stay_id", "gender", "race", "arrival_transport", "disposition", *VITALS, "pain", "acuity"]
VALIDATE += ["chiefcomplaint", "age", "tiragecase", "invasive_ventilation", "expired_within_1h", "resources_used"]
VALIDATE += ["Expert 1 Opinion", "Expert 2 Opinion", "Final Decision"]

T = {"subject_id": "10000001", "stay_id": "30000001"}
T |= {"temperature": "98.6", "heartrate": "104.0", "resprate": "18.0", "o2sat": "97.0", "sbp": "132", "dbp": "84"}
T |= {"pain": "8", "acuity": "2", "chiefcomplaint": "CHEST PAIN, Transfer"}
E = {"subject_id": "10000001", "hadm_id": "", "stay_id": "30000001", "intime": "2180-05-06 19:17:00"}
E |= {"outtime": "2180-05-06 23:30:00", "gender": "F", "race": "WHITE", "arrival_transport": "AMBULANCE"}
E |= {"disposition": "HOME"}
P = {"subject_id": "10000001", "gender": "F", "anchor_age": "65", "anchor_year": "2178"}
P |= {"anchor_year_group": "2011 - 2013", "dod": ""}
WHOLE = (
    "A 67-year-old female arrived by ambulance. Chief complaint: CHEST PAIN, Transfer. "
    "Vital signs: T 98.6 F, HR 104, RR 18, SpO2 97%, BP 132/84. Pain 8/10."
)


def as_csv(header: Sequence[str], rows: Iterable[Mapping[str, object]]) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, header, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def published(
    folder: Path,
    triage: Sequence[Mapping[str, object]] = (T,),
    edstays: Sequence[Mapping[str, object]] = (E,),
    patients: Sequence[Mapping[str, object]] | None = (P,),
) -> str:
    """A MIMIC-IV-ED folder, gzip as published."""
    (folder / "triage.csv.gz").write_bytes(gzip.compress(as_csv(list(triage[0]), triage), 1))
    (folder / "edstays.csv.gz").write_bytes(gzip.compress(as_csv(list(edstays[0]), edstays), 1))
    if patients is not None:
        (folder / "patients.csv.gz").write_bytes(gzip.compress(as_csv(list(patients[0]), patients), 1))
    return str(folder)


def reasons(loaded: Loaded) -> dict[tuple[str, str], tuple[int, tuple[int, ...]]]:
    return {(note.reason, note.column): (note.count, note.lines) for note in loaded.notes}


def loaded(folder: str, *, strict: bool = False) -> Loaded:
    return load_cases("mimic-iv-ed", folder, strict=strict)


# --- the narrative -------------------------------------------------------------------------------------------------


def test_the_worked_example_from_published_files(tmp_path: Path) -> None:
    found = loaded(published(tmp_path), strict=True)
    (record,) = found.rows
    assert record.case.text == WHOLE
    assert (record.case.id, record.case.gold_level, record.patient) == ("stay-30000001", 2, "10000001")
    assert found.row_count == 1 and not found.notes


BEFORE_AND_AFTER = [
    ({"temperature": ""}, "T 98.6 F, ", "", []),
    ({"temperature": "NULL"}, "T 98.6 F, ", "", []),
    ({"temperature": "101.25"}, "T 98.6 F", "T 101.25 F", []),
    ({"temperature": "98.6000"}, "T 98.6 F", "T 98.6 F", []),
    ({"temperature": "36.8"}, "T 98.6 F", "T 36.8 C", [("celsius", "temperature")]),
    ({"temperature": "45"}, "T 98.6 F", "T 45 C", [("celsius", "temperature")]),
    ({"temperature": "45.1"}, "T 98.6 F, ", "", [("impossible", "temperature")]),
    ({"temperature": "24.9"}, "T 98.6 F, ", "", [("impossible", "temperature")]),
    ({"temperature": "986"}, "T 98.6 F, ", "", [("impossible", "temperature")]),
    ({"heartrate": "999"}, "HR 104, ", "", [("sentinel", "heartrate")]),
    ({"heartrate": "-1"}, "HR 104, ", "", [("sentinel", "heartrate")]),
    ({"heartrate": "0"}, "HR 104, ", "", [("zero", "heartrate")]),
    ({"heartrate": "1228"}, "HR 104, ", "", [("impossible", "heartrate")]),
    ({"heartrate": "irregular"}, "HR 104, ", "", [("not_a_number", "heartrate")]),
    ({"heartrate": "1e2"}, "HR 104, ", "", [("not_a_number", "heartrate")]),
    ({"heartrate": "inf"}, "HR 104, ", "", [("not_a_number", "heartrate")]),
    ({"resprate": "nan"}, "RR 18, ", "", []),
    ({"o2sat": "100"}, "SpO2 97%", "SpO2 100%", []),
    ({"o2sat": "100.5"}, "SpO2 97%, ", "", [("impossible", "o2sat")]),
    ({"o2sat": "9999"}, "SpO2 97%, ", "", [("sentinel", "o2sat")]),
    ({"sbp": ""}, "BP 132/84", "diastolic BP 84", []),
    ({"dbp": "0"}, "BP 132/84", "systolic BP 132", [("zero", "dbp")]),
    ({"sbp": "84", "dbp": "132"}, ", BP 132/84", "", [("inverted", "dbp")]),
    ({"sbp": "84"}, ", BP 132/84", "", [("inverted", "dbp")]),
    ({"sbp": "85"}, "BP 132/84", "BP 85/84", []),
    ({"pain": ""}, " Pain 8/10.", "", []),
    ({"pain": "0"}, "Pain 8/10.", "Pain 0/10.", []),
    ({"pain": "10.0"}, "Pain 8/10.", "Pain 10/10.", []),
    ({"pain": "7.5"}, "Pain 8/10.", "Pain 7.5/10.", []),
    ({"pain": " 8 / 10 "}, "Pain 8/10.", "Pain 8/10.", []),
    ({"pain": "8-9"}, "Pain 8/10.", "Pain 8-9/10.", []),
    ({"pain": "8 to 9"}, "Pain 8/10.", "Pain 8-9/10.", []),
    ({"pain": "9-8"}, "Pain 8/10.", "Pain: 9-8.", [("words", "pain")]),
    ({"pain": "13"}, " Pain 8/10.", "", [("impossible", "pain")]),
    ({"pain": "-1"}, " Pain 8/10.", "", [("impossible", "pain")]),
    ({"pain": "10.5"}, " Pain 8/10.", "", [("impossible", "pain")]),
    ({"pain": "unable"}, "Pain 8/10.", "Pain: unable.", [("words", "pain")]),
    ({"pain": "uta"}, "Pain 8/10.", "Pain: uta.", [("words", "pain")]),
    ({"pain": "Critical"}, "Pain 8/10.", "Pain: Critical.", [("words", "pain")]),
    ({"pain": "denies"}, "Pain 8/10.", "Pain: denies.", [("words", "pain")]),
    ({"pain": "None"}, "Pain 8/10.", "Pain: None.", [("words", "pain")]),
    ({"pain": "___"}, " Pain 8/10.", "", [("deidentified", "pain")]),
    ({"pain": "x" * 31}, " Pain 8/10.", "", [("long_pain", "pain")]),
    ({"pain": "<|im_end|>"}, " Pain 8/10.", "", [("long_pain", "pain")]),
    ({"chiefcomplaint": "FALL AT ___"}, "CHEST PAIN, Transfer", "FALL AT", [("deidentified", "chiefcomplaint")]),
    ({"chiefcomplaint": "___ FALL"}, "CHEST PAIN, Transfer", "FALL", [("deidentified", "chiefcomplaint")]),
    ({"chiefcomplaint": "A, ___, B"}, "CHEST PAIN, Transfer", "A, B", [("deidentified", "chiefcomplaint")]),
    ({"chiefcomplaint": "A\n B\x07C."}, "CHEST PAIN, Transfer", "A B C", []),
    ({"gender": "M"}, "female", "male", []),
    ({"gender": ""}, "female", "patient", []),
    ({"arrival_transport": "HELICOPTER"}, "by ambulance", "by helicopter", []),
    ({"arrival_transport": "WALK IN"}, "arrived by ambulance", "walked in", []),
    ({"arrival_transport": "UNKNOWN"}, "arrived by ambulance", "came to triage", []),
    ({"age": 8}, "A 67", "An 8", []),
    ({"age": 18}, "A 67", "An 18", []),
    ({"age": 81}, "A 67", "An 81", []),
    ({"age": 71}, "A 67", "A 71", []),
    ({"age": 89}, "A 67", "An 89", []),
    ({"age": 90}, "A 67-year-old female", "A female aged 90 or older", []),
    ({"age": 91, "gender": ""}, "A 67-year-old female", "A patient aged 90 or older", []),
    ({"age": None}, "A 67-year-old female", "A female patient", []),
    ({"age": None, "gender": ""}, "A 67-year-old female", "A patient", []),
]  # fmt: skip


def presented(**changed: object) -> Presentation:
    usual = {column: T[column] for column in mimic.SEEN_AT_TRIAGE}
    return Presentation(**(usual | {"age": 67, "gender": "F", "arrival_transport": "AMBULANCE"} | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(("changed", "old", "new", "notes"), BEFORE_AND_AFTER, ids=lambda v: str(v)[:40])
def test_each_value_changes_its_own_words_only(
    changed: dict[str, object], old: str, new: str, notes: list[tuple[str, str]]
) -> None:
    assert WHOLE.count(old) == 1
    text, said = narrative(presented(**changed))
    assert (text, list(said)) == (WHOLE.replace(old, new), notes)


@pytest.mark.parametrize("complaint", ["", "  ", "___", "___, ___.", "NULL", "."])
def test_without_a_complaint_there_is_no_narrative(complaint: str) -> None:
    assert narrative(presented(chiefcomplaint=complaint)) == ("", ())


def test_without_vitals_none_are_mentioned() -> None:
    none = dict.fromkeys((*LIMITS, "pain"), "")
    assert narrative(presented(**none))[0] == WHOLE[: WHOLE.index(" Vital")]


@given(value=st.decimals(-2_000, 2_000, places=2).map(str), column=st.sampled_from(sorted(LIMITS)))
def test_a_number_is_written_as_recorded_or_not_at_all(value: str, column: str) -> None:
    alone = dict.fromkeys((*LIMITS, "pain"), "") | {column: value}
    text, notes = narrative(presented(**alone))
    written = text.partition("Vital signs: ")[2]
    if written:
        (number,) = [
            float(word.rstrip("%.")) for word in written.split() if word.rstrip("%.").replace(".", "").isdigit()
        ]
        assert number == float(value) and 0 < number <= LIMITS[column][1]
    assert bool(written) == (not notes) or notes == (("celsius", "temperature"),)


def test_the_pain_rule_of_the_reward_reads_the_narrative() -> None:
    reward = load_reward("v49")
    for pain, fires in (("8", True), ("7", True), ("6-7", True), ("5", False), ("13", False), ("uta", False)):
        text, _ = narrative(presented(pain=pain))
        score = reward.score(text=text, gold=2, completion="ANSWER: ESI 3", thinking=False, finished=True, case_id="a")
        assert (score.parts.get("severe_pain_missed", 0.0) == -0.5) == fires, pain


# --- what may enter a prompt ---------------------------------------------------------------------------------------


def test_the_allow_list_is_this_one() -> None:
    """A lock: whoever adds a column here says in the same commit why it is known at triage."""
    fields = {field.name for field in dataclasses.fields(Presentation)}
    assert fields == {
        "chiefcomplaint", "temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp", "pain", "age", "gender",
        "arrival_transport",
    }  # fmt: skip
    read = {*mimic.TRIAGE, *mimic.EDSTAYS, *mimic.PATIENTS}
    assert read - fields == {"subject_id", "stay_id", "acuity", "intime", "anchor_age", "anchor_year"}


def test_no_column_that_knows_the_outcome_can_enter_a_prompt(tmp_path: Path) -> None:
    """Every field that is not on the list says LEAK, in columns of the files and in added ones, in another order."""
    leak = {
        "diagnosis": "LEAK",
        "hospital_expire_flag": "LEAK",
        "icd_title": "LEAK",
        "esi": "LEAK",
        "disposition": "LEAK",
    }
    triage = {"outtime": "LEAK"} | leak | dict(reversed(T.items()))
    edstays = leak | {"chiefcomplaint": "LEAK", "pain": "LEAK", "acuity": "LEAK", "temperature": "LEAK"}
    edstays |= E | {"hadm_id": "LEAK", "outtime": "LEAK", "race": "LEAK", "disposition": "LEAK"}
    edstays["intime"] = "2180-12-31 LEAK"
    patients = P | {"gender": "LEAK", "anchor_year_group": "LEAK", "dod": "LEAK", "chiefcomplaint": "LEAK"}
    (record,) = loaded(published(tmp_path, [triage], [edstays], [patients])).rows
    assert record.case.text == WHOLE and "LEAK" not in repr(record)


def test_words_of_edstays_never_pass_only_those_of_a_table_do(tmp_path: Path) -> None:
    found = loaded(published(tmp_path, edstays=[E | {"gender": "ADMITTED", "arrival_transport": "EXPIRED"}]))
    assert found.cases[0].text.startswith("A 67-year-old patient came to triage.")
    assert reasons(found) == {("unlisted", "gender"): (1, (2,)), ("unlisted", "arrival_transport"): (1, (2,))}


@pytest.mark.parametrize("level", ["1", "2", "3.0", "4", " 5 "])
def test_the_level_never_shows_in_the_text(tmp_path: Path, level: str) -> None:
    (case,) = loaded(published(tmp_path, [T | {"acuity": level}])).cases
    assert (case.text, case.gold_level) == (WHOLE, int(float(level)))


def test_a_renamed_column_is_missing_and_does_not_take_another_ones_place(tmp_path: Path) -> None:
    renamed = {("chief complaint" if name == "chiefcomplaint" else name): value for name, value in T.items()}
    with pytest.raises(
        UserError, match=r"triage.csv.gz:1: column chiefcomplaint missing; found subject_id, .*chief comp"
    ):
        loaded(published(tmp_path, [renamed]))
    bare = {name: value for name, value in E.items() if name not in ("gender", "stay_id")}
    with pytest.raises(
        UserError, match=r"edstays.csv.gz:1: columns stay_id, gender missing; found subject_id, hadm_id"
    ):
        loaded(published(tmp_path, edstays=[bare]))


def test_a_column_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    name = published(tmp_path)
    twice = ",".join([*TRIAGE, " ChiefComplaint "]) + "\n" + ",".join(["1", *T.values()]) + "\n"
    (tmp_path / "triage.csv.gz").write_bytes(twice.encode())
    with pytest.raises(UserError, match=r"triage.csv.gz:1: column chiefcomplaint occurs more than once"):
        loaded(name)


def test_a_file_without_its_header_does_not_show_a_patient(tmp_path: Path) -> None:
    name = published(tmp_path)
    (tmp_path / "triage.csv.gz").write_bytes(b"10000001,30000001,98.6,104,18,97,132,84,8,2,SECRET COMPLAINT\n")
    with pytest.raises(UserError, match="none of the 11 fields of line 1 is a known name") as caught:
        loaded(name)
    assert "SECRET" not in str(caught.value)


# --- the join ------------------------------------------------------------------------------------------------------


def world(size: int, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Stays of half as many patients, in disorder, with a share of every oddity."""
    draw = random.Random(seed)
    triage, edstays = [], []
    for i in range(size):
        ids = {"subject_id": str(10_000_000 + draw.randrange(size // 2 + 1)), "stay_id": str(30_000_000 + i)}
        odd = draw.choice(
            [{}, {}, {"acuity": ""}, {"acuity": "9"}, {"o2sat": "999"}, {"pain": "uta"}, {"chiefcomplaint": ""}]
        )
        triage.append(T | ids | {"acuity": str(draw.randint(1, 5)), "heartrate": str(60 + i % 90)} | odd)
        edstays.append(E | ids | {"gender": draw.choice("FM")})
    patients = [P | {"subject_id": str(10_000_000 + i), "anchor_age": str(20 + i % 60)} for i in range(size // 2 + 1)]
    for rows in (triage, edstays, patients):
        draw.shuffle(rows)
    return triage, edstays, patients


def test_the_join_does_not_ask_for_any_order(tmp_path: Path) -> None:
    triage, edstays, patients = world(60)
    usual = loaded(published(tmp_path, triage, edstays, patients))
    assert 20 < len(usual.rows) < 60
    for reverse in (False, True):
        stays = sorted(edstays, key=lambda row: row["stay_id"], reverse=reverse)
        people = sorted(patients, key=lambda row: row["subject_id"], reverse=not reverse)
        again = loaded(published(tmp_path, triage, stays, people))
        assert again.rows == usual.rows
        other = loaded(published(tmp_path, triage[::-1], stays, people))
        assert other.rows == usual.rows[::-1]


def test_every_row_is_a_case_or_in_the_report(tmp_path: Path) -> None:
    """Against a count by dictionaries; 5,000 rows, each accounted for with its line."""
    triage, edstays, patients = world(5_000, seed=1)
    found = loaded(published(tmp_path, triage, edstays, patients))
    by_stay = {row["stay_id"]: row for row in edstays}
    ages = {row["subject_id"]: int(row["anchor_age"]) + 2 for row in patients}
    expected, wanted = [], Counter[str]()
    for row in triage:
        if row["acuity"] in ("", "9") or not row["chiefcomplaint"]:
            wanted[
                "no_acuity" if row["acuity"] == "" else "bad_acuity" if row["acuity"] == "9" else "no_narrative"
            ] += 1
            continue
        sex = {"F": "female", "M": "male"}[by_stay[row["stay_id"]]["gender"]]
        age = ages[row["subject_id"]]
        an = "An" if age == 18 or 80 <= age < 90 else "A"
        expected.append(
            (f"stay-{row['stay_id']}", int(row["acuity"]), row["subject_id"], f"{an} {age}-year-old {sex} arr")
        )
        wanted["sentinel"] += row["o2sat"] == "999"
        wanted["words"] += row["pain"] == "uta"
    assert [
        (r.case.id, r.case.gold_level, r.patient, start)
        for r, (*_, start) in zip(found.rows, expected, strict=True)
        if r.case.text.startswith(start)
    ] == expected
    assert {note.reason: note.count for note in found.notes} == dict(wanted)
    assert found.row_count == 5_000 and found.dropped == 5_000 - len(expected)
    first = [line for line, row in enumerate(triage, 2) if row["acuity"] == ""][:10]
    assert reasons(found)["no_acuity", ""][1] == tuple(first)


def test_streaming_keeps_no_row(tmp_path: Path) -> None:
    """What a stay costs while the file is streamed: the join's bytes and no narrative."""

    def peak(size: int, read: Callable[[str], object]) -> int:
        folder = tmp_path / f"{size}"
        folder.mkdir(exist_ok=True)
        name = published(folder, *world(size))
        tracemalloc.start()
        read(name)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    def stream(name: str) -> None:
        for _ in LOADERS["mimic-iv-ed"](name):
            pass

    stream(published(tmp_path))  # imports and caches
    assert (peak(2_500, stream) - peak(500, stream)) / 2_000 < 150
    assert (peak(2_500, loaded) - peak(500, loaded)) / 2_000 > 200  # the bound tells one from the other


def test_ages(tmp_path: Path) -> None:
    def at(anchor: str, year: str, intime: str) -> tuple[str, set[tuple[str, str]]]:
        patient = P | {"anchor_age": anchor, "anchor_year": year}
        found = loaded(published(tmp_path, edstays=[E | {"intime": intime}], patients=[patient]))
        return found.cases[0].text.split(" arr")[0], set(reasons(found))

    assert at("65", "2180", "2180-01-01 00:00:00") == ("A 65-year-old female", set())
    assert at("65", "2180", "2175-12-31 23:59:59") == ("A 60-year-old female", set())
    assert at("87", "2180", "2185-06-01") == ("A female aged 90 or older", set())
    assert at("91", "2180", "2180-06-01") == ("A female aged 90 or older", set())
    assert at("91", "2180", "2179-06-01") == ("A female patient", {("no_age", "")})  # "over 89" less a year is anything
    assert at("20", "2180", "2150-06-01") == ("A female patient", {("bad_age", "")})
    assert at("20", "2180", "2179-06-01") == ("A 19-year-old female", set())
    assert at("0", "2180", "2179-06-01") == ("A female patient", {("bad_age", "")})
    assert at("60", "2080", "2180-06-01") == ("A female patient", {("bad_age", "")})
    assert at("65", "2180", "") == ("A female patient", {("no_age", "")})
    assert at("old", "2180", "2180-06-01") == ("A female patient", {("unreadable", ""), ("no_age", "")})


def test_without_a_patients_file_there_is_no_age(tmp_path: Path) -> None:
    found = loaded(published(tmp_path, patients=None), strict=True)
    assert found.cases[0].text == WHOLE.replace("67-year-old female", "female patient")
    assert reasons(found) == {("no_age", ""): (1, (2,))}


def test_rows_that_do_not_fit_together(tmp_path: Path) -> None:
    triage = [
        T | {"stay_id": "30000009"},
        T | {"subject_id": "10000002"},
        T | {"stay_id": "30000002"},
        T | {"stay_id": "3000000x"},
        T | {"stay_id": "30000003", "chiefcomplaint": "x" * 1_001},
    ]
    edstays = [E, *(E | {"stay_id": f"3000000{i}"} for i in (2, 3, 4)), E | {"stay_id": "-5"}]
    found = loaded(published(tmp_path, triage, edstays))
    assert [case.id for case in found.cases] == ["stay-30000002"]
    assert reasons(found) == {
        ("unknown_stay", ""): (1, (2,)),
        ("other_patient", ""): (1, (3,)),
        ("bad_id", ""): (1, (5,)),
        ("long_narrative", ""): (1, (6,)),
        ("no_triage", ""): (1, (5,)),
        ("unreadable", ""): (1, (6,)),
    }
    assert found.row_count == 5


def test_a_stay_twice_is_refused_in_either_file(tmp_path: Path) -> None:
    other = {"stay_id": "30000002"}
    with pytest.raises(UserError, match=r"triage.csv.gz:4: stay_id 30000001 was already used in line 2"):
        loaded(published(tmp_path, [T, T | other, T], [E, E | other]))
    with pytest.raises(UserError, match=r"edstays.csv.gz:4: stay_id 30000001 was already used in line 2"):
        loaded(published(tmp_path, [T], [E, E | other, E]))
    with pytest.raises(UserError, match=r"patients.csv.gz:3: subject_id 10000001 was already used in line 2"):
        loaded(published(tmp_path, [T], [E], [P, P]))


def test_fields_more_or_fewer_than_the_header(tmp_path: Path) -> None:
    name = published(tmp_path)
    rows = as_csv(TRIAGE, [T]) + b"\n" + b"10000001,30000002,98\n" + b",".join([b"1"] * 12) + b"\n"
    (tmp_path / "triage.csv.gz").write_bytes(rows)
    assert reasons(loaded(name)) == {("ragged", ""): (2, (4, 5))}


def test_a_stray_quotation_mark_brings_no_other_row_into_a_prompt(tmp_path: Path) -> None:
    stays = [f"3000000{i}" for i in range(1, 6)]
    name = published(tmp_path, edstays=[E | {"stay_id": stay} for stay in stays])
    rows = as_csv(TRIAGE, [T | {"stay_id": stay, "chiefcomplaint": "PAIN"} for stay in stays]).decode().splitlines()
    rows[2], rows[4] = rows[2].replace("PAIN", '"PAIN'), rows[4].replace("PAIN", 'PAIN"')
    (tmp_path / "triage.csv.gz").write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = loaded(name)
    assert [record.case.id for record in found.rows] == ["stay-30000001", "stay-30000005"]
    assert [reason for reason, _ in reasons(found)] == ["line_break", "no_triage"]
    with pytest.raises(UserError, match="a stray quotation mark may have hidden rows"):
        loaded(name, strict=True)


def test_strict_refuses_faults_and_counts_them(tmp_path: Path) -> None:
    other = [{"stay_id": f"3000000{i}"} for i in range(2, 6)]
    edstays = [E, *(E | ids for ids in other)]
    triage = [T, T | other[0] | {"acuity": ""}, T | other[1] | {"o2sat": "999"}, T | other[2] | {"acuity": "NA"}]
    triage += [T | other[3] | {"pain": "uta"}]
    name = published(tmp_path, triage, edstays)
    assert [case.id[-1] for case in loaded(name).cases] == ["1", "3", "5"]
    with pytest.raises(UserError) as caught:
        loaded(name, strict=True)
    assert str(caught.value) == (
        f"{tmp_path}/triage.csv.gz:3: no acuity, so no gold level: dropped; strict refuses all 3: 2 × no acuity, so no "
        "gold level: dropped; 1 × o2sat a code for a missing value (negative, or all nines): omitted from the narrative"
    )
    assert len(loaded(published(tmp_path, [T, triage[4]], edstays), strict=True).cases) == 2  # notes are no faults
    with pytest.raises(UserError, match=r"contains no cases: 1 × no acuity.*\(triage.csv.gz, line 2\)"):
        loaded(published(tmp_path, [T | {"acuity": ""}]))


def test_where_the_files_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected triage.csv or triage.csv.gz in it"):
        loaded(str(tmp_path))
    (tmp_path / "ed").mkdir()
    (tmp_path / "hosp").mkdir()
    published(tmp_path / "ed", patients=None)
    (tmp_path / "hosp" / "patients.csv").write_bytes(as_csv(list(P), [P]))
    assert loaded(str(tmp_path)).cases[0].text == WHOLE
    (tmp_path / "triage.csv").write_bytes(as_csv(TRIAGE, [T]))
    with pytest.raises(UserError, match="keep one"):
        loaded(str(tmp_path))
    (tmp_path / "triage.csv").unlink()
    (tmp_path / "ed" / "edstays.csv.gz").unlink()
    with pytest.raises(UserError, match=r"expected edstays.csv or edstays.csv.gz in it"):
        loaded(str(tmp_path))


# --- damage --------------------------------------------------------------------------------------------------------

SECRET = "SECRET-COMPLAINT"
GOOD_CSV = as_csv(
    TRIAGE, [T | {"stay_id": str(30_000_000 + i), "chiefcomplaint": f"{SECRET} {i}"} for i in range(1, 400)]
)
GOOD_GZIP = gzip.compress(GOOD_CSV)
DAMAGE: dict[str, tuple[bytes, str]] = {
    "latin-1": (
        GOOD_CSV.replace(b"SECRET-COMPLAINT 2\n", b"SECRET-d\xe9j\xe0 vu\n"),
        r":3: not UTF-8 \(byte \d+ of the line\)",
    ),
    "utf-16": (GOOD_CSV.decode().encode("utf-16"), ":1: UTF-16, by its byte-order mark"),
    "NUL": (GOOD_CSV.replace(b"COMPLAINT 4\n", b"COMPL\0AINT\n"), ":5: contains a NUL byte"),
    "huge line": (GOOD_CSV + b"1," + b"9" * (MAX_LINE + 10), ":401: over 4,194,304 bytes without a line end"),
    "huge field": (
        GOOD_CSV + b'1,2,"' + b"SECRET " * 20_000 + b'"\n',
        ":401: not valid CSV from this row on: field larger",
    ),
    "open quote": (GOOD_CSV.replace(b"SECRET-COMPLAINT 7\n", b'"SECRET\n'), ":8: not valid CSV from this row on"),
    "stray quote": (GOOD_CSV.replace(b"SECRET-COMPLAINT 7\n", b'"SECRET" x\n'), ":8: not valid CSV from this row on"),
    "torn gzip": (GOOD_GZIP[: len(GOOD_GZIP) // 2], r":\d+: gzip truncated or damaged here"),
    "gzip without its end": (GOOD_GZIP[:-8], r":\d+: gzip truncated or damaged here"),
    "flipped gzip": (
        GOOD_GZIP[:-6] + bytes([GOOD_GZIP[-6] ^ 255]) + GOOD_GZIP[-5:],
        r":\d+: gzip truncated or damaged here",
    ),
    "broken deflate": (GOOD_GZIP[:60] + b"\xff" * 40 + GOOD_GZIP[100:], r":\d+: gzip truncated or damaged here"),
    "empty": (b"", ":1: empty: expected a header with subject_id"),
    "lone CR": (GOOD_CSV.replace(b"SECRET-COMPLAINT 7\n", b"SECRET\rX\n"), ":8: not valid CSV from this row on"),
}


@pytest.mark.parametrize(("content", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, content: bytes, says: str) -> None:
    stays = [E | {"stay_id": str(30_000_000 + i)} for i in range(1, 400)]
    name = published(tmp_path, edstays=stays)
    (tmp_path / "triage.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"triage\.csv\.gz" + says) as caught:
        loaded(name)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_line_without_end_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "small-on-disk.csv.gz"
    path.write_bytes(gzip.compress(b"9" * (16 * MAX_LINE), 1))
    tracemalloc.start()
    with pytest.raises(UserError, match=r":1: over 4,194,304 bytes"):
        load_cases("mietic-validate", str(path), strict=False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 * MAX_LINE


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    name = published(tmp_path)
    (tmp_path / "triage.csv.gz").write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + as_csv(TRIAGE, [T]).replace(b"\n", b"\r\n"))
    )
    assert loaded(name).cases[0].text == WHOLE


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for loader in ("jsonl", "mietic-validate"):
        with pytest.raises(UserError, match="missing: cannot be read: No such file"):
            load_cases(loader, str(tmp_path / "missing"), strict=False)
        with pytest.raises(UserError, match="cannot be read: expected a file, found a folder"):
            load_cases(loader, str(tmp_path), strict=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), loader=st.sampled_from(sorted(LOADERS)))
def test_any_one_wrong_byte_is_read_or_refused(tmp_path: Path, place: int, byte: int, loader: str) -> None:
    """Nothing but UserError ever leaves a loader."""
    sound = {
        "jsonl": b'{"id": "a", "text": "SECRET", "esi": 2}\n{"id": "b", "text": "SECRET", "esi": 3, "tags": ["x"]}\n',
        "mietic-validate": validate_file([sample(1), sample(2)]),
        "mimic-iv-ed": gzip.compress(as_csv(TRIAGE, [T]), mtime=0),
    }[loader]
    content = bytearray(sound)
    content[place % len(content)] = byte
    if loader == "mimic-iv-ed":
        name = published(tmp_path)
        (tmp_path / "triage.csv.gz").write_bytes(bytes(content))
    else:
        name = str(tmp_path / "file")
        Path(name).write_bytes(bytes(content))
    try:
        for row in LOADERS[loader](name):
            assert isinstance(row, CaseRow | RowNote)
            assert not isinstance(row, RowNote) or "SECRET" not in row.detail + str(REASONS[row.reason])
    except UserError as error:
        assert str(tmp_path) in str(error)


# --- JSONL ---------------------------------------------------------------------------------------------------------

CASE = {"id": "a", "text": f"A {SECRET}.", "esi": 2}


def jsonl(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows))
    return str(path)


def test_jsonl_counts_what_it_drops(tmp_path: Path) -> None:
    name = jsonl(tmp_path, CASE, "{", "[1]", {**CASE, "id": "b", "esi": 9}, "", {**CASE, "id": "c"}, {"id": "d"})
    found = load_cases("jsonl", name, strict=False)
    assert [case.id for case in found.cases] == ["a", "c"]
    assert {reason: finding for (reason, _), finding in reasons(found).items()} == {
        "not_json": (1, (2,)),
        "not_an_object": (2, (3, 7)),
        "bad_field": (1, (4,)),
    }
    assert found.row_count == 6
    with pytest.raises(UserError, match=r"cases.jsonl:2: not valid JSON: .*; strict refuses all 4: 1 × not valid JSON"):
        load_jsonl_cases(name)


def test_jsonl_knows_patients(tmp_path: Path) -> None:
    name = jsonl(tmp_path, {**CASE, "patient": "p1"}, {**CASE, "id": "b", "patient": 17}, {**CASE, "id": "c"})
    assert [record.patient for record in load_cases("jsonl", name, strict=True).rows] == ["p1", "17", ""]
    with pytest.raises(UserError, match="patient of case 'a' must be"):
        load_jsonl_cases(jsonl(tmp_path, {**CASE, "patient": ["p"]}))


@pytest.mark.parametrize(
    "esi", ["SECRET narrative in the wrong field", ["SECRET narrative"], {"a": "SECRET narrative"}]
)
def test_a_narrative_in_the_wrong_field_is_not_shown(tmp_path: Path, esi: object) -> None:
    with pytest.raises(UserError, match=r"esi of case 'a' must be an integer from 1 to 5, got a \w+") as caught:
        load_jsonl_cases(jsonl(tmp_path, {**CASE, "esi": esi}))
    assert "SECRET" not in str(caught.value)


def test_a_number_of_too_many_digits_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1: not valid JSON: a whole number of more than 64 bits"):
        load_jsonl_cases(jsonl(tmp_path, '{"id": "a", "text": "x", "esi": ' + "1" * 5_000 + "}"))


# --- MIETIC --------------------------------------------------------------------------------------------------------


def sample(i: int, **changed: str) -> dict[str, str]:
    row = dict.fromkeys(VALIDATE, "LEAK") | dict.fromkeys(
        ("temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp"), "90"
    )
    row |= {
        "subject_id": str(10_000_000 + i),
        "stay_id": str(30_000_000 + i),
        "acuity": "2",
        "Final Decision": "RETAIN",
    }
    return row | {"tiragecase": f"Patient {i},\nwith a second line."} | changed


def validate_file(rows: Sequence[Mapping[str, str]], first: str = "锘縮ubject_id") -> bytes:
    return as_csv(list(rows[0]), rows).replace(b"subject_id", first.encode(), 1)


LEVELS_36 = [1] * 14 + [2] * 11 + [3] * 5 + [4] * 4 + [5] * 2


def mietic_50() -> list[dict[str, str]]:
    """The published shape: 36 retained with the published levels, 11 of them without a vital sign; 14 not retained."""
    rows = [sample(i, acuity=str(level)) for i, level in enumerate(LEVELS_36)]
    for i in range(11):
        rows[3 * i] |= {("o2sat", "temperature", "sbp")[i % 3]: ""}
    rows += [sample(100 + i, **{"Final Decision": decision}) for i, decision in enumerate(["REMOVE"] * 13 + [""])]
    random.Random(0).shuffle(rows)
    return rows


def test_mietic_36_with_all_its_quirks(tmp_path: Path) -> None:
    rows = mietic_50()
    path = tmp_path / "MIETIC-validate-samples.csv"
    path.write_bytes(validate_file(rows))
    found = load_cases("mietic-validate", str(path), strict=True)
    kept = [row for row in rows if row["Final Decision"] == "RETAIN"]
    assert [(r.case.id, r.case.text, r.case.gold_level, r.patient) for r in found.rows] == [
        (f"mietic-{row['stay_id']}", row["tiragecase"], int(row["acuity"]), row["subject_id"]) for row in kept
    ]
    assert Counter(case.gold_level for case in found.cases) == {1: 14, 2: 11, 3: 5, 4: 4, 5: 2}
    assert sum(case.tags == ("lacks_vital",) for case in found.cases) == 11
    assert "LEAK" not in repr(found.rows)
    assert found.row_count == 50
    counts = {reason: count for (reason, _), (count, _) in reasons(found).items()}
    assert counts == {"not_retained": 14, "no_vital": 11}
    first_removed = next(
        2 + 2 * i for i, row in enumerate(rows) if row["Final Decision"] != "RETAIN"
    )  # two lines a row
    assert reasons(found)["not_retained", ""][1][0] == first_removed


@pytest.mark.parametrize(
    "first", ["subject_id", "\ufeffsubject_id", "锘縮ubject_id", "ï»¿subject_id", "\ufeff锘縮ubject_id"]
)
def test_the_byte_order_mark_of_mietic_whatever_became_of_it(tmp_path: Path, first: str) -> None:
    (tmp_path / "f.csv").write_bytes(validate_file([sample(1)], first))
    assert load_cases("mietic-validate", str(tmp_path / "f.csv"), strict=False).rows[0].patient == "10000001"


def test_names_differ_in_nothing_but_blanks_and_case() -> None:
    assert {plain_name(name) for name in ("Final Decision", " final_decision ", "FINAL  DECISION")} == {
        "final_decision"
    }
    assert plain_name("锘库final") != "final"  # not a mark: untouched


def test_mietic_may_correct_its_spelling_and_lose_its_stay_ids(tmp_path: Path) -> None:
    rows = [sample(1), sample(2, **{"Final Decision": "REMOVE"}), sample(3, **{"Final Decision": " retain "})]
    rows = [{("triagecase" if k == "tiragecase" else k): v for k, v in row.items() if k != "stay_id"} for row in rows]
    (tmp_path / "f.csv").write_bytes(validate_file(rows))
    found = load_cases("mietic-validate", str(tmp_path / "f.csv"), strict=True)
    assert [case.id for case in found.cases] == ["mietic-row-000001", "mietic-row-000003"]
    assert {reason for reason, _ in reasons(found)} == {"not_retained", "not_published"}


def test_a_row_set_aside_without_a_patient_is_a_fault(tmp_path: Path) -> None:
    removed = {"Final Decision": "REMOVE"}
    rows = [
        sample(1),
        sample(2, **removed),
        sample(3, **removed, subject_id="bad"),
        sample(4, **removed, subject_id=""),
    ]
    (tmp_path / "f.csv").write_bytes(validate_file(rows))
    found = reasons(load_cases("mietic-validate", str(tmp_path / "f.csv"), strict=False))
    assert (found["not_retained", ""][0], found["bad_id", ""][0]) == (1, 2)


def test_bad_rows_of_mietic(tmp_path: Path) -> None:
    rows = [
        sample(1),
        sample(2, acuity=""),
        sample(3, acuity="Critical"),
        sample(4, tiragecase=" "),
        sample(5, subject_id="x"),
    ]
    path = tmp_path / "f.csv"
    path.write_bytes(validate_file(rows))
    found = load_cases("mietic-validate", str(path), strict=False)
    assert {reason: seen for (reason, _), seen in reasons(found).items() if reason != "not_published"} == {
        "no_acuity": (1, (4,)),
        "bad_acuity": (1, (6,)),
        "no_narrative": (1, (8,)),
        "bad_id": (1, (9,)),
    }
    with pytest.raises(UserError, match=r"f.csv:4: no acuity"):
        load_cases("mietic-validate", str(path), strict=True)
    path.write_bytes(validate_file([sample(1), sample(2), sample(1)]))
    with pytest.raises(UserError, match=r"f.csv:6: mietic-30000001 was already used in line 2"):
        load_cases("mietic-validate", str(path), strict=False)
    path.write_bytes(validate_file([{k: v for k, v in sample(1).items() if k not in ("acuity", "Final Decision")}]))
    with pytest.raises(UserError, match=r"f.csv:1: columns acuity, final_decision missing; found .*ubject_id, stay_id"):
        load_cases("mietic-validate", str(path), strict=False)


# --- the border ----------------------------------------------------------------------------------------------------


def test_a_run_reads_every_format(tmp_path: Path) -> None:
    path = tmp_path / "MIETIC-validate-samples.csv"
    path.write_bytes(validate_file(mietic_50()))
    overrides = ['cases.format="mietic-validate"', f'cases.train="{path}"', "evaluate.periodic={}"]
    config, _ = load_config("configs/tiny.toml", [*overrides, f'evaluate.before_and_after={{mietic="{path}"}}'])
    material = load_inputs(config)
    assert material.file_errors == () and material.cases is not None and len(material.cases) == 36
    config, _ = load_config("configs/tiny.toml", [*overrides, "evaluate.before_and_after={}", 'cases.format="jsonl"'])
    (fault,) = load_inputs(config).file_errors
    assert "not valid JSON" in fault


def test_every_reason_is_said_by_some_loader() -> None:
    """A kind of remark that nothing makes is a promise that nothing keeps."""
    sources = "".join(
        p.read_text(encoding="utf-8") for p in Path(mimic.__file__).parent.glob("*.py") if p.stem != "row_report"
    )
    assert {reason for reason in REASONS if f'"{reason}"' not in sources} == set()
