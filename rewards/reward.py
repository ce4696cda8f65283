"""Load a reward set and score completions with it."""

import hashlib
import importlib
import itertools
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from rewards.parse import parse_answer
from rewards.rules import (
    NumberTrigger,
    PatternTimeout,
    PatternTrigger,
    Rule,
    RuleFunction,
    Trigger,
    find_trigger,
    levels,
)
from rewards.schema import NumberRow, PatternRow, ResolvedSet, RuleRow, SameRow
from rewards.set_files import load_set
from rewards.table import Table, score_parts, total
from rewards.types import LARGEST, LEVELS, FiredRule, RewardError, RuleInput, Score, Span

CACHED_TEXTS = 4096
"""Number of case texts whose trigger matches are cached. Timeouts are all cached, by hash."""
MAX_TRIGGERS = 12
"""Limit of distinct triggers of the rules for one gold level: floor and proof enumerate 2^n combinations."""

TriggerMatches = tuple[Span | None, ...] | None
"""One entry per distinct trigger, or None if a pattern timed out."""


@dataclass(frozen=True, slots=True)
class Reward:
    """One reward, immutable; created by `load_reward`."""

    name: str
    about: str
    sha256: str
    """Hash of everything that can change a score; grades, sources and example cases do not."""
    components: tuple[str, ...]
    """Keys of ``Score.parts``: outcome, no_parse, the rules in the order of the set, bounds, overlong, timeout."""
    rules: tuple[Rule, ...]
    table: Table
    formats: tuple[str, ...]
    floor: float
    """Least total over every gold level, outcome and combination of triggers, without a length term."""
    triggers: tuple[Trigger, ...]
    """The distinct triggers of the rules."""
    matches: Callable[[str], TriggerMatches]
    """Case text → the match of each distinct trigger. A timeout is not paid twice."""

    def score(
        self,
        *,
        text: str,
        gold: int,
        completion: str,
        thinking: bool,
        finished: bool,
        case_id: str,
        length_penalty: float = 0.0,
    ) -> Score:
        """Return the reward of one completion: total = fsum(parts), with the parts of `rewards.table.score_parts` and
        ``overlong`` = length_penalty.

        Args:
            text: the case as the policy read it; triggers search only here.
            gold: ESI level, 1 to 5.
            completion: the decoded text.
            thinking: whether the prompt opened ``<think>``.
            finished: False if the completion was truncated. A truncated completion that parses is scored as parsed;
                one without an answer is a no-parse like any other.
            case_id: used in errors instead of the text.
            length_penalty: the value of `rewards.overlong` for this completion, <= 0; added after the bounds.

        If a pattern times out, *every* completion of the case gets the floor, whatever its answer and length: a group
        that cannot be judged has equal rewards and gives no gradient.

        Raises RewardError for an invalid gold level or length penalty, and for a code rule that fails or returns a
        value outside its range.

        >>> v49 = load_reward("v49")
        >>> score = v49.score(text="Arrived intubated.", gold=1, completion="ANSWER: ESI 1", thinking=False,
        ...                   finished=True, case_id="c1")
        >>> score.total, {name: part for name, part in score.parts.items() if part}
        (1.5, {'outcome': 1.0, 'lifesaving_obeyed': 0.5})
        """
        if gold not in LEVELS:
            raise RewardError(f'case "{case_id}": expected a gold ESI level from 1 to 5, got {gold!r}')
        if not -LARGEST <= length_penalty <= 0:
            raise RewardError(f'case "{case_id}": expected a length_penalty <= 0, got {length_penalty}')
        answer = parse_answer(completion, thinking=thinking, formats=self.formats)
        spans = self.matches(text)
        if spans is None:
            parts = dict.fromkeys(self.components, 0.0) | {"timeout": self.floor}
            return Score(self.floor, MappingProxyType(parts), answer, (), True)
        fired: tuple[FiredRule, ...] = ()
        if answer.level is not None:
            view = RuleInput(text, gold, answer.level, completion, finished)
            fired = tuple(
                FiredRule(rule.name, self._span(rule, spans), _value(rule, view, case_id))
                for rule in self.rules
                if rule.concerns(gold, answer.level) and (rule.trigger is None or self._span(rule, spans) is not None)
            )
        error = None if answer.level is None else answer.level - gold
        stacked = score_parts(self.table, error, {match.rule: match.value for match in fired})
        parts = dict.fromkeys(self.components, 0.0) | stacked | {"overlong": length_penalty}
        return Score(total(parts), MappingProxyType(parts), answer, fired, False)

    def applies(self, rule_name: str, text: str, gold: int) -> bool:
        """Return whether the rule applies to this case: its gold condition holds and its trigger fires.

        False if a pattern timed out. Raises RewardError if no rule has this name.
        """
        rule = self.rule(rule_name)
        if gold not in rule.gold:
            return False
        spans = self.matches(text)
        return spans is not None and (rule.trigger is None or self._span(rule, spans) is not None)

    def rule(self, name: str) -> Rule:
        """Return the rule of that name. Raises RewardError if there is none."""
        for rule in self.rules:
            if rule.name == name:
                return rule
        names = ", ".join(rule.name for rule in self.rules) or "none"
        raise RewardError(f'{self.name}: there is no rule "{name}"; the rules are {names}')

    def _span(self, rule: Rule, spans: tuple[Span | None, ...]) -> Span | None:
        return None if rule.trigger is None else spans[self.triggers.index(rule.trigger)]


