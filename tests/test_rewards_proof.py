"""The proof: the series' verdicts, and agreement with a simulation that scores every text and answer there is."""

import itertools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Reward, RewardError, View, load_reward
from rewards.proof import OUTCOMES, SILENCES, Invariant, Proof, Row, prove
from rewards.types import LEVELS

ROOT = """
name = "{name}"
about = "a set of a test"
pattern_timeout_s = 1.0
[stacking]
penalties = "{penalties}"
bonuses = "{bonuses}"
grade = "U"
source = "s"
[answer]
formats = ["answer"]
[no_parse]
value = {no_parse}
grade = "U"
source = "s"
"""
GRADE = 'grade = "U"\nsource = "s"\n'


def loaded(text: str) -> Reward:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.toml"
        path.write_text(text, encoding="utf-8")
        return load_reward(path)


def variant(body: str) -> Reward:
    """v49 with some tables replaced."""
    return loaded(f'name = "variant"\nabout = "a test"\nextends = "v49"\n{body}')


def invariant(proof: Proof, name: str) -> Invariant:
    return next(one for one in proof.invariants if one.name == name)


# ---- the series ---------------------------------------------------------------------------------------------------


def test_v49_and_v50_are_sound_by_a_half() -> None:
    for name in ("v49", "v50"):
        proof = prove(load_reward(name))
        assert proof.sound
        assert proof.violations == ()
        assert proof.smallest_margin == 0.5
        assert {one.name: one.margin for one in proof.invariants} == {
            "exact_best": 1.0,
            "silence_worst": 0.5,
            "larger_error_no_better": 0.0,
            "under_below_over": 0.5,
        }


def test_v45c_fails_because_wrong_silent_over_and_under_are_all_alike() -> None:
    proof = prove(load_reward("v45c"))
    assert [one.name for one in proof.violations] == ["silence_worst", "under_below_over"]
    assert all(one.margin == 0.0 for one in proof.violations)


@pytest.mark.parametrize("name", ["v46", "v48"])
def test_v46_and_v48_fail_because_silence_beats_a_dangerous_answer(name: str) -> None:
    proof = prove(load_reward(name))
    (violation,) = proof.violations
    assert (violation.name, violation.margin) == ("silence_worst", -0.5)
    assert violation.better == Row(1, 3, (), -1.0, -1.0)
    assert violation.worse == Row(1, "no parse", (), -0.5, -0.5)


def test_v49_with_the_old_no_parse_is_caught() -> None:
    proof = prove(variant(f"[no_parse]\nvalue = -0.5\n{GRADE}"))
    violation = invariant(proof, "silence_worst")
    assert not proof.sound
    assert violation.margin == -1.0
    assert violation.better == Row(1, 3, ("lifesaving_obeyed+lifesaving_missed",), -1.5, -1.5)


def test_v49_with_stacked_penalties_is_caught_at_the_trap() -> None:
    proof = prove(variant(f'[stacking]\npenalties = "sum"\nbonuses = "sum"\n{GRADE}'))
    (violation,) = proof.violations
    assert (violation.name, violation.margin) == ("silence_worst", 0.0)
    assert violation.better == Row(2, 4, ("open_injury_missed", "severe_pain_missed"), -2.0, -2.0)
    assert "gold 2, predicted 4 with open_injury_missed, severe_pain_missed: -2" in str(violation)


@pytest.mark.parametrize(
    ("body", "caught"),
    [
        (f"[base.exact]\nerrors = [0]\nvalue = 0.0\n{GRADE}", "exact_best"),
        (f"[base.over_by_one]\nerrors = [-1]\nvalue = -0.75\n{GRADE}", "larger_error_no_better"),
        (f"[base.over_by_one]\nerrors = [-1]\nvalue = -0.75\n{GRADE}", "under_below_over"),
        (f"[base.under_by_two_or_more]\nerrors = [2, 3, 4]\nvalue = -2.0\n{GRADE}", "silence_worst"),
        (f"[bounds]\nlow = -1.5\nhigh = 2.0\n{GRADE}", "silence_worst"),
    ],
)
def test_each_invariant_catches_its_fault(body: str, caught: str) -> None:
    assert caught in [one.name for one in prove(variant(body)).violations]


def test_silence_too_must_stay_below_the_exact_answer() -> None:
    best = invariant(prove(variant(f"[no_parse]\nvalue = 0.75\n{GRADE}")), "exact_best")
    assert best.margin == 0.25
    assert best.worse == Row(1, "no parse", (), 0.75, 0.75)


def test_the_whole_table_is_there_and_serialises() -> None:
    proof = prove(load_reward("v49"))
    # gold 1 and gold 2 have 1 and 2 triggers, the others none
    assert len(proof.rows) == (2 + 4 + 1 + 1 + 1) * len(OUTCOMES)
    assert len({(row.gold, row.outcome, row.triggers) for row in proof.rows}) == len(proof.rows)
    assert json.loads(json.dumps(asdict(proof)))["reward"] == "v49"


