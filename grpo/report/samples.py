"""Completions from the ledger, ready to be read: case and text in pieces, every token with what it did to the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from grpo.inspection.run_reader import RunRecord
from grpo.metrics import token_slices
from grpo.report.number_format import signed
from grpo.report.tokens import Piece, Scale, case_pieces, completion_pieces, load_tokenizer, shadings, told
from grpo.run.ledger import Entry, ledger_steps, read_step
from grpo.runtime.errors import UserError
from grpo.token_budget import stop_cause

GROUPS_A_STEP = 2
"""Groups shown of each of the first, the middle and the last recorded step."""
STOPS = {"end": "end token", "budget": "cut by the budget", "other": "stopped otherwise"}


@dataclass(frozen=True, slots=True)
class Part:
    """One component: its reward, and its part of the advantage."""

    name: str
    reward: str
    advantage: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion, or several of a group that are alike token for token."""

    members: str
    predicted: str
    right: bool
    reason: str
    reward: str
    advantage: str
    stop: str
    tokens: int
    parts: tuple[Part, ...]
    fired: str
    """Rules whose trigger and conditions held; stacking may leave them no value."""
    pieces: tuple[Piece, ...]
    told: str
    """The figures of each piece's token, separated by "|"."""


@dataclass(frozen=True, slots=True)
class GroupSample:
    """One group: the case in (text, fired rules) pieces, and its completions from best to worst."""

    step: int
    case: str
    gold: int
    thinking: bool
    spread: str
    text: tuple[tuple[str, str], ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Samples:
    """All that is shown of a ledger."""

    run: str
    groups: tuple[GroupSample, ...]
    shadings: tuple[str, ...]
    """What tokens can be coloured by."""
    remarks: tuple[str, ...]


def sample_run(run: RunRecord, *, groups: int, text: bool) -> Samples:
    """The groups with the widest spread of rewards, of the first, the middle and the last recorded step.

    Args:
        groups: of each step; 0 for none.
        text: False leaves out every case, completion, token and case id, and keeps the numbers.

    A ledger that is missing, unreadable or without texts is a remark.
    """
    folder = run.path / "ledger"
    try:
        steps = ledger_steps(folder) if groups else ()
        entries = [read_step(folder, step) for step in _ends_and_middle(steps)]
    except UserError as error:
        return Samples(run.name, (), (), (f"No completions to show: {error}.",))
    remarks = [
        f"Step {e.step.number} of the ledger is not what was written: {', '.join(e.changed)}."
        for e in entries
        if e.changed
    ]
    if not entries:
        return Samples(run.name, (), (), ("The ledger holds no step yet.",) if groups else ())
    tokenizer, why = load_tokenizer(run.config.model.name) if text and entries[0].text == "full" else (None, "")
    remarks += filter(None, [why, *_about_text(entries[0].text, text)])
    scale = Scale.of(entries)
    shown = tuple(
        _group(entry, b, scale, tokenizer, run, text=text) for entry in entries for b in _widest(entry, groups)
    )
    bare = sum(not any(sample.told.split("|")) for group in shown for sample in group.samples)
    if tokenizer and bare:
        remarks.append(f"{bare} completions are not coloured: their ids decode to another text than was recorded.")
    return Samples(run.name, shown, scale.names if any(_coloured(group) for group in shown) else (), tuple(remarks))


def _widest(entry: Entry, groups: int) -> list[int]:
    """The groups whose rewards differ most; past the first, only those whose rewards differ at all."""
    spread = np.ptp(entry.rewards, axis=1), entry.rewards.std(axis=1)
    order = np.argsort(-spread[1], kind="stable")[:groups].tolist()
    return [b for i, b in enumerate(order) if i == 0 or spread[0][b] > 0]


def _coloured(group: GroupSample) -> bool:
    return any(piece.classes for sample in group.samples for piece in sample.pieces)


def _ends_and_middle(steps: Sequence[int]) -> list[int]:
    return list(dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))) if steps else []


def _about_text(written: str, wanted: bool) -> list[str]:
    if not wanted:
        return ["Texts and case ids were left out of this page with --no-text."]
    told = {
        "redacted": "The ledger was written without texts (ledger.text = redacted): tokens are drawn as dots.",
        "off": "The ledger was written without texts and case ids (ledger.text = off): tokens are drawn as dots.",
    }
    return [told[written]] if written in told else []


def _group(
    entry: Entry, b: int, scale: Scale, tokenizer: Tokenizer | None, run: RunRecord, *, text: bool
) -> GroupSample:
    group, scores = entry.step.groups[b], entry.step.scores[b]
    case, said = group.prompt.case, text and entry.text == "full"
    advantage = entry.advantages[b]
    alike: dict[tuple[object, ...], list[int]] = {}
    for g, completion in enumerate(group.completions):
        same = (completion.ids, completion.text) if entry.text == "full" else (g,)
        alike.setdefault((same, scores[g].total), []).append(g)
    ordered = sorted(alike.values(), key=lambda members: (-advantage[members[0]], members))
    return GroupSample(
        step=entry.step.number,
        case=case.id if text and case.id else f"group {b + 1}",
        gold=case.esi,
        thinking=group.prompt.thinking,
        spread=f"{entry.rewards[b].std(ddof=1):.2f}",
        text=tuple(case_pieces(case.text, scores)) if said else (),
        samples=tuple(_sample(entry, b, members, scale, tokenizer, run, said=said) for members in ordered),
    )


def _sample(
    entry: Entry, b: int, members: list[int], scale: Scale, tokenizer: Tokenizer | None, run: RunRecord, *, said: bool
) -> Sample:
    group, g = entry.step.groups[b], members[0]
    completion, score = group.completions[g], entry.step.scores[b][g]
    row = sum(len(other.completions) for other in entry.step.groups[:b]) + g
    where = token_slices([len(c.ids) for other in entry.step.groups for c in other.completions])[row]
    values = {name: column[where] for name, column in shadings(entry).items()}
    pieces = list(completion_pieces(completion, score, values, scale, tokenizer, said=said))
    level = score.answer.level
    return Sample(
        members=_members(members),
        predicted=f"ESI {level}" if level else "no parse",
        right=level == group.prompt.case.esi,
        reason=score.answer.reason,
        reward=signed(score.total),
        advantage=signed(float(entry.advantages[b][g])),
        stop=STOPS[stop_cause(completion, max(run.config.rollout.max_new_tokens, len(completion.ids)))],
        tokens=len(completion.ids),
        parts=tuple(
            Part(name, signed(value), signed(float(entry.shares[name][b][g])))
            for name, value in score.parts.items()
            if value or float(entry.shares[name][b][g])
        ),
        fired=", ".join(fired.rule for fired in score.fired),
        pieces=tuple(piece for piece, _ in pieces),
        told="|".join(told(token, values, where, entry) if token is not None else "" for _, token in pieces),
    )


def _members(members: Sequence[int]) -> str:
    numbers = ", ".join(str(g + 1) for g in members)
    return f"Completion {numbers}" if len(members) == 1 else f"Completions {numbers} (alike)"
