"""The lab's record → one HTML page that needs nothing but itself: the report's look, its charts and its policy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from grpo.report.charts import COLORS, NOTHING, Chart, Line, Zone, line_chart, number
from grpo.report.page import HERE as REPORT
from grpo.report.page import content_policy, page_environment

HERE = Path(__file__).parent

CARDS: Mapping[str, tuple[str, str]] = {
    "v45c": ("collapsed to “always ESI 1”", "K"),
    "v46": ("77.8 % exact, 94.4 % adjacent; three rules missed", "K"),
    "v47": ("“hedging drift”: zero dangerous errors, less exact; no figures", "K"),
    "v48": ("clipped ratio 90 %+ for most of the run; no figures", "K"),
    "v49": ("77.8 % exact, 100 % adjacent, thinking on and off alike; clipped 4–19 %", "K"),
}
"""What the series' cards report, and its grade."""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    aside: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One section of the page."""

    key: str
    title: str
    intro: str
    table: Table | None = None
    views: tuple[Chart, ...] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """What a chart of the lab draws: one metric of some runs."""

    title: str
    metric: str
    runs: tuple[str, ...]
    percent: bool
    caption: str
    zones: tuple[Zone, ...] = ()


CURVES: tuple[Curve, ...] = (
    Curve(
        "v45c: answers that name ESI 1",
        "rollout/says_1",
        ("v45c",),
        True,
        "Of the training completions. The stream is mostly ESI 1, so look at the evaluation above for the collapse.",
    ),
    Curve(
        "v46 and v47: over-triage by one level",
        "rollout/over_by_one",
        ("v46", "v47", "v47-std"),
        True,
        "Of the training completions, against the labels of the stream.",
    ),
    Curve("v46 and v47: exact", "rollout/exact", ("v46", "v47", "v47-std"), True, "Of the training completions."),
    Curve(
        "v48 and v49: clipped ratio",
        "completions/clipped_ratio",
        ("v48", "v48-priced", "v49"),
        True,
        "Share of completions that the budget cut. The band is the card’s 4–19 %.",
        (Zone("card: 4–19 %", 0.04, 0.19),),
    ),
    Curve(
        "v48 and v49: reward",
        "reward/mean",
        ("v48", "v48-priced", "v49"),
        False,
        "Mean total of a step. The card’s v49 was positive from step 10.",
    ),
    Curve(
        "v48 and v49: groups without variance",
        "groups/zero_variance",
        ("v48", "v48-priced", "v49"),
        True,
        "Share of groups whose rewards are all equal: they teach nothing.",
    ),
    Curve(
        "v49 and what its parts carry: exact",
        "rollout/exact",
        ("v49", "no-rules", "no-std", "from-base"),
        True,
        "Of the training completions.",
    ),
)


def render(record: Mapping[str, Any]) -> bytes:
    """The page of a `benchmarks.series.record.lab_record` with its provenance. All text is escaped."""
    environment = page_environment(HERE)
    style = (REPORT / "page.css").read_text(encoding="utf-8")
    verdicts = [claim["verdict"] for claim in record["claims"]]
    page = environment.get_template("lab.html.jinja").render(
        policy=content_policy(style),
        style=Markup(style),
        headline=f"{verdicts.count('reproduced')} of {len(verdicts)} claims reproduced",
        lead=lead(record),
        parts=tuple(parts(record)),
        facts=tuple(facts(record)),
    )
    return page.encode("utf-8", "backslashreplace")


def lead(record: Mapping[str, Any]) -> str:
    count = len(record["seeds"])
    return (
        f"The series of the v49 card, run again on the embedded world: {len(record['runs'])} recipes under {count} "
        f"seed{'s' * (count != 1)}, each evaluated on {record['set']['n']} generated vignettes with and without "
        "thinking. A claim is judged by a stated criterion, and counts as reproduced if it holds under every seed."
    )


def parts(record: Mapping[str, Any]) -> Iterator[Part]:
    """The sections that the record has something for."""
    runs: Mapping[str, Any] = record["runs"]
    yield Part("claims", "What was reproduced", "Each claim, its criterion, and what every seed found.", claims(record))
    yield Part(
        "series",
        "The series",
        "Exact: warm start → after training, both thinking modes and all seeds together; in brackets the 95 % interval "
        "with answers to one case kept together. Three rules: exact on lifesaving done / severe pain / open injury. "
        "The cards speak of Qwen3.5-9B on 36 clinical cases: compare shapes.",
        series(record),
    )
    if views := tuple(view for curve in CURVES if (view := draw(curve, runs))):
        yield Part(
            "curves", "Curves", "Thick lines: mean of the seeds; thin lines: the lowest and the highest.", None, views
        )
    if table := thresholds(record):
        yield Part(
            "hedging",
            "When hedging pays",
            "Where training labels waver between a level and the next milder one, naming the more acute pays above a "
            "share of 1 / (2 + price of one level too mild). Dividing by the group’s std cancels prices in groups that "
            "name two levels: then the share is a half. Observed: how often the trained policy names the more acute.",
            table,
        )
    if table := ablations(record):
        yield Part(
            "ablations",
            "What carries the result",
            "One change each, against v49; same seeds; all but from-base start from v46.",
            table,
        )
    if table := generalisation(record):
        yield Part(
            "generalisation",
            "Beyond the patterns",
            "Exact, both modes: the card warns that rule bonuses do not generalise beyond their patterns.",
            table,
        )
    if table := foretold(record):
        yield Part("foretold", "What preflight said before", "Seconds, without a model.", table)


