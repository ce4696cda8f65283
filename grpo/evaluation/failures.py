"""Analysis of wrong answers: the step of the ESI algorithm at which each failed, and the rules it broke.

The algorithm asks A (lifesaving intervention now?), B (should not wait?), C (how many kinds of resources?) and D
(danger-zone vital signs?) and stops at the first hit. A wrong answer failed at the first question on which its path and
the path of the gold level differ.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from grpo.evaluation.metrics import JudgedAnswer, levels_by_case
from grpo.evaluation.statistics import majority
from grpo.types import Case
from rewards import Reward, Rule

EsiStep = Literal["A", "B", "C", "D"]
ESI_STEPS: tuple[EsiStep, ...] = ("A", "B", "C", "D")

PATHS: Mapping[tuple[int, EsiStep], tuple[str, ...]] = MappingProxyType(
    {
        (1, "A"): ("yes",),
        (2, "B"): ("no", "yes"),
        (2, "D"): ("no", "no", "many", "yes"),
        (3, "D"): ("no", "no", "many", "no"),
        (4, "C"): ("no", "no", "one"),
        (5, "C"): ("no", "no", "none"),
    }
)
"""(level, the step that decides it) → the answers of the steps from A on."""
DECIDED_AT: Mapping[int, EsiStep] = MappingProxyType({1: "A", 2: "B", 3: "D", 4: "C", 5: "C"})
"""Level → the step that decides it unless a tag names another: for level 2 the more frequent of its two, B."""
STEP_TAGS: Mapping[str, EsiStep] = MappingProxyType(
    {f"step:{step}": step for step in ESI_STEPS} | {"danger_vitals": "D"}
)
"""Tags of a case that name its deciding step: ``step:D`` in any case file, the stratum in the embedded ones."""


def deciding_step(case: Case) -> EsiStep:
    """Return the step at which the algorithm stops for this case: that of the first tag in `STEP_TAGS` which is
    possible for its level, else that of `DECIDED_AT`.

    >>> deciding_step(Case("a", "...", 2)), deciding_step(Case("b", "...", 2, ("danger_vitals",)))
    ('B', 'D')
    """
    tagged = (STEP_TAGS[tag] for tag in case.tags if tag in STEP_TAGS)
    return next((step for step in tagged if (case.gold_level, step) in PATHS), DECIDED_AT[case.gold_level])


def failed_step(gold: int, decided: EsiStep, predicted: int) -> EsiStep:
    """Return the first step on which the paths of the gold level and of the answer differ.

    Args:
        gold: ESI level.
        decided: the step that decides it, see `deciding_step`.
        predicted: a different level. Its path is that of `DECIDED_AT`: an answer of 2 is taken as decided at step B.

    Raises:
        ValueError: equal levels, or a step that cannot decide the gold level.

    A missed intervention; a missed danger zone; one resource too many; a high risk where there is none:

    >>> failed_step(1, "A", 2), failed_step(2, "D", 3), failed_step(5, "C", 4), failed_step(3, "D", 2)
    ('A', 'D', 'C', 'B')
    """
    if gold == predicted or (gold, decided) not in PATHS:
        raise ValueError(f"expected a wrong answer and a step that decides level {gold}, got {predicted}, {decided}")
    right, answer = PATHS[gold, decided], PATHS[predicted, DECIDED_AT[predicted]]
    return next(step for step, a, b in zip(ESI_STEPS, right, answer, strict=False) if a != b)


def requirements(reward: Reward) -> dict[str, tuple[Rule, ...]]:
    """Return the requirements of a reward set, one per trigger and gold condition: a bonus row and a penalty row with
    the same trigger are one requirement, named after its first penalty, else after its first row.

    >>> from rewards import load_reward
    >>> list(requirements(load_reward("v49")))
    ['lifesaving_missed', 'open_injury_missed', 'severe_pain_missed']
    """
    rows: dict[object, list[Rule]] = {}
    for rule in reward.rules:
        rows.setdefault(rule.name if rule.function else (rule.trigger, rule.gold), []).append(rule)
    return {next((rule.name for rule in r if rule.high < 0), r[0].name): tuple(r) for r in rows.values()}


def rule_obeyed(rule: Rule, predicted: int | None) -> bool | None:
    """Return whether an answer to a case to which the rule applies avoids its penalty or earns its bonus.

    An answer without a level never does. None for a code rule whose value can have either sign: the level alone does
    not determine it.
    """
    if rule.low < 0 < rule.high:
        return None
    return predicted is not None and (predicted in rule.predicted) == (rule.low >= 0)


def failures(answers: Sequence[JudgedAnswer], reward: Reward) -> list[dict[str, Any]]:
    """Return the wrong cases of an evaluation as ``eval.json`` lists them: ids, levels and names, no text. The majority
    of several answers to a case counts.

    ``predicted``: None if no answer parses, as is ``step``, at which it failed. ``levels``: of all answers.
    ``decided_at``: see `deciding_step`. ``rules``: rule that applies → `rule_obeyed`. ``broken``: names of the
    `requirements` that apply and are not met.
    """
    cases = {answer.case.id: answer.case for answer in answers}
    wrong = [
        (cases[case_id], levels)
        for case_id, levels in levels_by_case(answers).items()
        if majority(levels) != cases[case_id].gold_level
    ]
    return [_failure(case, levels, reward) for case, levels in wrong]


def _failure(case: Case, levels: list[int | None], reward: Reward) -> dict[str, Any]:
    predicted, decided = majority(levels), deciding_step(case)
    rules = {
        r.name: rule_obeyed(r, predicted) for r in reward.rules if reward.applies(r.name, case.text, case.gold_level)
    }
    return {
        "id": case.id,
        "gold": case.gold_level,
        "predicted": predicted,
        "levels": levels,
        "step": None if predicted is None else failed_step(case.gold_level, decided, predicted),
        "decided_at": decided,
        "rules": rules,
        "broken": [
            name for name, rows in requirements(reward).items() if any(rules.get(rule.name) is False for rule in rows)
        ],
        "tags": list(case.tags),
    }


def count_failures(cases: Sequence[Case], failed: Sequence[Mapping[str, Any]], reward: Reward) -> dict[str, Any]:
    """Return counts over the wrong cases.

    ``wrong``: their number. ``by_step``: step → {"under", "over"}: less and more acute than gold. ``no_parse``: without
    a level. ``by_rule``: requirement → {"applies": cases to which it applies, "broken": how many break it, "cases":
    their ids}. ``unexplained``: ids of those that break none.

    Args:
        cases: of the whole evaluation.
        failed: see `failures`.
    """
    broken_by = {name: [f["id"] for f in failed if name in f["broken"]] for name in requirements(reward)}
    return {
        "wrong": len(failed),
        "by_step": {
            step: {
                "under": sum(f["step"] == step and f["predicted"] > f["gold"] for f in failed),
                "over": sum(f["step"] == step and f["predicted"] < f["gold"] for f in failed),
            }
            for step in ESI_STEPS
        },
        "no_parse": sum(f["predicted"] is None for f in failed),
        "by_rule": {
            name: {
                "applies": sum(reward.applies(rows[0].name, case.text, case.gold_level) for case in cases),
                "broken": len(broken_by[name]),
                "cases": broken_by[name],
            }
            for name, rows in requirements(reward).items()
        },
        "unexplained": [f["id"] for f in failed if not f["broken"]],
    }
