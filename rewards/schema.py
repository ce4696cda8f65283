"""A reward set's TOML file, checked: every key, every row; a set may extend another.

``extends = "v46"`` starts from that set. Rows given here replace the parent's rows of the same name whole, new rows
come after the parent's, ``drop`` removes rows, and any other table given replaces the parent's. Cases are not
inherited: what they expect may have changed.

The rows of ``base`` must cover each signed error predicted − gold from −4 to 4 exactly once, after extension.
"""

import difflib
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rewards.parse import FORMATS
from rewards.rules import compile_pattern, levels
from rewards.table import ERRORS
from rewards.types import RewardError

SETS = Path(__file__).parent / "sets"
"""The shipped sets, package data."""


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _compilable(pattern: str) -> str:
    try:
        compile_pattern(pattern)
    except regex.error as error:
        raise ValueError(f"expected a regular expression: {error}") from error
    return pattern


def _captures_number(pattern: str) -> str:
    if pattern.count("{number}") != 1:
        raise ValueError(f"expected {{number}} once, where the score stands, got it {pattern.count('{number}')} times")
    return pattern


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f'expected one of {", ".join(FORMATS)}, got "{name}"')
    return name


def _checked_condition(condition: str) -> str:
    levels(condition)
    return condition


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]
Text = Annotated[str, Field(min_length=1)]
Level = Annotated[int, Field(ge=1, le=5)]
Grade = Literal["K", "I", "U"]
"""K: stated by a model card of the series. I: inferred, the source gives the argument. U: unknown, our choice."""
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compilable)]
Condition = Annotated[str, AfterValidator(_checked_condition)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Graded(Section):
    grade: Grade
    source: Text


class Outcome(Graded):
    """A row of the base table."""

    errors: Annotated[tuple[Annotated[int, Field(ge=-4, le=4)], ...], Field(min_length=1), BeforeValidator(_tuple)]
    """Signed errors, predicted − gold, that this row is for."""
    value: float


class NoParse(Graded):
    value: float


class Stacking(Graded):
    penalties: Literal["sum", "worst"]
    bonuses: Literal["sum", "best"]


class Bounds(Graded):
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> "Bounds":
        if self.low >= self.high:
            raise ValueError(f"expected low < high, got [{self.low}, {self.high}]")
        return self


class AnswerSection(Section):
    """Which rows of the parser's table of formats are read."""

    formats: Annotated[
        tuple[Annotated[str, AfterValidator(_known_format)], ...], Field(min_length=1), BeforeValidator(_tuple)
    ]


class PatternRow(Section):
    kind: Literal["pattern"]
    pattern: Pattern
    unless: Pattern | None = None


class NumberRow(Section):
    kind: Literal["number"]
    patterns: Annotated[
        tuple[Annotated[str, AfterValidator(_captures_number), AfterValidator(_compilable)], ...],
        Field(min_length=1),
        BeforeValidator(_tuple),
    ]
    at_least: int
    at_most: int
    which: Literal["any", "last"]
    unless: Pattern | None = None


class SameRow(Section):
    """The trigger of another rule of the set: two rows, one boolean."""

    kind: Literal["same"]
    rule: Name


class RuleRow(Graded):
    name: Name
    trigger: Annotated[PatternRow | NumberRow | SameRow, Field(discriminator="kind")] | None = None
    gold: Condition
    predicted: Condition
    value: float | None = None
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    range: Annotated[tuple[float, float], BeforeValidator(_tuple)] | None = None

    @model_validator(mode="after")
    def _data_or_code(self) -> "RuleRow":
        if (self.value is None) == (self.function is None):
            raise ValueError("expected either value (a row of data) or function with range (a rule of code)")
        if (self.function is None) != (self.range is None):
            raise ValueError("expected function and range together: the proof needs the values a function may return")
        if self.range and self.range[0] > self.range[1]:
            raise ValueError(f"expected range = [low, high] with low <= high, got {list(self.range)}")
        return self


class ExampleCase(Section):
    """A case the tests run: what the set must say about one completion."""

    name: Name
    text: Text
    gold: Level
    completion: str
    thinking: bool
    finished: bool = True
    total: float
    parts: dict[str, float]
    """The components that are not zero."""
    reason: Text = "parsed"


class SetFile(Section):
    """One file as written: what it leaves out comes from the set it extends."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=60)]
    about: Text
    extends: Text | None = None
    drop: Annotated[tuple[Name, ...], BeforeValidator(_tuple)] = ()
    pattern_timeout_s: Annotated[float, Field(gt=0, le=10)] | None = None
    base: dict[Name, Outcome] = {}
    no_parse: NoParse | None = None
    stacking: Stacking | None = None
    bounds: Bounds | None = None
    answer: AnswerSection | None = None
    rule: Annotated[tuple[RuleRow, ...], BeforeValidator(_tuple)] = ()
    case: Annotated[tuple[ExampleCase, ...], BeforeValidator(_tuple)] = ()


class ResolvedSet(Section):
    """A whole set, extensions applied."""

    name: str
    about: str
    pattern_timeout_s: float
    base: dict[str, Outcome]
    no_parse: NoParse
    stacking: Stacking
    bounds: Bounds | None
    answer: AnswerSection
    rule: tuple[RuleRow, ...]
    case: tuple[ExampleCase, ...]


def load_set(name_or_path: str | Path) -> tuple[ResolvedSet, Path]:
    """The resolved set and its file.

    Args:
        name_or_path: a shipped set's name ("v49"), or the path of a file ending in ``.toml``.

    Raises RewardError naming file, row and key.
    """
    path = _path(name_or_path, Path())
    chain = _chain(path)
    resolved = _merge(chain)
    _check(resolved, path)
    return resolved, path


def shipped_sets() -> tuple[str, ...]:
    """Names of the sets that come with the package, sorted."""
    return tuple(sorted(path.stem for path in SETS.glob("*.toml")))


def _path(name_or_path: str | Path, beside: Path) -> Path:
    if str(name_or_path).endswith(".toml"):
        path = beside / name_or_path
        if not path.is_file():
            raise RewardError(f"expected a reward set's file, found none at {path}")
        return path
    name = str(name_or_path)
    if name not in shipped_sets():
        raise RewardError(
            f'no reward set is called "{name}"{_did_you_mean(name, shipped_sets())}; shipped are '
            f"{', '.join(shipped_sets())}, and a file of your own is given by a path ending in .toml"
        )
    return SETS / f"{name}.toml"


def _chain(path: Path) -> list[tuple[Path, SetFile]]:
    """The files from the set itself up to its first ancestor."""
    chain: list[tuple[Path, SetFile]] = []
    seen: set[Path] = set()
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise RewardError(f'{current}: "extends" leads back to this file; remove one of the links')
        seen.add(current.resolve())
        file = _read(current)
        chain.append((current, file))
        current = _path(file.extends, current.parent) if file.extends else None
    return chain


def _read(path: Path) -> SetFile:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RewardError(f"{path}: not readable as TOML: {error}") from error
    try:
        return SetFile.model_validate(table)
    except ValidationError as error:
        faults = [_fault(path, table, fault["loc"], fault["type"], fault["msg"]) for fault in error.errors()]
        raise RewardError("\n".join(faults)) from None


def _fault(path: Path, table: object, loc: tuple[int | str, ...], kind: str, message: str) -> str:
    """One line: file, row, key, what was expected. Never the value: a case's text may be a patient's."""
    where, node = "", table
    for step in loc:
        if isinstance(node, list) and isinstance(step, int):
            node = node[step]
            label = node.get("name") if isinstance(node, dict) else None
            where += f"[{step + 1}]" + (f' "{label}"' if label else "")
        elif step not in ("pattern", "number", "same") or (isinstance(node, dict) and step in node):
            node = node.get(step) if isinstance(node, dict) else None
            where += f".{step}" if where else str(step)
    if kind == "extra_forbidden":
        return f"{path}: {where}: unknown key{_did_you_mean(str(loc[-1]), _keys())}"
    return f"{path}: {where}: {message}"


def _keys() -> Iterator[str]:
    """Every key that a set's file may hold."""
    models: tuple[type[BaseModel], ...] = (
        SetFile,
        Outcome,
        NoParse,
        Stacking,
        Bounds,
        AnswerSection,
        RuleRow,
        PatternRow,
        NumberRow,
        SameRow,
        ExampleCase,
    )
    for model in models:
        yield from model.model_fields


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=1, cutoff=0.5)
    return f', did you mean "{close[0]}"?' if close else ""


