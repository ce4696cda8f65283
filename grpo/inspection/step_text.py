"""Records of `grpo inspect` as lines for a terminal: every line fits the width, nothing in it is obeyed."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from grpo.runtime.terminal import STYLED, columns, fit, visible, wrap

Record = dict[str, Any]
Paint = Callable[[str, str], str]
"""(text, one of `grpo.runtime.terminal.STYLES` or "") → the text in that style."""

NARROW_COLUMN = 38
"""A completion beside others gets at least so many columns."""
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
"""Head → width, key of the record, format."""
RARELY_MISSED = ("sampler", "entropy", "weight", "old")
"""Columns that a screen goes without, the first ones first, until the others fit."""
TOKEN_NAME = 8
"""Columns that a token's own text gets at the least."""
HEADLINE = ("reward/mean", "completions/clipped_ratio", "completions/mean_length", "entropy", "loss", "grad_norm")
"""Metrics above a step's table."""
MARKS = {"end": "e", "budget": "b", "other": "o"}


def step_lines(record: Record, width: int, paint: Paint) -> Iterator[str]:
    """A step as a table of its groups."""
    yield from wrap(f"run {record['run']}, step {record['step']} of {record['steps']}", width)
    yield from wrap(", ".join(f"{name} {_number(record['metrics'].get(name))}" for name in HEADLINE), width)
    group_size = max(len(group["predicted"]) for group in record["groups"])
    # a mark a completion, or, where those do not fit, counts
    marked = group_size <= 16 and 40 + max(9, group_size) + max(7, group_size) <= width
    answers, stops = (max(9, group_size), max(7, group_size)) if marked else (12, 8)
    name = min(32, width - 32 - answers - stops)
    heads = f"{'gold':>4} {'think':>5} {'mean':>7} {'std':>6}  {fit('predicted', answers)}  {fit('stopped', stops)}"
    yield paint(f"  {fit('case', name)} {heads}".rstrip(), "bold")
    for group in record["groups"]:
        levels = [str(level or "–") for level in group["predicted"]]
        marks = [MARKS[stop] for stop in group["stopped"]]
        shown = ("".join(levels), "".join(marks)) if marked else (_counts(levels), _counts(marks))
        line = (
            f"{'=' if group['zero_variance'] else ' '} {fit(visible(_case(group)), name)} {group['gold']:>4} "
            f"{'on' if group['thinking'] else 'off':>5} {_short(group['reward_mean'], '+'):>7} "
            f"{_short(group['reward_std'], ''):>6}  {fit(shown[0], answers)}  {fit(shown[1], stops)}"
        )
        yield paint(line.rstrip(), "yellow" if group["zero_variance"] else "")
    for one in record["dropped"]:
        what = f"left out   {one['case'] or '—'}: {one['completions']} completions, {one['tokens']} tokens, "
        rewards = [f"{reward:+.2f}" for reward in dict.fromkeys(one["rewards"])]
        yield from wrap(f"{what}{'all ' * (len(rewards) == 1)}{', '.join(rewards)}", width)
    yield from _note("= no variance, no advantage; stopped: e end token, b token budget, o other", width, paint)


