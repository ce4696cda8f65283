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

from rewards.types import Answer, Reason, Span

END_TOKENS = re.compile(r"<\|(?:im_end|endoftext)\|>")

_MARK = r"[ \t*_`\"'\[({<]"
"""Blanks and Markdown that may stand before a level. Every repetition is bounded or possessive: parsing is linear."""
_COLON = rf"{_MARK}{{0,6}}+(?:[:=]|\bis\b){_MARK}{{0,6}}+"
_DASH = rf"{_MARK}{{0,6}}+[–—-]{_MARK}{{0,6}}+"
_ESI = rf"ESI\b{_MARK}{{0,3}}+(?:(?:triage )?(?:level|score)\b)?(?:[ \t:#=*_–—-]|\bis\b){{0,6}}+"
_LEVEL = r"(?P<level>\d{1,9}+(?:\.\d{1,3})?(?:[^\W\d_]{1,9})?)"
_JOINT = r"(?:[-–—/,;&+|]|\b(?:or|and|to|through|versus|vs|maybe|possibly|perhaps|even)\b)"
_AND = rf"[ \t*_`\"'\])}}]{{0,6}}+(?:{_JOINT}[ \t*_`\"'(\[?.]{{0,6}}+){{1,4}}(?:{_ESI}|level )?"
"""Between the levels of a range or a list: "2-3", "2 or 3", "2 (or maybe ESI 3)", "1, 2, 3"."""
_ALONE = r"^[ \t>#*_`\"'\[(-]{0,9}+"


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a commitment."""

    rank: int
    """1 outranks 2 outranks 3."""
    pattern: re.Pattern[str]
    """Has one group, ``level``."""


def _format(rank: int, pattern: str) -> Format:
    return Format(rank, re.compile(pattern, re.IGNORECASE | re.MULTILINE))


FORMATS: Mapping[str, Format] = {
    # "ANSWER: ESI 2", "**ANSWER: ESI 2**", "Final answer: 2", "Answer: level 2", "The answer is ESI-2"
    "answer": _format(
        1,
        rf"\banswer\b(?:(?:{_COLON}|{_DASH})(?:\s{{0,3}}+{_MARK}{{0,3}}+{_ESI}|level\b{_MARK}{{0,3}}+)?"
        rf"|{_MARK}{{1,6}}+{_ESI}){_LEVEL}",
    ),
    # "Final ESI level: 2", "Final ESI: 2", "Final level is 2"
    "final": _format(1, rf"\bfinal {{1,3}}+(?:{_ESI}|(?:triage )?(?:level|acuity)\b{_COLON}){_LEVEL}"),
    # "ESI level: 2", "ESI level is 2", "ESI: 2", "triage level: 2"
    "labelled": _format(
        2, rf"\b(?:ESI(?: (?:triage )?(?:level|score))?|triage (?:level|score))\b{_COLON}(?:{_ESI})?{_LEVEL}"
    ),
    # "ESI-2", "ESI Level 2.", "**ESI 2**", and the range "ESI 2 or 3", alone on its line
    "alone": _format(3, rf"{_ALONE}{_ESI}{_LEVEL}(?=(?:{_AND}\d){{0,5}}[ \t*_`\"'\])}}.!]{{0,9}}+$)"),
    # "2", alone on its line
    "digit": _format(3, rf"{_ALONE}(?P<level>[1-5])(?=[ \t*_`\"'\])}}.!]{{0,9}}+$)"),
}

_MORE = re.compile(rf"{_AND}\d", re.IGNORECASE)
"""A second level joined to the first."""
_NAMED = re.compile(rf"\b(?:{_ESI}|level\s)(?P<level>\d{{1,9}}+)", re.IGNORECASE)
"""Another level named later on the same line."""


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
        for match in FORMATS[name].pattern.finditer(text)
    ]
    kept: list[tuple[int, int, int, str]] = []
    for hit in sorted(hits, key=lambda hit: (hit[0], hit[2])):
        if not kept or hit[0] >= kept[-1][1]:
            kept.append(hit)
        elif (hit[2], hit[0] - hit[1]) < (kept[-1][2], kept[-1][0] - kept[-1][1]):
            kept[-1] = hit
    for i, (begin, end, rank, written) in enumerate(kept):
        line_end = text.find("\n", end)
        line_end = len(text) if line_end < 0 else line_end
        after = min(line_end, kept[i + 1][0]) if i + 1 < len(kept) else line_end
        level, reason = _level(written, text[end:after])
        yield _Commitment(rank, level, reason, (start + begin, start + end))


def _level(written: str, rest: str) -> tuple[int | None, Reason]:
    """The level written, judged with the rest of its line."""
    if _MORE.match(rest) or any(match.group("level") != written for match in _NAMED.finditer(rest)):
        return None, "range"
    return (int(written), "parsed") if written in ("1", "2", "3", "4", "5") else (None, "out of range")
