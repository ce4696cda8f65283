"""The probes: expectations against sums by hand, the series' collapse, and the audit of rules."""

import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import RewardError, RuleInput, load_reward, parse_answer
from rewards.blind_policies import BLIND_POLICIES, PolicyReport, WeightedCase, expected_rewards, honest_responses
from rewards.rule_audit import audit_rules, rules_without_effect

PLAIN = "A 50-year-old male with a complaint."


def balanced(oversampled: float) -> list[WeightedCase]:
    """One case a level, level 1 standing as often as asked."""
    return [one(PLAIN, gold, oversampled if gold == 1 else 1.0) for gold in range(1, 6)]


def one(text: str, gold: int, weight: float = 1.0, case_id: str = "c") -> WeightedCase:
    return WeightedCase(case_id, text, gold, weight)


def means(report: PolicyReport) -> dict[str, float]:
    return {expectation.policy: expectation.mean for expectation in report.ranked}


def test_v45c_at_twenty_times_pays_always_1_more_than_an_honest_policy() -> None:
    report = expected_rewards(load_reward("v45c"), balanced(20.0))
    assert report.ranked[0].policy == "always 1"
    assert means(report)["always 1"] == pytest.approx(20 / 24)
    assert report.honest.mean == pytest.approx(0.7)
    assert report.policies_that_beat_honest == ("always 1",)


def test_v49_at_five_times_pays_nobody_more_than_the_honest_policy() -> None:
    report = expected_rewards(load_reward("v49"), balanced(5.0))
    assert report.policies_that_beat_honest == ()
    assert report.ranked[0] == report.honest
    # 5 of 9 right, one valve, three over by two or more
    assert means(report)["always 1"] == pytest.approx((5 * 1.0 + 0.0 - 0.5 * 3) / 9)
    # errors: under by one for level 1, a valve or an under-triage for 2-4, a valve for 5
    honest = (5 * (0.7 - 0.15) + 3 * (0.7 - 0.075) + 0.7) / 9
    assert report.honest.mean == pytest.approx(honest)
    for hack in set(BLIND_POLICIES) - {f"always {level}" for level in range(1, 6)}:
        assert means(report)[hack] == -2.0


def test_what_the_series_tells_of_oversampling_in_v49() -> None:
    # an emergency department's mix: few patients of level 1, most of level 3
    mix = {1: 0.06, 2: 0.33, 3: 0.54, 4: 0.066, 5: 0.004}
    at = {
        times: means(
            expected_rewards(load_reward("v49"), [one(PLAIN, g, w * (times if g == 1 else 1)) for g, w in mix.items()])
        )["always 1"]
        for times in (5, 20)
    }
    assert at[5] == pytest.approx(-0.02, abs=0.05)
    assert at[20] == pytest.approx(0.40, abs=0.05)


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.integers(0, 5), min_size=5, max_size=5).filter(any),
    accuracy=st.floats(0.05, 1.0),
)
def test_expectations_are_weighted_means(weights: list[int], accuracy: float) -> None:
    v46 = load_reward("v46")
    table = {-4: -0.5, -3: -0.5, -2: -0.5, -1: 0.0, 0: 1.0, 1: -0.5, 2: -1.0, 3: -1.0, 4: -1.0}
    report = expected_rewards(v46, [one(PLAIN, gold, float(w)) for gold, w in enumerate(weights, 1)], accuracy=accuracy)
    mass = sum(weights)
    for level in range(1, 6):
        values = [table[level - gold] for gold in range(1, 6)]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / mass
        variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / mass
        found = next(row for row in report.ranked if row.policy == f"always {level}")
        assert found.mean == pytest.approx(mean)
        assert found.std == pytest.approx(math.sqrt(variance), abs=1e-7)
    honest = 0.0
    for gold, weight in enumerate(weights, 1):
        over, under = gold > 1, gold < 5
        wrong = (0.0 * over - 0.5 * under) / (over + under)
        honest += weight * (accuracy * 1.0 + (1 - accuracy) * wrong) / mass
    assert report.honest.mean == pytest.approx(honest)
    assert [row.mean for row in report.ranked] == sorted((row.mean for row in report.ranked), reverse=True)


