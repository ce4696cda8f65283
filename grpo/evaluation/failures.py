"""Why a case was wrong, as an error analysis by hand would say it: the step of the ESI algorithm, the rules, the tags.

The algorithm asks A (lifesaving now?), B (should not wait?), C (how many kinds of resources?) and D (danger-zone vital
signs?) and stops at the first hit. A wrong answer failed at the first question on which its path and gold's part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from grpo.evaluation.metrics import Verdict
from grpo.evaluation.statistics import majority
from grpo.types import Case
from rewards import Reward, Rule

Step = Literal["A", "B", "C", "D"]
STEPS: tuple[Step, ...] = ("A", "B", "C", "D")

PATHS: Mapping[tuple[int, Step], tuple[str, ...]] = MappingProxyType(
    {
        (1, "A"): ("yes",),
        (2, "B"): ("no", "yes"),
        (2, "D"): ("no", "no", "many", "yes"),
        (3, "D"): ("no", "no", "many", "no"),
        (4, "C"): ("no", "no", "one"),
        (5, "C"): ("no", "no", "none"),
    }
)
"""(level, the step that decides it) → what the steps from A on answer."""
DECIDED_AT: Mapping[int, Step] = MappingProxyType({1: "A", 2: "B", 3: "D", 4: "C", 5: "C"})
"""Level → the step that decides it, where nothing else is known: level 2 is then step B's, the commoner way to it."""
STEP_TAGS: Mapping[str, Step] = MappingProxyType({f"step:{step}": step for step in STEPS} | {"danger_vitals": "D"})
"""Tags of a case that name its deciding step: ``step:D`` on anybody's cases, the stratum on the embedded ones."""

BLAMED_AT_ONCE = 100
"""Tags that are listed at most: foreign files may carry one a case."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One wrong case. Example: gold 1, predicted 2, failed at A, ``obeyed = {"lifesaving_missed": False}``."""

    case: Case
    predicted: int | None
    """Of several answers the majority's; None where none parses."""
    levels: tuple[int | None, ...]
    """Of all answers."""
    step: Step | None
    """None where there is no answer."""
    obeyed: Mapping[str, bool | None]
    """Rule that applies → `obeyed`."""
    broken: tuple[str, ...]
    """The requirements (see `requirements`) that apply and were not met."""


def deciding_step(case: Case) -> Step:
    """The step at which the algorithm stops for this case: a tag of `STEP_TAGS` where it has one that fits its level,
    else `DECIDED_AT`.

    >>> deciding_step(Case("a", "...", 2)), deciding_step(Case("b", "...", 2, ("danger_vitals",)))
    ('B', 'D')
    """
    named = (STEP_TAGS[tag] for tag in case.tags if tag in STEP_TAGS)
    return next((step for step in named if (case.esi, step) in PATHS), DECIDED_AT[case.esi])


def failed_step(gold: int, decided: Step, predicted: int) -> Step:
    """The first step on which gold's path and the answer's part.

    Args:
        gold: ESI level.
        decided: the step that decides gold, see `deciding_step`.
        predicted: another level. Its path is the one of `DECIDED_AT`: an answer of 2 is taken as step B's.

    Raises:
        ValueError: equal levels, or a step that cannot decide gold.

    A missed intervention; a missed danger zone; a resource too many; a high risk seen where there is none:

    >>> failed_step(1, "A", 2), failed_step(2, "D", 3), failed_step(5, "C", 4), failed_step(3, "D", 2)
    ('A', 'D', 'C', 'B')
    """
    if gold == predicted or (gold, decided) not in PATHS:
        raise ValueError(f"expected a wrong answer and a step that decides level {gold}, got {predicted}, {decided}")
    right, answer = PATHS[gold, decided], PATHS[predicted, DECIDED_AT[predicted]]
    return next(step for step, a, b in zip(STEPS, right, answer, strict=False) if a != b)  # a path ends where it hits


def requirements(reward: Reward) -> dict[str, tuple[Rule, ...]]:
    """What the reward set asks of the cases, one entry a trigger and gold condition: a bonus and a penalty on the same
    words are one requirement in two rows. Named after its first penalty, else after its first row.

    >>> from rewards import load_reward
    >>> list(requirements(load_reward("v49")))
    ['lifesaving_missed', 'open_injury_missed', 'severe_pain_missed']
    """
    rows: dict[object, list[Rule]] = {}
    for rule in reward.rules:
        key = rule.name if rule.function else (rule.trigger, rule.gold)
        rows.setdefault(key, []).append(rule)
    return {
        next((rule.name for rule in members if rule.high < 0), members[0].name): tuple(members)
        for members in rows.values()
    }


