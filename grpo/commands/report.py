"""``grpo report RUN [RUN ...]``: write one self-contained HTML page.

Exit codes: 0 written, 2 bad input, 3 the page cannot be written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grpo.report.page import MEGABYTE, make_report
from grpo.runtime.atomic_files import remove_if_present, write_atomic
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import escape_control


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(argument_parser(), run, argv, if_interrupted="no page was written")


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "report",
        "Write one self-contained HTML page about one or several runs.",
        examples=[
            "grpo report runs/tiny",
            "grpo report runs/a runs/b --out ab.html",
            "grpo report runs/tiny --no-text",
        ],
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, for example runs/tiny")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html; ./report.html for several runs")
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="groups of completions to show for each of the first, middle and last step (default: %(default)s)",
    )
    parser.add_argument(
        "--no-text",
        action="store_true",
        help="omit every case, completion and case id, so that the page can be shared where the cases cannot",
    )
    parser.add_argument(
        "--max-mb",
        type=float,
        default=3.0,
        help="maximum size of the page; groups of completions are dropped to fit (default: %(default)s)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print what is missing from it."""
    if arguments.samples < 0:
        raise UserError(f"--samples {arguments.samples}: expected 0 or more")
    if not 0 < arguments.max_mb <= 1e6:  # false for NaN as well
        raise UserError(f"--max-mb {arguments.max_mb:g}: expected a size above 0 and up to 1000000")
    report = make_report(
        arguments.runs,
        groups=arguments.samples,
        text=not arguments.no_text,
        max_bytes=int(arguments.max_mb * MEGABYTE),
    )
    out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
    write(out, report.html)
    for remark in report.remarks:
        print(f"note: {escape_control(remark)}")
    print(f"wrote {escape_control(str(out))} ({len(report.html) / MEGABYTE:.2f} MB)")
    return 0


def write(out: Path, html: bytes) -> None:
    """Write a page in one piece, readable by its owner alone because it may contain patients' texts."""
    remove_if_present(out.with_name(f".{out.name}.partial"))  # of an interrupted write, or a symlink
    write_atomic(out, html)
