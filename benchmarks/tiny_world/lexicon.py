"""The embedded world's vocabulary: complaint families, triggers, decoys and history, read from two TOML files.

Both files are data: what a wording means is decided there, how patients are drawn and triaged in `patients`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

MONTHS = 12

AGES: tuple[int, ...] = (1, 2, *range(4, 25), 48, 60, 72, 84, *range(9 * MONTHS, 93 * MONTHS, MONTHS))
"""Ages that are drawn, in months: none at an edge (3 months, 3 and 8 years) of the danger-zone vitals' age bands."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is found beside the complaint, and the kinds of resources it calls for."""

    needs: frozenset[str]
    says: tuple[str, ...]
    ages: tuple[float, float]
    """Months, both ends included."""
    fever: bool
    mild: bool
    """Never with severe pain."""
    arrivals: tuple[str, ...]
    """Empty: any."""


@dataclass(frozen=True, slots=True)
class Family:
    """A chief complaint: its wordings, whom it befalls, and the findings it may come with."""

    key: str
    short: str
    kind: str
    link: str
    painful: bool
    ages: tuple[float, float]
    """Months, both ends included."""
    sex: str | None
    says: tuple[str, ...]
    findings: tuple[Finding, ...]
    fever: bool
    """The complaint itself is a fever."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """A fact with wordings: an intervention, state, high-risk situation, open injury, decoy, history or allergy."""

    key: str
    label: str
    lifesaving: bool
    plain: tuple[str, ...]
    other: tuple[str, ...]
    """Wordings that the card's patterns do not match; empty: ``plain`` is all there is."""
    families: tuple[str, ...]
    kinds: tuple[str, ...]
    ages: tuple[float, float]
    """Months, both ends included."""
    arrivals: tuple[str, ...]
    """Empty: any."""
    mental: str
    fever: bool
    about: str
    after: str
    speaks: bool
    raised: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int]]
    """Vital sign → the range that the wording implies."""


def months(years: tuple[float, float]) -> tuple[float, float]:
    """A range of ages in months; the last year counts to its end.

    >>> months((4, 60))
    (48, 731)
    """
    low, high = years
    return low * MONTHS, high * MONTHS + (11 if high == int(high) else 0)


def _family(key: str, row: dict[str, Any]) -> Family:
    ages = months(row["ages"])
    findings = tuple(
        Finding(
            needs=frozenset(found["needs"]),
            says=tuple(found["says"]),
            ages=months(found["ages"]) if "ages" in found else ages,
            fever=found.get("fever", False),
            mild=found.get("mild", False),
            arrivals=tuple(found.get("arrivals", ())),
        )
        for found in row["findings"]
    )
    return Family(
        key=key,
        short=row["short"],
        kind=row["kind"],
        link=row.get("link", "with"),
        painful=row.get("painful", False),
        ages=ages,
        sex=row.get("sex"),
        says=tuple(row["says"]),
        findings=findings,
        fever=row.get("fever", False),
    )


def _trigger(key: str, row: dict[str, Any]) -> Trigger:
    vitals = ("heart_rate", "resp_rate", "systolic")
    return Trigger(
        key=key,
        label=row.get("label", key),
        lifesaving=row.get("lifesaving", False),
        plain=tuple(row["plain"]),
        other=tuple(row.get("other", ())),
        families=tuple(row.get("families", ())),
        kinds=tuple(row.get("kinds", ())),
        ages=months(row.get("ages", (0, 99))),
        arrivals=tuple(row.get("arrivals", ())),
        mental=row.get("mental", "alert"),
        fever=row.get("fever", False),
        about=row.get("about", ""),
        after=row.get("after", ""),
        speaks=row.get("speaks", False),
        raised=tuple(row.get("raised", ())),
        ranges=MappingProxyType({sign: (row[sign][0], row[sign][1]) for sign in vitals if sign in row}),
    )


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _section(name: str) -> Mapping[str, Trigger]:
    return MappingProxyType({key: _trigger(key, row) for key, row in _TRIGGERS[name].items()})


_TRIGGERS = _read("triggers.toml")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {key: _family(key, row) for key, row in _read("complaints.toml").items()}
)
DONE = _section("done")
STATES = _section("state")
HIGH_RISK = _section("high_risk")
OPEN_INJURIES = _section("open_injury")
DECOYS = _section("decoy")
HISTORIES = _section("history")
ALLERGIES = _section("allergy")