def test_dust_of_decimals_is_a_tie() -> None:
    body = f"[base.over_by_one]\nerrors = [-1]\nvalue = 0.1\n{GRADE}"
    body += f"[base.under_by_one]\nerrors = [1]\nvalue = 0.3\n{GRADE}"
    for gold in range(2, 6):
        body += f'[[rule]]\nname = "row_{gold}"\ngold = "= {gold}"\npredicted = "= {gold - 1}"\nvalue = 0.2\n{GRADE}'
    violation = invariant(prove(variant(body)), "under_below_over")
    assert 0 < violation.margin < 1e-15
    assert not violation.holds


# ---- length terms and rules of code -------------------------------------------------------------------------------


def test_a_length_term_counts_against_what_compares_any_two_completions() -> None:
    v49 = load_reward("v49")
    mild = prove(v49, length_term=(-0.4, 0.0))
    assert mild.sound
    assert invariant(mild, "exact_best").margin == pytest.approx(0.6)
    assert invariant(mild, "silence_worst").margin == pytest.approx(0.1)
    assert invariant(mild, "larger_error_no_better").margin == pytest.approx(0.0)
    assert invariant(mild, "under_below_over").margin == pytest.approx(0.5)
    hard = prove(v49, length_term=(-0.5, 0.0))
    assert [one.name for one in hard.violations] == ["silence_worst"]
    for refused in ((0.0, -1.0), (float("-inf"), 0.0), (float("nan"), 0.0)):
        with pytest.raises(RewardError, match="length_term"):
            prove(v49, length_term=refused)


def graded_by_length(view: View) -> float:
    return 0.25 if view.completion.startswith("#") else -0.25


CODE = f"""
[[rule]]
name = "code"
gold = "> 2"
predicted = "any"
function = "{__name__}:graded_by_length"
range = [-0.25, 0.25]
{GRADE}"""


def test_a_rule_of_code_enters_with_its_whole_range() -> None:
    reward = variant(CODE)
    proof = prove(reward)
    for row in proof.rows:
        if isinstance(row.outcome, int):
            seen = {
                reward.score(
                    text=text_firing(reward, row),
                    gold=row.gold,
                    completion=f"{mark}ANSWER: ESI {row.outcome}",
                    thinking=False,
                    finished=True,
                    case_id="c",
                ).total
                for mark in ("#", "")
            }
            assert seen == {row.low, row.high}
            assert (row.low < row.high) == (row.gold > 2)
    assert invariant(proof, "exact_best").margin == 0.5
    # under by two and by three are worth the same, so a free range can order them wrongly
    assert not invariant(proof, "larger_error_no_better").holds


def text_firing(reward: Reward, row: Row) -> str:
    words = {
        "lifesaving_obeyed": "chest tube",
        "open_injury_missed": "open fracture",
        "severe_pain_missed": "pain 9/10",
    }
    return ", ".join(words[name.split("+")[0]] for name in row.triggers)


# ---- random tables against a simulation ---------------------------------------------------------------------------

WORDS = ("alpha", "beta", "gamma")
quarters = st.integers(-8, 8).map(lambda n: n / 4)
conditions = st.sampled_from(["any", "= 1", "= 2", "> 2", "<= 3", "!= 4", ">= 4"])
rule_rows = st.fixed_dictionaries(
    {"word": st.sampled_from([*WORDS, None]), "gold": conditions, "predicted": conditions, "value": quarters}
)
tables = st.one_of(
    st.lists(quarters, min_size=9, max_size=9),
    # ordered tables, so that sound rewards are drawn as well
    st.tuples(st.lists(quarters, min_size=4, max_size=4), st.lists(quarters, min_size=4, max_size=4)).map(
        lambda pair: [*sorted(pair[0]), 3.0, *sorted((value - 0.25 for value in pair[1]), reverse=True)]
    ),
)
sets = st.fixed_dictionaries(
    {
        "table": tables,
        "no_parse": st.sampled_from([-6.0, -2.0, -0.5, 0.0]),
        "rules": st.lists(rule_rows, max_size=3),
        "penalties": st.sampled_from(["sum", "worst"]),
        "bonuses": st.sampled_from(["sum", "best"]),
        "bounds": st.sampled_from([None, (-1.0, 1.0), (-5.0, 2.0)]),
    }
)


def as_toml(spec: dict) -> str:
    text = ROOT.format(name="random", **{key: spec[key] for key in ("penalties", "bonuses", "no_parse")})
    if spec["bounds"]:
        text += f"[bounds]\nlow = {spec['bounds'][0]}\nhigh = {spec['bounds'][1]}\n{GRADE}"
    for error, value in zip(range(-4, 5), spec["table"], strict=True):
        text += f"[base.error_{error + 4}]\nerrors = [{error}]\nvalue = {value}\n{GRADE}"
    for i, row in enumerate(spec["rules"]):
        text += f'[[rule]]\nname = "row_{i}"\ngold = "{row["gold"]}"\npredicted = "{row["predicted"]}"\n'
        text += f"value = {row['value']}\n{GRADE}"
        if row["word"]:
            text += f"[rule.trigger]\nkind = \"pattern\"\npattern = '{row['word']}'\n"
    return text


