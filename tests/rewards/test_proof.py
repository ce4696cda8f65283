"""The proof: the series' verdicts, and agreement with a simulation that scores every text and answer there is."""

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Overlong, Reward, RewardError, RuleInput, load_reward, overlong
from rewards.proof import OUTCOMES, Invariant, Proof, Row, prove
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
            "exact_is_best": 1.0,
            "no_answer_is_worst": 0.5,
            "reward_falls_with_error": 0.0,
            "undertriage_costs_more": 0.5,
        }


def test_v45c_fails_because_wrong_silent_over_and_under_are_all_alike() -> None:
    proof = prove(load_reward("v45c"))
    assert [one.name for one in proof.violations] == ["no_answer_is_worst", "undertriage_costs_more"]
    assert all(one.margin == 0.0 and one.ties for one in proof.violations)
    assert all(str(one).startswith("FAILS (ties), ") for one in proof.violations)


@pytest.mark.parametrize("name", ["v46", "v48"])
def test_v46_and_v48_fail_because_silence_beats_a_dangerous_answer(name: str) -> None:
    proof = prove(load_reward(name))
    (violation,) = proof.violations
    assert (violation.name, violation.margin) == ("no_answer_is_worst", -0.5)
    assert violation.better == Row(1, 3, (), -1.0, -1.0)
    assert violation.worse == Row(1, "no parse", (), -0.5, -0.5)
    assert str(violation).startswith("FAILS (by -0.5), ")


def test_v49_with_the_old_no_parse_is_caught() -> None:
    proof = prove(variant(f"[no_parse]\nvalue = -0.5\n{GRADE}"))
    violation = invariant(proof, "no_answer_is_worst")
    assert not proof.sound
    assert violation.margin == -1.0
    assert violation.better == Row(1, 3, ("lifesaving_obeyed+lifesaving_missed",), -1.5, -1.5)


def test_v49_with_stacked_penalties_is_caught_at_the_trap() -> None:
    proof = prove(variant(f'[stacking]\npenalties = "sum"\nbonuses = "sum"\n{GRADE}'))
    (violation,) = proof.violations
    assert (violation.name, violation.margin) == ("no_answer_is_worst", 0.0)
    assert violation.better == Row(2, 4, ("open_injury_missed", "severe_pain_missed"), -2.0, -2.0)
    assert str(violation) == (
        "FAILS (ties), every answer is worth more than no answer: "
        "gold 2, predicted 4 with open_injury_missed, severe_pain_missed: -2 | gold 1, no parse: -2"
    )


@pytest.mark.parametrize(
    ("body", "caught"),
    [
        (f"[base.exact]\nerrors = [0]\nvalue = 0.0\n{GRADE}", "exact_is_best"),
        (f"[base.over_by_one]\nerrors = [-1]\nvalue = -0.75\n{GRADE}", "reward_falls_with_error"),
        (f"[base.over_by_one]\nerrors = [-1]\nvalue = -0.75\n{GRADE}", "undertriage_costs_more"),
        (f"[base.under_by_two_or_more]\nerrors = [2, 3, 4]\nvalue = -2.0\n{GRADE}", "no_answer_is_worst"),
        (f"[bounds]\nlow = -1.5\nhigh = 2.0\n{GRADE}", "no_answer_is_worst"),
    ],
)
def test_each_invariant_catches_its_fault(body: str, caught: str) -> None:
    assert caught in [one.name for one in prove(variant(body)).violations]


def test_silence_too_must_stay_below_the_exact_answer() -> None:
    best = invariant(prove(variant(f"[no_parse]\nvalue = 0.75\n{GRADE}")), "exact_is_best")
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
    violation = invariant(prove(variant(body)), "undertriage_costs_more")
    assert 0 < violation.margin < 1e-15
    assert not violation.holds


# ---- length terms and rules of code -------------------------------------------------------------------------------


def test_the_overlong_penalty_counts_against_what_compares_any_two_completions() -> None:
    v49 = load_reward("v49")
    mild = prove(v49, overlong=Overlong(cache=20, penalty=0.4))
    assert mild.sound
    assert invariant(mild, "exact_is_best").margin == pytest.approx(0.6)
    assert invariant(mild, "no_answer_is_worst").margin == pytest.approx(0.1)
    assert invariant(mild, "reward_falls_with_error").margin == pytest.approx(0.0)
    assert invariant(mild, "undertriage_costs_more").margin == pytest.approx(0.5)
    hard = prove(v49, overlong=Overlong(cache=20, penalty=0.5))
    assert [one.name for one in hard.violations] == ["no_answer_is_worst"]
    assert hard.violations[0].ties


def test_the_length_term_of_each_outcome() -> None:
    proof = prove(load_reward("v49"), overlong=Overlong(cache=20, penalty=0.25))
    row = {row.outcome: (row.low, row.high) for row in proof.rows if row.gold == 3}
    assert row == {
        1: (-0.75, -0.5),
        2: (-0.25, 0.0),
        3: (0.75, 1.0),
        4: (-0.75, -0.5),
        5: (-1.25, -1.0),
        "no parse": (-2.25, -2.0),
        "truncated": (-2.25, -2.25),  # always at the whole budget
        "timeout": (-2.0, -2.0),  # the floor, whatever the length
    }


