"""Two sets of answers to the same cases: between thinking modes, and with an earlier evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo.config import Thinking
from grpo.evaluation.statistics import cohen_kappa, majority, mcnemar, wilson
from grpo.run.input_hashes import text_sha256
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards.safe_files import MEBIBYTE, Unreadable, clipped, read_json

MOST_BYTES = 256 * MEBIBYTE
"""Of an ``eval.json``: 300 a case."""
FORMAT = 2
"""Of ``eval.json``; raised when a key changes its meaning. Since 2, ``high_acuity_under`` is a share of ESI 1 and 2."""
Level = Annotated[int, Field(ge=1, le=5)]


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class AnsweredCase(_Read):
    """One case of ``eval.json``: what was asked, by hash, and what was answered, by mode."""

    id: str
    esi: Level
    sha256: str
    """Of the case's text, UTF-8."""
    levels: dict[Thinking, tuple[Level | None, ...]]
    """Mode → the level of each answer."""


class Evaluated(_Read):
    """As much of an ``eval.json`` as a comparison needs."""

    format: Literal[1, 2]
    """What is read here means the same in both."""
    settings: dict[str, Any]
    cases: dict[str, tuple[AnsweredCase, ...]]
    """Set → its cases."""


def read_evaluation(path: Path) -> Evaluated:
    """An ``eval.json`` that `grpo evaluate` wrote.

    Raises:
        UserError: not there, not JSON, of a training run, or not of this format.
    """
    try:
        value = read_json(path, most=MOST_BYTES)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    if isinstance(value, list):
        raise UserError(
            f"{path}: is of a training run, which keeps no hash of its cases: evaluate that adapter with "
            f"`python -m grpo evaluate CONFIG --adapter RUN/adapter`, then name the eval.json of that"
        )
    try:
        return Evaluated.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = clipped(".".join(str(part) for part in fault["loc"]) or "the file", 200)[1:-1]
        raise UserError(f"{path}: {where}: {fault['msg']}; not an eval.json that this program reads") from None


def check_same_cases(sets: Mapping[str, Sequence[Case]], before: Evaluated, path: Path) -> None:
    """Raises `UserError` unless some set has cases in both, and every case in both is the same text and gold."""
    for name in sets.keys() & before.cases.keys():
        there = {case.id: case for case in before.cases[name]}
        both = [case for case in sets[name] if case.id in there]
        other = [c.id for c in both if (text_sha256(c.text), c.esi) != (there[c.id].sha256, there[c.id].esi)]
        if other:
            more = f" and {len(other) - 5} more" if len(other) > 5 else ""
            raise UserError(
                f"{path}: {name}: {len(other)} of {len(both)} cases in both have another text or gold level there: "
                f"{', '.join(map(repr, other[:5]))}{more}; only answers to the same cases can be compared"
            )
    if not any({c.id for c in sets[name]} & {c.id for c in before.cases.get(name, ())} for name in sets):
        raise UserError(
            f"{path}: no case in common: it holds {', '.join(sorted(before.cases)) or 'nothing'}, this evaluation "
            f"{', '.join(sorted(sets))} (sets are matched by name, cases by id)"
        )


def compare(before: Sequence[AnsweredCase], after: Sequence[AnsweredCase], mode: Thinking) -> dict[str, Any]:
    """What became of each case that both evaluations answered in this mode; of several answers the majority counts.

    ``fixed``: wrong → right. ``broken``: right → wrong. ``unchanged_right``, ``unchanged_wrong``; all as ids, in
    ``after``'s order. ``p_value``: see `grpo.evaluation.statistics.mcnemar`.
    """
    old = {case.id: case for case in before if mode in case.levels}
    both = [case for case in after if mode in case.levels and case.id in old]
    names = {
        (False, True): "fixed",
        (True, False): "broken",
        (True, True): "unchanged_right",
        (False, False): "unchanged_wrong",
    }
    ids: dict[str, list[str]] = {name: [] for name in names.values()}
    for case in both:
        was, now = (majority(one.levels[mode]) == one.esi for one in (old[case.id], case))
        ids[names[was, now]].append(case.id)
    return {"n": len(both), **ids, "p_value": mcnemar(len(ids["fixed"]), len(ids["broken"]))}


def between_modes(cases: Sequence[AnsweredCase]) -> dict[str, Any]:
    """How far the answers with and without thinking agree; of several answers the majority counts.

    ``agreement``: the share of cases with the same outcome, its Wilson ``interval``; no parse is an outcome of its own.
    ``kappa``: Cohen's, over those outcomes. ``differ``: ids of the others. ``only_on``, ``only_off``: ids of the cases
    right in that mode alone; ``p_value``: McNemar's over these.
    """
    pairs = [(majority(case.levels["on"]), majority(case.levels["off"])) for case in cases]
    same = sum(on == off for on, off in pairs)
    told = list(zip(cases, pairs, strict=True))
    only_on = [case.id for case, (on, off) in told if on == case.esi != off]
    only_off = [case.id for case, (on, off) in told if off == case.esi != on]
    return {
        "n": len(cases),
        "agreement": same / len(cases),
        "interval": wilson(same, len(cases)),
        "kappa": cohen_kappa(pairs),
        "differ": [case.id for case, (on, off) in told if on != off],
        "only_on": only_on,
        "only_off": only_off,
        "p_value": mcnemar(len(only_on), len(only_off)),
    }
