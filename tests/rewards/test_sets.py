"""Reward sets: every shipped example, the scoring, the files' errors, code rules, time limits, isolation."""

import ast
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import Reward, RewardError, RuleInput, dump_reward, load_reward
from rewards import reward as reward_module
from rewards import rules as rules_module
from rewards.parse import FORMATS
from rewards.rules import NumberTrigger, PatternTimeout, PatternTrigger, find_trigger, levels
from rewards.schema import ExampleCase
from rewards.set_files import load_set, shipped_sets
from rewards.table import SIGNED_ERRORS, Table, score_parts, total

EXAMPLES = [
    pytest.param(name, case, id=f"{name}-{case.name}") for name in shipped_sets() for case in load_set(name)[0].case
]
HEAD = """
name = "mine"
about = "a set of a test"
extends = "v49"
"""
SEIZURE = """
[[rule]]
name = "seizure_missed"
gold = "= 1"
predicted = "> 1"
value = -0.5
grade = "U"
source = "an active seizure needs help now"
[rule.trigger]
kind = "pattern"
pattern = 'active seizure|seizing'
unless = 'no active seizure'
"""

PAIN = """
[[rule]]
name = "severe_pain_missed"
gold = "= 2"
predicted = "> 2"
value = -0.5
grade = "U"
source = "s"
[rule.trigger]
kind = "number"
patterns = ['pain {number}']
which = "any"
at_least = 7
at_most = 11
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def answered(reward: Reward, text: str, gold: int, level: int) -> float:
    return reward.score(
        text=text, gold=gold, completion=f"ANSWER: ESI {level}", thinking=False, finished=True, case_id="c"
    ).total


# ---- the shipped sets ---------------------------------------------------------------------------------------------


def test_the_series_and_our_own_set_are_shipped() -> None:
    assert shipped_sets() == ("v45c", "v46", "v48", "v49", "v49_stacked", "v49_without_rules", "v50")
    for name in shipped_sets():
        assert load_reward(name).name == name
        assert len(load_set(name)[0].case) >= 2


@pytest.mark.parametrize(("name", "case"), EXAMPLES)
def test_every_example_of_every_set_scores_as_its_file_says(name: str, case: ExampleCase) -> None:
    reward = load_reward(name)
    score = reward.score(
        text=case.text,
        gold=case.gold,
        completion=case.completion,
        thinking=case.thinking,
        finished=case.finished,
        case_id=case.name,
    )
    assert score.total == pytest.approx(case.total, abs=1e-12)
    assert {part: value for part, value in score.parts.items() if value} == case.parts
    assert score.answer.reason == case.reason
    assert tuple(score.parts) == reward.components
    assert math.fsum(score.parts.values()) == score.total


def test_every_row_of_v49_and_v50_has_an_example_that_fires_it() -> None:
    for name in ("v49", "v50"):
        seen = {part for case in load_set(name)[0].case for part in case.parts}
        assert {rule.name for rule in load_reward(name).rules} <= seen


def test_v46_and_v48_are_one_reward_and_v49_another() -> None:
    assert load_reward("v46").sha256 == load_reward("v48").sha256
    assert len({load_reward(name).sha256 for name in ("v45c", "v46", "v49", "v50")}) == 4


def test_the_table_of_v49_is_the_one_in_the_cards() -> None:
    v49 = load_reward("v49")
    expected = {-4: -0.5, -3: -0.5, -2: -0.5, -1: 0.0, 0: 1.0, 1: -0.5, 2: -1.0, 3: -1.0, 4: -1.0}
    for gold, level in itertools.product(range(1, 6), repeat=2):
        assert answered(v49, "a text without any trigger", gold, level) == expected[level - gold]
    assert v49.floor == -2.0
    assert load_reward("v46").floor == -1.0
    assert load_reward("v45c").floor == 0.0


FIRES = {
    # rule of v49 and v50: (wordings that both see, only v49 sees, only v50 sees, neither sees)
    "lifesaving_obeyed": (
        [
            "intubated in the field",
            "Arrived INTUBATED",
            "chest tube placed",
            "central line placed",
            "intubation by EMS",
        ],
        ["not intubated", "no intubation needed", "history of intubation in 2019", "chest tube removed last month"],
        ["ETT in place", "endotracheal tube placed on scene", "thoracostomy tube in place", "central venous catheter"],
        ["extubated last week", "IV access, oxygen", "chest pain", "midline incision"],
    ),
    "open_injury_missed": (
        [
            "open fracture of the left tibia",
            "stab wound to the chest",
            "gunshot wound to the thigh",
            "penetrating injury",
        ],
        ["no open fracture", "denies penetrating trauma", "vitals stable", "no stab or gunshot wounds found"],
        ["compound fracture of the wrist", "bone visible through the wound", "shot in the left shoulder"],
        ["closed fracture", "laceration of the hand", "sharp pain"],
    ),
    "severe_pain_missed": (
        [
            "pain 9/10",
            "pain score 8",
            "rates pain eight out of ten",
            "pain: 10/10",
            "8/10 pain",
            "pain rated at 9 out of 10",
            "pain described as severe, 9 of 10",
            "Pain is 7",
        ],
        ["pain was 8/10, now 2/10", "pain 8/10 earlier, now 2/10", "pain down from 8/10 to 2/10"],
        ["the ache was 3/10, now 9/10"],
        [
            "pain 3/10",
            "pain for 8 days",
            "chest pain 9 hours ago",
            "pain 13",
            "no pain",
            "pain 2/10, HR 98",
            "pain 6/10",
        ],
    ),
}


@pytest.mark.parametrize("rule", FIRES)
def test_what_the_triggers_of_v49_and_v50_see(rule: str) -> None:
    v49, v50 = load_reward("v49"), load_reward("v50")
    gold = min(v49.rule(rule).gold)
    for texts, seen in zip(FIRES[rule], [(True, True), (True, False), (False, True), (False, False)], strict=True):
        for text in texts:
            narrative = f"A 40-year-old female, {text}. BP 120/80."
            assert (v49.applies(rule, narrative, gold), v50.applies(rule, narrative, gold)) == seen, text


def test_applies_needs_the_gold_condition_and_a_known_rule() -> None:
    v49 = load_reward("v49")
    assert [v49.applies("severe_pain_missed", "pain 9/10", gold) for gold in range(1, 6)] == [False, True] + 3 * [False]
    with pytest.raises(RewardError, match="severe_pain_missed"):
        v49.applies("severe_pain", "pain 9/10", 2)


def test_score_says_which_rule_fired_where_and_what_stacking_left() -> None:
    text = "Gunshot wound to the thigh, pain 10/10."
    score = load_reward("v49").score(
        text=text, gold=2, completion="ANSWER: ESI 4", thinking=False, finished=True, case_id="c"
    )
    assert [(one.rule, text[slice(*one.span)], one.value) for one in score.fired if one.span] == [
        ("open_injury_missed", "Gunshot", -0.5),
        ("severe_pain_missed", "pain 10/10", -0.5),
    ]
    assert (score.parts["open_injury_missed"], score.parts["severe_pain_missed"]) == (-0.5, 0.0)
    assert score.answer.span == (0, 13)
    assert not score.timed_out


def test_a_cut_completion_counts_as_parsed_if_it_parsed() -> None:
    v49 = load_reward("v49")
    for completion, expected in (("ANSWER: ESI 3", 1.0), ("ANSWER: ESI", -2.0)):
        totals = {
            v49.score(text="t", gold=3, completion=completion, thinking=False, finished=finished, case_id="c").total
            for finished in (True, False)
        }
        assert totals == {expected}


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(12)))
def test_scores_do_not_depend_on_order_or_repetition(order: list[int]) -> None:
    v49 = load_reward("v49")
    inputs = [
        (text, gold, level)
        for text in ("arrived intubated", "stab wound, pain 9/10")
        for gold in (1, 2)
        for level in (1, 2, 4)
    ]
    once = [answered(v49, *one) for one in inputs]
    assert [answered(v49, *inputs[i]) for i in order] == [once[i] for i in order]


def test_gold_outside_the_levels_is_refused_by_case_id_and_without_the_text() -> None:
    with pytest.raises(RewardError) as caught:
        load_reward("v49").score(text="SECRET", gold=6, completion="", thinking=False, finished=True, case_id="train-7")
    assert "train-7" in str(caught.value)
    assert "SECRET" not in str(caught.value)


# ---- the length term ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("completion", "without"), [("ANSWER: ESI 4", -1.5), ("ANSWER: ESI 2", 1.0), ("none", -2.0)])
@pytest.mark.parametrize("length_penalty", [0.0, -0.125, -0.5])
def test_the_length_penalty_is_a_component_of_its_own_after_the_bounds(
    completion: str, without: float, length_penalty: float, tmp_path: Path
) -> None:
    body = HEAD + '[bounds]\nlow = -2.0\nhigh = 1.0\ngrade = "U"\nsource = "s"\n'
    score = load_reward(written(tmp_path, body)).score(
        text="stabbed",
        gold=2,
        completion=completion,
        thinking=False,
        finished=True,
        case_id="c",
        length_penalty=length_penalty,
    )
    assert score.total == without + length_penalty
    assert score.parts["overlong"] == length_penalty
    assert math.fsum(score.parts.values()) == score.total


@pytest.mark.parametrize("refused", [0.1, -1e308, math.nan, -math.inf])
def test_a_length_penalty_that_is_none_is_refused(refused: float) -> None:
    with pytest.raises(RewardError, match='case "c": expected a length_penalty <= 0'):
        load_reward("v49").score(
            text="t", gold=2, completion="", thinking=False, finished=True, case_id="c", length_penalty=refused
        )


# ---- the arithmetic -----------------------------------------------------------------------------------------------

quarters = st.integers(-8, 8).map(lambda n: n / 4)


@settings(deadline=None)
@given(
    values=st.lists(quarters, max_size=5),
    penalties=st.sampled_from(["sum", "worst"]),
    bonuses=st.sampled_from(["sum", "best"]),
    bounds=st.tuples(quarters, quarters).filter(lambda pair: pair[0] < pair[1]),
    base=quarters,
)
def test_combine_is_the_sum_that_the_policies_describe(
    values: list[float], penalties: str, bonuses: str, bounds: tuple[float, float], base: float
) -> None:
    table = Table(dict.fromkeys(SIGNED_ERRORS, base), -3.0, penalties, bonuses, *bounds)
    parts = score_parts(table, 0, {f"r{i}": value for i, value in enumerate(values)})
    expected = base
    negative = [value for value in values if value < 0]
    positive = [value for value in values if value > 0]
    expected += (min(negative) if penalties == "worst" else sum(negative)) if negative else 0.0
    expected += (max(positive) if bonuses == "best" else sum(positive)) if positive else 0.0
    expected = bounds[0] if expected < bounds[0] else bounds[1] if expected > bounds[1] else expected
    assert total(parts) == expected
    assert sum(parts[f"r{i}"] != 0 for i in range(len(values)) if values[i] < 0) <= (
        1 if penalties == "worst" else len(values)
    )
    assert total(score_parts(table, None, {"r0": 1.0})) == min(max(-3.0, bounds[0]), bounds[1])


def test_conditions_are_sets_of_levels() -> None:
    assert levels("= 1") == {1}
    assert levels(">= 4") == {4, 5}
    assert levels("<2") == {1}
    assert levels("!= 3") == {1, 2, 4, 5}
    for refused in ("> 5", "== 1", "1", "= 6", ""):
        with pytest.raises(ValueError, match="expected"):
            levels(refused)


def test_unless_takes_away_a_match_and_not_the_text() -> None:
    trigger = PatternTrigger("intubat|chest tube", unless="not intubated")
    assert find_trigger(trigger, "not intubated", timeout_s=1) is None
    assert find_trigger(trigger, "not intubated, chest tube in place", timeout_s=1) == (15, 25)


def test_which_of_several_numbers_counts() -> None:
    text = "pain 9/10, later pain 2/10, pain 55/10"
    for which, fires in (("any", True), ("last", False)):
        trigger = NumberTrigger(("pain {number}/10",), 7, 10, which)  # type: ignore[arg-type]
        assert (find_trigger(trigger, text, timeout_s=1) is not None) == fires
    assert find_trigger(NumberTrigger(("pain {number}",), 7, 10), "Pain Seven", timeout_s=1) == (0, 10)
    assert find_trigger(NumberTrigger(("pain {number}",), 7, 10), "pain six", timeout_s=1) is None
    assert find_trigger(NumberTrigger(("pain {number}",), 7, 10), "pain 11", timeout_s=1) is None


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_new_rule_is_a_row_of_toml(tmp_path: Path) -> None:
    reward = load_reward(written(tmp_path, HEAD + SEIZURE))
    assert reward.components[-4:] == ("seizure_missed", "bounds", "overlong", "timeout")
    assert answered(reward, "brought in with an active seizure", 1, 2) == -1.0
    assert answered(reward, "no active seizure", 1, 2) == -0.5
    assert reward.sha256 != load_reward("v49").sha256


def test_extending_replaces_rows_by_name_adds_and_drops(tmp_path: Path) -> None:
    text = HEAD + 'drop = ["severe_pain_missed"]\n'
    text += '[base.over_by_one]\nerrors = [-1]\nvalue = 0.25\ngrade = "U"\nsource = "s"\n'
    text += SEIZURE.replace("seizure_missed", "open_injury_missed")
    reward = load_reward(written(tmp_path, text))
    assert [rule.name for rule in reward.rules] == ["lifesaving_obeyed", "lifesaving_missed", "open_injury_missed"]
    assert answered(reward, "none", 2, 1) == 0.25
    assert answered(reward, "active seizure", 1, 2) == -1.0
    assert answered(reward, "open fracture", 2, 3) == -0.5


def test_the_hash_sees_what_scores_and_not_what_explains(tmp_path: Path) -> None:
    original = load_reward(written(tmp_path, HEAD + SEIZURE)).sha256
    for replaced, by, same in (
        ("an active seizure needs help now", "another reason", True),
        ("-0.5", "-0.25", False),
        ("'active seizure|seizing'", "'active seizure'", False),
        ('"> 1"', '"> 2"', False),
    ):
        changed = load_reward(written(tmp_path, HEAD + SEIZURE.replace(replaced, by))).sha256
        assert (changed == original) == same, replaced
    code = CODE.format(module=__name__, function="concise")
    wider = code.replace("-0.25", "-0.5")
    assert load_reward(written(tmp_path, HEAD + code)).sha256 != load_reward(written(tmp_path, HEAD + wider)).sha256


REFUSALS = [
    (SEIZURE.replace("value =", "valeu ="), ['rule[1] "seizure_missed".valeu', 'did you mean "value"']),
    (SEIZURE.replace("pattern =", "patern ="), ['"seizure_missed".trigger.patern', 'did you mean "pattern"']),
    (SEIZURE.replace("active seizure|", "("), ['"seizure_missed".trigger.pattern', "regular expression"]),
    (SEIZURE.replace('"> 1"', '"> 5"'), ['"seizure_missed".predicted', "expected"]),
    (SEIZURE.replace("-0.5", "nan"), ['"seizure_missed".value', "finite"]),
    (
        SEIZURE.replace("-0.5", "1e308"),
        ['"seizure_missed".value', "expected a number from -1e+06 to 1e+06, got 1e+308"],
    ),
    (SEIZURE.replace("-0.5", "-1000001"), ['"seizure_missed".value', "expected a number from"]),
    (SEIZURE.replace("-0.5", "1" + "0" * 400), ['"seizure_missed".value']),
    ('[no_parse]\nvalue = -1e308\ngrade = "U"\nsource = "s"\n', ["no_parse.value", "expected a number from"]),
    ('[bounds]\nlow = -1e308\nhigh = 0.0\ngrade = "U"\nsource = "s"\n', ["bounds.low", "expected a number from"]),
    (
        '[base.exact]\nerrors = [0]\nvalue = 1e308\ngrade = "U"\nsource = "s"\n',
        ["base.exact.value", "expected a number from"],
    ),
    (
        PAIN.replace("= 11", "= 9").replace("= 7", "= 10"),
        ['"severe_pain_missed".trigger', "at_least <= at_most, got 10 > 9"],
    ),
    (PAIN.replace("= 11", "= 1" + "0" * 400), ['"severe_pain_missed".trigger', "at_most", "expected a number from"]),
    (
        SEIZURE.replace("value = -0.5", 'function = "m:f"\nrange = [-1e308, 0.0]'),
        ['"seizure_missed".range', "expected"],
    ),
    (SEIZURE.replace('name = "seizure_missed"', 'name = "overlong"'), ['rule "overlong"', "choose another"]),
    ("deep = " + "[" * 3000, ["not valid TOML: nested too deep"]),
    (SEIZURE.replace("-0.5", '"-0.5"'), ['"seizure_missed".value', "number"]),
    (SEIZURE.replace('grade = "U"', 'grade = "X"'), ['"seizure_missed".grade', "'K', 'I' or 'U'"]),
    (SEIZURE.replace("value = -0.5", ""), ["either value", "function"]),
    (SEIZURE.replace('name = "seizure_missed"', 'name = "no_parse"'), ['rule "no_parse"', "choose another"]),
    (SEIZURE + SEIZURE, ['two rows have the name "seizure_missed"']),
    ('drop = ["severe_pain_mised"]\n', ["drop", 'did you mean "severe_pain_missed"']),
    (
        '[base.extra]\nerrors = [0]\nvalue = 1.0\ngrade = "U"\nsource = "s"\n',
        ["predicted - gold = 0", "got 2", "exact, extra"],
    ),
    ('[bounds]\nlow = 1.0\nhigh = 0.0\ngrade = "U"\nsource = "s"\n', ["bounds", "low < high"]),
    ('[answer]\nformats = ["answr"]\n', ["answer.formats", "expected one of"]),
    (SEIZURE.replace('kind = "pattern"', 'kind = "patern"'), ['"seizure_missed".trigger', "'pattern', 'number'"]),
    ("name = \n", ["not valid TOML", "line 5"]),
]


@pytest.mark.parametrize(("body", "expected"), REFUSALS)
def test_a_faulty_file_is_refused_with_file_row_and_key(tmp_path: Path, body: str, expected: list[str]) -> None:
    path = written(tmp_path, HEAD + body)
    with pytest.raises(RewardError) as caught:
        load_reward(path)
    for piece in [str(path), *expected]:
        assert piece in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    for name in (folder, folder.with_suffix(".json")):
        name.mkdir(exist_ok=True)
        with pytest.raises(RewardError, match=f"{name}: cannot be read: expected a file, found a folder"):
            load_reward(name)
    with pytest.raises(RewardError, match="cannot be read: File name too long"):
        load_reward("x" * 5000 + ".toml")
    with pytest.raises(RewardError, match="cannot be read: no file can have this name"):
        load_reward("a\0b.toml")
    with pytest.raises(RewardError, match="cannot be read: expected a file, found a folder"):
        load_reward(written(tmp_path, HEAD.replace('"v49"', '"folder.toml"')))
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    with pytest.raises(RewardError, match="cannot be read: Too many levels of symbolic links"):
        load_reward(loop)


def test_more_refusals_across_files(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match='did you mean "v49"'):
        load_reward("v409")
    with pytest.raises(RewardError, match="cannot be read: No such file"):
        load_reward(tmp_path / "none.toml")
    with pytest.raises(RewardError, match="leads back"):
        load_reward(written(tmp_path, HEAD.replace('"v49"', '"mine.toml"')))
    with pytest.raises(RewardError, match="no_parse, stacking, answer"):
        load_reward(written(tmp_path, 'name = "mine"\nabout = "a"\npattern_timeout_s = 0.1\n'))
    same = SEIZURE.split("[rule.trigger]")[0] + '[rule.trigger]\nkind = "same"\nrule = "open_injury_mised"\n'
    with pytest.raises(RewardError, match='did you mean "open_injury_missed"'):
        load_reward(written(tmp_path, HEAD + same))
    many = "".join(
        SEIZURE.replace("seizure_missed", f"row_{i}").replace("active seizure|seizing", f"word{i}") for i in range(13)
    )
    with pytest.raises(RewardError, match="more than 12 distinct triggers"):
        load_reward(written(tmp_path, HEAD + many))


def test_an_example_with_a_fault_does_not_leak_its_text(tmp_path: Path) -> None:
    case = '[[case]]\nname = "c"\ntext = "SECRET"\ngold = 9\ncompletion = "SECRET"\n'
    case += "thinking = false\ntotal = 1\nparts = {}\n"
    with pytest.raises(RewardError) as caught:
        load_reward(written(tmp_path, HEAD + case))
    assert 'case[1] "c".gold' in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_set_may_read_fewer_formats(tmp_path: Path) -> None:
    reward = load_reward(written(tmp_path, HEAD + '[answer]\nformats = ["answer"]\n'))
    for completion, level in (("ANSWER: ESI 2", 2), ("ESI level: 2", None)):
        score = reward.score(text="t", gold=2, completion=completion, thinking=False, finished=True, case_id="c")
        assert score.answer.level == level
    assert set(reward.formats) < set(FORMATS)


# ---- resolved sets as JSON ----------------------------------------------------------------------------------------


def dumped(folder: Path, content: object) -> Path:
    path = folder / "reward.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", shipped_sets())
def test_a_dumped_set_is_the_same_reward(name: str, tmp_path: Path) -> None:
    path = dumped(tmp_path, dump_reward(name))
    again, original = load_reward(path), load_reward(name)
    assert again.sha256 == original.sha256
    assert (again.name, again.components, again.table, again.triggers) == (
        original.name,
        original.components,
        original.table,
        original.triggers,
    )
    assert again.rules == original.rules
    assert dump_reward(path) == dump_reward(name)
    assert load_set(path)[0] == load_set(name)[0]


def test_a_dumped_set_holds_what_it_extends_and_its_rules_of_code(tmp_path: Path) -> None:
    parent = tmp_path / "parent.toml"
    parent.write_text(HEAD + SEIZURE, encoding="utf-8")
    child = 'name = "child"\nabout = "a"\nextends = "parent.toml"\ndrop = ["open_injury_missed"]\n'
    original = load_reward(written(tmp_path, child + CODE.format(module=__name__, function="concise")))
    content = dump_reward(tmp_path / "mine.toml")
    parent.unlink()
    again = load_reward(dumped(tmp_path, content))
    assert again.sha256 == original.sha256
    assert again.components == original.components
    assert "seizure_missed" in again.components and "open_injury_missed" not in again.components
    said = "words, words, words\nANSWER: ESI 2"
    for reward in (original, again):
        score = reward.score(text="t", gold=2, completion=said, thinking=False, finished=True, case_id="c")
        assert score.parts["concise"] == -0.25


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nam": "v49"}, ["nam: unknown key", 'did you mean "name"']),
        ({"no_parse": {"value": "-2.0", "grade": "K", "source": "s"}}, ["no_parse.value", "valid number"]),
        ({"no_parse": {"value": 1e308, "grade": "K", "source": "s"}}, ["no_parse.value", "expected a number from"]),
        ({"no_parse": {"value": math.nan, "grade": "K", "source": "s"}}, ["not valid JSON: NaN"]),
        ({"name": "../v49"}, ["name", "pattern"]),
        ({"pattern_timeout_s": 0}, ["pattern_timeout_s", "greater than 0"]),
        ({"base": {}}, ["base: expected one row for the error predicted - gold = -4, got 0"]),
        ({"extends": "v46"}, ["extends: unknown key"]),
        ({"rule": {}}, ["rule", "valid tuple"]),
    ],
)
def test_a_dumped_set_is_checked_as_strictly_as_toml(tmp_path: Path, change: dict, expected: list[str]) -> None:
    path = dumped(tmp_path, dump_reward("v49") | change)
    with pytest.raises(RewardError) as caught:
        load_reward(path)
    for piece in [str(path), *expected]:
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "the file: Input should be"),
        ("{", "not valid JSON"),
        ('{"name": "a", "name": "b"}', "an object contains a key twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"name": 1' + "0" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_set_of_json_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "reward.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RewardError, match=expected):
        load_reward(path)


def test_a_dumped_set_may_not_name_two_rules_alike_or_a_rule_like_a_component(tmp_path: Path) -> None:
    content = dump_reward("v49")
    rows = content["rule"]
    assert isinstance(rows, list)
    with pytest.raises(RewardError, match='two rows have the name "lifesaving_obeyed"'):
        load_reward(dumped(tmp_path, content | {"rule": [*rows, rows[0]]}))
    with pytest.raises(RewardError, match='rule "overlong": this name is reserved'):
        load_reward(dumped(tmp_path, content | {"rule": [*rows, rows[0] | {"name": "overlong"}]}))


# ---- rules of code ------------------------------------------------------------------------------------------------


def concise(view: RuleInput) -> float:
    return -0.25 if len(view.completion) > 20 else 0.0


def too_much(view: RuleInput) -> float:
    return 7.0


def not_a_number(view: RuleInput) -> float:
    return math.nan


def fails(view: RuleInput) -> float:
    raise KeyError(view.text)


def leaves(view: RuleInput) -> float:
    raise SystemExit(0)


def enormous(view: RuleInput) -> float:
    return 10**5000


CODE = """
[[rule]]
name = "concise"
gold = "any"
predicted = "any"
function = "{module}:{function}"
range = [-0.25, 0.0]
grade = "U"
source = "short answers"
"""


def test_a_rule_of_code_adds_what_it_returns(tmp_path: Path) -> None:
    reward = load_reward(written(tmp_path, HEAD + CODE.format(module=__name__, function="concise")))
    assert answered(reward, "t", 2, 2) == 1.0
    long = reward.score(
        text="t", gold=2, completion="words, words, words\nANSWER: ESI 2", thinking=False, finished=True, case_id="c"
    )
    assert (long.total, long.parts["concise"]) == (0.75, -0.25)
    silent = reward.score(text="t", gold=2, completion="x" * 50, thinking=False, finished=True, case_id="c")
    assert silent.total == -2.0


@pytest.mark.parametrize(
    ("function", "piece"),
    [
        ("too_much", "7.0"),
        ("not_a_number", "nan"),
        ("enormous", "got int"),
        ("fails", "KeyError"),
        ("leaves", "SystemExit"),
    ],
)
def test_a_rule_of_code_that_fails_stops_and_names_rule_and_case(tmp_path: Path, function: str, piece: str) -> None:
    reward = load_reward(written(tmp_path, HEAD + CODE.format(module=__name__, function=function)))
    with pytest.raises(RewardError) as caught:
        reward.score(
            text="SECRET", gold=2, completion="ANSWER: ESI 2", thinking=False, finished=True, case_id="train-9"
        )
    for expected in ('"concise"', "train-9", piece):
        assert expected in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_function_that_cannot_be_imported_is_refused_at_load(tmp_path: Path) -> None:
    for module, function in (("nowhere", "concise"), (__name__, "nothing")):
        with pytest.raises(RewardError, match="cannot import"):
            load_reward(written(tmp_path, HEAD + CODE.format(module=module, function=function)))
    with pytest.raises(RewardError, match="not a function"):
        load_reward(written(tmp_path, HEAD + CODE.format(module=__name__, function="CODE")))


BROKEN_MODULES = {
    "torn": ("def concise(view:\n", "SyntaxError"),
    "raising": ("raise ValueError('no such thing')\n", "ValueError: no such thing"),
    "leaving": ("raise SystemExit(0)\n", "SystemExit: 0"),
    "missing": ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "deep": ("def f():\n    f()\nf()\n", "RecursionError"),
}


@pytest.mark.parametrize("name", BROKEN_MODULES)
def test_a_module_that_fails_while_it_is_imported_is_one_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, says = BROKEN_MODULES[name]
    (tmp_path / f"module_{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = written(tmp_path, HEAD + CODE.format(module=f"module_{name}", function="concise"))
    with pytest.raises(RewardError) as caught:
        load_reward(path)
    expected = f'{path}: rule "concise".function: cannot import "module_{name}:concise": {says}'
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("function", ["builtins:len", "math:sqrt", "functools:partial", "builtins:str"])
def test_a_callable_without_a_source_file_of_its_own_can_be_hashed(function: str, tmp_path: Path) -> None:
    module, _, name = function.partition(":")
    reward = load_reward(written(tmp_path, HEAD + CODE.format(module=module, function=name)))
    assert reward.rule("concise").function_name == function


# ---- time ---------------------------------------------------------------------------------------------------------


def test_a_catastrophic_pattern_ends_in_bounded_time_with_the_floor(tmp_path: Path) -> None:
    pattern = SEIZURE.replace("'active seizure|seizing'", "'(a+)+$'").replace("unless = 'no active seizure'", "")
    reward = load_reward(written(tmp_path, HEAD + "pattern_timeout_s = 0.05\n" + pattern))
    text = "a" * 5000 + "b"
    began = time.perf_counter()
    scores = [
        reward.score(text=text, gold=gold, completion=completion, thinking=False, finished=True, case_id="c")
        for gold, completion in ((1, "ANSWER: ESI 2"), (1, "ANSWER: ESI 1"), (1, "silence"), (4, "ANSWER: ESI 4"))
    ]
    assert time.perf_counter() - began < 10.0
    for score in scores:
        # the whole group alike: a case that cannot be judged must not teach
        assert score.timed_out
        assert score.total == reward.floor == -2.0
        assert {part: value for part, value in score.parts.items() if value} == {"timeout": -2.0}
        assert math.fsum(score.parts.values()) == score.total
    assert scores[0].answer.level == 2
    assert not reward.applies("seizure_missed", text, 1)


def test_a_clock_that_jumps_once_is_not_the_patterns_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """`regex` counts the processor time of the whole process, other threads' too."""
    limits: list[float] = []

    def jumps(trigger: PatternTrigger, text: str, timeout_s: float) -> tuple[int, int]:
        limits.append(timeout_s)
        if len(limits) < 2 or text == "slow":
            raise TimeoutError
        return 0, 9

    monkeypatch.setitem(rules_module._FIND, "pattern", jumps)
    trigger = PatternTrigger("intubat")
    assert find_trigger(trigger, "quick", timeout_s=0.1) == (0, 9) and limits == [0.1, 0.4]
    with pytest.raises(PatternTimeout, match="ran past 0.1 s, and again"):
        find_trigger(trigger, "slow", timeout_s=0.1)


