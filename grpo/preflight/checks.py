"""Check a run before it starts: is the reward sound, does a hack pay, which rules fire, what does the data look like?

Needs neither a model nor torch: the reward set is enumerated, and blind policies are scored on the training cases with
the oversampling of the config. `grpo preflight` prints the result; `grpo.train` refuses unsound runs.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grpo.cases import load_cases, oversampled_indices
from grpo.config import Config
from grpo.data.split import normalized_text
from grpo.policy.memory_plan import ModelShape, RunPlan, make_plan, read_shape
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards import Overlong, Reward, RewardError, load_reward
from rewards.blind_policies import PolicyReport, WeightedCase, check_accuracy, expected_rewards
from rewards.proof import Invariant, Proof, prove
from rewards.rule_audit import Counts, RuleAudit, audit_rules, rules_without_effect
from rewards.schema import ExampleCase
from rewards.set_files import load_set
from rewards.types import LEVELS

HONEST_ACCURACY = 0.7
"""Accuracy of the honest policy, which no blind policy may beat; its errors are one level off."""
MAX_TIMED_OUT = 20
"""After this many timeouts the remaining training cases are not checked, because each timeout costs the full limit."""


@dataclass(frozen=True, slots=True)
class PreflightInputs:
    """Everything the checks need, read from files."""

    reward: Reward
    examples: tuple[ExampleCase, ...]
    """Example cases in the reward's file."""
    cases: tuple[Case, ...] | None
    """Training cases; None if they were not requested or cannot be read."""
    sets: Mapping[str, tuple[Case, ...]]
    """Evaluation sets by name, without those that cannot be read."""
    shape: ModelShape | None
    file_errors: tuple[str, ...]
    """One line per case file that cannot be used."""
    dropped_rows: tuple[str, ...]
    """One line per reason for which rows or values of a case file were dropped."""


@dataclass(frozen=True, slots=True)
class PatternTimeouts:
    """Training cases on which a pattern times out. All their completions get the floor, so they give no gradient."""

    ids: tuple[str, ...]
    looked_at: int
    """Number of training cases checked: all, or those up to the last of `MAX_TIMED_OUT` ids."""

    @property
    def given_up(self) -> bool:
        return len(self.ids) >= MAX_TIMED_OUT

    def __str__(self) -> str:
        share = len(self.ids) / self.looked_at
        first = "the first " if self.given_up else ""
        more = " and others" if len(self.ids) > 3 else ""
        return (
            f"patterns time out on {len(self.ids)} of {first}{self.looked_at:,} training cases ({share:.1%}), "
            f"whose completions all get the floor: {', '.join(self.ids[:3])}{more}"
        )


@dataclass(frozen=True, slots=True)
class TrainEvalOverlap:
    """Cases of an evaluation set that are also training cases."""

    name: str
    same_id: tuple[str, ...]
    same_text: tuple[tuple[str, str], ...]
    """(training id, evaluation id) of texts that are equal except for letter case and blanks."""