@pytest.mark.parametrize(
    ("cache", "penalty"), [(0, 0.5), (-1, 0.5), (5, 0.0), (5, -0.5), (5, float("nan")), (5, 1e308)]
)
def test_an_overlong_penalty_that_is_none_is_refused(cache: int, penalty: float) -> None:
    with pytest.raises(RewardError, match="overlong: expected"):
        Overlong(cache, penalty)


def by_the_paper(length: int, budget: int, cache: int) -> float:
    """DAPO, equation 13, case by case."""
    if length <= budget - cache:
        return 0.0
    if length <= budget:
        return ((budget - cache) - length) / cache
    return -1.0


@settings(deadline=None)
@given(
    budget=st.integers(1, 400), share=st.floats(0, 1), length=st.integers(0, 500), penalty=st.floats(0, 10, width=32)
)
def test_the_overlong_term_is_the_papers(budget: int, share: float, length: int, penalty: float) -> None:
    cache = max(1, round(share * budget))
    term = overlong(length, budget=budget, cache=cache, penalty=penalty)
    assert term == pytest.approx(penalty * by_the_paper(length, budget, cache), abs=1e-12)
    assert -penalty <= term <= 0
    assert overlong(length + 1, budget=budget, cache=cache, penalty=penalty) <= term
    assert overlong(budget, budget=budget, cache=cache, penalty=penalty) == -penalty
    assert overlong(budget - cache, budget=budget, cache=cache, penalty=penalty) == 0.0


@pytest.mark.parametrize(
    ("length", "budget", "cache", "penalty"),
    [(-1, 10, 5, 1.0), (1, 10, 0, 1.0), (1, 10, 11, 1.0), (1, 10, 5, -1.0), (1, 10, 5, float("inf"))],
)
def test_an_overlong_term_outside_its_ranges_is_refused(length: int, budget: int, cache: int, penalty: float) -> None:
    with pytest.raises(RewardError, match="overlong: expected"):
        overlong(length, budget=budget, cache=cache, penalty=penalty)


