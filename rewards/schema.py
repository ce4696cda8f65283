"""The schema of a reward set's file: every key, row and range. `rewards.set_files` reads the files."""

import math
import re
from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rewards.parse import FORMATS
from rewards.rules import compile_pattern, levels
from rewards.types import LARGEST


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


MAX_EXPANDED_CHARS = 2_000_000
"""Characters of a pattern times all its minimum repeats: compiling expands them, at 300 bytes each."""
MAX_PATTERN_CHARS = 10_000
"""Characters of a pattern."""


def _compilable(pattern: str) -> str:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(
            f"expected a regular expression of at most {MAX_PATTERN_CHARS:,} characters, got {len(pattern):,}"
        )
    repeats = [max(1, int(digits[-9:])) for digits in re.findall(r"\{(\d+)", pattern, re.ASCII)]
    if len(pattern) * math.prod(repeats) > MAX_EXPANDED_CHARS:
        raise ValueError(f"expected a regular expression with fewer repeats, got {math.prod(repeats):,.0f} in total")
    try:
        compile_pattern(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"expected a regular expression: {why}") from None
    return pattern


def _captures_number(pattern: str) -> str:
    if pattern.count("{number}") != 1:
        raise ValueError(
            f"expected {{number}} exactly once, at the position of the score, got it {pattern.count('{number}')} times"
        )
    return pattern


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f'expected one of {", ".join(FORMATS)}, got "{name}"')
    return name


def _checked_condition(condition: str) -> str:
    levels(condition)
    return condition


def _bounded(value: float) -> float:
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"expected a number from {-LARGEST:g} to {LARGEST:g}, got {value}")
    return value


Value = Annotated[float, AfterValidator(_bounded)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]
Text = Annotated[str, Field(min_length=1)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=60)]
Seconds = Annotated[float, Field(gt=0, le=10)]
Level = Annotated[int, Field(ge=1, le=5)]
Grade = Literal["K", "I", "U"]
"""K: stated by a model card of the series. I: inferred, with the argument in ``source``. U: unknown, our choice."""
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compilable)]
Condition = Annotated[str, AfterValidator(_checked_condition)]


class StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Graded(StrictModel):
    grade: Grade
    source: Text


class Outcome(Graded):
    """A row of the base table."""

    errors: Annotated[tuple[Annotated[int, Field(ge=-4, le=4)], ...], Field(min_length=1), BeforeValidator(_tuple)]
    """Signed errors, predicted − gold, to which this row applies."""
    value: Value


class NoParse(Graded):
    value: Value


class Stacking(Graded):
    penalties: Literal["sum", "worst"]
    bonuses: Literal["sum", "best"]


class Bounds(Graded):
    low: Value
    high: Value

    @model_validator(mode="after")
    def _ordered(self) -> "Bounds":
        if self.low >= self.high:
            raise ValueError(f"expected low < high, got [{self.low}, {self.high}]")
        return self


class AnswerSection(StrictModel):
    """The answer formats that the parser accepts."""

    formats: Annotated[
        tuple[Annotated[str, AfterValidator(_known_format)], ...], Field(min_length=1), BeforeValidator(_tuple)
    ]


class PatternRow(StrictModel):
    kind: Literal["pattern"]
    pattern: Pattern
    unless: Pattern | None = None


class NumberRow(StrictModel):
    kind: Literal["number"]
    patterns: Annotated[
        tuple[Annotated[str, AfterValidator(_captures_number), AfterValidator(_compilable)], ...],
        Field(min_length=1),
        BeforeValidator(_tuple),
    ]
    at_least: Annotated[int, AfterValidator(_bounded)]
    at_most: Annotated[int, AfterValidator(_bounded)]
    which: Literal["any", "last"]
    unless: Pattern | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "NumberRow":
        if self.at_least > self.at_most:
            raise ValueError(f"expected at_least <= at_most, got {self.at_least} > {self.at_most}: it would never fire")
        return self


class SameRow(StrictModel):
    """The trigger of another rule of the set."""

    kind: Literal["same"]
    rule: Name


class RuleRow(Graded):
    name: Name
    trigger: Annotated[PatternRow | NumberRow | SameRow, Field(discriminator="kind")] | None = None
    gold: Condition
    predicted: Condition
    value: Value | None = None
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    range: Annotated[tuple[Value, Value], BeforeValidator(_tuple)] | None = None

    @model_validator(mode="after")
    def _data_or_code(self) -> "RuleRow":
        if (self.value is None) == (self.function is None):
            raise ValueError("expected either value (a data rule) or function with range (a code rule)")
        if (self.function is None) != (self.range is None):
            raise ValueError(
                "expected function and range together: the proof needs to know which values the function may return"
            )
        if self.range and self.range[0] > self.range[1]:
            raise ValueError(f"expected range = [low, high] with low <= high, got {list(self.range)}")
        return self


class ExampleCase(StrictModel):
    """An example the tests run: the expected score of one completion."""

    name: Name
    text: Text
    gold: Level
    completion: str
    thinking: bool
    finished: bool = True
    total: Value
    parts: dict[str, Value]
    """The components that are not zero."""
    reason: Text = "parsed"


RuleRows = Annotated[tuple[RuleRow, ...], BeforeValidator(_tuple)]
ExampleCases = Annotated[tuple[ExampleCase, ...], BeforeValidator(_tuple)]


class SetFile(StrictModel):
    """One file as written; missing keys come from the set it extends."""

    name: SetName
    about: Text
    extends: Text | None = None
    drop: Annotated[tuple[Name, ...], BeforeValidator(_tuple)] = ()
    pattern_timeout_s: Seconds | None = None
    base: dict[Name, Outcome] = {}
    no_parse: NoParse | None = None
    stacking: Stacking | None = None
    bounds: Bounds | None = None
    answer: AnswerSection | None = None
    rule: RuleRows = ()
    case: ExampleCases = ()


class ResolvedSet(StrictModel):
    """A complete set with extensions applied, as stored in JSON."""

    name: SetName
    about: Text
    pattern_timeout_s: Seconds
    base: dict[Name, Outcome]
    no_parse: NoParse
    stacking: Stacking
    bounds: Bounds | None
    answer: AnswerSection
    rule: RuleRows
    case: ExampleCases


def all_models(base: type[StrictModel] = StrictModel) -> list[type[StrictModel]]:
    """Return every model whose keys may occur in a file."""
    return [model for child in base.__subclasses__() for model in (child, *all_models(child))]
