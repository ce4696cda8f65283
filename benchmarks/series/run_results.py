"""A finished run of the lab → its figures: rates before and after by mode, curves, the answers to pool over seeds."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from grpo.cases import load_jsonl_cases
from grpo.evaluation.metrics import RATES, RateTest
from grpo.evaluation.statistics import clustered_wilson, mcnemar
from grpo.inspection.run_reader import Metrics, RunRecord, read_run
from grpo.run.ledger import read_step, recorded_steps
from grpo.runtime.errors import UserError

MODES = ("on", "off")
Interval = tuple[float, float]
Place = tuple[str, str]
"""(set, thinking)."""


@dataclass(frozen=True, slots=True)
class Said:
    """One answer."""

    case: str
    gold: int
    level: int | None
    finished: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """One finished run."""

    name: str
    seed: int
    before: Mapping[Place, Mapping[str, float]]
    """Rates of its warm start; see `rates`."""
    after: Mapping[Place, Mapping[str, float]]
    metrics: tuple[Metrics, ...]
    """By step."""
    seconds: float = 0.0
    cpu_s: float = 0.0
    answers: Mapping[tuple[str, Place], tuple[Said, ...]] = field(default_factory=dict)
    """("before" or "after", place) → answers in the order of the cases."""

    def curve(self, name: str) -> list[float]:
        """A metric by step; steps without a value are left out."""
        return [value for row in self.metrics if (value := row.get(name)) is not None]


Holds = Callable[[Said], bool | None]


def _rate(holds: RateTest) -> Holds:
    return lambda said: holds(said.gold, said.level)


def _error(error: int) -> Holds:
    return lambda said: said.level is not None and said.level - said.gold == error


def _names(level: int) -> Holds:
    return lambda said: said.level == level


MEASURES: Mapping[str, Holds] = MappingProxyType(
    {
        **{name: _rate(holds) for name, holds in RATES.items()},
        "over_by_one": _error(-1),
        "under_by_one": _error(1),
        **{f"says_{level}": _names(level) for level in range(1, 6)},
        "clipped_ratio": lambda said: not said.finished,
    }
)
"""Rate → whether an answer counts, None where the rate does not speak of its case; those of `grpo.evaluation.metrics`
and a few of the lab's own."""

ROLLED = ("exact", "says_1", "over_by_one", "dangerous_under", "no_parse")
BY_TAG = ("exact", "over_by_one", "dangerous_under")


def rates(answers: Sequence[Said], tags: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Shares of all answers by the names of `MEASURES`, and ``TAG/exact`` and the like over the cases of a tag.

    >>> said = [Said("a", 3, 2, True), Said("b", 1, 1, True)]
    >>> found = rates(said, {"a": ("resources_many",)})
    >>> found["exact"], found["over_by_one"], found["resources_many/over_by_one"]
    (0.5, 0.5, 1.0)
    """
    found = {name: share for name, holds in MEASURES.items() if (share := _share(holds, answers)) is not None}
    for tag in sorted({tag for one in answers for tag in tags.get(one.case, ())}):
        members = [one for one in answers if tag in tags.get(one.case, ())]
        shares = {f"{tag}/{name}": _share(MEASURES[name], members) for name in BY_TAG}
        found |= {name: share for name, share in shares.items() if share is not None}
    return found


def _share(holds: Holds, answers: Iterable[Said]) -> float | None:
    """Of the answers that the rate speaks of; None where there are none."""
    counted = [held for said in answers if (held := holds(said)) is not None]
    return sum(counted) / len(counted) if counted else None


def pooled(
    runs: Sequence[Seen], when: str, places: Sequence[Place], measure: str, members: frozenset[str] | None = None
) -> tuple[float, Interval] | None:
    """A rate over several seeds and places, with the interval of `clustered_wilson`: answers to one case belong
    together, whichever run gave them.

    Args:
        when: "before" or "after".
        members: ids of the cases it is over; None for all.

    None without any answer.
    """
    holds = MEASURES[measure]
    successes: dict[str, int] = {}
    trials: dict[str, int] = {}
    for said in (one for run in runs for place in places for one in run.answers.get((when, place), ())):
        if members is None or said.case in members:
            held = holds(said)
            if held is not None:
                successes[said.case] = successes.get(said.case, 0) + held
                trials[said.case] = trials.get(said.case, 0) + 1
    return clustered_wilson(list(successes.values()), list(trials.values())) if trials else None


def changed(run: Seen, place: Place) -> tuple[int, int, float]:
    """Cases fixed and broken by the run, and McNemar's exact p."""
    pairs = zip(run.answers["before", place], run.answers["after", place], strict=True)
    flips = [(was.level == was.gold, now.level == now.gold) for was, now in pairs]
    fixed, broken = flips.count((False, True)), flips.count((True, False))
    return fixed, broken, mcnemar(fixed, broken)


def read_seen(folder: Path, name: str, seed: int, *, seconds: float, cpu_s: float) -> Seen:
    """What a finished run's folder holds.

    Raises:
        UserError: a damaged folder; a file cut at a line's end is one, whose figures would be over fewer cases.
    """
    run = read_run(folder)
    _require(folder / "metrics.jsonl", len(run.metrics), run.config.train.steps, "steps")
    tags = tags_of(run)
    answers: dict[tuple[str, Place], tuple[Said, ...]] = {}
    steps = {(e.cases, e.thinking): e.step for e in run.evaluations}  # the last of each place
    for e in run.evaluations:
        when = "after" if e.step == steps[e.cases, e.thinking] else "before" if e.step == 0 else ""
        if when:
            file = folder / "eval" / f"step_{e.step:06d}_{e.cases}_{e.thinking}.jsonl"
            answers[when, (e.cases, e.thinking)] = said = _read(file)
            _require(file, len(said), e.n, "answers")
    found = {
        when: {place: rates(said, tags) for (then, place), said in answers.items() if then == when}
        for when in ("before", "after")
    }
    more = {row["step"]: row for row in rolled(folder)}
    _require(folder / "ledger" / "index.jsonl", len(more), run.config.train.steps // run.config.ledger.every, "steps")
    metrics = tuple(row | more.get(row["step"], {}) for row in run.metrics)
    return Seen(name, seed, found["before"], found["after"], metrics, seconds, cpu_s, answers)


def rolled(folder: Path) -> list[Metrics]:
    """What the training answers named, by recorded step: ``rollout/RATE`` for those of `ROLLED`, over completions."""
    found: list[Metrics] = []
    for number in recorded_steps(folder / "ledger"):
        step = read_step(folder / "ledger", number).step
        said = [
            Said(group.prompt.case.id, group.prompt.case.gold_level, score.answer.level, True)
            for group, scores in zip(step.groups, step.scores, strict=True)
            for score in scores
        ]
        shares = {f"rollout/{name}": _share(MEASURES[name], said) for name in ROLLED}
        found.append({"step": number, **shares})
    return found


def tags_of(run: RunRecord) -> dict[str, tuple[str, ...]]:
    """Case id → tags, over the sets that the run was evaluated on."""
    files = {**run.config.evaluate.before_and_after, **run.config.evaluate.periodic}
    return {case.id: case.tags for file in files.values() for case in load_jsonl_cases(file)}


def _require(file: Path, held: int, due: int, what: str) -> None:
    if held != due:
        raise UserError(f"{file}: holds {held} of {due} {what}")


def _read(file: Path) -> tuple[Said, ...]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return tuple(Said(row["id"], row["esi"], row["predicted"], row["finished"]) for row in rows)
