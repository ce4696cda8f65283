"""What the advantages of a recorded step would have been under another reward.

The completions stay as they are: it says which way another reward would have pushed *this* policy in *this* step, not
what a run under it would have become. Groups that drop-and-refill left out are not in the ledger and not looked at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.advantage import split_by_component, zero_variance
from grpo.batch import baseline, normalised
from grpo.config import Config
from grpo.run.ledger import Entry
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import fit, visible
from grpo.scoring import score_groups
from rewards import Reward


@dataclass(frozen=True, slots=True)
class Changed:
    """One completion under both rewards."""

    group: int
    member: int
    case_id: str
    reward_now: float
    reward_then: float
    advantage_now: float
    advantage_then: float
    parts_now: dict[str, float]
    """Component → its part of the advantage; those that are not 0."""
    parts_then: dict[str, float]

    @property
    def flips(self) -> bool:
        """The other reward would have pushed against it instead of for it, or for it instead of against it."""
        return self.advantage_now * self.advantage_then < 0


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """One step under both rewards; "now" is what was recorded, "then" what the other reward gives."""

    step: int
    rows: tuple[Changed, ...]
    components: dict[str, tuple[float | None, float | None]]
    """Name → mean over completions of the component's part |A_k| of the advantage; None where a reward lacks it."""
    gained: tuple[int, ...]
    """Groups whose rewards would no longer be all equal."""
    lost: tuple[int, ...]
    """Groups whose rewards would be."""

    @property
    def flips(self) -> int:
        return sum(row.flips for row in self.rows)


def counterfactual(entry: Entry, config: Config, other: Reward) -> Counterfactual:
    """A recorded step under another reward; the run's own overlong penalty, baseline and normalisation stay.

    Raises:
        UserError: the step's texts were not written down.
        RewardError: a code rule of the other reward fails on a case.
    """
    step = entry.step
    if entry.text != "full":
        raise UserError(
            f'step {step.number}: --reward reads the texts again, and ledger.text = "{entry.text}" kept them out'
        )
    scores = score_groups(other, step.groups, config)
    then = np.array([[score.total for score in row] for row in scores])
    section = config.advantage
    members = baseline(np.array([[c.finished for c in group.completions] for group in step.groups]), section)
    advantages = normalised(then, members, section)
    shares = split_by_component(
        {name: np.array([[score.parts[name] for score in row] for row in scores]) for name in scores[0][0].parts},
        kind=section.kind,
        epsilon=section.epsilon,
        ddof=section.ddof,
        in_baseline=members,
        total=then,
    )
    silent = zip(*(zero_variance(r, in_baseline=members).tolist() for r in (entry.rewards, then)), strict=True)
    changes = list(enumerate(silent))
    return Counterfactual(
        step=step.number,
        rows=tuple(
            Changed(
                group=b,
                member=g,
                case_id=group.prompt.case.id,
                reward_now=float(entry.rewards[b, g]),
                reward_then=float(then[b, g]),
                advantage_now=float(entry.advantages[b, g]),
                advantage_then=float(advantages[b, g]),
                parts_now=_parts(entry.shares, b, g),
                parts_then=_parts(shares, b, g),
            )
            for b, group in enumerate(step.groups)
            for g in range(len(group.completions))
        ),
        components={
            name: (_size(entry.shares.get(name)), _size(shares.get(name))) for name in {**entry.shares, **shares}
        },
        gained=tuple(b for b, (was, becomes) in changes if was and not becomes),
        lost=tuple(b for b, (was, becomes) in changes if becomes and not was),
    )


def step_lines(one: Counterfactual) -> list[str]:
    """A step as a table: a line a completion, and below it its advantage by component; ``flips`` marks those whose
    advantage would change its sign."""
    heads = f"{'case':<22}{'reward → then':>16}{'advantage → then':>19}"
    lines = [f"step {one.step}", f"  group member  {heads}"]
    for row in one.rows:
        rewards = f"{row.reward_now:>+7.2f} → {row.reward_then:>+6.2f}"
        both = _pair(row.advantage_now, row.advantage_then)
        case = fit(visible(row.case_id), 22)
        lines.append(f"  {row.group:>5} {row.member:>6}  {case}{rewards}{both}{'  flips' * row.flips}")
        for name in {**row.parts_now, **row.parts_then}:
            part = _pair(row.parts_now.get(name, 0.0), row.parts_then.get(name, 0.0))
            lines.append(f"{'':<18}{fit(visible(name), 36)}{part}")
    return lines


def _pair(now: float, then: float) -> str:
    return f"{now:>+9.3f} → {then:>+7.3f}"


def change_lines(one: Counterfactual) -> list[str]:
    """A step as one line; none where no sign and no group's variance changes."""
    if not (one.flips or one.gained or one.lost):
        return []
    cases = {row.group: visible(row.case_id) for row in one.rows}
    named = {"gains": [cases[b] for b in one.gained], "loses": [cases[b] for b in one.lost]}
    groups = [f"{verb} {', '.join(some[:4])}{', …' * (len(some) > 4)}" for verb, some in named.items() if some]
    variance = f"; variance: {'; '.join(groups)}" if groups else ""
    return [f"step {one.step:<6} {one.flips} of {len(one.rows)} flip{variance}"]


def summary_lines(steps: Sequence[Counterfactual], now: str, then: str) -> list[str]:
    """All steps in a few lines.

    Args:
        now, then: names of the two rewards.
    """
    rows = [row for one in steps for row in one.rows]
    groups = sum(len({row.group for row in one.rows}) for one in steps)
    changed = sum(row.reward_now != row.reward_then for row in rows)
    lines = [
        f"reward {visible(now)} → {visible(then)}, {len(steps):,} step{'s' * (len(steps) != 1)}",
        f"  {changed:,} of {len(rows):,} completions get another reward",
        f"  {sum(row.flips for row in rows):,} change the sign of their advantage",
        f"  of {groups:,} groups, {sum(len(one.gained) for one in steps):,} gain and "
        f"{sum(len(one.lost) for one in steps):,} lose their variance",
        f"  {'component: mean |part of the advantage|':<48}{'now':>8} → {'then':>6}",
    ]
    for name in dict.fromkeys(name for one in steps for name in one.components):
        sides = [[one.components.get(name, (None, None))[side] for one in steps] for side in (0, 1)]
        means = [_mean([value for value in side if value is not None]) for side in sides]
        if any(means):
            lines.append(f"    {fit(visible(name), 46)}{_figure(means[0]):>8} → {_figure(means[1]):>6}")
    return lines


def _parts(shares: Mapping[str, np.ndarray], b: int, g: int) -> dict[str, float]:
    return {name: float(share[b, g]) for name, share in shares.items() if share[b, g]}


def _size(share: np.ndarray | None) -> float | None:
    return None if share is None else math.fsum(np.abs(share).ravel().tolist()) / share.size


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