def admits(condition: str, level: int) -> bool:
    if condition == "any":
        return True
    sign, bound = condition.split()
    return {
        "=": level == int(bound),
        "!=": level != int(bound),
        ">": level > int(bound),
        "<=": level <= int(bound),
        ">=": level >= int(bound),
    }[sign]


def by_hand(spec: dict, gold: int, level: int | None, text: str) -> float:
    """What the set's author would compute with pencil and paper."""
    if level is None:
        value = spec["no_parse"]
    else:
        value = spec["table"][level - gold + 4]
        penalties, bonuses = [], []
        for row in spec["rules"]:
            spoken = row["word"] is None or row["word"] in text
            if spoken and admits(row["gold"], gold) and admits(row["predicted"], level):
                (penalties if row["value"] < 0 else bonuses).append(row["value"])
        if penalties:
            value += min(penalties) if spec["penalties"] == "worst" else sum(penalties)
        if bonuses:
            value += max(bonuses) if spec["bonuses"] == "best" else sum(bonuses)
    if spec["bounds"]:
        low, high = spec["bounds"]
        value = low if value < low else high if value > high else value
    return value


Simulated = dict[tuple[int, str, int | None], float]


def simulated_margins(simulated: Simulated, texts: list[str], floor: float) -> dict[str, float]:
    silent = simulated[1, "", None]
    exact, nearer, over, committed = [], [], [], []
    for gold, text in itertools.product(LEVELS, texts):
        of = {level: simulated[gold, text, level] for level in LEVELS}
        committed += of.values()
        exact += [of[gold] - of[level] for level in LEVELS if level != gold]
        exact += [of[gold] - silent, of[gold] - floor]
        for a, b in itertools.permutations(LEVELS, 2):
            if (gold <= a < b) or (b < a <= gold):
                nearer.append(of[a] - of[b])
            if a - gold == gold - b and a < gold:
                over.append(of[a] - of[b])
    return {
        "exact_best": min(exact),
        "silence_worst": min(committed) - max(silent, floor),
        "larger_error_no_better": min(nearer),
        "under_below_over": min(over),
    }


@settings(max_examples=80, deadline=None)
@given(spec=sets)
def test_the_proof_agrees_with_scoring_everything_there_is(spec: dict) -> None:
    reward = loaded(as_toml(spec))
    texts = [" ".join(words) for n in range(len(WORDS) + 1) for words in itertools.combinations(WORDS, n)]
    simulated: Simulated = {}
    for gold, text, level in itertools.product(LEVELS, texts, (*LEVELS, None)):
        completion = "ANSWER: none" if level is None else f"ANSWER: ESI {level}"
        total = reward.score(
            text=text, gold=gold, completion=completion, thinking=False, finished=True, case_id="c"
        ).total
        assert total == by_hand(spec, gold, level, text)
        simulated[gold, text, level] = total
    assert reward.floor == min(simulated.values())
    proof = prove(reward)
    margins = simulated_margins(simulated, texts, reward.floor)
    assert {one.name: one.margin for one in proof.invariants} == pytest.approx(margins)
    assert proof.sound == (
        margins["exact_best"] > 0
        and margins["silence_worst"] > 0
        and margins["larger_error_no_better"] >= 0
        and margins["under_below_over"] > 0
    )
    for violation in proof.violations:
        assert violation.better is not None
        assert violation.worse is not None
        assert violation.better.low <= violation.worse.high
        assert {violation.better, violation.worse} <= set(proof.rows)
    for row in proof.rows:
        assert_reachable(row, simulated, spec, reward.floor)


def assert_reachable(row: Row, simulated: Simulated, spec: dict, floor: float) -> None:
    """A row of the table, and so a counterexample, is a real case and a real completion."""
    fired = {name for joined in row.triggers for name in joined.split("+")}
    text = " ".join(word for word in WORDS if any(spec["rules"][int(n[4:])]["word"] == word for n in fired))
    if row.outcome in SILENCES:
        expected = floor if row.outcome == "timeout" else simulated[row.gold, text, None]
    else:
        assert isinstance(row.outcome, int)
        expected = simulated[row.gold, text, row.outcome]
    assert row.low == row.high == expected


def test_the_random_sets_hold_sound_and_unsound_ones() -> None:
    ordered = {"table": [-1.0, -1.0, -1.0, 0.0, 3.0, -1.25, -1.5, -1.5, -2.0], "no_parse": -6.0, "rules": []}
    spec = ordered | {"penalties": "worst", "bonuses": "best", "bounds": None}
    assert prove(loaded(as_toml(spec))).sound
    assert not prove(loaded(as_toml(spec | {"bounds": (-1.0, 1.0)}))).sound
