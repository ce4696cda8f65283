"""The charts of the report as data: which metrics each one shows, what they mean and what to look for."""

from collections.abc import Callable
from dataclasses import dataclass

from grpo.config import Config
from grpo.report.charts import Level

GIBIBYTE = 2.0**30


def no_levels(config: Config) -> tuple[Level, ...]:
    return ()


def zero_line(config: Config) -> tuple[Level, ...]:
    return (Level("", 0.0, 0.0),)


def token_budget(config: Config) -> tuple[Level, ...]:
    budget = config.rollout.max_new_tokens
    return (Level(f"budget {budget:,}", budget, budget),)


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart."""

    title: str
    series: tuple[tuple[str, str], ...]
    """(pattern of metric names, label). A pattern may match several metrics; its groups fill in the label. Several runs
    are compared by the first series."""
    caption: str
    """Metric names are in backticks."""
    kind: str = "plain"
    """A key of `grpo.report.number_format.FORMATS`."""
    levels: Callable[[Config], tuple[Level, ...]] = no_levels
    floor: float | None = None
    ceiling: float | None = None
    unit: float = 1.0
    """Values are divided by this."""


SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Reward": (
        Figure(
            "Mean reward",
            (("reward/mean", "mean"),),
            "Mean total reward of a step's completions, `reward/mean`. v49's card: positive from step 10, peak +0.49.",
            "signed",
            levels=zero_line,
        ),
        Figure(
            "Both reward stds",
            (("reward/std_batch", "std_batch"), ("reward/std_group", "std_group")),
            "Two quantities are called “reward_std”: the mean of the groups' own stds (`reward/std_group`), by which "
            "group advantages are divided, and the std of the whole batch (`reward/std_batch`), which includes how "
            "much cases differ. v49's card reports “~1.0+” without saying which. Near 0, groups teach nothing.",
            levels=lambda config: (Level("card ~1.0", 1.0, 1.0),),
            floor=0.0,
        ),
        Figure(
            "Groups without a signal",
            (("groups/zero_variance", "all rewards equal"),),
            "Fraction of groups whose completions (those in the baseline) have equal rewards, `groups/zero_variance`: "
            "their advantages are 0. It rises when training succeeds, and also when no hard cases are left.",
            "percent",
            floor=0.0,
            ceiling=1.0,
        ),
        Figure(
            "Reward by component",
            (("reward/(.+)/mean", "{0}"),),
            "Mean reward of each component, `reward/COMPONENT/mean`: the outcome table, the price of no answer, each "
            "rule, and what a budget or a bound took. They add up to the mean reward. A penalty that climbs to 0 is a "
            "rule the policy has stopped breaking.",
            "signed",
            levels=zero_line,
        ),
        Figure(
            "Advantage by component",
            (("advantage/(.+)/abs_mean", "{0}"),),
            "Which component moved the policy: the mean of its part of |advantage|, `advantage/COMPONENT/abs_mean`. A "
            "rule that never varies within a group has none.",
            floor=0.0,
        ),
        Figure(
            "Finished and truncated",
            (("reward/mean_finished", "finished"), ("reward/mean_truncated", "truncated")),
            "Mean reward of completions that ended by themselves, `reward/mean_finished`, and of those cut by the "
            "budget, `reward/mean_truncated`. In v48 a truncated answer was worth more than a dangerous one.",
            "signed",
        ),
    ),
    "Token budget": (
        Figure(
            "Clipped ratio",
            (
                ("completions/clipped_ratio", "clipped_ratio"),
                ("completions/clipped_ratio_at/(.+)", "at {0} % of the budget"),
            ),
            "Fraction of completions whose last token is not an end token, `completions/clipped_ratio` (TRL's "
            "definition), and what a smaller budget would have cut of the same completions, "
            "`completions/clipped_ratio_at/PERCENT`. Shaded: the 4–19 % of the v49 card; v48 was above 90 %.",
            "percent",
            levels=lambda config: (Level("card 4–19 %", 0.04, 0.19),),
            floor=0.0,
        ),
        Figure(
            "Lengths against the budget",
            (
                ("completions/length_p50", "median"),
                ("completions/length_p(10|90)", "p{0}"),
                ("completions/max_length", "longest"),
            ),
            "Tokens per completion, end token included: `completions/length_p50` and so on. Watch whether the longest "
            "tenth reaches the budget.",
            "whole",
            levels=token_budget,
            floor=0.0,
        ),
        Figure(
            "Why nothing was parsed",
            (("completions/no_parse/(.+)", "{0}"),),
            "Fraction of completions without a level by reason, `completions/no_parse/REASON`; they add up to "
            "`completions/no_parse`.",
            "percent",
            floor=0.0,
        ),
        Figure(
            "Pull of the truncated",
            (("advantage/truncation_pull", "signed"), ("advantage/truncation_pull_abs", "absolute")),
            "What truncated completions add to the advantages of the finished ones in their group, "
            "`advantage/truncation_pull`. Above 0, a completion is rewarded merely for having ended.",
            "signed",
            levels=zero_line,
        ),
        Figure(
            "Tokens that truncation cost",
            (
                ("completions/truncated_token_share", "in truncated completions"),
                ("completions/unclosed_thinking", "thinking never closed"),
                ("completions/truncated_parsed", "truncated, yet parsed"),
            ),
            "Fraction of sampled tokens in truncated completions, fraction of completions that never close their "
            "thinking, and fraction of the truncated ones that contain an answer all the same.",
            "percent",
            floor=0.0,
        ),
    ),
    "Policy": (
        Figure(
            "KL to the reference",
            (("kl/(.+)", "{0}"),),
            "`kl/ESTIMATOR`: mean per token, in nats, before the update, of the estimator in the legend. Absent if "
            "beta = 0. It starts above 0 if the warm start is not the reference.",
            floor=0.0,
        ),
        Figure(
            "Entropy",
            (("entropy", "entropy"),),
            "Mean `entropy` of the sampling distribution, in nats, temperature included. Near 0, groups have nothing "
            "to compare.",
            floor=0.0,
        ),
        Figure(
            "Tokens with a clipped ratio",
            (("clip_ratio/low", "below 1 − clip_low"), ("clip_ratio/high", "above 1 + clip_high")),
            "Fraction of tokens whose gradient the clip removed, `clip_ratio/low` and `clip_ratio/high`. With one "
            "inner epoch both are 0, because every ratio is 1. Not to be confused with the clipped ratio.",
            "percent",
            floor=0.0,
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
            floor=0.0,
        ),
        Figure("Learning rate", (("lr", "lr"),), "`lr` of the step's last optimizer step.", floor=0.0),
        Figure(
            "Sampler and trainer apart",
            (("sampler/abs_logprob_diff", "mean |difference|"),),
            "`sampler/abs_logprob_diff`: mean difference, in nats, between the log-probabilities tokens were sampled "
            "with and those the trainer computes. About 10⁻⁶ in float32; more means that the two disagree.",
            floor=0.0,
        ),
    ),
    "Cost": (
        Figure(
            "Seconds per step",
            (("time/(.+)_s", "{0}"),),
            "`time/PHASE_s`: sampling, update and recording, without evaluations and checkpoints. v49's card: 213.6 s "
            "per step on a GB10.",
            "seconds",
            floor=0.0,
        ),
        Figure(
            "Tokens per second",
            (("tokens_per_s/step", "whole step"), ("tokens_per_s/rollout", "rollout alone")),
            "`tokens_per_s/…`: sampled tokens by wall clock, including those of replaced groups.",
            "whole",
            floor=0.0,
        ),
        Figure(
            "Peak memory",
            (("memory/peak_bytes", "GiB so far"),),
            "`memory/peak_bytes` in GiB: of the device on CUDA, else of the whole process. It can only rise.",
            floor=0.0,
            unit=GIBIBYTE,
        ),
    ),
}
