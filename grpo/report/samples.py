"""Completions from the ledger for reading: case and text in pieces, and what each token did to the loss."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from grpo.config import resolve_path
from grpo.inspection.run_reader import RunRecord
from grpo.metrics import token_slices
from grpo.report.number_format import NOTHING, plain, signed
from grpo.run.ledger import LedgerStep, read_step, recorded_steps
from grpo.runtime.errors import UserError
from grpo.token_budget import finish_reason
from grpo.types import Completion
from rewards import Score

STOP_CAUSES = {"end": "end token", "budget": "cut by the budget", "other": "stopped otherwise"}
TEXT_REMARKS = {
    "redacted": "The ledger was written without texts (ledger.text = redacted): tokens are drawn as dots.",
    "off": "The ledger was written without texts and case ids (ledger.text = off): tokens are drawn as dots.",
}
DEPTHS = (1 / 32, 1 / 8, 1 / 4, 1 / 2)
"""Fractions of the largest value shown from which a token's colour is one step deeper; below the first it has none."""
FIELDS = ("token", "log-prob", "loss", "KL", "entropy", "ratio")
"""Fields of a token's tooltip, in order. An arrow after the ratio is the side on which it was clipped."""
TOKEN_CLASSES = {"loss": "l", "kl": "k", "entropy": "e", "surprise": "s", "ratio": "r"}
"""Shading → first letter of its CSS class; upper case for negative values."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a completion: at most one token, entirely inside or outside the parsed answer."""

    text: str
    classes: str
    in_answer: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a group, or several with the same tokens and reward."""

    numbers: tuple[int, ...]
    predicted: str
    correct: bool
    reason: str
    reward: str
    advantage: str
    stop: str
    tokens: int
    components: tuple[tuple[str, str, str], ...]
    """(component, reward, part of the advantage)."""
    fired: str
    """Rules whose trigger and conditions matched; stacking may leave them without a value."""
    pieces: tuple[Piece, ...]
    tooltips: str
    """The tooltip of each piece's token, separated by "|"."""


@dataclass(frozen=True, slots=True)
class GroupSample:
    """One group: the case in (text, fired rules) pieces, and its completions from best to worst."""

    step: int
    case: str
    gold: int
    thinking: bool
    std: str
    text: tuple[tuple[str, str], ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Samples:
    """What the page shows of a ledger."""

    run: str
    groups: tuple[GroupSample, ...]
    shadings: tuple[str, ...]
    """What tokens can be coloured by."""
    remarks: tuple[str, ...]


def sample_run(run: RunRecord, *, groups: int, text: bool) -> Samples:
    """Select the groups with the largest reward std of the first, the middle and the last recorded step.

    Args:
        groups: number of groups per step.
        text: if False, omit every case, completion, token and case id, and keep the numbers.

    A ledger that is missing, unreadable or without texts gives a remark.
    """
    if groups == 0:
        return Samples(run.name, (), (), ())
    folder = run.path / "ledger"
    try:
        steps = recorded_steps(folder)
        ends_and_middle = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])) if steps else ()
        entries = [read_step(folder, step) for step in ends_and_middle]
    except UserError as error:
        return Samples(run.name, (), (), (f"No completions to show: {error}.",))
    if not entries:
        return Samples(run.name, (), (), ("The ledger contains no step yet.",))
    remarks = [
        f"Step {entry.step.number} of the ledger was changed after it was written: {', '.join(entry.modified_files)}."
        for entry in entries
        if entry.modified_files
    ]
    tokenizer, reason = None, ""
    if not text:
        remarks.append("Texts and case ids were omitted from this page with --no-text.")
    elif entries[0].text == "full":
        tokenizer, reason = load_tokenizer(run.config.model.name)
        remarks += [reason] if reason else []
    else:
        remarks.append(TEXT_REMARKS[entries[0].text])
    largest = largest_values(entries)
    budget = run.config.rollout.max_new_tokens
    shown = tuple(
        _group(entry, b, largest, tokenizer, budget, text=text) for entry in entries for b in _widest(entry, groups)
    )
    samples = [sample for group in shown for sample in group.samples]
    uncolored = sum(not any(sample.tooltips.split("|")) for sample in samples)
    if tokenizer and uncolored:
        remarks.append(f"{uncolored} completions are not coloured: their ids do not decode to the recorded text.")
    colored = any(piece.classes for sample in samples for piece in sample.pieces)
    shadings = tuple(name for name, value in largest.items() if value > 0)
    return Samples(run.name, shown, shadings if colored else (), tuple(remarks))


