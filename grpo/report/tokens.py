"""Tokens of a recorded completion: the text each one added, what it did to the loss, and how deep to colour it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from grpo.config import resolve
from grpo.report.number_format import NOTHING, plain
from grpo.run.ledger import Entry
from grpo.types import Completion
from rewards import Score

DEPTHS = (1 / 32, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the largest value shown from which a token's colour is one step deeper; below the first it has none."""
FIELDS = ("token", "log-prob", "loss", "KL", "entropy", "ratio")
"""What is told of a token, in this order; an arrow after the ratio is the side on which it was clipped."""
TOKEN_CLASSES = {"loss": "l", "kl": "k", "entropy": "e", "surprise": "s", "ratio": "r"}
"""Shading → first letter of its class; a capital letter is the negative side."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a completion: at most one token, wholly within or without the parsed answer."""

    text: str
    classes: str
    answer: bool


@dataclass(frozen=True, slots=True)
class Scale:
    """The largest |value| of each shading over all that is shown."""

    largest: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.largest.items() if value > 0)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Scale":
        largest = dict.fromkeys(TOKEN_CLASSES, 0.0)
        for entry in entries:
            for name, values in shadings(entry).items():
                there = values[np.isfinite(values)]
                largest[name] = max(largest[name], float(np.abs(there).max(initial=0.0)))
        return cls(largest)

    def classes(self, at: Mapping[str, float]) -> str:
        """Class names of one token, for example "l2 k1 E4"."""
        found = []
        for name, letter in TOKEN_CLASSES.items():
            value, most = at.get(name, 0.0), self.largest[name]
            known = most > 0 and math.isfinite(value)
            if depth := known and sum(abs(value) / most >= edge for edge in DEPTHS):
                found.append(f"{letter if value > 0 else letter.upper()}{depth}")
        return " ".join(found)


def shadings(entry: Entry) -> dict[str, np.ndarray]:
    """Shading → [M] values: the first inner epoch's, of the ratio the last one's log."""
    account, tokens = entry.account, entry.step.tokens
    found: dict[str, Tensor] = {"loss": account.loss[0], "entropy": tokens.entropy, "surprise": -tokens.logprobs[0]}
    if account.kl is not None:
        found["kl"] = account.kl[0]
    if len(account.ratio) > 1:
        found["ratio"] = account.ratio[-1].log()
    return {name: value.double().numpy() for name, value in found.items()}


def told(token: int, values: Mapping[str, np.ndarray], where: slice, entry: Entry) -> str:
    """The figures of `FIELDS`, separated by spaces."""
    at = {name: float(column[token]) for name, column in values.items()}
    ratio = float(entry.account.ratio[-1][where][token])
    side = {-1: "↓", 1: "↑"}.get(int(entry.account.clip[-1][where][token]), "")
    kl = plain(at["kl"]) if "kl" in at else NOTHING
    figures = (
        str(token + 1),
        plain(-at["surprise"]),
        plain(at["loss"]),
        kl,
        plain(at["entropy"]),
        f"{ratio:.4g}{side}",
    )
    return " ".join(figures)


def case_pieces(text: str, scores: Sequence[Score]) -> Iterator[tuple[str, str]]:
    """The case in order, each piece with the rules whose trigger it holds ("" for none)."""
    spans = {(fired.rule, fired.span) for score in scores for fired in score.fired if fired.span}
    yield from _cut(text, lambda i: ", ".join(sorted({rule for rule, (a, z) in spans if a <= i < z})), spans)


def _cut(text: str, name: Callable[[int], str], spans: set[tuple[str, tuple[int, int]]]) -> Iterator[tuple[str, str]]:
    edges = sorted({0, len(text), *(min(max(edge, 0), len(text)) for _, span in spans for edge in span)})
    for start, stop in pairwise(edges):
        yield text[start:stop], name(start)


def completion_pieces(
    completion: Completion,
    score: Score,
    values: Mapping[str, np.ndarray],
    scale: Scale,
    tokenizer: Tokenizer | None,
    *,
    said: bool,
) -> Iterator[tuple[Piece, int | None]]:
    """Pieces of a completion, each with its token."""
    if not said:
        for token in range(len(completion.ids)):
            yield Piece("·", scale.classes({k: float(v[token]) for k, v in values.items()}), False), token
        return
    start, stop = score.answer.span or (0, 0)
    spoken = token_texts(tokenizer, completion) if tokenizer else None
    at = 0
    for token, text in enumerate(spoken or [completion.text]):
        classes = scale.classes({k: float(v[token]) for k, v in values.items()}) if spoken else ""
        cuts = sorted({at, at + len(text), *(edge for edge in (start, stop) if at < edge < at + len(text))})
        for left, right in pairwise(cuts):
            inside = start <= left < stop
            yield Piece(text[left - at : right - at], classes, inside), token if spoken else None
        at += len(text)


def token_texts(tokenizer: Tokenizer, completion: Completion) -> list[str] | None:
    """The text that each token added, the end token's included; None where they do not add up to what was recorded.

    A character of several tokens belongs to the last of them.
    """
    texts: list[str] = []
    ids, begin, seen = list(completion.ids), 0, 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[begin:seen], skip_special_tokens=False)
        now = tokenizer.decode(ids[begin:end], skip_special_tokens=False)
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            begin, seen = seen, end
    spoken = "".join(texts[:-1] if completion.finished else texts)
    return texts if spoken == completion.text else None


def load_tokenizer(name: str) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a base from this machine's files, or why there is none."""
    folder = resolve(name)
    file = folder / "tokenizer.json" if folder.is_dir() else _cached(name)
    if file is None or not file.is_file():
        return None, f"Tokens are not coloured: the tokenizer of {name} is not on this machine."
    try:
        return Tokenizer.from_file(str(file)), ""
    except Exception as error:  # the library raises bare exceptions
        return None, f"Tokens are not coloured: {file.name} of {name} cannot be read ({type(error).__name__})."


def _cached(name: str) -> Path | None:
    """``tokenizer.json`` of a hub id in the local cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