def _merge(chain: list[tuple[Path, SetFile]]) -> ResolvedSet:
    """The files laid over each other, the first ancestor at the bottom."""
    base: dict[str, Outcome] = {}
    rules: dict[str, RuleRow] = {}
    single: dict[str, object] = {
        "pattern_timeout_s": None,
        "no_parse": None,
        "stacking": None,
        "answer": None,
        "bounds": None,
    }
    for path, file in reversed(chain):
        for name in file.drop:
            if name not in base and name not in rules:
                raise RewardError(f'{path}: drop: no row is called "{name}"{_did_you_mean(name, [*base, *rules])}')
            base.pop(name, None)
            rules.pop(name, None)
        base |= file.base
        rules |= _by_name(path, file)
        single |= {key: value for key in single if (value := getattr(file, key)) is not None}
    path, file = chain[0]
    missing = [key for key, value in single.items() if value is None and key != "bounds"]
    if missing:
        raise RewardError(f"{path}: expected the keys {', '.join(missing)}, here or in a set that this one extends")
    pieces = {"name": file.name, "about": file.about, "base": base, "rule": tuple(rules.values()), "case": file.case}
    return ResolvedSet.model_validate(pieces | single)


def _by_name(path: Path, file: SetFile) -> dict[str, RuleRow]:
    repeated = [name for name, count in Counter(row.name for row in file.rule).items() if count > 1]
    if repeated:
        raise RewardError(f'{path}: rule: two rows are called "{repeated[0]}"; give each its own name')
    return {row.name: row for row in file.rule}


def _check(resolved: ResolvedSet, path: Path) -> None:
    """What no single row can see: the base table covers each error once, names do not collide."""
    counts = Counter(error for row in resolved.base.values() for error in row.errors)
    for error in ERRORS:
        if counts[error] != 1:
            rows = ", ".join(name for name, row in resolved.base.items() if error in row.errors) or "none"
            raise RewardError(
                f"{path}: base: expected one row for the error predicted - gold = {error}, got {counts[error]} ({rows})"
            )
    own = {row.name for row in resolved.rule if row.trigger and not isinstance(row.trigger, SameRow)}
    for row in resolved.rule:
        if isinstance(row.trigger, SameRow) and row.trigger.rule not in own:
            raise RewardError(
                f'{path}: rule "{row.name}".trigger.rule: no rule "{row.trigger.rule}" has a trigger of its own'
                f"{_did_you_mean(row.trigger.rule, own)}"
            )
    reserved = {"outcome", "no_parse", "bounds", "timeout"}
    for row in resolved.rule:
        if row.name in reserved:
            raise RewardError(f'{path}: rule "{row.name}": this name is a component of every set; choose another')
