"""Where a wrong answer left the algorithm, and which rules it broke."""

import json
from itertools import product

import pytest

from grpo.cases import load_jsonl_cases
from grpo.config import TINY_WORLD_DIR
from grpo.evaluation.failures import (
    ESI_STEPS,
    PATHS,
    count_failures,
    deciding_step,
    failed_step,
    failures,
    requirements,
    rule_obeyed,
)
from grpo.evaluation.metrics import JudgedAnswer
from grpo.types import Case
from rewards import Answer, Rule, load_reward

V49 = load_reward("v49")


def judged(case: Case, *levels: int | None) -> list[JudgedAnswer]:
    return [
        JudgedAnswer(case, Answer(level, "parsed" if level else "no answer", None), True, 3, "", k)
        for k, level in enumerate(levels)
    ]


def esi(lifesaving: bool, urgent: bool, resources: int, danger: bool) -> int:
    """The algorithm, question by question."""
    if lifesaving:
        return 1
    if urgent:
        return 2
    if resources < 2:
        return 5 - resources
    return 2 if danger else 3


def algorithm_answers(lifesaving: bool, urgent: bool, resources: int, danger: bool) -> list[object]:
    """The answers that the algorithm asks for until it stops."""
    answers: list[object] = [lifesaving]
    if not lifesaving:
        answers.append(urgent)
        if not urgent:
            answers.append(min(resources, 2))
            if resources >= 2:
                answers.append(danger)
    return answers


def test_the_failed_step_is_the_first_question_answered_otherwise() -> None:
    facts = list(product((False, True), (False, True), (0, 1, 2), (False, True)))
    for right, answer in product(facts, facts):
        gold, predicted = esi(*right), esi(*answer)
        if gold == predicted or (predicted == 2 and not answer[1]):
            continue  # an answer of 2 is taken as step B's
        decided = ESI_STEPS[len(algorithm_answers(*right)) - 1]
        first = next(
            i
            for i, (a, b) in enumerate(zip(algorithm_answers(*right), algorithm_answers(*answer), strict=False))
            if a != b
        )
        assert failed_step(gold, decided, predicted) == ESI_STEPS[first], (right, answer)


def test_every_wrong_pair_has_a_step() -> None:
    for (gold, decided), predicted in product(PATHS, range(1, 6)):
        if gold != predicted:
            assert failed_step(gold, decided, predicted) in ESI_STEPS
    with pytest.raises(ValueError, match="wrong answer"):
        failed_step(3, "D", 3)
    with pytest.raises(ValueError, match="decides level 1"):
        failed_step(1, "D", 3)


@pytest.mark.parametrize("name", ["train", "validation", "test", "mietic36"])
def test_the_embedded_cases_tell_the_step_that_decided_them(name: str) -> None:
    rows = [json.loads(line) for line in (TINY_WORLD_DIR / "cases" / f"{name}.jsonl").read_text().splitlines()]
    assert [deciding_step(case) for case in load_jsonl_cases(f"embedded:cases/{name}.jsonl")] == [
        r["step"] for r in rows
    ]


def test_a_step_tag_counts_only_where_it_can_decide_the_level() -> None:
    assert deciding_step(Case("a", "x", 2, ("step:D",))) == "D"
    assert deciding_step(Case("a", "x", 2, ("step:C",))) == "B"
    assert deciding_step(Case("a", "x", 3, ("danger_vitals",))) == "D"
    assert deciding_step(Case("a", "x", 1, ("danger_vitals",))) == "A"


def rule(low: float, high: float, predicted: set[int]) -> Rule:
    return Rule("r", "I", "here", None, frozenset({1}), frozenset(predicted), None, low, high)


def test_a_penalty_is_kept_by_staying_away_and_a_bonus_by_earning_it() -> None:
    penalty, bonus, either = rule(-0.5, -0.5, {2, 3, 4, 5}), rule(0.5, 0.5, {1}), rule(-1, 1, {1, 2, 3, 4, 5})
    assert [rule_obeyed(penalty, level) for level in (1, 2, 5, None)] == [True, False, False, False]
    assert [rule_obeyed(bonus, level) for level in (1, 2, 5, None)] == [True, False, False, False]
    assert rule_obeyed(either, 1) is None and rule_obeyed(either, None) is None


