"""One answer to one case: ``python -m grpo triage "case text"``, or the case on standard input.

The defaults run the embedded model and its warm start. Exit codes: 0 a level was read, 1 the answer holds none, 2 bad
input, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.cases import row_key
from grpo.config import COLDEST, Lora, Model, resolve
from grpo.data.row_report import MAX_TEXT
from grpo.policy.adapter_files import base_of, lora_section, system_prompt
from grpo.policy.base_model import device_option
from grpo.policy.policy import Policy, check_adapter, load_policy
from grpo.prompts import render_prompt
from grpo.rollout import rollout
from grpo.run.self_check import with_checked_kernels
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.runtime.out_of_memory import memory_errors
from grpo.runtime.terminal import error_lines, say_anyhow, visible
from grpo.types import Case, Completion
from rewards import Answer, parse_answer

NOTICE = "Research model, not approved for clinical use."
DEFAULT_MODEL, DEFAULT_ADAPTER = "embedded:base", "embedded:v46"
CARDS_BUDGET = 1024
"""Tokens of an answer, as the card evaluates; less where the model's context holds less."""
NO_ADAPTER = Lora(r=1, alpha=1.0, dropout=0.0, target_modules=("down_proj",), warm_start="")
"""A fresh adapter: B = 0, so the model speaks as it is."""


@dataclass(frozen=True, slots=True)
class Triage:
    """One case answered."""

    answer: Answer
    completion: Completion
    thinking: bool


def triage(
    policy: Policy,
    text: str,
    *,
    system: str,
    thinking: bool,
    temperature: float,
    seed: int,
    max_new_tokens: int | None = None,
) -> Triage:
    """One sampled answer to a case and the level that it commits to.

    Args:
        text: the narrative; it becomes the user turn and nothing else does.
        system: the system prompt.
        thinking: the chat template's switch.
        temperature: 0 takes the most likely tokens.
        seed: the same seed, model and case give the same answer.
        max_new_tokens: None takes `CARDS_BUDGET`, or what the context leaves.

    Raises:
        UserError: a text that is no narrative, or a prompt and budget that do not fit the context.
    """
    case = Case("input", checked(text), 3)  # the level of gold is never looked at
    prompt = render_prompt(policy.tokenizer, case, system_prompt=system, thinking=thinking)
    room = min(CARDS_BUDGET, max(1, policy.context - len(prompt.ids)))
    with memory_errors("answer", "lower --max-new-tokens, or use another --device"):
        (group,) = rollout(
            policy,
            [prompt],
            [[row_key("triage", seed)]],
            max_new_tokens=room if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
        )
    (completion,) = group.completions
    return Triage(parse_answer(completion.text, thinking=prompt.thinking), completion, prompt.thinking)


def checked(text: str) -> str:
    """The narrative without blanks around it.

    Raises UserError if it is empty, longer than `MAX_TEXT` characters, or holds what no text file should.
    """
    if not text.strip():
        raise UserError('no case: give it as one argument, python -m grpo triage "...", or on standard input')
    if len(text) > MAX_TEXT:
        raise UserError(f"the case has {len(text):,} characters, at most {MAX_TEXT:,} are read")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError("the case is not UTF-8 text: it holds a NUL or bytes that are no characters")
    return text.strip()


def load_speaker(model: str | None, adapter: str | None, *, device: str, dtype: str) -> tuple[Policy, str]:
    """What answers, and its system prompt.

    Args:
        model: a base or merged model; None takes the adapter's own base, or the embedded base.
        adapter: "none" takes none; None does too, or, if there is no model either, the embedded warm start.

    Raises UserError: what cannot be loaded, and why.
    """
    if model is None and adapter is None:
        model, adapter = DEFAULT_MODEL, DEFAULT_ADAPTER
    for option, value in (("--model", model), ("--adapter", adapter)):
        if value == "":
            raise UserError(f'{option} "": expected a folder or a name')
    folder = None if adapter in (None, "none") else resolve(str(adapter))
    name = (base_of(folder) if folder else DEFAULT_MODEL) if model is None else model
    lora = NO_ADAPTER if folder is None else lora_section(folder, str(adapter))
    if folder:
        check_adapter(folder, lora, name, key="--adapter")
    section = Model.model_validate({"name": name, "device": device, "dtype": dtype, "gradient_checkpointing": False})
    return load_policy(section, lora, seed=0), system_prompt(name, folder)


def show(result: Triage) -> str:
    """The answer for a person: what was said, then the level, or why there is none.

    What a terminal would obey is shown as an escape: a case may hold its commands, and a model may repeat them.
    """
    answer = result.answer
    said = "\n".join(visible(line) for line in result.completion.text.expandtabs().split("\n"))
    level = f"ESI {answer.level}" if answer.level is not None else f"none: {answer.reason}"
    cut = "" if result.completion.finished else f" (cut off after {len(result.completion.ids)} tokens)"
    return f"{said.strip()}\n\nlevel     {level}{cut}\nnotice    {NOTICE}"


def as_json(result: Triage) -> str:
    """The answer for a machine, as one line."""
    record = {
        "level": result.answer.level,
        "reason": result.answer.reason,
        "text": result.completion.text,
        "thinking": result.thinking,
        "finished": result.completion.finished,
        "tokens": len(result.completion.ids),
        "notice": NOTICE,
    }
    return json.dumps(record)


def _read_case(text: str | None) -> str:
    """The case from the command line, or from standard input for "-" and for a pipe."""
    if text not in (None, "-"):
        return str(text)
    if text is None and sys.stdin.isatty():
        return ""
    raw = sys.stdin.buffer.read(4 * MAX_TEXT + 1)
    if len(raw) > 4 * MAX_TEXT:
        raise UserError(f"standard input: more than {MAX_TEXT:,} characters, which is no narrative")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 (byte {error.start})") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grpo triage", description=f"Answer one case with an ESI level. {NOTICE}"
    )
    parser.add_argument("case", nargs="?", help='the narrative; "-" or nothing reads it from standard input')
    parser.add_argument("--model", help=f"base or merged model (default: the adapter's base, else {DEFAULT_MODEL})")
    parser.add_argument(
        "--adapter", help=f"a LoRA adapter's folder, or none (default: {DEFAULT_ADAPTER} on {DEFAULT_MODEL})"
    )
    parser.add_argument("--system-prompt", help="default: the run's, the merged model's, or the card's")
    parser.add_argument("--thinking", choices=["on", "off"], default="on")
    parser.add_argument("--max-new-tokens", type=int, help=f"default: {CARDS_BUDGET}, or what the context leaves")
    parser.add_argument("--temperature", type=float, default=0.1, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device_option, default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    arguments = _parser().parse_args(argv)
    try:
        if arguments.temperature != 0 and not COLDEST <= arguments.temperature < float("inf"):
            raise UserError(f"--temperature {arguments.temperature}: expected 0, or a number of at least {COLDEST:g}")
        if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: expected at least 1")
        text = checked(_read_case(arguments.case))
        policy, system = load_speaker(
            arguments.model, arguments.adapter, device=arguments.device, dtype=arguments.dtype
        )
        result = triage(
            with_checked_kernels(policy),
            text,
            system=arguments.system_prompt or system,
            thinking=arguments.thinking == "on",
            temperature=arguments.temperature,
            seed=arguments.seed,
            max_new_tokens=arguments.max_new_tokens,
        )
    except INPUT_ERRORS as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(as_json(result) if arguments.json else show(result))
    return 0 if result.answer.level is not None else 1


if __name__ == "__main__":
    sys.exit(main())
