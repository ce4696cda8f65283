"""Model text → `Answer`: the level it commits to, or why there is none.

What is read: everything before the first end token and after the last ``</think>``; a ``<think>`` that opens there
and never closes hides what follows it.

What is a commitment: a match of a row of `FORMATS`. The rows have ranks. An answer line (rank 1) outranks a labelled
level (rank 2), which outranks a level that stands alone on its line (rank 3). A level mentioned inside a sentence
("could be ESI 3", "not ESI 1", the steps of the algorithm) is none. The strongest rank present decides: its first
commitment and every commitment of any rank after that must name one level, and the answer is the last of them.
Weaker ones *before* it are reasoning on the way and do not count.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import regex

from rewards.second_level import BLANK, DASH, JOINT, NAME, second_level
from rewards.types import Answer, Reason, Span

END_TOKENS = re.compile(r"<\|(?:im_end|endoftext)\|>")

_MARK = rf"[{BLANK}*_`\"'\[({{<]"
"""Blanks and Markdown that may stand before a level. Every repetition is bounded or possessive: parsing is linear."""
_COLON = rf"{_MARK}{{0,6}}+(?:[:=]|\bis\b){_MARK}{{0,6}}+"
_DASHED = rf"{_MARK}{{0,6}}+[{DASH}]{_MARK}{{0,6}}+"
_LEVEL = r"(?P<level>\d{1,9}+(?:\.\d{1,3})?(?:[^\W\d_]{1,9})?)"
_ALONE = rf"^[{BLANK}>#*_`\"'\[({DASH}]{{0,9}}+"
_CLOSE = rf"[{BLANK}*_`\"'\])}}.!]{{0,9}}+$"


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a commitment."""

    rank: int
    """1 outranks 2 outranks 3."""
    patterns: tuple[re.Pattern[str] | regex.Pattern[str], ...]
    """Each has one group, ``level``."""


def _worded(rank: int, *patterns: str) -> Format:
    # regex looks for a pattern's leading word five times as fast as re does when case is ignored
    return Format(rank, tuple(regex.compile(pattern, regex.IGNORECASE | regex.VERSION0) for pattern in patterns))


def _line(rank: int, pattern: str) -> Format:
    # re is the faster one where a pattern is tried at every start of a line
    return Format(rank, (re.compile(pattern, re.IGNORECASE | re.MULTILINE),))


FORMATS: Mapping[str, Format] = {
    # "ANSWER: ESI 2", "**ANSWER: ESI 2**", "Final answer: 2", "Answer: level 2", "The answer is ESI-2"
    "answer": _worded(
        1,
        rf"\banswer\b(?:(?:{_COLON}|{_DASHED})(?:\s{{0,3}}+{_MARK}{{0,3}}+{NAME}|level\b{_MARK}{{0,3}}+)?"
        rf"|{_MARK}{{1,6}}+{NAME}){_LEVEL}",
    ),
    # "Final ESI level: 2", "Final ESI: 2", "Final level is 2"
    "final": _worded(1, rf"\bfinal {{1,3}}+(?:{NAME}|(?:triage )?(?:level|acuity)\b{_COLON}){_LEVEL}"),
    # "ESI level: 2", "ESI level is 2", "ESI: 2", "triage level: 2"
    "labelled": _worded(
        2,
        rf"\bESI(?: (?:triage )?(?:level|score))?\b{_COLON}(?:{NAME})?{_LEVEL}",
        rf"\btriage (?:level|score)\b{_COLON}(?:{NAME})?{_LEVEL}",
    ),
    # "ESI-2", "ESI Level 2.", "**ESI 2**", and the range "ESI 2 or 3", alone on its line
    "alone": _line(3, rf"{_ALONE}{NAME}{_LEVEL}(?=(?:{JOINT}\d){{0,5}}+{_CLOSE})"),
    # "2", alone on its line
    "digit": _line(3, rf"{_ALONE}(?P<level>[1-5])(?={_CLOSE})"),
}


REPEATED = 80
"""Characters between two commitments, up to which the judgement of what stands there is remembered."""


