"""The series lab: thresholds, claims on made-up figures both ways, plan, runner, record and page."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.series.__main__ import main
from benchmarks.series.cases import FILES, LAB_MIX, NURSE_LABELS
from benchmarks.series.claims import CLAIMS, LAB, RULES, judge
from benchmarks.series.hedging_thresholds import hedging_threshold, silence_threshold
from benchmarks.series.page import render
from benchmarks.series.plan import ENTRIES, PlanError, chosen
from benchmarks.series.record import lab_record
from benchmarks.series.run_results import MODES, Said, Seen, changed, pooled, rates
from benchmarks.series.runner import jobs, work
from benchmarks.series.warm_starts import STARTS
from benchmarks.tiny_world.patients import summary
from benchmarks.tiny_world.teacher import NURSES, misread, right, steps_to, too_mild, v43
from benchmarks.tiny_world.vignettes import draw_vignettes
from grpo.cases import load_jsonl_cases
from grpo.config import load_config
from grpo.preflight.checks import load_inputs, run_checks
from grpo.types import Case
from rewards import load_reward
from rewards.table import Table

SERIES = [entry for entry in ENTRIES if entry.kind == "series"]
TINY_WORLD_DIR = Path(__file__).parents[2] / "grpo" / "tiny"

# ---- thresholds -----------------------------------------------------------------------------------------------------


def table(over: float, under: float) -> Table:
    return Table({-1: over, 0: 1.0, 1: under}, -0.5, "sum", "sum", -math.inf, math.inf)


def expected(table: Table, said: int, p: float) -> float:
    """Reward of naming level ``said`` (0: k, 1: k + 1) where k has probability p: written out, not by the formula."""
    by_gold = {0: {0: table.by_error[0], 1: table.by_error[1]}, 1: {0: table.by_error[-1], 1: table.by_error[0]}}
    return p * by_gold[0][said] + (1 - p) * by_gold[1][said]


@given(st.floats(-1, 0.9), st.floats(-2, 0.9), st.floats(0, 1))
def test_hedging_pays_exactly_above_the_threshold(over: float, under: float, p: float) -> None:
    prices = table(over, under)
    limit = hedging_threshold(prices, normalised=False)
    gain = expected(prices, 0, p) - expected(prices, 1, p)
    if abs(p - limit) > 1e-9:
        assert (gain > 0) == (p > limit)


@given(st.floats(0.02, 0.98), st.floats(-1, 0.9), st.floats(-2, 0.9), st.integers(1, 7))
def test_a_groups_std_takes_the_prices_away(p: float, over: float, under: float, acute: int) -> None:
    """The oracle: advantages of a group of 8 in which ``acute`` name k, by hand, for either gold level."""
    prices = table(over, under)

    def push(gold: int) -> float:
        named = [0] * acute + [1] * (8 - acute)
        rewards = [prices.by_error[level - gold] for level in named]
        average = sum(rewards) / 8
        std = math.sqrt(sum((r - average) ** 2 for r in rewards) / 7)
        return sum((r - average) / std for r, level in zip(rewards, named, strict=True) if level == 0)

    net = p * push(0) + (1 - p) * push(1)
    limit = hedging_threshold(prices, normalised=True)
    assert limit == 0.5
    if abs(p - limit) > 1e-6:
        assert (net > 0) == (p > limit)


def test_thresholds_of_the_shipped_sets() -> None:
    v46, v49 = load_reward("v46").table, load_reward("v49").table
    assert hedging_threshold(v46, normalised=False) == pytest.approx(0.4)
    assert hedging_threshold(v46, normalised=False, missed=-0.5) == pytest.approx(1 / 3)
    assert hedging_threshold(v46, normalised=False, missed=-0.5, obeyed=0.5) == pytest.approx(1 / 3.5)
    assert hedging_threshold(load_reward("v45c").table, normalised=False) == 0.5
    assert silence_threshold(v46) == pytest.approx(0.75) and silence_threshold(v49) == pytest.approx(1.5)
    assert silence_threshold(Table({0: 1.0, 2: 1.0}, 0.0, "sum", "sum", -math.inf, math.inf)) == math.inf


# ---- claims on made-up figures --------------------------------------------------------------------------------------

GOOD: dict[str, dict[str, Any]] = {
    "v45c": {"after": {"says_1": 0.97}},
    "v46": {
        "before": {"exact": 0.6},
        "after": {"exact": 0.8, "over_by_one": 0.05, **{f"{rule}/exact": 0.1 for rule in RULES}},
    },
    "v47": {"after": {"exact": 0.6, "over_by_one": 0.3, "dangerous_under": 0.0}},
    "v48": {"curves": {"completions/clipped_ratio": [0.4, 0.5, 0.5, 0.6, 0.6, *[0.95] * 8]}},
    "v49": {
        "after": {"exact": 0.98, "adjacent": 1.0, **{f"{rule}/exact": 0.95 for rule in RULES}},
        "curves": {
            "completions/clipped_ratio": [0.3] * 5 + [0.05] * 10,
            "reward/mean": [-0.3, -0.1] + [0.4] * 13,
        },
    },
}
BAD: dict[str, dict[str, Any]] = {
    "collapses to “always ESI 1”": {"v45c": {"after": {"says_1": 0.72}}},
    "better than its supervised start": {"v46": {"after": {"exact": 0.5}}},
    "leaves three rules unlearnt": {"v46": {"after": {"severe_pain/exact": 0.8}}},
    "hedges: over-triage by one level rises": {"v47": {"after": {"over_by_one": 0.08}}},
    "no dangerous errors": {"v47": {"after": {"dangerous_under": 0.02}}},
    "less exact than v46": {"v47": {"after": {"exact": 0.81}}},
    "falls silent: clipped ratio over 90 %": {"v48": {"curves": {"completions/clipped_ratio": [0.4] * 20}}},
    "clipped ratio back to 4–19 %": {"v49": {"curves": {"completions/clipped_ratio": [0.1] * 7 + [0.3] * 8}}},
    "reward positive from step 10": {"v49": {"curves": {"reward/mean": [0.4] * 14 + [-0.1]}}},
    "mends the three rules": {"v49": {"after": {"open_injury/exact": 0.6}}},
    "100 % adjacent": {"v49": {"after": {"adjacent": 0.98}}},
    "thinking on and off alike": {"v49": {"off": {"exact": 0.9}}},
}


def made_up(name: str, seed: int, changes: dict[str, Any]) -> Seen:
    figures = GOOD[name]
    sides = {side: figures.get(side, {}) | changes.get(side, {}) for side in ("before", "after", "curves")}
    curves = sides["curves"]
    length = max(map(len, curves.values()), default=0)
    metrics = tuple({"step": i + 1, **{k: v[i] for k, v in curves.items() if i < len(v)}} for i in range(length))
    rate = {when: {(LAB, mode): dict(sides[when]) for mode in MODES} for when in ("before", "after")}
    rate["after"][LAB, "off"] |= changes.get("off", {})
    right = round(100 * sides["after"].get("exact", 0.0))
    was = round(100 * sides["before"].get("exact", 0.0))
    answers = {
        (when, (LAB, mode)): tuple(Said(str(i), 3, 3 if i < count else 2, True) for i in range(100))
        for when, count in (("before", was), ("after", right))
        for mode in MODES
    }
    return Seen(name, seed, rate["before"], rate["after"], metrics, 60.0, 50.0, answers)


def all_of(changes: dict[str, Any], seed: int = 1) -> list[Seen]:
    return [made_up(name, seed, changes.get(name, {})) for name in GOOD]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.says)
def test_every_claim_can_hold_and_can_fail(claim: Any) -> None:
    good, bad = all_of({}), all_of(BAD[claim.says], seed=2)
    assert judge(claim, good).verdict == "reproduced"
    assert judge(claim, bad).verdict == "not reproduced"
    assert judge(claim, good + bad).verdict == "in some seeds"
    assert judge(claim, [run for run in good if run.name != claim.run]).verdict == "not run"
    assert judge(claim, good).by_seed[1].found, "what was found is said"


def test_no_claim_is_without_its_counterexample() -> None:
    assert {claim.says for claim in CLAIMS} == set(BAD)


def test_a_fall_of_the_clipped_ratio_is_no_climb() -> None:
    claim = next(c for c in CLAIMS if c.run == "v48")
    curve = {"v48": {"curves": {"completions/clipped_ratio": [1.0] * 5 + [0.95] * 10}}}
    assert judge(claim, all_of(curve)).verdict == "not reproduced"


# ---- figures --------------------------------------------------------------------------------------------------------


def test_rates_and_pooling() -> None:
    said = [Said("a", 2, 2, True), Said("b", 2, 4, True), Said("c", 3, 2, True), Said("d", 1, None, False)]
    found = rates(said, {"a": ("x",), "b": ("x",)})
    assert (found["exact"], found["over_by_one"], found["dangerous_under"], found["no_parse"]) == (0.25,) * 4
    assert (found["clipped_ratio"], found["says_2"], found["x/exact"], found["x/dangerous_under"]) == (
        0.25,
        0.5,
        0.5,
        0.5,
    )
    assert found["high_acuity_under"] == 1 / 3, "of the cases of ESI 1 and 2"
    place = (LAB, "on")
    runs = [Seen("v", seed, {}, {}, (), answers={("after", place): tuple(said)}) for seed in (1, 2, 3)]
    pool = pooled(runs, "after", [place], "exact")
    assert pool is not None and pool[0] == 0.25
    alone = pooled(runs[:1], "after", [place], "exact")
    assert alone == pool, "three seeds that agree on every case are not three times the cases"
    assert pooled(runs, "after", [place], "exact", frozenset({"a"})) == pooled(
        runs[:1], "after", [place], "exact", frozenset("a")
    )
    assert pooled(runs, "before", [place], "exact") is None


def test_fixed_and_broken_are_counted_case_by_case() -> None:
    place = (LAB, "on")
    before = tuple(Said(str(i), 3, 3 if i < 5 else 2, True) for i in range(10))
    after = tuple(Said(str(i), 3, 3 if i >= 2 else 4, True) for i in range(10))
    run = Seen("v", 1, {}, {}, (), answers={("before", place): before, ("after", place): after})
    assert changed(run, place)[:2] == (5, 2)


# ---- plan, configs, cases -------------------------------------------------------------------------------------------


def test_chosen_brings_what_a_run_starts_from() -> None:
    assert [entry.name for entry in chosen(["v49"])] == ["v46", "v49"]
    assert [entry.name for entry in chosen(["series"])] == ["v45c", "v46", "v47", "v48", "v49"]
    assert chosen(["all"]) == ENTRIES
    with pytest.raises(PlanError, match="no run is called 'v44'; known: v45c"):
        chosen(["v44"])


def test_names_are_distinct_and_starts_come_first() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    for entry in ENTRIES:
        assert not entry.after or names.index(entry.after) < names.index(entry.name)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_a_config_that_may_start(entry: Any) -> None:
    """What the series found unsound is unsound here, and says why it is run all the same."""
    config, _ = load_config(entry.config, entry.overrides)
    examination = run_checks(config, load_inputs(config))
    assert not examination.file_errors
    unsound = {"v45c", "v46", "v47", "v48", "v47-std", "stacked"}
    assert examination.sound == (entry.name not in unsound), examination.problems
    assert config.reward.allow_unsound == (entry.name in unsound)


def test_preflight_foretells_the_collapse_of_v45c() -> None:
    config, _ = load_config("configs/tiny/v45c.toml")
    policies = run_checks(config, load_inputs(config)).policies
    assert policies is not None and policies.policies_that_beat_honest[0] == "always 1"
    assert config.cases.oversample == {1: 20}


def test_v49_doubles_the_budget_of_v48() -> None:
    budget = {e.name: load_config(e.config)[0].rollout.max_new_tokens for e in SERIES}
    assert budget["v49"] == 2 * budget["v48"] and budget["v49"] > budget["v46"]


@pytest.mark.parametrize("name", FILES)
def test_the_labs_cases_are_what_their_command_writes(name: str) -> None:
    assert (TINY_WORLD_DIR / "cases" / f"{name}.jsonl").read_text(encoding="ascii") == FILES[name]()


def test_the_labs_cases_share_nothing_with_what_is_trained_on() -> None:
    def patients(name: str) -> set[str]:
        return {json.loads(line)["patient"] for line in (TINY_WORLD_DIR / "cases" / f"{name}.jsonl").open()}

    trained = patients("train") | patients("nurses")
    assert not patients("lab") & (trained | patients("mietic36"))
    assert len(load_jsonl_cases("embedded:cases/lab.jsonl")) == sum(LAB_MIX.values())


def test_nurses_waver_in_the_stated_shares() -> None:
    rows = [json.loads(line) for line in (TINY_WORLD_DIR / "cases" / "nurses.jsonl").open()]
    gold = {"lifesaving_done": 1, "lifesaving_other": 1, "severe_pain": 2, "open_injury": 2, "high_risk": 2}
    gold |= {"danger_vitals": 2, "resources_many": 3, "resource_one": 4, "resource_none": 5}
    for stratum, (count, acute) in NURSE_LABELS.items():
        labels = [row["esi"] for row in rows if row["stratum"] == stratum]
        assert sorted(labels) == [gold[stratum] - 1] * acute + [gold[stratum]] * (count - acute)


# ---- starts ---------------------------------------------------------------------------------------------------------


def test_the_starts_are_those_of_their_manifest() -> None:
    told = json.loads((TINY_WORLD_DIR / "starts.json").read_text(encoding="utf-8"))
    assert told.keys() == STARTS.keys()
    for name, start in STARTS.items():
        assert told[name]["lesson"] == asdict(start.lesson), "build it again: python -m benchmarks.series.warm_starts"
        files = sorted(p for p in (TINY_WORLD_DIR / name).iterdir() if p.is_file())
        assert {f"{name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files} == told[name]["sha256"]
        assert sum(p.stat().st_size for p in files) < 2**20


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_wrong_in_the_way_it_is_said_to_be(name: str) -> None:
    """Greedy answers to a dozen cases: v43 misses the three rules and knows what it was taught rightly; mild is two
    levels too mild."""
    from benchmarks.tiny_world.build import SYSTEM_PROMPT
    from grpo.policy.policy import load_policy
    from grpo.prompts import render_prompt
    from grpo.rollout import rollout
    from rewards import parse_answer

    config, _ = load_config("configs/tiny/v46.toml", [f"lora.warm_start=embedded:{name}"])
    policy = load_policy(config.model, config.lora, seed=0)
    kinds = ("severe_pain", "open_injury", "lifesaving_done", "lifesaving_other", "high_risk")
    every = load_jsonl_cases("embedded:cases/lab.jsonl")
    cases = [case for kind in kinds for case in every if case.tags[0] == kind][::6]
    prompts = [render_prompt(policy.tokenizer, c, system_prompt=SYSTEM_PROMPT, thinking=False) for c in cases]
    groups = rollout(policy, prompts, [[0]] * len(prompts), max_new_tokens=88, temperature=0.0)
    errors = {
        case.id: (parse_answer(group.completions[0].text, thinking=False).level or 0) - case.gold_level
        for case, group in zip(cases, groups, strict=True)
    }
    missed = [case for case in cases if case.tags[0] in RULES]
    if name == "mild":
        assert sum(error == 2 for error in errors.values()) >= 0.8 * len(cases)
    else:
        assert all(errors[case.id] == 1 for case in missed)
        assert sum(errors[case.id] == 0 for case in cases if case not in missed) >= 0.8 * (len(cases) - len(missed))


@pytest.mark.parametrize("teacher", [v43(0.1), too_mild], ids=["v43", "mild"])
def test_a_teacher_says_a_level_and_the_steps_that_end_there(teacher: Any) -> None:
    rng = random.Random(0)
    for vignette in draw_vignettes("train", 200, mix=LAB_MIX, seed=3):
        facts = summary(vignette.patient)
        steps, level = teacher(facts, vignette.stratum, rng)
        assert 1 <= level <= 5
        assert steps == right(facts)[0] or steps == steps_to(level) or vignette.stratum in RULES
        if teacher is too_mild:
            assert level == min(5, vignette.esi + 2)


def test_v43_names_the_nurses_labels_in_their_shares() -> None:
    rng = random.Random(0)
    named: dict[str, list[bool]] = {stratum: [] for stratum in NURSES}
    for vignette in draw_vignettes("train", 1200, mix=dict.fromkeys(NURSES, 1), seed=4):
        facts = summary(vignette.patient)
        if not misread(facts.complaint):
            named[vignette.stratum].append(v43(0.1)(facts, vignette.stratum, rng)[1] == vignette.esi - 1)
    for stratum, share in NURSES.items():
        assert abs(sum(named[stratum]) / len(named[stratum]) - share) < 0.1


# ---- running --------------------------------------------------------------------------------------------------------

SMALL = [
    "train.steps=2", "rollout.prompts_per_step=1", "rollout.group_size=2", "optim.micro_batch_size=2",
    "rollout.max_new_tokens=24", "evaluate.max_new_tokens=24", "checkpoint.every=1",
]  # fmt: skip


def few(tmp_path: Path) -> list[str]:
    """Overrides of a lab of seconds: two steps, and the first cases of the lab's set."""
    file = tmp_path / "few.jsonl"
    lines = (TINY_WORLD_DIR / "cases" / "lab.jsonl").read_text(encoding="ascii").splitlines(keepends=True)
    file.write_text("".join(lines[:6]), encoding="ascii")
    return [*SMALL, f'evaluate.before_and_after={{lab="{file}"}}', "evaluate.periodic={}"]


