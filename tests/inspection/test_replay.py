"""A run replays to the bit; one byte, one reward, one advantage or one metric that is not what it was is named."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grpo.commands.replay import main
from grpo.inspection.bit_diff import array_differences, relative_distance, same_bits
from grpo.inspection.counterfactual import counterfactual
from grpo.inspection.replay import TEXT_METRICS, TIMING_PREFIXES, is_copied, replay_step
from grpo.inspection.run_reader import read_recorded_run
from grpo.run.ledger import TRAINER_ONLY_METRICS, LedgerStep, read_step
from rewards import Answer, FiredRule, load_reward
from tests.support.recorded_runs import recorded, rewritten


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.getbasetemp(), "plain")


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.getbasetemp(), "rich")


@pytest.fixture
def copy(rich: Path, tmp_path: Path) -> Path:
    return shutil.copytree(rich, tmp_path / "copy")


def replay(run: Path, *more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(run), *more])
    return code, out.getvalue(), err.getvalue()


def found(run: Path, *more: str) -> list[dict[str, Any]]:
    """The differences of a run that is not what it was."""
    code, out, _ = replay(run, "--json", *more)
    record = json.loads(out)
    assert (code, record["equal"]) == ((1, False) if record["differences"] else (0, True))
    return record["differences"]


def edit_json(file: Path, edit: Callable[[Any], Any]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def edit_lines(file: Path, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    lines = edit([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- honest runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "rich"])
@pytest.mark.parametrize("text", ["full", "redacted", "off"])
def test_an_honest_run_is_equal_at_every_step(plain: Path, rich: Path, tmp_path: Path, kind: str, text: str) -> None:
    run = {"plain": plain, "rich": rich}[kind]
    if text != "full":
        run = rewritten(run, tmp_path / "run", text=text)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line["completions/tokens"] for line in lines)
    names = {name for line in lines for name in line if not name.startswith(TIMING_PREFIXES) and name != "step"}
    again = len(names) - len([name for name in names if is_copied(name, text)])
    code, out, err = replay(run)
    *notes, last = out.splitlines()
    assert (code, err) == (0, "")
    said = (
        f"replayed 3 steps, 24 completions, {tokens:,.0f} tokens: every reward, advantage, loss term and {again} "
        "metrics equal, bit for bit "
    )
    assert last.startswith(said) and re.fullmatch(r"\(\d+\.\d s\)", last.removeprefix(said))
    assert all(note.startswith("not checked  ") for note in notes)
    assert ("ledger.text" in out) == (text != "full") and all(name in out for name in TEXT_METRICS[text])
    assert found(run) == [] and found(run, "--step", "2") == []


def test_the_rich_run_meets_what_it_is_for(rich: Path) -> None:
    entries = [read_step(rich / "ledger", number) for number in (1, 2, 3)]
    assert all(len(entry.step.logprobs.logprobs) == 2 for entry in entries)
    assert {group.prompt.thinking for group in entries[0].step.groups} == {True, False}
    assert any(entry.step.replaced_groups for entry in entries)
    assert {-1, 1} <= {int(side) for entry in entries for side in entry.account.clip_side.unique()}
    assert any(
        -0.25 < p < 0 for entry in entries for row in entry.step.scores for s in row for p in [s.parts["overlong"]]
    )
    assert any((entry.step.batch.token_weights[:, 0] == 0).any() for entry in entries)
    assert any(not entry.step.batch.baseline_mask.all() for entry in entries)


def test_a_recorded_step_is_what_its_texts_say(rich: Path) -> None:
    """The first rewards of the chain, by hand: what v49 gives to a level or to none, and the overlong slope."""
    entry = read_step(rich / "ledger", 1)
    for group, row in zip(entry.step.groups, entry.step.scores, strict=True):
        for completion, score in zip(group.completions, row, strict=True):
            said = re.findall(r"ANSWER: ESI (\d)", completion.text.rpartition("</think>")[2])
            slope = -0.25 * max(0, len(completion.ids) - 60) / 12
            if not said:
                assert score.total == pytest.approx(-2 + slope)
            elif said[-1] == str(group.prompt.case.gold_level):
                assert score.total == pytest.approx(1 + slope + score.parts["lifesaving_obeyed"])


# --- one byte ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(rich: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose bytes are changed and put back."""
    return shutil.copytree(rich, tmp_path_factory.mktemp("bytes") / "run")