@dataclass(frozen=True, slots=True)
class DataAudit:
    """Statistics of the training cases."""

    levels: Counts
    """Cases by gold level 1 to 5."""
    stream: Counts
    """The same for one epoch, after oversampling."""
    duplicates: tuple[tuple[str, ...], ...]
    """Ids of training cases with the same text."""
    contradictions: tuple[tuple[str, ...], ...]
    """Those whose gold levels differ."""
    overlaps: tuple[TrainEvalOverlap, ...]
    """One entry per evaluation set with an overlap."""


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """The results of all checks."""

    proof: Proof
    failing_examples: tuple[str, ...]
    """One line per example case whose score differs from the expected one."""
    dead_rules: tuple[str, ...]
    """Rules that cannot change an advantage on any possible case."""
    policies: PolicyReport | None
    """None without training cases, or if too many of them time out."""
    rules: tuple[RuleAudit, ...] | None
    """None under the same conditions as ``policies``."""
    timeouts: PatternTimeouts | None
    """None without training cases."""
    data: DataAudit | None
    """None without training cases."""
    plan: RunPlan
    file_errors: tuple[str, ...]
    dropped_rows: tuple[str, ...]
    not_checked: tuple[str, ...]
    """Checks that were skipped because a case file cannot be read."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons why this run should not start, one line each; empty if it is sound."""
        beaten = self.policies.policies_that_beat_honest if self.policies else ()
        means = {policy.policy: policy.mean for policy in self.policies.ranked} if self.policies else {}
        honest = self.policies.honest if self.policies else None
        return (
            *(_broken(invariant) for invariant in self.proof.violations),
            *(f"example {line}" for line in self.failing_examples),
            *([str(self.timeouts)] if self.timeouts and self.timeouts.ids else []),
            *(
                f'the policy "{policy}" earns {means[policy]:+.3f} per completion on these cases, the honest policy '
                f"({honest.policy}) {honest.mean:+.3f}"
                for policy in beaten
                if honest
            ),
        )

    @property
    def sound(self) -> bool:
        """Whether no check found a problem."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """One of "SOUND", "UNSOUND", and "INCOMPLETE" (no problem found, but some checks were skipped)."""
        if not self.sound:
            return "UNSOUND"
        return "INCOMPLETE" if self.not_checked else "SOUND"


def _broken(invariant: Invariant) -> str:
    if invariant.ties:
        return f"{invariant.claim}: a tie of {invariant.better} and {invariant.worse}"
    return f"{invariant.claim}: violated by {invariant.better} against {invariant.worse}"


def load_inputs(config: Config, *, reward_only: bool = False) -> PreflightInputs:
    """Read the inputs of the checks. Unusable case files are recorded in ``file_errors``; ``reward_only`` reads none.

    Raises RewardError for an invalid reward set.
    """
    resolved, _ = load_set(config.reward.set)
    file_errors: list[str] = []
    dropped_rows: list[str] = []
    cases: tuple[Case, ...] | None = None
    sets: dict[str, tuple[Case, ...]] = {}
    if not reward_only:
        cases = _load(config, config.cases.train, file_errors, dropped_rows)
        for name, file in (config.evaluate.before_and_after | config.evaluate.periodic).items():
            members = _load(config, file, file_errors, dropped_rows)
            if members is not None:
                sets[name] = members
    return PreflightInputs(
        reward=load_reward(config.reward.set),
        examples=resolved.case,
        cases=cases,
        sets=sets,
        shape=read_shape(config.model.name),
        file_errors=tuple(file_errors),
        dropped_rows=tuple(dropped_rows),
    )


def _load(config: Config, file: str, file_errors: list[str], dropped_rows: list[str]) -> tuple[Case, ...] | None:
    try:
        loaded = load_cases(config.cases.format, file, strict=config.cases.strict)
        dropped_rows += [f"{file}: {note}" for note in loaded.notes]
        return loaded.cases
    except UserError as error:
        file_errors.append(str(error))
        return None


def run_checks(config: Config, inputs: PreflightInputs, *, accuracy: float = HONEST_ACCURACY) -> PreflightResult:
    """Run the proof, the blind policies, the audits and the memory plan; a pure function of its arguments.

    Args:
        config: the config of the run.
        inputs: from `load_inputs`; without cases the blind policies and audits are skipped.
        accuracy: accuracy of the honest policy, in (0, 1].

    Raises RewardError if the accuracy is outside (0, 1], or if a code rule fails.
    """
    check_accuracy(accuracy)
    reward, cases, oversample = inputs.reward, inputs.cases, config.cases.oversample
    weighted = [
        WeightedCase(case.id, case.text, case.gold_level, float(oversample.get(case.gold_level, 1)))
        for case in cases or ()
    ]
    longest = max((len(case.text.encode("utf-8", "surrogatepass")) for case in cases or ()), default=None)
    timeouts = find_timeouts(reward, cases) if cases else None
    probed = weighted if timeouts and not timeouts.given_up else []
    return PreflightResult(
        proof=prove(reward, overlong=overlong_settings(config)),
        failing_examples=tuple(line for example in inputs.examples if (line := example_mismatch(reward, example))),
        dead_rules=rules_without_effect(reward),
        policies=expected_rewards(reward, merge_equivalent_cases(reward, probed), accuracy=accuracy)
        if probed
        else None,
        rules=audit_rules(reward, probed) if probed else None,
        timeouts=timeouts,
        data=audit_data(cases, oversample, inputs.sets) if cases else None,
        plan=make_plan(config, inputs.shape, longest),
        file_errors=inputs.file_errors,
        dropped_rows=inputs.dropped_rows,
        not_checked=_unchecked(config, inputs),
    )


def overlong_settings(config: Config) -> Overlong | None:
    """Return the soft overlong penalty of the config, or None."""
    section = config.reward.overlong
    return Overlong(section.cache_tokens, section.penalty) if section else None


def find_timeouts(reward: Reward, cases: Sequence[Case]) -> PatternTimeouts:
    """Return the cases on which a pattern times out; stops after `MAX_TIMED_OUT` of them, to bound the time."""
    timed_out = ((number, case.id) for number, case in enumerate(cases, 1) if reward.matches(case.text) is None)
    first = list(itertools.islice(timed_out, MAX_TIMED_OUT))
    looked_at = first[-1][0] if len(first) == MAX_TIMED_OUT else len(cases)
    return PatternTimeouts(tuple(case_id for _, case_id in first), looked_at)


def _unchecked(config: Config, inputs: PreflightInputs) -> tuple[str, ...]:
    if not inputs.file_errors:
        return ()
    training = ["blind policies, rules, data: no training cases"] if inputs.cases is None else []
    missing = [name for name in config.evaluate.before_and_after | config.evaluate.periodic if name not in inputs.sets]
    return (*training, *([f"overlap of the training cases with {', '.join(missing)}"] if missing else []))


def require_sound_reward(config: Config, result: PreflightResult) -> None:
    """Raise `UserError` if the run is unsound, unless ``reward.allow_unsound`` is set."""
    if result.sound or config.reward.allow_unsound:
        return
    raise UserError(
        f'reward "{config.reward.set}" is refused for this run:\n'
        + "".join(f"  - {reason}\n" for reason in result.problems)
        + "`grpo preflight` with the same config shows the whole table. Change the reward or the oversampling, "
        'or set reward.allow_unsound = true and reward.unsound_reason = "..." to train anyway'
    )


def merge_equivalent_cases(reward: Reward, cases: Sequence[WeightedCase]) -> list[WeightedCase]:
    """Merge cases that score alike, those of one gold level on which the same triggers fire, into the first with their
    summed weight. Nothing is merged if the reward has code rules, which may read anything.

    >>> rows = [("a", "Refill.", 5, 1.0), ("b", "Rash.", 5, 2.0), ("c", "Rash.", 4, 1.0)]
    >>> cases = [WeightedCase(*row) for row in rows]
    >>> [(case.id, case.weight) for case in merge_equivalent_cases(load_reward("v49"), cases)]
    [('a', 3.0), ('c', 1.0)]
    """
    if any(rule.function for rule in reward.rules):
        return list(cases)
    alike: dict[tuple[int, tuple[bool, ...] | None], list[WeightedCase]] = defaultdict(list)
    for case in cases:
        spans = reward.matches(case.text)
        alike[case.gold, None if spans is None else tuple(span is not None for span in spans)].append(case)
    return [replace(group[0], weight=math.fsum(case.weight for case in group)) for group in alike.values()]


def example_mismatch(reward: Reward, example: ExampleCase) -> str | None:
    """Describe how the score of an example case differs from the expected one; None if it does not."""
    try:
        score = reward.score(
            text=example.text,
            gold=example.gold,
            completion=example.completion,
            thinking=example.thinking,
            finished=example.finished,
            case_id=example.name,
        )
    except RewardError as error:
        return f'"{example.name}": {error}'
    parts = {name: value for name, value in score.parts.items() if abs(value) > 1e-9}
    actual, expected = ({"total": score.total} | parts), ({"total": example.total} | example.parts)
    same = actual.keys() == expected.keys() and all(
        math.isclose(actual[key], expected[key], abs_tol=1e-9) for key in actual
    )
    if same and score.answer.reason == example.reason:
        return None
    return (
        f'"{example.name}": expected {example.total:+g} from {example.parts}, {example.reason}; '
        f"got {score.total:+g} from {parts}, {score.answer.reason}"
    )


def audit_data(cases: Sequence[Case], oversample: Mapping[int, int], sets: Mapping[str, Sequence[Case]]) -> DataAudit:
    """Count levels, repeated texts, and the overlap with evaluation sets; letter case and blanks are ignored.

    >>> cases = [Case("a", "Chest pain.", 2), Case("b", "chest  pain.", 3)]
    >>> audit = audit_data(cases, {2: 3}, {"test": [Case("a", "Rash.", 5)]})
    >>> audit.levels, audit.stream, audit.contradictions
    ((0, 1, 1, 0, 0), (0, 3, 1, 0, 0), (('a', 'b'),))
    >>> audit.overlaps
    (TrainEvalOverlap(name='test', same_id=('a',), same_text=()),)
    """
    of_text: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        of_text[normalized_text(case.text)].append(case)
    repeated = [group for group in of_text.values() if len(group) > 1]
    ids = {case.id for case in cases}
    overlaps = (
        TrainEvalOverlap(
            name,
            tuple(case.id for case in members if case.id in ids),
            tuple(
                (of_text[text][0].id, case.id) for case in members if (text := normalized_text(case.text)) in of_text
            ),
        )
        for name, members in sets.items()
    )
    return DataAudit(
        levels=_by_level([case.gold_level for case in cases]),
        stream=_by_level([cases[index].gold_level for index in oversampled_indices(cases, oversample)]),
        duplicates=tuple(tuple(case.id for case in group) for group in repeated),
        contradictions=tuple(
            tuple(c.id for c in group) for group in repeated if len({c.gold_level for c in group}) > 1
        ),
        overlaps=tuple(overlap for overlap in overlaps if overlap.same_id or overlap.same_text),
    )


def _by_level(golds: Sequence[int]) -> Counts:
    esi_1, esi_2, esi_3, esi_4, esi_5 = (golds.count(level) for level in LEVELS)
    return esi_1, esi_2, esi_3, esi_4, esi_5
