"""``grpo train CONFIG`` is ``python -m grpo.train CONFIG``."""

from collections.abc import Sequence
from typing import NoReturn

from grpo import train
from grpo.runtime.distributed import leave
from grpo.runtime.terminal import say_anyhow


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the training command and end the process."""
    say_anyhow()
    leave(train.main(argv))
