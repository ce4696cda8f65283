"""Prove a run's reward and compare it with blind policies on the run's cases, without a model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.config import load_config
from grpo.preflight.checks import HONEST_ACCURACY, load_inputs, overlong_settings, run_checks
from grpo.preflight.text import explain, format_report, record
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import escape_control
from rewards.blind_policies import check_accuracy
from rewards.safe_files import MEBIBYTE, InvalidFile, read_text


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "preflight",
        "Prove a run's reward and compare it with blind policies on the run's cases, without a model. Exit codes: 0 "
        "sound, 1 unsound, 2 bad input or a case file that cannot be read.",
        examples=(
            "grpo preflight configs/tiny.toml",
            "grpo preflight configs/v49.toml --reward-only",
            "grpo preflight configs/tiny.toml --explain train-000002 --completion '</think>ANSWER: ESI 2'",
        ),
    )
    parser.add_argument("config", help="a TOML file, for example configs/tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument(
        "--honest", type=float, default=HONEST_ACCURACY, metavar="ACCURACY", help="accuracy of the honest policy"
    )
    parser.add_argument("--reward-only", action="store_true", help="read no cases: only proof and memory plan")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("one completion")
    group.add_argument("--explain", metavar="CASE_ID", help="show how a completion of this case is scored")
    group.add_argument(
        "--completion", metavar="TEXT|@FILE", help="the completion or its file; write @@ for a text that begins with @"
    )
    group.add_argument("--thinking", choices=("on", "off"), help="whether the prompt opened <think> (default: config)")
    group.add_argument("--truncated", action="store_true", help="the token budget truncated the completion")
    return parser


def run(arguments: argparse.Namespace) -> int:
    check_accuracy(arguments.honest)
    if (arguments.explain is None) != (arguments.completion is None):
        raise UserError("--explain and --completion must be used together")
    if arguments.explain is not None and (arguments.reward_only or arguments.json):
        raise UserError("--explain needs the cases and prints text: it excludes --reward-only and --json")
    config, _ = load_config(arguments.config, arguments.set)
    inputs = load_inputs(config, reward_only=arguments.reward_only)
    if arguments.explain is not None:
        thinking = arguments.thinking or ("off" if config.rollout.thinking == "off" else "on")
        text = explain(
            inputs,
            arguments.explain,
            _completion(arguments.completion),
            thinking=thinking == "on",
            finished=not arguments.truncated,
            length=overlong_settings(config),
        )
        print(text)
        return 0
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


def _completion(argument: str) -> str:
    if argument.startswith("@@") or not argument.startswith("@"):
        return argument.removeprefix("@")
    try:
        return read_text(Path(argument[1:]), most=64 * MEBIBYTE)
    except InvalidFile as error:
        raise UserError(f"--completion {argument}: {error}") from None
