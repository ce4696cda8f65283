"""``metrics.jsonl`` as TensorBoard sees it: ``python -m grpo tensorboard RUN`` writes RUN/tensorboard.

One event file, written anew each time, so that a run still going can be mirrored again. Exit codes: 0 written, 2 bad
input, or TensorBoard is not installed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo.inspection.run_reader import Evaluation, RunRecord, read_run
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import error_lines, say_anyhow, visible

RATES = ("exact", "adjacent", "dangerous_under", "high_acuity_under", "no_parse", "clipped_ratio", "mean_length")
"""Of an evaluation, under ``eval/SET/thinking_MODE/``."""


def mirror(run: RunRecord, folder: Path) -> int:
    """Writes every figure of a run's metrics and evaluations as a scalar under its own name; returns how many.

    Args:
        folder: made where it is not there; its one file of this run is replaced.

    A figure that was not counted (null) has no point. Steps are dated by the run's start and the seconds they took;
    where the run does not say when it started, from 1970 on.

    Raises:
        UserError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install 'grpo-v49[tensorboard]'") from None
    started = run.started or 0.0
    file = folder / f"events.out.tfevents.{int(started):010d}.{run.name}"
    aside = folder / f".{file.name}.partial"
    written = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as opened:
            writer = RecordWriter(opened)
            writer.write(Event(wall_time=started, file_version="brain.Event:2").SerializeToString())
            for step, when, values in scalars(run):
                points = [Summary.Value(tag=visible(name), simple_value=value) for name, value in values.items()]
                writer.write(Event(wall_time=when, step=step, summary=Summary(value=points)).SerializeToString())
                written += len(points)
            writer.flush()
        os.replace(aside, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}; name another folder with --out") from None
    return written


def scalars(run: RunRecord) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, when in seconds since the epoch, name → value): the metrics step by step, then the evaluations."""
    when = run.started or 0.0
    dated: dict[int, float] = {0: when}
    for row in run.metrics:
        step = int(row["step"] or 0)
        when += sum(value or 0.0 for name, value in row.items() if name.startswith("time/"))
        dated[step] = when
        yield step, when, {name: value for name, value in row.items() if name != "step" and value is not None}
    for record in run.evaluations:
        yield record.step, dated.get(record.step, when), _rates(record)


def _rates(record: Evaluation) -> dict[str, float]:
    """A rate that no case counts towards has no point, nor one from before it was a share of ESI 1 and 2."""
    shown = {name: getattr(record, name) for name in RATES if name != "high_acuity_under" or record.high_acuity_n}
    folder = f"eval/{record.cases}/thinking_{record.thinking}"
    return {f"{folder}/{name}": float(value) for name, value in shown.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    parser = argparse.ArgumentParser(
        prog="python -m grpo tensorboard", description="Mirror a run's metrics to TensorBoard."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, for example runs/tiny")
    parser.add_argument("--out", type=Path, help="folder of the event file (default: RUN/tensorboard)")
    arguments = parser.parse_args(argv)
    folder = arguments.out or arguments.run / "tensorboard"
    os.umask(0o077)
    try:
        run = read_run(arguments.run)
        points = mirror(run, folder)
    except UserError as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    shown = visible(str(folder))
    print(f"mirrored  {shown}, {len(run.metrics)} steps, {points} points; tensorboard --logdir {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
