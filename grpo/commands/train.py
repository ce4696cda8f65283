"""The command ``grpo train``."""

from collections.abc import Sequence
from typing import NoReturn

from grpo import train
from grpo.runtime.distributed import exit_process


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the training command and end the process."""
    exit_process(train.main(argv))
