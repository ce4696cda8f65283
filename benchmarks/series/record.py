"""The lab's runs → one record, ``lab.json``: every figure that the page and the README show, and nothing else."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.series.claims import CLAIMS, LAB, RULES, Judged, judge
from benchmarks.series.hedging_thresholds import hedging_threshold, silence_threshold
from benchmarks.series.plan import Entry
from benchmarks.series.run_results import MODES, Place, Seen, pooled
from grpo.cases import load_jsonl_cases
from grpo.config import Config
from grpo.evaluation.metrics import baselines
from grpo.preflight.checks import load_inputs, run_checks
from grpo.types import Case
from rewards import load_reward

FORMAT = 1
PLACES: tuple[Place, ...] = tuple((LAB, mode) for mode in MODES)
SHOWN = (
    "exact",
    "adjacent",
    "dangerous_under",
    "over_by_one",
    "high_acuity_under",
    "no_parse",
    "clipped_ratio",
    "says_1",
)
CURVES = (
    "reward/mean", "reward/std_batch", "completions/clipped_ratio", "groups/zero_variance", "rollout/exact",
    "rollout/says_1", "rollout/over_by_one", "rollout/dangerous_under",
)  # fmt: skip
PARTS: Mapping[str, tuple[str, ...]] = {
    "rules, in words that a pattern matches": ("plain",),
    "rules, in other words": ("paraphrase",),
    "hard negatives": ("hard_negative",),
}
"""Tags of the generalisation table: name → tags of which a case has one."""
GENERALISES = ("v45c", "v46", "v49", "v50", "no-rules")
"""Runs of the generalisation table."""


def lab_record(entries: Sequence[Entry], configs: Mapping[str, Config], runs: Sequence[Seen]) -> dict[str, Any]:
    """All figures of the finished runs.

    Args:
        entries: what was asked for, in order.
        configs: the resolved config of each entry, of any seed.
    """
    by_name = {entry.name: [run for run in runs if run.name == entry.name] for entry in entries}
    kept = [entry for entry in entries if by_name[entry.name]]
    judged = [judge(claim, runs) for claim in CLAIMS if any(claim.run == entry.name for entry in entries)]
    lab = _cases(configs, LAB)
    return {
        "format": FORMAT,
        "seeds": sorted({run.seed for run in runs}),
        "set": {"n": len(lab), "baselines": _constants(lab)},
        "runs": {entry.name: _run(entry, by_name[entry.name], lab) for entry in kept},
        "claims": [_claim(one) for one in judged],
        "foretold": {entry.name: _foretold(configs[entry.name]) for entry in kept if entry.kind == "series"},
        "thresholds": {
            entry.name: _thresholds(configs[entry.name], by_name[entry.name], lab)
            for entry in kept
            if entry.name.startswith(("v46", "v47"))
        },
        "silence": {
            entry.name: silence_threshold(load_reward(configs[entry.name].reward.set).table)
            for entry in kept
            if entry.name.startswith(("v48", "v49"))
        },
        "generalisation": {
            entry.name: _generalisation(by_name[entry.name], lab) for entry in kept if entry.name in GENERALISES
        },
    }


def _run(entry: Entry, runs: Sequence[Seen], lab: Mapping[str, Case]) -> dict[str, Any]:
    members = {rule: frozenset(c.id for c in lab.values() if rule in c.tags) for rule in RULES}
    return {
        "about": entry.about,
        "kind": entry.kind,
        "config": entry.config,
        "overrides": list(entry.overrides),
        "after": entry.after,
        "seconds": [run.seconds for run in runs],
        "cpu_s": [run.cpu_s for run in runs],
        "rates": {
            when: {
                **{name: _rate(runs, when, PLACES, name) for name in SHOWN},
                **{rule: _rate(runs, when, PLACES, "exact", ids) for rule, ids in members.items()},
            }
            for when in ("before", "after")
        },
        "by_mode": {mode: _rate(runs, "after", [(LAB, mode)], "exact") for mode in MODES},
        "curves": {name: _curve(runs, name) for name in CURVES},
    }


def _rate(
    runs: Sequence[Seen], when: str, places: Sequence[Place], measure: str, members: frozenset[str] | None = None
) -> dict[str, Any] | None:
    """A rate over all seeds, its interval, and each seed's own."""
    found = pooled(runs, when, places, measure, members)
    if found is None:
        return None
    share, (low, high) = found
    alone = {run.seed: pooled([run], when, places, measure, members) for run in runs}
    return {
        "share": share,
        "low": low,
        "high": high,
        "by_seed": {str(seed): one[0] for seed, one in alone.items() if one is not None},
    }


