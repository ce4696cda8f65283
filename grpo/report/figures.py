"""The charts of the report as data: which metrics each one shows, what they mean and what to look for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from grpo.config import Config
from grpo.inspection.run_reader import Metrics, RunRecord
from grpo.report.charts import COLORS, Chart, Line, Points, Zone, line_chart

MAX_POINTS = 120
"""More steps than this are averaged in equal stretches."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart."""

    title: str
    series: tuple[tuple[str, str], ...]
    """(pattern of metric names, label). A pattern may match several metrics; its group fills in the label."""
    caption: str
    """Metric names are in backticks."""
    percent: bool = False
    zones: Callable[[Config], tuple[Zone, ...]] = lambda config: ()


SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Reward": (
        Figure(
            "Mean reward",
            (("reward/mean", "mean"),),
            "Mean total reward of a step's completions, `reward/mean`. v49's card: positive from step 10, peak +0.49.",
        ),
        Figure(
            "Both reward stds",
            (("reward/std_group", "std_group"), ("reward/std_batch", "std_batch")),
            "`reward/std_group`: mean of the groups' own stds, by which group advantages are divided. "
            "`reward/std_batch`: std of the whole batch. v49's card reports “~1.0+” without saying which. Near 0, "
            "groups teach nothing.",
            zones=lambda config: (Zone("card ~1.0", 1.0, 1.0),),
        ),
        Figure(
            "Groups without a signal",
            (("groups/zero_variance", "all rewards equal"),),
            "Fraction of groups whose completions have equal rewards, `groups/zero_variance`: their advantages are 0.",
            percent=True,
        ),
        Figure(
            "Reward by component",
            (("reward/(.+)/mean", "{}"),),
            "Mean reward of each component, `reward/COMPONENT/mean`; they add up to the mean reward. A penalty that "
            "climbs to 0 is a rule the policy has stopped breaking.",
        ),
        Figure(
            "Advantage by component",
            (("advantage/(.+)/abs_mean", "{}"),),
            "Which component moved the policy: the mean of its part of |advantage|, `advantage/COMPONENT/abs_mean`. A "
            "rule that never varies within a group has none.",
        ),
    ),
    "Token budget": (
        Figure(
            "Clipped ratio",
            (
                ("completions/clipped_ratio", "clipped_ratio"),
                ("completions/clipped_ratio_at/(.+)", "at {} % of the budget"),
            ),
            "Fraction of completions whose last token is not an end token, `completions/clipped_ratio` (TRL's "
            "definition), and what a smaller budget would have cut of the same completions, "
            "`completions/clipped_ratio_at/PERCENT`. Shaded: the 4–19 % of the v49 card; v48 was above 90 %.",
            percent=True,
            zones=lambda config: (Zone("card 4–19 %", 0.04, 0.19),),
        ),
        Figure(
            "Lengths against the budget",
            (
                ("completions/length_p50", "median"),
                ("completions/length_p(10|90)", "p{}"),
                ("completions/max_length", "longest"),
            ),
            "Tokens per completion, end token included: `completions/length_p50` and so on. Watch whether the longest "
            "tenth reaches the budget.",
            zones=lambda config: (Zone("budget", config.rollout.max_new_tokens, config.rollout.max_new_tokens),),
        ),
        Figure(
            "Why nothing was parsed",
            (("completions/no_parse/(.+)", "{}"),),
            "Fraction of completions without a level by reason, `completions/no_parse/REASON`.",
            percent=True,
        ),
        Figure(
            "Pull of the truncated",
            (("advantage/truncation_pull", "signed"), ("advantage/truncation_pull_abs", "absolute")),
            "What truncated completions add to the advantages of the finished ones in their group, "
            "`advantage/truncation_pull`. Above 0, a completion is rewarded merely for having ended.",
        ),
    ),
    "Policy": (
        Figure(
            "KL to the reference",
            (("kl/(.+)", "{}"),),
            "`kl/ESTIMATOR`: mean per token, in nats, before the update. Absent if beta = 0. It starts above 0 if the "
            "warm start is not the reference.",
        ),
        Figure(
            "Loss",
            (("loss", "loss"),),
            "`loss` of the step's first pass. With sequence weights the policy term is near 0 by construction (every "
            "ratio is 1 and a group's advantages add up to 0), which leaves the KL term. It does not measure progress.",
        ),
        Figure(
            "Gradient norm",
            (("grad_norm", "norm"),),
            "`grad_norm`, before clipping at `optim.max_grad_norm`. Gaps: non-finite updates, which were skipped.",
        ),
        Figure(
            "Entropy",
            (("entropy", "entropy"),),
            "Mean `entropy` of the sampling distribution, in nats, temperature included. Near 0, groups have nothing "
            "to compare.",
        ),
        Figure(
            "Tokens with a clipped ratio",
            (("clip_ratio/low", "below 1 − clip_low"), ("clip_ratio/high", "above 1 + clip_high")),
            "Fraction of tokens whose gradient the clip removed, `clip_ratio/low` and `clip_ratio/high`. With one "
            "inner epoch both are 0, because every ratio is 1. Not to be confused with the clipped ratio.",
            percent=True,
        ),
        Figure(
            "Sampler and trainer apart",
            (("sampler/abs_logprob_diff", "mean |difference|"),),
            "`sampler/abs_logprob_diff`: mean difference, in nats, between the log-probabilities tokens were sampled "
            "with and those the trainer computes. About 1e-6 in float32; more means that the two disagree.",
        ),
    ),
    "Cost": (
        Figure(
            "Seconds per step",
            (("time/(.+)_s", "{}"),),
            "`time/PHASE_s`: sampling, update and recording, without evaluations and checkpoints. v49's card: 213.6 s "
            "per step on a GB10.",
        ),
        Figure(
            "Tokens per second",
            (("tokens_per_s/step", "whole step"), ("tokens_per_s/rollout", "rollout alone")),
            "`tokens_per_s/…`: sampled tokens by wall clock, including those of replaced groups.",
        ),
    ),
}


