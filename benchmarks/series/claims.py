"""What the cards claim of each run, as criteria: one function a claim, of figures alone.

A criterion looks at one seed's runs and says whether the claim holds there, and what was found. Limits are named here,
once, whatever came out; a claim counts as reproduced if it holds under every seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.series.run_results import MODES, Seen, changed

LAB = "lab"
"""The set that the claims are about."""
RULES = ("lifesaving_done", "severe_pain", "open_injury")
"""Strata of the card's three rules."""
WINDOW = 5
"""Steps that the first and the last value of a curve are means of."""

COLLAPSED = 0.9
"""Share of answers that name ESI 1."""
LEFT, MENDED = 0.5, 0.9
"""Accuracy on a rule's cases."""
HEDGED = 0.05
"""Rise of the share over-triaged by one level."""
NONE_DANGEROUS = 0.005
SILENT, LOW_BAND = 0.9, 0.19
"""Clipped ratios: the cards' 90 % of v48 and 4–19 % of v49."""
ALIKE = 0.02
EARLY = 10
"""Step from which v49's reward is positive."""
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim under one seed."""

    holds: bool
    found: str


Seeds = Mapping[str, Seen]
"""Entry → its run, all of one seed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence of the series that a run can bear out or not."""

    run: str
    says: str
    """What the cards, or SERIES, say."""
    wanted: str
    """The criterion in words."""
    needs: tuple[str, ...]
    """Entries it is computed from."""
    check: Callable[[Seeds], Finding]


Verdict = Literal["reproduced", "not reproduced", "in some seeds", "not run"]


@dataclass(frozen=True, slots=True)
class Judged:
    """A claim over all seeds."""

    claim: Claim
    verdict: Verdict
    by_seed: Mapping[int, Finding]


def judge(claim: Claim, runs: Sequence[Seen]) -> Judged:
    """The claim under every seed for which all it needs was run."""
    by_seed: dict[int, dict[str, Seen]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.name] = run
    found = {
        seed: claim.check(members) for seed, members in sorted(by_seed.items()) if set(claim.needs) <= members.keys()
    }
    held = [finding.holds for finding in found.values()]
    verdict: Verdict = (
        "not run" if not held else "reproduced" if all(held) else "in some seeds" if any(held) else "not reproduced"
    )
    return Judged(claim, verdict, found)


def over(run: Seen, when: str, rate: str) -> list[float]:
    """A rate in each thinking mode."""
    side = run.before if when == "before" else run.after
    return [side[LAB, mode][rate] for mode in MODES if (LAB, mode) in side and rate in side[LAB, mode]]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ends(run: Seen, name: str) -> tuple[float, float]:
    """A curve's mean over its first and its last `WINDOW` steps."""
    curve = run.curve(name)
    return mean(curve[:WINDOW]), mean(curve[-WINDOW:])


def percent(*values: float) -> str:
    return " / ".join(f"{100 * value:.1f} %" for value in values)


# ---- v45c -----------------------------------------------------------------------------------------------------------


def always_esi_1(runs: Seeds) -> Finding:
    shares = over(runs["v45c"], "after", "says_1")
    return Finding(min(shares) >= COLLAPSED, f"{percent(*shares)} of the answers name ESI 1")


# ---- v46 ------------------------------------------------------------------------------------------------------------


def better_than_start(runs: Seeds) -> Finding:
    run = runs["v46"]
    before, after = mean(over(run, "before", "exact")), mean(over(run, "after", "exact"))
    tests = [changed(run, (LAB, mode)) for mode in MODES if (LAB, mode) in run.after]
    said = "; ".join(f"{fixed} fixed, {broken} broken, p = {p:.1g}" for fixed, broken, p in tests)
    holds = after > before and all(p < SIGNIFICANT for _, _, p in tests)
    return Finding(holds, f"exact {100 * before:.1f} → {100 * after:.1f} %; {said}")


def rules_left(runs: Seeds) -> Finding:
    return _rules(runs["v46"], lambda accuracy: accuracy <= LEFT)


# ---- v47 ------------------------------------------------------------------------------------------------------------


def hedging(runs: Seeds) -> Finding:
    v46, v47 = (mean(over(runs[name], "after", "over_by_one")) for name in ("v46", "v47"))
    return Finding(
        v47 - v46 >= HEDGED, f"over-triaged by one level: {100 * v46:.1f} % in v46, {100 * v47:.1f} % in v47"
    )


def nothing_dangerous(runs: Seeds) -> Finding:
    shares = over(runs["v47"], "after", "dangerous_under")
    return Finding(max(shares) <= NONE_DANGEROUS, f"{percent(*shares)} dangerous")


