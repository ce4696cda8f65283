"""``grpo tensorboard RUN``: write a run's metrics and evaluations as one TensorBoard event file.

Exit codes: 0 written, 2 bad input or TensorBoard is not installed, 3 the folder cannot be written.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo.inspection.run_reader import Evaluation, RunRecord, read_run
from grpo.runtime.atomic_files import make_private_folder
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import escape_control

RATES = ("exact", "adjacent", "dangerous_under", "high_acuity_under", "no_parse", "clipped_ratio", "mean_length")
"""Fields of an evaluation, written under ``eval/SET/thinking_MODE/``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(argument_parser(), run, argv)


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "tensorboard",
        "Write a run's metrics as a TensorBoard event file. Run it again to update the file of an unfinished run.",
        examples=["grpo tensorboard runs/tiny && tensorboard --logdir runs/tiny/tensorboard"],
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, for example runs/tiny")
    parser.add_argument("--out", type=Path, help="folder of the event file (default: RUN/tensorboard)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the event file and print where it is."""
    folder = arguments.out or arguments.run / "tensorboard"
    record = read_run(arguments.run)
    count = write_events(record, folder)
    shown = escape_control(str(folder))
    print(f"wrote {count} points of {len(record.metrics)} steps. View them with: tensorboard --logdir {shown}")
    return 0


def write_events(run: RunRecord, folder: Path) -> int:
    """Write every metric and evaluation rate of a run as a scalar and return the number of points.

    Args:
        folder: created if missing. An earlier event file of the same run in it is replaced.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install 'grpo-v49[tensorboard]'") from None
    make_private_folder(folder)
    count = 0
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as staging:
        with SummaryWriter(staging) as writer:
            for step, wall_time, values in scalars(run):
                for name, value in values.items():
                    writer.add_scalar(escape_control(name), value, step, walltime=wall_time)
                count += len(values)
        (event_file,) = Path(staging).iterdir()
        event_file.chmod(0o600)
        event_file.replace(folder / f"events.out.tfevents.{int(run.started or 0):010d}.{run.name}")
    return count


def scalars(run: RunRecord) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Yield (step, wall time, name → value) for each step's metrics, then for each evaluation.

    The wall time of a step is the start of the run plus the seconds its steps have taken; it counts from 1970 if the
    run does not record its start. Null metrics are omitted.
    """
    wall_time = run.started or 0.0
    time_of_step = {0: wall_time}
    for row in run.metrics:
        step = int(row["step"] or 0)
        wall_time += sum(value or 0.0 for name, value in row.items() if name.startswith("time/"))
        time_of_step[step] = wall_time
        yield step, wall_time, {name: value for name, value in row.items() if name != "step" and value is not None}
    for evaluation in run.evaluations:
        yield evaluation.step, time_of_step.get(evaluation.step, wall_time), _rates(evaluation)


def _rates(evaluation: Evaluation) -> dict[str, float]:
    """Return the rates by tag. ``high_acuity_under`` needs ``high_acuity_n``, which old records lack."""
    names = [name for name in RATES if name != "high_acuity_under" or evaluation.high_acuity_n]
    tag = f"eval/{evaluation.cases}/thinking_{evaluation.thinking}"
    rates = {f"{tag}/{name}": getattr(evaluation, name) for name in names}
    return {name: float(value) for name, value in rates.items() if value is not None}