def _curve(runs: Sequence[Seen], name: str) -> dict[str, list[float]]:
    """A metric's mean, least and greatest over the seeds, by step; steps are those that all seeds have."""
    curves = [run.curve(name) for run in runs]
    columns = list(zip(*curves, strict=False))
    return {
        "mean": [round(statistics.fmean(column), 4) for column in columns],
        "low": [round(min(column), 4) for column in columns],
        "high": [round(max(column), 4) for column in columns],
    }


def _claim(one: Judged) -> dict[str, Any]:
    return {
        "run": one.claim.run,
        "says": one.claim.says,
        "wanted": one.claim.wanted,
        "verdict": one.verdict,
        "by_seed": {str(seed): {"holds": f.holds, "found": f.found} for seed, f in one.by_seed.items()},
    }


def _foretold(config: Config) -> dict[str, Any]:
    """What preflight says of the run before it starts."""
    examination = run_checks(config, load_inputs(config))
    best = [{"policy": e.policy, "mean": e.mean} for e in (examination.policies.ranked if examination.policies else ())]
    return {"verdict": examination.verdict, "refusals": list(examination.problems), "policies": best[:3]}


def _thresholds(config: Config, runs: Sequence[Seen], lab: Mapping[str, Case]) -> list[dict[str, Any]]:
    """For every stratum whose training labels waver between two neighbouring levels: how often they name the more
    acute one, whether that is above the threshold, and how often the trained policy names it."""
    normalised = config.advantage.kind in ("group",)
    limit = hedging_threshold(load_reward(config.reward.set).table, normalised=normalised)
    labels: dict[str, list[int]] = {}
    for case in load_jsonl_cases(config.cases.train):
        labels.setdefault(case.tags[0], []).append(case.gold_level)
    gold = {case.tags[0]: case.gold_level for case in lab.values()}
    found = []
    for stratum in sorted(gold, key=lambda name: (gold[name], name)):
        named = labels.get(stratum, [])
        acute = sum(level == gold[stratum] - 1 for level in named) / len(named) if named else 0.0
        if acute:
            members = frozenset(c.id for c in lab.values() if c.tags[0] == stratum)
            found.append(
                {
                    "stratum": stratum,
                    "gold": gold[stratum],
                    "labelled_acute": acute,
                    "threshold": limit,
                    "hedges": acute > limit,
                    "before": _rate(runs, "before", PLACES, "over_by_one", members),
                    "after": _rate(runs, "after", PLACES, "over_by_one", members),
                }
            )
    return found


def _generalisation(runs: Sequence[Seen], lab: Mapping[str, Case]) -> dict[str, Any]:
    found = {}
    for name, tags in PARTS.items():
        members = frozenset(case.id for case in lab.values() if set(tags) & set(case.tags))
        found[name] = {
            "n": len(members),
            "before": _rate(runs, "before", PLACES, "exact", members),
            "after": _rate(runs, "after", PLACES, "exact", members),
        }
    return found


def _cases(configs: Mapping[str, Config], name: str) -> dict[str, Case]:
    """The cases of a set by id, from the first config that has it."""
    for config in configs.values():
        files = {**config.evaluate.before_and_after, **config.evaluate.periodic}
        if name in files:
            return {case.id: case for case in load_jsonl_cases(files[name])}
    return {}


def _constants(cases: Mapping[str, Case]) -> dict[str, dict[str, Any]]:
    return baselines([case.gold_level for case in cases.values()]) if cases else {}
