"""The curves of a run, as data: which metrics a figure shows, what they mean, and what to look for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from grpo.config import Config
from grpo.inspection.run_reader import Metrics
from grpo.report.charts import Level

Edges = Callable[[Metrics], tuple[float, float] | None]


@dataclass(frozen=True, slots=True)
class Figure:
    """What one chart shows."""

    title: str
    series: tuple[tuple[str, str], ...]
    """(pattern of metric names, label): a pattern may match many, its groups fill the label. The first series is the
    one that several runs are compared by."""
    caption: str
    """Words between backticks are metric names."""
    kind: str = "plain"
    bands: tuple[tuple[str, Edges, bool], ...] = ()
    """(label, edges, outlined)."""
    levels: Callable[[Config], tuple[Level, ...]] = lambda config: ()
    stacked: Literal["", "as is", "to one"] = ""
    """"to one": values summed over stretches of the run, then divided by their sum."""
    floor: float | None = None
    ceiling: float | None = None
    by_component: bool = False
    """A series is a component of the reward, and has its colour."""


def around(centre: str, spread: str) -> Edges:
    """Edges at centre ± spread."""

    def edges(row: Metrics) -> tuple[float, float] | None:
        middle, reach = row.get(centre), row.get(spread)
        return None if middle is None or reach is None else (middle - reach, middle + reach)

    return edges


def between(low: str, high: str) -> Edges:
    """Edges at two metrics."""

    def edges(row: Metrics) -> tuple[float, float] | None:
        below, above = row.get(low), row.get(high)
        return None if below is None or above is None else (below, above)

    return edges


ANSWER = "outcome|no_parse|overlong|bounds|timeout"
"""The components that are no rules."""

REWARD = (
    Figure(
        "Mean reward",
        (("reward/mean", "mean"),),
        "Mean total reward of a step's completions, `reward/mean`. The field calls two spreads “reward_std”: the mean "
        "of the groups' own (`reward/std_group`, shaded) is what group advantages are divided by, each by its own; the "
        "std of the whole batch (`reward/std_batch`, dashed) also holds how much the cases differ.",
        "signed",
        (
            ("± std_group", around("reward/mean", "reward/std_group"), False),
            ("± std_batch", around("reward/mean", "reward/std_batch"), True),
        ),
        lambda config: (Level("", 0.0, 0.0),),
    ),
    Figure(
        "Both reward stds",
        (("reward/std_batch", "std_batch"), ("reward/std_group", "std_group")),
        "The same two spreads on their own. The v49 card reports a reward_std of “~1.0+” without saying which. When "
        "`reward/std_group` nears 0, groups agree with themselves and teach nothing.",
        levels=lambda config: (Level("card ~1.0", 1.0, 1.0),),
        floor=0.0,
    ),
    Figure(
        "Groups without a signal",
        (("groups/zero_variance", "all rewards equal"),),
        "Share of groups whose completions (those in the baseline) earned the same, `groups/zero_variance`: they have "
        "no advantage. A rising share is what success looks like, and also what running out of hard cases looks like.",
        "percent",
        floor=0.0,
        ceiling=1.0,
    ),
    Figure(
        "What the answers gave",
        ((f"reward/({ANSWER})/mean", "{0}"),),
        "Mean reward of the components that every reward has, `reward/COMPONENT/mean`: the table over predicted and "
        "gold level, the price of no answer, and what a budget or a bound took.",
        "signed",
        levels=lambda config: (Level("", 0.0, 0.0),),
        by_component=True,
    ),
    Figure(
        "What each rule gave",
        ((f"reward/(?!(?:{ANSWER})/)(.+)/mean", "{0}"),),
        "Mean reward by rule, `reward/RULE/mean`; together with the answers’ they add up to the mean reward. A penalty "
        "that climbs to 0 is a rule the policy has stopped breaking.",
        "signed",
        levels=lambda config: (Level("", 0.0, 0.0),),
        by_component=True,
    ),
    Figure(
        "Share of the advantage",
        (("advantage/(.+)/abs_mean", "{0}"),),
        "Which component moved the policy: each one's part of Σ|advantage|, from `advantage/COMPONENT/abs_mean`, over "
        "stretches of a twentieth of the run. A rule that never varies within a group has no share, however large its "
        "reward.",
        "percent",
        stacked="to one",
        floor=0.0,
        ceiling=1.0,
        by_component=True,
    ),
    Figure(
        "Finished and truncated",
        (("reward/mean_finished", "finished"), ("reward/mean_truncated", "truncated")),
        "Mean reward of completions that ended by themselves, `reward/mean_finished`, and of those the budget cut, "
        "`reward/mean_truncated`; gaps where there were none. In v48 being cut was worth more than a dangerous "
        "answer.",
        "signed",
    ),
)

BUDGET = (
    Figure(
        "Clipped ratio",
        (("completions/clipped_ratio", "clipped_ratio"),),
        "Share of completions whose last token is not an end token, `completions/clipped_ratio` (TRL's definition). "
        "Shaded: the 4–19 % that the v49 card reports; its predecessor v48 stood above 90 %.",
        "percent",
        levels=lambda config: (Level("card 4–19 %", 0.04, 0.19),),
        floor=0.0,
    ),
    Figure(
        "Why completions stopped",
        (
            ("completions/stop_end", "end token"),
            ("completions/stop_budget", "budget"),
            ("completions/stop_other", "other"),
        ),
        "`completions/stop_end`, `…/stop_budget` and `…/stop_other`; they add up to 1, and the last two to the clipped "
        "ratio.",
        "percent",
        stacked="as is",
        floor=0.0,
        ceiling=1.0,
    ),
    Figure(
        "Lengths against the budget",
        (("completions/length_p50", "median"), ("completions/max_length", "longest")),
        "Tokens of a completion, end token included: median, the middle 80 % (`…/length_p10` to `…/length_p90`), and "
        "the longest. Watch whether the band leans on the budget.",
        "whole",
        (("p10–p90", between("completions/length_p10", "completions/length_p90"), False),),
        lambda config: (
            Level(
                f"budget {config.rollout.max_new_tokens:,}",
                config.rollout.max_new_tokens,
                config.rollout.max_new_tokens,
            ),
        ),
        floor=0.0,
    ),
    Figure(
        "Why nothing was parsed",
        (("completions/no_parse/(.+)", "{0}"),),
        "Share of completions without a level, by reason, `completions/no_parse/REASON`; stacked, they add up to "
        "`completions/no_parse`.",
        "percent",
        stacked="as is",
        floor=0.0,
    ),
    Figure(
        "Under a smaller budget",
        (("completions/clipped_ratio_at/(.+)", "{0} % of the budget"),),
        "The clipped ratio that the same completions would have had, `completions/clipped_ratio_at/PERCENT`. Exact: a "
        "smaller budget draws the same prefix. It says nothing of a policy trained under it.",
        "percent",
        floor=0.0,
        ceiling=1.0,
    ),
    Figure(
        "Pull of the truncated",
        (("advantage/truncation_pull", "signed"), ("advantage/truncation_pull_abs", "absolute")),
        "What truncated completions add to the advantages of finished ones in their group: with them in the baseline "
        "less without, `advantage/truncation_pull`. Above 0 is praise for merely having ended.",
        "signed",
        levels=lambda config: (Level("", 0.0, 0.0),),
    ),
    Figure(
        "Tokens that truncation cost",
        (
            ("completions/truncated_token_share", "in truncated completions"),
            ("completions/unclosed_thinking", "thought never closed"),
            ("completions/truncated_parsed", "truncated, yet parsed"),
        ),
        "Share of sampled tokens in completions that the budget cut (`completions/truncated_token_share`), share of "
        "completions with an open thought, and the share of the truncated that had answered all the same.",
        "percent",
        floor=0.0,
    ),
)

POLICY = (
    Figure(
        "KL to the reference",
        (("kl/(.+)", "{0}"),),
        "`kl/ESTIMATOR`: mean over tokens of the estimator that the legend names, of d = reference − policy "
        "log-probability, in nats, before the update. Absent at beta = 0. It starts above 0 when a warm start is not "
        "the reference.",
        floor=0.0,
    ),
    Figure(
        "Entropy",
        (("entropy", "entropy"),),
        "Mean `entropy` of the distribution that tokens are drawn from, in nats, temperature included. A fall towards "
        "0 leaves groups nothing to compare.",
        floor=0.0,
    ),
    Figure(
        "Tokens that the ratio clip held",
        (("clip_ratio/low", "below 1 − clip_low"), ("clip_ratio/high", "above 1 + clip_high")),
        "Share of tokens whose gradient the clip removed, by side, `clip_ratio/low` and `…/high`. With one inner epoch "
        "both are 0: every ratio is 1. Not to be confused with the clipped ratio.",
        "percent",
        floor=0.0,
    ),
    Figure(
        "Loss",
        (("loss", "loss"),),
        "`loss` of the step's first pass. With sequence weights it is near 0 by construction, since every ratio "
        "is 1 and a group's advantages add up to 0; what is left is the KL term. It is no measure of progress.",
    ),
    Figure(
        "Gradient norm",
        (("grad_norm", "norm"),),
        "`grad_norm`, before clipping at `optim.max_grad_norm`. Gaps are updates that were not finite and were "
        "skipped.",
        floor=0.0,
    ),
    Figure("Learning rate", (("lr", "lr"),), "`lr` of the step's last optimiser step.", floor=0.0),
    Figure(
        "Sampler and trainer apart",
        (("sampler/abs_logprob_diff", "mean |difference|"),),
        "How far the log-probabilities that tokens were drawn with are from those that the trainer computes, in nats, "
        "`sampler/abs_logprob_diff`. About 10⁻⁶ in float32; more means that the two disagree about the policy.",
        floor=0.0,
    ),
)

COST = (
    Figure(
        "Seconds a step",
        (("time/(.+)_s", "{0}"),),
        "`time/PHASE_s`: sampling, update, and writing down what happened. Evaluations and checkpoints are not in it.",
        "seconds",
        stacked="as is",
        floor=0.0,
    ),
    Figure(
        "Tokens a second",
        (("tokens_per_s/step", "whole step"), ("tokens_per_s/rollout", "rollout alone")),
        "`tokens_per_s/…`: sampled tokens by wall clock, those of dropped groups included.",
        "whole",
        floor=0.0,
    ),
    Figure(
        "Share of the roofline",
        (("roofline/(.+)", "{0}"),),
        "`roofline/PHASE`: the seconds that the measured bandwidth and matmul rate allow at best, by the seconds "
        "taken. Near 1 nothing is left to gain; a small model on a CPU is far below.",
        floor=0.0,
    ),
    Figure(
        "Peak memory",
        (("memory/peak_bytes", "peak so far"),),
        "`memory/peak_bytes` in GiB: the device's on CUDA, else the whole process's. It can only rise.",
        "gibibytes",
        floor=0.0,
    ),
    Figure(
        "Groups drawn again",
        (("groups/dropped", "groups left out"),),
        "Groups that were sampled and left out because all their rewards were equal, `groups/dropped`; with "
        "`rollout.refill_rounds` = 0 none are.",
        floor=0.0,
    ),
)

SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Reward": REWARD,
    "Token budget": BUDGET,
    "Policy": POLICY,
    "Cost": COST,
}
