"""Before a run: is its reward sound, does any hack pay, what do its rules and its cases look like, what will it cost?

No model and no torch: the reward set is enumerated, blind policies are scored on the run's own training cases with
the config's oversampling, and the plan is arithmetic. `grpo preflight` prints this, `grpo.train` refuses by it.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grpo.cases import load, stream
from grpo.config import Config
from grpo.policy.memory_plan import Plan, Shape, make_plan, read_shape
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards import Overlong, Reward, RewardError, load_reward
from rewards.blind_policies import PolicyReport, WeightedCase, check_accuracy, expected_rewards
from rewards.proof import Invariant, Proof, prove
from rewards.rule_audit import Counts, RuleAudit, audit_rules, never_matter
from rewards.schema import ExampleCase
from rewards.set_files import load_set
from rewards.types import LEVELS

HONEST = 0.7
"""Share of exact answers of the policy that no hack may beat; its errors are one level off."""
MOST_TIMED_OUT = 20
"""Training cases on which a pattern may run out of time; then the others are left alone. Each costs the whole limit."""


@dataclass(frozen=True, slots=True)
class Material:
    """What an examination looks at, read from files once."""

    reward: Reward
    examples: tuple[ExampleCase, ...]
    """The cases that the reward's own file brings along."""
    cases: tuple[Case, ...] | None
    """Training cases; None if they were not asked for or could not be read."""
    sets: Mapping[str, tuple[Case, ...]]
    """Evaluation sets by name; those that could not be read are missing."""
    shape: Shape | None
    faults: tuple[str, ...]
    """One line for each case file that cannot be used."""
    left_out: tuple[str, ...]
    """One line for each reason for which rows of a case file, or values of theirs, were left out."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Training cases on which a pattern runs out of time: every completion of theirs gets the floor, so they teach
    nothing and cost the pattern's whole limit."""

    ids: tuple[str, ...]
    looked_at: int
    """All training cases, or those up to the last of `MOST_TIMED_OUT` ids."""

    @property
    def given_up(self) -> bool:
        return len(self.ids) >= MOST_TIMED_OUT

    def __str__(self) -> str:
        share = len(self.ids) / self.looked_at
        first = "the first " if self.given_up else ""
        more = " and others" if len(self.ids) > 3 else ""
        return (
            f"patterns run out of time on {len(self.ids)} of {first}{self.looked_at:,} training cases ({share:.1%}), "
            f"whose completions all get the floor: {', '.join(self.ids[:3])}{more}"
        )


@dataclass(frozen=True, slots=True)
class Overlap:
    """Cases of an evaluation set that training sees too."""

    name: str
    same_id: tuple[str, ...]
    same_text: tuple[tuple[str, str], ...]
    """(training id, evaluation id) of equal texts, case and blanks aside."""


@dataclass(frozen=True, slots=True)
class DataAudit:
    """What the training cases look like as a whole."""

    levels: Counts
    """Cases by gold level 1 to 5."""
    stream: Counts
    """The same after oversampling: one epoch."""
    duplicates: tuple[tuple[str, ...], ...]
    """Ids of training cases that share one text."""
    contradictions: tuple[tuple[str, ...], ...]
    """Those of them whose gold levels differ."""
    overlaps: tuple[Overlap, ...]
    """One entry an evaluation set that repeats something."""