def load_reward(name_or_path: str | Path) -> Reward:
    """Load the reward of a shipped set or of a file.

    Args:
        name_or_path: a shipped name ("v45c", "v46", "v48", "v49", "v50"), a path ending in ``.toml``, or a path ending
            in ``.json`` with the output of `dump_reward`.

    The functions of code rules are imported here: a set is trusted like code, so load only files you would run.

    Raises RewardError with file, row and key.

    >>> load_reward("v49").components[:3]
    ('outcome', 'no_parse', 'lifesaving_obeyed')
    """
    resolved, path = load_set(name_or_path)
    rows = {row.name: row for row in resolved.rule}
    rules = tuple(_rule(row, rows, path) for row in resolved.rule)
    table = Table(
        by_error=MappingProxyType({error: row.value for row in resolved.base.values() for error in row.errors}),
        no_parse=resolved.no_parse.value,
        penalties=resolved.stacking.penalties,
        bonuses=resolved.stacking.bonuses,
        low=resolved.bounds.low if resolved.bounds else -math.inf,
        high=resolved.bounds.high if resolved.bounds else math.inf,
    )
    for gold in LEVELS:
        if len(triggers_for(rules, gold)) > MAX_TRIGGERS:
            raise RewardError(
                f"{path}: rules for gold {gold} have more than {MAX_TRIGGERS} distinct triggers; merge some patterns"
            )
    return Reward(
        name=resolved.name,
        about=resolved.about,
        sha256=_content_hash(resolved, rules),
        components=("outcome", "no_parse", *(rule.name for rule in rules), "bounds", "overlong", "timeout"),
        rules=rules,
        table=table,
        formats=resolved.answer.formats,
        floor=_floor(table, rules),
        triggers=(triggers := tuple(dict.fromkeys(rule.trigger for rule in rules if rule.trigger))),
        matches=_matcher(triggers, resolved.pattern_timeout_s),
    )


def dump_reward(name_or_path: str | Path) -> dict[str, object]:
    """Return the resolved set as a JSON object, with extensions applied and example cases included. `load_reward` reads
    the same reward, with the same hash, from a ``.json`` file with this content.

    A code rule is stored as its name and range: for the hash to agree, its module must exist unchanged.

    Raises RewardError as `load_reward` does.

    >>> sorted(dump_reward("v46"))[:5], dump_reward("v49")["no_parse"]["value"]
    (['about', 'answer', 'base', 'bounds', 'case'], -2.0)
    """
    return load_set(name_or_path)[0].model_dump(mode="json")


def triggers_for(rules: tuple[Rule, ...], gold: int) -> tuple[Trigger, ...]:
    """Return the distinct triggers of the rules for this gold level, in the order of the rules."""
    return tuple(dict.fromkeys(rule.trigger for rule in rules if rule.trigger and gold in rule.gold))


