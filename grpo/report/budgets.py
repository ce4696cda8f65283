"""The clipped ratio that smaller budgets would have had, from the lengths in the ledger."""

from collections.abc import Sequence
from pathlib import Path

from grpo.inspection.run_reader import RunRecord
from grpo.report.charts import Line, Panel, chart
from grpo.report.views import View, reading
from grpo.run.ledger import ledger_steps, read_lengths
from grpo.runtime.errors import UserError
from grpo.token_budget import clipped_ratio_at


def forecast(run: RunRecord) -> tuple[View, ...]:
    """The clipped ratio at every budget up to the run's, over the first and the last third of the recorded steps."""
    folder, budget = run.path / "ledger", run.config.rollout.max_new_tokens
    try:
        steps = ledger_steps(folder)
        if not steps:
            return ()
        third = max(1, len(steps) // 3)
        budgets = sorted({max(1, round(budget * i / 120)) for i in range(1, 121)})
        parts = {
            f"steps {steps[0]}–{steps[third - 1]}": steps[:third],
            f"steps {steps[-third]}–{steps[-1]}": steps[-third:],
        }
        lines = []
        for i, (label, part) in enumerate(parts.items()):
            lengths, finished = _lengths(folder, part)
            lines.append(Line(label, clipped_ratio_at(lengths, finished, budgets, max_new_tokens=budget), i))
    except UserError:
        return ()  # what is wrong with the ledger is said beside its completions
    title = "Clipped ratio at every budget"
    svg = chart(Panel(budgets, lines, kind="percent", floor=0.0, ceiling=1.0), title=title)
    readings = tuple(reading(line, "percent") for line in lines)
    caption = (
        "Across: a token budget, up to the run's own. The share of recorded completions that it would have cut, "
        "counted from the lengths in the ledger. Where the curve turns flat, more budget buys nothing."
    )
    return (View(title, svg, readings, caption, " ".join(map(str, budgets)), apart=True),)


def _lengths(folder: Path, steps: Sequence[int]) -> tuple[list[int], list[bool]]:
    lengths: list[int] = []
    finished: list[bool] = []
    for step in steps:
        own = read_lengths(folder, step)
        lengths += own[0]
        finished += own[1]
    return lengths, finished
