"""The examination before a run, through its command line: verdicts, probes, audits, refusals, and one completion."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo import train
from grpo.commands.preflight import main
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.preflight.checks import (
    MAX_TIMED_OUT,
    audit_data,
    load_inputs,
    merge_equivalent_cases,
    require_sound_reward,
    run_checks,
)
from grpo.preflight.text import WIDTH
from grpo.run import setup
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards import load_reward
from rewards.blind_policies import WeightedCase, expected_rewards

ROOT = Path(__file__).parents[2]
V49, TINY = str(ROOT / "configs" / "v49.toml"), str(ROOT / "configs" / "tiny.toml")
SEIZURE = """\
name = "my_reward"
about = "v49, and a missed active seizure costs half a point more"
extends = "v49"

[[rule]]
name = "active_seizure_missed"
gold = "= 1"
predicted = "> 1"
value = -0.5
grade = "U"
source = "an active seizure needs help now: step A of the algorithm"
[rule.trigger]
kind = "pattern"
pattern = 'active seizure|actively seizing'
unless = 'no active seizure|not actively seizing'

[[case]]
name = "seizure_missed"
text = "Active seizure on arrival, benzodiazepine given on the way."
gold = 1
completion = "ANSWER: ESI 2"
thinking = false
total = -1.0
parts = { outcome = -0.5, active_seizure_missed = -0.5 }
"""
"""The README's example, word for word."""


def sets(**values: object) -> list[str]:
    """Overrides: ``__`` in a name stands for the dot."""
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def jsonl(path: Path, cases: Sequence[Case]) -> Path:
    rows = ({"id": c.id, "text": c.text, "esi": c.gold_level} for c in cases)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small(path: Path, *cases: Case) -> list[str]:
    """Overrides that train on these cases and evaluate nothing."""
    return sets(
        cases__train=jsonl(path / "cases.jsonl", cases), evaluate__before_and_after="{}", evaluate__periodic="{}"
    )


@pytest.fixture
def balanced(tmp_path: Path) -> list[str]:
    """Overrides for forty embedded vignettes of each level."""
    rows = [json.loads(line) for line in (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text().splitlines()]
    cases = [
        Case(row["id"], row["text"], level)
        for level in range(1, 6)
        for row in [row for row in rows if row["esi"] == level][:40]
    ]
    return small(tmp_path, *cases)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


# ---- the proof ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("v45c", 1, ["counterexample: gold 1, predicted 2: +0", "under-triage is worth less than equal over-triage"]),
        ("v46", 1, ["counterexample: gold 1, predicted 3: -1", "gold 1, no parse: -0.5"]),
        ("v48", 1, ["counterexample: gold 1, predicted 3: -1", "gold 1, no parse: -0.5"]),
        ("v49", 0, ["proof     sound, smallest margin +0.5", "verdict   SOUND"]),
        ("v50", 0, ["proof     sound, smallest margin +0.5", "verdict   SOUND"]),
    ],
)
def test_the_series(name: str, code: int, says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([V49, "--reward-only", "--set", f"reward.set={name}"]) == code
    text = shown(capsys)
    assert all(part in text for part in says), text
    assert ("verdict   UNSOUND" in text) == ("FAILS" in text) == (code == 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            '[no_parse]\nvalue = -0.5\ngrade = "U"\nsource = "v48\'s"\n',
            "gold 1, predicted 3 with lifesaving_obeyed+lifesaving_missed: -1.5",
        ),
        (
            '[stacking]\npenalties = "sum"\nbonuses = "sum"\ngrade = "U"\nsource = "the trap"\n',
            "gold 2, predicted 4 with open_injury_missed, severe_pain_missed: -2",
        ),
    ],
    ids=["no-parse at -0.5", "two penalties stack"],
)
def test_v49_spoilt_is_caught(change: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = tmp_path / "spoilt.toml"
    spoilt.write_text(f'name = "spoilt"\nabout = "v49 with one change"\nextends = "v49"\n{change}', encoding="utf-8")
    assert main([V49, "--reward-only", "--set", f"reward.set={spoilt}"]) == 1
    assert f"counterexample: {says}" in shown(capsys)


def test_the_table_holds_every_total_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([V49, "--reward-only"]) == 0
    lines = shown(capsys).splitlines()
    table = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[0] for row in table] == ["1", "1", "2", "2", "3", "4", "5"]
    assert table[1][1:] == ["a", "+1.5", "-1", "-1.5", "-1.5", "-1.5", "-2", "-2", "-2"]
    assert table[3][1:] == ["b,", "c,", "b+c", "0", "+1", "-1", "-1.5", "-1.5", "-2", "-2", "-2"]


