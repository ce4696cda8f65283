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
from grpo.report.evaluation import RATES, evaluated_sets, exact_over_steps
from grpo.report.figures import SECTIONS, draw
from grpo.report.recipe import config_values, differences, reward_values
from grpo.report.samples import Samples, sample_run
from grpo.runtime.errors import UserError

HERE = Path(__file__).parent
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Report:
    html: bytes
    remarks: tuple[str, ...]


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
    limit, dropped, note = f"{max_bytes / MEGABYTE:g} MB", 0, ""
    html = render(runs, samples)
    while len(html) > max_bytes and any(sample.groups for sample in samples):
        fullest = max(range(len(samples)), key=lambda i: len(samples[i].groups))
        samples[fullest] = replace(samples[fullest], groups=samples[fullest].groups[:-1])
        dropped += 1
        noun = "group" if dropped == 1 else "groups"
        note = f"{dropped} {noun} of completions omitted to keep the page within {limit} (--max-mb)."
        html = render(runs, samples, note)
    if len(html) > max_bytes:
        raise UserError(
            f"the page takes {len(html) / MEGABYTE:.2f} MB even without completions, more than {limit}: "
            "raise --max-mb, or report on fewer runs"
        )
    remarks = [f"{run.name}: {remark}" for run in runs for remark in run.remarks]
    remarks += [f"{sample.run}: {remark}" for sample in samples for remark in sample.remarks]
    return Report(html, tuple([*remarks, note] if note else remarks))


def render(runs: Sequence[RunRecord], samples: Sequence[Samples], note: str = "") -> bytes:
    """Render the page. All text is escaped; the only markup that is not from the template is our own SVG.

    Args:
        note: how many groups were dropped.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    charts = {
        title: [chart for figure in figures for chart in draw(figure, runs)] for title, figures in SECTIONS.items()
    }
    page = (
        page_environment(HERE)
        .get_template("page.html.jinja")
        .render(
            policy=content_policy(style),
            style=Markup(style),
            runs=runs,
            facts=[list(_facts(run)) for run in runs],
            differences=differences(runs) if len(runs) > 1 else (),
            evaluations=[(run.name, shown) for run in runs for shown in evaluated_sets(run)],
            over_steps=[chart for run in runs for chart in exact_over_steps(run)],
            rates=RATES,
            sections={title: shown for title, shown in charts.items() if shown},
            samples=samples,
            note=note,
            recipes=[(run, config_values(run), list(reward_values(run))) for run in runs],
        )
    )
    return page.encode("utf-8", "backslashreplace")


def page_environment(folder: Path) -> Environment:
    """Return the template environment of a folder: every value is escaped, and an undefined name is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escape_control,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def content_policy(style: str) -> str:
    """Return a Content-Security-Policy that allows this style sheet, and nothing to load, run or send."""
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"


def escape_control(value: object) -> object:
    r"""Escape the unprintable characters of a text, except line breaks and tabs.

    >>> print(escape_control("a\u202eb\x00"))
    a\u202eb\x00
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in value)


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
        yield "Time in steps", f"{total / 3600:.3g} h, {total / len(rows):.3g} s per step"
    if tokens := sum(row.get("completions/tokens") or 0.0 for row in rows):
        yield "Tokens sampled", f"{tokens:,.0f}"
    started = run.started
    yield "Started", datetime.fromtimestamp(started, UTC).strftime("%-d %B %Y, %H:%M UTC") if started else "unknown"
    yield "Machine", ", ".join(filter(None, (run.device, run.platform)))
    yield "Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())
    if run.commit:
        yield "Commit", run.commit[:12]