def _widest(entry: LedgerStep, groups: int) -> list[int]:
    """Return the groups with the largest reward std; after the first, only those whose rewards differ."""
    order = np.argsort(-entry.rewards.std(axis=1), kind="stable")[:groups].tolist()
    return [b for i, b in enumerate(order) if i == 0 or np.ptp(entry.rewards[b]) > 0]


def _group(
    entry: LedgerStep, b: int, largest: Mapping[str, float], tokenizer: Tokenizer | None, budget: int, *, text: bool
) -> GroupSample:
    group, scores = entry.step.groups[b], entry.step.scores[b]
    case, show_text = group.prompt.case, text and entry.text == "full"
    identical: dict[tuple[object, ...], list[int]] = {}
    for g in sorted(range(len(group.completions)), key=lambda g: -entry.advantages[b][g]):
        key = group.completions[g].ids if entry.text == "full" else g
        identical.setdefault((key, scores[g].total), []).append(g)
    return GroupSample(
        step=entry.step.number,
        case=case.id if text and case.id else f"group {b + 1}",
        gold=case.gold_level,
        thinking=group.prompt.thinking,
        std=f"{entry.rewards[b].std(ddof=1):.2f}",
        text=tuple(case_pieces(case.text, scores)) if show_text else (),
        samples=tuple(
            _sample(entry, b, members, largest, tokenizer, budget, show_text=show_text)
            for members in identical.values()
        ),
    )


def _sample(
    entry: LedgerStep,
    b: int,
    members: Sequence[int],
    largest: Mapping[str, float],
    tokenizer: Tokenizer | None,
    budget: int,
    *,
    show_text: bool,
) -> Sample:
    g, group = members[0], entry.step.groups[b]
    completion, score = group.completions[g], entry.step.scores[b][g]
    level = score.answer.level
    row = sum(len(other.completions) for other in entry.step.groups[:b]) + g
    tokens = token_slices([len(c.ids) for other in entry.step.groups for c in other.completions])[row]
    values = {name: column[tokens] for name, column in shadings(entry).items()}
    classes = [token_classes(values, token, largest) for token in range(len(completion.ids))]
    pieces = list(completion_pieces(completion, score, classes, tokenizer, show_text=show_text))
    parts = ((name, value, float(entry.shares[name][b][g])) for name, value in score.parts.items())
    return Sample(
        numbers=tuple(member + 1 for member in members),
        predicted=f"ESI {level}" if level else "no parse",
        correct=level == group.prompt.case.gold_level,
        reason=score.answer.reason,
        reward=signed(score.total),
        advantage=signed(float(entry.advantages[b][g])),
        stop=STOP_CAUSES[finish_reason(completion, max(budget, len(completion.ids)))],
        tokens=len(completion.ids),
        components=tuple((name, signed(value), signed(part)) for name, value, part in parts if value or part),
        fired=", ".join(rule.rule for rule in score.fired),
        pieces=tuple(piece for piece, _ in pieces),
        tooltips="|".join("" if token is None else tooltip(entry, tokens.start + token, token) for _, token in pieces),
    )


def shadings(entry: LedgerStep) -> dict[str, np.ndarray]:
    """Return the [M] values of each shading: of the first inner epoch, and the log ratio of the last."""
    account, tokens = entry.account, entry.step.logprobs
    columns: dict[str, Tensor] = {"loss": account.loss[0], "entropy": tokens.entropy, "surprise": -tokens.logprobs[0]}
    if account.kl is not None:
        columns["kl"] = account.kl[0]
    if len(account.ratio) > 1:
        columns["ratio"] = account.ratio[-1].log()
    return {name: column.double().numpy() for name, column in columns.items()}


def largest_values(entries: Sequence[LedgerStep]) -> dict[str, float]:
    """Return the largest finite |value| of each shading over all entries, 0 for a shading without values."""
    largest = dict.fromkeys(TOKEN_CLASSES, 0.0)
    for entry in entries:
        for name, values in shadings(entry).items():
            largest[name] = max(largest[name], float(np.abs(values[np.isfinite(values)]).max(initial=0.0)))
    return largest


