"""The loop and nothing else: ``python -m grpo.train configs/tiny.toml``.

    cases → prompts → groups of completions → rewards → advantages → clipped, KL-anchored update of the adapter

Everything is built and checked before the first rollout. Exit codes: 0 done, 2 bad input, 3 a file could not be
written, 4 another rank was lost, 130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP; after 3, 4 and these --resume goes
on. Under ``torchrun`` each process runs this loop: see `grpo.runtime.distributed`.
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
from grpo.config import Config, Source, load_config
from grpo.dynamic_sampling import replace_uniform_groups
from grpo.evaluation.during_training import evaluate_if_due
from grpo.evaluation.records import before_after_table
from grpo.metrics import advantage_shares, step_metrics, token_account
from grpo.policy.policy import save_adapter
from grpo.prompts import prompts_for_step
from grpo.report.model_card import write_model_card
from grpo.rollout import sample_groups, sampling_keys
from grpo.run.checkpoint import Progress, damage, save_checkpoint
from grpo.run.exit_messages import NotFinite, how_to_go_on, say_refused, say_stopped
from grpo.run.folder import Run, add_metrics, check_folder, evaluations, finite, locked
from grpo.run.ledger import LEDGER_VERSION, write_step
from grpo.run.resume import check_alike, checksum, open_run, start_alike
from grpo.run.roofline import floor_of
from grpo.run.self_check import DriftWarning, check_on_cuda
from grpo.run.setup import Setup, build, plan, with_check
from grpo.runtime.atomic_files import DiskError, placed
from grpo.runtime.distributed import RankLost, Ranks, expected, joined, leave
from grpo.runtime.errors import INPUT_ERRORS
from grpo.runtime.interrupts import Stop, Stopped, listening
from grpo.runtime.out_of_memory import OutOfMemory
from grpo.runtime.terminal import say_anyhow, tell, visible
from grpo.scoring import score_groups
from grpo.types import Group, Step
from grpo.update import learning_rate, update

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's format without the rate, for which 80 columns have no room; the metrics record the seconds of every step."""


def train(setup: Setup, run: Run, stop: Stop, progress: Progress) -> None:
    """Run the steps after ``progress`` up to ``train.steps``: sample, score, normalize, update, record.

    A signal ends anything but an update and what is being written; the last completed step is then saved.
    """
    config, policy, ranks = setup.config, setup.policy, setup.policy.ranks
    bar = progress_bar(progress, config, ranks)
    drift = DriftWarning(policy.head.weight.dtype, config.rollout.temperature)
    try:
        with stop.at_once():
            evaluate_if_due(setup, run, progress.step)
            for step in bar:
                started = time.perf_counter()
                prompts = prompts_for_step(setup.cases, setup.epoch, policy.tokenizer, config, step)
                groups = sample_groups(policy, prompts, sampling_keys(prompts, config, step), config)
                scores = score_groups(setup.reward, groups, config, ranks)  # text only, no tensors
                groups, scores, dropped = replace_uniform_groups(setup, groups, scores, step)  # off in v49
                sampled = time.perf_counter()

                with stop.deferred():  # a signal waits for the end of this block
                    advantages = group_advantages(groups, reward_matrix(scores), config.advantage)  # [B,G]
                    batch = make_batch(groups, advantages, config)  # token weights are fixed here
                    stop_if_any_rank_was_asked(ranks, stop)
                    with stop.within_grace():
                        result = update(policy, batch, config, setup.optimizer, setup.reference, step=step)
                    seconds = {"rollout": sampled - started, "update": time.perf_counter() - sampled}
                    progress = progress.after(result.skipped)
                    done = Step(progress.step, groups, scores, batch, result.tokens, dropped, *result.figures)
                    if ranks.leads:
                        record = record_step(setup, run, done, seconds)
                        bar.set_postfix_str(postfix(record, config))
                        drift.look(done.number, record["sampler/max_abs_logprob_diff"])
                save_if_due(setup, run, stop, progress)
                raise_if_diverged(progress, groups, config)
                evaluate_if_due(setup, run, progress.step)
    except (Stopped, RankLost, OutOfMemory) as error:
        if not getattr(error, "midway", False):  # else the policy has moved since the last completed step
            save_last_step(setup, run, progress)
        raise
    save_result(setup, run)


