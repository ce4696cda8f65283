"""Answer one case with an ESI level: ``grpo triage "case text"``, or with the case on standard input."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config import resolve_path
from grpo.data.row_report import MAX_TEXT
from grpo.evaluation.answers import answer
from grpo.evaluation.request import NO_ADAPTER, config_for_model, fit_to_context
from grpo.policy.adapter_files import base_model_of
from grpo.policy.base_model import device_option
from grpo.policy.policy import load_policy
from grpo.run.self_check import with_checked_kernels
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import memory_errors
from grpo.runtime.terminal import escape_control
from grpo.types import Case
from rewards.safe_files import InvalidFile, decode_utf8

NOTICE = "Research model, not approved for clinical use."
DEFAULT_MODEL, DEFAULT_ADAPTER = "embedded:base", "embedded:v46"


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of ``grpo triage``; options whose name has a dot override that key of the config."""
    examples = ['grpo triage "A 78-year-old female arrived intubated. BP 120/58, HR 84."']
    parser = make_parser("triage", f"Answer one case with an ESI level. {NOTICE}", examples=examples)
    add = parser.add_argument
    add("case", nargs="?", help='the narrative; "-" or nothing reads it from standard input')
    add("--model", help=f"base or merged model (default: the adapter's base, else {DEFAULT_MODEL})")
    add("--adapter", help=f"folder of a LoRA adapter, or none (default: {DEFAULT_ADAPTER} if there is no --model)")
    add("--system-prompt", dest="cases.system_prompt", metavar="TEXT", help="default: the one it was trained with")
    add("--thinking", dest="evaluate.thinking", choices=("on", "off"), nargs=1, default=["on"])
    add("--max-new-tokens", dest="evaluate.max_new_tokens", type=int, metavar="N", help="default: 1024 or what fits")
    add("--temperature", dest="evaluate.temperature", type=float, metavar="T", help="0 is greedy (default: 0.1)")
    add("--seed", dest="train.seed", type=int, default=0, metavar="N")
    add("--device", dest="model.device", type=device_option, metavar="NAME", help="auto, cpu, cuda or cuda:1")
    add("--dtype", dest="model.dtype", choices=("auto", "bfloat16", "float32"))
    add("--json", action="store_true", help="print one line of JSON")
    return parser


def read_case(text: str | None) -> Case:
    """Return the case in the argument, or on standard input for "-" and for a pipe."""
    text = "" if text is None and sys.stdin.isatty() else text
    raw = sys.stdin.buffer.read(4 * MAX_TEXT + 1) if text in (None, "-") else str(text).encode("utf-8", "surrogatepass")
    try:
        narrative = decode_utf8(raw).strip()
    except InvalidFile as error:
        raise UserError(f"the case: {error}") from None
    if not 0 < (size := len(narrative)) <= MAX_TEXT:
        raise UserError(f"expected a case of 1 to {MAX_TEXT:,} characters as argument or standard input, got {size:,}")
    return Case("input", narrative, 3)  # the gold level is not used


def format_answer(result: Mapping[str, Any]) -> str:
    """Return the text, escaped for a terminal, and the level or the reason why there is none."""
    text = "\n".join(escape_control(line) for line in result["text"].expandtabs().split("\n"))
    level = f"ESI {result['level']}" if result["level"] is not None else f"none: {result['reason']}"
    cut = "" if result["finished"] else f" (cut off after {result['tokens']} tokens)"
    return f"{text.strip()}\n\nlevel     {level}{cut}\nnotice    {NOTICE}"


def run(arguments: argparse.Namespace) -> int:
    """Print one sampled answer; return 0 if it has a level and 1 if it has none."""
    case, model, adapter = read_case(arguments.case), arguments.model, arguments.adapter
    options = {key: value for key, value in vars(arguments).items() if "." in key}
    if model is None:
        adapter = DEFAULT_ADAPTER if adapter is None else adapter
        model = DEFAULT_MODEL if adapter in (NO_ADAPTER, DEFAULT_ADAPTER) else base_model_of(resolve_path(adapter))
    config = config_for_model(model, adapter, options)
    config, thinking = fit_to_context(config, {"input": (case,)}, shorten=options["evaluate.max_new_tokens"] is None)
    (mode,) = config.evaluate.thinking
    with memory_errors("answer", "lower --max-new-tokens, or use another --device"):
        policy = with_checked_kernels(load_policy(config.model, config.lora, seed=config.train.seed))
        ((judged,),) = answer(policy, [case], config, name="triage", thinking=mode == "on")
    level, reason = judged.predicted, judged.answer.reason
    result = {"level": level, "reason": reason, "text": judged.text, "thinking": thinking[mode]}
    result |= {"finished": judged.finished, "tokens": judged.tokens, "notice": NOTICE}
    print(json.dumps(result) if arguments.json else format_answer(result))
    return 0 if level is not None else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(argument_parser(), run, argv)
