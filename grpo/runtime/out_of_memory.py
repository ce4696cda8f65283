"""The error for a device without memory, which names the task and the keys to lower."""

import contextlib
import re
from collections.abc import Iterator

import torch

from grpo.runtime.distributed import SINGLE_PROCESS, World
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
    """Turn torch's out-of-memory error into an `OutOfMemory`. With several ranks it is an exchange: see
    `World.fail_together`.

    Args:
        task: what the device was doing, for the message.
        advice: the keys to lower.
        midway: of the error, see `OutOfMemory`.
    """
    with ranks.fail_together(OutOfMemory):
        try:
            yield
            return
        except OutOfMemory as error:
            error.midway |= midway
            raise
        except torch.OutOfMemoryError as error:
            size = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        # raised only here, since the frames of torch's error hold tensors
        more = f" ({size[1]} more)" if size else ""
        raise OutOfMemory(f"{task}: out of memory on the device{more}: {advice}", midway=midway)
