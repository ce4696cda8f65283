"""Evaluations of a run: which sets are due after a step, and their records."""

import sys

from tqdm import tqdm

from grpo.evaluation.answers import evaluate
from grpo.evaluation.metrics import summarize
from grpo.evaluation.records import append_evaluation
from grpo.run.folder import RunFolder, read_evaluations
from grpo.run.setup import Setup
from grpo.runtime.terminal import pad_or_truncate

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
"""tqdm's format without the rate, which does not fit into 80 columns."""


def evaluate_if_due(setup: Setup, run: RunFolder, step: int) -> None:
    """Evaluate the sets that the config schedules after ``step`` steps, in each mode, and record the results. An
    evaluation that is already recorded is not repeated."""
    section, ranks = setup.config.evaluate, setup.policy.world
    first_or_last = step in (0, setup.config.train.steps)
    names = [
        *(section.before_and_after if first_or_last else ()),
        *(section.periodic if first_or_last or step % section.every == 0 else ()),
    ]
    if not names:
        return
    recorded = read_evaluations(run) if ranks.is_main else []
    done = ranks.broadcast_object([[record["step"], record["cases"], record["thinking"]] for record in recorded])
    due = [(name, mode) for name in names for mode in section.thinking if [step, name, mode] not in done]
    total, hidden = (
        sum(len(setup.evaluation_sets[name]) for name, _ in due),
        not (due and ranks.is_main and sys.stderr.isatty()),
    )
    with tqdm(total=total, bar_format=BAR_FORMAT, leave=False, disable=hidden) as bar:
        for name, mode in due:
            bar.set_description(f"evaluate {pad_or_truncate(name, 18).rstrip()}, thinking {mode}")
            answers = evaluate(
                setup.policy,
                setup.evaluation_sets[name],
                setup.config,
                name=name,
                thinking=mode == "on",
                progress=bar.update,
            )
            record = {"step": step, "cases": name, "thinking": mode, **summarize(answers, setup.reward)}
            if ranks.is_main:
                append_evaluation(run, record, answers, text=setup.config.ledger.text == "full")
