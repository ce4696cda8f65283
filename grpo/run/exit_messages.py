"""What a run says when it ends otherwise than done, and how it goes on."""

import argparse
import contextlib
import shlex
import signal
import sys
from pathlib import Path

from grpo.run.checkpoint import latest_checkpoint
from grpo.run.folder import is_started
from grpo.runtime.distributed import Elsewhere, RankError, RankLost, Ranks, expected, hush, launcher
from grpo.runtime.errors import UserError
from grpo.runtime.interrupts import Stop, Stopped
from grpo.runtime.terminal import error_lines


class NotFinite(UserError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def say_refused(error: Exception, ranks: Ranks | None, go_on: str = "") -> None:
    """One line in all where it can be, and ``go_on`` below it.

    Before the ranks have joined (None), the first on each host speaks; then rank 0, and another for what it alone has
    met.
    """
    leads = (ranks or expected()).leads
    if leads or (isinstance(error, RankError) if ranks is None else not isinstance(error, (Elsewhere, NotFinite))):
        told = error if leads or ranks is None else RankError(f"rank {ranks.rank}: {error}")
        print(error_lines(told) + (f"\n       {go_on}" if go_on else ""), file=sys.stderr)
    else:
        hush()


def say_stopped(error: BaseException, stop: Stop, ranks: Ranks, go_on: str) -> int:
    """Says once what ended a run that nothing was wrong with; the exit code. Where a signal was heard, a rank that is
    lost is one that heard it too. Rank 0 speaks for all, and rank 1 when it may be rank 0 that is lost: without a
    signal, or with the one that torchrun sends then."""
    lost = isinstance(error, RankLost)
    mend = "if it said why, mend that first"
    if lost and stop.requested is None:
        if ranks.rank < 2:
            print(f"\nerror: rank {ranks.rank}: {error}; {mend}; {go_on}", file=sys.stderr)
        return 4
    stopped = error if isinstance(error, Stopped) else Stopped(stop.requested or signal.SIGINT)
    torchrun = stopped.number == signal.SIGTERM and ranks.size > 1
    with contextlib.suppress(OSError):  # after SIGHUP there may be nobody to tell
        if ranks.leads or (ranks.rank == 1 and lost and torchrun):
            who = "" if ranks.leads else f"rank {ranks.rank}: "
            why = " (torchrun sends it when another rank has ended)" if torchrun else ""
            what = f"; {mend}" if lost and torchrun else ""
            print(f"\n{who}stopped by {stopped.name}{why}{what}; {go_on}", file=sys.stderr)
    return stopped.exit_code


def how_to_go_on(arguments: argparse.Namespace, out: Path | None, ranks: Ranks) -> str:
    """For a person whose run was stopped: what is kept, and the command that continues."""
    if out is None or not is_started(out):
        return "nothing was started yet"
    try:
        checkpoint, _ = latest_checkpoint(out / "checkpoints")
    except UserError:
        checkpoint = None
    kept = f"kept up to {checkpoint.name}" if checkpoint else "no step is kept yet"
    overrides = [part for override in arguments.set for part in ("--set", override)]
    again = shlex.join([arguments.config, *(["--out", str(out)] if arguments.out else []), *overrides, "--resume"])
    return f"{kept}; go on with: {launcher(ranks)} grpo.train {again}"
