"""Messages of a training run that ends early, and how to resume it."""

import argparse
import contextlib
import shlex
import signal
import sys
from pathlib import Path

from grpo.run.checkpoint import latest_checkpoint
from grpo.run.folder import has_started
from grpo.runtime.distributed import RankLost, World, launch_prefix
from grpo.runtime.errors import UserError
from grpo.runtime.interrupts import Interrupted


def stopped_early(error: Interrupted | RankLost, requested: int | None, ranks: World, hint: str) -> int:
    """Print what ended a run without a fault of its input, once for all ranks; return the exit code.

    Rank 0 prints. Rank 1 prints too if rank 0 itself may be lost: without a signal, or with torchrun's SIGTERM.

    Args:
        requested: the signal this rank received. If a rank is lost after one, it received the same signal.
        hint: from `resume_hint`.
    """
    lost = isinstance(error, RankLost)
    if lost and requested is None:
        if ranks.rank < 2:
            print(
                f"\nerror: rank {ranks.rank}: {error}; if it printed a reason, fix that first. {hint}", file=sys.stderr
            )
        return 4
    stopped = error if isinstance(error, Interrupted) else Interrupted(requested or signal.SIGINT)
    by_torchrun = stopped.number == signal.SIGTERM and ranks.size > 1
    if ranks.is_main or (ranks.rank == 1 and lost and by_torchrun):
        prefix = "" if ranks.is_main else f"rank {ranks.rank}: "
        cause = " (torchrun sends it when another rank has ended)" if by_torchrun else ""
        advice = "; if it printed a reason, fix that first" if lost and by_torchrun else ""
        with contextlib.suppress(OSError):  # the terminal may be gone after SIGHUP
            print(f"\n{prefix}stopped by {stopped.name}{cause}{advice}. {hint}", file=sys.stderr)
    return stopped.exit_code


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
