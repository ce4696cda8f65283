"""The card's evaluation: ``python -m grpo evaluate CONFIG|MODEL``.

    model, adapter, cases → answers with and without thinking → rates with intervals, errors, a comparison

OUT/
    settings.json    all that the answers depend on, hashes of model, adapter and cases included
    answers/         one JSONL a set and mode: every answer, appended as it comes
    eval.json        rates, intervals, baselines, agreement, errors, levels by case; no text of any case

A second start with the same settings goes on where the first stopped, and changes no answer. The reward set and the
comparison are no part of the settings: they judge answers that are there. Exit codes: 0 done, 2 bad input,
130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grpo.config import Thinking
from grpo.evaluation.answers import answer, append_answers, in_order, read_answers
from grpo.evaluation.comparison import FORMAT, AnsweredCase, Evaluated, between_modes, compare
from grpo.evaluation.failures import failure_row, failures, triage_of_errors
from grpo.evaluation.metrics import Verdict, baselines, levels_by_case, over_samples, summarise
from grpo.evaluation.request import MODES, Asked, ask, default_folder
from grpo.evaluation.table import scorecard
from grpo.policy.policy import adapter_swapped, load_policy
from grpo.run.folder import provenance, write_json
from grpo.run.input_hashes import text_sha256
from grpo.run.self_check import with_checked_kernels
from grpo.runtime.distributed import require_alone
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.runtime.out_of_memory import EVALUATION, memory_errors
from grpo.runtime.terminal import error_lines, say_anyhow, visible
from grpo.types import Case
from rewards.safe_files import Unreadable, check_contents, is_regular, read_json

Verdicts = Mapping[tuple[str, Thinking], tuple[Verdict, ...]]
"""(set, mode) → its answers, in the order of the cases."""


def answered(asked: Asked, out: Path) -> Verdicts:
    """All answers: those that the folder holds, and the others as they come. Loads nothing if none is missing."""
    config = asked.config
    parts = [(name, mode) for name in asked.sets for mode in config.evaluate.thinking]
    files = {(name, mode): out / "answers" / f"{name}_{mode}.jsonl" for name, mode in parts}
    known = {(name, mode): _known(asked, files[name, mode], name, mode) for name, mode in parts}
    wanted = {part: len(asked.sets[part[0]]) * asked.samples for part in parts}
    missing = [part for part in parts if len(known[part]) < wanted[part]]
    with memory_errors("evaluation", EVALUATION), contextlib.ExitStack() as stack:
        policy = None
        if missing:
            policy = with_checked_kernels(load_policy(config.model, config.lora, seed=config.train.seed))
        if policy is not None and not config.lora.warm_start:
            stack.enter_context(adapter_swapped(policy, None))  # a fresh adapter says nothing: none need be run
        open_folder(out, asked.settings)
        done = sum(map(len, known.values()))
        bar = stack.enter_context(tqdm(total=sum(wanted.values()), initial=done, unit="answer", disable=not missing))
        for name, mode in missing:
            assert policy is not None
            bar.set_description(f"{name}, thinking {mode}")
            for batch in answer(
                policy,
                asked.sets[name],
                config,
                name=name,
                thinking=mode == "on",
                samples=asked.samples,
                formats=asked.reward.formats,
                known=known[name, mode],
            ):
                append_answers(files[name, mode], batch, text=config.ledger.text == "full")
                known[name, mode] |= {(v.case.id, v.sample): v for v in batch}
                bar.update(len(batch))
    return {part: in_order(list(known[part].values()), asked.sets[part[0]]) for part in parts}


def _known(asked: Asked, file: Path, name: str, mode: Thinking) -> dict[tuple[str, int], Verdict]:
    return read_answers(
        file, asked.sets[name], asked.samples, thinking=asked.opened[mode], formats=asked.reward.formats
    )


def evaluation(asked: Asked, verdicts: Verdicts, against: Path | None) -> dict[str, Any]:
    """``eval.json``: every figure, case ids and levels, and no text."""
    config, settings, reward = asked.config, asked.settings, asked.reward
    failed = {part: failures(found, reward) for part, found in verdicts.items()}
    records = [
        {
            "cases": name,
            "thinking": mode,
            **summarise(found, reward),
            **({"samples": over_samples(found)} if asked.samples > 1 else {}),
            "errors": triage_of_errors(asked.sets[name], failed[name, mode], reward),
        }
        for (name, mode), found in verdicts.items()
    ]
    cases = {name: answered_cases(members, name, verdicts) for name, members in asked.sets.items()}
    adapter = config.lora.warm_start
    return {
        "format": FORMAT,
        "model": {"name": config.model.name, "sha256": settings["model_sha256"]},
        "adapter": {"name": adapter, "sha256": settings["adapter_sha256"]} if adapter else None,
        "reward": {"name": reward.name, "sha256": reward.sha256},
        "settings": dict(settings),
        "batch_size": config.evaluate.batch_size,
        "left_out": list(asked.left_out),
        **provenance(settings["device"]),
        "records": records,
        "baselines": {name: baselines([case.esi for case in members]) for name, members in asked.sets.items()},
        "agreement": {name: between_modes(told) for name, told in cases.items() if len(told[0].levels) == 2},
        "errors": [
            {"cases": name, "thinking": mode, **failure_row(failure)}
            for (name, mode), found in failed.items()
            for failure in found
        ],
        "cases": {name: [case.model_dump(mode="json") for case in told] for name, told in cases.items()},
        "comparison": comparison(asked.before, settings, cases, against) if asked.before and against else None,
    }


def answered_cases(cases: Sequence[Case], name: str, verdicts: Verdicts) -> tuple[AnsweredCase, ...]:
    """The cases of a set by hash, each with the levels it was given in every mode."""
    levels = {mode: levels_by_case(found) for (part, mode), found in verdicts.items() if part == name}
    return tuple(
        AnsweredCase(
            id=case.id,
            esi=case.esi,
            sha256=text_sha256(case.text),
            levels={mode: tuple(by_case[case.id]) for mode, by_case in levels.items()},
        )
        for case in cases
    )


def comparison(
    before: Evaluated, settings: Mapping[str, Any], cases: Mapping[str, Sequence[AnsweredCase]], against: Path
) -> dict[str, Any]:
    """What changed since an earlier evaluation, for every set and mode in both."""
    found = [
        {"cases": name, "thinking": mode, **compare(before.cases[name], now, mode)}
        for name, now in cases.items()
        if name in before.cases
        for mode in now[0].levels
    ]
    compared = {(record["cases"], record["thinking"]): record["n"] for record in found}
    alone = [
        {"cases": name, "thinking": mode, "n": len(now) - compared.get((name, mode), 0)}
        for name, now in cases.items()
        for mode in now[0].levels
    ]
    how = ("samples", "max_new_tokens", "temperature", "seed", "system_prompt", "formats", "device", "dtype")
    return {
        "against": str(against),
        "adapter_sha256": before.settings.get("adapter_sha256"),
        "changed_settings": [key for key in how if before.settings.get(key) != settings[key]],
        "records": [record for record in found if record["n"]],
        "not_compared": [record for record in alone if record["n"]],
    }


def check_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes sure that there is no such folder yet, or that its answers were given with these settings; writes nothing.

    Raises:
        UserError: it holds something else, or answers of another evaluation.
    """
    path = out / "settings.json"
    if is_regular(path):
        try:
            check_contents(out)
            before = read_json(path)
        except Unreadable as error:
            why = str(error).removeprefix("cannot be read: ")
            raise UserError(f"{path}: cannot be read: {why}: delete {out} to start again") from None
        if before != settings:
            held = before if isinstance(before, dict) else {}
            other = sorted(key for key in settings.keys() | held.keys() if settings.get(key) != held.get(key))
            raise UserError(
                f"{out}: holds answers given with other {', '.join(other)}: name another folder with --out, or "
                f"delete it"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already there, and no evaluation: name another folder with --out")


def open_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, readable by its owner alone."""
    (out / "answers").mkdir(parents=True, exist_ok=True)
    out.chmod(0o700)
    write_json(out / "settings.json", settings)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m grpo evaluate",
        description="Answer cases with and without thinking, and say how good the answers are, and why the wrong are.",
        epilog="Exit codes: 0 done, 2 bad input, 130 interrupted: the same command goes on.",
    )
    made.add_argument("what", metavar="CONFIG|MODEL", help="a TOML config; or a model: folder, embedded:base or hub id")
    made.add_argument("--adapter", metavar="DIR", help='instead of the config\'s warm start; "none": the base alone')
    made.add_argument("--cases", metavar="FILE", help="instead of the sets of [evaluate]")
    made.add_argument("--thinking", choices=MODES, help="default: as the config says; the card's: both")
    made.add_argument("--samples", type=_positive, default=1, metavar="K", help="answers to each case (default: 1)")
    made.add_argument("--max-new-tokens", type=_positive, metavar="N", help="token budget of an answer")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--temperature", type=float, metavar="T", help="of the sampling")
    how.add_argument("--greedy", action="store_true", help="the most likely token always")
    made.add_argument("--batch-size", type=_positive, metavar="N", help="answers decoded together: memory and speed")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder (default: runs/eval-NAME-HASH of the settings)")
    made.add_argument("--against", type=Path, metavar="EVAL.JSON", help="an earlier evaluation to compare with")
    made.add_argument("--json", action="store_true", help="print eval.json instead of the table")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    require_alone("grpo evaluate")
    arguments = parser().parse_args(argv)
    os.umask(0o077)  # answers may repeat what patients' notes say
    try:
        asked = ask(arguments)
        out = arguments.out or default_folder(asked)
        check_folder(out, asked.settings)
        record = evaluation(asked, answered(asked, out), arguments.against)
        write_json(out / "eval.json", record)
    except INPUT_ERRORS as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a folder that may not be written
        print(f"error: {visible(str(error.filename or arguments.out or ''))}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(record, indent=2))
    else:
        where = (f"record     {out / 'eval.json'}", f"answers    {out / 'answers'}")
        print("\n".join((scorecard(record), "", *map(visible, where))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