@settings(deadline=None)
@given(gold=st.integers(1, 5), accuracy=st.floats(0.01, 1.0))
def test_the_honest_policy_errs_by_one_level_only(gold: int, accuracy: float) -> None:
    draws = honest_responses(gold, accuracy)
    assert math.fsum(share for share, _ in draws) == pytest.approx(1.0)
    assert draws[0][0] == accuracy
    written = [int(completion[-1]) for _, completion in draws]
    assert written[0] == gold
    assert sorted(written[1:]) == [level for level in (gold - 1, gold + 1) if 1 <= level <= 5]


def test_a_modifier_reaches_the_expectation() -> None:
    report = expected_rewards(load_reward("v49"), [one("Arrived intubated.", 1)], accuracy=0.5)
    assert means(report)["always 1"] == 1.5
    assert means(report)["always 3"] == -1.5
    assert report.honest.mean == pytest.approx(0.5 * 1.5 + 0.5 * -1.0)


def test_a_tie_with_the_honest_policy_refuses_too() -> None:
    assert expected_rewards(load_reward("v49"), [one(PLAIN, 2)], accuracy=1.0).policies_that_beat_honest == (
        "always 2",
    )


@pytest.mark.parametrize(
    ("cases", "accuracy"),
    [
        ([], 0.7),
        ([one(PLAIN, 2, 0.0)], 0.7),
        ([one(PLAIN, 2, -1.0)], 0.7),
        ([one(PLAIN, 2, math.nan)], 0.7),
        ([one(PLAIN, 0)], 0.7),
        ([one(PLAIN, 2)], 0.0),
        ([one(PLAIN, 2)], 1.1),
        ([one(PLAIN, 2)], math.nan),
    ],
)
def test_meaningless_inputs_are_refused(cases: list[WeightedCase], accuracy: float) -> None:
    with pytest.raises(RewardError, match="expected"):
        expected_rewards(load_reward("v49"), cases, accuracy=accuracy)


def test_every_hack_is_probed_and_none_but_the_constant_ones_is_an_answer() -> None:
    assert len(BLIND_POLICIES) == 10
    assert BLIND_POLICIES["list all five"].endswith("ANSWER: ESI 1, 2, 3, 4, 5")
    assert BLIND_POLICIES["list all five, blanks between"].endswith("ANSWER: ESI 1 2 3 4 5")
    answers = {name: parse_answer(text, thinking=True) for name, text in BLIND_POLICIES.items()}
    for name, answer in answers.items():
        assert answer.level == (int(name[-1]) if name.startswith("always ") else None)
    assert {name: answer.reason for name, answer in answers.items() if answer.level is None} == {
        "never answer": "no answer",
        "list all five": "range",
        "list all five, blanks between": "range",
        "answer inside <think> only": "unclosed thinking",
        "two different answers": "conflicting answers",
    }


def out_of_range(view: RuleInput) -> float:
    return 7.0


def fails(view: RuleInput) -> float:
    raise SystemExit(0)


@pytest.mark.parametrize(("function", "says"), [("out_of_range", "7.0"), ("fails", "SystemExit")])
def test_a_rule_of_code_that_fails_in_a_probe_names_the_case(tmp_path: Path, function: str, says: str) -> None:
    path = tmp_path / "code.toml"
    path.write_text(
        f'name = "code"\nabout = "a"\nextends = "v49"\n[[rule]]\nname = "code"\ngold = "= 3"\npredicted = "any"\n'
        f'function = "{__name__}:{function}"\nrange = [0.0, 1.0]\ngrade = "U"\nsource = "s"\n',
        encoding="utf-8",
    )
    with pytest.raises(RewardError, match=f'{says}.* on case "train-000017"'):
        expected_rewards(load_reward(path), [one("a", 2, case_id="first"), one("SECRET", 3, case_id="train-000017")])
    with pytest.raises(RewardError, match='case "x": expected a gold level'):
        expected_rewards(load_reward("v49"), [one("a", 7, case_id="x")])


