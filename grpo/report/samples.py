"""Completions from the ledger for reading: the case, and what each token of a completion did to the loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from grpo.config import resolve_path
from grpo.inspection.run_reader import RunRecord
from grpo.metrics import token_slices
from grpo.report.charts import number
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
"""Fractions of the largest |loss term| from which a token's colour is one step deeper; below the first it has none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a completion, or all of its text if the tokens are unknown."""

    text: str
    classes: str
    """CSS classes: "up1" … "up4" if the update makes the token likelier, "down1" … "down4" if less likely, and
    "answer" if the token is part of the parsed answer."""
    tooltip: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a group."""

    number: int
    predicted: str
    correct: bool
    reason: str
    reward: str
    advantage: str
    stop: str
    tokens: int
    components: list[tuple[str, str, str]]
    """(component, reward, part of the advantage)."""
    fired: str
    """Rules whose trigger and conditions matched; stacking may leave them without a value."""
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class GroupSample:
    """One group: the case in (text, fired rules) pieces, and its completions from best to worst."""

    step: int
    case: str
    gold: int
    thinking: bool
    std: str
    text: list[tuple[str, str]]
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Samples:
    """What the page shows of a ledger."""

    run: str
    groups: tuple[GroupSample, ...]
    remarks: tuple[str, ...]


def sample_run(run: RunRecord, *, groups: int, text: bool) -> Samples:
    """Select the groups with the largest reward std of the first, the middle and the last recorded step.

    Args:
        groups: number of groups per step.
        text: if False, omit every case, completion, token and case id, and keep the numbers.

    A ledger that is missing, unreadable or without texts gives a remark.
    """
    if groups == 0:
        return Samples(run.name, (), ())
    folder = run.path / "ledger"
    try:
        steps = recorded_steps(folder)
        ends_and_middle = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])) if steps else ()
        entries = [read_step(folder, step) for step in ends_and_middle]
    except UserError as error:
        return Samples(run.name, (), (f"No completions to show: {error}.",))
    if not entries:
        return Samples(run.name, (), ("The ledger contains no step yet.",))
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
    largest = max(float(entry.account.loss[0].abs().nan_to_num(0.0, 0.0).max()) for entry in entries)
    shown = tuple(
        _group(entry, b, largest, tokenizer, run.config.rollout.max_new_tokens, text=text)
        for entry in entries
        for b in _widest(entry, groups)
    )
    uncolored = sum(len(sample.pieces) != sample.tokens for group in shown for sample in group.samples)
    if tokenizer and uncolored:
        remarks.append(f"{uncolored} completions are not coloured: their ids do not decode to the recorded text.")
    return Samples(run.name, shown, tuple(remarks))


def _widest(entry: LedgerStep, groups: int) -> list[int]:
    """Return the groups with the largest reward std; after the first, only those whose rewards differ."""
    order = np.argsort(-entry.rewards.std(axis=1), kind="stable")[:groups].tolist()
    return [b for i, b in enumerate(order) if i == 0 or np.ptp(entry.rewards[b]) > 0]


def _group(
    entry: LedgerStep, b: int, largest: float, tokenizer: Tokenizer | None, budget: int, *, text: bool
) -> GroupSample:
    group, scores = entry.step.groups[b], entry.step.scores[b]
    case, show_text = group.prompt.case, text and entry.text == "full"
    lengths = [len(completion.ids) for other in entry.step.groups for completion in other.completions]
    first_row = sum(len(other.completions) for other in entry.step.groups[:b])
    slices = token_slices(lengths)[first_row : first_row + len(group.completions)]
    samples = []
    for g in sorted(range(len(group.completions)), key=lambda g: -entry.advantages[b][g]):
        completion, score, level = group.completions[g], scores[g], scores[g].answer.level
        parts = ((name, value, float(entry.shares[name][b][g])) for name, value in score.parts.items())
        texts = ["·"] * len(completion.ids)
        if show_text:
            texts = (token_texts(tokenizer, completion) if tokenizer else None) or [completion.text]
        sample = Sample(
            number=g + 1,
            predicted=f"ESI {level}" if level else "no parse",
            correct=level == case.gold_level,
            reason=score.answer.reason,
            reward=f"{score.total:+.2f}",
            advantage=f"{float(entry.advantages[b][g]):+.2f}",
            stop=STOP_CAUSES[finish_reason(completion, max(budget, len(completion.ids)))],
            tokens=len(completion.ids),
            components=[(name, f"{value:+.2f}", f"{part:+.2f}") for name, value, part in parts if value or part],
            fired=", ".join(rule.rule for rule in score.fired),
            pieces=list(_pieces(entry, texts, slices[g], score if show_text else None, largest)),
        )
        samples.append(sample)
    return GroupSample(
        step=entry.step.number,
        case=case.id if text and case.id else f"group {b + 1}",
        gold=case.gold_level,
        thinking=group.prompt.thinking,
        std=f"{entry.rewards[b].std(ddof=1):.2f}",
        text=list(case_pieces(case.text, scores)) if show_text else [],
        samples=samples,
    )


def _pieces(
    entry: LedgerStep, texts: Sequence[str], tokens: slice, score: Score | None, largest: float
) -> Iterator[Piece]:
    """Yield the pieces of the completion whose packed tokens are ``tokens``; without a score, no answer is marked."""
    if len(texts) != tokens.stop - tokens.start:
        yield Piece("".join(texts), "", "")
        return
    begin, end = (score.answer.span if score else None) or (0, 0)
    position = 0
    for index, text in zip(range(tokens.start, tokens.stop), texts, strict=True):
        loss = float(entry.account.loss[0][index])
        depth = sum(abs(loss) >= edge * largest > 0 for edge in DEPTHS)
        classes = [f"{'down' if loss > 0 else 'up'}{depth}"] if depth else []
        if position < end and position + len(text) > begin:
            classes.append("answer")
        yield Piece(text, " ".join(classes), _tooltip(entry, index))
        position += len(text)


def _tooltip(entry: LedgerStep, index: int) -> str:
    """Return the values of a packed token; an arrow after the ratio is the side on which it was clipped."""
    account, tokens = entry.account, entry.step.logprobs
    arrow = {-1: "↓", 1: "↑"}.get(int(account.clip_side[-1][index]), "")
    kl = None if account.kl is None else float(account.kl[0][index])
    return (
        f"log-prob {number(float(tokens.logprobs[0][index]))}, loss {number(float(account.loss[0][index]))}, "
        f"KL {number(kl)}, entropy {number(float(tokens.entropy[index]))}, "
        f"ratio {float(account.ratio[-1][index]):.4g}{arrow}"
    )


def case_pieces(text: str, scores: Sequence[Score]) -> Iterator[tuple[str, str]]:
    """Split the case into pieces, each with the rules whose trigger it contains ("" for none)."""
    spans = {(fired.rule, fired.span) for score in scores for fired in score.fired if fired.span}
    edges = sorted({0, len(text), *(min(max(edge, 0), len(text)) for _, span in spans for edge in span)})
    for start, stop in pairwise(edges):
        yield text[start:stop], ", ".join(sorted({rule for rule, (a, z) in spans if a <= start < z}))


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
    from huggingface_hub import try_to_load_from_cache

    folder = resolve_path(name)
    try:
        file = folder / "tokenizer.json" if folder.is_dir() else try_to_load_from_cache(name, "tokenizer.json")
        if not isinstance(file, str | Path) or not Path(file).is_file():
            return None, f"Tokens are not coloured: the tokenizer of {name} is not on this machine."
        return Tokenizer.from_file(str(file)), ""
    except Exception as error:  # a name that is no hub id, or a damaged file: tokenizers raises bare exceptions
        return None, f"Tokens are not coloured: the tokenizer of {name} cannot be read ({type(error).__name__})."
