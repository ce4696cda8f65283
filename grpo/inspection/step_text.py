"""Format the records of `grpo.inspection.step_records` as lines for a terminal, which fit its width and contain no
control characters."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from grpo.runtime.terminal import STYLED, display_width, escape_control, pad_or_truncate, wrap

JsonObject = dict[str, Any]
Style = Callable[[str, str], str]
"""(text, one of `grpo.runtime.terminal.STYLES` or "") → the styled text."""

MIN_COMPLETION_WIDTH = 38
"""Columns of a completion beside others."""
TOKEN_COLUMNS = {
    "logprob": (9, "logprob", "z.3f"),
    "old": (8, "old_logprob", "z.3f"),
    "sampler": (8, "sampler_logprob", "z.3f"),
    "ref": (8, "ref_logprob", "z.3f"),
    "entropy": (8, "entropy", "z.3f"),
    "ratio": (7, "ratio", ".3f"),
    "KL": (7, "kl", "z.4f"),
    "clip": (5, "clip", ""),
    "weight": (9, "weight", ".2e"),
    "loss": (10, "loss", ".2e"),
}
"""Title → width, key of the record, format."""
OPTIONAL_COLUMNS = ("sampler", "entropy", "weight", "old")
"""Columns that are omitted, in this order, until the others fit."""
MIN_TOKEN_WIDTH = 8
HEADLINE = ("reward/mean", "completions/clipped_ratio", "completions/mean_length", "entropy", "loss", "grad_norm")
"""Metrics above the table of a step."""
STOP_MARKS = {"end": "e", "budget": "b", "other": "o"}


def step_lines(record: JsonObject, width: int, style: Style) -> Iterator[str]:
    """Format a step as a table of its groups."""
    yield from wrap(f"run {record['run']}, step {record['step']} of {record['steps']}", width)
    yield from wrap(", ".join(f"{name} {_metric(record['metrics'].get(name))}" for name in HEADLINE), width)
    group_size = max(len(group["predicted"]) for group in record["groups"])
    # one mark per completion, or counts if the marks do not fit
    marked = group_size <= 16 and 40 + max(9, group_size) + max(7, group_size) <= width
    widths = (max(9, group_size), max(7, group_size)) if marked else (12, 8)
    case_width = min(32, width - 32 - sum(widths))
    predicted, stopped = pad_or_truncate("predicted", widths[0]), pad_or_truncate("stopped", widths[1])
    titles = f"{'gold':>4} {'think':>5} {'mean':>7} {'std':>6}  {predicted}  {stopped}"
    yield style(f"  {pad_or_truncate('case', case_width)} {titles}".rstrip(), "bold")
    for group in record["groups"]:
        levels = [str(level or "–") for level in group["predicted"]]
        marks = [STOP_MARKS[cause] for cause in group["stopped"]]
        answers, stops = ("".join(levels), "".join(marks)) if marked else (_counts(levels), _counts(marks))
        case = pad_or_truncate(escape_control(_case(group)), case_width)
        answers, stops = pad_or_truncate(answers, widths[0]), pad_or_truncate(stops, widths[1])
        line = (
            f"{'=' if group['zero_variance'] else ' '} {case} {group['gold']:>4} "
            f"{'on' if group['thinking'] else 'off':>5} {_short(group['reward_mean'], '+'):>7} "
            f"{_short(group['reward_std'], ''):>6}  {answers}  {stops}"
        )
        yield style(line.rstrip(), "yellow" if group["zero_variance"] else "")
    for group in record["dropped"]:
        size = f"replaced   {group['case'] or '—'}: {group['completions']} completions, {group['tokens']} tokens, "
        rewards = [f"{reward:+.2f}" for reward in dict.fromkeys(group["rewards"])]
        yield from wrap(f"{size}{'all ' * (len(rewards) == 1)}{', '.join(rewards)}", width)
    yield from _note("= no variance, no advantage; stopped: e end token, b token budget, o other", width, style)


def group_lines(record: JsonObject, width: int, style: Style) -> Iterator[str]:
    """Format a case, then its completions, side by side as far as they fit."""
    yield from case_lines(record, width, style)
    beside = max(1, (width + 2) // (MIN_COMPLETION_WIDTH + 2))
    column = (width + 2) // beside - 2
    blocks = [list(member_lines(member, column, style)) for member in record["completions"]]
    for start in range(0, len(blocks), beside):
        yield ""
        yield from _side_by_side(blocks[start : start + beside], column)


def case_lines(record: JsonObject, width: int, style: Style) -> Iterator[str]:
    """Format the case of a group and the rewards of the group as a whole."""
    thinking = "thinking" if record["thinking"] else "not thinking"
    tags = f", tags {', '.join(record['tags'])}" if record["tags"] else ""
    title = f"case {_case(record)}, gold ESI {record['gold']}, {thinking}{tags}"
    yield from (style(line, "bold") for line in wrap(title, width))
    uniform = ": no variance, so no advantage" if record["zero_variance"] else ""
    yield from wrap(f"reward {record['reward_mean']:+.3f} ± {record['reward_std']:.3f} in the group{uniform}", width)
    yield from wrap("—" if record["case_text"] is None else record["case_text"], width)


def member_lines(member: JsonObject, width: int, style: Style) -> Iterator[str]:
    """Format a completion: its reward and advantage by component, then its text."""
    reward, advantage = member["reward"], member["advantage"]
    title = pad_or_truncate(f"member {member['member']}", width - 18)
    yield style(f"{title}{_signed(reward):>9}{_signed(advantage):>9}", _sign_style(advantage) or "bold")
    yield style(f"{'':<{width - 18}}{'reward':>9}{'advant.':>9}", "dim")
    for name, part in member["components"].items():
        if part["reward"] or part["advantage"]:
            title = pad_or_truncate(escape_control(name), width - 20)
            yield f"  {title}{_signed(part['reward']):>9}{_signed(part['advantage']):>9}"
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
        items.append(("fired", f"{fired['rule']} {_signed(fired['value'])}{_quoted(fired['match'])}"))
    for name, text in items:
        for i, line in enumerate(wrap(text, width - 9)):
            yield f"{'' if i else name:<9}{line}"
    yield style("─" * width, "dim")
    yield from wrap("—" if member["text"] is None else member["text"], width)


def token_lines(tokens: Sequence[JsonObject], width: int, style: Style) -> Iterator[str]:
    """Format a table of a completion's tokens for each inner epoch, with as many of `TOKEN_COLUMNS` as fit and no wider
    than its longest token requires."""
    shown = dict(TOKEN_COLUMNS)
    for title in OPTIONAL_COLUMNS:
        if 6 + MIN_TOKEN_WIDTH + sum(column[0] for column in shown.values()) > width:
            del shown[title]
    available = width - 6 - sum(column[0] for column in shown.values())
    token_width = max(MIN_TOKEN_WIDTH, min(available, max(display_width(_token(token)) for token in tokens)))
    epochs = max(token["epoch"] for token in tokens)
    for epoch in range(1, epochs + 1):
        rows = [token for token in tokens if token["epoch"] == epoch]
        yield ""
        if epochs > 1:
            yield style(f"inner epoch {epoch} of {epochs}", "bold")
        titles = "".join(f"{title:>{column[0]}}" for title, column in shown.items())
        yield style(f"{'#':>4} {pad_or_truncate('token', token_width)} {titles}", "bold")
        for token in rows:
            cells = "".join(f"{_cell(token[key], form):>{size}}" for size, key, form in shown.values())
            line = f"{token['position']:>4} {pad_or_truncate(_token(token), token_width)} {cells}"
            yield style(line.rstrip(), "yellow" if token["clip"] else _sign_style(-token["loss"]))
        total = f"sum of loss {math.fsum(token['loss'] for token in rows):.3e}"
        yield f"{total:>{token_width + width - available}}"


def running_text(tokens: Sequence[JsonObject], width: int, style: Style) -> Iterator[str]:
    """Format the completion as running text. Each token has the color of its loss term in the first inner epoch: green
    if it is made likelier, red if less likely, bold if the term exceeds half of the largest."""
    largest = max(abs(token["loss"]) for token in tokens)
    line, used = "", 0
    for token in tokens:
        if token["epoch"] > 1:
            break
        for i, piece in enumerate((token["token"] or "").split("\n")):
            if i:
                yield line
                line, used = "", 0
            for part in wrap(piece, width):
                if used + display_width(part) > width:
                    yield line
                    line, used = "", 0
                styled = style(part, _sign_style(-token["loss"]))
                line += style(styled, "bold") if abs(token["loss"]) > largest / 2 else styled
                used += display_width(part)
    yield line
    legend = "green: made likelier, red: made less likely, bold: more than half of the largest term"
    yield from _note(legend, width, style)


def _side_by_side(blocks: Sequence[Sequence[str]], column: int) -> Iterator[str]:
    for row in range(max(map(len, blocks))):
        cells = [block[row] if row < len(block) else "" for block in blocks]
        padded = [cell + " " * (column - display_width(STYLED.sub("", cell))) for cell in cells]
        yield "  ".join(padded).rstrip()


def _note(text: str, width: int, style: Style) -> Iterator[str]:
    return (style(line, "dim") for line in wrap(text, width))


def _quoted(match: JsonObject | None) -> str:
    if not match:
        return ""
    begin, end = match["span"]
    return f": characters {begin}-{end}" if match["text"] is None else f': "{match["text"]}"'


def _token(record: JsonObject) -> str:
    """Return the text of a token, its outer spaces visible, or its id."""
    if record["id"] is None:
        return "—"
    if record["token"] is None:
        return f"#{record['id']}"
    text = escape_control(record["token"])
    return text.replace(" ", "·") if record["token"] != record["token"].strip() else text


def _case(record: JsonObject) -> str:
    return f"#{record['group']}" if record["case"] is None else record["case"]


def _counts(values: Iterable[str]) -> str:
    return " ".join(f"{value}×{count}" for value, count in sorted(Counter(values).items()))


def _metric(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "—"


def _cell(value: Any, form: str) -> str:
    return value or "" if form == "" else "—" if value is None else format(value, form)


def _short(value: float, sign: str) -> str:
    return format(value, f"{sign}.2f" if abs(value) < 100 else f"{sign}.0e")


def _signed(value: float) -> str:
    return f"{value:+.3f}" if value else "0"


def _sign_style(value: float) -> str:
    return "green" if value > 0 else "red" if value < 0 else ""
