"""Format the records of `grpo.inspection.step_records` as lines for a terminal, which fit its width and contain no
control characters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpo.runtime.terminal import display_width, escape_control, pad_or_truncate, wrap

JsonObject = dict[str, Any]
Columns = Mapping[str, tuple[str, str]]
"""Title → key of the record, format; columns without a format are aligned left."""

HEADLINE = ("reward/mean", "completions/clipped_ratio", "completions/mean_length", "entropy", "loss", "grad_norm")
"""Metrics above the table of a step."""
GROUP_COLUMNS: Columns = {
    "#": ("group", "d"),
    "case": ("case", ""),
    "gold": ("gold", "d"),
    "think": ("thinking", ""),
    "mean": ("reward_mean", "+.2f"),
    "std": ("reward_std", ".2f"),
    "equal": ("zero_variance", ""),
    "predicted": ("predicted", ""),
    "stopped": ("stopped", ""),
}
COMPONENT_COLUMNS: Columns = {
    "component": ("name", ""),
    "reward": ("reward", "+.3f"),
    "advantage": ("advantage", "+.3f"),
}
TOKEN_COLUMNS: Columns = {
    "#": ("position", "d"),
    "token": ("token", ""),
    "logprob": ("logprob", "z.3f"),
    "ref": ("ref_logprob", "z.3f"),
    "ratio": ("ratio", ".3f"),
    "KL": ("kl", "z.4f"),
    "clip": ("clip", ""),
    "loss": ("loss", ".2e"),
}


def step_lines(record: JsonObject, width: int) -> Iterator[str]:
    """Format a step as a table of its groups."""
    yield from wrap(f"run {record['run']}, step {record['step']} of {record['steps']}", width)
    headline = (f"{name} {_cell(record['metrics'].get(name), '.4g')}" for name in HEADLINE)
    yield from wrap(", ".join(headline), width)
    rows = [
        group
        | {
            "predicted": "".join(str(level or "–") for level in group["predicted"]),
            "stopped": "".join(cause[0] for cause in group["stopped"]),
        }
        for group in record["groups"]
    ]
    yield from table(rows, GROUP_COLUMNS, width)
    for group in record["dropped"]:
        size = f"replaced: {group['case'] or '—'}, {group['completions']} completions, {group['tokens']} tokens"
        rewards = ", ".join(f"{reward:+.2f}" for reward in dict.fromkeys(group["rewards"]))
        yield from wrap(f"{size}, rewards {rewards}", width)
    yield from wrap("equal: no variance, no advantage; stopped: e end token, b token budget, o other", width)


def group_lines(record: JsonObject, width: int) -> Iterator[str]:
    """Format a group: its case, then its completions, each with the table of its tokens if the record has one."""
    thinking = "thinking" if record["thinking"] else "not thinking"
    tags = f", tags {', '.join(record['tags'])}" if record["tags"] else ""
    case = f"#{record['group']}" if record["case"] is None else record["case"]
    yield from wrap(f"case {case}, gold ESI {record['gold']}, {thinking}{tags}", width)
    uniform = ": no variance, so no advantage" if record["zero_variance"] else ""
    mean, std = _cell(record["reward_mean"], "+.3f"), _cell(record["reward_std"], ".3f")
    yield from wrap(f"reward {mean} ± {std} in the group{uniform}", width)
    yield from wrap("—" if record["case_text"] is None else record["case_text"], width)
    for member in record["completions"]:
        yield from member_lines(member, width)
        yield from token_lines(member.get("token_terms", ()), width)


def member_lines(member: JsonObject, width: int) -> Iterator[str]:
    """Format a completion: its reward and advantage by component, then its text."""
    yield ""
    reward, advantage = _cell(member["reward"], "+.3f"), _cell(member["advantage"], "+.3f")
    yield from wrap(f"member {member['member']}: reward {reward}, advantage {advantage}", width)
    parts = [{"name": name} | part for name, part in member["components"].items()]
    yield from table([part for part in parts if part["reward"] or part["advantage"]], COMPONENT_COLUMNS, width)
    level = "no level" if member["predicted"] is None else f"ESI {member['predicted']}"
    items = [
        ("stopped", f"{member['stopped']}, {member['tokens']} tokens"),
        ("answer", f"{level}, {member['reason'] or '—'}{_quoted(member['answer'])}"),
    ]
    if member["timed_out"]:
        items.append(("timeout", "a pattern timed out: the lowest reward"))
    if member["fired"] is None:
        items.append(("fired", "—"))
    for fired in member["fired"] or []:
        items.append(("fired", f"{fired['rule']} {_cell(fired['value'], '+.3f')}{_quoted(fired['match'])}"))
    for name, text in items:
        yield from wrap(f"{name:<8} {text}", width)
    yield "─" * width
    yield from wrap("—" if member["text"] is None else member["text"], width)


def token_lines(tokens: Sequence[JsonObject], width: int) -> Iterator[str]:
    """Format a table of a completion's tokens for each inner epoch. The outer spaces of a token are visible."""
    epochs = max((token["epoch"] for token in tokens), default=0)
    for epoch in range(1, epochs + 1):
        rows = [token | {"token": _token(token)} for token in tokens if token["epoch"] == epoch]
        loss = math.fsum(token["loss"] for token in rows if token["loss"] is not None)
        yield ""
        yield f"inner epoch {epoch} of {epochs}, sum of loss {loss:.3e}"
        yield from table(rows, TOKEN_COLUMNS, width)


def table(rows: Sequence[JsonObject], columns: Columns, width: int) -> Iterator[str]:
    """Yield the titles and one line per row. If the lines do not fit, the widest column is truncated.

    >>> for line in table([{"id": "c1", "mean": 0.5}], {"case": ("id", ""), "reward": ("mean", "+.2f")}, 80):
    ...     print(line)
    case reward
    c1    +0.50
    """
    keys = columns.values()
    lines = [[*columns], *([escape_control(_cell(row[key], form)) for key, form in keys] for row in rows)]
    widths = [max(map(display_width, cells)) for cells in zip(*lines, strict=True)]
    widest = widths.index(max(widths))
    widths[widest] = max(4, min(widths[widest], width + 1 - sum(size + 1 for size in widths) + widths[widest]))
    for line in lines:
        cells = (
            f"{cell:>{size}}" if form else pad_or_truncate(cell, size)
            for cell, size, (_, form) in zip(line, widths, keys, strict=True)
        )
        yield pad_or_truncate(" ".join(cells), width).rstrip()


def _token(record: JsonObject) -> str | None:
    """Return the text of a token, its outer spaces visible, or its id."""
    text: str | None = record["token"]
    if text is None:
        return None if record["id"] is None else f"#{record['id']}"
    return text.replace(" ", "·") if text != text.strip() else text


def _quoted(match: JsonObject | None) -> str:
    if not match:
        return ""
    begin, end = match["span"]
    return f": characters {begin}-{end}" if match["text"] is None else f': "{match["text"]}"'


def _cell(value: Any, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return "—" if value is None else format(value, form)
