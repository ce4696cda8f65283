"""Preparing training files: parts that share nobody, files that nobody else reads."""

import json
import os
import stat
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.cases import load_jsonl_cases
from grpo.commands.prepare import main, write
from grpo.data.row_report import CaseRow
from grpo.data.split import count_overlap, require_patients, split_by_patient
from grpo.runtime.errors import UserError
from grpo.types import Case

MIETIC = "subject_id,stay_id,acuity,tiragecase,Final Decision\n"


def record(i: int, patient: int, esi: int = 3, text: str = "") -> CaseRow:
    return CaseRow(Case(f"c{i}", text or f"Note {i} of a patient.", esi), f"p{patient}")


def cohort(size: int = 400) -> list[CaseRow]:
    """Two to three cases a patient, levels 1 to 5 as 1 : 2 : 4 : 2 : 1."""
    return [record(i, i * 7 % (size * 2 // 5), (1, 2, 2, 3, 3, 3, 3, 4, 4, 5)[i % 10]) for i in range(size)]


def file_of(tmp_path: Path, records: list[CaseRow], name: str = "cases.jsonl") -> str:
    path = tmp_path / name
    path.write_text(
        "".join(
            json.dumps({"id": r.case.id, "text": r.case.text, "esi": r.case.gold_level, "patient": r.patient}) + "\n"
            for r in records
        ),
        encoding="utf-8",
    )
    return str(path)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the parts -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(-(2**40), 2**40), share=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_no_patient_and_no_narrative_is_in_both_parts(seed: int, share: float) -> None:
    records = cohort()
    parts = split_by_patient(records, share=share, seed=seed)
    patients = [{r.patient for r in part} for part in (parts.train, parts.held_out)]
    texts = [{r.case.text for r in part} for part in (parts.train, parts.held_out)]
    assert not patients[0] & patients[1] and not texts[0] & texts[1]
    assert Counter(r.case.id for r in (*parts.train, *parts.held_out)) == Counter(r.case.id for r in records)
    assert not parts.held_out or abs(len(patients[1]) / 160 - share) < 0.25


def test_the_share_is_a_share_of_patients_on_average() -> None:
    records = [record(i, i) for i in range(2_000)]
    sizes = [len(split_by_patient(records, share=0.2, seed=seed).held_out) for seed in range(20)]
    assert abs(sum(sizes) / len(sizes) - 400) < 20 and len(set(sizes)) > 5  # σ of the mean is 4


def test_a_patients_part_depends_on_the_seed_alone() -> None:
    records = cohort()
    usual = {r.patient for r in split_by_patient(records, share=0.3, seed=5).held_out}
    shuffled = {r.patient for r in split_by_patient(records[::-1], share=0.3, seed=5).held_out}
    fewer = {r.patient for r in split_by_patient(records[:100], share=0.3, seed=5).held_out}
    more = {
        r.patient
        for r in split_by_patient([*records, *(record(i, i) for i in range(900, 990))], share=0.3, seed=5).held_out
    }
    assert usual == shuffled and fewer == usual & {r.patient for r in records[:100]}
    assert usual == more & {r.patient for r in records}
    assert usual != {r.patient for r in split_by_patient(records, share=0.3, seed=6).held_out}


def test_two_patients_of_one_narrative_do_not_carry_it_across() -> None:
    records = [record(i, i, text="A patient  came." if i % 2 else "a Patient CAME.") for i in range(50)]
    records += [record(i, i) for i in range(50, 100)]
    parts = split_by_patient(records, share=0.4, seed=0)
    assert count_overlap(parts.train, parts.held_out) == (0, 0)
    assert parts.repeated == 50 - sum(r.case.text.lower().startswith("a p") for r in parts.held_out) > 0


def test_excluded_patients_and_narratives_are_in_neither_part() -> None:
    records = cohort()
    excluded = [CaseRow(Case("x", "Another note.", 1), "p3"), CaseRow(Case("y", "note 17  of a PATIENT.", 1), "q")]
    gone = {r.case.id for r in records if r.patient == "p3"} | {"c17"}
    assert len(gone) >= 3
    parts = split_by_patient(records, share=0.3, seed=0, excluded=excluded)
    assert {r.case.id for r in records} - {r.case.id for r in (*parts.train, *parts.held_out)} == gone
    assert parts.excluded == len(gone)


def test_parts_that_would_be_empty_are_refused() -> None:
    with pytest.raises(UserError, match="the held-out part is empty: 3 of 3 cases remain"):
        split_by_patient([record(i, i) for i in range(3)], share=1e-9, seed=0)
    with pytest.raises(UserError, match="the training part is empty"):
        split_by_patient([record(i, i) for i in range(3)], share=0.999999999, seed=0)
    with pytest.raises(UserError, match="the training part is empty: 0 of 1 cases remain"):
        split_by_patient([record(0, 0)], share=0.0, seed=0, excluded=[record(0, 0)])


def test_a_case_without_a_patient() -> None:
    records = [record(0, 0), CaseRow(Case("b", "…", 2), "")]
    with pytest.raises(UserError, match=r"1 of 2 cases, the first 'b', have no patient"):
        require_patients(records, each_its_own=False)
    known, own = require_patients(records, each_its_own=True)
    assert known is records[0] and own.case is records[1].case and own.patient not in ("", "p0")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = file_of(tmp_path, cohort()), tmp_path / "out"
    assert main(["jsonl", source, "--out", str(out), "--held-out", "0.2", "--seed", "3"]) == 0
    train, held = rows(out / "train.jsonl"), rows(out / "held_out.jsonl")
    assert not {r["patient"] for r in train} & {r["patient"] for r in held}
    assert {r["id"] for r in (*train, *held)} == {r.case.id for r in cohort()}
    assert len(load_jsonl_cases(str(out / "train.jsonl"))) == len(train)
    said = capsys.readouterr().out
    table = {line[:16].strip(): line[16:].replace(",", "").split() for line in said.splitlines()}
    for name, part in (("training", train), ("held out", held)):
        levels = Counter(r["esi"] for r in part)
        counts = [*(levels[level] for level in range(1, 6)), len(part), len({r["patient"] for r in part})]
        assert table[name] == [str(count) for count in counts]
    before = Counter(r.case.gold_level for r in cohort())
    assert table["read"] == [*(str(before[level]) for level in range(1, 6)), "400", "160"]
    manifest = json.loads((out / "prepare.json").read_text())
    assert manifest["settings"]["seed"] == 3 and manifest["levels"]["training"]["1"] == int(table["training"][0])
    assert "leak      training and held out: 0 patients, 0 narratives in both" in said
    assert "Note" not in said and "Note" not in (out / "prepare.json").read_text()


def test_only_the_owner_reads_them(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        assert main(["jsonl", file_of(tmp_path, cohort()), "--out", str(tmp_path / "out"), "--held-out", "0.2"]) == 0
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(("train.jsonl", "held_out.jsonl", "prepare.json"), 0o600)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    source = file_of(tmp_path, cohort())
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        more = ["--held-out", "0.3", "--seed", seed]
        assert main(["jsonl", source, "--out", str(tmp_path / name), *more]) == 0
    for file in ("train.jsonl", "held_out.jsonl", "prepare.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_nothing_is_overwritten(tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    if there == "folder":
        out.mkdir()
    elif there == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    assert main(["jsonl", file_of(tmp_path, cohort()), "--out", str(out)]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert out.is_symlink() or (out.read_text() == "mine" if out.is_file() else not list(out.iterdir()))


def test_writing_itself_refuses_a_folder_that_exists_even_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="never overwritten"):
        write(tmp_path / "out", {"train.jsonl": ["x"]})
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_all_files_or_none(tmp_path: Path) -> None:
    def failing() -> object:
        yield "a first line"
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write(tmp_path / "out", {"a": ["x"], "b": failing()})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def mietic(tmp_path: Path) -> str:
    path = tmp_path / "mietic.csv"
    path.write_text(
        MIETIC + '7,70,2,"Seven,\nagain.",RETAIN\n8,80,1,Eight.,REMOVE\n9,90,3,Nine.,RETAIN\n', encoding="utf-8"
    )
    return str(path)


def test_any_format_goes_in_and_an_evaluation_set_stays_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mietic36"
    assert main(["mietic-validate", mietic(tmp_path), "--out", str(out)]) == 0
    assert "excluded  1 × not retained by the experts: excluded (mietic.csv, line 4)" in capsys.readouterr().out
    assert [(case.id, case.text, case.gold_level) for case in load_jsonl_cases(str(out / "train.jsonl"))] == [
        ("mietic-70", "Seven,\nagain.", 2),
        ("mietic-90", "Nine.", 3),
    ]
    assert not (out / "held_out.jsonl").exists()
    cases = [CaseRow(Case(f"s{i}", f"Note {i}.", 3), str(i % 12)) for i in range(60)]
    more = ["--held-out", "0.3", "--exclude", f"mietic-validate:{mietic(tmp_path)}"]
    assert main(["jsonl", file_of(tmp_path, cases), "--out", str(tmp_path / "out"), *more]) == 0
    left = {row["patient"] for name in ("train", "held_out") for row in rows(tmp_path / "out" / f"{name}.jsonl")}
    assert left == {str(i) for i in range(12)} - {"7", "8", "9"}
    said = capsys.readouterr().out
    assert "training and excluded: 0 patients, 0 narratives" in said and "removed   15 cases by --exclude" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--held-out", "0.2"], "have no patient"),
        (["--exclude", "jsonl:SAME"], "2 × not"),
        (["--strict"], "strict refuses all 2"),
        (["--exclude", "jsonl:missing"], "missing: cannot be read"),
    ],
)
def test_input_that_cannot_be_used_is_said_and_exits_with_2(
    tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"id": "a", "text": "SECRET", "esi": 2}\n{"id": "b"}\n[]\n')
    more = [argument.replace("SAME", str(path)) for argument in more]
    assert main(["jsonl", str(path), "--out", str(tmp_path / "out"), *more]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert shown.out == "" and "SECRET" not in shown.err and not (tmp_path / "out").exists()
    assert main(["jsonl", str(path), "--out", str(tmp_path / "out")]) == 0  # without a split nobody need be known


@pytest.mark.parametrize(
    "more",
    [
        ["--held-out", "1"], ["--held-out", "-0.1"], ["--held-out", "nan"],
        ["--exclude", "parquet:x"], ["--seed", "x"],
    ],
)  # fmt: skip
def test_arguments_out_of_range_exit_with_2(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["jsonl", file_of(tmp_path, cohort()), "--out", str(tmp_path / "out"), *more])
    assert caught.value.code == 2


def test_preparing_imports_no_torch() -> None:
    code = "import sys, grpo.commands.prepare; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "set()"


def test_every_patient_keeps_all_cases_together() -> None:
    parts = split_by_patient(cohort(), share=0.4, seed=9)
    seen = defaultdict(set)
    for name, part in (("train", parts.train), ("held out", parts.held_out)):
        for r in part:
            seen[r.patient].add(name)
    assert set(map(len, seen.values())) == {1} and len(seen) == 160


def test_an_interrupted_preparation_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    source = file_of(tmp_path, cohort())
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("grpo.commands.prepare._to_json", stopped)  # while the files are written
    assert main(["jsonl", source, "--out", str(tmp_path / "out")]) == 130
    assert sorted(tmp_path.iterdir()) == before and "nothing was written" in capsys.readouterr().err