def obeyed(rule: Rule, predicted: int | None) -> bool | None:
    """Whether an answer to a case that the rule speaks about keeps to it: a penalty stays away, a bonus is earned.

    No answer obeys nothing. None for a rule of code whose value can have either sign: the level alone does not say.
    """
    if rule.low < 0 < rule.high:
        return None
    fires = predicted in rule.predicted
    return predicted is not None and (not fires if rule.low < 0 else fires)


def failures(verdicts: Sequence[Verdict], reward: Reward) -> tuple[Failure, ...]:
    """The cases that an evaluation got wrong, in its order. Of several answers to a case the majority counts."""
    by_case: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_case.setdefault(verdict.case.id, []).append(verdict)
    found = []
    for answers in by_case.values():
        case, levels = answers[0].case, tuple(answer.predicted for answer in answers)
        predicted = majority(levels)
        if predicted != case.esi:
            found.append(_failure(case, predicted, levels, reward))
    return tuple(found)


def _failure(case: Case, predicted: int | None, levels: tuple[int | None, ...], reward: Reward) -> Failure:
    speaking = {rule.name: rule for rule in reward.rules if reward.applies(rule.name, case.text, case.esi)}
    kept = {name: obeyed(rule, predicted) for name, rule in speaking.items()}
    return Failure(
        case=case,
        predicted=predicted,
        levels=levels,
        step=None if predicted is None else failed_step(case.esi, deciding_step(case), predicted),
        obeyed=MappingProxyType(kept),
        broken=tuple(
            name for name, rules in requirements(reward).items() if any(kept.get(rule.name) is False for rule in rules)
        ),
    )


def triage_of_errors(cases: Sequence[Case], failed: Sequence[Failure], reward: Reward) -> dict[str, Any]:
    """Counts over the wrong cases.

    ``wrong``: how many. ``by_step``: step → {"under", "over"}, less and more acute than gold. ``no_parse``: no step.
    ``by_rule``: requirement → {"applies": cases it speaks about, "broken": those that break it, "cases": their ids}.
    ``unexplained``: ids of those that break none. ``by_tag``: tag → {"n", "wrong"}, the largest share first.
    """
    applies = {
        name: sum(reward.applies(rules[0].name, case.text, case.esi) for case in cases)
        for name, rules in requirements(reward).items()
    }
    tags = {
        tag: sum(tag in case.tags for case in cases) for tag in sorted({tag for case in cases for tag in case.tags})
    }
    wrong = {tag: sum(tag in failure.case.tags for failure in failed) for tag in tags}
    often = sorted((tag for tag in tags if wrong[tag]), key=lambda tag: (-wrong[tag] / tags[tag], -wrong[tag], tag))
    return {
        "wrong": len(failed),
        "by_step": {step: _sides([failure for failure in failed if failure.step == step]) for step in STEPS},
        "no_parse": sum(failure.predicted is None for failure in failed),
        "by_rule": {
            name: {
                "applies": applies[name],
                "broken": sum(name in failure.broken for failure in failed),
                "cases": [failure.case.id for failure in failed if name in failure.broken],
            }
            for name in applies
        },
        "unexplained": [failure.case.id for failure in failed if not failure.broken],
        "by_tag": {tag: {"n": tags[tag], "wrong": wrong[tag]} for tag in often[:BLAMED_AT_ONCE]},
    }


def _sides(failed: Sequence[Failure]) -> dict[str, int]:
    """How many answers are less acute than gold, and how many more."""
    under = sum(failure.predicted is not None and failure.predicted > failure.case.esi for failure in failed)
    return {"under": under, "over": len(failed) - under}


def failure_row(failure: Failure) -> dict[str, Any]:
    """A wrong case as ``eval.json`` lists it: ids, levels, names, no text."""
    return {
        "id": failure.case.id,
        "gold": failure.case.esi,
        "predicted": failure.predicted,
        "levels": list(failure.levels),
        "step": failure.step,
        "decided_at": deciding_step(failure.case),
        "rules": dict(failure.obeyed),
        "broken": list(failure.broken),
        "tags": list(failure.case.tags),
    }
