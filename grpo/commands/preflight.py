"""Prove a run's reward and compare it with blind policies on the run's cases, without a model."""

import argparse
import json
import sys
from collections.abc import Sequence

from grpo.config import load_config
from grpo.preflight.checks import HONEST_ACCURACY, load_inputs, run_checks
from grpo.preflight.text import format_report, record
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.terminal import escape_control
from rewards.blind_policies import check_accuracy


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "preflight",
        "Prove a run's reward and compare it with blind policies on the run's cases, without a model. Exit codes: 0 "
        "sound, 1 unsound, 2 bad input or a case file that cannot be read.",
        examples=(
            "grpo preflight configs/tiny.toml",
            "grpo preflight configs/v49.toml --reward-only",
        ),
    )
    parser.add_argument("config", help="a TOML file, for example configs/tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument(
        "--honest", type=float, default=HONEST_ACCURACY, metavar="ACCURACY", help="accuracy of the honest policy"
    )
    parser.add_argument("--reward-only", action="store_true", help="read no cases: only proof and memory plan")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> int:
    check_accuracy(arguments.honest)
    config, _ = load_config(arguments.config, arguments.set)
    inputs = load_inputs(config, reward_only=arguments.reward_only)
    result = run_checks(config, inputs, accuracy=arguments.honest)
    if arguments.json:
        print(json.dumps(record(config, result), allow_nan=False))
    else:
        print(format_report(config, inputs, result))
    for fault in result.file_errors:
        print(f"error: {escape_control(fault)}", file=sys.stderr)
    return 2 if result.file_errors else 0 if result.sound else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(argument_parser(), run, argv)
