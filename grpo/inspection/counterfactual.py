"""Advantages of a recorded step under another reward.

The recorded completions are kept: the result shows in which direction another reward would have pushed *this* policy in
*this* step, not what a run trained with it would have become. Groups that dynamic sampling replaced are not in the
ledger and are not considered.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.advantage import zero_variance
from grpo.batch import group_advantages
from grpo.config import Config
from grpo.metrics import advantage_by_component, rewards_of
from grpo.run.ledger import LedgerStep
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import escape_control, pad_or_truncate
from grpo.scoring import score_groups
from rewards import Reward


@dataclass(frozen=True, slots=True)
class CompletionChange:
    """One completion under both rewards: "now" is the recorded reward, "then" the other one."""

    group: int
    member: int
    case_id: str
    reward_now: float
    reward_then: float
    advantage_now: float
    advantage_then: float
    parts_now: dict[str, float]
    """Component → its part of the advantage, zeros omitted."""
    parts_then: dict[str, float]

    @property
    def flips(self) -> bool:
        """Whether the advantage changes its sign."""
        return self.advantage_now * self.advantage_then < 0


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """One step under both rewards."""

    step: int
    rows: tuple[CompletionChange, ...]
    gained: tuple[int, ...]
    """Groups whose rewards would no longer be all equal."""
    lost: tuple[int, ...]
    """Groups whose rewards would become all equal."""

    @property
    def flips(self) -> int:
        return sum(row.flips for row in self.rows)


def counterfactual(entry: LedgerStep, config: Config, other: Reward) -> Counterfactual:
    """Score a recorded step with another reward; the run's overlong penalty, baseline and normalization stay.

    Raises:
        UserError: the texts of the step were not recorded.
        RewardError: a code rule of the other reward fails on a case.
    """
    if entry.text != "full":
        raise UserError(f'step {entry.step.number}: --reward needs the texts, which ledger.text = "{entry.text}" omits')
    step = dataclasses.replace(entry.step, scores=score_groups(other, entry.step.groups, config))
    rewards = rewards_of(step)
    advantages = group_advantages(step.groups, rewards, config.advantage)
    shares = advantage_by_component(step, config.advantage)
    in_baseline = step.batch.baseline_mask.numpy().reshape(rewards.shape)
    uniform_now, uniform_then = (zero_variance(r, in_baseline=in_baseline) for r in (entry.rewards, rewards))
    return Counterfactual(
        step=step.number,
        rows=tuple(
            CompletionChange(
                group=b,
                member=g,
                case_id=step.groups[b].prompt.case.id,
                reward_now=float(entry.rewards[b, g]),
                reward_then=float(rewards[b, g]),
                advantage_now=float(entry.advantages[b, g]),
                advantage_then=float(advantages[b, g]),
                parts_now=_nonzero_parts(entry.shares, b, g),
                parts_then=_nonzero_parts(shares, b, g),
            )
            for b, g in np.ndindex(rewards.shape)
        ),
        gained=tuple(np.flatnonzero(uniform_now & ~uniform_then).tolist()),
        lost=tuple(np.flatnonzero(uniform_then & ~uniform_now).tolist()),
    )


def table_lines(step: Counterfactual) -> list[str]:
    """Format a step as a table: one line per completion, followed by its advantage by component; completions whose
    advantage changes its sign are marked ``flips``."""
    header = f"{'case':<22}{'reward → then':>16}{'advantage → then':>19}"
    lines = [f"step {step.step}", f"  group member  {header}"]
    for row in step.rows:
        case = pad_or_truncate(escape_control(row.case_id), 22)
        rewards = f"{row.reward_now:>+7.2f} → {row.reward_then:>+6.2f}"
        advantages = f"{row.advantage_now:>+9.3f} → {row.advantage_then:>+7.3f}"
        lines.append(f"  {row.group:>5} {row.member:>6}  {case}{rewards}{advantages}{'  flips' * row.flips}")
        for name in {**row.parts_now, **row.parts_then}:
            now, then = row.parts_now.get(name, 0.0), row.parts_then.get(name, 0.0)
            lines.append(f"{'':<18}{pad_or_truncate(escape_control(name), 36)}{now:>+9.3f} → {then:>+7.3f}")
    return lines


def change_line(step: Counterfactual) -> str:
    """Format a step as one line."""
    variance = f"groups that gain, lose variance: {len(step.gained)}, {len(step.lost)}"
    return f"step {step.step:<6} {step.flips} of {len(step.rows)} flip; {variance}"


def summary_lines(steps: Sequence[Counterfactual], name_now: str, name_then: str) -> list[str]:
    """Summarize all steps.

    Args:
        name_now, name_then: names of the two rewards.
    """
    rows = [row for step in steps for row in step.rows]
    groups = sum(len({row.group for row in step.rows}) for step in steps)
    return [
        f"reward {escape_control(f'{name_now} → {name_then}')}, {len(steps):,} step{'s' * (len(steps) != 1)}",
        f"  {sum(row.reward_now != row.reward_then for row in rows):,} of {len(rows):,} completions get another reward",
        f"  {sum(row.flips for row in rows):,} change the sign of their advantage",
        f"  of {groups:,} groups, {sum(len(step.gained) for step in steps):,} gain and "
        f"{sum(len(step.lost) for step in steps):,} lose their variance",
    ]


def _nonzero_parts(shares: Mapping[str, np.ndarray], b: int, g: int) -> dict[str, float]:
    return {name: float(share[b, g]) for name, share in shares.items() if share[b, g]}