def test_a_set_whose_own_example_fails_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(SEIZURE.replace("total = -1.0", "total = -0.5"), encoding="utf-8")
    assert main([V49, "--reward-only", "--set", f"reward.set={wrong}"]) == 1
    text = shown(capsys)
    assert 'FAILS "seizure_missed": expected -0.5' in text and "verdict   UNSOUND" in text


# ---- the probes ---------------------------------------------------------------------------------------------------


def test_v45c_at_twenty_times_pays_always_1_and_v49_at_five_times_does_not(
    balanced: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([TINY, *balanced, *sets(reward__set="v45c", cases__oversample="{1 = 20}")]) == 1
    text = shown(capsys)
    assert "1  always 1                      +0.833 ± 0.373  BEATS THE HONEST POLICY" in text
    assert "2  honest, 70% exact             +0.700" in text
    assert "83.3%" in text, "level 1's share of the stream"
    assert '- the policy "always 1" earns +0.833 per completion' in text

    assert main([TINY, *balanced, *sets(reward__set="v49", cases__oversample="{1 = 5}")]) == 0
    text = shown(capsys)
    assert "1  honest, 70% exact" in text and "BEATS" not in text


def test_the_honest_policy_is_a_choice(balanced: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    crowd = sets(cases__oversample="{1 = 5}")
    assert main([TINY, *balanced, *crowd, "--honest", "0.3"]) == 1
    assert "BEATS THE HONEST POLICY" in shown(capsys)


@pytest.mark.parametrize(
    "more", [[], ["--reward-only"], ["--explain", "train-000000", "--completion", "ANSWER: ESI 2"]]
)
@pytest.mark.parametrize("share", ["1.5", "7", "0", "nan"])
def test_an_honest_policy_that_cannot_be_is_refused_whatever_else_is_asked(
    more: list[str], share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([TINY, "--honest", share, *more]) == 2
    out, err = capsys.readouterr()
    assert "expected a value in (0, 1], got" in err and not out


TEXTS = ("Arrived intubated.", "Gunshot wound, pain 9/10.", "Pain 8/10.", "Refill.", "Chest tube placed, pain 10/10.")


WEIGHTED = st.builds(
    WeightedCase, st.just("c"), st.sampled_from(TEXTS), st.integers(1, 5), st.integers(0, 6).map(float)
)


@settings(deadline=None)
@given(st.lists(WEIGHTED, min_size=1, max_size=30).filter(lambda cases: any(case.weight for case in cases)))
def test_pooling_cases_changes_no_expectation(cases: list[WeightedCase]) -> None:
    reward = load_reward("v49")
    whole, less = expected_rewards(reward, cases), expected_rewards(reward, merge_equivalent_cases(reward, cases))
    assert len(merge_equivalent_cases(reward, cases)) <= len({(case.text, case.gold) for case in cases})
    values = {one.policy: (one.mean, one.std) for one in less.ranked}
    for one in whole.ranked:
        assert values[one.policy] == pytest.approx((one.mean, one.std), abs=1e-9)


# ---- rules and data -----------------------------------------------------------------------------------------------


def test_rules_that_misfire_or_never_matter_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = """
name = "mine"
about = "v49 and two rules that do nothing"
extends = "v49"
[[rule]]
name = "nothing_at_all"
gold = "= 3"
predicted = "any"
value = 0.0
grade = "U"
source = "worth nothing"
"""
    file = tmp_path / "mine.toml"
    file.write_text(rules, encoding="utf-8")
    cases = [
        Case("a", "Found down, not intubated.", 1),
        Case("b", "Headache, vitals stable.", 2),
        Case("c", "Chest tube out last year, cough.", 4),
        Case("d", "Cough.", 3),
        Case("e", "Refill.", 5),
    ]
    assert main([TINY, *small(tmp_path, *cases), *sets(reward__set=file)]) == 0
    text = shown(capsys)
    assert "negated or in the past: 1 (a)" in text
    assert "found: stable (1)" in text
    assert "the trigger also fires on 1 cases of other gold levels" in text
    pain = text[text.index("severe_pain_missed  ") :]
    assert pain.splitlines()[1].strip() == "never fires on these cases"
    inert = "fires, but can never change an advantage here"
    before, _, after = text.partition("  nothing_at_all  ")
    assert inert not in before and after.splitlines()[1].strip() == inert
    assert "nothing_at_all: can never change an advantage" in text


def test_the_data_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [Case("a", "Chest pain.", 2), Case("b", "chest  PAIN.", 3), Case("c", "Rash.", 5), Case("d", "Rash.", 5)]
    test = jsonl(tmp_path / "test.jsonl", [Case("a", "Cut.", 4), Case("x", "RASH.", 5), Case("y", "Cough.", 5)])
    held = [
        *small(tmp_path, *cases),
        *sets(evaluate__before_and_after=f'{{test = "{test}"}}', cases__oversample="{2 = 6}"),
    ]
    main([TINY, *held])
    text = shown(capsys)
    assert "texts that occur more than once: 2" in text
    assert "of them with different gold levels: 1 (a=b)" in text
    assert "ids also in test: 1 (a)" in text and "texts also in test: 1 (c=x)" in text
    assert "66.7%" in text and "50.0%" in text


def test_nothing_repeats_nothing_is_said() -> None:
    audit = audit_data([Case("a", "Cut.", 4)], {4: 2}, {"test": [Case("b", "Cough.", 5)]})
    assert audit.stream == (0, 0, 0, 2, 0)
    assert (audit.duplicates, audit.contradictions, audit.overlaps) == ((), (), ())


def test_the_embedded_world_repeats_no_case_between_training_and_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([TINY]) == 0
    text = shown(capsys)
    assert "no id or text repeats in test, mietic36, validation" in text
    assert "texts that occur more than once: 0" in text
    wide = [line for line in text.splitlines() if len(line) > WIDTH]
    assert not wide


SLOW = SEIZURE.split("[[case]]")[0].replace("'active seizure|actively seizing'", "'(a+)+$'")
ENDLESS = "a" * 50_000 + "!"


def test_a_catastrophic_pattern_ends_in_bounded_time_and_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "slow.toml"
    file.write_text(SLOW)
    cases = [Case("slow", ENDLESS, 1), Case("quick", "Rash.", 5), Case("mid", "Cough.", 3)]
    world = [*small(tmp_path, *cases), *sets(reward__set=file)]
    started = time.perf_counter()
    assert main([TINY, *world]) == 1
    assert time.perf_counter() - started < 30
    text = shown(capsys)
    assert "proof     sound" in text and "probes    expected reward" in text
    assert "verdict   UNSOUND\n          - patterns time out on 1 of 3 training cases (33.3%)" in text
    assert "whose completions all get the floor: slow" in text and "aaa" not in text
    allowed = sets(reward__allow_unsound="true", reward__unsound_reason="the other cases suffice")
    config, _ = load_config(TINY, [*world[1::2], *allowed[1::2]])
    require_sound_reward(config, run_checks(config, load_inputs(config)))
    refused, _ = load_config(TINY, world[1::2])
    with pytest.raises(UserError, match="patterns time out on 1 of 3"):
        require_sound_reward(refused, run_checks(refused, load_inputs(refused)))


def test_a_file_on_which_every_case_runs_out_of_time_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "slow.toml"
    file.write_text(SLOW.replace('extends = "v49"', 'extends = "v49"\npattern_timeout_s = 0.02'))
    cases = [Case("first", "Rash.", 5), *(Case(f"c{i}", f"{ENDLESS}{i}", 1) for i in range(200))]
    started = time.perf_counter()
    assert main([TINY, *small(tmp_path, *cases), *sets(reward__set=file)]) == 1
    assert time.perf_counter() - started < 30
    text = shown(capsys)
    assert f"patterns time out on {MAX_TIMED_OUT} of the first {MAX_TIMED_OUT + 1} training cases" in text
    assert "probes    none: patterns time out on too many cases" in text
    assert "c0, c1, c2 and others" in text and "data      gold level" in text


# ---- what can and cannot be examined ------------------------------------------------------------------------------


def test_without_cases_the_proof_and_the_plan_are_shown_and_the_exit_code_is_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([V49, "--set", "cases.train=nowhere.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert "proof     sound" in out and "58,195,968 trained in 128 layers" in out
    assert "probes    none: no cases" in out and "nowhere.jsonl: cannot be read" in out
    assert "error: nowhere.jsonl: cannot be read" in err
    verdict = out[out.index("verdict") :].splitlines()
    assert verdict[0] == "verdict   INCOMPLETE"
    assert "not checked: blind policies, rules, data: no training cases" in verdict[1]
    assert "not checked: overlap of the training cases with mietic36" in verdict[2]


def test_a_missing_evaluation_file_alone_leaves_the_verdict_incomplete(
    balanced: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    held = [*balanced, *sets(evaluate__periodic='{later = "nowhere.jsonl"}')]
    assert main([TINY, *held]) == 2
    out, _ = capsys.readouterr()
    assert "honest, 70% exact" in out and "verdict   INCOMPLETE" in out
    assert "not checked: overlap of the training cases with later" in out and "blind policies earn, " not in out


def test_a_missing_file_does_not_hide_that_the_reward_is_unsound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([V49, *sets(cases__train="nowhere.jsonl", reward__set="v46")]) == 2
    assert "verdict   UNSOUND" in shown(capsys)


def test_the_reward_alone_is_called_so(balanced: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([V49, "--reward-only"]) == 0
    assert "verdict   SOUND (only the reward: no cases were read)" in shown(capsys)
    assert main([TINY, *balanced]) == 0
    assert "verdict   SOUND" in shown(capsys).splitlines()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "reward.set=v99"], 'no reward set "v99"'),
        (["--set", "optim.learning_rte=1"], "did you mean learning_rate?"),
        (
            ["--explain", "nobody", "--completion", "ANSWER: ESI 2"],
            "no training or evaluation case has the id 'nobody'",
        ),
        (["--explain", "train-000000", "--completion", "@nowhere.txt"], "@nowhere.txt: cannot be read"),
        (["--explain", "train-000000"], "--explain and --completion must be used together"),
        (["--explain", "a", "--completion", "b", "--reward-only"], "it excludes --reward-only and --json"),
        (["--reward-only", "--honest", "7"], "expected a value in (0, 1], got 7.0"),
    ],
)
def test_bad_input(more: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, *more]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and says in err and not out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "reward.set=v99"], 'no reward set "v99"'),
        (["--honest", "7"], "expected a value in (0, 1], got 7.0"),
        (["--explain", "a", "--completion", "b"], "it excludes --reward-only and --json"),
    ],
)
def test_bad_input_is_json_where_json_was_asked_for(
    more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([TINY, "--json", *more]) == 2
    out, err = capsys.readouterr()
    assert says in json.loads(out)["error"]
    assert err == f"error: {json.loads(out)['error']}\n"


def test_the_most_tokens_of_a_step_hold_its_resample_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    for rounds, tokens in ((0, "8,192"), (2, "24,576")):
        assert main([V49, "--reward-only", *sets(rollout__resample_rounds=rounds)]) == 0
        assert f"≤ {tokens} sampled tokens per step" in shown(capsys)


def test_json_of_an_incomplete_examination_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([V49, "--json", "--set", "cases.train=nowhere.jsonl"]) == 2
    found = json.loads(shown(capsys))
    assert (found["verdict"], found["sound"], found["proof"]["sound"]) == ("INCOMPLETE", False, True)
    assert len(found["unchecked"]) == 2 and found["timeouts"] is None


CODE_RULE = """\
name = "code"
about = "a rule of code"
extends = "v49"
[[rule]]
name = "code"
gold = "any"
predicted = "any"
function = "preflight_rule:judge"
range = [-0.5, 0.0]
grade = "U"
source = "s"
"""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def judge(view):\n    raise SystemExit(0)\n", ['rule "code" (preflight_rule:judge) raised SystemExit', "c7"]),
        ("def judge(view):\n    return 7.0\n", ['rule "code"', "must return a number in [-0.5, 0.0], got 7.0", "c7"]),
        ("raise SystemExit(0)\n", ["code.toml", 'rule "code".function', "preflight_rule:judge", "SystemExit"]),
        ("def judge(view:\n", ["code.toml", 'rule "code".function', "preflight_rule:judge", "SyntaxError"]),
        ("raise ValueError('twice')\n", ["code.toml", 'rule "code".function', "preflight_rule:judge", "twice"]),
    ],
)
def test_a_rule_of_code_that_fails_is_one_error(
    source: str,
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "preflight_rule.py").write_text(source, encoding="utf-8")
    (tmp_path / "code.toml").write_text(CODE_RULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "preflight_rule", raising=False)
    world = small(tmp_path, Case("c7", "SECRET", 3))
    assert main([TINY, *world, *sets(reward__set=tmp_path / "code.toml")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and len(err.splitlines()) == 1 and "SECRET" not in err
    assert all(piece in err for piece in says), err


def test_json_says_the_same_and_holds_no_case(balanced: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, *balanced, "--json", *sets(reward__set="v46", model__name="Qwen/Qwen3.5-9B")]) == 1
    text = shown(capsys)
    found = json.loads(text)
    assert found["sound"] is False and found["proof"]["sound"] is False and len(found["proof"]["table"]) == 40
    assert [one["name"] for one in found["proof"]["invariants"] if not one["holds"]] == ["no_answer_is_worst"]
    assert found["probes"]["ranked"][0]["policy"] == "honest, 70% exact" and found["probes"]["beaten_by"] == []
    assert found["data"]["levels"] == [40] * 5 and found["plan"]["trained"] > 0
    assert found["plan"]["peak_bytes"]["update"] > 17e9
    rows = [json.loads(line) for line in (TINY_WORLD_DIR / "cases" / "train.jsonl").read_text().splitlines()]
    assert not any(row["text"][:40] in text for row in rows)


def test_neither_torch_nor_transformers_is_imported_and_seconds_are_enough() -> None:
    program = (
        "import sys, time\n"
        "from grpo.commands.preflight import main\n"
        f"code = main([{V49!r}, '--reward-only'])\n"
        "print(code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)), time.process_time() < 10)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "0 [] True"


# ---- one completion -----------------------------------------------------------------------------------------------


def test_explain_names_the_parse_the_rules_and_the_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("t1", "Gunshot wound to the thigh.\x1b[2J Pain 10/10.", 2)
    world = small(tmp_path, case)
    assert main([TINY, *world, "--explain", "t1", "--completion", "hm</think>\x1b[31m\nANSWER: ESI 5"]) == 0
    text = shown(capsys)
    assert "case      t1, gold ESI 2" in text and "\x1b" not in text and "\\x1b[2J" in text
    assert 'answer    ESI 5, parsed, from characters 16-29: "ANSWER: ESI 5"' in text
    assert 'open_injury_missed fired on characters 0-7: "Gunshot": -0.5' in text
    assert "severe_pain_missed fired on characters" in text and ", 0 after stacking" in text
    assert "lifesaving_missed does not apply: it applies only to gold 1" in text
    assert text.splitlines()[-1].split() == ["total", "-1.5"]


def test_explain_reads_a_file_and_the_switches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = small(tmp_path, Case("t1", "Arrived intubated.", 1))
    file = tmp_path / "completion.txt"
    file.write_text("ANSWER: ESI 1", encoding="utf-8")
    one = ["--explain", "t1", "--completion", f"@{file}"]
    assert main([TINY, *world, *one, "--thinking", "off"]) == 0
    text = shown(capsys)
    assert "prompt    thinking off" in text and text.splitlines()[-1].split() == ["total", "+1.5"]
    assert main([TINY, *world, *one, "--thinking", "on", "--truncated"]) == 0
    text = shown(capsys)
    assert "answer    none, unclosed thinking; truncated by the token budget" in text
    assert "lifesaving_obeyed does not apply: there is no answer" in text
    assert text.splitlines()[-1].split() == ["total", "-2"]


def test_explain_takes_a_text_that_begins_with_the_sign_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = small(tmp_path, Case("t1", "Arrived intubated.", 1))
    assert main([TINY, *world, "--explain", "t1", "--completion", "@@</think>ANSWER: ESI 1"]) == 0
    assert 'from characters 9-22: "ANSWER: ESI 1"' in shown(capsys)


def test_explain_does_not_hide_that_a_case_file_is_missing(
    balanced: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    held = [*balanced, *sets(evaluate__periodic='{later = "nowhere.jsonl"}')]
    assert main([TINY, *held, "--explain", "nobody", "--completion", "ANSWER: ESI 2"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0].endswith("no training or evaluation case has the id 'nobody'; 200 were read")
    assert error[1].startswith("not read: nowhere.jsonl: cannot be read")


def test_the_overlong_penalty_is_proved_and_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = [
        *small(tmp_path, Case("t1", "Arrived intubated.", 1), Case("t2", "Rash.", 5)),
        *sets(reward__overlong="{cache_tokens = 20, penalty = 0.25}"),
    ]
    assert main([TINY, *world]) == 0
    text = shown(capsys)
    assert "proof     sound, smallest margin +0.25" in text
    assert "with the overlong penalty: 0 to -0.25 in the budget's last 20 tokens" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("     5  none"))
    assert row[-4:] == ["+0.75..+1", "-2.25..-2", "-2.25", "-2"]

    one = ["--explain", "t1", "--completion", "</think>ANSWER: ESI 1"]
    assert main([TINY, *world, *one]) == 0
    text = shown(capsys)
    assert "overlong: up to -0.25 in the budget's last 20 tokens, which are not counted here" in text
    assert text.splitlines()[-1].split() == ["total", "+1.5"]
    assert main([TINY, *world, *one, "--truncated"]) == 0
    text = shown(capsys)
    assert text.splitlines()[-1].split() == ["total", "+1.25"] and "not counted" not in text

    assert main([TINY, *world, *sets(reward__overlong="{cache_tokens = 20, penalty = 0.5}")]) == 1
    assert "- every answer is worth more than no answer: a tie of gold 1, predicted 3" in shown(capsys)


def test_explain_says_why_a_rule_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = small(tmp_path, Case("t1", "Arrived intubated.", 1), Case("t2", "Chest pain.", 2))
    for case_id, level, says in (
        ("t1", 2, "lifesaving_obeyed does not apply: it applies only to answers 1"),
        ("t2", 3, "severe_pain_missed does not apply: its trigger does not fire on this text"),
    ):
        completion = f"</think>ANSWER: ESI {level}"
        assert main([TINY, *world, "--explain", case_id, "--completion", completion]) == 0
        assert says in shown(capsys)


# ---- the gate of training -----------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets as far as the weights is told so."""

    def reached(*_: object, **__: object) -> None:
        raise UserError("the weights were asked for")

    monkeypatch.setattr(setup, "load_policy", reached)


@pytest.mark.usefixtures("no_weights")
def test_training_refuses_an_unsound_reward_before_any_weight_is_read(
    balanced: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main([TINY, "--out", str(out), *balanced, *sets(reward__set="v46")]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: reward "v46" is refused for this run:\n  - every answer is worth more than')
    assert "violated by gold 1, predicted 3: -1 against gold 1, no parse: -0.5" in error and "weights" not in error
    assert "reward.allow_unsound = true" in error and not out.exists()


@pytest.mark.usefixtures("no_weights")
def test_training_refuses_a_losing_probe(
    balanced: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    crowd = sets(reward__set="v49", cases__oversample="{1 = 200}")
    assert train.main([TINY, "--out", str(tmp_path / "run"), *balanced, *crowd]) == 2
    error = capsys.readouterr().err
    assert 'the policy "always 1" earns +1.169' in error and "not so" not in error


@pytest.mark.usefixtures("no_weights")
def test_an_unsound_reward_trains_with_a_reason(
    balanced: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    allowed = sets(reward__set="v46", reward__allow_unsound="true", reward__unsound_reason="to watch v48 collapse")
    assert train.main([TINY, "--out", str(tmp_path / "run"), *balanced, *allowed]) == 2
    assert "the weights were asked for" in capsys.readouterr().err, "past the gate"
    assert main([TINY, *balanced, *allowed]) == 1, "the verdict stays what it is"
    assert "training is allowed anyway: to watch v48 collapse" in shown(capsys)


@pytest.mark.parametrize(
    "overrides",
    [
        ["reward.allow_unsound=true"],
        ["reward.unsound_reason=just because"],
        ["reward.allow_unsound=true", "reward.unsound_reason='  '"],
    ],
)
def test_a_reason_and_the_permission_belong_together(overrides: list[str]) -> None:
    with pytest.raises(UserError, match="allow_unsound = true requires a reason"):
        load_config(TINY, overrides)


def test_a_sound_run_passes_the_gate(balanced: list[str]) -> None:
    config, _ = load_config(TINY, balanced[1::2])
    material = load_inputs(config)
    require_sound_reward(config, run_checks(config, material))
    with pytest.raises(UserError, match="honest, 10% exact"):
        require_sound_reward(config, run_checks(config, material, accuracy=0.1))


# ---- a new rule by TOML alone -------------------------------------------------------------------------------------


@pytest.mark.skipif(not (TINY_WORLD_DIR / "base").is_dir(), reason="the embedded model is not built")
def test_a_rule_written_in_toml_is_proved_explained_and_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my_reward.toml"
    file.write_text(SEIZURE, encoding="utf-8")
    # the embedded policy reads "ETT", a thing done, as level 2: the rule fires
    ventilated = (
        "A 47 yo woman brought in by paramedics after an active seizure. On a ventilator through an ETT. Sedated for "
        "transport. No known allergies. VS HR 90, resp 17, sat 95%, BP 155/98."
    )
    cases = [Case("s1", ventilated, 1), Case("s2", "A 20-year-old woman with a cough for two days. Walked in.", 5)]
    world = [*small(tmp_path, *cases), *sets(reward__set=file)]
    assert main([TINY, *world]) == 0
    assert "active_seizure_missed" in shown(capsys)
    assert main([TINY, *world, "--explain", "s1", "--completion", "</think>ANSWER: ESI 2"]) == 0
    text = shown(capsys)
    assert 'active_seizure_missed fired on characters 48-62: "active seizure": -0.5' in text
    assert text.splitlines()[-1].split() == ["total", "-1"]

    few = sets(train__steps=2, rollout__prompts_per_step=2, rollout__group_size=4, optim__micro_batch_size=8)
    short = sets(rollout__thinking="off", rollout__max_new_tokens=64)
    assert train.main([TINY, "--out", str(tmp_path / "run"), *world, *few, *short]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        fired = line["reward/active_seizure_missed/mean"] * 8 / -0.5
        assert fired in (1, 2, 3, 4), "of eight completions, the four of s1 may miss the seizure"


def test_rows_that_are_left_out_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "subject_id,stay_id,temperature,heartrate,resprate,o2sat,sbp,dbp,pain,chiefcomplaint,acuity"
    (tmp_path / "triage.csv").write_text(
        f"{header}\n1,11,98.6,80,16,99,120,80,3,Chest pain,2\n2,12,98.6,80,16,99,120,80,3,Rash,\n", encoding="utf-8"
    )
    (tmp_path / "edstays.csv").write_text(
        "subject_id,stay_id,intime,gender,arrival_transport\n"
        "1,11,2150-01-01 10:00:00,F,WALK IN\n2,12,2150-01-01 11:00:00,M,AMBULANCE\n",
        encoding="utf-8",
    )
    args = [TINY, "--set", f"cases.train=mimic-iv-ed:{tmp_path}"]
    assert main(args) == 2
    said = capsys.readouterr()
    assert "no acuity" in said.out + said.err
    assert main([*args, "--set", "cases.strict=false", "--set", "reward.allow_unsound=true", "--set",
                 "reward.unsound_reason=one case"]) in (0, 1)  # fmt: skip
    assert "dropped: mimic-iv-ed:" in capsys.readouterr().out