def progress_bar(progress: Progress, config: Config, ranks: Ranks) -> Any:
    """Return the steps that are left, shown by rank 0."""
    steps = range(progress.step, config.train.steps)
    return tqdm(steps, initial=progress.step, total=config.train.steps, bar_format=BAR_FORMAT, disable=not ranks.leads)


def stop_if_any_rank_was_asked(ranks: Ranks, stop: Stop) -> None:
    """Raise `Stopped` where any rank was asked to stop: none begins an update that another has left. One that was
    asked still tells those that were not; others that do not answer have its grace."""
    with stop.within_grace():
        signals = [number for number in ranks.exchange(stop.requested) if number is not None]
    if signals:
        raise Stopped(signals[0])


def save_if_due(setup: Setup, run: Run, stop: Stop, progress: Progress) -> None:
    """Save a checkpoint where the config asks for one, after the last step, and before the run ends for want of finite
    steps; the ranks' adapters are compared first."""
    config, policy = setup.config, setup.policy
    scheduled = progress.step % config.checkpoint.every == 0 or progress.step == config.train.steps
    if not scheduled and progress.skipped_in_a_row <= config.train.max_skipped_steps:
        return
    policy.ranks.alike({"adapter": checksum(policy.trainable().values())})
    if policy.ranks.leads:
        with stop.deferred():
            save_checkpoint(run.checkpoints, policy, setup.optimizer, progress, config.checkpoint)


def save_last_step(setup: Setup, run: Run, progress: Progress) -> None:
    """Save the last completed step of a run that ends early, unless it is saved already."""
    if setup.policy.ranks.leads and progress.step and damage(run.checkpoints / f"step_{progress.step:06d}"):
        save_checkpoint(run.checkpoints, setup.policy, setup.optimizer, progress, setup.config.checkpoint)


def save_result(setup: Setup, run: Run) -> None:
    """Write the adapter and its model card."""
    if setup.policy.ranks.leads:
        with placed(run.adapter) as staging:
            save_adapter(setup.policy, staging)
            write_model_card(run.path, staging / "README.md")


def record_step(setup: Setup, run: Run, done: Step, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the step to the ledger and its line to the metrics; return the line.

    Args:
        seconds: of the rollout and of the update.
    """
    config, started = setup.config, time.perf_counter()
    account = token_account(done.tokens, done.batch, config.loss)
    shares = advantage_shares(done, config.advantage)
    lr = learning_rate(config, done.number * config.optim.inner_epochs - 1)
    record = finite(step_metrics(done, account, shares, config) | {"lr": lr})
    if config.ledger.every and done.number % config.ledger.every == 0:
        write_step(run.ledger, done, account, shares, record, text=config.ledger.text)
    record |= cost(done, setup, seconds | {"account": time.perf_counter() - started})
    add_metrics(run, record)
    return record


def raise_if_diverged(progress: Progress, groups: Sequence[Group], config: Config) -> None:
    """Raises `NotFinite` after more steps in a row than ``train.max_skipped_steps`` allows."""
    if progress.skipped_in_a_row > config.train.max_skipped_steps:
        ids = ", ".join(repr(group.prompt.case.id) for group in groups)
        raise NotFinite(
            f"step {progress.step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
            f"finite, train.max_skipped_steps = {config.train.max_skipped_steps}; cases of the last one: {ids}"
        )


def cost(step: Step, setup: Setup, phases: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, sampled tokens a second, shares of the roofline of all ranks' devices together, and rank 0's
    peak memory so far (of the device on CUDA, else of the process)."""
    device, ranks = setup.policy.device, setup.policy.ranks.size
    floor = floor_of(step, setup.config, setup.costs, setup.rates)
    kept = sum(len(completion.ids) for group in step.groups for completion in group.completions)
    tokens = kept + sum(sum(one.lengths) for one in step.dropped)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **{f"time/{phase}_s": seconds for phase, seconds in phases.items()},
        "tokens_per_s/rollout": tokens / phases["rollout"],
        "tokens_per_s/step": tokens / sum(phases.values()),
        "roofline/rollout": floor.rollout / phases["rollout"] / ranks,
        "roofline/update": floor.update / phases["update"] / ranks,
        "roofline/step": floor.step / sum(phases.values()) / ranks,
        "memory/peak_bytes": peak,
    }


