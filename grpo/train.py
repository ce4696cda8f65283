"""The training loop: ``grpo train configs/tiny.toml``.

    cases → prompts → groups of completions → rewards → advantages → clipped, KL-anchored update of the adapter

Everything is loaded and checked before the first rollout. Under ``torchrun`` each process runs this loop: see
`grpo.runtime.distributed`.
"""

import argparse
import contextlib
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from grpo.batch import group_advantages, make_batch, reward_matrix
from grpo.config import Config, ConfigSource, load_config
from grpo.dynamic_sampling import replace_uniform_groups
from grpo.evaluation.during_training import evaluate_if_due
from grpo.evaluation.records import before_after_table
from grpo.metrics import advantage_by_component, compute_token_terms, step_metrics
from grpo.policy.policy import save_adapter
from grpo.prompts import prompts_for_step
from grpo.report.model_card import write_model_card
from grpo.rollout import sample_groups, sampling_keys
from grpo.run.checkpoint import Progress, find_damage, save_checkpoint
from grpo.run.exit_messages import resume_hint, stopped_early
from grpo.run.folder import RunFolder, append_metrics, check_folder, exclusive_lock, nan_to_none, read_evaluations
from grpo.run.ledger import LEDGER_VERSION, write_step
from grpo.run.resume import bit_checksum, broadcast_start_state, check_ranks_agree, start_or_resume
from grpo.run.self_check import DriftWarning, check_on_cuda
from grpo.run.setup import Setup, describe_run, load_setup, with_check
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
from grpo.types import Group, StepRecord
from grpo.update import learning_rate, update_policy

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's format without the rate, which does not fit into 80 columns; the metrics record the seconds of each step."""


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


def progress_bar(progress: Progress, config: Config, ranks: World) -> Any:
    """Return the remaining steps, with a bar if rank 0's standard error is a terminal."""
    hidden = not (ranks.is_main and sys.stderr.isatty())
    steps = range(progress.step, config.train.steps)
    return tqdm(steps, initial=progress.step, total=config.train.steps, bar_format=BAR_FORMAT, disable=hidden)


def show_progress(bar: Any, metrics: dict[str, Any], config: Config) -> None:
    """Update the bar; without a terminal print one line per step instead."""
    text = progress_text(metrics, config)
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    line = f"step {metrics['step']}/{config.train.steps}  {text}, {seconds:.1f} s"
    print_unless_pipe_closed(line, sys.stderr)


def progress_text(metrics: dict[str, Any], config: Config) -> str:
    """Return the reward, clipped share and KL of a step."""
    kl = metrics.get(f"kl/{config.loss.kl}")
    text = f"reward {metrics['reward/mean']:+.2f}, clipped {100 * metrics['completions/clipped_ratio']:.0f} %"
    return text if kl is None else f"{text}, KL {kl:.4f}"


def stop_if_any_rank_was_asked(ranks: World, stop: Interrupts) -> None:
    """Raise `Interrupted` on all ranks if any rank received a signal, so that all stop before the same update. Each
    waits for the others' replies up to the grace period."""
    with stop.within_grace():
        signals = [number for number in ranks.all_gather_object(stop.requested) if number is not None]
    if signals:
        raise Interrupted(signals[0])


def save_if_due(setup: Setup, run: RunFolder, stop: Interrupts, progress: Progress) -> None:
    """Save a checkpoint if the config schedules one, after the last step, and before a diverged run ends. The adapters
    of the ranks are compared first."""
    config, policy = setup.config, setup.policy
    scheduled = progress.step % config.checkpoint.every == 0 or progress.step == config.train.steps
    if not scheduled and progress.skipped_in_a_row <= config.train.max_nonfinite_steps:
        return
    policy.world.check_identical({"adapter": bit_checksum(policy.adapter_parameters().values())})
    if policy.world.is_main:
        with stop.deferred():
            save_checkpoint(run.checkpoints, policy, setup.optimizer, progress, config.checkpoint)


def save_last_step(setup: Setup, run: RunFolder, progress: Progress) -> None:
    """Save the last completed step of a run that ends early, unless it is saved already."""
    if setup.policy.world.is_main and progress.step and find_damage(run.checkpoints / f"step_{progress.step:06d}"):
        save_checkpoint(run.checkpoints, setup.policy, setup.optimizer, progress, setup.config.checkpoint)


def save_result(setup: Setup, run: RunFolder) -> None:
    """Write the adapter and its model card."""
    if setup.policy.world.is_main:
        with atomic_folder(run.adapter) as staging:
            save_adapter(setup.policy, staging)
            write_model_card(run.path, staging / "README.md")


def record_step(setup: Setup, run: RunFolder, record: StepRecord, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the step to the ledger and its metrics to ``metrics.jsonl``; return the metrics.

    Args:
        seconds: time of the rollout and of the update.
    """
    config, started = setup.config, time.perf_counter()
    account = compute_token_terms(record.logprobs, record.batch, config.loss)
    shares = advantage_by_component(record, config.advantage)
    lr = learning_rate(config, record.number * config.optim.inner_epochs - 1)
    metrics = nan_to_none(step_metrics(record, account, shares, config) | {"lr": lr})
    if config.ledger.every and record.number % config.ledger.every == 0:
        write_step(run.ledger, record, account, shares, metrics, text=config.ledger.text)
    metrics |= timing_metrics(record, setup, seconds | {"account": time.perf_counter() - started})
    append_metrics(run, metrics)
    return metrics


def raise_if_diverged(setup: Setup, progress: Progress, groups: Sequence[Group]) -> None:
    """Raise `UserError` after more non-finite steps in a row than ``train.max_nonfinite_steps`` allows."""
    allowed = setup.config.train.max_nonfinite_steps
    if progress.skipped_in_a_row > allowed:
        ids = ", ".join(repr(group.prompt.case.id) for group in groups)
        raise setup.policy.world.error(
            f"step {progress.step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
            f"finite, train.max_nonfinite_steps = {allowed}; cases of the last one: {ids}"
        )


def timing_metrics(record: StepRecord, setup: Setup, phases: dict[str, float]) -> dict[str, float]:
    """Return the seconds of each phase, the sampled tokens per second, rank 0's peak memory so far (of the device with
    CUDA, else of the process) and its limit of rows per micro-batch."""
    tokens = sum(len(completion.ids) for group in record.groups for completion in group.completions)
    tokens += sum(sum(group.lengths) for group in record.replaced_groups)
    if setup.policy.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(setup.policy.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **{f"time/{phase}_s": seconds for phase, seconds in phases.items()},
        "tokens_per_s/rollout": tokens / phases["rollout"],
        "tokens_per_s/step": tokens / sum(phases.values()),
        "memory/peak_bytes": peak,
        "memory/micro_batch_rows": setup.micro_batch_limit.rows,
    }


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


def run(arguments: argparse.Namespace) -> int:
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
    return run_command(argument_parser(), run, argv)


if __name__ == "__main__":
    exit_process(main())
