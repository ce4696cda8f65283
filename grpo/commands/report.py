"""``python -m grpo report RUN [RUN …]``. Exit codes: 0 written, 2 bad input."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.report.page import MEGABYTE, Request, make_report
from grpo.report.samples import GROUPS_A_STEP
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import error_lines, say_anyhow, visible


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    parser = argparse.ArgumentParser(
        prog="python -m grpo report", description="Write one self-contained HTML page about one run or several."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, for example runs/tiny")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html; of several, report.html here)")
    parser.add_argument(
        "--samples",
        type=int,
        default=GROUPS_A_STEP,
        metavar="N",
        help="groups of completions shown of the first, the middle and the last recorded step; 0 shows none "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--no-text",
        action="store_true",
        help="leave out every case, completion and case id, to share the page where the cases may not go",
    )
    parser.add_argument(
        "--max-mb", type=float, default=3.0, help="the page's size at most; groups are left out to keep it (default: 3)"
    )
    arguments = parser.parse_args(argv)
    default = arguments.runs[0] if len(arguments.runs) == 1 else Path()
    out = arguments.out or default / "report.html"
    try:
        if arguments.samples < 0:
            raise UserError(f"--samples {arguments.samples}: expected 0 or more")
        most = int(min(max(arguments.max_mb, 0.0), 1e6) * MEGABYTE)  # also of a NaN
        request = Request(
            tuple(arguments.runs),
            arguments.samples,
            not arguments.no_text,
            most,
        )
        report = make_report(request)
        write(out, report.html)
    except UserError as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    for remark in report.remarks:
        print(f"note      {visible(remark)}")
    print(f"report    {visible(str(out))}, {len(report.html) / MEGABYTE:.2f} MB")
    return 0


def write(out: Path, html: bytes) -> None:
    """Writes the page whole or not at all, readable by its owner alone: it may hold patients' texts."""
    aside = out.with_name(f".{out.name}.partial")
    try:
        aside.unlink(missing_ok=True)  # a link that waits there would be written through
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(html)
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; name another place with --out") from None


if __name__ == "__main__":
    sys.exit(main())
