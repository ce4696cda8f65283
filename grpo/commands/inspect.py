"""``grpo inspect RUN``: show a recorded step in the terminal and why a completion got its gradient.

Exit codes: 0, and 2 if something cannot be read. Texts of models and cases reach the terminal escaped.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo.config import Config
from grpo.inspection.run_reader import read_header
from grpo.inspection.step_records import JsonObject, find_groups, group_record, step_record, token_records
from grpo.inspection.step_text import group_lines, step_lines
from grpo.policy.base_model import load_tokenizer
from grpo.run.folder import RunFolder
from grpo.run.ledger import read_step, recorded_steps
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import screen_width, wrap

NOT_RECORDED = {
    "redacted": 'texts and token ids were not recorded (ledger.text = "redacted")',
    "off": 'texts, token ids, case ids and fired rules were not recorded (ledger.text = "off")',
}


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "inspect",
        "Show a recorded step of a run: its groups, one group's completions, or one completion's tokens.",
        examples=[
            "grpo inspect runs/tiny --step 3",
            "grpo inspect runs/tiny --step 3 --case train-001621",
            "grpo inspect runs/tiny --step 3 --case train-001621 --member 1",
        ],
    )
    parser.add_argument("run", type=Path, help="run folder, for example runs/tiny")
    parser.add_argument("--step", type=int, help="step to show (default: the last recorded one)")
    parser.add_argument("--case", metavar="ID", help="show a group's completions; #B selects group B")
    parser.add_argument("--member", type=int, metavar="G", help="with --case: show the tokens of completion G")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def select(arguments: argparse.Namespace) -> tuple[JsonObject, list[str]]:
    """Return the selected part of a run as a JSON value, and notes on what is missing or was modified.

    Raises:
        UserError: the run cannot be read, or it has no such step, case or member.
    """
    config, folder = read_header(arguments.run).config, RunFolder(arguments.run).ledger
    steps = recorded_steps(folder)
    if not steps:
        raise UserError(f"{folder}: no step in this ledger")
    entry = read_step(folder, steps[-1] if arguments.step is None else arguments.step)
    notes = [f"changed since it was written: {file}" for file in entry.modified_files]
    notes += [] if entry.text == "full" else [f"—: {NOT_RECORDED[entry.text]}"]
    record = step_record(entry, config)
    if arguments.case is None:
        return record, notes
    groups = find_groups(entry, arguments.case)
    record = {name: record[name] for name in ("run", "step", "text", "changed")}
    record["groups"] = [group_record(entry, config, b) for b in groups]
    if (g := arguments.member) is not None:
        decode_token, reason = _token_decoder(config) if entry.text == "full" else (None, "")
        notes += [reason] if reason else []
        for b, group in zip(groups, record["groups"], strict=True):
            size = len(group["completions"])
            if not 0 <= g < size:
                members = f"whose members are 0 to {size - 1}"
                raise UserError(f"step {entry.step.number}: no member {g} in this group, {members}")
            terms = token_records(entry, b, g, decode_token)
            group["completions"] = [group["completions"][g] | {"token_terms": terms}]
    return record, notes


def _token_decoder(config: Config) -> tuple[Callable[[int], str] | None, str]:
    """Return token id → text of the run's tokenizer, from local files; else None and the reason."""
    try:
        tokenizer = load_tokenizer(config.model.name)
    except (OSError, ValueError):
        return None, f"token ids instead of texts: no tokenizer of {config.model.name} on this machine"
    return lambda token: tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False), ""


def run(arguments: argparse.Namespace) -> int:
    if arguments.member is not None and arguments.case is None:
        raise UserError("--member needs --case")
    record, notes = select(arguments)
    if arguments.json:
        print(json.dumps(record, allow_nan=False))
        return 0
    width = screen_width()
    groups = record["groups"] if arguments.case else ()
    lines = [line for group in groups for line in group_lines(group, width)] or step_lines(record, width)
    for line in [*lines, *(line for note in notes for line in wrap(note, width))]:
        print(line.rstrip())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(argument_parser(), run, argv, if_interrupted="nothing was written")