@pytest.mark.parametrize("name", ["index.jsonl", "step_000002.jsonl", "step_000002.safetensors"])
def test_any_byte_of_the_ledger_that_changes_is_named(victim: Path, name: str) -> None:
    file = victim / "ledger" / name
    whole = file.read_bytes()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    @example(0.0, 1)
    @example(1 - 2**-30, ord("\n") ^ ord(" "))
    @example(1 - 2**-30, ord("\n") ^ ord("0"))
    def changed(place: float, flip: int) -> None:
        at = int(place * len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        try:
            code, out, err = replay(victim, *(() if name == "index.jsonl" else ("--step", "2")))
        finally:
            file.write_bytes(whole)
        said = out + err
        assert "Traceback" not in said
        if name == "index.jsonl":  # the hashes themselves: what they speak of is named, or the line that cannot be read
            altered = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
            assert code in (1, 2) or [*map(json.loads, altered.splitlines())] == [*map(json.loads, whole.splitlines())]
            assert code == 0 or "step_00000" in said or "index.jsonl" in said
        else:
            assert code == 1 and name in said and "changed since" in said

    changed()
    assert replay(victim)[0] == 0


def test_a_file_that_can_no_longer_be_read_is_a_difference_and_the_other_steps_are_replayed(copy: Path) -> None:
    (copy / "ledger" / "step_000002.safetensors").write_bytes(b"torn")
    (difference,) = found(copy)
    assert difference["step"] == 2 and difference["replayed"] == "unreadable"
    assert "step_000002.safetensors: cannot be read" in difference["where"] and "changed since" in difference["where"]
    assert json.loads(replay(copy, "--json")[1])["completions"] == 16


# --- one value, written down with its sha256 --------------------------------------------------------------


def with_score(entry: LedgerStep, b: int, g: int, **changes: Any) -> LedgerStep:
    scores = [list(row) for row in entry.step.scores]
    scores[b][g] = dataclasses.replace(scores[b][g], **changes)
    return dataclasses.replace(entry, step=dataclasses.replace(entry.step, scores=tuple(map(tuple, scores))))


def with_batch(entry: LedgerStep, name: str, row: int, value: float | bool) -> LedgerStep:
    tensor = getattr(entry.step.batch, name).clone()
    tensor[row] = value
    batch = dataclasses.replace(entry.step.batch, **{name: tensor})
    return dataclasses.replace(entry, step=dataclasses.replace(entry.step, batch=batch))


def with_account(entry: LedgerStep, name: str, at: tuple[int, int], value: Callable[[float], float]) -> LedgerStep:
    tensor = getattr(entry.account, name).clone()
    tensor[at] = value(tensor[at].item())
    return dataclasses.replace(entry, account=dataclasses.replace(entry.account, **{name: tensor}))


def up(value: float) -> float:
    return math.nextafter(value, math.inf)


FORGERIES: dict[str, tuple[Callable[[LedgerStep], LedgerStep], str]] = {
    "reward": (lambda e: with_score(e, 1, 2, total=0.5), "safetensors: rewards"),
    "component": (
        lambda e: with_score(e, 1, 2, parts={**e.step.scores[1][2].parts, "no_parse": -1.0}),
        "safetensors: components[no_parse]",
    ),
    "predicted": (
        lambda e: with_score(e, 1, 2, answer=dataclasses.replace(e.step.scores[1][2].answer, level=1)),
        "safetensors: predicted",
    ),
    "reason": (lambda e: with_score(e, 1, 2, answer=Answer(None, "range", None)), "jsonl: reason"),
    "span": (
        lambda e: with_score(e, 1, 2, answer=dataclasses.replace(e.step.scores[1][2].answer, span=(0, 3))),
        "jsonl: span",
    ),
    "fired": (lambda e: with_score(e, 1, 2, fired=(FiredRule("open_injury_missed", (0, 3), -0.5),)), "jsonl: fired"),
    "timed_out": (lambda e: with_score(e, 1, 2, timed_out=True), "jsonl: timed_out"),
    "in_baseline": (
        lambda e: with_batch(e, "baseline_mask", 6, not e.step.batch.baseline_mask[6]),
        "safetensors: in_baseline",
    ),
    "advantage": (
        lambda e: with_batch(e, "advantages", 6, up(float(e.step.batch.advantages[6]))),
        "safetensors: advantages",
    ),
    "token weight": (lambda e: with_batch(e, "token_weights", 6, 0.25), "safetensors: token_weights"),
    "ratio": (lambda e: with_account(e, "ratio", (1, 5), up), "safetensors: ratio"),
    "clip": (lambda e: with_account(e, "clip_side", (1, 5), lambda side: 1 - abs(side)), "safetensors: clip"),
    "kl": (lambda e: with_account(e, "kl", (1, 5), up), "safetensors: kl"),
    "loss": (lambda e: with_account(e, "loss", (1, 5), up), "safetensors: loss"),
    "share": (
        lambda e: dataclasses.replace(e, shares={**e.shares, "outcome": e.shares["outcome"] + np.eye(2, 4)}),
        "safetensors: shares[outcome]",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_one_forged_value_is_found_by_computing_it_again(rich: Path, tmp_path: Path, name: str) -> None:
    edit, where = FORGERIES[name]
    run = rewritten(rich, tmp_path / "run", edit, step=3)
    differences = found(run)
    assert {one["where"] for one in differences} >= {f"ledger/step_000003.{where}"}
    assert len(differences) == (2 if name == "share" else 1), differences
    assert all(one["step"] == 3 for one in differences)
    rows = {"ratio", "clip", "kl", "loss"}
    assert all("member " in one["at"] and ("token 5" in one["at"]) == (name in rows) for one in differences)
    if name in ("ratio", "kl", "loss"):
        assert 0 < differences[0]["relative"] < 3e-16 and "(relative " in replay(run)[1]
    if name in rows:
        assert "inner epoch 2" in differences[0]["at"] and "group 0 (case c" in differences[0]["at"]


@pytest.mark.parametrize("text", ["redacted", "off"])
@pytest.mark.parametrize("name", ["reward", "advantage", "loss", "component"])
def test_a_forged_value_is_found_without_the_texts(rich: Path, tmp_path: Path, text: str, name: str) -> None:
    edit, where = FORGERIES[name]
    run = rewritten(rich, tmp_path / "run", edit, step=3, text=text)
    assert f"ledger/step_000003.{where}" in {one["where"] for one in found(run)}


def test_a_forged_input_is_found_by_what_follows_from_it(rich: Path, tmp_path: Path) -> None:
    def other_answer(entry: LedgerStep) -> LedgerStep:
        groups = list(entry.step.groups)
        said = groups[1].completions[1]
        forged = dataclasses.replace(said, text=said.text.replace("ANSWER: ESI 3", "ANSWER: ESI 1"))
        assert forged.text != said.text
        completions = (groups[1].completions[0], forged, *groups[1].completions[2:])
        groups[1] = dataclasses.replace(groups[1], completions=completions)
        return dataclasses.replace(entry, step=dataclasses.replace(entry.step, groups=tuple(groups)))

    def other_logprob(entry: LedgerStep) -> LedgerStep:
        logprobs = entry.step.logprobs.logprobs.clone()
        logprobs[1, 7] -= 0.25
        tokens = dataclasses.replace(entry.step.logprobs, logprobs=logprobs)
        return dataclasses.replace(entry, step=dataclasses.replace(entry.step, logprobs=tokens))

    changed = {one["where"] for one in found(rewritten(rich, tmp_path / "text", other_answer, step=3))}
    assert {"ledger/step_000003.safetensors: predicted", "metrics.jsonl: reward/mean"} <= changed
    assert "ledger/step_000003.safetensors: kl" not in changed
    moved = {one["where"] for one in found(rewritten(rich, tmp_path / "logprob", other_logprob, step=3))}
    assert {"ledger/step_000003.safetensors: ratio", "metrics.jsonl: ratio"} <= moved
    assert "ledger/step_000003.safetensors: advantages" not in moved


def test_a_record_that_is_no_step_at_all_is_a_difference(rich: Path, tmp_path: Path) -> None:
    def no_number(entry: LedgerStep) -> LedgerStep:
        return with_score(with_batch(entry, "advantages", 0, math.nan), 0, 0, total=math.nan)

    run = rewritten(rich, tmp_path / "run", no_number, step=1, text="off")
    assert any("nan" in one["logged"] for one in found(run))
    entry = read_step(rich / "ledger", 1)
    case = dataclasses.replace(entry.step.groups[0].prompt.case, gold_level=9)
    group = dataclasses.replace(
        entry.step.groups[0], prompt=dataclasses.replace(entry.step.groups[0].prompt, case=case)
    )
    forged = dataclasses.replace(entry, step=dataclasses.replace(entry.step, groups=(group, *entry.step.groups[1:])))
    recording = read_recorded_run(rich)
    (difference,) = replay_step(forged, recording.config, recording.reward, recording.logged[1])
    assert "gold ESI level from 1 to 5, got 9" in difference.replayed


# --- one metric -------------------------------------------------------------------------------------------


def test_only_three_metrics_are_taken_on_trust() -> None:
    assert TRAINER_ONLY_METRICS == ("loss/trained", "grad_norm", "skipped") and TIMING_PREFIXES == (
        "time/",
        "tokens_per_s/",
        "roofline/",
        "memory/",
    )
    assert TEXT_METRICS["full"] == () and len(TEXT_METRICS["redacted"]) == 2 and len(TEXT_METRICS["off"]) == 4


def recomputed_names(run: Path) -> list[str]:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    return [name for name in line if name != "step" and not name.startswith(TIMING_PREFIXES)]


def moved(value: Any) -> Any:
    return 0.125 if value is None else value + 1 if isinstance(value, int) else up(value)


def test_every_metric_that_changes_in_its_last_bit_is_named(victim: Path) -> None:
    file = victim / "metrics.jsonl"
    whole = file.read_text()
    names = recomputed_names(victim)
    assert len(names) > 60
    try:
        edit_lines(file, lambda lines: [lines[0], {**lines[1], **{n: moved(lines[1][n]) for n in names}}, lines[2]])
        differences = found(victim)
    finally:
        file.write_text(whole)
    assert [one["where"] for one in differences] == [f"metrics.jsonl: {name}" for name in names]
    assert all(one["step"] == 2 for one in differences)
    moved_floats = [d for d in differences if "." in d["replayed"] and d["logged"] != "0.125"]
    assert all(d["relative"] < 3e-16 or d["replayed"] == "0.0" for d in moved_floats)


def test_a_metric_forged_in_both_copies_is_found_by_computing_it_again(rich: Path, tmp_path: Path) -> None:
    names = recomputed_names(rich)
    run = rewritten(rich, tmp_path / "run", step=2, metrics=lambda m: {**m, **{n: moved(m[n]) for n in names}})
    again = [name for name in names if name not in TRAINER_ONLY_METRICS]
    copies = ("ledger/step_000002.jsonl", "metrics.jsonl")
    assert [one["where"] for one in found(run)] == [f"{file}: {name}" for file in copies for name in again]


@pytest.mark.parametrize("name", TRAINER_ONLY_METRICS)
def test_what_no_formula_gives_is_held_against_its_copy(copy: Path, name: str) -> None:
    edit_lines(copy / "metrics.jsonl", lambda lines: [{**line, name: 7} for line in lines])
    assert [(one["step"], one["where"], one["logged"]) for one in found(copy)] == [
        (step, f"metrics.jsonl: {name}", "7") for step in (1, 2, 3)
    ]


def test_a_metric_too_many_or_too_few_is_named(copy: Path) -> None:
    def edit(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        del lines[0]["entropy"]
        lines[2]["reward/luck"] = 0.5
        return lines

    edit_lines(copy / "metrics.jsonl", edit)
    first, second = found(copy)
    assert (first["where"], first["logged"]) == ("metrics.jsonl: entropy", "absent")
    assert (second["where"], second["replayed"]) == ("metrics.jsonl: reward/luck", "absent")


def test_what_was_kept_out_is_held_against_its_copy(rich: Path, tmp_path: Path) -> None:
    run = rewritten(rich, tmp_path / "run", text="off")
    name = "completions/no_parse/unclosed_thinking"
    edit_lines(run / "metrics.jsonl", lambda lines: [{**line, name: 0.875} for line in lines])
    assert {one["where"] for one in found(run)} == {f"metrics.jsonl: {name}"}


# --- steps that are missing, and files beside -------------------------------------------------------------


def test_a_line_of_the_metrics_that_is_missing_is_named(copy: Path) -> None:
    edit_lines(copy / "metrics.jsonl", lambda lines: [lines[0], lines[2]])
    assert [(one["step"], one["where"], one["logged"]) for one in found(copy)] == [
        (2, "metrics.jsonl", "no line"),
        (2, "metrics.jsonl", "no line"),
    ]


def test_a_step_that_the_ledger_should_hold_is_named(copy: Path) -> None:
    index = copy / "ledger" / "index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:2]))
    differences = found(copy)
    assert {one["where"] for one in differences} == {
        "ledger/step_000003.jsonl", "ledger/step_000003.safetensors", "ledger/index.jsonl",
    }  # fmt: skip
    assert [one["step"] for one in differences if one["where"] == "ledger/index.jsonl"] == [3]


def test_a_finished_run_that_is_too_short_is_named(copy: Path) -> None:
    from grpo.run.ledger import truncate_ledger

    truncate_ledger(copy / "ledger", step=2)
    edit_lines(copy / "metrics.jsonl", lambda lines: lines[:2])
    (difference,) = found(copy)
    assert (difference["logged"], "adapter/ exists" in difference["replayed"]) == ("2", True)
    shutil.rmtree(copy / "adapter")
    assert found(copy) == [] and "steps after 2 of 3: not trained yet" in replay(copy)[1]


def test_a_ledger_of_every_second_step_is_whole_and_its_gaps_are_said(copy: Path) -> None:
    edit_json(copy / "config.json", lambda record: record["config"]["ledger"].update(every=2))
    assert [(one["step"], one["logged"]) for one in found(copy)] == [(1, "a line"), (3, "a line")]
    index = copy / "ledger" / "index.jsonl"
    index.write_text(index.read_text().splitlines(keepends=True)[1])
    for number in (1, 3):
        for suffix in ("jsonl", "safetensors"):
            (copy / "ledger" / f"step_00000{number}.{suffix}").unlink()
    assert found(copy) == []
    assert "2 of 3 steps: in metrics.jsonl alone (ledger.every = 2)" in replay(copy)[1]


def test_another_reward_than_the_runs_is_named(copy: Path) -> None:
    edit_json(copy / "reward.json", lambda reward: reward["no_parse"].update(value=-3.0))
    where = {one["where"] for one in found(copy)}
    assert {
        "reward.json",
        "ledger/step_000001.safetensors: components[no_parse]",
        "metrics.jsonl: reward/mean",
    } <= where


# --- unreadable -------------------------------------------------------------------------------------------


def broken_runs() -> dict[str, tuple[Callable[[Path], object], str]]:
    return {
        "no run": (shutil.rmtree, "not a run folder"),
        "no config": (lambda run: (run / "config.json").unlink(), "not a run folder"),
        "torn config": (lambda run: (run / "config.json").write_text("{"), "config.json: not valid JSON"),
        "other config": (
            lambda run: edit_json(run / "config.json", lambda r: r["config"]["loss"].update(beta="much")),
            "config.json: loss.beta: ",
        ),
        "bare config": (lambda run: edit_json(run / "config.json", lambda r: r.pop("reward")), "no reward"),
        "no ledger": (lambda run: shutil.rmtree(run / "ledger"), "no ledger in this run"),
        "no reward": (lambda run: (run / "reward.json").unlink(), "reward.json"),
        "torn reward": (lambda run: (run / "reward.json").write_text("{"), "reward.json"),
        "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: cannot be read"),
        "torn metrics": (
            lambda run: (run / "metrics.jsonl").write_text("{\n{}\n"),
            "metrics.jsonl:1: not a line of metrics",
        ),
        "a last line of nothing": (
            lambda run: (run / "metrics.jsonl").open("a").write("{}\n"),
            "metrics.jsonl:4: not a line of metrics: no step",
        ),
        "a step twice": (
            lambda run: edit_lines(run / "metrics.jsonl", lambda lines: [*lines, lines[0]]),
            "metrics.jsonl:4: a second line for step 1",
        ),
        "a step's file gone": (
            lambda run: (run / "ledger" / "step_000001.jsonl").unlink(),
            "step_000001.jsonl: cannot be read",
        ),
    }


@pytest.mark.parametrize("name", broken_runs())
def test_what_cannot_be_read_is_one_clear_line_and_exit_code_2(copy: Path, name: str) -> None:
    breaks, says = broken_runs()[name]
    breaks(copy)
    code, out, err = replay(copy)
    assert (code, out) == (2, "") and err.startswith("error: ") and says in err and err.count("\n") == 1
    code, out, _ = replay(copy, "--json")
    assert code == 2 and says in json.loads(out)["error"]


def test_a_last_line_torn_by_a_crash_is_no_line(copy: Path) -> None:
    shutil.rmtree(copy / "adapter")
    file = copy / "metrics.jsonl"
    file.write_text(file.read_text()[:-40])
    assert [(one["step"], one["logged"]) for one in found(copy)] == [(3, "no line")]


def test_a_step_that_is_not_there_is_said(plain: Path) -> None:
    code, _, err = replay(plain, "--step", "9")
    assert code == 2 and "no step 9 in this ledger: it has steps 1 to 3" in err


# --- how far, and why -------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
@example(-0.0, 0.0)
@example(5e-324, -5e-324)
@example(1.7e308, -1.7e308)
def test_the_relative_distance_is_symmetric_and_bounded(a: float, z: float) -> None:
    distance = relative_distance(a, z)
    assert distance is not None and distance == relative_distance(z, a) and 0 <= distance <= 2
    assert (distance == 0) == (a == z)
    assert [relative_distance(1.0, other) for other in (None, math.nan, math.inf, "x", True, 10**400)] == [None] * 6


def test_arrays_are_compared_by_bits() -> None:
    def says(a: Any, z: Any) -> list[str]:
        return [str(one) for one in array_differences(1, "x", a, z, [("row", slice(0, 2))])]

    nan = np.array([math.nan, 0.0])
    assert says(nan, nan.copy()) == [] and says(None, None) == []
    assert says(nan, np.array([math.nan, -0.0])) == ["step 1: x, row, token 1: 0.0 → -0.0 (relative 0.0e+00)"]
    assert says(np.array([1.0, 2.0]), np.array([1, 2])) == ["step 1: x: float64 [2] → int64 [2]"]
    assert says(np.zeros(2), np.zeros(3)) == ["step 1: x: float64 [2] → float64 [3]"]
    assert says(torch.zeros(2), None) == ["step 1: x: present → absent"]
    assert same_bits(-0.0, 0.0) is False and same_bits([1, None], [1, None])


def test_a_difference_comes_with_the_versions_that_changed(rich: Path, tmp_path: Path) -> None:
    run = rewritten(rich, tmp_path / "run", FORGERIES["loss"][0], step=3)
    assert "changed since the training" not in replay(run)[1]
    edit_json(run / "config.json", lambda record: record["versions"].update(torch="1.0"))
    code, out, _ = replay(run)
    assert code == 1 and f"changed since the training: torch 1.0 → {torch.__version__.split('+')[0]}" in out


def test_many_differences_are_counted(rich: Path, tmp_path: Path) -> None:
    run = rewritten(rich, tmp_path / "run", metrics=lambda m: {k: v if k == "step" else moved(v) for k, v in m.items()})
    out = replay(run)[1]
    count = len(found(run))
    assert count > 300 and f"and {count - 20} more: " in out and f"{count} differences (" in out
    assert len([line for line in out.splitlines() if line.startswith("step ")]) == 20


def test_the_ledger_is_read_and_never_written(rich: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in rich.rglob("*")}
    replay(rich)
    replay(rich, "--reward", "v45c")
    assert {path: path.stat().st_mtime_ns for path in rich.rglob("*")} == before


# --- another reward ---------------------------------------------------------------------------------------


def test_the_runs_own_reward_changes_nothing(rich: Path) -> None:
    code, out, _ = replay(rich, "--reward", str(rich / "reward.json"), "--json")
    record = json.loads(out)
    rows = [row for step in record["steps"] for row in step["rows"]]
    assert code == 0 and len(rows) == 24
    assert all(row["reward_now"] == row["reward_then"] for row in rows)
    assert all(row["advantage_now"] == row["advantage_then"] for row in rows)
    assert not any(step["gained"] or step["lost"] or step["flips"] for step in record["steps"])


def test_the_advantages_under_another_reward_are_those_of_its_formula(plain: Path, tmp_path: Path) -> None:
    """Rewards by hand: 1 for exact, else 0 (v45c); advantage by loops."""
    recording = read_recorded_run(plain)
    for number in (1, 2, 3):
        entry = read_step(plain / "ledger", number)
        one = counterfactual(entry, recording.config, load_reward("v45c"))
        for b, group in enumerate(entry.step.groups):
            said = [re.findall(r"ANSWER: ESI (\d)", c.text.rpartition("</think>")[2]) for c in group.completions]
            rewards = [float(bool(found) and int(found[-1]) == group.prompt.case.gold_level) for found in said]
            mean = sum(rewards) / 4
            std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
            rows = [row for row in one.rows if row.group == b]
            assert [row.reward_then for row in rows] == rewards
            assert [row.advantage_then for row in rows] == pytest.approx([(r - mean) / (std + 1e-4) for r in rewards])
            assert [row.advantage_now for row in rows] == entry.advantages[b].tolist()
            pairs = [(row.flips, *sorted((row.advantage_now, row.advantage_then))) for row in rows]
            assert all(flips == (low < 0 < high) for flips, low, high in pairs)
            was, becomes = len(set(entry.rewards[b])) > 1, len(set(rewards)) > 1
            assert ((b in one.gained), (b in one.lost)) == (becomes and not was, was and not becomes)
    assert any(
        one for one in [counterfactual(read_step(plain / "ledger", 1), recording.config, load_reward("v45c")).lost]
    )


def test_a_reward_that_turns_things_round_flips_signs(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "silence.toml"
    file.write_text('name = "silence"\nabout = "pays for saying nothing"\nextends = "v49"\n[no_parse]\nvalue = 2.0\n'
                    'grade = "U"\nsource = "made up"\n')  # fmt: skip
    code, out, _ = replay(plain, "--reward", str(file), "--step", "2")
    assert code == 0
    assert len(re.findall(r" 1 +[0-3] +c5 .*flips$", out, re.MULTILINE)) == 4
    assert "4 change the sign of their advantage" in out and "reward v49 → silence, 1 step" in out
    assert re.search(r"^ {18}no_parse +[-+]\d\.\d{3} → +[-+]\d\.\d{3}$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80
    whole = replay(plain, "--reward", str(file))[1]
    assert "3 steps" in whole and "group member" not in whole and "\nstep 2      4 of 8 flip; " in f"\n{whole}"
    assert "step 1      0 of 8 flip; groups that gain, lose variance: 0, 1\n" in replay(plain, "--reward", "v45c")[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--reward", "v99"], "v99"),
        (["--reward", "nowhere.toml"], "nowhere.toml"),
        (["--reward", "v46", "--step", "8"], "no step 8"),
    ],
)
def test_another_reward_that_cannot_be_read_is_exit_code_2(plain: Path, more: list[str], says: str) -> None:
    code, out, err = replay(plain, *more)
    assert (code, out) == (2, "") and says in err


@pytest.mark.parametrize("way", [["--reward", "v46"], ["--model"]])
def test_without_texts_there_is_no_other_reward_and_no_model(plain: Path, tmp_path: Path, way: list[str]) -> None:
    run = rewritten(plain, tmp_path / "run", text="redacted")
    code, _, err = replay(run, *way)
    assert code == 2 and 'ledger.text = "redacted" omits' in err


# --- with the model ---------------------------------------------------------------------------------------


def test_the_model_gives_the_recorded_logprobs_to_the_bit(rich: Path) -> None:
    code, out, _ = replay(rich, "--model", "--json")
    record = json.loads(out)
    assert code == 0 and record["equal"] and record["model"]["dtype"] == "float32"
    for one in record["model"]["steps"]:
        assert one["reference"]["largest"] == 0.0 and one["misread"] == []
        assert (one["policy"] is None) == (one["step"] == 2), "checkpoints are kept of steps 2 and 3"
        assert one["policy"] is None or one["policy"]["largest"] == 0.0


def on_a_card(record: dict[str, Any]) -> None:
    record["config"]["model"]["device"] = "cuda"
    record["machine"]["device"] = "NVIDIA H200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_run_of_a_card_is_computed_on_a_cpu_when_asked(copy: Path) -> None:
    edit_json(copy / "config.json", on_a_card)
    code, _, err = replay(copy, "--model", "--step", "1")
    assert code == 2 and err.startswith('error: model.device = "cuda": no CUDA device here')
    code, out, _ = replay(copy, "--model", "--step", "1", "--device", "cpu", "--json")
    model = json.loads(out)["model"]
    assert code == 0 and model["device"] == "cpu"


def test_a_device_that_is_none_is_refused_by_the_command_line(rich: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        replay(rich, "--model", "--device", "gpu")
    assert ended.value.code == 2


def with_rounding(entry: LedgerStep) -> LedgerStep:
    ref = entry.step.logprobs.ref_logprobs
    assert ref is not None
    tokens = dataclasses.replace(entry.step.logprobs, ref_logprobs=ref + 1e-7 * torch.arange(ref.numel()).eq(3))
    return dataclasses.replace(entry, step=dataclasses.replace(entry.step, logprobs=tokens))


def test_a_difference_within_rounding_is_equal(rich: Path, tmp_path: Path) -> None:
    run = rewritten(rich, tmp_path / "run", with_rounding, step=1)
    edit_json(run / "config.json", lambda record: record["config"]["optim"].update(micro_batch_tokens="auto"))
    _, out, _ = replay(run, "--model", "--step", "1")
    assert re.search(r"reference +1 of 1 steps, .* max \|Δ logprob\| 1\.?\d*e-07", out)
    assert "exceeds the rounding tolerance" not in out


def with_other_reference(entry: LedgerStep) -> LedgerStep:
    ref = entry.step.logprobs.ref_logprobs
    assert ref is not None
    ref = ref.clone()
    ref[3] += 0.01
    tokens = dataclasses.replace(entry.step.logprobs, ref_logprobs=ref)
    return dataclasses.replace(entry, step=dataclasses.replace(entry.step, logprobs=tokens))


def with_other_text(entry: LedgerStep) -> LedgerStep:
    group = entry.step.groups[0]
    said = dataclasses.replace(group.completions[2], text=group.completions[2].text + " ")
    group = dataclasses.replace(group, completions=(*group.completions[:2], said, *group.completions[3:]))
    return dataclasses.replace(entry, step=dataclasses.replace(entry.step, groups=(group, *entry.step.groups[1:])))


def test_a_logprob_that_the_model_would_not_give_is_named(rich: Path, tmp_path: Path) -> None:
    run = rewritten(rich, tmp_path / "run", with_other_reference, step=1)
    code, out, _ = replay(run, "--model", "--step", "1")
    assert code == 1 and "step 1: policy:" not in out
    assert "step 1: reference: max |Δ logprob| 0.01, " in out and "exceeds the rounding tolerance" in out


def test_a_text_that_its_token_ids_do_not_spell_is_named(rich: Path, tmp_path: Path) -> None:
    """No formula reads a blank at the end: without the model the forgery is as good as the record."""
    run = rewritten(rich, tmp_path / "run", with_other_text, step=1)
    assert replay(run, "--step", "1")[0] == 0
    code, out, _ = replay(run, "--model", "--step", "1")
    assert code == 1 and "exceeds" not in out
    assert "step 1: group 0 (case c0), member 2: completion does not match its token ids" in out


def test_a_newline_that_changes_is_named(victim: Path) -> None:
    for file in (victim / "ledger" / "index.jsonl", victim / "metrics.jsonl"):
        whole = file.read_bytes()
        try:
            for at in (i for i, byte in enumerate(whole) if byte == 10):
                file.write_bytes(whole[:at] + b"\r" + whole[at + 1 :])
                assert replay(victim)[0] in (1, 2), f"{file.name}: byte {at}"
        finally:
            file.write_bytes(whole)