def less_exact(runs: Seeds) -> Finding:
    v46, v47 = (mean(over(runs[name], "after", "exact")) for name in ("v46", "v47"))
    return Finding(v47 < v46, f"exact {100 * v46:.1f} % in v46, {100 * v47:.1f} % in v47")


# ---- v48 ------------------------------------------------------------------------------------------------------------


def silence_climbs(runs: Seeds) -> Finding:
    first, last = ends(runs["v48"], "completions/clipped_ratio")
    return Finding(last >= SILENT and last > first, f"clipped {100 * first:.0f} → {100 * last:.0f} %")


# ---- v49 ------------------------------------------------------------------------------------------------------------


def low_clipped_ratio(runs: Seeds) -> Finding:
    curve = runs["v49"].curve("completions/clipped_ratio")
    half = mean(curve[len(curve) // 2 :])
    return Finding(half <= LOW_BAND, f"{100 * half:.1f} % over the second half, highest step {100 * max(curve):.0f} %")


def early_reward(runs: Seeds) -> Finding:
    curve = runs["v49"].curve("reward/mean")
    below = [step for step, value in enumerate(curve, 1) if value <= 0]
    late = [step for step in below if step > EARLY]
    said = f"not positive in {len(below)} of {len(curve)} steps" + (f", the last one step {below[-1]}" if below else "")
    return Finding(not late, f"{said}; peak {max(curve):+.2f}")


def rules_mended(runs: Seeds) -> Finding:
    return _rules(runs["v49"], lambda accuracy: accuracy >= MENDED)


def nothing_non_adjacent(runs: Seeds) -> Finding:
    shares = over(runs["v49"], "after", "adjacent")
    return Finding(min(shares) >= 1 - NONE_DANGEROUS, f"{percent(*shares)} adjacent")


def modes_alike(runs: Seeds) -> Finding:
    shares = over(runs["v49"], "after", "exact")
    return Finding(
        len(shares) == len(MODES) and max(shares) - min(shares) <= ALIKE, f"exact {percent(*shares)}, thinking on / off"
    )


def _rules(run: Seen, good: Callable[[float], bool]) -> Finding:
    accuracy = {rule: over(run, "after", f"{rule}/exact") for rule in RULES}
    said = ", ".join(f"{rule.replace('_', ' ')} {percent(*shares)}" for rule, shares in accuracy.items())
    return Finding(all(good(share) for shares in accuracy.values() for share in shares), f"exact on {said}")


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "v45c",
        "collapses to “always ESI 1”",
        f"at least {COLLAPSED:.0%} of the answers name ESI 1, in both thinking modes",
        ("v45c",),
        always_esi_1,
    ),
    Claim(
        "v46",
        "better than its supervised start",
        f"more exact, McNemar's p < {SIGNIFICANT} in both modes",
        ("v46",),
        better_than_start,
    ),
    Claim("v46", "leaves three rules unlearnt", f"at most {LEFT:.0%} exact on each rule's cases", ("v46",), rules_left),
    Claim(
        "v47",
        "hedges: over-triage by one level rises",
        f"at least {100 * HEDGED:.0f} points above v46",
        ("v46", "v47"),
        hedging,
    ),
    Claim("v47", "no dangerous errors", f"at most {NONE_DANGEROUS:.1%} in both modes", ("v47",), nothing_dangerous),
    Claim("v47", "less exact than v46", "exact below v46's", ("v46", "v47"), less_exact),
    Claim(
        "v48",
        "falls silent: clipped ratio over 90 %",
        f"clipped ratio rises, and its last {WINDOW} steps' mean is at least {SILENT:.0%}",
        ("v48",),
        silence_climbs,
    ),
    Claim(
        "v49",
        "clipped ratio back to 4–19 %",
        f"at most {LOW_BAND:.0%} over the second half of the run",
        ("v49",),
        low_clipped_ratio,
    ),
    Claim(
        "v49",
        "reward positive from step 10",
        f"the mean reward is above 0 in every step after {EARLY}",
        ("v49",),
        early_reward,
    ),
    Claim("v49", "mends the three rules", f"at least {MENDED:.0%} exact on each rule's cases", ("v49",), rules_mended),
    Claim(
        "v49",
        "100 % adjacent",
        f"at least {1 - NONE_DANGEROUS:.1%} adjacent in both modes",
        ("v49",),
        nothing_non_adjacent,
    ),
    Claim(
        "v49", "thinking on and off alike", f"exact differs by at most {100 * ALIKE:.0f} points", ("v49",), modes_alike
    ),
)
