"""Parse a completion into an `Answer`: the level it commits to, or the reason why there is none.

The readable part is everything before the first end token and after the last ``</think>``; a ``<think>`` that opens
there and does not close hides the rest.

A commitment is a match of an entry of `FORMATS`, which have ranks: an answer line (rank 1) outranks a labeled level
(rank 2), which outranks a level alone on its line (rank 3). A level inside a sentence ("could be ESI 3", "not ESI 1",
the steps of the algorithm) is not a commitment. The strongest rank present decides: its first commitment and every
later commitment of any rank must agree on one level. Weaker ones *before* it are reasoning and do not count.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import regex

from rewards.second_level import BLANK, DASH, ESI_LABEL, JOINER, second_level
from rewards.types import Answer, Reason, Span

END_TOKENS = re.compile(r"<\|(?:im_end|endoftext)\|>")

_MARK = rf"[{BLANK}*_`\"'\[({{<]"
"""Blanks and Markdown that may precede a level. Every repetition is bounded or possessive: parsing is linear."""
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
    # for case-insensitive words, regex is five times as fast as re
    return Format(rank, tuple(regex.compile(pattern, regex.IGNORECASE | regex.VERSION0) for pattern in patterns))


def _line(rank: int, pattern: str) -> Format:
    # for patterns tried at every start of a line, re is faster
    return Format(rank, (re.compile(pattern, re.IGNORECASE | re.MULTILINE),))


FORMATS: Mapping[str, Format] = {
    # "ANSWER: ESI 2", "**ANSWER: ESI 2**", "Final answer: 2", "Answer: level 2", "The answer is ESI-2"
    "answer": _worded(
        1,
        rf"\banswer\b(?:(?:{_COLON}|{_DASHED})(?:\s{{0,3}}+{_MARK}{{0,3}}+{ESI_LABEL}|level\b{_MARK}{{0,3}}+)?"
        rf"|{_MARK}{{1,6}}+{ESI_LABEL}){_LEVEL}",
    ),
    # "Final ESI level: 2", "Final ESI: 2", "Final level is 2"
    "final": _worded(1, rf"\bfinal {{1,3}}+(?:{ESI_LABEL}|(?:triage )?(?:level|acuity)\b{_COLON}){_LEVEL}"),
    # "ESI level: 2", "ESI level is 2", "ESI: 2", "triage level: 2"
    "labelled": _worded(
        2,
        rf"\bESI(?: (?:triage )?(?:level|score))?\b{_COLON}(?:{ESI_LABEL})?{_LEVEL}",
        rf"\btriage (?:level|score)\b{_COLON}(?:{ESI_LABEL})?{_LEVEL}",
    ),
    # "ESI-2", "ESI Level 2.", "**ESI 2**", and the range "ESI 2 or 3", alone on its line
    "alone": _line(3, rf"{_ALONE}{ESI_LABEL}{_LEVEL}(?=(?:{JOINER}\d){{0,5}}+{_CLOSE})"),
    # "2", alone on its line
    "digit": _line(3, rf"{_ALONE}(?P<level>[1-5])(?={_CLOSE})"),
}


MEMO_CHARS = 80
"""Results are cached if at most this many characters separate two commitments."""


@dataclass(frozen=True, slots=True)
class _Commitment:
    rank: int
    level: int | None
    reason: Reason
    span: Span


def parse_answer(completion: str, *, thinking: bool, formats: Collection[str] = tuple(FORMATS)) -> Answer:
    """Return the level that a completion commits to, by the rules in the module docstring.

    Args:
        completion: the decoded text; an end token and everything after it are ignored.
        thinking: whether the prompt opened ``<think>``, so that an answer must come after ``</think>``.
        formats: the keys of `FORMATS` to accept.

    Without a commitment the level is None and the reason "no answer" or "unclosed thinking". Two levels in one
    commitment ("ESI 2-3", a list) give "range", commitments that differ "conflicting answers", and a number that is
    not a level (0, 7, 2.5, 22) "out of range". None of these is resolved by guessing.

    >>> parse_answer("ESI level: 3 was considered.\\nANSWER: ESI 2", thinking=False)
    Answer(level=2, reason='parsed', span=(29, 42))
    >>> parse_answer("ANSWER: ESI 2", thinking=True).reason
    'unclosed thinking'
    >>> parse_answer("</think>ANSWER: ESI 2-3", thinking=True).reason
    'range'
    """
    start, stop, hidden = _readable(completion, thinking)
    commitments = list(_commitments(completion, start, stop, formats))
    if not commitments:
        return Answer(None, "unclosed thinking" if hidden else "no answer", None)
    strongest = min(commitment.rank for commitment in commitments)
    first = next(i for i, commitment in enumerate(commitments) if commitment.rank == strongest)
    binding = commitments[first:]
    for commitment in binding:
        if commitment.level is None:
            return Answer(None, commitment.reason, commitment.span)
    if len({commitment.level for commitment in binding}) > 1:
        return Answer(None, "conflicting answers", binding[-1].span)
    return Answer(binding[-1].level, "parsed", binding[-1].span)


def _readable(completion: str, thinking: bool) -> tuple[int, int, bool]:
    """Return (start, stop, hidden): the readable part, and whether unclosed thinking hides the rest."""
    end = END_TOKENS.search(completion)
    stop = end.start() if end else len(completion)
    closed = completion.rfind("</think>", 0, stop)
    if closed < 0 and thinking:
        return stop, stop, True
    start = 0 if closed < 0 else closed + len("</think>")
    opened = completion.find("<think>", start, stop)
    return (start, stop, False) if opened < 0 else (start, opened, True)


def _commitments(completion: str, start: int, stop: int, formats: Collection[str]) -> Iterator[_Commitment]:
    """Yield every commitment in order of position; of two that overlap, the stronger, then the longer one."""
    text = completion[start:stop]
    matches = [
        (match.start(), match.end(), FORMATS[name].rank, match.group("level"))
        for name in formats
        for pattern in FORMATS[name].patterns
        for match in pattern.finditer(text)
    ]
    commitments: list[tuple[int, int, int, str]] = []
    for hit in sorted(matches, key=lambda hit: (hit[0], hit[2])):
        if not commitments or hit[0] >= commitments[-1][1]:
            commitments.append(hit)
        elif (hit[2], hit[0] - hit[1]) < (commitments[-1][2], commitments[-1][0] - commitments[-1][1]):
            commitments[-1] = hit
    memo: dict[tuple[str, str], tuple[int | None, Reason]] = {}  # a looping model repeats the same commitment
    for i, (begin, end, rank, digits) in enumerate(commitments):
        stop = commitments[i + 1][0] if i + 1 < len(commitments) else len(text)
        key = digits, text[end : min(stop, end + MEMO_CHARS)]
        if stop - end >= MEMO_CHARS or key not in memo:
            memo[key] = _level(text, digits, end, stop)
        level, reason = memo[key]
        yield _Commitment(rank, level, reason, (start + begin, start + end))


def _level(text: str, digits: str, end: int, stop: int) -> tuple[int | None, Reason]:
    """Judge the digits together with the text up to the next commitment."""
    if digits not in ("1", "2", "3", "4", "5"):
        return None, "out of range"
    return (None, "range") if second_level(text, end, stop, digits) else (int(digits), "parsed")