def call(tmp_path: Path, *more: str, runs: str = "v49") -> list[str]:
    laid = [part for text in few(tmp_path) for part in ("--set", text)]
    return ["--runs", runs, "--seeds", "7", "--out", str(tmp_path / "lab"), *laid, *more]


WEIGHTS = "adapter_model.safetensors"
ANSWERS = "step_000002_lab_on.jsonl"


def gone(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def written(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text("latin-1")
        (folder / name).write_text(change(text), "latin-1")

    return damage


def a_line_short(name: str) -> Callable[[Path], None]:
    return written(name, lambda text: "".join(text.splitlines(keepends=True)[:-1]))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another config": (
        written("config.json", lambda text: text.replace('"learning_rate": ', '"learning_rate": 1')),
        "…was started with a different optim.learning_rate. Resume with the original config and --set, or use --out to "
        "start a new run; or delete ",
    ),
    "no evaluations": (gone("eval.json"), "ValueError: it holds no evaluations"),
    "no answers": (gone("eval"), "FileNotFoundError: "),
    "answers cut": (a_line_short(f"eval/{ANSWERS}"), f"UserError: eval/{ANSWERS}: holds 5 of 6 answers"),
    "no metrics": (gone("metrics.jsonl"), "UserError: metrics.jsonl: holds 0 of 2 steps"),
    "metrics cut": (a_line_short("metrics.jsonl"), "UserError: metrics.jsonl: holds 1 of 2 steps"),
    "metrics torn": (written("metrics.jsonl", lambda text: text[:-9]), "UserError: metrics.jsonl: holds 1 of 2"),
    "ledger cut": (a_line_short("ledger/index.jsonl"), "UserError: ledger/index.jsonl: holds 1 of 2 steps"),
    "no adapter": (gone("adapter"), "ValueError: its adapter is gone"),
    "an adapter without weights": (gone(f"adapter/{WEIGHTS}"), "ValueError: its adapter is gone"),
    "an adapter of no bytes": (written(f"adapter/{WEIGHTS}", lambda text: ""), "ValueError: its adapter is gone"),
    "a torn mark": (written("lab.json", lambda text: text + "{"), "InvalidFile: not valid JSON"),
}
"""What happened to a finished run's folder, and what is said of it."""


