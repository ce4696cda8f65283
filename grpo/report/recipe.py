"""The recipe of a run with the grade of each value, the rows of its reward, and the differences between runs."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import key_comments, load_config
from grpo.inspection.run_reader import RunRecord
from grpo.report.charts import NOTHING

REWARD_GRADES = {"K": "known", "I": "inferred", "U": "unknown"}


@dataclass(frozen=True, slots=True)
class Value:
    """One key of the config, or one row of the reward."""

    key: str
    value: str
    grade: str
    """"known", "inferred", "unknown", "differs", "same", "set" (on the command line) or ""."""
    note: str


def config_values(run: RunRecord, shorten: Callable[[Any], Any] = lambda value: value) -> dict[str, tuple[Value, ...]]:
    """Return the keys of each config section in order, those outside all sections under ""; ``shorten`` their values.

    A key without a comment has that of ``configs/v49.toml`` if their values are equal, else the grade "differs". The
    comment of an overridden key does not apply.
    """
    v49, source = load_config("configs/v49.toml")
    v49_values, v49_notes = flat(v49.model_dump(mode="json")), key_comments(source.text)
    sections: dict[str, list[Value]] = {}
    for key, value in flat(run.config.model_dump(mode="json")).items():
        section, _, name = key.rpartition(".")
        same = key in v49_values and v49_values[key] == value
        v49_value = "" if same or key not in v49_values else f"v49: {to_text(v49_values[key])}"
        grade, note = _grade(run.notes.get(key, ""))
        if any(f"{key}.".startswith(f"{override}.") or override.startswith(f"{key}.") for override in run.overrides):
            grade, note = "set", v49_value
        elif key not in run.notes and section:
            grade, note = _grade(v49_notes.get(key, "")) if same else ("differs" if v49_value else "", v49_value)
        sections.setdefault(section, []).append(Value(name, to_text(shorten(value)), grade, note))
    return {section: tuple(values) for section, values in sections.items()}


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return (key, value in each run …) for the config keys that differ, and for the reward's sha256."""
    configs = [flat(run.config.model_dump(mode="json")) for run in runs]
    configs = [c | {"reward (sha256)": run.reward.get("sha256", "")[:12]} for c, run in zip(configs, runs, strict=True)]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, *(to_text(c[key]) if key in c else NOTHING for c in configs)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten the sections of a config to dotted keys; tables and lists that are values stay.

    >>> flat({"name": "x", "train": {"steps": 3}, "evaluate": {"periodic": {"a": "b"}}})
    {'name': 'x', 'train.steps': 3, 'evaluate.periodic': {'a': 'b'}}
    """
    flattened: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and (not prefix or key == "overlong"):
            flattened |= flat(inner, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = inner
    return flattened


def to_text(value: Any) -> str:
    """Format a config value.

    >>> to_text(2e-7), to_text(["q_proj", "v_proj"]), to_text({"1": 5}), to_text(True), to_text(None), to_text({})
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
    """Split a config comment into its grade and the rest. A comment may also state its grade later on.

    >>> _grade("KNOWN for v46, INFERRED for v49"), _grade("differs: smaller"), _grade("ours, hence UNKNOWN")
    (('known', 'for v46, INFERRED for v49'), ('differs', 'smaller'), ('unknown', 'ours, hence UNKNOWN'))
    """
    if match := re.match(r"(KNOWN|INFERRED|UNKNOWN|differs|same)\b[:;,.]?\s*", note):
        return match[1].lower(), note[match.end() :]
    match = re.search(r"\b(KNOWN|INFERRED|UNKNOWN)\b", note)
    return (match[1].lower() if match else ""), note


def reward_values(run: RunRecord) -> Iterator[Value]:
    """Yield the rows of ``reward.json``: base table, no parse, rules, stacking. Malformed parts are omitted."""
    reward = run.reward_set
    base, rules, stacking = reward.get("base"), reward.get("rule"), reward.get("stacking")
    rows = [(name.replace("_", " "), row) for name, row in base.items()] if isinstance(base, Mapping) else []
    rows.append(("no parse", reward.get("no_parse")))
    for name, row in rows:
        if isinstance(row, Mapping):
            yield _reward_value(name, _number(row.get("value")), row)
    for row in rules if isinstance(rules, list) else ():
        if isinstance(row, Mapping):
            value = row.get("value") if row.get("value") is not None else row.get("range")
            condition = f"gold {row.get('gold', '?')}, predicted {row.get('predicted', '?')}"
            yield _reward_value(str(row.get("name", "?")), f"{_number(value)} if {condition}", row)
    if isinstance(stacking, Mapping):
        text = f"penalties: {stacking.get('penalties')}, bonuses: {stacking.get('bonuses')}"
        yield _reward_value("stacking", text, stacking)


def _reward_value(name: str, value: str, row: Mapping[str, Any]) -> Value:
    return Value(name, value, REWARD_GRADES.get(str(row.get("grade")), ""), str(row.get("source", "")))


def _number(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:+g}" if value else "0"
    return json.dumps(value)
