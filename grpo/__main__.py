"""The command line: ``grpo COMMAND`` or ``python -m grpo COMMAND``; ``grpo COMMAND --help`` explains one command."""

import importlib
import sys
from collections.abc import Sequence

from grpo.runtime.terminal import tolerate_narrow_encodings

COMMANDS = {
    "train": "train a LoRA adapter with GRPO",
    "preflight": "prove a run's reward and probe it on its cases, without a model",
    "prepare": "write a training file and a held-out file from cases of any format",
    "evaluate": "answer cases with and without thinking and judge the answers",
    "replay": "compute a run again from its ledger and compare every value with the log",
    "inspect": "show a recorded step: why a completion got its gradient",
    "report": "write one self-contained HTML page about one or several runs",
    "tensorboard": "write a run's metrics as TensorBoard event files",
    "merge": "merge a LoRA adapter into its base model",
    "triage": "answer one case with an ESI level",
}
"""Command → summary; its module in `grpo.commands` is imported only when the command runs."""
HELP = "\n".join(
    [
        "usage: grpo COMMAND [ARGUMENTS]",
        "",
        "commands:",
        *(f"  {name:<12} {summary}" for name, summary in COMMANDS.items()),
        "",
        "`grpo COMMAND --help` lists the arguments of a command. `python -m grpo` is the same as `grpo`.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    tolerate_narrow_encodings()
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"grpo.commands.{name.replace('-', '_')}")
    return int(command.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