def token_classes(values: Mapping[str, np.ndarray], token: int, largest: Mapping[str, float]) -> str:
    """Return the CSS classes of one token, for example "l2 k1 E4"."""
    classes = []
    for name, column in values.items():
        value, letter = float(column[token]), TOKEN_CLASSES[name]
        if largest[name] > 0 and math.isfinite(value):
            depth = sum(abs(value) / largest[name] >= edge for edge in DEPTHS)
            classes += [f"{letter if value > 0 else letter.upper()}{depth}"] if depth else []
    return " ".join(classes)


def tooltip(entry: LedgerStep, index: int, token: int) -> str:
    """Return the `FIELDS` of a token, separated by spaces.

    Args:
        index: position among all tokens of the step.
        token: position in its completion.
    """
    account, tokens = entry.account, entry.step.logprobs
    arrow = {-1: "↓", 1: "↑"}.get(int(account.clip_side[-1][index]), "")
    fields = (
        str(token + 1),
        plain(float(tokens.logprobs[0][index])),
        plain(float(account.loss[0][index])),
        NOTHING if account.kl is None else plain(float(account.kl[0][index])),
        plain(float(tokens.entropy[index])),
        f"{float(account.ratio[-1][index]):.4g}{arrow}",
    )
    return " ".join(fields)


def case_pieces(text: str, scores: Sequence[Score]) -> Iterator[tuple[str, str]]:
    """Split the case into pieces, each with the rules whose trigger it contains ("" for none)."""
    spans = {(fired.rule, fired.span) for score in scores for fired in score.fired if fired.span}
    edges = sorted({0, len(text), *(min(max(edge, 0), len(text)) for _, span in spans for edge in span)})
    for start, stop in pairwise(edges):
        yield text[start:stop], ", ".join(sorted({rule for rule, (a, z) in spans if a <= start < z}))


def completion_pieces(
    completion: Completion, score: Score, classes: Sequence[str], tokenizer: Tokenizer | None, *, show_text: bool
) -> Iterator[tuple[Piece, int | None]]:
    """Split a completion at tokens and at the ends of the parsed answer; yield each piece with its token's index."""
    if not show_text:
        yield from ((Piece("·", token_class, False), token) for token, token_class in enumerate(classes))
        return
    answer = range(*(score.answer.span or (0, 0)))
    texts = token_texts(tokenizer, completion) if tokenizer else None
    start = 0
    for token, text in enumerate(texts or [completion.text]):
        stop = start + len(text)
        cuts = sorted({start, stop, *(edge for edge in (answer.start, answer.stop) if start < edge < stop)})
        for left, right in pairwise(cuts):
            piece = Piece(text[left - start : right - start], classes[token] if texts else "", left in answer)
            yield piece, token if texts else None
        start = stop


def token_texts(tokenizer: Tokenizer, completion: Completion) -> list[str] | None:
    """Return the text that each token adds, the end token's included; None if they do not add up to the recorded text.

    A character of several tokens belongs to the last of them.
    """
    texts: list[str] = []
    ids, begin, seen = list(completion.ids), 0, 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[begin:seen], skip_special_tokens=False)
        after = tokenizer.decode(ids[begin:end], skip_special_tokens=False)
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
        else:
            texts.append(after[len(before) :])
            begin, seen = seen, end
    decoded = "".join(texts[:-1] if completion.finished else texts)
    return texts if decoded == completion.text else None


def load_tokenizer(name: str) -> tuple[Tokenizer | None, str]:
    """Load a base model's tokenizer from local files; else return None and the reason. Nothing is downloaded."""
    folder = resolve_path(name)
    file = folder / "tokenizer.json" if folder.is_dir() else _cached_tokenizer(name)
    if file is None or not file.is_file():
        return None, f"Tokens are not coloured: the tokenizer of {name} is not on this machine."
    try:
        return Tokenizer.from_file(str(file)), ""
    except Exception as error:  # the library raises bare exceptions
        return None, f"Tokens are not coloured: {file.name} of {name} cannot be read ({type(error).__name__})."


def _cached_tokenizer(name: str) -> Path | None:
    """Return ``tokenizer.json`` of a hub id from the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        path = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None