@dataclass(frozen=True, slots=True)
class Examination:
    """All that can be said about a run before its first weight is read."""

    proof: Proof
    failing_examples: tuple[str, ...]
    """One line for each example case of the reward's file that scores otherwise than the file says."""
    dead_rules: tuple[str, ...]
    """Rules that could not change an advantage on any case whatever."""
    policies: PolicyReport | None
    """None without training cases, and where too many of them run out of time."""
    rules: tuple[RuleAudit, ...] | None
    """None as ``policies`` is."""
    timeouts: Timeouts | None
    """None without training cases."""
    data: DataAudit | None
    """None without training cases."""
    plan: Plan
    faults: tuple[str, ...]
    left_out: tuple[str, ...]
    unchecked: tuple[str, ...]
    """What should have been looked at and could not be, for want of a case file."""

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why this run should not start, one line a reason; empty for a sound one."""
        beaten = self.policies.beaten_by if self.policies else ()
        means = {one.policy: one.mean for one in self.policies.ranked} if self.policies else {}
        honest = self.policies.honest if self.policies else None
        return (
            *(_broken(invariant) for invariant in self.proof.violations),
            *(f"example {line}" for line in self.failing_examples),
            *([str(self.timeouts)] if self.timeouts and self.timeouts.ids else []),
            *(
                f'the policy "{policy}" earns {means[policy]:+.3f} a completion on these cases, the honest policy '
                f"({honest.policy}) {honest.mean:+.3f}"
                for policy in beaten
                if honest
            ),
        )

    @property
    def sound(self) -> bool:
        """Nothing that was looked at speaks against the run."""
        return not self.refusals

    @property
    def verdict(self) -> str:
        """ "SOUND", "UNSOUND", or "INCOMPLETE": sound as far as it was looked at, which is not far enough."""
        if not self.sound:
            return "UNSOUND"
        return "INCOMPLETE" if self.unchecked else "SOUND"


def _broken(invariant: Invariant) -> str:
    if invariant.ties:
        return f"{invariant.claim}: a tie of {invariant.better} and {invariant.worse}"
    return f"{invariant.claim}: not so for {invariant.better} against {invariant.worse}"


def gather(config: Config, *, reward_only: bool = False) -> Material:
    """Reads what an examination needs. Case files that cannot be used become ``faults``; ``reward_only`` reads none.

    Raises RewardError for a reward set that cannot be used.
    """
    resolved, _ = load_set(config.reward.set)
    faults: list[str] = []
    left_out: list[str] = []
    cases: tuple[Case, ...] | None = None
    sets: dict[str, tuple[Case, ...]] = {}
    if not reward_only:
        cases = _load(config, config.cases.train, faults, left_out)
        for name, file in (config.evaluate.ends | config.evaluate.during).items():
            members = _load(config, file, faults, left_out)
            if members is not None:
                sets[name] = members
    return Material(
        reward=load_reward(config.reward.set),
        examples=resolved.case,
        cases=cases,
        sets=sets,
        shape=read_shape(config.model.name),
        faults=tuple(faults),
        left_out=tuple(left_out),
    )


def _load(config: Config, file: str, faults: list[str], left_out: list[str]) -> tuple[Case, ...] | None:
    try:
        loaded = load(config.cases.format, file, strict=config.cases.strict)
        left_out += [f"{file}: {finding}" for finding in loaded.report.findings]
        return loaded.cases
    except UserError as error:
        faults.append(str(error))
        return None


def examine(config: Config, material: Material, *, accuracy: float = HONEST) -> Examination:
    """The proof, the probes, the audits and the plan of a run; pure in its arguments.

    Args:
        config: the run.
        material: from `gather`; without cases there are neither probes nor audits.
        accuracy: share of exact answers, in (0, 1], of the honest policy that no other may beat.

    Raises RewardError for an accuracy outside (0, 1], and for a rule of code that fails.
    """
    check_accuracy(accuracy)
    reward, cases, oversample = material.reward, material.cases, config.cases.oversample
    weighted = [WeightedCase(case.id, case.text, case.esi, float(oversample.get(case.esi, 1))) for case in cases or ()]
    longest = max((len(case.text.encode("utf-8", "surrogatepass")) for case in cases or ()), default=None)
    timeouts = find_timeouts(reward, cases) if cases else None
    probed = weighted if timeouts and not timeouts.given_up else []
    return Examination(
        proof=prove(reward, overlong=length_term(config)),
        failing_examples=tuple(line for example in material.examples if (line := failing(reward, example))),
        dead_rules=never_matter(reward),
        policies=expected_rewards(reward, pooled(reward, probed), accuracy=accuracy) if probed else None,
        rules=audit_rules(reward, probed) if probed else None,
        timeouts=timeouts,
        data=audit_data(cases, oversample, material.sets) if cases else None,
        plan=make_plan(config, material.shape, longest),
        faults=material.faults,
        left_out=material.left_out,
        unchecked=_unchecked(config, material),
    )


def length_term(config: Config) -> Overlong | None:
    """The run's soft overlong penalty, if it has one."""
    section = config.reward.overlong
    return Overlong(section.cache_tokens, section.penalty) if section else None


def find_timeouts(reward: Reward, cases: Sequence[Case]) -> Timeouts:
    """The cases on which a pattern runs out of time; gives up at `MOST_TIMED_OUT` of them, so the time is bounded by
    their limits and not by the file."""
    met = ((number, case.id) for number, case in enumerate(cases, 1) if reward.matches(case.text) is None)
    found = list(itertools.islice(met, MOST_TIMED_OUT))
    looked_at = found[-1][0] if len(found) == MOST_TIMED_OUT else len(cases)
    return Timeouts(tuple(case_id for _, case_id in found), looked_at)


