"""Open a run's folder, and bring every rank to the state of rank 0."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from grpo.config import ConfigSource, resolve_path
from grpo.run.checkpoint import Progress, latest_checkpoint, load_checkpoint
from grpo.run.folder import RunFolder, create_run, has_started, rewind_run
from grpo.run.input_hashes import ADAPTER_FILES, cases_sha256, folder_sha256
from grpo.run.setup import Setup, device_name
from grpo.runtime.errors import UserError
from grpo.runtime.terminal import print_unless_pipe_closed

CHECKSUM_CHUNK = 1 << 24
"""Entries of a tensor summed at once; their 64-bit copy takes 128 MB."""


def start_or_resume(out: Path, setup: Setup, source: ConfigSource) -> tuple[RunFolder, Progress]:
    """Create the run folder, or resume from the last undamaged checkpoint of the run in it: load it into the policy and
    the optimizer and rewind the folder to its step."""
    if not has_started(out):
        device, kernels = device_name(setup.policy.device), setup.check.record() if setup.check else None
        run = create_run(
            out, setup.config, source, setup.reward, device=device, inputs=input_hashes(setup), kernels=kernels
        )
        return run, Progress()
    checkpoint, damaged = latest_checkpoint(out / "checkpoints")
    for path, damage in damaged:
        print(
            f"warning: checkpoint {path} is damaged ({damage})" + (f"; using {checkpoint.name}" if checkpoint else ""),
            file=sys.stderr,
        )
    progress = load_checkpoint(checkpoint, setup.policy, setup.optimizer) if checkpoint else Progress()
    if progress.step > setup.config.train.steps:
        raise UserError(f"{checkpoint}: is beyond the last step of this run, train.steps = {setup.config.train.steps}")
    where = checkpoint or "step 0 (no checkpoint yet)"
    print_unless_pipe_closed(f"resume    from {where}")
    return rewind_run(out, progress, setup.config, input_hashes(setup)), progress


def input_hashes(setup: Setup) -> dict[str, str]:
    """Return the sha256 of each file or folder named in the config, by key: a resume with other contents is refused."""
    config = setup.config
    sets = {
        f"evaluate.{kind}.{name}": name
        for kind in ("before_and_after", "periodic")
        for name in getattr(config.evaluate, kind)
    }
    start = {"lora.warm_start": folder_sha256(resolve_path(config.lora.warm_start), ADAPTER_FILES)}
    return {
        "reward.set": setup.reward.sha256,
        "cases.train": cases_sha256(setup.cases),
        **{key: cases_sha256(setup.evaluation_sets[name]) for key, name in sets.items()},
        **(start if config.lora.warm_start else {}),
    }


def check_ranks_agree(setup: Setup) -> None:
    """Raise `UserError` if a rank has other inputs or another base model than rank 0."""
    policy = setup.policy
    if policy.world.size == 1:
        return  # nothing to compare, and hashing reads all inputs
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    policy.world.check_identical(input_hashes(setup) | {"model.name's weights": [bit_checksum([p]) for p in frozen]})


def broadcast_start_state(setup: Setup, progress: Progress) -> Progress:
    """Copy the adapter, the optimizer state and the progress of rank 0, which alone read the run folder, to all
    ranks."""
    ranks, optimizer = setup.policy.world, setup.optimizer
    parameters = list(setup.policy.adapter_parameters().values())
    ranks.broadcast_(parameters)
    if ranks.broadcast_object(bool(optimizer.state)):
        for p in parameters:
            if not optimizer.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.zeros(()), **moments}
            ranks.broadcast_(optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq"))
    return ranks.broadcast_object(progress)


def bit_checksum(tensors: Iterable[Tensor]) -> int:
    """Return the sum of the tensors' bits read as integers. Chunks bound the 64-bit copy that torch makes to sum."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = (tensor.detach().reshape(-1).view(integers[tensor.element_size()]) for tensor in tensors)
    return sum(int(part.sum(dtype=torch.int64)) for whole in flat for part in whole.split(CHECKSUM_CHUNK))
