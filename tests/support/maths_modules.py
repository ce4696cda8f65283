"""The three modules of the maths as one argument, so that a test can be run on a faulty copy of any."""

from dataclasses import dataclass
from types import ModuleType

import grpo.advantage
import grpo.logprobs
import grpo.loss


@dataclass(frozen=True, slots=True)
class Maths:
    advantage: ModuleType
    loss: ModuleType
    logprobs: ModuleType


REAL = Maths(advantage=grpo.advantage, loss=grpo.loss, logprobs=grpo.logprobs)
