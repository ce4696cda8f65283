"""The recipe as a reader meets it: every value with its grade, the reward's rows, and what two runs differ in."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import load_config, notes
from grpo.inspection.run_reader import RunRecord
from grpo.report.number_format import NOTHING, minus

GRADES = {
    "KNOWN": "known",
    "INFERRED": "inferred",
    "UNKNOWN": "unknown",
    "differs": "differs",
    "same": "same",
    "K": "known",
    "I": "inferred",
    "U": "unknown",
}
"""First word of a config's comment, or a reward row's grade → the grade shown."""


@dataclass(frozen=True, slots=True)
class Value:
    """One key of the config, or one row of the reward."""

    key: str
    value: str
    grade: str
    """One of the values of `GRADES`, "set" for a value laid over the file, or ""."""
    note: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that not all runs share."""

    key: str
    values: tuple[str, ...]


def config_values(run: RunRecord) -> dict[str, tuple[Value, ...]]:
    """Section → its keys in order; the keys outside all sections stand under "".

    A value without a note has that of the shipped v49 config where it is the same there, and is told apart where it
    is not. A note of the file says nothing about a value that was laid over it.
    """
    config, source = load_config("configs/v49.toml")
    parent, parent_notes = flat(config.model_dump(mode="json")), notes(source.text)
    found: dict[str, list[Value]] = {}
    for key, value in flat(run.config.model_dump(mode="json")).items():
        section, _, name = key.rpartition(".")
        same = key in parent and parent[key] == value
        other = "" if same or key not in parent else f"v49: {written(parent[key])}"
        grade, note = _grade(run.notes.get(key, ""))
        if key in run.overrides:
            grade, note = "set", other
        elif key not in run.notes and section:
            grade, note = _grade(parent_notes.get(key, "")) if same else ("differs" if other else "", other)
        found.setdefault(section, []).append(Value(name, written(value), grade, note))
    return {section: tuple(values) for section, values in found.items()}


def reward_values(run: RunRecord) -> tuple[Value, ...]:
    """The rows of the run's reward with their grades; nothing where ``reward.json`` is not there."""
    return tuple(_reward_rows(run.reward_set))


def differences(runs: Sequence[RunRecord]) -> tuple[Difference, ...]:
    """The keys whose values are not the same in all runs, and the reward's sha256."""
    configs = [flat(run.config.model_dump(mode="json")) for run in runs]
    configs = [c | {"reward (sha256)": run.reward.get("sha256", "")[:12]} for c, run in zip(configs, runs, strict=True)]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = {key: tuple(written(c[key]) if key in c else NOTHING for c in configs) for key in keys}
    return tuple(Difference(key, values) for key, values in rows.items() if len(set(values)) > 1)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value. Sections are opened, tables and lists of values are not.

    >>> flat({"name": "x", "train": {"steps": 3}, "evaluate": {"during": {"a": "b"}}})
    {'name': 'x', 'train.steps': 3, 'evaluate.during': {'a': 'b'}}
    """
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and (not prefix or key == "overlong"):
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


def written(value: Any) -> str:
    """A value as a person would write it.

    >>> written(2e-7), written(["q_proj", "v_proj"]), written({"1": 5}), written(True), written(None), written({})
    ('2e-07', 'q_proj, v_proj', '1 = 5', 'true', '–', 'none')
    """
    match value:
        case None | "":
            return NOTHING
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:g}"
        case Mapping():
            return ", ".join(f"{key} = {inner}" for key, inner in value.items()) or "none"
        case list() | tuple():
            return ", ".join(str(inner) for inner in value) or "none"
    return str(value)


def _grade(note: str) -> tuple[str, str]:
    """(grade, the rest of the comment).

    >>> _grade("KNOWN for v46, INFERRED for v49"), _grade("differs: smaller"), _grade("a choice of ours")
    (('known', 'for v46, INFERRED for v49'), ('differs', 'smaller'), ('', 'a choice of ours'))
    """
    found = re.match(r"(KNOWN|INFERRED|UNKNOWN|differs|same)\b[:;,.]?\s*", note)
    return (GRADES[found[1]], note[found.end() :]) if found else ("", note)


def _reward_rows(reward: Mapping[str, Any]) -> Iterator[Value]:
    """Base table, no-parse, stacking, rules. What is not written the way a set is, is left out."""
    base, rules = reward.get("base"), reward.get("rule")
    for name, row in base.items() if isinstance(base, Mapping) else ():
        if isinstance(row, Mapping):
            yield _reward_row(name.replace("_", " "), _number(row.get("value")), row)
    if isinstance(row := reward.get("no_parse"), Mapping):
        yield _reward_row("no parse", _number(row.get("value")), row)
    for row in rules if isinstance(rules, list) else ():
        if isinstance(row, Mapping):
            condition = f"gold {row.get('gold', '?')}, predicted {row.get('predicted', '?')}"
            value = row.get("value") if row.get("value") is not None else row.get("range")
            yield _reward_row(str(row.get("name", "?")), f"{_number(value)} if {condition}", row)
    if isinstance(row := reward.get("stacking"), Mapping):
        yield _reward_row("stacking", f"penalties: {row.get('penalties')}, bonuses: {row.get('bonuses')}", row)


def _reward_row(name: str, value: str, row: Mapping[str, Any]) -> Value:
    return Value(name, value, GRADES.get(str(row.get("grade")), ""), str(row.get("source", "")))


def _number(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return minus(f"{value:+g}") if value else "0"
    return json.dumps(value)
