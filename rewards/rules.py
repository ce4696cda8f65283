"""Rule rows: trigger in the case text × gold condition × predicted condition → value.

A trigger reads the case text alone, never the completion, so it is one boolean a case. Its patterns run through
`regex` under a time limit.
"""

import contextlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeVar

import regex

from rewards.types import LEVELS, Span, View

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS)}
NUMBER = rf"(?P<number>[0-9]{{1,3}}|{'|'.join(NUMBER_WORDS)})(?![0-9a-z])"
"""What ``{number}`` stands for in a numeric trigger's patterns."""

PATIENCE = 4
"""A search that ran out of time is tried once more with so many times as much."""

CodeRule = Callable[[View], float]
T = TypeVar("T")


class PatternTimeout(Exception):
    """A trigger's patterns ran out of time on one text."""


@dataclass(frozen=True, slots=True)
class PatternTrigger:
    """Fires where ``pattern`` matches outside every match of ``unless``.

    "Outside" is by overlap: in "not intubated, chest tube placed" an ``unless`` for "not intubated" takes away that
    match and leaves the chest tube.
    """

    pattern: str
    unless: str | None = None
    kind: Literal["pattern"] = "pattern"


@dataclass(frozen=True, slots=True)
class NumberTrigger:
    """Fires where a number captured by one of ``patterns`` lies in [at_least, at_most].

    Numbers above ``at_most`` are no scores and are passed over. ``which`` says which of several numbers counts:
    "any" of them, or only the "last" one in the text. Numbers inside a match of ``unless`` never count.
    """

    patterns: tuple[str, ...]
    at_least: int
    at_most: int
    which: Literal["any", "last"] = "any"
    unless: str | None = None
    kind: Literal["number"] = "number"


Trigger = PatternTrigger | NumberTrigger


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: worth ``value`` when the trigger fires, gold is in ``gold`` and the predicted level in ``predicted``.

    A rule of code has ``function``, which returns a value in [low, high]; for a row of data low = high = value.
    Two rows with equal triggers share one trigger.
    """

    name: str
    grade: str
    source: str
    trigger: Trigger | None
    """None: fires on every case."""
    gold: frozenset[int]
    predicted: frozenset[int]
    value: float | None
    low: float
    high: float
    function: CodeRule | None = field(default=None, compare=False)
    function_name: str | None = None

    def concerns(self, gold: int, predicted: int | None) -> bool:
        """Both conditions hold. Never for a completion without an answer."""
        return gold in self.gold and predicted in self.predicted


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "=": lambda level, bound: level == bound,
    "!=": lambda level, bound: level != bound,
    "<": lambda level, bound: level < bound,
    "<=": lambda level, bound: level <= bound,
    ">": lambda level, bound: level > bound,
    ">=": lambda level, bound: level >= bound,
}
_CONDITION = re.compile(r"(=|!=|<=|>=|<|>) ?([1-5])")


def levels(condition: str) -> frozenset[int]:
    """The levels that a condition admits: "any", or a comparison with a level.

    Raises ValueError for anything else, and for a condition that admits no level.

    >>> sorted(levels("> 2")), sorted(levels("= 1")), len(levels("any"))
    ([3, 4, 5], [1], 5)
    """
    if condition == "any":
        return frozenset(LEVELS)
    match = _CONDITION.fullmatch(condition)
    admitted = frozenset(level for level in LEVELS if _COMPARISONS[match[1]](level, int(match[2]))) if match else None
    if not admitted:
        raise ValueError(
            f'expected "any" or a comparison such as "= 1", "> 2" or "!= 3" that admits a level, got "{condition}"'
        )
    return admitted


@lru_cache(maxsize=512)
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """The pattern as triggers run it: case-insensitive, ``{number}`` expanded. Raises regex.error."""
    return regex.compile(pattern.replace("{number}", NUMBER), regex.IGNORECASE | regex.VERSION0)


def find_trigger(trigger: Trigger, text: str, *, timeout_s: float) -> Span | None:
    """The span of the first match that makes the trigger fire, or None.

    Args:
        trigger: what is looked for.
        text: a case's text.
        timeout_s: limit for each pattern, seconds of processor time.

    Raises PatternTimeout when a pattern runs past the limit.

    >>> find_trigger(PatternTrigger("intubat", unless="not intubated"), "Not intubated.", timeout_s=0.1)
    >>> pain = NumberTrigger(("pain {number}/10",), at_least=7, at_most=10)
    >>> find_trigger(pain, "Pain 9/10.", timeout_s=0.1)
    (0, 9)
    """
    return _in_time(_FIND[trigger.kind], trigger, text, timeout_s)


def trigger_spans(trigger: Trigger, text: str, *, timeout_s: float) -> list[Span]:
    """All matches of the trigger's patterns that ``unless`` leaves standing, in order, whatever number they hold."""
    return _in_time(lambda *given: [span for span, _ in _standing(*given)], trigger, text, timeout_s)


def _in_time(find: Callable[[Trigger, str, float], T], trigger: Trigger, text: str, timeout_s: float) -> T:
    """What ``find`` returns. Once past the limit it may try again with `PATIENCE` times as much: `regex` counts the
    processor time of the whole process, which other threads spend as well and a busy machine tells in jumps, and a
    judgement must not depend on that."""
    with contextlib.suppress(TimeoutError):
        return find(trigger, text, timeout_s)
    try:
        return find(trigger, text, PATIENCE * timeout_s)
    except TimeoutError as error:
        raise PatternTimeout(f"a {trigger.kind} trigger ran past {timeout_s} s, and again") from error


def _standing(trigger: Trigger, text: str, timeout_s: float) -> Iterator[tuple[Span, str | None]]:
    """(span, number written) of each match outside ``unless``, in order of place."""
    patterns = trigger.patterns if isinstance(trigger, NumberTrigger) else (trigger.pattern,)
    found = [
        (match.span(), match.groupdict().get("number"))
        for pattern in patterns
        for match in compile_pattern(pattern).finditer(text, timeout=timeout_s)
    ]
    if not found:
        return
    taken = (
        [match.span() for match in compile_pattern(trigger.unless).finditer(text, timeout=timeout_s)]
        if trigger.unless
        else []
    )
    begins = [begin for begin, _ in taken]
    for span, number in sorted(found, key=lambda item: (item[0][0], -item[0][1])):
        last = bisect_left(begins, span[1]) - 1  # of those that begin before the match ends, the one that ends last
        if last < 0 or taken[last][1] <= span[0]:
            yield span, number


def _find_pattern(trigger: PatternTrigger, text: str, timeout_s: float) -> Span | None:
    if trigger.unless is None:
        match = compile_pattern(trigger.pattern).search(text, timeout=timeout_s)
        return match.span() if match else None
    return next((span for span, _ in _standing(trigger, text, timeout_s)), None)


def _find_number(trigger: NumberTrigger, text: str, timeout_s: float) -> Span | None:
    scores = [
        (span, value)
        for span, written in _standing(trigger, text, timeout_s)
        if written is not None and (value := _number(written)) <= trigger.at_most
    ]
    counted = scores[-1:] if trigger.which == "last" else scores
    return next((span for span, value in counted if value >= trigger.at_least), None)


def _number(written: str) -> int:
    word = written.lower()
    return NUMBER_WORDS[word] if word in NUMBER_WORDS else int(word)


_FIND: dict[str, Callable[..., Span | None]] = {"pattern": _find_pattern, "number": _find_number}
