"""Case files and the order of training."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.cases import cases_for_step, load_cases, load_jsonl_cases, oversampled_indices, stable_seed
from grpo.runtime.errors import UserError
from grpo.types import Case

GOOD = {"id": "a", "text": "A 40-year-old with chest pain.", "esi": 2}


def written(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "cases.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def test_a_good_file(tmp_path: Path) -> None:
    name = written(tmp_path, GOOD, "", {**GOOD, "id": "b", "tags": ["child"], "outcome": "admitted"})
    first, second = load_jsonl_cases(name)
    assert first == Case("a", "A 40-year-old with chest pain.", 2)
    assert second.tags == ("child",) and "admitted" not in repr(second)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_jsonl_cases(str(path))[0].id == "a"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected an object"),
        ({"id": "a", "esi": 2}, "text missing"),
        ({**GOOD, "esi": 0}, "integer from 1 to 5, got 0"),
        ({**GOOD, "esi": 6}, "got 6"),
        ({**GOOD, "esi": 2.0}, "got 2.0"),
        ({**GOOD, "esi": True}, "got True"),
        ({**GOOD, "esi": "2"}, "got '2'"),
        ({**GOOD, "text": "  "}, "narrative of 1 to"),
        ({**GOOD, "text": "x" * 100_001}, "narrative of 1 to"),
        ({**GOOD, "text": "a\0b"}, "NUL"),
        ({**GOOD, "text": "a\ud800b"}, "surrogate"),
        ({**GOOD, "id": ""}, "id must be"),
        ({**GOOD, "id": "a\nb"}, "id must be"),
        ({**GOOD, "id": 7}, "id must be"),
        ({**GOOD, "tags": "child"}, "tags"),
        ({**GOOD, "tags": ["child", 7]}, "tags of case 'a' must be a list of names"),
        ({**GOOD, "tags": [""]}, "tags of case 'a' must be a list of names"),
        ({**GOOD, "tags": ["crushing chest pain"]}, "no blanks"),
        ({**GOOD, "tags": ["chest pain\n"]}, "no blanks"),
        ({**GOOD, "tags": ["chest_pain_" * 4]}, "at most 40 letters"),
        ({**GOOD, "tags": [f"t{i}" for i in range(21)]}, "expected at most 20, got 21"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_its_text_is_not_shown(tmp_path: Path, row: object, says: str) -> None:
    name = written(tmp_path, {**GOOD, "id": "first"}, row)
    with pytest.raises(UserError) as caught:
        load_jsonl_cases(name)
    assert f"{name}:2: " in str(caught.value) and says in str(caught.value)
    assert "chest pain" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2: id 'a' was already used in line 1"):
        load_jsonl_cases(written(tmp_path, GOOD, GOOD))
    with pytest.raises(UserError, match="contains no cases"):
        load_jsonl_cases(written(tmp_path, "", "  "))
    with pytest.raises(UserError, match="cannot be read"):
        load_jsonl_cases(str(tmp_path / "missing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe4"}')
    with pytest.raises(UserError, match=r"1: not UTF-8 \(byte 8"):
        load_jsonl_cases(str(tmp_path / "latin.jsonl"))


CASES = tuple(Case(f"c{i}", "...", 1 + i % 5) for i in range(10))


def test_oversampling_repeats_a_level() -> None:
    levels = Counter(CASES[i].gold_level for i in oversampled_indices(CASES, {1: 5, 3: 2}))
    assert levels == {1: 10, 2: 2, 3: 4, 4: 2, 5: 2}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 25))
def test_an_epoch_meets_every_case_once_whatever_the_step_size(seed: int, count: int) -> None:
    epoch = oversampled_indices(CASES, {1: 3})
    met = [case.id for step in range(40) for case in cases_for_step(CASES, epoch, seed=seed, step=step, count=count)]
    whole = len(met) // len(epoch) * len(epoch)
    for start in range(0, whole, len(epoch)):
        assert Counter(met[start : start + len(epoch)]) == Counter(CASES[i].id for i in epoch)


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    epoch = oversampled_indices(CASES, {})
    steps = [cases_for_step(CASES, epoch, seed=1, step=step, count=10) for step in range(3)]
    assert steps[0] != steps[1] != steps[2]
    assert steps[1] == cases_for_step(CASES, epoch, seed=1, step=1, count=10)
    assert steps[0] != cases_for_step(CASES, epoch, seed=2, step=0, count=10)


@given(st.lists(st.lists(st.one_of(st.integers(), st.text()), max_size=4), min_size=2, max_size=2, unique_by=repr))
def test_row_keys_of_different_parts_differ(parts: list[list[int | str]]) -> None:
    first, second = parts
    assert (stable_seed(*first) == stable_seed(*second)) == (first == second)


def test_a_name_can_bring_its_loader(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text('{"id": "a", "text": "Rash.", "esi": 5}\n', encoding="utf-8")
    assert load_cases("mimic-iv-ed", f"jsonl:{file}", strict=True).cases == load_jsonl_cases(str(file))
