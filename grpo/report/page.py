"""Write runs as one self-contained HTML page."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grpo.inspection.run_reader import RunRecord, distinct_names, read_run
from grpo.report.evaluation import RATES, BeforeAfter, before_after, judged_set, over_steps, verdict
from grpo.report.figures import SECTIONS
from grpo.report.number_format import seconds, whole
from grpo.report.recipe import config_values, differences, reward_values
from grpo.report.samples import Samples, sample_run
from grpo.report.views import ChartView, all_zero, draw
from grpo.runtime.errors import UserError

HERE = Path(__file__).parent
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Report:
    html: bytes
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """The top of the page for one run."""

    run: RunRecord
    headline: str
    sentence: str
    compared: tuple[BeforeAfter, ...]
    """The set the run is judged by, in each thinking mode."""
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A section of charts."""

    views: tuple[ChartView, ...]
    all_zero: tuple[str, ...]
    """Figures that are 0 at every step."""


def make_report(paths: Sequence[Path], *, groups: int, text: bool, max_bytes: int) -> Report:
    """Make the page of one or several runs.

    Args:
        groups: groups of completions to show for each selected step; the last ones are dropped until the page fits.
        text: if False, omit cases, completions and case ids.
        max_bytes: maximum size of the page.

    Raises:
        UserError: a folder is not a run folder, or the page is too large even without completions.
    """
    runs = [read_run(path) for path in paths]
    names = distinct_names([run.path for run in runs], [run.name for run in runs])
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    samples = [sample_run(run, groups=groups, text=text) for run in runs]
    sections = {
        title: Section(
            tuple(view for figure in figures for view in draw(figure, runs)),
            tuple(zero for figure in figures if (zero := all_zero(figure, runs))),
        )
        for title, figures in SECTIONS.items()
    }
    limit, dropped, note = f"{max_bytes / MEGABYTE:g} MB", 0, ""
    html = render(runs, sections, samples)
    while len(html) > max_bytes and any(sample.groups for sample in samples):
        fullest = max(range(len(samples)), key=lambda i: len(samples[i].groups))
        samples[fullest] = replace(samples[fullest], groups=samples[fullest].groups[:-1])
        dropped += 1
        noun = "group" if dropped == 1 else "groups"
        note = f"{dropped} {noun} of completions omitted to keep the page within {limit} (--max-mb)."
        html = render(runs, sections, samples, note)
    if len(html) > max_bytes:
        raise UserError(
            f"the page takes {len(html) / MEGABYTE:.2f} MB even without completions, more than {limit}: "
            "raise --max-mb, or report on fewer runs"
        )
    remarks = [f"{run.name}: {remark}" for run in runs for remark in run.remarks]
    remarks += [f"{sample.run}: {remark}" for sample in samples for remark in sample.remarks]
    return Report(html, tuple([*remarks, note] if note else remarks))


def render(
    runs: Sequence[RunRecord], sections: dict[str, Section], samples: Sequence[Samples], note: str = ""
) -> bytes:
    """Render the page. All text is escaped; the only markup that is not from the template is our own SVG.

    Args:
        note: how many groups were dropped.
    """
    environment = page_environment(HERE)
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    cases = judged_set(runs)
    compared = [before_after(run) for run in runs]
    by_set: dict[tuple[str, str], list[BeforeAfter]] = {}
    for item in (item for items in compared for item in items):
        by_set.setdefault((item.run, item.cases), []).append(item)
    page = environment.get_template("page.html.jinja").render(
        title=" · ".join(run.name for run in runs),
        policy=content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        summaries=[summary(run, cases or judged_set([run])) for run in runs],
        compared=[item for items in compared for item in items],
        sets=list(by_set.values()),
        over_steps=[view for run in runs for view in over_steps(run)],
        rates=RATES,
        sections={title: section for title, section in sections.items() if section.views},
        samples=samples,
        note=note,
        recipes=[(run, config_values(run), list(reward_values(run))) for run in runs],
        differences=differences(runs) if len(runs) > 1 else (),
        remarks=[(run.name, remark) for run in runs for remark in run.remarks],
    )
    return page.encode("utf-8", "backslashreplace")


def page_environment(folder: Path) -> Environment:
    """Return the template environment of a folder: every value is escaped, and an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escape_control,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    return environment


def content_policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy that allows this style sheet and script, and nothing else to load or send."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def escape_control(value: object) -> object:
    r"""Escape the unprintable characters of a text, except line breaks and tabs.

    >>> print(escape_control("a\u202eb\x00"))
    a\u202eb\x00
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in value)


def prose(text: str) -> list[tuple[bool, str]]:
    """Split a caption into (is code, text) parts at its backticks.

    >>> prose("See `lr`.")
    [(False, 'See '), (True, 'lr'), (False, '.')]
    """
    parts = [(bool(i % 2), part) for i, part in enumerate(text.split("`")) if part]
    return [
        (is_code, part if is_code else part.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")) for is_code, part in parts
    ]


def summary(run: RunRecord, cases: str) -> Summary:
    """Summarize one run, judged by the set ``cases``."""
    compared = tuple(item for item in before_after(run) if item.cases == cases)
    return Summary(run, *verdict(run, cases), compared, tuple(_facts(run)))


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    config, rows = run.config, run.metrics
    yield "Model", config.model.name + (f", warm start {config.lora.warm_start}" if config.lora.warm_start else "")
    sha256 = run.reward.get("sha256", "")[:12] or "unknown"
    yield "Reward", f"{run.reward.get('name', config.reward.set)}, sha256 {sha256}"
    done = int(rows[-1]["step"] or 0) if rows else 0
    size = config.rollout.prompts_per_step * config.rollout.group_size
    yield "Steps", f"{done} of {config.train.steps}, {size} completions each"
    if rows:
        total = sum(value or 0.0 for row in rows for name, value in row.items() if name.startswith("time/"))
        yield "Time in steps", f"{seconds(total)}, {seconds(total / len(rows))} per step"
    if tokens := sum(row.get("completions/tokens") or 0.0 for row in rows):
        yield "Tokens sampled", whole(tokens)
    started = run.started
    yield "Started", datetime.fromtimestamp(started, UTC).strftime("%-d %B %Y, %H:%M UTC") if started else "unknown"
    yield "Machine", ", ".join(filter(None, (run.device, run.platform)))
    yield "Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())
    if run.commit:
        yield "Commit", run.commit[:12]
