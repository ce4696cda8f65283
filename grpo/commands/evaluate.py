"""Evaluate a config or a model: ``grpo evaluate CONFIG|MODEL``.

    model, adapter, cases → answers with and without thinking → rates with intervals, errors, a comparison

OUT/
    settings.json    everything that the answers depend on, with hashes of model, adapter and cases
    answers/         one JSONL file per set and mode, to which answers are appended as they are sampled
    eval.json        rates, intervals, baselines, agreement, errors, levels by case; no text of any case

Starting again with the same settings resumes and changes no answer. Reward set and comparison are not settings: they
judge the stored answers.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grpo.config import ThinkingMode
from grpo.evaluation.answers import answer, append_answers, in_order, read_answers
from grpo.evaluation.comparison import EVAL_FORMAT, AnsweredCase, compare_evaluations, compare_modes
from grpo.evaluation.failures import count_failures, failures
from grpo.evaluation.metrics import JudgedAnswer, baselines, levels_by_case, multi_sample_stats, summarize
from grpo.evaluation.request import MODES, EvaluationRequest, check_output_folder, default_folder, parse_request
from grpo.evaluation.table import evaluation_table
from grpo.policy.policy import as_reference, load_policy
from grpo.run.folder import provenance, write_json
from grpo.run.input_hashes import text_sha256
from grpo.run.self_check import with_checked_kernels
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.distributed import require_single_process
from grpo.runtime.out_of_memory import EVALUATION, memory_errors
from grpo.runtime.terminal import escape_control

Part = tuple[str, ThinkingMode]
"""(set, mode)."""
AnswersByPart = Mapping[Part, Sequence[JudgedAnswer]]
"""The answers of each part are in the order of its cases."""


def answer_all(request: EvaluationRequest, out: Path) -> AnswersByPart:
    """Return all answers: those stored in the folder and, sampled and stored now, the missing ones. Load no model if
    none is missing."""
    config, formats = request.config, request.reward.formats
    parts: list[Part] = [(name, mode) for name in request.sets for mode in config.evaluate.thinking]
    files = {(name, mode): out / "answers" / f"{name}_{mode}.jsonl" for name, mode in parts}
    stored = {
        (name, mode): read_answers(
            files[name, mode],
            request.sets[name],
            request.samples,
            thinking=request.thinking[mode],
            formats=formats,
        )
        for name, mode in parts
    }
    counts = {(name, mode): len(request.sets[name]) * request.samples for name, mode in parts}
    missing = [part for part in parts if len(stored[part]) < counts[part]]
    if missing:
        with memory_errors("evaluation", EVALUATION), contextlib.ExitStack() as stack:
            policy = with_checked_kernels(load_policy(config.model, config.lora, seed=config.train.seed))
            if not config.lora.warm_start:
                stack.enter_context(as_reference(policy, None))  # a fresh adapter changes nothing: skip it
            (out / "answers").mkdir(parents=True, exist_ok=True)
            out.chmod(0o700)
            write_json(out / "settings.json", request.settings)
            done = sum(map(len, stored.values()))
            bar = stack.enter_context(tqdm(total=sum(counts.values()), initial=done, unit="answer"))
            for name, mode in missing:
                bar.set_description(f"{name}, thinking {mode}")
                for batch in answer(
                    policy,
                    request.sets[name],
                    config,
                    name=name,
                    thinking=mode == "on",
                    samples=request.samples,
                    formats=formats,
                    stored=stored[name, mode],
                ):
                    append_answers(files[name, mode], batch, text=config.ledger.text == "full")
                    stored[name, mode] |= {(a.case.id, a.sample): a for a in batch}
                    bar.update(len(batch))
    return {part: in_order(list(stored[part].values()), request.sets[part[0]]) for part in parts}


def evaluation_record(request: EvaluationRequest, answers: AnswersByPart, against: Path | None) -> dict[str, Any]:
    """Return ``eval.json``: all figures, case ids and levels, and no text."""
    config, settings, reward, adapter = request.config, request.settings, request.reward, request.config.lora.warm_start
    failed = {part: failures(members, reward) for part, members in answers.items()}
    cases = {name: answered_cases(request, name, answers) for name in request.sets}
    return {
        "format": EVAL_FORMAT,
        "model": {"name": config.model.name, "sha256": settings["model_sha256"]},
        "adapter": {"name": adapter, "sha256": settings["adapter_sha256"]} if adapter else None,
        "reward": {"name": reward.name, "sha256": reward.sha256},
        "settings": dict(settings),
        "batch_size": config.evaluate.batch_size,
        "left_out": list(request.dropped),
        **provenance(settings["device"]),
        "records": [
            {
                "cases": name,
                "thinking": mode,
                **summarize(members, reward),
                **({"samples": multi_sample_stats(members)} if request.samples > 1 else {}),
                "errors": count_failures(request.sets[name], failed[name, mode], reward),
            }
            for (name, mode), members in answers.items()
        ],
        "baselines": {name: baselines([case.gold_level for case in members]) for name, members in request.sets.items()},
        "agreement": {name: compare_modes(members) for name, members in cases.items() if len(members[0].levels) == 2},
        "errors": [{"cases": n, "thinking": mode, **row} for (n, mode), rows in failed.items() for row in rows],
        "cases": {name: [case.model_dump(mode="json") for case in members] for name, members in cases.items()},
        "comparison": (
            compare_evaluations(request.before, settings, cases, against) if request.before and against else None
        ),
    }


def answered_cases(request: EvaluationRequest, name: str, answers: AnswersByPart) -> tuple[AnsweredCase, ...]:
    """Return the cases of a set, each with its hash and the levels of its answers in each mode."""
    by_mode = {mode: levels_by_case(members) for (part, mode), members in answers.items() if part == name}
    levels = {case.id: {mode: tuple(of[case.id]) for mode, of in by_mode.items()} for case in request.sets[name]}
    return tuple(
        AnsweredCase(id=case.id, esi=case.gold_level, sha256=text_sha256(case.text), levels=levels[case.id])
        for case in request.sets[name]
    )


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of ``grpo evaluate``; options whose name has a dot override that key of the config."""
    parser = make_parser(
        "evaluate",
        "Answer cases with and without thinking; report rates with intervals, the reasons of wrong answers, and what "
        "changed since an earlier evaluation.",
        examples=[
            "grpo evaluate configs/tiny.toml --out runs/before",
            "grpo evaluate configs/tiny.toml --adapter runs/tiny/adapter --against runs/before/eval.json",
            "grpo evaluate embedded:base --cases cases.jsonl --max-new-tokens 96",
        ],
    )
    add = parser.add_argument
    add("what", metavar="CONFIG|MODEL", help="a TOML config, or a model: a folder, embedded:base or a hub id")
    add("--adapter", metavar="DIR", help='adapter to use instead of the config\'s warm start; "none": the base alone')
    add("--cases", metavar="FILE", help="case file to use instead of the sets of [evaluate]")
    add("--thinking", dest="evaluate.thinking", choices=MODES, help="default: that of the config; for a MODEL, both")
    add("--samples", type=positive_int, default=1, metavar="K", help="answers per case (default: 1)")
    add("--max-new-tokens", dest="evaluate.max_new_tokens", type=int, metavar="N", help="token budget of an answer")
    add("--temperature", dest="evaluate.temperature", type=float, metavar="T", help="0: always the most likely token")
    add("--batch-size", dest="evaluate.batch_size", type=int, metavar="N", help="answers decoded together")
    add("--out", type=Path, metavar="DIR", help="output folder (default: runs/eval-NAME-HASH of the settings)")
    add("--against", type=Path, metavar="EVAL.JSON", help="earlier evaluation to compare with")
    add("--json", action="store_true", help="print eval.json instead of the table")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated")
    return parser


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {value}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print the table or the record."""
    os.umask(0o077)  # answers may repeat patients' notes
    request = parse_request(arguments)
    out = arguments.out or default_folder(request)
    check_output_folder(out, request.settings)
    record = evaluation_record(request, answer_all(request, out), arguments.against)
    write_json(out / "eval.json", record)
    if arguments.json:
        print(json.dumps(record, indent=2))
    else:
        paths = (f"record     {out / 'eval.json'}", f"answers    {out / 'answers'}")
        print("\n".join((evaluation_table(record), "", *map(escape_control, paths))))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    require_single_process("grpo evaluate")
    return run_command(argument_parser(), run, argv, if_interrupted="the same command resumes")
