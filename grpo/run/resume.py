"""A run's folder opened, and every rank brought to where rank 0 stands."""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from grpo.config import Source, resolve
from grpo.run.checkpoint import Progress, latest_checkpoint, load_checkpoint
from grpo.run.folder import Run, continue_run, is_started, start_run
from grpo.run.input_hashes import ADAPTER_FILES, cases_sha256, folder_sha256
from grpo.run.setup import Setup, machine
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import tell

CHECKED_AT_ONCE = 1 << 24
"""Entries of a tensor; a copy of them takes 128 MB."""


def open_run(out: Path, setup: Setup, source: Source) -> tuple[Run, Progress]:
    """The folder of a run that is started, or, where one was started before, continued from its last whole
    checkpoint, which is put in place."""
    if not is_started(out):
        records = {"kernels": setup.check.record() if setup.check else None, **machine(setup)}
        run = start_run(out, setup.config, source, setup.reward, inputs=inputs(setup), **records)
        return run, Progress()
    checkpoint, damaged = latest_checkpoint(out / "checkpoints")
    for line in damaged:
        print(f"damaged   {line}", file=sys.stderr)
    progress = load_checkpoint(checkpoint, setup.policy, setup.optimizer) if checkpoint else Progress()
    if progress.step > setup.config.train.steps:
        raise UserError(
            f"{checkpoint}: beyond the {setup.config.train.steps} steps of this run (train.steps): not its own"
        )
    tell(f"resume    from {checkpoint or 'the start: no checkpoint was saved yet'}")
    return continue_run(out, progress, setup.config, inputs(setup)), progress


def inputs(setup: Setup) -> dict[str, str]:
    """What the config names and does not hold, by sha256: a resume with other contents is no continuation."""
    config = setup.config
    named = {f"evaluate.{kind}.{name}": name for kind in ("ends", "during") for name in getattr(config.evaluate, kind)}
    start = {"lora.warm_start": folder_sha256(resolve(config.lora.warm_start), ADAPTER_FILES)}
    return {
        "reward.set": setup.reward.sha256,
        "cases.train": cases_sha256(setup.cases),
        **{key: cases_sha256(setup.sets[name]) for key, name in named.items()},
        **(start if config.lora.warm_start else {}),
    }


def check_alike(setup: Setup) -> None:
    """Raises `RankError` where a rank has other inputs than rank 0 or another base; of one that is sharded, what is
    whole on every rank is compared."""
    policy = setup.policy
    if policy.ranks.size == 1:
        return  # there is nobody to differ from, and inputs are read to be hashed
    frozen = [p for p in policy.model.parameters() if not p.requires_grad and not hasattr(p, "to_local")]
    policy.ranks.alike(inputs(setup) | {"model.name's weights": [checksum([p]) for p in frozen]})


def start_alike(setup: Setup, progress: Progress) -> Progress:
    """Adapter, optimiser and progress of rank 0, which alone has read the run folder, on every rank."""
    ranks, optimizer = setup.policy.ranks, setup.optimizer
    parameters = list(setup.policy.trainable().values())
    ranks.copy_(parameters)
    if ranks.told(bool(optimizer.state)):
        for p in parameters:
            if not optimizer.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.zeros(()), **moments}
            ranks.copy_(optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq"))
    return Progress(**ranks.told(asdict(progress)))


def checksum(tensors: Iterable[Tensor]) -> int:
    """Of their bits, without a copy of a whole tensor: torch sums integers in a wider copy."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = (tensor.detach().reshape(-1).view(integers[tensor.element_size()]) for tensor in tensors)
    return sum(int(part.sum(dtype=torch.int64)) for whole in flat for part in whole.split(CHECKED_AT_ONCE))