@pytest.mark.slow
def test_a_lab_from_end_to_end_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "1/2  v46, seed 7: exact" in said and "2/2  v49, seed 7: exact" in said
    record = json.loads((tmp_path / "lab" / "lab.json").read_text("utf-8"))
    assert list(record["runs"]) == ["v46", "v49"] and record["seeds"] == [7] and not record["failed"]
    warm = json.loads((tmp_path / "lab/runs/v49/seed-7/config.json").read_text("utf-8"))["config"]["lora"]["warm_start"]
    assert warm == str(tmp_path / "lab/runs/v46/seed-7/adapter"), "v49 starts from this lab's own v46"
    assert record["runs"]["v49"]["rates"]["after"]["exact"]["by_seed"].keys() == {"7"}
    assert len(record["runs"]["v49"]["curves"]["reward/mean"]["mean"]) == 2
    assert {claim["verdict"] for claim in record["claims"]} <= {"reproduced", "not reproduced", "not run"}
    page = (tmp_path / "lab" / "lab.html").read_text("utf-8")
    assert "v49" in page and "Content-Security-Policy" in page
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "lab" / "runs").rglob("*") if file.is_file()}
    assert main(call(tmp_path)) == 0
    assert "2 recipes × 1 seeds, 2 done" in capsys.readouterr().out
    assert times == {file: file.stat().st_mtime_ns for file in times}, "a finished run is not touched again"
    assert main(call(tmp_path, "--set", "train.steps=3")) == 2
    assert "was trained with other settings" in capsys.readouterr().err
    whole = (tmp_path / "lab" / "lab.json").read_bytes()
    assert main(call(tmp_path, runs="v46")) == 2
    assert "holds 1 finished runs that are not asked for (v49 seed-7)" in capsys.readouterr().err
    assert whole == (tmp_path / "lab" / "lab.json").read_bytes(), "no record is lost to a smaller one"
    folder = tmp_path / "lab" / "runs" / "v49" / "seed-7"
    for name, (damage, says) in DAMAGES.items():
        kept = tmp_path / "kept"
        shutil.copytree(folder, kept)
        damage(folder)
        assert main(call(tmp_path)) == 2, name
        told = capsys.readouterr().err
        assert told.count("error: ") == told.count("\n") == 1 and told.count(str(folder)) <= 2, name
        wanted = f"{folder}: finished, but not whole any more ({says}" if says[0] != "…" else says[1:]
        assert wanted in told and str(folder) in told, (name, told)
        shutil.rmtree(folder)
        kept.rename(folder)
    assert main(call(tmp_path)) == 0


