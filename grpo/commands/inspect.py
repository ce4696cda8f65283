"""A recorded step in the terminal: why did this completion get this gradient?

    python -m grpo inspect RUN --step N                        the step's groups
    python -m grpo inspect RUN --step N --case ID              a group's completions side by side
    python -m grpo inspect RUN --step N --case ID --member G   one completion, token by token

Exit codes: 0, and 2 for what cannot be read. Nothing that a model or a case says reaches the terminal raw.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.advantage import zero_variance
from grpo.config import Config
from grpo.inspection.run_reader import read_config
from grpo.inspection.step_text import (
    Paint,
    Record,
    case_lines,
    group_lines,
    member_lines,
    running_text,
    step_lines,
    token_lines,
)
from grpo.metrics import token_slices
from grpo.policy.base_model import load_tokenizer
from grpo.run.folder import Run
from grpo.run.ledger import Entry, ledger_steps, read_step
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.runtime.terminal import error_lines, painted, say_anyhow, screen_width, wants_colour, wrap
from grpo.token_budget import stop_cause

KEPT_OUT = {
    "redacted": 'texts and token ids were not written down (ledger.text = "redacted")',
    "off": 'texts, token ids, case ids and fired rules were not written down (ledger.text = "off")',
}


def step_record(entry: Entry, config: Config) -> Record:
    """A step and its groups, without what was said in them."""
    step = entry.step
    silent = zero_variance(entry.rewards, in_baseline=step.batch.in_baseline.numpy().reshape(entry.rewards.shape))
    return {
        "run": config.name,
        "step": step.number,
        "steps": config.train.steps,
        "text": entry.text,
        "changed": list(entry.changed),
        "metrics": entry.metrics,
        "groups": [
            {
                "group": b,
                "case": group.prompt.case.id or None,
                "gold": group.prompt.case.esi,
                "thinking": group.prompt.thinking,
                "reward_mean": float(entry.rewards[b].mean()),
                "reward_std": float(entry.rewards[b].std(ddof=1)),
                "zero_variance": bool(silent[b]),
                "predicted": [score.answer.level for score in scores],
                "stopped": [stop_cause(c, config.rollout.max_new_tokens) for c in group.completions],
            }
            for b, (group, scores) in enumerate(zip(step.groups, step.scores, strict=True))
        ],
        "dropped": [
            {
                "case": one.case_id or None,
                "completions": len(one.lengths),
                "tokens": sum(one.lengths),
                "rewards": one.rewards,
            }
            for one in step.dropped
        ],
    }


def group_record(entry: Entry, config: Config, b: int) -> Record:
    """A group with all that was said in it; None for what the ledger keeps out."""
    group, full = entry.step.groups[b], entry.text == "full"
    return step_record(entry, config)["groups"][b] | {
        "tags": list(group.prompt.case.tags),
        "case_text": group.prompt.case.text if full else None,
        "prompt_tokens": len(group.prompt.ids),
        "completions": [member_record(entry, config, b, g) for g in range(len(group.completions))],
    }


def member_record(entry: Entry, config: Config, b: int, g: int) -> Record:
    """A completion: its reward and advantage by component, how it stopped, what was parsed and which rules fired."""
    group, score = entry.step.groups[b], entry.step.scores[b][g]
    completion, full = group.completions[g], entry.text == "full"
    return {
        "member": g,
        "text": completion.text if full else None,
        "tokens": len(completion.ids),
        "stopped": stop_cause(completion, config.rollout.max_new_tokens),
        "reward": float(entry.rewards[b, g]),
        "advantage": float(entry.advantages[b, g]),
        "components": {
            name: {"reward": float(part), "advantage": float(entry.shares[name][b, g])}
            for name, part in score.parts.items()
        },
        "predicted": score.answer.level,
        "reason": None if entry.text == "off" else score.answer.reason,
        "answer": _span(completion.text if full else None, score.answer.span),
        "timed_out": None if entry.text == "off" else score.timed_out,
        "fired": None
        if entry.text == "off"
        else [
            {"rule": one.rule, "value": one.value, "match": _span(group.prompt.case.text if full else None, one.span)}
            for one in score.fired
        ],
    }


def token_records(entry: Entry, b: int, g: int, spell: Callable[[int], str] | None) -> list[Record]:
    """Every token of a completion, in each inner epoch.

    Args:
        spell: token id → its text; None if no tokenizer is there.
    """
    row = sum(len(group.completions) for group in entry.step.groups[:b]) + g
    batch, tokens, account = entry.step.batch, entry.step.tokens, entry.account
    place = token_slices([len(ids) for ids in batch.completion_ids])[row]
    ids = batch.completion_ids[row] if entry.text == "full" else [None] * len(batch.completion_ids[row])
    weight = float(batch.token_weights[row, 0])
    sides = {-1: "low", 0: None, 1: "high"}
    return [
        {
            "epoch": epoch + 1,
            "position": t - place.start,
            "id": ids[t - place.start],
            "token": None if spell is None or ids[t - place.start] is None else spell(int(ids[t - place.start] or 0)),
            "logprob": float(tokens.logprobs[epoch, t]),
            "old_logprob": float(tokens.logprobs[0, t]),
            "sampler_logprob": float(batch.sampler_logprobs[row, t - place.start]),
            "ref_logprob": None if tokens.ref_logprobs is None else float(tokens.ref_logprobs[t]),
            "entropy": float(tokens.entropy[t]),
            "ratio": float(account.ratio[epoch, t]),
            "kl": None if account.kl is None else float(account.kl[epoch, t]),
            "clip": sides.get(int(account.clip[epoch, t]), "?"),
            "weight": weight,
            "loss": float(account.loss[epoch, t]),
        }
        for epoch in range(len(tokens.logprobs))
        for t in range(place.start, place.stop)
    ]


def tokenizer_of(config: Config) -> tuple[Callable[[int], str] | None, str]:
    """Token id → text by the run's own tokenizer, from files on this machine; else None and why not."""
    try:
        tokenizer = load_tokenizer(config.model.name)
    except (OSError, ValueError):
        return None, f"token ids in place of texts: no tokenizer of {config.model.name} on this machine"
    return lambda token: tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False), ""