def _unchecked(config: Config, material: Material) -> tuple[str, ...]:
    if not material.faults:
        return ()
    training = ["what blind policies earn, the rules, the data: no training cases"] if material.cases is None else []
    missing = [name for name in config.evaluate.ends | config.evaluate.during if name not in material.sets]
    return (*training, *([f"what training shares with {', '.join(missing)}"] if missing else []))


def check_reward(config: Config, examination: Examination) -> None:
    """Raises `UserError` for a refused run, unless the config allows it and says why."""
    if examination.sound or config.reward.allow_unsound:
        return
    raise UserError(
        f'reward "{config.reward.set}" is refused for this run:\n'
        + "".join(f"  - {reason}\n" for reason in examination.refusals)
        + "python -m grpo preflight with the same config shows the whole table. Change the reward or the oversampling, "
        'or set reward.allow_unsound = true and reward.reason = "..." to train all the same'
    )


def pooled(reward: Reward, cases: Sequence[WeightedCase]) -> list[WeightedCase]:
    """Fewer cases with the same expectations: those of one gold level on which the same triggers fire score alike, so
    the first stands for all with their summed weight. A rule of code may read anything: then no case is dropped.

    >>> rows = [("a", "Refill.", 5, 1.0), ("b", "Rash.", 5, 2.0), ("c", "Rash.", 4, 1.0)]
    >>> [(case.id, case.weight) for case in pooled(load_reward("v49"), [WeightedCase(*row) for row in rows])]
    [('a', 3.0), ('c', 1.0)]
    """
    if any(rule.function for rule in reward.rules):
        return list(cases)
    alike: dict[tuple[int, tuple[bool, ...] | None], list[WeightedCase]] = defaultdict(list)
    for case in cases:
        found = reward.matches(case.text)
        alike[case.gold, None if found is None else tuple(span is not None for span in found)].append(case)
    return [replace(group[0], weight=math.fsum(case.weight for case in group)) for group in alike.values()]


def failing(reward: Reward, example: ExampleCase) -> str | None:
    """How an example case of a set's file scores otherwise than it says, or None."""
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
    got, wanted = ({"total": score.total} | parts), ({"total": example.total} | example.parts)
    same = got.keys() == wanted.keys() and all(math.isclose(got[key], wanted[key], abs_tol=1e-9) for key in got)
    if same and score.answer.reason == example.reason:
        return None
    return (
        f'"{example.name}": expected {example.total:+g} from {example.parts}, {example.reason}; '
        f"got {score.total:+g} from {parts}, {score.answer.reason}"
    )


def audit_data(cases: Sequence[Case], oversample: Mapping[int, int], sets: Mapping[str, Sequence[Case]]) -> DataAudit:
    """Level mix, repeated texts, and what training shares with an evaluation set.

    Two texts are equal if they differ in nothing but upper and lower case and blanks. Empty fields cannot occur: the
    loader refuses them.

    >>> cases = [Case("a", "Chest pain.", 2), Case("b", "chest  pain.", 3)]
    >>> audit = audit_data(cases, {2: 3}, {"test": [Case("a", "Rash.", 5)]})
    >>> audit.levels, audit.stream, audit.contradictions
    ((0, 1, 1, 0, 0), (0, 3, 1, 0, 0), (('a', 'b'),))
    >>> audit.overlaps
    (Overlap(name='test', same_id=('a',), same_text=()),)
    """
    of_text: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        of_text[plain(case.text)].append(case)
    repeated = [group for group in of_text.values() if len(group) > 1]
    ids = {case.id for case in cases}
    overlaps = (
        Overlap(
            name,
            tuple(case.id for case in members if case.id in ids),
            tuple((of_text[text][0].id, case.id) for case in members if (text := plain(case.text)) in of_text),
        )
        for name, members in sets.items()
    )
    return DataAudit(
        levels=_by_level([case.esi for case in cases]),
        stream=_by_level([cases[index].esi for index in stream(cases, oversample)]),
        duplicates=tuple(tuple(case.id for case in group) for group in repeated),
        contradictions=tuple(tuple(c.id for c in group) for group in repeated if len({c.esi for c in group}) > 1),
        overlaps=tuple(overlap for overlap in overlaps if overlap.same_id or overlap.same_text),
    )


def plain(text: str) -> str:
    """A text without what nobody would call a difference: letter case and runs of blanks."""
    return " ".join(text.casefold().split())


def _by_level(golds: Sequence[int]) -> Counts:
    one, two, three, four, five = (golds.count(level) for level in LEVELS)
    return one, two, three, four, five