def graded_by_length(view: RuleInput) -> float:
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
    assert invariant(proof, "exact_is_best").margin == 0.5
    # under by two and by three are worth the same, so a free range can order them wrongly
    assert not invariant(proof, "reward_falls_with_error").holds


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
ranges = st.tuples(quarters, quarters).map(lambda pair: (min(pair), max(pair)))
code_rows = st.fixed_dictionaries({"gold": conditions, "predicted": conditions, "range": ranges})
sets = st.fixed_dictionaries(
    {
        "table": tables,
        "no_parse": st.sampled_from([-6.0, -2.0, -0.5, 0.0]),
        "rules": st.lists(rule_rows, max_size=3),
        "code": st.lists(code_rows, max_size=2),
        "penalty": st.sampled_from([0.0, 0.0, 0.25, 1.0]),
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
    for i, row in enumerate(spec["code"]):
        text += f'[[rule]]\nname = "code_{i}"\ngold = "{row["gold"]}"\npredicted = "{row["predicted"]}"\n'
        text += f'function = "{__name__}:stated_{i}"\nrange = {list(row["range"])}\n{GRADE}'
    return text


def stated_0(view: RuleInput) -> float:
    """What the completion asks of the first rule of code."""
    return float(view.completion.split("|")[0])


def stated_1(view: RuleInput) -> float:
    return float(view.completion.split("|")[1])


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


def by_hand(spec: dict, gold: int, level: int | None, text: str, stated: Sequence[float], length: float) -> float:
    """What the set's author would compute with pencil and paper."""
    if level is None:
        value = spec["no_parse"]
    else:
        value = spec["table"][level - gold + 4]
        spoken = [row["value"] for row in spec["rules"] if speaks(row, gold, level, text)]
        spoken += [said for row, said in zip(spec["code"], stated, strict=True) if speaks(row, gold, level, text)]
        penalties, bonuses = [value for value in spoken if value < 0], [value for value in spoken if value > 0]
        if penalties:
            value += min(penalties) if spec["penalties"] == "worst" else sum(penalties)
        if bonuses:
            value += max(bonuses) if spec["bonuses"] == "best" else sum(bonuses)
    if spec["bounds"]:
        low, high = spec["bounds"]
        value = low if value < low else high if value > high else value
    return value + length


def speaks(row: dict, gold: int, level: int, text: str) -> bool:
    word = row.get("word")
    return (word is None or word in text) and admits(row["gold"], gold) and admits(row["predicted"], level)


Key = tuple[int, str, int | None, float]
"""Gold, text, level or silence, length term."""
Simulated = dict[Key, list[float]]
"""The totals of every completion there is: one for each combination of what the rules of code may say."""


def simulate(reward: Reward, spec: dict, texts: list[str]) -> Simulated:
    simulated: Simulated = {}
    ends = [(low, (low + high) / 2, high) for low, high in (row["range"] for row in spec["code"])]
    lengths = sorted({0.0, -spec["penalty"] / 2, -spec["penalty"]})
    for gold, text, level, length in itertools.product(LEVELS, texts, (*LEVELS, None), lengths):
        totals = simulated[gold, text, level, length] = []
        for stated in itertools.product(*ends):
            said = "".join(f"{value}|" for value in stated) + ("none" if level is None else f"ANSWER: ESI {level}")
            score = reward.score(
                text=text,
                gold=gold,
                completion=said,
                thinking=False,
                finished=True,
                case_id="c",
                length_penalty=length,
            )
            assert score.total == by_hand(spec, gold, level, text, stated, length)
            totals.append(score.total)
    return simulated


def simulated_margins(simulated: Simulated, texts: list[str], penalty: float, floor: float) -> dict[str, float]:
    def least(gold: int, text: str, level: int | None, *lengths: float) -> float:
        return min(value for length in lengths for value in simulated[gold, text, level, length])

    def most(gold: int, text: str, level: int | None, *lengths: float) -> float:
        return max(value for length in lengths for value in simulated[gold, text, level, length])

    finished = (0.0, -penalty)
    silent = max(most(1, "", None, *finished), floor)
    exact, nearer, over, committed = [], [], [], []
    for gold, text in itertools.product(LEVELS, texts):
        best = least(gold, text, gold, *finished)
        committed += [least(gold, text, level, *finished) for level in LEVELS]
        exact += [best - most(gold, text, level, *finished) for level in LEVELS if level != gold]
        exact += [best - silent]
        for (a, b), length in itertools.product(itertools.permutations(LEVELS, 2), finished):
            gap = least(gold, text, a, length) - most(gold, text, b, length)
            if (gold <= a < b) or (b < a <= gold):
                nearer.append(gap)
            if a - gold == gold - b and a < gold:
                over.append(gap)
    return {
        "exact_is_best": min(exact),
        "no_answer_is_worst": min(committed) - silent,
        "reward_falls_with_error": min(nearer),
        "undertriage_costs_more": min(over),
    }


@settings(max_examples=60, deadline=None)
@given(spec=sets)
def test_the_proof_agrees_with_scoring_everything_there_is(spec: dict) -> None:
    reward = loaded(as_toml(spec))
    used = [word for word in WORDS if any(row["word"] == word for row in spec["rules"])]
    texts = [" ".join(words) for n in range(len(used) + 1) for words in itertools.combinations(used, n)]
    simulated = simulate(reward, spec, texts)
    assert reward.floor == min(value for key, values in simulated.items() if key[3] == 0.0 for value in values)
    proof = prove(reward, overlong=Overlong(1, spec["penalty"]) if spec["penalty"] else None)
    margins = simulated_margins(simulated, texts, spec["penalty"], reward.floor)
    assert {one.name: one.margin for one in proof.invariants} == pytest.approx(margins)
    assert proof.sound == (
        margins["exact_is_best"] > 0
        and margins["no_answer_is_worst"] > 0
        and margins["reward_falls_with_error"] >= 0
        and margins["undertriage_costs_more"] > 0
    )
    for violation in proof.violations:
        assert violation.better is not None
        assert violation.worse is not None
        assert {violation.better, violation.worse} <= set(proof.rows)
    for row in proof.rows:
        assert_reachable(row, simulated, spec, reward.floor)


def assert_reachable(row: Row, simulated: Simulated, spec: dict, floor: float) -> None:
    """Both ends of a row, and so a counterexample, are a real case and a real completion, and nothing lies outside."""
    fired = {name for joined in row.triggers for name in joined.split("+")}
    text = " ".join(word for word in WORDS if any(spec["rules"][int(n[4:])]["word"] == word for n in fired))
    lengths = [-spec["penalty"]] if row.outcome == "truncated" else [0.0, -spec["penalty"] / 2, -spec["penalty"]]
    level = row.outcome if isinstance(row.outcome, int) else None
    seen = [value for length in lengths for value in simulated[row.gold, text, level, length]]
    if row.outcome == "timeout":
        seen = [floor]
    assert (row.low, row.high) == (min(seen), max(seen))


def test_the_random_sets_hold_sound_and_unsound_ones() -> None:
    ordered = {"table": [-1.0, -1.0, -1.0, 0.0, 3.0, -1.25, -1.5, -1.5, -2.0], "no_parse": -6.0, "rules": []}
    spec = ordered | {"penalties": "worst", "bonuses": "best", "bounds": None, "code": []}
    assert prove(loaded(as_toml(spec))).sound
    assert prove(loaded(as_toml(spec)), overlong=Overlong(1, 1.0)).sound
    assert not prove(loaded(as_toml(spec | {"bounds": (-1.0, 1.0)}))).sound
