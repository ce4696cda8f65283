"""What all commands share: the parser with its examples, and the errors a user can fix."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from grpo.runtime.atomic_files import DiskError
from grpo.runtime.errors import INPUT_ERRORS
from grpo.runtime.terminal import error_lines, tolerate_narrow_encodings


def make_parser(command: str, description: str, *, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of ``grpo COMMAND``, whose help ends with ``examples``, one command line each."""
    return argparse.ArgumentParser(
        prog=f"grpo {command}",
        description=description,
        epilog="\n".join(("example:" if len(examples) == 1 else "examples:", *(f"  {line}" for line in examples))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
    *,
    if_interrupted: str = "",
) -> int:
    """Parse the arguments, call ``run`` with them and return its exit code.

    Bad input (`INPUT_ERRORS`) is printed with its notes and returns 2; with ``--json`` standard output gets it as
    ``{"error": …}``. A file that cannot be written returns 3 and Ctrl-C 130; any other exception is a bug and keeps its
    traceback. A reader that closes the pipe early, as ``head`` does, is not an error.

    Args:
        if_interrupted: what Ctrl-C leaves behind, printed after "interrupted".
    """
    tolerate_narrow_encodings()
    arguments = parser.parse_args(argv)
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except INPUT_ERRORS as error:
        if getattr(arguments, "json", False):
            print(json.dumps({"error": str(error)}))
        print(error_lines(error), file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if not isinstance(error, DiskError) and error.filename is not None:
            error = OSError(f"{error.filename}: {error.strerror}")
        print(error_lines(error), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"\ninterrupted{'; ' if if_interrupted else ''}{if_interrupted}", file=sys.stderr)
        return 130