def test_two_rows_on_the_same_words_are_one_requirement() -> None:
    assert {name: [r.name for r in rules] for name, rules in requirements(V49).items()} == {
        "lifesaving_missed": ["lifesaving_obeyed", "lifesaving_missed"],
        "open_injury_missed": ["open_injury_missed"],
        "severe_pain_missed": ["severe_pain_missed"],
    }
    assert requirements(load_reward("v46")) == {}


CARD = [
    (Case("i1", "Arrived intubated.", 1), 2),
    (Case("i2", "Chest tube placed.", 1), 2),
    (Case("i3", "Central line placed.", 1, ("line",)), 2),
    (Case("pain", "Flank pain, pain 9/10.", 2), 3),
    (Case("open", "Open fracture of the leg.", 2), 3),
    (Case("u1", "Cough for a week.", 4), 3),
    (Case("u2", "Fever, pain 9/10.", 2), 1),  # over-triage breaks no rule
    (Case("u3", "Rash.", 5), None),
    (Case("fine", "Intubated before transfer.", 1, ("line",)), 1),
]


def test_the_cards_error_analysis() -> None:
    """Eight wrong cases: three lifesaving interventions, one severe pain, one open injury, three unexplained."""
    verdicts = [verdict for case, level in CARD for verdict in judged(case, level)]
    failed = failures(verdicts, V49)
    assert [(f["id"], f["step"], tuple(f["broken"])) for f in failed] == [
        ("i1", "A", ("lifesaving_missed",)),
        ("i2", "A", ("lifesaving_missed",)),
        ("i3", "A", ("lifesaving_missed",)),
        ("pain", "B", ("severe_pain_missed",)),
        ("open", "B", ("open_injury_missed",)),
        ("u1", "C", ()),
        ("u2", "A", ()),
        ("u3", None, ()),
    ]
    assert failed[0]["rules"] == {"lifesaving_obeyed": False, "lifesaving_missed": False}
    assert failed[6]["rules"] == {"severe_pain_missed": True}
    found = count_failures([case for case, _ in CARD], failed, V49)
    assert found["wrong"] == 8 and found["no_parse"] == 1
    assert found["by_step"] == {
        "A": {"under": 3, "over": 1},
        "B": {"under": 2, "over": 0},
        "C": {"under": 0, "over": 1},
        "D": {"under": 0, "over": 0},
    }
    assert found["by_rule"] == {
        "lifesaving_missed": {"applies": 4, "broken": 3, "cases": ["i1", "i2", "i3"]},
        "open_injury_missed": {"applies": 1, "broken": 1, "cases": ["open"]},
        "severe_pain_missed": {"applies": 2, "broken": 1, "cases": ["pain"]},
    }
    assert found["unexplained"] == ["u1", "u2", "u3"]


def test_of_several_answers_the_majority_fails() -> None:
    (first, _), (second, _) = CARD[:2]
    found = failures([*judged(first, 1, 2, 2), *judged(second, 2, 1, 1)], V49)
    assert [(f["id"], f["predicted"], f["levels"]) for f in found] == [("i1", 2, [1, 2, 2])]


def test_a_row_holds_no_text() -> None:
    (found,) = failures(judged(*CARD[0]), V49)
    assert found == {
        "id": "i1",
        "gold": 1,
        "predicted": 2,
        "levels": [2],
        "step": "A",
        "decided_at": "A",
        "rules": {"lifesaving_obeyed": False, "lifesaving_missed": False},
        "broken": ["lifesaving_missed"],
        "tags": [],
    }


def test_no_answer_breaks_every_rule_that_applies() -> None:
    (found,) = failures(judged(CARD[0][0], None), V49)
    assert found["step"] is None and found["broken"] == ["lifesaving_missed"]