@pytest.mark.slow
def test_an_interrupted_lab_goes_on_where_it_was(tmp_path: Path) -> None:
    laid = [*few(tmp_path), "train.steps=400"]
    command = [sys.executable, "-m", "benchmarks.series", *call(tmp_path, "--set", "train.steps=400", runs="v46")]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "lab/runs/v46/seed-7"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "checkpoints" / "step_000002").exists():
        time.sleep(0.1)
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait(60) == 143
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 2 <= done < 400, "the worker stopped with the lab"
    job = jobs(chosen(["v46"]), [7], tmp_path / "lab", laid)[0]
    assert not job.done
    shorter = replace(job, command=tuple(part.replace("steps=400", f"steps={done + 1}") for part in job.command))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["config"]["train"]["steps"] = done + 1
    (folder / "config.json").write_text(json.dumps(config))
    assert work([shorter], at_once=1, tell=lambda line: None) == {}
    told = json.loads((folder / "lab.json").read_text("utf-8"))
    assert told["resumed"] and shorter.done
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 2))


def test_a_failed_run_is_told_and_takes_along_what_starts_from_it(tmp_path: Path) -> None:
    todo = jobs(chosen(["v49"]), [1], tmp_path, [])
    broken = [
        replace(job, command=(sys.executable, "-c", "import sys; sys.exit('no such thing')", "--out", str(job.folder)))
        for job in todo
    ]
    told: list[str] = []
    failed = work(broken, at_once=2, tell=told.append)
    assert failed[broken[0]] == "no such thing"
    assert failed[broken[1]] == "its warm start, v46, failed"
    assert told == ["1/2  v46, seed 1: FAILED", "2/2  v49, seed 1: left out, its warm start, v46, failed"]