def claims(record: Mapping[str, Any]) -> Table:
    rows = [
        (
            Cell(one["run"]),
            Cell(one["says"]),
            Cell(one["verdict"]),
            Cell(one["wanted"], " · ".join(f"seed {seed}: {f['found']}" for seed, f in one["by_seed"].items())),
        )
        for one in record["claims"]
    ]
    return Table(("run", "the series says", "verdict", "criterion, and what was found"), tuple(rows))


def series(record: Mapping[str, Any]) -> Table:
    rows = []
    for name, run in record["runs"].items():
        if run["kind"] != "ablation":
            card, grade = CARDS.get(name, (NOTHING, ""))
            rows.append((Cell(name, run["about"]), Cell(card, grade), *_outcome(run)))
    heads = ("run", "card", "exact", "adjacent", "dangerous", "over by one", "three rules", "clipped", "a run took")
    return Table(heads, tuple(rows))


def ablations(record: Mapping[str, Any]) -> Table | None:
    runs = record["runs"]
    if "v49" not in runs:
        return None
    rows = [
        (Cell(name, run["about"]), *_outcome(run))
        for name, run in runs.items()
        if name == "v49" or run["kind"] == "ablation"
    ]
    heads = ("run", "exact", "adjacent", "dangerous", "over by one", "three rules", "clipped", "a run took")
    return Table(heads, tuple(rows)) if len(rows) > 1 else None


def _outcome(run: Mapping[str, Any]) -> Iterator[Cell]:
    before, after = run["rates"]["before"], run["rates"]["after"]
    yield Cell(f"{share(before['exact'])} → {share(after['exact'])}", reach(after["exact"]))
    for name in ("adjacent", "dangerous_under", "over_by_one"):
        yield Cell(share(after[name]), reach(after[name]))
    rules = ("lifesaving_done", "severe_pain", "open_injury")
    yield Cell(" / ".join(share(after[rule]) for rule in rules))
    clipped = run["curves"]["completions/clipped_ratio"]["mean"]
    yield Cell(f"{percent(clipped[0])} → {percent(clipped[-1])}" if clipped else NOTHING)
    spent = run["seconds"]
    yield Cell(duration(sum(spent) / len(spent)), f"{duration(sum(run['cpu_s']) / len(spent))} of a core")


def thresholds(record: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            Cell(name),
            Cell(row["stratum"].replace("_", " "), f"gold ESI {row['gold']}"),
            Cell(percent(row["labelled_acute"])),
            Cell(percent(row["threshold"])),
            Cell("hedges" if row["hedges"] else "does not"),
            Cell(f"{share(row['before'])} → {share(row['after'])}", reach(row["after"])),
        )
        for name, found in record["thresholds"].items()
        for row in found
    ]
    heads = ("run", "cases", "labelled more acute", "threshold", "predicted", "named more acute")
    return Table(heads, tuple(rows)) if rows else None


def generalisation(record: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            Cell(name),
            *(
                Cell(f"{share(part['before'])} → {share(part['after'])}", f"n = {part['n']}; {reach(part['after'])}")
                for part in found.values()
            ),
        )
        for name, found in record["generalisation"].items()
    ]
    if not rows:
        return None
    names = next(iter(record["generalisation"].values()))
    return Table(("run", *names), tuple(rows))


def foretold(record: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            Cell(name),
            Cell(told["verdict"]),
            Cell("; ".join(told["refusals"]) or NOTHING),
            Cell(", ".join(f"{p['policy']} {p['mean']:+.2f}" for p in told["policies"])),
        )
        for name, told in record["foretold"].items()
    ]
    return Table(("run", "verdict", "why", "best paid policies"), tuple(rows)) if rows else None


def draw(curve: Curve, runs: Mapping[str, Any]) -> Chart | None:
    """The chart of the runs that have its metric; None without any."""
    found = [(name, runs[name]["curves"][curve.metric]) for name in curve.runs if name in runs]
    found = [(name, values) for name, values in found if values["mean"]]
    if not found:
        return None
    lines = []
    for i, (name, values) in enumerate(found):
        mean, low, high = (list(enumerate(values[key], 1)) for key in ("mean", "low", "high"))
        lines.append(Line(name, mean, i % COLORS, (low, high)))
    return line_chart(curve.title, curve.caption, lines, percent=curve.percent, zones=curve.zones)


def facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the figures come from."""
    yield "Command", record["command"]
    yield "Finished", record["finished"]
    yield "Seeds", ", ".join(map(str, record["seeds"]))
    spent = [s for run in record["runs"].values() for s in run["cpu_s"]]
    yield "Cost", f"{len(spent)} runs, {duration(sum(spent))} of one core"
    yield "Machine", record["machine"]["platform"]
    yield "Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    if record["commit"]:
        yield "Commit", record["commit"][:12]
    yield "Runs", "; ".join(f"{count} with commit {commit[:12]}" for commit, count in record["commits_of_runs"].items())


def percent(fraction: float) -> str:
    return number(fraction, percent=True)


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def share(rate: Mapping[str, Any] | None) -> str:
    return NOTHING if rate is None else percent(rate["share"])


def reach(rate: Mapping[str, Any] | None) -> str:
    return "" if rate is None else f"[{100 * rate['low']:.1f}–{100 * rate['high']:.1f}]"
