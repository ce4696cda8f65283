"""Rules: trigger in the case text × gold condition × predicted condition → value.

A trigger reads only the case text, never the completion, so it is one boolean per case. Its patterns are matched by
`regex` with a time limit.
"""

import contextlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeVar

import regex

from rewards.types import LEVELS, RuleInput, Span

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS)}
NUMBER = rf"(?P<number>[0-9]{{1,3}}|{'|'.join(NUMBER_WORDS)})(?![0-9a-z])"
"""Replaces ``{number}`` in the patterns of a numeric trigger."""

TIMEOUT_RETRY_FACTOR = 4
"""A search that timed out is repeated once with the time limit multiplied by this."""

RuleFunction = Callable[[RuleInput], float]
T = TypeVar("T")


class PatternTimeout(Exception):
    """A trigger's patterns timed out on one text."""


@dataclass(frozen=True, slots=True)
class PatternTrigger:
    """Fires if ``pattern`` matches outside every match of ``unless``.

    A match is outside if it does not overlap: in "not intubated, chest tube placed" an ``unless`` of "not intubated"
    removes the first match and leaves the chest tube.
    """

    pattern: str
    unless: str | None = None
    kind: Literal["pattern"] = "pattern"


@dataclass(frozen=True, slots=True)
class NumberTrigger:
    """Fires if a number captured by one of ``patterns`` is in [at_least, at_most].

    Numbers above ``at_most`` are not scores and are ignored. If there are several numbers, ``which`` selects "any" of
    them or only the "last" one in the text. Numbers inside a match of ``unless`` never count.
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
    """One rule: gives ``value`` if the trigger fires, gold is in ``gold`` and the predicted level in ``predicted``.

    A code rule has a ``function`` that returns a value in [low, high]; for a data rule low = high = value. Two rules
    with equal triggers share one trigger.
    """

    name: str
    grade: str
    source: str
    trigger: Trigger | None
    """None if the rule applies to every case."""
    gold: frozenset[int]
    predicted: frozenset[int]
    value: float | None
    low: float
    high: float
    function: RuleFunction | None = field(default=None, compare=False)
    function_name: str | None = None

    def concerns(self, gold: int, predicted: int | None) -> bool:
        """Return whether both conditions hold; False for a completion without an answer."""
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
    """Return the levels that satisfy a condition: "any", or a comparison with a level.

    Raises ValueError for anything else, and for a condition that no level satisfies.

    >>> sorted(levels("> 2")), sorted(levels("= 1")), len(levels("any"))
    ([3, 4, 5], [1], 5)
    """
    if condition == "any":
        return frozenset(LEVELS)
    match = _CONDITION.fullmatch(condition)
    admitted = frozenset(level for level in LEVELS if _COMPARISONS[match[1]](level, int(match[2]))) if match else None
    if not admitted:
        raise ValueError(
            f'expected "any" or a comparison such as "= 1", "> 2" or "!= 3" that a level satisfies, got "{condition}"'
        )
    return admitted


@lru_cache(maxsize=512)
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Compile a trigger's pattern: case-insensitive, with ``{number}`` expanded. Raises regex.error."""
    return regex.compile(pattern.replace("{number}", NUMBER), regex.IGNORECASE | regex.VERSION0)


def find_trigger(trigger: Trigger, text: str, *, timeout_s: float) -> Span | None:
    """Return the span of the first match that makes the trigger fire, or None.

    Args:
        trigger: the trigger to search for.
        text: the text of a case.
        timeout_s: time limit for each pattern, in seconds of CPU time.

    Raises PatternTimeout if a pattern exceeds the limit.

    >>> find_trigger(PatternTrigger("intubat", unless="not intubated"), "Not intubated.", timeout_s=0.1)
    >>> pain = NumberTrigger(("pain {number}/10",), at_least=7, at_most=10)
    >>> find_trigger(pain, "Pain 9/10.", timeout_s=0.1)
    (0, 9)
    """
    return _with_timeout(_FIND[trigger.kind], trigger, text, timeout_s)


def trigger_spans(trigger: Trigger, text: str, *, timeout_s: float) -> list[Span]:
    """Return all matches of the trigger's patterns outside ``unless``, in order, whatever number they contain."""
    return _with_timeout(lambda *args: [span for span, _ in _matches_outside_unless(*args)], trigger, text, timeout_s)


def _with_timeout(find: Callable[[Trigger, str, float], T], trigger: Trigger, text: str, timeout_s: float) -> T:
    """Call ``find``; after a timeout once more, with `TIMEOUT_RETRY_FACTOR` times the limit.

    `regex` measures the CPU time of the whole process, and the result must not depend on other threads.
    """
    with contextlib.suppress(TimeoutError):
        return find(trigger, text, timeout_s)
    try:
        return find(trigger, text, TIMEOUT_RETRY_FACTOR * timeout_s)
    except TimeoutError as error:
        raise PatternTimeout(f"a {trigger.kind} trigger ran past {timeout_s} s, and again") from error


def _matches_outside_unless(trigger: Trigger, text: str, timeout_s: float) -> Iterator[tuple[Span, str | None]]:
    """Yield (span, captured number as text) of each match outside ``unless``, in order of position."""
    patterns = trigger.patterns if isinstance(trigger, NumberTrigger) else (trigger.pattern,)
    matches = [
        (match.span(), match.groupdict().get("number"))
        for pattern in patterns
        for match in compile_pattern(pattern).finditer(text, timeout=timeout_s)
    ]
    if not matches:
        return
    excluded = (
        [match.span() for match in compile_pattern(trigger.unless).finditer(text, timeout=timeout_s)]
        if trigger.unless
        else []
    )
    begins = [begin for begin, _ in excluded]
    for span, number in sorted(matches, key=lambda item: (item[0][0], -item[0][1])):
        last = bisect_left(begins, span[1]) - 1  # the last exclusion that begins before the match ends
        if last < 0 or excluded[last][1] <= span[0]:
            yield span, number


def _find_pattern(trigger: PatternTrigger, text: str, timeout_s: float) -> Span | None:
    if trigger.unless is None:
        match = compile_pattern(trigger.pattern).search(text, timeout=timeout_s)
        return match.span() if match else None
    return next((span for span, _ in _matches_outside_unless(trigger, text, timeout_s)), None)


def _find_number(trigger: NumberTrigger, text: str, timeout_s: float) -> Span | None:
    scores = [
        (span, value)
        for span, number in _matches_outside_unless(trigger, text, timeout_s)
        if number is not None and (value := _number(number)) <= trigger.at_most
    ]
    counted = scores[-1:] if trigger.which == "last" else scores
    return next((span for span, value in counted if value >= trigger.at_least), None)


def _number(text: str) -> int:
    word = text.lower()
    return NUMBER_WORDS[word] if word in NUMBER_WORDS else int(word)


_FIND: dict[str, Callable[..., Span | None]] = {"pattern": _find_pattern, "number": _find_number}
