"""The training loop: ``grpo train configs/tiny.toml``.

    cases → prompts → groups of completions → rewards → advantages → clipped, KL-anchored update of the adapter

Everything is loaded and checked before the first rollout. Under ``torchrun`` each process runs this loop: see
`grpo.runtime.distributed`.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo.batch import group_advantages, make_batch, reward_matrix
from grpo.config import Config, ConfigSource, load_config
from grpo.dynamic_sampling import replace_uniform_groups
from grpo.evaluation.during_training import evaluate_if_due
from grpo.evaluation.records import before_after_table
from grpo.policy.policy import save_adapter
from grpo.prompts import prompts_for_step
from grpo.report.model_card import write_model_card
from grpo.rollout import sample_groups, sampling_keys
from grpo.run.checkpoint import Progress
from grpo.run.ending import (
    raise_if_diverged,
    resume_hint,
    save_if_due,
    save_last_step,
    stop_if_any_rank_was_asked,
    stopped_early,
)
from grpo.run.folder import RunFolder, check_folder, exclusive_lock, read_evaluations
from grpo.run.ledger import LEDGER_VERSION
from grpo.run.resume import broadcast_start_state, check_ranks_agree, start_or_resume
from grpo.run.self_check import DriftWarning, check_on_cuda
from grpo.run.setup import Setup, describe_run, load_setup, with_check
from grpo.run.step_record import progress_bar, record_step, show_progress
from grpo.runtime.atomic_files import DiskError, atomic_folder
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.distributed import (
    QUIET_EXIT_DELAY_S,
    RankLost,
    ReportedByMainRank,
    World,
    exit_process,
    init_world,
    launched_world,
)
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.runtime.interrupts import Interrupted, Interrupts, handle_signals
from grpo.runtime.out_of_memory import OutOfMemory
from grpo.runtime.terminal import escape_control, print_unless_pipe_closed
from grpo.scoring import score_groups
from grpo.types import StepRecord
from grpo.update import update_policy


def train(setup: Setup, run: RunFolder, stop: Interrupts, progress: Progress) -> None:
    """Run the steps after ``progress`` up to ``train.steps``: sample, score, normalize, update, record.

    A signal interrupts anything but an update and files being written; the last completed step is then saved.
    """
    config, policy, ranks = setup.config, setup.policy, setup.policy.world
    bar = progress_bar(progress, config, ranks)
    drift = DriftWarning(policy.lm_head.weight.dtype, config.rollout.temperature)
    try:
        with stop.at_once():
            evaluate_if_due(setup, run, progress.step)
            for step in bar:
                started = time.perf_counter()
                prompts = prompts_for_step(setup.cases, setup.epoch_indices, policy.tokenizer, config, step)
                groups = sample_groups(policy, prompts, sampling_keys(prompts, config, step), config)
                scores = score_groups(setup.reward, groups, config, ranks)  # text only, no tensors
                groups, scores, dropped = replace_uniform_groups(setup, groups, scores, step)  # off in v49
                sampled = time.perf_counter()

                with stop.deferred():  # a signal waits for the end of this block
                    advantages = group_advantages(groups, reward_matrix(scores), config.advantage)  # [B,G]
                    batch = make_batch(groups, advantages, config)  # token weights are fixed here
                    stop_if_any_rank_was_asked(ranks, stop)
                    with stop.within_grace():
                        result = update_policy(
                            policy,
                            batch,
                            config,
                            setup.optimizer,
                            setup.reference,
                            step=step,
                            limit=setup.micro_batch_limit,
                        )
                    seconds = {"rollout": sampled - started, "update": time.perf_counter() - sampled}
                    progress = progress.after(result.skipped)
                    record = StepRecord(progress.step, groups, scores, batch, result.logprobs, dropped, *result.figures)
                    if ranks.is_main:
                        metrics = record_step(setup, run, record, seconds)
                        show_progress(bar, metrics, config)
                        drift.warn_once(record.number, metrics["sampler/max_abs_logprob_diff"])
                save_if_due(setup, run, stop, progress)
                raise_if_diverged(setup, progress, groups)
                evaluate_if_due(setup, run, progress.step)
    except (Interrupted, RankLost, OutOfMemory) as error:
        if not getattr(error, "midway", False):  # else the policy has moved since the last completed step
            save_last_step(setup, run, progress)
        raise
    save_result(setup, run)


def save_result(setup: Setup, run: RunFolder) -> None:
    """Write the adapter and its model card."""
    if setup.policy.world.is_main:
        with atomic_folder(run.adapter) as staging:
            save_adapter(setup.policy, staging)
            write_model_card(run.path, staging / "README.md")


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "train",
        "Train a LoRA adapter with GRPO. Exit codes: 0 done, 2 bad input, 3 a file could not be written, 4 another "
        "rank was lost, 130, 143 or 129 stopped by SIGINT, SIGTERM or SIGHUP; except after 2, --resume continues.",
        examples=[
            "grpo train configs/tiny.toml",
            "grpo train configs/tiny.toml --out runs/two --set train.steps=2",
            "grpo train configs/tiny.toml --resume",
        ],
    )
    parser.add_argument("config", help="a TOML file, for example configs/tiny.toml")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )
    return parser


def run_training(
    arguments: argparse.Namespace, out: Path, config: Config, source: ConfigSource, stop: Interrupts, ranks: World
) -> None:
    """Load everything, open the run folder, which only rank 0 does, and train."""
    with contextlib.ExitStack() as lock:
        existed, progress, run = out.is_dir(), Progress(), RunFolder(out)
        with stop.at_once():
            # first of all: ranks with different configs would not make the same calls when loading the model
            versions = {"torch": torch.__version__, "ledger": LEDGER_VERSION}
            ranks.check_identical(versions | config.model_dump(mode="json"))
            with ranks.fail_together(*INPUT_ERRORS):
                if ranks.is_main:
                    check_folder(out, config, resume=arguments.resume)
                    if existed:
                        lock.enter_context(exclusive_lock(out))
            with ranks.fail_together(*INPUT_ERRORS):
                setup = load_setup(config, ranks)
            check_ranks_agree(setup)
            with ranks.fail_together(*INPUT_ERRORS):
                check = check_on_cuda(setup.policy)
            setup = with_check(setup, check)
        with ranks.fail_together(*INPUT_ERRORS):
            if ranks.is_main:
                header = f"config    {source.path}\n{describe_run(setup)}"
                print_unless_pipe_closed("\n".join(escape_control(line) for line in header.splitlines()))
                if not existed:  # the folder is created only now that the input is known to be valid
                    lock.enter_context(exclusive_lock(out))
                check_folder(out, config, resume=arguments.resume)  # another process may have created it since
                run, progress = start_or_resume(out, setup, source)
        with stop.at_once():
            progress = broadcast_start_state(setup, progress)
        train(setup, run, stop, progress)
        if ranks.is_main:
            print_result(run)


def print_result(run: RunFolder) -> None:
    """Print the evaluations before and after training, and where the results are."""
    records = read_evaluations(run)
    table = [f"\n{before_after_table(records)}\n"] if records else []
    answers = [f"answers   {run.path / 'eval'}"] if records else []
    paths = [f"adapter   {run.adapter}", f"metrics   {run.metrics}", *answers]
    follow_up = f"next      python -m grpo report {run.path}; python -m grpo replay {run.path}"
    print_unless_pipe_closed("\n".join([*table, *paths, follow_up]))


def run_process(arguments: argparse.Namespace) -> int:
    """Run the training of one config in this process and return the exit code."""
    os.umask(0o077)  # narratives may be patients' data: the run folder is readable by its owner only
    out, ranks = None, None
    try:
        with handle_signals() as stop:
            config, source = load_config(arguments.config, arguments.set)
            out = arguments.out or Path("runs") / config.name
            with init_world(config.model.device, timeout_s=config.train.rank_timeout_s) as ranks:
                run_training(arguments, out, config, source, stop, ranks)
        return 0
    except (Interrupted, RankLost) as error:
        ranks = ranks or launched_world()
        return stopped_early(error, stop.requested, ranks, resume_hint(arguments, out, ranks))
    except (*INPUT_ERRORS, DiskError) as error:
        if isinstance(error, ReportedByMainRank) or (out is None and not launched_world().is_main):
            time.sleep(QUIET_EXIT_DELAY_S)
            return 2
        resumable = isinstance(error, (DiskError, OutOfMemory))
        if ranks and not ranks.is_main:
            error = UserError(f"rank {ranks.rank}: {error}")
        if resumable:
            error.add_note(resume_hint(arguments, out, ranks or launched_world()))
        raise error from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(argument_parser(), run_process, argv)


if __name__ == "__main__":
    exit_process(main())
