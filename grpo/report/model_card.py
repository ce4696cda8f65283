"""The model card of a run, written from its records: config.json, reward.json, metrics.jsonl and eval.json.

The card contains no case, completion or case id. All values are escaped, so that no name or comment of a config can
become markup, and folders of the machine the run was made on are omitted.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from grpo.inspection.run_reader import Metrics, RunRecord, read_run
from grpo.policy.base_model import HUB_ID
from grpo.report.charts import NOTHING
from grpo.report.evaluation import RATES, evaluated_sets
from grpo.report.recipe import config_values, reward_values
from grpo.runtime.atomic_files import write_atomic

METRICS = (
    "reward/mean", "reward/std_group", "groups/zero_variance", "completions/clipped_ratio", "completions/no_parse",
    "completions/mean_length", "kl/k1", "kl/k2", "kl/k3", "kl/ratio_k3", "entropy", "grad_norm",
)  # fmt: skip
"""Rows of the training table, if the run logged them."""
MAX_CELL_CHARS = 400


class SafeMarkdown(str):
    """Code or YAML that must not be escaped again."""

    __slots__ = ()


def model_card(run_folder: Path, *, merged: bool = False) -> str:
    """Return the card in Markdown, a function of the run's records alone.

    Args:
        merged: describe full weights instead of an adapter.

    Raises:
        UserError: a record is missing or damaged.
    """
    run = read_run(run_folder)
    config, base = run.config, run.config.model.name
    values = {
        "merged": merged,
        "name": config.name,
        "base": without_folders(base).replace("embedded:", "grpo/tiny/"),
        "hub_base": bool(HUB_ID.fullmatch(base)),
        "embedded": base.removeprefix("embedded:") if base.startswith("embedded:") else "",
        "lora": config.lora,
        "reward_name": without_folders(config.reward.set),
        "about": run.reward_set.get("about"),
        "unsound": config.reward.unsound_reason,
        "columns": [heading for _, heading, _ in RATES],
        "evaluations": evaluated_sets(run),
        "training": training_table(run.metrics),
        "recipe": recipe_rows(run),
        "rewards": list(reward_values(run)),
        "made_with": _made_with(run),
        "system_prompt": config.cases.system_prompt,
        "max_new_tokens": config.evaluate.max_new_tokens,
    }
    template = files("grpo.report").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    return _environment().from_string(template).render(values)


def write_model_card(run_folder: Path, path: Path, *, merged: bool = False) -> Path:
    """Write the card of a run to ``path``, entirely or not at all, and return the path."""
    write_atomic(path, model_card(run_folder, merged=merged))
    return path


def escape(value: object) -> str:
    r"""Return a value as one line of Markdown text without any Markdown, table or HTML markup.

    Line breaks and invisible characters become blanks; at most `MAX_CELL_CHARS` characters remain.

    >>> print(escape("<b>x</b> | q_proj *now* http://a.b"))
    &#60;b&#62;x&#60;/b&#62; &#124; q_proj &#42;now&#42; http&#58;//a.b
    """
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(value))
    text = text if len(text) <= MAX_CELL_CHARS else text[: MAX_CELL_CHARS - 1] + "…"
    special = r"[\\`*\[\]|~$<>&@]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|:(?=//)|(?<=\bwww)\."
    return re.sub(special, lambda match: f"&#{ord(match[0])};", text, flags=re.IGNORECASE)


def recipe_rows(run: RunRecord) -> list[dict[str, str]]:
    """Return one row per config key: its value, grade and note."""
    rows = []
    for section, values in config_values(run, without_folders).items():
        for row in values if section else ():
            text = "see the code under Use" if row.key == "system_prompt" else row.value
            rows.append({"key": f"{section}.{row.key}", "value": text, "grade": row.grade, "note": row.note})
    return rows


def training_table(metrics: Sequence[Metrics]) -> dict[str, Any] | None:
    """Summarize the steps: means over the first and the last tenth (at least one step), minima and maxima.

    None without a step. Metrics that were not finite are omitted.
    """
    if not metrics:
        return None
    window, rows = max(1, len(metrics) // 10), []
    for metric in METRICS:
        if values := _known(metric, metrics):
            first, last = _known(metric, metrics[:window]), _known(metric, metrics[-window:])
            figures = {"first": _mean(first), "last": _mean(last), "least": min(values), "greatest": max(values)}
            rows.append({"metric": metric} | {k: NOTHING if v is None else f"{v:.4g}" for k, v in figures.items()})
    seconds = sum(_known("time/rollout_s", metrics) + _known("time/update_s", metrics))
    skipped = sum(int(row.get("skipped") or 0) for row in metrics)
    steps = len(metrics)
    summary = f"{steps} steps in {seconds / 3600:.2f} h of rollouts and updates, {seconds / steps:.3g} s per step"
    if skipped:
        summary += f"; {skipped} updates were not finite and were skipped"
    return {"window": window, "summary": summary, "rows": rows}


def without_folders(value: Any) -> Any:
    """Return a config value in which absolute paths are reduced to their last part.

    >>> without_folders(["/home/me/base", "Qwen/Qwen3.5-9B", 3])
    ['base', 'Qwen/Qwen3.5-9B', 3]
    """
    match value:
        case str():
            return Path(value).name if value.startswith("~") or Path(value).is_absolute() else value
        case Mapping():
            return {key: without_folders(inner) for key, inner in value.items()}
        case list() | tuple():
            return [without_folders(inner) for inner in value]
    return value


def _made_with(run: RunRecord) -> str:
    commit = f" at commit {run.commit[:12]}" if run.commit else ""
    return f"grpo-v49{commit}" + "".join(f", {name} {version}" for name, version in run.versions.items())


def _known(metric: str, rows: Sequence[Metrics]) -> list[float]:
    return [value for row in rows if (value := row.get(metric)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _environment() -> Environment:
    """Escape every value that is not `SafeMarkdown`; an undefined name is an error."""
    environment = Environment(
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, SafeMarkdown) else escape(value),
    )
    environment.filters["python"] = lambda value: SafeMarkdown(repr(str(value)).replace("`", r"\x60"))
    environment.filters["json"] = lambda value: SafeMarkdown(json.dumps(str(value)))
    return environment
