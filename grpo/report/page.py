"""Runs → one HTML page that needs nothing but itself."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grpo.inspection.run_reader import RunRecord, distinct_names, read_run
from grpo.report.budgets import forecast
from grpo.report.evaluation import RATES, Span, common_set, first_set, over_steps, spans, verdict
from grpo.report.figures import SECTIONS
from grpo.report.number_format import percent, plain, seconds, signed, whole
from grpo.report.recipe import config_values, differences, reward_values
from grpo.report.samples import Samples, sample_run
from grpo.report.views import Drawn, View, draw
from grpo.runtime.errors import UserError

HERE = Path(__file__).parent
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for."""

    paths: tuple[Path, ...]
    groups: int
    """Groups of completions shown of each chosen step."""
    text: bool
    """Whether cases and completions may stand in the page."""
    most_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    html: bytes
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """The head of one run."""

    run: RunRecord
    headline: str
    sentence: str
    main: tuple[Span, ...]
    facts: tuple[tuple[str, str], ...]
    card: tuple[tuple[str, str, str], ...]
    """(quantity, the v49 card, this run)."""


@dataclass(frozen=True, slots=True)
class Curves:
    """One section of charts."""

    views: tuple[View, ...]
    quiet: tuple[str, ...]
    """Figures that are 0 throughout."""


def make_report(request: Request) -> Report:
    """The page of these runs; groups of completions are left out, last ones first, until it fits.

    Raises:
        UserError: a folder that is no run, or a page too large even without completions.
    """
    runs = [read_run(path) for path in request.paths]
    names = distinct_names([run.path for run in runs], [run.name for run in runs])
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    samples = [sample_run(run, groups=request.groups, text=request.text) for run in runs]
    curves = {title: _curves([draw(figure, runs) for figure in figures]) for title, figures in SECTIONS.items()}
    if len(runs) == 1:
        budget = curves["Token budget"]
        curves["Token budget"] = replace(budget, views=budget.views + forecast(runs[0]))
    html = render(runs, curves, samples)
    left_out = 0
    while len(html) > request.most_bytes and any(one.groups for one in samples):
        fullest = max(range(len(samples)), key=lambda i: len(samples[i].groups))
        samples[fullest] = replace(samples[fullest], groups=samples[fullest].groups[:-1])
        left_out += 1
        html = render(runs, curves, samples, _left_out(left_out, request.most_bytes))
    if len(html) > request.most_bytes:
        raise UserError(
            f"the page takes {len(html) / MEGABYTE:.2f} MB even without completions, the limit is "
            f"{request.most_bytes / MEGABYTE:g} MB: raise --max-mb, or report on fewer runs"
        )
    remarks = [f"{run.name}: {remark}" for run in runs for remark in run.remarks]
    remarks += [f"{one.run}: {remark}" for one in samples for remark in one.remarks]
    return Report(html, tuple([*remarks, _left_out(left_out, request.most_bytes)] if left_out else remarks))


def render(
    runs: Sequence[RunRecord], curves: dict[str, Curves], samples: Sequence[Samples], left_out: str = ""
) -> bytes:
    """The page. All text is escaped; the only markup that comes from elsewhere is our own SVG."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    cases = common_set(runs)
    summaries = [summary(run, cases or first_set(run)) for run in runs]
    page = environment.get_template("page.html.jinja").render(
        title=" · ".join(run.name for run in runs),
        policy=content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        summaries=summaries,
        spans=[span for run in runs for span in spans(run)],
        sets=_by_set([span for run in runs for span in spans(run)]),
        over_steps=[view for run in runs for view in over_steps(run)],
        rates=RATES,
        sections={title: section for title, section in curves.items() if section.views},
        samples=samples,
        left_out=left_out,
        recipes=[(run, config_values(run), reward_values(run)) for run in runs],
        differences=differences(runs) if len(runs) > 1 else (),
        remarks=[(run.name, remark) for run in runs for remark in run.remarks],
    )
    return page.encode("utf-8", "backslashreplace")


def _curves(drawn: Sequence[Drawn]) -> Curves:
    return Curves(tuple(v for one in drawn for v in one.views), tuple(one.quiet for one in drawn if one.quiet))


def content_policy(style: str, script: str) -> str:
    """A policy under which this style sheet and this script run, and nothing else is loaded, run or sent."""
    digests = [
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") for text in (style, script)
    ]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def visible(value: object) -> object:
    r"""A text with everything unprintable but line ends and tabs spelt out: nothing can hide or turn around.

    >>> print(visible("a\u202eb\x00"))
    a\u202eb\x00
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in value)


