"""Model answers for the embedded world, in the card's format: what the tiny base and its warm start are taught.

    EXTRACTION:
    Chief complaint: leg injury
    Vital signs: stable
    Red flags: open fracture
    ESI ALGORITHM:
    A: no
    B: yes
    ANSWER: ESI 2

The steps stop at the first hit, as the algorithm does. A teacher decides what the steps say: `right` follows the
facts; `v46` makes the three errors the card reports of v46, reading the facts correctly and applying the rule wrongly.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from benchmarks.tiny_world.patients import Summary

Steps = tuple[tuple[str, str], ...]
"""(step letter, what it says), in order; the last one decides."""

BLIND_SPOT_STRATA = ("lifesaving_done", "severe_pain", "open_injury")
"""Cases decided by one of the card's three rules: the only ones v46 gets wrong."""


def right(summary: Summary) -> tuple[Steps, int]:
    """The steps A→B→C→D over the facts, and the level they end at."""
    if summary.lifesaving != "none":
        return (("A", "yes"),), 1
    if summary.high_risk != "none" or summary.open_injury != "none" or summary.pain == "severe":
        return (("A", "no"), ("B", "yes")), 2
    if summary.resources in ("0", "1"):
        return (("A", "no"), ("B", "no"), ("C", summary.resources)), 5 - int(summary.resources)
    danger = summary.vitals == "danger"
    steps = (("A", "no"), ("B", "no"), ("C", "2+"), ("D", "yes" if danger else "no"))
    return steps, 2 if danger else 3


def v46(summary: Summary, stratum: str) -> tuple[Steps, int]:
    """As `right`, but a lifesaving intervention already performed ends at 2, and severe pain or an open injury, where
    nothing else makes the case urgent, at 3."""
    if stratum == "lifesaving_done":
        return (("A", "no"), ("B", "yes")), 2
    if stratum in ("severe_pain", "open_injury"):
        return (("A", "no"), ("B", "no"), ("C", "2+"), ("D", "no")), 3
    return right(summary)


def steps_to(level: int) -> Steps:
    """Steps that end at a level, for a teacher that errs at random."""
    return {
        1: (("A", "yes"),),
        2: (("A", "no"), ("B", "yes")),
        3: (("A", "no"), ("B", "no"), ("C", "2+"), ("D", "no")),
        4: (("A", "no"), ("B", "no"), ("C", "1")),
        5: (("A", "no"), ("B", "no"), ("C", "0")),
    }[level]


def answer(summary: Summary, steps: Steps, level: int) -> str:
    """The visible answer."""
    lines = [
        "EXTRACTION:",
        f"Chief complaint: {summary.complaint}",
        f"Vital signs: {summary.vitals}",
        f"Red flags: {red_flags(summary)}",
        "ESI ALGORITHM:",
        *(f"{letter}: {says}" for letter, says in steps),
        f"ANSWER: ESI {level}",
    ]
    return "\n".join(lines)


def red_flags(summary: Summary) -> str:
    """What the vignette holds that may decide step A or B, or "none"."""
    flags = [flag for flag in (summary.lifesaving, summary.high_risk, summary.open_injury) if flag != "none"]
    return ", ".join([*flags, *(["severe pain"] if summary.pain == "severe" else [])]) or "none"


def thought(summary: Summary, rng: random.Random, *, again: float) -> str:
    """What stands between ``<think>`` and ``</think>``: a look at the case, and with probability ``again`` another,
    and another; so thoughts have a long tail that a token budget can cut."""
    looks = [f"The patient has {summary.complaint}. Flags: {red_flags(summary)}. Vitals {summary.vitals}."]
    while len(looks) < MOST_LOOKS and rng.random() < again:
        looks.append(rng.choice(SECOND_LOOKS).format(flags=red_flags(summary), vitals=summary.vitals))
    return "\n".join(looks)


MOST_LOOKS = 5

SECOND_LOOKS: tuple[str, ...] = (
    "Let me check again. Flags: {flags}. Vitals {vitals}.",
    "Wait, look once more at the vitals: {vitals}.",
    "Is anything missed? Flags: {flags}.",
)


def completion(summary: Summary, steps: Steps, level: int, rng: random.Random, *, thinking: bool, again: float) -> str:
    """The whole completion as the policy would write it after the generation prompt, end token left out."""
    said = answer(summary, steps, level)
    return f"{thought(summary, rng, again=again)}\n</think>\n\n{said}" if thinking else said


Teacher = Callable[[Summary, str, random.Random], tuple[Steps, int]]


def unsure_v46(hits: float, noise: float) -> Teacher:
    """A v46 that is not certain: on the blind spots it is right with probability ``hits``, elsewhere it ends one level
    off with probability ``noise``. The share it gets right is what GRPO can find and reinforce."""

    def teach(summary: Summary, stratum: str, rng: random.Random) -> tuple[Steps, int]:
        if stratum in BLIND_SPOT_STRATA:
            return right(summary) if rng.random() < hits else v46(summary, stratum)
        steps, level = right(summary)
        if rng.random() >= noise:
            return steps, level
        level = min(5, max(1, level + rng.choice((-1, 1))))
        return steps_to(level), level

    return teach


# ---- starts of the lab ----------------------------------------------------------------------------------------------

NURSES: Mapping[str, float] = MappingProxyType({"resources_many": 0.45, "resource_one": 0.45, "resource_none": 0.30})
"""Stratum → share of its cases that triage nurses of this world label one level too acute. Real ones mistriage about a
third; here it is known which, how often and in which direction, so that what training makes of it can be predicted."""

MISREAD: tuple[tuple[float, str], ...] = ((0.10, "dangerous"), (0.16, "under"), (0.22, "over"))
"""Complaints whose hash, in [0, 1), is below a number are misread in that direction; the others are not."""
MISREADING = 0.6
"""How often a misread complaint is given the wrong level."""


def misread(complaint: str) -> str:
    """How a supervised start of this world misreads a complaint: "dangerous", "under", "over", or "" for not at all.

    >>> misread("flank pain") in ("dangerous", "under", "over", "")
    True
    """
    digest = int.from_bytes(hashlib.blake2b(complaint.encode(), digest_size=4).digest(), "big")
    return next((way for below, way in MISREAD if digest / 2**32 < below), "")


def v43(hits: float) -> Teacher:
    """A supervised start that learnt from nurses: misses the card's three rules but for a share ``hits``, names the
    nurses' labels where these waver, misreads some complaints by one level or, dangerously, two, and is 8 % noise."""

    def teach(summary: Summary, stratum: str, rng: random.Random) -> tuple[Steps, int]:
        steps, gold = right(summary)
        way = misread(summary.complaint)
        if stratum in BLIND_SPOT_STRATA:
            return (steps, gold) if rng.random() < hits else v46(summary, stratum)
        draw = rng.random()
        if way:
            shift = {"dangerous": 2 if gold <= 3 else -1, "under": 1, "over": -1}[way] if draw < MISREADING else 0
        elif stratum in NURSES:
            shift = -1 if draw < NURSES[stratum] else 0
        else:
            shift = 0 if draw < 0.92 else rng.choice((-1, 1))
        level = min(5, max(1, gold + shift))
        return (steps, gold) if level == gold else (steps_to(level), level)

    return teach


def too_mild(summary: Summary, stratum: str, rng: random.Random) -> tuple[Steps, int]:
    """Two levels too mild, always, as far as there are levels: a dangerous answer to every case of ESI 1 to 3."""
    level = min(5, right(summary)[1] + 2)
    return steps_to(level), level