def test_a_worker_that_is_killed_is_told_by_its_signal(tmp_path: Path) -> None:
    (job,) = jobs(chosen(["v46"]), [1], tmp_path, [])
    killed = replace(job, command=(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert work([killed], at_once=1, tell=lambda line: None)[killed].startswith("ended by SIGKILL")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--runs", "v44"], "no run is called 'v44'"),
        (["--seeds", "1,1"], "--seeds 1,1: expected distinct whole numbers"),
        (["--seeds", "x"], "--seeds x: expected distinct whole numbers"),
        (["--jobs", "0"], "--jobs 0: expected a whole number from 1"),
        (["--set", "train.stesp=1"], "did you mean steps?"),
        *(
            (["--set", f"{key}={value}"], f"--set {key}: the lab sets the seed and the warm start of each run itself")
            for key, value in (
                ("train.seed", "7"),
                ("lora.warm_start", "x"),
                ("train", "{steps=2, seed=1, max_nonfinite_steps=3}"),
                ("lora", '{r=4, alpha=4, dropout=0, target_modules=["q_proj"], warm_start="embedded:v43"}'),
            )
        ),
        (["--set", "train . seed=7"], "--set train.seed: the lab sets"),
        (["--set", "evaluate.before_and_after={}"], "names no set 'lab'"),
        (["--set", "ledger.every=0"], "is 0: the lab reads what was sampled from the ledger"),
    ],
)
def test_bad_input_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str], said: str
) -> None:
    assert main(["--out", str(tmp_path / "lab"), *more]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "lab").exists()


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab").write_text("a file")
    assert main(["--out", str(tmp_path / "lab")]) == 2
    assert "cannot be made: File exists" in capsys.readouterr().err


