"""One error for a device that has no more memory, wherever it is met: it says where, and which keys to lower."""

import contextlib
import re
from collections.abc import Iterator

import torch

from grpo.runtime.distributed import SINGLE_PROCESS, ReportedByMainRank, World
from grpo.runtime.errors import UserError

LOADING = "use a smaller dtype (model.dtype, --dtype) or another device (model.device, --device)"
ROLLOUT = "lower rollout.group_size, rollout.prompts_per_step or rollout.max_new_tokens"
EVALUATION = "lower evaluate.batch_size or evaluate.max_new_tokens"
UPDATE = "set model.gradient_checkpointing = true or lower rollout.max_new_tokens"
"""The update halves its micro-batches by itself, down to single rows."""


class OutOfMemory(UserError):
    """The device has no memory left for a task. Names the task and the keys to lower.

    Args:
        midway: the policy has moved since the last completed step.
    """

    def __init__(self, message: str, *, midway: bool = False) -> None:
        self.midway = midway
        super().__init__(message)


@contextlib.contextmanager
def memory_errors(task: str, advice: str, ranks: World = SINGLE_PROCESS, *, midway: bool = False) -> Iterator[None]:
    """Turn torch's out-of-memory error into an `OutOfMemory`. With several ranks it is an exchange: all ranks leave
    with an error if any of them met one.

    Args:
        task: what the device was doing, for the message.
        advice: the keys to lower.
        midway: of the error, see `OutOfMemory`.

    Raises:
        OutOfMemory: on rank 0; names the first rank that met it.
        Elsewhere: on the others.
    """
    fault = ""
    try:
        yield
    except OutOfMemory as error:
        fault, midway = str(error), error.midway or midway
    except torch.OutOfMemoryError as error:
        size = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        fault = f"{task}: out of memory on the device{f' ({size[1]} more)' if size else ''}: {advice}"
    for rank, message in enumerate(ranks.all_gather_object(fault)):
        if message:
            message = f"rank {rank}: {message}" if ranks.size > 1 else message
            raise OutOfMemory(message, midway=midway) if ranks.is_main else ReportedByMainRank(message)