def prose(text: str) -> list[tuple[bool, str]]:
    """(is a name, text) parts of a caption; names stand between backticks.

    >>> prose("See `lr`.")
    [(False, 'See '), (True, 'lr'), (False, '.')]
    """
    parts = [(bool(i % 2), part) for i, part in enumerate(text.split("`")) if part]
    return [
        (is_name, part if is_name else part.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")) for is_name, part in parts
    ]


def _by_set(rows: Sequence[Span]) -> list[tuple[Span, ...]]:
    """Spans of one run and set together."""
    found: dict[tuple[str, str], list[Span]] = {}
    for span in rows:
        found.setdefault((span.run, span.cases), []).append(span)
    return [tuple(same) for same in found.values()]


def summary(run: RunRecord, cases: str) -> Summary:
    """What stands at the head of the page about one run, judged by one set."""
    headline, sentence = verdict(run, cases)
    main = tuple(span for span in spans(run) if span.cases == cases)
    return Summary(run, headline, sentence, main, tuple(_facts(run)), tuple(_card(run)))


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    config, rows = run.config, run.metrics
    yield "Model", config.model.name + (f", warm start {config.lora.warm_start}" if config.lora.warm_start else "")
    yield (
        "Reward",
        f"{run.reward.get('name', config.reward.set)}, sha256 {run.reward.get('sha256', '')[:12] or 'unknown'}",
    )
    done = int(rows[-1]["step"] or 0) if rows else 0
    size = config.rollout.prompts_per_step * config.rollout.group_size
    yield "Steps", f"{done} of {config.train.steps}, {size} completions each"
    if spent := [sum(v or 0.0 for k, v in row.items() if k.startswith("time/")) for row in rows]:
        yield "Time in steps", f"{seconds(sum(spent))}, {seconds(sum(spent) / len(spent))} a step"
    if tokens := sum(row.get("completions/tokens") or 0.0 for row in rows):
        yield "Tokens sampled", whole(tokens)
    yield "Started", "unknown" if run.started is None else _date(run.started)
    yield "Machine", ", ".join(filter(None, (run.device, run.platform)))
    yield "Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())
    if run.commit:
        yield "Commit", run.commit[:12]


def _card(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    """The figures that the v49 card gives, each beside this run's own."""
    for mode in ("with thinking", "without thinking"):
        own = [span for span in spans(run) if span.cases == "mietic36" and span.mode == mode]
        rate = (own[0].exact.after or own[0].exact.before) if own else None
        shown = f"{rate.text} [{rate.interval}] on mietic36" if rate else "no set called mietic36"
        yield f"Exact {mode}", "77.8 % [61.9–88.3] on MIETIC-36", shown
    if not run.metrics:
        return
    clipped = [v for row in run.metrics if (v := row.get("completions/clipped_ratio")) is not None]
    means = [(v, int(row["step"] or 0)) for row in run.metrics if (v := row.get("reward/mean")) is not None]
    stds = [v for row in run.metrics if (v := row.get("reward/std_batch")) is not None]
    spent = [sum(v or 0.0 for k, v in row.items() if k.startswith("time/")) for row in run.metrics]
    yield (
        "Clipped ratio",
        "4–19 % throughout",
        f"{percent(min(clipped))} to {percent(max(clipped))}" if clipped else "–",
    )
    if means:
        best = max(means)
        yield (
            "Reward mean",
            "positive from step 10, peak +0.49",
            f"{_since(means)}, peak {signed(best[0])} at step {best[1]}",
        )
    yield "Reward std", "~1.0+", f"{plain(sorted(stds)[len(stds) // 2])} in the median step (batch)" if stds else "–"
    yield "Seconds a step", "213.6 on a GB10", plain(sum(spent) / len(spent))


def _since(means: Sequence[tuple[float, int]]) -> str:
    """From which step on the mean reward stayed above 0."""
    below = [step for value, step in means if value <= 0]
    if not below:
        return "positive throughout"
    after = [step for _, step in means if step > below[-1]]
    return f"positive from step {after[0]} on" if after else "not positive at the end"


def _date(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%-d %B %Y, %H:%M UTC")


def _left_out(groups: int, most: int) -> str:
    noun = "group" if groups == 1 else "groups"
    return f"{groups} {noun} of completions left out to keep the page within {most / MEGABYTE:g} MB (--max-mb)."
