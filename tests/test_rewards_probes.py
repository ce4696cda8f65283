"""The probes: expectations against sums by hand, the series' collapse, and the audit of rules."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import RewardError, load_reward
from rewards.probes import (
    POLICIES,
    PolicyReport,
    WeightedCase,
    audit_rules,
    expected_rewards,
    honest_draws,
    never_matter,
)

PLAIN = "A 50-year-old male with a complaint."


def balanced(oversampled: float) -> list[WeightedCase]:
    """One case a level, level 1 standing as often as asked."""
    return [(PLAIN, gold, oversampled if gold == 1 else 1.0) for gold in range(1, 6)]


def means(report: PolicyReport) -> dict[str, float]:
    return {expectation.policy: expectation.mean for expectation in report.ranked}


def test_v45c_at_twenty_times_pays_always_1_more_than_an_honest_policy() -> None:
    report = expected_rewards(load_reward("v45c"), balanced(20.0))
    assert report.ranked[0].policy == "always 1"
    assert means(report)["always 1"] == pytest.approx(20 / 24)
    assert report.honest.mean == pytest.approx(0.7)
    assert report.beaten_by == ("always 1",)


def test_v49_at_five_times_pays_nobody_more_than_the_honest_policy() -> None:
    report = expected_rewards(load_reward("v49"), balanced(5.0))
    assert report.beaten_by == ()
    assert report.ranked[0] == report.honest
    # 5 of 9 right, one valve, three over by two or more
    assert means(report)["always 1"] == pytest.approx((5 * 1.0 + 0.0 - 0.5 * 3) / 9)
    # errors: under by one for level 1, a valve or an under-triage for 2-4, a valve for 5
    honest = (5 * (0.7 - 0.15) + 3 * (0.7 - 0.075) + 0.7) / 9
    assert report.honest.mean == pytest.approx(honest)
    for hack in ("never answer", "list all five", "answer inside <think> only", "two different answers"):
        assert means(report)[hack] == -2.0


def test_what_the_series_tells_of_oversampling_in_v49() -> None:
    # an emergency department's mix: few patients of level 1, most of level 3
    mix = {1: 0.06, 2: 0.33, 3: 0.54, 4: 0.066, 5: 0.004}
    at = {
        times: means(
            expected_rewards(load_reward("v49"), [(PLAIN, g, w * (times if g == 1 else 1)) for g, w in mix.items()])
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
    report = expected_rewards(v46, [(PLAIN, gold, float(w)) for gold, w in enumerate(weights, 1)], accuracy=accuracy)
    mass = sum(weights)
    for level in range(1, 6):
        values = [table[level - gold] for gold in range(1, 6)]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / mass
        variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / mass
        found = next(one for one in report.ranked if one.policy == f"always {level}")
        assert found.mean == pytest.approx(mean)
        assert found.std == pytest.approx(math.sqrt(variance), abs=1e-7)
    honest = 0.0
    for gold, weight in enumerate(weights, 1):
        over, under = gold > 1, gold < 5
        wrong = (0.0 * over - 0.5 * under) / (over + under)
        honest += weight * (accuracy * 1.0 + (1 - accuracy) * wrong) / mass
    assert report.honest.mean == pytest.approx(honest)
    assert [one.mean for one in report.ranked] == sorted((one.mean for one in report.ranked), reverse=True)


@settings(deadline=None)
@given(gold=st.integers(1, 5), accuracy=st.floats(0.01, 1.0))
def test_the_honest_policy_errs_by_one_level_only(gold: int, accuracy: float) -> None:
    draws = honest_draws(gold, accuracy)
    assert math.fsum(share for share, _ in draws) == pytest.approx(1.0)
    assert draws[0][0] == accuracy
    written = [int(completion[-1]) for _, completion in draws]
    assert written[0] == gold
    assert sorted(written[1:]) == [level for level in (gold - 1, gold + 1) if 1 <= level <= 5]


def test_a_modifier_reaches_the_expectation() -> None:
    report = expected_rewards(load_reward("v49"), [("Arrived intubated.", 1, 1.0)], accuracy=0.5)
    assert means(report)["always 1"] == 1.5
    assert means(report)["always 3"] == -1.5
    assert report.honest.mean == pytest.approx(0.5 * 1.5 + 0.5 * -1.0)


def test_a_tie_with_the_honest_policy_refuses_too() -> None:
    assert expected_rewards(load_reward("v49"), [(PLAIN, 2, 1.0)], accuracy=1.0).beaten_by == ("always 2",)


@pytest.mark.parametrize(
    ("cases", "accuracy"),
    [
        ([], 0.7),
        ([(PLAIN, 2, 0.0)], 0.7),
        ([(PLAIN, 2, -1.0)], 0.7),
        ([(PLAIN, 2, math.nan)], 0.7),
        ([(PLAIN, 0, 1.0)], 0.7),
        ([(PLAIN, 2, 1.0)], 0.0),
        ([(PLAIN, 2, 1.0)], 1.1),
    ],
)
def test_meaningless_inputs_are_refused(cases: list[WeightedCase], accuracy: float) -> None:
    with pytest.raises(RewardError, match="expected"):
        expected_rewards(load_reward("v49"), cases, accuracy=accuracy)


def test_every_hack_of_the_series_is_probed() -> None:
    assert len(POLICIES) == 9


# ---- the audit ----------------------------------------------------------------------------------------------------

CASES: list[WeightedCase] = [
    ("Arrived intubated.", 1, 1.0),
    ("Arrest. Not intubated.", 1, 1.0),
    ("Extubated last week. Intubated in 2015.", 4, 1.0),
    ("Vitals stable. Stabbed in the flank.", 2, 1.0),
    ("No open fracture.", 2, 1.0),
    ("Open fracture.", 3, 1.0),
]


def test_the_audit_counts_by_gold_level_and_shows_misfires() -> None:
    audit = {row.rule: row for row in audit_rules(load_reward("v49"), CASES)}
    lifesaving, injury, pain = (
        audit[name] for name in ("lifesaving_obeyed", "open_injury_missed", "severe_pain_missed")
    )
    assert (lifesaving.matches, lifesaving.fires) == ((2, 0, 0, 1, 0), (2, 0, 0, 0, 0))
    assert lifesaving.negated == (1,)
    assert lifesaving.wordings == (("intubated", 2),)
    assert (injury.matches, injury.fires) == ((0, 2, 1, 0, 0), (0, 2, 0, 0, 0))
    assert injury.negated == (4,)
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
    assert never_matter(reward) == ("lesser", "nothing")
    audit = {row.rule: row for row in audit_rules(reward, [("pain 9/10", 2, 1.0), (PLAIN, 3, 1.0)])}
    assert audit["lesser"].fires == (0, 1, 0, 0, 0)
    assert not audit["lesser"].changes_advantage
    assert audit["severe_pain_missed"].changes_advantage
    assert not audit["nothing"].changes_advantage
    assert audit["present"].changes_advantage
    assert never_matter(load_reward("v49")) == never_matter(load_reward("v50")) == ()