def draw(figure: Figure, runs: Sequence[RunRecord]) -> list[Chart]:
    """Draw a figure; nothing if no run has its metrics.

    Several runs are overlaid by the first series, or have a chart each if it is a family of metrics. Metrics that are
    always 0 are only listed.
    """
    several = len(runs) > 1
    if several and "(" in figure.series[0][0]:
        return [chart for run in runs for chart in draw(replace(figure, title=f"{figure.title}: {run.name}"), [run])]
    lines: list[Line] = []
    zeros: list[str] = []
    caption = figure.caption
    for i, run in enumerate(runs):
        for name, label in matching_metrics(figure.series[:1] if several else figure.series, run.metrics):
            points = averaged([(int(row["step"] or 0), row.get(name)) for row in run.metrics])
            if any(value for _, value in points):
                lines.append(Line(run.name if several else label, points, (i if several else len(lines)) % COLORS))
            else:
                zeros.append(run.name if several else label)
    if not lines and not zeros:
        return []
    if several and len(figure.series) > 1:
        caption += f" Shown of each run: {figure.series[0][1]}."
    if zeros:
        caption += f" Always 0: {', '.join(zeros)}."
    if (longest := max(len(run.metrics) for run in runs)) > MAX_POINTS:
        caption += f" Each point is the mean of {'up to ' * several}{-(-longest // MAX_POINTS)} steps."
    zones = sorted({zone for run in runs for zone in figure.zones(run.config)})
    return [line_chart(figure.title, caption, lines, percent=figure.percent, zones=zones)]


def matching_metrics(series: Sequence[tuple[str, str]], rows: Sequence[Metrics]) -> list[tuple[str, str]]:
    """Return (metric, label) of the metrics that have a value in some row, in the order of the series."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    matches = ((re.fullmatch(pattern, name), label) for pattern, label in series for name in names)
    return [
        (match[0], label.format(*(group.replace("_", " ") for group in match.groups())))
        for match, label in matches
        if match
    ]


def averaged(points: Points, limit: int = MAX_POINTS) -> list[tuple[int, float | None]]:
    """Average equal stretches of points so that at most ``limit`` remain.

    >>> averaged([(1, 1.0), (2, 3.0), (3, None)], 2)
    [(2, 2.0), (3, None)]
    """
    size = max(1, -(-len(points) // limit))
    means: list[tuple[int, float | None]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        values = [value for _, value in stretch if value is not None]
        means.append((stretch[-1][0], sum(values) / len(values) if values else None))
    return means
