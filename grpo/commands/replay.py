"""``grpo replay RUN``: recompute a run from its ledger and compare every value with the log.

Exit codes: 0 equal, 1 different, 2 unreadable.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grpo.inspection.counterfactual import change_line, counterfactual, summary_lines, table_lines
from grpo.inspection.replay import environment_changes, folder_differences, not_checked, replay, replay_lines, verdict
from grpo.inspection.run_reader import RecordedRun, read_recorded_run
from grpo.policy.base_model import device_option
from grpo.run.ledger import read_step
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import escape_control
from rewards import load_reward

Output = tuple[dict[str, Any], list[str], int]
"""The JSON record, the lines for a terminal, the exit code."""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "replay",
        "Recompute a run from its ledger and compare every value with the log, except the speed and memory of the "
        "machine.\nThe inputs (texts, token ids, log-probabilities, entropies) are protected by sha256; --model "
        "recomputes the\nlog-probabilities. loss/trained, grad_norm and skipped are compared with their copy.\n"
        "Exit codes: 0 equal, 1 different, 2 unreadable.",
        examples=["grpo replay runs/tiny", "grpo replay runs/tiny --reward v45c --step 3"],
    )
    parser.add_argument("run", type=Path, help="run folder, for example runs/tiny")
    parser.add_argument("--step", type=int, help="replay this step only")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--reward", metavar="SET", help="show the advantages under another reward set (name or TOML)")
    modes.add_argument("--model", action="store_true", help="also recompute the log-probabilities with the model")
    parser.add_argument(
        "--device", type=device_option, help="with --model: auto, cpu, cuda, cuda:1 (default: the run's)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def replay_run(recording: RecordedRun, arguments: argparse.Namespace) -> Output:
    """Replay the selected steps and, with ``--model``, recompute their log-probabilities."""
    started = time.perf_counter()
    steps = _select_steps(recording, arguments.step)
    result = replay(recording, steps)
    around = [d for d in folder_differences(recording) if arguments.step is None or d.step in (0, arguments.step)]
    differences = [*around, *result.differences]
    lines = replay_lines(recording, result, differences)
    record: dict[str, Any] = {
        "run": str(arguments.run),
        "equal": not differences,
        **{name: getattr(result, name) for name in ("steps", "completions", "tokens", "metrics")},
        "differences": [dataclasses.asdict(difference) for difference in differences],
        "not_checked": not_checked(recording, result),
        "made_with": dict(recording.made_with),
        "elsewhere": environment_changes(recording),
    }
    if arguments.model:
        from grpo.inspection.recompute_logprobs import replay_with_model

        record["model"], model_lines, equal = replay_with_model(recording, steps, arguments.device)
        record["equal"] &= equal
        lines += model_lines
    record["seconds"] = time.perf_counter() - started
    if differences or record["equal"]:
        lines.append(verdict(result, differences, record["seconds"]))
    else:
        lines.append("the record is consistent in itself but not with the model: see above")
    return record, lines, int(not record["equal"])


def compare_rewards(recording: RecordedRun, arguments: argparse.Namespace) -> Output:
    """Score the selected steps with another reward. The exit code is 1 if files were modified."""
    numbers, other = _select_steps(recording, arguments.step), load_reward(arguments.reward)
    modified, steps = [], []
    for number in tqdm(numbers, unit="step", leave=False, disable=None):
        entry = read_step(recording.run.ledger, number)
        modified += [f"{name}: changed since it was written: its sha256 differs" for name in entry.modified_files]
        steps.append(counterfactual(entry, recording.config, other))
    step_lines = table_lines(steps[0]) if len(steps) == 1 else [change_line(step) for step in steps]
    names = {"now": recording.reward.name, "then": other.name}
    record = {
        "run": str(arguments.run),
        "rewards": names,
        "changed": modified,
        "steps": [dataclasses.asdict(step) | {"flips": step.flips} for step in steps],
    }
    lines = [*modified, *step_lines, *summary_lines(steps, *names.values())]
    return record, lines, int(bool(modified))


def _select_steps(recording: RecordedRun, step: int | None) -> tuple[int, ...]:
    if step is None:
        return recording.steps
    if step not in recording.steps:
        steps = f"it has steps {recording.steps[0]} to {recording.steps[-1]}" if recording.steps else "it is empty"
        raise UserError(f"{recording.run.ledger}: no step {step} in this ledger: {steps}")
    return (step,)


def run(arguments: argparse.Namespace) -> int:
    recording = read_recorded_run(arguments.run)
    record, lines, code = (compare_rewards if arguments.reward else replay_run)(recording, arguments)
    print(json.dumps(record) if arguments.json else "\n".join(escape_control(line) for line in lines))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(argument_parser(), run, argv, if_interrupted="nothing was written")