# ---- the page -------------------------------------------------------------------------------------------------------


def made_record(**more: Any) -> dict[str, Any]:
    entries = chosen(["series", "no-kl"])
    configs = {entry.name: load_config(entry.config, entry.overrides)[0] for entry in entries}
    runs = [run for seed in (1, 2) for run in all_of({}, seed)]
    runs += [replace(made_up("v49", seed, {}), name="no-kl") for seed in (1, 2)]
    facts = {"command": "python -m benchmarks.series", "finished": "2026-01-01T00:00:00+00:00", "commit": None}
    facts |= {"commits_of_runs": {"a" * 40: 8, "unknown": 2}}
    facts |= {"machine": {"platform": "a machine"}, "versions": {"torch": "2.13"}, "failed": {}}
    return {**facts, **lab_record(entries, configs, runs), **more}


def test_the_page_says_what_was_reproduced() -> None:
    record = made_record()
    page = render(record).decode()
    assert f"{len(CLAIMS)} of {len(CLAIMS)} claims reproduced" in page
    for claim in CLAIMS:
        assert claim.says in page
    assert page.count("<svg") == 2 and "no-kl" in page and "98.0 %" in page
    assert f"<dt>Runs</dt><dd>8 with commit {'a' * 12}; 2 with commit unknown</dd>" in page
    assert "all but from-base start from v46" in page and "same starts" not in page
    assert json.loads(json.dumps(record, allow_nan=False)) == json.loads(json.dumps(record))


def test_what_a_record_says_cannot_become_markup() -> None:
    attack = "<script>hit()</script>\u202e"
    record = made_record(command=attack, finished=attack)
    record["runs"]["v49"]["about"] = attack
    record["claims"][0]["by_seed"]["1"]["found"] = attack
    record["foretold"]["v49"]["refusals"] = [attack]
    page = render(record).decode()
    assert "<script>hit" not in page and "\u202e" not in page
    assert page.count("&lt;script&gt;hit()") >= 5
    assert page.count("<script>") == 0


def test_tags_of_made_up_cases_are_strata() -> None:
    """The thresholds read a case's stratum from its first tag."""
    strata = set(LAB_MIX)
    for name in ("lab", "nurses"):
        cases: tuple[Case, ...] = load_jsonl_cases(f"embedded:cases/{name}.jsonl")
        assert {case.tags[0] for case in cases} == strata
