"""Comparison of two sets of answers to the same cases: of two thinking modes, and with an earlier evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo.config import ThinkingMode
from grpo.evaluation.statistics import cohen_kappa, majority, mcnemar, wilson
from grpo.evaluation.table import format_ids
from grpo.run.input_hashes import text_sha256
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards.safe_files import MEBIBYTE, InvalidFile, read_json, shorten

MAX_EVAL_BYTES = 256 * MEBIBYTE
"""An ``eval.json`` has about 300 bytes per case."""
EVAL_FORMAT = 2
"""Version of ``eval.json``, raised when a key changes its meaning. Since 2, ``high_acuity_under`` is a rate over the
cases of ESI 1 and 2."""
COMPARED_SETTINGS = ("samples", "max_new_tokens", "temperature", "seed", "system_prompt", "formats", "device", "dtype")
Level = Annotated[int, Field(ge=1, le=5)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class AnsweredCase(_Record):
    """One case of ``eval.json``, with the hash of its text instead of the text."""

    id: str
    esi: Level
    sha256: str
    """Of the UTF-8 text."""
    levels: dict[ThinkingMode, tuple[Level | None, ...]]
    """Mode → the level of each answer."""


class Evaluated(_Record):
    """The part of an ``eval.json`` that a comparison needs."""

    format: Literal[1, 2]
    """The keys below mean the same in both."""
    settings: dict[str, Any]
    cases: dict[str, tuple[AnsweredCase, ...]]
    """Set → its cases."""


def read_evaluation(path: Path) -> Evaluated:
    """Read an ``eval.json`` written by `grpo evaluate`.

    Raises:
        UserError: missing, not JSON, that of a training run, or of another format.
    """
    try:
        value = read_json(path, most=MAX_EVAL_BYTES)
    except InvalidFile as error:
        raise UserError(f"{path}: {error}") from None
    if isinstance(value, list):
        raise UserError(
            f"{path}: belongs to a training run and has no hashes of the cases: evaluate that adapter with "
            f"`grpo evaluate CONFIG --adapter RUN/adapter` and compare with the eval.json of that"
        )
    try:
        return Evaluated.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        key = shorten(".".join(str(part) for part in fault["loc"]) or "the file", 200)[1:-1]
        raise UserError(f"{path}: {key}: {fault['msg']}; not an eval.json of a supported format") from None


def check_same_cases(sets: Mapping[str, Sequence[Case]], before: Evaluated, path: Path) -> None:
    """Raise `UserError` unless some set shares cases with ``before`` and all shared cases have equal text and level."""
    shared_ids = 0
    for name in sets.keys() & before.cases.keys():
        earlier = {case.id: case for case in before.cases[name]}
        shared = [case for case in sets[name] if case.id in earlier]
        shared_ids += len(shared)
        changed = [
            c.id for c in shared if (text_sha256(c.text), c.gold_level) != (earlier[c.id].sha256, earlier[c.id].esi)
        ]
        if changed:
            raise UserError(
                f"{path}: {name}: {len(changed)} of {len(shared)} shared cases have a different text or gold level: "
                f"{format_ids(changed)}; only answers to the same cases can be compared"
            )
    if not shared_ids:
        raise UserError(
            f"{path}: no case in common: it contains {', '.join(sorted(before.cases)) or 'no set'}, this evaluation "
            f"{', '.join(sorted(sets))} (sets are matched by name, cases by id)"
        )


def compare(before: Sequence[AnsweredCase], after: Sequence[AnsweredCase], mode: ThinkingMode) -> dict[str, Any]:
    """Compare the cases that both evaluations answered in a mode; the majority of several answers counts.

    ``fixed``: wrong → right. ``broken``: right → wrong. ``unchanged_right``, ``unchanged_wrong``. All are lists of ids
    in the order of ``after``. ``p_value``: see `grpo.evaluation.statistics.mcnemar`.
    """
    earlier = {case.id: case for case in before if mode in case.levels}
    shared = [case for case in after if mode in case.levels and case.id in earlier]
    ids: dict[str, list[str]] = {"fixed": [], "broken": [], "unchanged_right": [], "unchanged_wrong": []}
    for case in shared:
        was_right = majority(earlier[case.id].levels[mode]) == earlier[case.id].esi
        if majority(case.levels[mode]) == case.esi:
            ids["unchanged_right" if was_right else "fixed"].append(case.id)
        else:
            ids["broken" if was_right else "unchanged_wrong"].append(case.id)
    return {"n": len(shared), **ids, "p_value": mcnemar(len(ids["fixed"]), len(ids["broken"]))}


def compare_evaluations(
    before: Evaluated, settings: Mapping[str, Any], sets: Mapping[str, Sequence[AnsweredCase]], against: Path
) -> dict[str, Any]:
    """Return the ``comparison`` of ``eval.json``: what changed since ``before`` in each set and mode that both have."""
    records, not_compared = [], []
    for name, cases in sets.items():
        for mode in cases[0].levels:
            place = {"cases": name, "thinking": mode}
            compared = compare(before.cases.get(name, ()), cases, mode)
            records.append({**place, **compared})
            not_compared.append({**place, "n": len(cases) - compared["n"]})
    return {
        "against": str(against),
        "adapter_sha256": before.settings.get("adapter_sha256"),
        "changed_settings": [key for key in COMPARED_SETTINGS if before.settings.get(key) != settings[key]],
        "records": [record for record in records if record["n"]],
        "not_compared": [record for record in not_compared if record["n"]],
    }


def compare_modes(cases: Sequence[AnsweredCase]) -> dict[str, Any]:
    """Compare the answers with and without thinking; the majority of several answers counts.

    ``agreement``: fraction of cases with the same outcome, with its Wilson ``interval``; no parse is an outcome.
    ``kappa``: Cohen's kappa of the outcomes. ``differ``: ids of the other cases. ``only_on``, ``only_off``: ids of the
    cases right in that mode only; ``p_value``: McNemar's test on these.
    """
    outcomes = [(case, majority(case.levels["on"]), majority(case.levels["off"])) for case in cases]
    differ = [case.id for case, on, off in outcomes if on != off]
    only_on = [case.id for case, on, off in outcomes if on == case.esi != off]
    only_off = [case.id for case, on, off in outcomes if off == case.esi != on]
    same = len(cases) - len(differ)
    return {
        "n": len(cases),
        "agreement": same / len(cases),
        "interval": wilson(same, len(cases)),
        "kappa": cohen_kappa([(on, off) for _, on, off in outcomes]),
        "differ": differ,
        "only_on": only_on,
        "only_off": only_off,
        "p_value": mcnemar(len(only_on), len(only_off)),
    }
