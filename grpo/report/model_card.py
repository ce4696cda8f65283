"""The model card of a run, written from its records: config.json, metrics.jsonl, eval.json.

No case is ever looked at: the answers under ``eval/`` and the case files stay unread. Everything that comes from the
run is escaped, so that no name or comment of a config can become markup.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from grpo.config import notes
from grpo.evaluation.metrics import baselines
from grpo.evaluation.statistics import wilson
from grpo.policy.base_model import HUB_ID
from grpo.run.folder import Run, evaluations
from grpo.runtime.errors import UserError
from rewards import RewardError
from rewards.safe_files import Unreadable, check_contents, is_regular, parse_json, raw_lines, read_json
from rewards.set_files import load_set

RATES = {
    "exact": "exact",
    "adjacent": "adjacent",
    "dangerous": "dangerous_under",
    "high-acuity": "high_acuity_under",
    "no parse": "no_parse",
    "clipped": "clipped_ratio",
}
"""Column of the evaluation table → key of a record of ``eval.json``."""
DENOMINATORS = {"high_acuity_under": "high_acuity_n"}
"""Rate → the key that says how many cases it is a share of; ``n`` for the others."""
METRICS = (
    "reward/mean", "reward/std_group", "groups/zero_variance", "completions/clipped_ratio", "completions/no_parse",
    "completions/mean_length", "kl/k1", "kl/k2", "kl/k3", "kl/ratio_k3", "entropy", "grad_norm",
)  # fmt: skip
"""Rows of the training table, those that the run logged."""
GRADES = {"KNOWN": "K", "INFERRED": "I", "UNKNOWN": "U"}
LONGEST = 400
"""Characters of a cell; more is cut."""


class Ready(str):
    """Text that already is what it should be where it stands: code or YAML, not to be escaped again."""

    __slots__ = ()


def model_card(run_folder: Path, *, merged: bool = False) -> str:
    """The card in Markdown, a function of the run's records alone.

    Args:
        merged: speak of full weights instead of an adapter.

    A run without steps or evaluations says so. Raises `UserError` for a record that is missing or
    damaged.
    """
    run = Run(run_folder)
    record = _read_config(run_folder / "config.json")
    config = record["config"]
    try:
        named = config["model"]["name"]
        records = [r for r in evaluations(run) if r["n"] > 0]
        name, rows = reward_rows(config["reward"]["set"])
        values = {
            "merged": merged,
            "name": config["name"],
            "base": _shown(named).replace("embedded:", "grpo/tiny/"),
            "hub_base": bool(HUB_ID.fullmatch(named)),
            "embedded": named.removeprefix("embedded:") if named.startswith("embedded:") else "",
            "lora": config["lora"],
            "reward_name": _shown(config["reward"]["set"]),
            "about": name,
            "unsound": config["reward"].get("reason"),
            "evaluations": evaluation_tables(records),
            "training": training_table(_read_metrics(run.metrics)),
            "recipe": recipe_rows(config, record.get("source") or {}),
            "rewards": rows,
            "made_with": _made_with(record),
            "system_prompt": config["cases"]["system_prompt"],
            "max_new_tokens": config["evaluate"]["max_new_tokens"],
        }
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{run_folder}: its records are not those of a run: {type(error).__name__} {error}") from None
    return _environment().from_string(_template()).render(values)


def write_model_card(run_folder: Path, path: Path, *, merged: bool = False) -> Path:
    """Writes the card of a run to ``path``, whole or not at all; the path."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(model_card(run_folder, merged=merged), encoding="utf-8")
    os.replace(aside, path)
    return path


def escape(value: object) -> str:
    r"""A value as one line of Markdown text in which nothing is markup: not for Markdown, nor its tables, nor HTML.

    Line breaks and invisible characters become blanks; at most `LONGEST` characters are kept.

    >>> print(escape("<b>x</b> | q_proj *now* http://a.b"))
    &#60;b&#62;x&#60;/b&#62; &#124; q_proj &#42;now&#42; http&#58;//a.b
    """
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(value))
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    special = r"[\\`*\[\]|~$<>&@]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|:(?=//)|(?<=\bwww)\."
    return re.sub(special, lambda match: f"&#{ord(match[0])};", text, flags=re.IGNORECASE)