def group_lines(record: Record, width: int, paint: Paint) -> Iterator[str]:
    """A case, then its completions side by side as far as they fit."""
    yield from case_lines(record, width, paint)
    beside = max(1, (width + 2) // (NARROW_COLUMN + 2))
    column = (width + 2) // beside - 2
    blocks = [list(member_lines(member, column, paint)) for member in record["completions"]]
    for start in range(0, len(blocks), beside):
        yield ""
        yield from _side_by_side(blocks[start : start + beside], column)


def case_lines(record: Record, width: int, paint: Paint) -> Iterator[str]:
    """What the group answers to, and how it fared as a whole."""
    thinking = "thinking" if record["thinking"] else "not thinking"
    tags = f", tags {', '.join(record['tags'])}" if record["tags"] else ""
    title = f"case {_case(record)}, gold ESI {record['gold']}, {thinking}{tags}"
    yield from (paint(line, "bold") for line in wrap(title, width))
    equal = ": no variance, so no advantage" if record["zero_variance"] else ""
    yield from wrap(f"reward {record['reward_mean']:+.3f} ± {record['reward_std']:.3f} within the group{equal}", width)
    yield from wrap(record["case_text"] if record["case_text"] is not None else "—", width)


def member_lines(member: Record, width: int, paint: Paint) -> Iterator[str]:
    """One completion, its account first."""
    reward, advantage = member["reward"], member["advantage"]
    title = fit(f"member {member['member']}", width - 18)
    yield paint(f"{title}{_signed(reward):>9}{_signed(advantage):>9}", _sign_style(advantage) or "bold")
    yield paint(f"{'':<{width - 18}}{'reward':>9}{'advant.':>9}", "dim")
    for name, part in member["components"].items():
        if part["reward"] or part["advantage"]:
            yield f"  {fit(visible(name), width - 20)}{_signed(part['reward']):>9}{_signed(part['advantage']):>9}"
    yield from _item("stopped", f"{member['stopped']}, {member['tokens']} tokens", width)
    level = "no level" if member["predicted"] is None else f"ESI {member['predicted']}"
    quote = f": {_quoted(member['answer'])}" if member["answer"] else ""
    yield from _item("answer", f"{level}, {member['reason'] or '—'}{quote}", width)
    if member["timed_out"]:
        yield from _item("timeout", "a trigger ran out of time: the floor", width)
    if member["fired"] is None:
        yield from _item("fired", "—", width)
    for one in member["fired"] or []:
        quote = f": {_quoted(one['match'])}" if one["match"] else ""
        yield from _item("fired", f"{one['rule']} {_signed(one['value'])}{quote}", width)
    yield paint("─" * width, "dim")
    yield from wrap(member["text"] if member["text"] is not None else "—", width)


def token_lines(tokens: Sequence[Record], width: int, paint: Paint) -> Iterator[str]:
    """A table of a completion's tokens for each inner epoch, with as many of `TOKEN_COLUMNS` as the width holds, and no
    wider than its longest token asks for."""
    shown = dict(TOKEN_COLUMNS)
    for missed in RARELY_MISSED:
        if 6 + TOKEN_NAME + sum(column[0] for column in shown.values()) > width:
            del shown[missed]
    room = width - 6 - sum(column[0] for column in shown.values())
    name = max(TOKEN_NAME, min(room, max(columns(_token(token)) for token in tokens)))
    width = name + width - room
    epochs = max(token["epoch"] for token in tokens)
    for epoch in range(1, epochs + 1):
        chosen = [token for token in tokens if token["epoch"] == epoch]
        yield ""
        if epochs > 1:
            yield paint(f"inner epoch {epoch} of {epochs}", "bold")
        heads = "".join(f"{head:>{column[0]}}" for head, column in shown.items())
        yield paint(f"{'#':>4} {fit('token', name)} {heads}", "bold")
        for token in chosen:
            cells = "".join(f"{_cell(token[key], form):>{size}}" for size, key, form in shown.values())
            line = f"{token['position']:>4} {fit(_token(token), name)} {cells}"
            yield paint(line.rstrip(), "yellow" if token["clip"] else _sign_style(-token["loss"]))
        total = f"sum of loss {math.fsum(token['loss'] for token in chosen):.3e}"
        yield f"{total:>{width}}"


def running_text(tokens: Sequence[Record], width: int, paint: Paint) -> Iterator[str]:
    """The completion as it reads, each token in the colour of what the first inner epoch's loss asks for: green to make
    it likelier, red to make it rarer, bold where that is more than half of the largest term."""
    largest = max(abs(token["loss"]) for token in tokens)
    line, used = "", 0
    for token in tokens:
        if token["epoch"] > 1:
            break
        style = _sign_style(-token["loss"])
        for i, piece in enumerate((token["token"] or "").split("\n")):
            if i:
                yield line
                line, used = "", 0
            for part in wrap(piece, width):
                if used + columns(part) > width:
                    yield line
                    line, used = "", 0
                shown = paint(part, style)
                line += paint(shown, "bold") if abs(token["loss"]) > largest / 2 else shown
                used += columns(part)
    yield line
    yield from _note("green: made likelier, red: made rarer, bold: more than half of the largest term", width, paint)


def _side_by_side(blocks: Sequence[Sequence[str]], column: int) -> Iterator[str]:
    """Blocks of lines as columns; styles take no room."""
    for row in range(max(map(len, blocks))):
        cells = [block[row] if row < len(block) else "" for block in blocks]
        padded = [cell + " " * (column - columns(STYLED.sub("", cell))) for cell in cells]
        yield "  ".join(padded).rstrip()


def _note(text: str, width: int, paint: Paint) -> Iterator[str]:
    return (paint(line, "dim") for line in wrap(text, width))


def _item(name: str, text: str, width: int) -> Iterator[str]:
    """``name  text``, further lines under the text."""
    for i, line in enumerate(wrap(text, width - 9)):
        yield f"{name if not i else '':<9}{line}"


def _quoted(match: Record) -> str:
    begin, end = match["span"]
    return f"characters {begin}-{end}" if match["text"] is None else f'"{match["text"]}"'


def _token(record: Record) -> str:
    if record["id"] is None:
        return "—"
    return f"#{record['id']}" if record["token"] is None else _spelled(record["token"])


def _spelled(token: str) -> str:
    """A token in a cell: blanks at its ends are part of it."""
    return visible(token).replace(" ", "·") if token != token.strip() else visible(token)


def _case(record: Record) -> str:
    return f"#{record['group']}" if record["case"] is None else record["case"]


def _counts(values: Iterable[str]) -> str:
    return " ".join(f"{value}×{count}" for value, count in sorted(Counter(values).items()))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "—"


def _cell(value: Any, form: str) -> str:
    return value or "" if form == "" else "—" if value is None else format(value, form)


def _short(value: float, sign: str) -> str:
    return format(value, f"{sign}.2f" if abs(value) < 100 else f"{sign}.0e")


def _signed(value: float) -> str:
    return f"{value:+.3f}" if value else "0"


def _sign_style(value: float) -> str:
    return "green" if value > 0 else "red" if value < 0 else ""