def modifier_bounds(
    rules: tuple[Rule, ...], gold: int, predicted: int, firing: frozenset[Trigger]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the least and the greatest value of each rule that applies when exactly these triggers fire."""
    applying = [
        rule for rule in rules if rule.concerns(gold, predicted) and (rule.trigger is None or rule.trigger in firing)
    ]
    return {rule.name: rule.low for rule in applying}, {rule.name: rule.high for rule in applying}


def trigger_subsets(triggers: tuple[Trigger, ...]) -> list[frozenset[Trigger]]:
    """Return every subset of the triggers, smallest first; triggers are treated as independent."""
    return [frozenset(subset) for size in range(len(triggers) + 1) for subset in itertools.combinations(triggers, size)]


def _floor(table: Table, rules: tuple[Rule, ...]) -> float:
    committed = (
        total(score_parts(table, predicted - gold, modifier_bounds(rules, gold, predicted, firing)[0]))
        for gold in LEVELS
        for firing in trigger_subsets(triggers_for(rules, gold))
        for predicted in LEVELS
    )
    return min(total(score_parts(table, None, {})), *committed)


def _matcher(triggers: tuple[Trigger, ...], timeout_s: float) -> Callable[[str], TriggerMatches]:
    # timeouts are cached too, so that all completions of a case are judged alike and only one waits
    timed_out: set[bytes] = set()

    @lru_cache(maxsize=CACHED_TEXTS)
    def search(text: str) -> tuple[Span | None, ...]:
        return tuple(find_trigger(trigger, text, timeout_s=timeout_s) for trigger in triggers)

    def matches(text: str) -> TriggerMatches:
        if timed_out and _digest(text) in timed_out:
            return None
        try:
            return search(text)
        except PatternTimeout:
            timed_out.add(_digest(text))
            return None

    return matches


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _rule(row: RuleRow, rows: Mapping[str, RuleRow], path: Path) -> Rule:
    low, high = row.range or (row.value or 0.0, row.value or 0.0)
    return Rule(
        name=row.name,
        grade=row.grade,
        source=row.source,
        trigger=_trigger(rows[row.trigger.rule] if isinstance(row.trigger, SameRow) else row),
        gold=levels(row.gold),
        predicted=levels(row.predicted),
        value=row.value,
        low=float(low),
        high=float(high),
        function=_function(row, path) if row.function else None,
        function_name=row.function,
    )


def _trigger(row: RuleRow) -> Trigger | None:
    match row.trigger:
        case PatternRow(pattern=pattern, unless=unless):
            return PatternTrigger(pattern, unless)
        case NumberRow(patterns=patterns, unless=unless) as number:
            return NumberTrigger(patterns, number.at_least, number.at_most, number.which, unless)
    return None


def _function(row: RuleRow, path: Path) -> RuleFunction:
    module_name, _, name = (row.function or "").partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # importing runs the module, which may raise anything or exit
        raise RewardError(
            f'{path}: rule "{row.name}".function: cannot import "{row.function}": {type(error).__name__}: {error}'
        ) from error
    if not callable(function):
        raise RewardError(f'{path}: rule "{row.name}".function: "{row.function}" is not a function')
    return function


def _value(rule: Rule, view: RuleInput, case_id: str) -> float:
    if rule.function is None:
        return rule.low
    try:
        value = rule.function(view)
    except (Exception, SystemExit) as error:
        # the message of the exception may quote the case, so only its location is reported
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f'rule "{rule.name}" ({rule.function_name}) raised {type(error).__name__} at {Path(frame.filename).name}:'
            f'{frame.lineno} on case "{case_id}"; a rule must return a number for every case'
        ) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not rule.low <= value <= rule.high:
        number = value if isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST) else None
        raise RewardError(
            f'rule "{rule.name}" ({rule.function_name}) must return a number in [{rule.low}, {rule.high}], got '
            f'{type(value).__name__ if number is None else number} on case "{case_id}"'
        )
    return float(value)


def _content_hash(resolved: ResolvedSet, rules: tuple[Rule, ...]) -> str:
    content: Mapping[str, object] = {
        "base": sorted((error, row.value) for row in resolved.base.values() for error in row.errors),
        "no_parse": resolved.no_parse.value,
        "stacking": (resolved.stacking.penalties, resolved.stacking.bonuses),
        "bounds": (resolved.bounds.low, resolved.bounds.high) if resolved.bounds else None,
        "formats": resolved.answer.formats,
        "pattern_timeout_s": resolved.pattern_timeout_s,
        "rules": [
            [rule.name, rule.function_name, rule.low, rule.high, sorted(rule.gold), sorted(rule.predicted)]
            for rule in rules
        ],
        "triggers": [asdict(rule.trigger) if rule.trigger else None for rule in rules],
        "code": [_source_hash(rule.function, rule.function_name or "") for rule in rules if rule.function],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source_hash(function: RuleFunction, name: str) -> str:
    """Return the sha256 of a code rule's file: editing a rule gives another reward."""
    module = sys.modules.get(getattr(function, "__module__", None) or "") or sys.modules.get(name.partition(":")[0])
    file = getattr(module, "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except OSError as error:
        raise RewardError(f'rule of code "{name}": cannot read its source {file}: {error.strerror}') from None