def postfix(record: dict[str, Any], config: Config) -> str:
    """The bar's figures of the last step."""
    kl = record.get(f"kl/{config.loss.kl}")
    shown = f"reward {record['reward/mean']:+.2f}, clipped {100 * record['completions/clipped_ratio']:.0f} %"
    return shown if kl is None else f"{shown}, KL {kl:.4f}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m grpo.train",
        description="Train a LoRA adapter with GRPO.",
        epilog="Exit codes: 0 done, 2 bad input, 3 a file could not be written, 4 another rank was lost, 130, 143, 129 "
        "stopped by SIGINT, SIGTERM, SIGHUP; after 3, 4 and these the same command with --resume goes on.",
    )
    made.add_argument("config", help="a TOML file, for example configs/tiny.toml")
    made.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    made.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )
    return made


def run_config(
    arguments: argparse.Namespace, out: Path, config: Config, source: Source, stop: Stop, ranks: Ranks
) -> Run:
    """The whole run, in a folder that is rank 0's alone."""
    with contextlib.ExitStack() as held:
        versions = {"torch": torch.__version__, "ledger": LEDGER_VERSION}
        with stop.at_once():  # before the base is loaded, which ranks of different configs do not do in step
            ranks.alike(versions | config.model_dump(mode="json"))
        was_there, progress, run = out.is_dir(), Progress(), Run(out)
        with ranks.together(*INPUT_ERRORS):
            if ranks.leads:
                check_folder(out, config, resume=arguments.resume)
                if was_there:
                    held.enter_context(locked(out))
        with stop.at_once(), ranks.together(*INPUT_ERRORS):
            setup = build(config, ranks)
        with stop.at_once():
            check_alike(setup)
        with stop.at_once(), ranks.together(*INPUT_ERRORS):
            check = check_on_cuda(setup.policy)
        with stop.at_once():
            setup = with_check(setup, check)
        with ranks.together(*INPUT_ERRORS):
            if ranks.leads:
                told = f"config    {source.path}\n{plan(setup)}"
                tell("\n".join(visible(line) for line in told.splitlines()))
                if not was_there:  # a folder is made only now, when nothing can be wrong with the input any more
                    held.enter_context(locked(out))
                check_folder(out, config, resume=arguments.resume)  # since then another process may have been here
                run, progress = open_run(out, setup, source)
        with stop.at_once():
            progress = start_alike(setup, progress)
        train(setup, run, stop, progress)
        return run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    arguments = parser().parse_args(argv)
    os.umask(0o077)  # narratives may be patients' data: what a run writes is its owner's alone
    out, stop, ranks = None, Stop(), None
    try:
        with listening() as stop:
            config, source = load_config(arguments.config, arguments.set)
            out = arguments.out or Path("runs") / config.name
            with joined(config.model.device, timeout_s=config.train.rank_timeout_s) as ranks:
                run = run_config(arguments, out, config, source, stop, ranks)
    except INPUT_ERRORS as error:
        go_on = how_to_go_on(arguments, out, ranks or expected()) if isinstance(error, OutOfMemory) else ""
        say_refused(error, ranks, go_on)
        return 2
    except DiskError as error:
        print(f"error: {error}\n       {how_to_go_on(arguments, out, ranks or expected())}", file=sys.stderr)
        return 3
    except (Stopped, KeyboardInterrupt, RankLost) as error:
        ranks = ranks or expected()
        return say_stopped(error, stop, ranks, how_to_go_on(arguments, out, ranks))
    if not ranks.leads:
        return 0
    if records := evaluations(run):
        tell(f"\n{before_after_table(records)}\n")
    tell(f"adapter   {run.adapter}\nmetrics   {run.metrics}" + (f"\nanswers   {run.path / 'eval'}" if records else ""))
    tell(f"look      python -m grpo report {run.path}; python -m grpo replay {run.path}")
    return 0


if __name__ == "__main__":
    leave(main())
