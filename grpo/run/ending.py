"""How a training run ends: what is saved, what stops it early, and the message that says how to resume it."""

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.run.checkpoint import Progress, find_damage, latest_checkpoint, save_checkpoint
from grpo.run.folder import RunFolder, has_started
from grpo.run.resume import bit_checksum
from grpo.run.setup import Setup
from grpo.runtime.distributed import RankLost, World, launch_prefix
from grpo.runtime.errors import UserError
from grpo.runtime.interrupts import Interrupted, Interrupts
from grpo.types import Group


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


def raise_if_diverged(setup: Setup, progress: Progress, groups: Sequence[Group]) -> None:
    """Raise `UserError` after more non-finite steps in a row than ``train.max_nonfinite_steps`` allows."""
    allowed = setup.config.train.max_nonfinite_steps
    if progress.skipped_in_a_row > allowed:
        ids = ", ".join(repr(group.prompt.case.id) for group in groups)
        raise setup.policy.world.error(
            f"step {progress.step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
            f"finite, train.max_nonfinite_steps = {allowed}; cases of the last one: {ids}"
        )


def stopped_early(error: Interrupted | RankLost, requested: int | None, ranks: World, hint: str) -> int:
    """Print what ended a run without a fault of its input, once for all ranks; return the exit code.

    Rank 0 prints. Rank 1 prints too if rank 0 itself may be lost: without a signal, or with torchrun's SIGTERM.

    Args:
        requested: the signal this rank received. If a rank is lost after one, it received the same signal.
        hint: from `resume_hint`.
    """
    lost = isinstance(error, RankLost)
    number = requested if isinstance(error, RankLost) else error.number
    if number is None:
        if ranks.rank < 2:
            message = f"rank {ranks.rank}: {error}; if it printed a reason, fix that first"
            print(f"\nerror: {message}. {hint}", file=sys.stderr)
        return 4
    by_torchrun = number == signal.SIGTERM and ranks.size > 1
    if ranks.is_main or (ranks.rank == 1 and lost and by_torchrun):
        prefix = "" if ranks.is_main else f"rank {ranks.rank}: "
        cause = " (torchrun sends it when another rank has ended)" if by_torchrun else ""
        advice = "; if it printed a reason, fix that first" if lost and by_torchrun else ""
        with contextlib.suppress(OSError):  # the terminal may be gone after SIGHUP
            print(f"\n{prefix}stopped by {signal.Signals(number).name}{cause}{advice}. {hint}", file=sys.stderr)
    return Interrupted(number).exit_code


def resume_hint(arguments: argparse.Namespace, out: Path | None, ranks: World) -> str:
    """Return which step of an interrupted run is saved, and the command that resumes it."""
    if out is None or not has_started(out):
        return "No run was started."
    try:
        checkpoint, _ = latest_checkpoint(out / "checkpoints")
    except UserError:
        checkpoint = None
    saved = f"{checkpoint.name} is saved" if checkpoint else "No step is saved yet"
    overrides = [part for override in arguments.set for part in ("--set", override)]
    command = shlex.join([arguments.config, *(["--out", str(out)] if arguments.out else []), *overrides, "--resume"])
    return f"{saved}. Resume with: {launch_prefix(ranks)} grpo train {command}"