@dataclass(frozen=True, slots=True)
class _Commitment:
    rank: int
    level: int | None
    reason: Reason
    span: Span


def parse_answer(completion: str, *, thinking: bool, formats: Collection[str] = tuple(FORMATS)) -> Answer:
    """The level that the readable part of a completion commits to; see the module's text for what counts.

    Args:
        completion: the text as decoded; an end token and what follows it are not read.
        thinking: the prompt already opened ``<think>``, so an answer needs a ``</think>`` before it.
        formats: names of the rows of `FORMATS` that are read.

    Nothing readable or no commitment: level None, reason "no answer" or "unclosed thinking". Two levels in one
    commitment ("ESI 2-3", a list): "range". Two commitments that differ: "conflicting answers". A number that is no
    level (0, 7, 2.5, 22, a digit outside 0-9): "out of range". None of these is ever resolved by guessing.

    >>> parse_answer("ESI level: 3 was considered.\\nANSWER: ESI 2", thinking=False)
    Answer(level=2, reason='parsed', span=(29, 42))
    >>> parse_answer("ANSWER: ESI 2", thinking=True).reason
    'unclosed thinking'
    >>> parse_answer("</think>ANSWER: ESI 2-3", thinking=True).reason
    'range'
    """
    start, stop, hidden = _readable(completion, thinking)
    found = list(_commitments(completion, start, stop, formats))
    if not found:
        return Answer(None, "unclosed thinking" if hidden else "no answer", None)
    strongest = min(commitment.rank for commitment in found)
    first = next(i for i, commitment in enumerate(found) if commitment.rank == strongest)
    binding = found[first:]
    for commitment in binding:
        if commitment.level is None:
            return Answer(None, commitment.reason, commitment.span)
    if len({commitment.level for commitment in binding}) > 1:
        return Answer(None, "conflicting answers", binding[-1].span)
    return Answer(binding[-1].level, "parsed", binding[-1].span)


def _readable(completion: str, thinking: bool) -> tuple[int, int, bool]:
    """(start, stop, hidden): the part that is read, and whether an unclosed thought hides the rest."""
    end = END_TOKENS.search(completion)
    stop = end.start() if end else len(completion)
    closed = completion.rfind("</think>", 0, stop)
    if closed < 0 and thinking:
        return stop, stop, True
    start = 0 if closed < 0 else closed + len("</think>")
    opened = completion.find("<think>", start, stop)
    return (start, stop, False) if opened < 0 else (start, opened, True)


def _commitments(completion: str, start: int, stop: int, formats: Collection[str]) -> Iterator[_Commitment]:
    """Every commitment in order of place; where two formats overlap, the stronger (then the longer) one stands."""
    text = completion[start:stop]
    hits = [
        (match.start(), match.end(), FORMATS[name].rank, match.group("level"))
        for name in formats
        for pattern in FORMATS[name].patterns
        for match in pattern.finditer(text)
    ]
    kept: list[tuple[int, int, int, str]] = []
    for hit in sorted(hits, key=lambda hit: (hit[0], hit[2])):
        if not kept or hit[0] >= kept[-1][1]:
            kept.append(hit)
        elif (hit[2], hit[0] - hit[1]) < (kept[-1][2], kept[-1][0] - kept[-1][1]):
            kept[-1] = hit
    judged: dict[tuple[str, str], tuple[int | None, Reason]] = {}  # a model that repeats itself says the same for ever
    for i, (begin, end, rank, written) in enumerate(kept):
        stop = kept[i + 1][0] if i + 1 < len(kept) else len(text)
        said = written, text[end : min(stop, end + REPEATED)]
        if stop - end >= REPEATED or said not in judged:
            judged[said] = _level(text, written, end, stop)
        level, reason = judged[said]
        yield _Commitment(rank, level, reason, (start + begin, start + end))


def _level(text: str, written: str, end: int, stop: int) -> tuple[int | None, Reason]:
    """The level written, judged with what follows it up to the next commitment."""
    if written not in ("1", "2", "3", "4", "5"):
        return None, "out of range"
    return (None, "range") if second_level(text, end, stop, written) else (int(written), "parsed")