# ---- the audit ----------------------------------------------------------------------------------------------------

CASES = [
    one("Arrived intubated.", 1),
    one("Arrest. Not intubated.", 1, case_id="arrest"),
    one("Extubated last week. Intubated in 2015.", 4),
    one("Vitals stable. Stabbed in the flank.", 2),
    one("No open fracture.", 2, case_id="closed"),
    one("Open fracture.", 3),
]


def test_the_audit_counts_by_gold_level_and_shows_misfires() -> None:
    audit = {row.rule: row for row in audit_rules(load_reward("v49"), CASES)}
    lifesaving, injury, pain = (
        audit[name] for name in ("lifesaving_obeyed", "open_injury_missed", "severe_pain_missed")
    )
    assert (lifesaving.matches, lifesaving.fires) == ((2, 0, 0, 1, 0), (2, 0, 0, 0, 0))
    assert lifesaving.negated == ("arrest",)
    assert lifesaving.wordings == (("intubated", 2),)
    assert (injury.matches, injury.fires) == ((0, 2, 1, 0, 0), (0, 2, 0, 0, 0))
    assert injury.negated == ("closed",)
    assert dict(injury.wordings) == {"stable": 1, "stabbed": 1, "open fracture": 1}
    assert pain.never_fires
    assert not pain.changes_advantage
    assert lifesaving.changes_advantage
    assert injury.changes_advantage


def test_v50_does_not_fire_on_what_the_audit_calls_a_misfire() -> None:
    audit = {row.rule: row for row in audit_rules(load_reward("v50"), CASES)}
    assert audit["lifesaving_obeyed"].matches == (1, 0, 0, 0, 0)
    assert audit["open_injury_missed"].fires == (0, 1, 0, 0, 0)
    assert all(row.negated == () for row in audit.values())


SHADOWED = """
name = "shadowed"
about = "two rows on one trigger: only the worse penalty is ever paid"
extends = "v49"
[[rule]]
name = "lesser"
gold = "= 2"
predicted = "> 2"
value = -0.25
grade = "U"
source = "s"
[rule.trigger]
kind = "same"
rule = "severe_pain_missed"
[[rule]]
name = "nothing"
gold = "any"
predicted = "any"
value = 0.0
grade = "U"
source = "s"
[[rule]]
name = "present"
gold = "= 3"
predicted = "any"
value = 0.1
grade = "U"
source = "s"
"""


def test_rows_that_can_never_change_an_advantage_are_named(tmp_path: Path) -> None:
    path = tmp_path / "shadowed.toml"
    path.write_text(SHADOWED, encoding="utf-8")
    reward = load_reward(path)
    # a row paid for every level still parts answers from silence, so it is not inert
    assert rules_without_effect(reward) == ("lesser", "nothing")
    audit = {row.rule: row for row in audit_rules(reward, [one("pain 9/10", 2), one(PLAIN, 3)])}
    assert audit["lesser"].fires == (0, 1, 0, 0, 0)
    assert not audit["lesser"].changes_advantage
    assert audit["severe_pain_missed"].changes_advantage
    assert not audit["nothing"].changes_advantage
    assert audit["present"].changes_advantage
    assert rules_without_effect(load_reward("v49")) == rules_without_effect(load_reward("v50")) == ()


def test_the_audit_of_a_text_that_is_one_long_word_takes_no_long_time(tmp_path: Path) -> None:
    path = tmp_path / "letters.toml"
    path.write_text(
        'name = "letters"\nabout = "a"\nextends = "v46"\n[[rule]]\nname = "letter"\ngold = "any"\npredicted = "any"\n'
        'value = -0.1\ngrade = "U"\nsource = "s"\n[rule.trigger]\nkind = "pattern"\npattern = "a"\n',
        encoding="utf-8",
    )
    began = time.process_time()
    (audit,) = audit_rules(load_reward(path), [one("a" * 20_000, 3)])
    assert audit.fires == (0, 0, 1, 0, 0)
    assert time.process_time() - began < 5.0