def recipe_rows(config: Mapping[str, Any], source: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a config key: its value in this run, and the grade and note that its comment in the TOML file gives.

    Args:
        config: the resolved config.
        source: ``toml`` (the file's text) and ``overrides`` (``section.key=value``): an overridden key has no grade.
    """
    comments = notes(str(source.get("toml", "")))
    changed = {str(override).partition("=")[0].strip() for override in source.get("overrides", ())}
    rows = []
    for section, table in config.items():
        for key, value in table.items() if isinstance(table, Mapping) else ():
            name, note = f"{section}.{key}", comments.get(f"{section}.{key}", "")
            if name == "cases.system_prompt":
                value = "see the code under Use"
            if any(name == c or name.startswith(f"{c}.") or c.startswith(f"{name}.") for c in changed):
                note = "set on the command line"
            grade = ", ".join(
                dict.fromkeys(GRADES[word] for word in re.findall(r"\b(?:UN)?KNOWN\b|\bINFERRED\b", note))
            )
            rows.append({"key": name, "value": _value(value), "grade": grade, "note": note})
    return rows


def reward_rows(name: str) -> tuple[str, list[dict[str, str]]]:
    """What a reward set is about, and one row for each of its numbers: value, grade, source. No rule's code is run, and
    no pattern is shown. A set that is no longer there gives ("", [])."""
    try:
        found, _ = load_set(name)
    except RewardError:
        return "", []
    rows = [*found.base.items(), ("no_parse", found.no_parse), *((row.name, row) for row in found.rule)]
    shown = []
    for title, row in rows:
        value = getattr(row, "value", None)
        text = "computed" if value is None else f"{value:+g}"
        shown.append({"name": title, "value": text, "grade": row.grade, "source": row.source})
    return found.about, shown


def training_table(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The steps of a run in figures: means over its first and last tenth (at least one step), and the extremes.

    Args:
        lines: of ``metrics.jsonl``, in order. None if there are none. A figure that was not finite is left out.
    """
    if not lines:
        return None
    window, rows = max(1, len(lines) // 10), []
    for metric in METRICS:
        if values := _finite(line.get(metric) for line in lines):
            first, last = (_finite(line.get(metric) for line in part) for part in (lines[:window], lines[-window:]))
            figures = {"first": _mean(first), "last": _mean(last), "least": min(values), "greatest": max(values)}
            rows.append({"metric": metric} | {k: "–" if v is None else f"{v:.4g}" for k, v in figures.items()})
    seconds = sum(_finite(line.get(key) for line in lines for key in ("time/rollout_s", "time/update_s")))
    skipped = sum(int(line.get("skipped") or 0) for line in lines)
    summary = (
        f"{len(lines)} steps in {seconds / 3600:.2f} h of rollouts and updates, {seconds / len(lines):.3g} s a step"
    )
    if skipped:
        summary += f"; {skipped} updates were not finite and were skipped"
    return {"window": window, "summary": summary, "rows": rows}


def evaluation_tables(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table a case set: its first and last evaluation in every mode, then the five constant answers.

    Args:
        records: of ``eval.json``. An interval that a record brings along (``intervals``: rate → [low, high]) is shown;
            where it brings none, `wilson`'s is.
    """
    tables = []
    for cases in dict.fromkeys(record["cases"] for record in records):
        members = [record for record in records if record["cases"] == cases]
        columns = [title for title, key in RATES.items() if all(_tells(record, key) for record in members)]
        rows, rules = [], []
        for mode in dict.fromkeys(record["thinking"] for record in members):
            span = sorted((r for r in members if r["thinking"] == mode), key=lambda record: record["step"])
            for record in span if len(span) == 1 else (span[0], span[-1]):
                who = f"step {record['step']}" if record["step"] else "before training"
                cells = [_share(record, RATES[column]) for column in columns]
                rows.append({"who": who, "thinking": mode, "cells": cells})
            rules += _rule_rows(mode, span[0], span[-1])
        rows += _constants(members[0], columns)
        counts = {"n": members[0]["n"], "high_acuity_n": members[0].get("high_acuity_n")}
        tables.append({"cases": cases, **counts, "columns": columns, "rows": rows, "rules": rules})
    return tables


def _tells(record: Mapping[str, Any], key: str) -> bool:
    """A record without a rate's denominator is from before the rate was a share of that, and is not shown."""
    return key in record and DENOMINATORS.get(key, "n") in record


def _share(record: Mapping[str, Any], key: str) -> str:
    rate, n = record[key], record[DENOMINATORS.get(key, "n")]
    if rate is None or not n:
        return "–"
    low, high = (record.get("intervals") or {}).get(key) or wilson(min(n, round(rate * n)), n)
    return f"{100 * rate:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _rule_rows(mode: str, first: Mapping[str, Any], last: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for rule, after in (last.get("by_rule") or {}).items():
        if after["n"]:
            before = (first.get("by_rule") or {}).get(rule) or {}
            shares = ("–" if part.get("exact") is None else f"{100 * part['exact']:.1f} %" for part in (before, after))
            rows.append(
                {"rule": rule, "thinking": mode, "n": after["n"]} | dict(zip(("before", "after"), shares, strict=True))
            )
    return rows


def _constants(record: Mapping[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    """What always answering one level would score on the same cases, from the rows of the confusion matrix."""
    if "confusion" not in record:
        return []
    always = baselines([int(level) for level, row in record["confusion"].items() for _ in range(sum(row))])
    rows = []
    for k in range(1, 6):
        shares = [None if RATES[c] == "no_parse" else always[f"always_{k}"].get(RATES[c]) for c in columns]
        cells = ["–" if share is None else f"{100 * share:.1f} %" for share in shares]
        rows.append({"who": f"always {k}", "thinking": "–", "cells": cells})
    return rows


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_value(v)}" for key, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    if value is None or value == "":
        return "none"
    return _shown(value) if isinstance(value, str) else json.dumps(value)


def _shown(name: str) -> str:
    """A name or path without the folders of the machine it was used on."""
    path = Path(name)
    return path.name if path.is_absolute() or name.startswith("~") else name


def _made_with(record: Mapping[str, Any]) -> str:
    versions = record.get("versions") or {}
    commit = f" at commit {record['commit'][:12]}" if record.get("commit") else ""
    return f"grpo-v49{commit}" + "".join(f", {name} {version}" for name, version in versions.items() if version)


def _finite(values: Iterable[object]) -> list[float]:
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        check_contents(path.parent)
        found = read_json(path)
    except Unreadable as error:
        raise UserError(f"{path}: cannot be read: {str(error).removeprefix('cannot be read: ')}") from None
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise UserError(f"{path}: not the config.json of a run: expected an object with the key config")
    return found


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not is_regular(path):
        return []
    lines, number = [], 0
    try:
        for number, line in enumerate(raw_lines(path), 1):
            lines.append(parse_json(line))
            if not isinstance(lines[-1], dict):
                raise UserError(f"{path}:{number}: expected one object a line, got a {type(lines[-1]).__name__}")
    except Unreadable as error:
        raise UserError(f"{path}:{number}: {error}") from None
    return lines


def _template() -> str:
    return files("grpo.report").joinpath("model_card.md.jinja").read_text(encoding="utf-8")


def _environment() -> Environment:
    """Every value is escaped unless a filter made it `Ready`; a name that the template lacks is an error."""
    environment = Environment(
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Ready) else escape(value),
    )
    environment.filters["python"] = lambda value: Ready(repr(str(value)).replace("`", r"\x60"))
    environment.filters["json"] = lambda value: Ready(json.dumps(str(value)))
    return environment