def view(arguments: argparse.Namespace, width: int, paint: Paint) -> tuple[Record, list[str]]:
    """What was asked for, as one JSON value and as lines that fit the width.

    Raises:
        UserError: a part that is missing or cannot be read, or a case or member that is not
            there: says which are.
    """
    config, _ = read_config(arguments.run)
    folder = Run(arguments.run).ledger
    steps = ledger_steps(folder)
    if not steps:
        raise UserError(f"{folder}: no step in this ledger")
    entry = read_step(folder, steps[-1] if arguments.step is None else arguments.step)
    whole = step_record(entry, config)
    head = [paint(line, "red") for one in entry.changed for line in wrap(f"changed since it was written: {one}", width)]
    tail = [] if entry.text == "full" else [paint(line, "dim") for line in wrap(f"—: {KEPT_OUT[entry.text]}", width)]
    if arguments.case is None:
        return whole, [*head, *step_lines(whole, width, paint), *tail]
    shared = {name: whole[name] for name in ("run", "step", "text", "changed")}
    chosen = groups_of(entry, arguments.case)
    groups = [group_record(entry, config, b) for b in chosen]
    if arguments.member is None:
        lines = [line for group in groups for line in group_lines(group, width, paint)]
        return shared | {"groups": groups}, [*head, *lines, *tail]
    size = len(groups[0]["completions"])
    if not 0 <= arguments.member < size:
        raise UserError(f"step {whole['step']}: no member {arguments.member} in that group: it has 0 to {size - 1}")
    spell, why = tokenizer_of(config) if entry.text == "full" else (None, "")
    lines = []
    for b, group in zip(chosen, groups, strict=True):
        member = group["completions"][arguments.member]
        member["token_terms"] = token_records(entry, b, arguments.member, spell)
        group["completions"] = [member]
        lines += [*case_lines(group, width, paint), "", *member_lines(member, width, paint)]
        if spell and paint("x", "bold") != "x":
            lines += ["", *running_text(member["token_terms"], width, paint)]
        lines += token_lines(member["token_terms"], width, paint)
    return shared | {"groups": groups}, [*head, *lines, *([why] if why else []), *tail]


def groups_of(entry: Entry, name: str) -> list[int]:
    """The groups that answer to a case, or, for ``#B``, group B. Raises `UserError` if there is none."""
    ids = [group.prompt.case.id for group in entry.step.groups]
    found = [b for b, case in enumerate(ids) if case and case == name]
    found = found or [b for b in range(len(ids)) if name == f"#{b}"]
    if not found:
        some = ", ".join(case or f"#{b}" for b, case in list(enumerate(ids))[:8])
        raise UserError(f"step {entry.step.number}: no case {name[:80]!r} in it: it has {some}{', …' * (len(ids) > 8)}")
    return found


def finite_values(value: Any) -> Any:
    """The same JSON value with None in place of numbers that JSON does not know.

    >>> finite_values({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _span(text: str | None, span: tuple[int, int] | None) -> Record | None:
    return None if span is None else {"span": list(span), "text": None if text is None else text[span[0] : span[1]]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m grpo inspect", description="Look at a recorded step of a run.")
    made.add_argument("run", type=Path, help="a run folder, for example runs/tiny")
    made.add_argument("--step", type=int, help="which step (default: the ledger's last)")
    made.add_argument("--case", metavar="ID", help="a group's completions side by side; #B names group B")
    made.add_argument("--member", type=int, metavar="G", help="with --case: one completion, token by token")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.member is not None and arguments.case is None:
        made.error("--member needs --case")
    colour = wants_colour(sys.stdout)
    try:
        record, lines = view(
            arguments, screen_width(sys.stdout), lambda text, style: painted(text, style, colour=colour)
        )
    except INPUT_ERRORS as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        print(error_lines(error), file=sys.stderr)
        return 2
    print(json.dumps(finite_values(record), allow_nan=False) if arguments.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that closes early is no error
    sys.exit(main())