def test_a_text_pays_for_a_timeout_once_however_many_texts_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    def search(trigger: PatternTrigger, text: str, *, timeout_s: float) -> None:
        searched.append(text)
        if text.startswith("slow"):
            raise PatternTimeout

    monkeypatch.setattr(reward_module, "CACHED_TEXTS", 2)
    monkeypatch.setattr(reward_module, "find_trigger", search)
    reward = load_reward(written(tmp_path, HEAD.replace("v49", "v46") + SEIZURE))
    texts = [f"slow {i}" for i in range(50)] + [f"quick {i}" for i in range(50)] + ["slow \ud800"]
    for _ in range(3):
        assert [reward.matches(text) is None for text in texts] == [text.startswith("slow") for text in texts]
    assert sorted(text for text in searched if text.startswith("slow")) == sorted(texts[:50] + texts[-1:])
    assert [text for text in searched if text.startswith("quick")] == 3 * texts[50:100]


# ---- isolation ----------------------------------------------------------------------------------------------------

FORBIDDEN = {"torch", "transformers", "peft", "numpy", "grpo"}


def test_no_module_of_the_package_imports_the_trainer_or_its_stack() -> None:
    for path in Path(rewards.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & FORBIDDEN, path.name


def test_the_package_works_where_the_trainer_and_its_stack_are_missing() -> None:
    program = f"""
import sys
for name in {sorted(FORBIDDEN)!r}:
    sys.modules[name] = None
import rewards, rewards.proof, rewards.blind_policies
assert rewards.proof.prove(rewards.load_reward("v49")).sound
"""
    root = Path(rewards.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
