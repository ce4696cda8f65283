"""Recompute the log-probabilities of recorded steps with the model, which a replay without it cannot verify.

The reference's are recomputed for every step, the policy's for the steps whose initial adapter still exists: the first
step, which starts from the warm start or the seed, and those after a kept checkpoint. Micro-batches are cut as in the
training, so the same machine gives the same bits; on other machines, differences up to `TOLERANCES` are rounding.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grpo.config import Config, ModelSection
from grpo.inspection.run_reader import RecordedRun
from grpo.metrics import group_member_pairs
from grpo.policy.base_model import resolve_device, resolve_dtype
from grpo.policy.policy import Policy, as_reference, copy_adapter, load_policy
from grpo.prompts import render_prompt
from grpo.run.checkpoint import load_checkpoint
from grpo.run.ledger import LedgerStep, read_step
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import memory_errors
from grpo.update import (
    batch_logprobs,
    dropout_seed,
    micro_batch_limit,
    micro_batches,
    pack_tokens,
    reference_logprobs,
)

TOLERANCES = {"float32": (1e-4, 1e-6), "bfloat16": (0.5, 0.02)}
"""Dtype of the base → largest and mean |Δ logprob| of a step, in nats, that count as rounding.

On the same machine 0 is expected and was measured, whatever the number of threads. With the embedded model, cutting
other micro-batches moves a float32 log-probability by at most 1e-6 (mean 5e-10), and bfloat16 instead of float32 by at
most 0.04 (mean 2e-4). The bfloat16 tolerances leave room for the larger logits of a 9B model, which was not measured.
"""


@dataclass(frozen=True, slots=True)
class Drift:
    """Distance of a step's recomputed log-probabilities from the recorded ones."""

    tokens: int
    largest: float
    """max |Δ|, nats."""
    mean: float
    """mean |Δ|, nats."""

    def within(self, tolerance: tuple[float, float]) -> bool:
        """Return whether neither the largest nor the mean exceeds its tolerance."""
        return self.largest <= tolerance[0] and self.mean <= tolerance[1]


@dataclass(frozen=True, slots=True)
class Recomputed:
    """One step recomputed with the model."""

    step: int
    reference: Drift | None
    """None if beta = 0: the reference was not used."""
    policy: Drift | None
    """None if the adapter at the start of the step no longer exists."""
    misread: tuple[str, ...]
    """Rows whose text does not match their token ids: "group 1 (case c4), member 0: completion"."""


def replay_with_model(
    recording: RecordedRun, steps: Sequence[int], device: str | None
) -> tuple[dict[str, Any], list[str], bool]:
    """Return the JSON record, the lines for a terminal, and whether all differences are rounding.

    Raises:
        UserError: the device does not exist, base, adapter or checkpoint cannot be loaded, or a step has no token ids.
    """
    section = recording.config.model
    section = section.model_copy(update={"device": str(resolve_device(device or section.device))})
    results = tuple(recompute(recording, steps, section))
    dtype = _coarser_dtype(recording, section)
    tolerance = TOLERANCES[dtype]
    record = {
        "device": section.device,
        "dtype": dtype,
        "tolerance": dict(zip(("largest", "mean"), tolerance, strict=True)),
        "steps": [dataclasses.asdict(result) for result in results],
    }
    drifts = [drift for result in results for drift in (result.reference, result.policy) if drift]
    equal = all(drift.within(tolerance) for drift in drifts) and not any(result.misread for result in results)
    lines = [line for name in ("reference", "policy") for line in _drift_lines(name, results, dtype)]
    lines += [f"step {r.step}: {row} does not match its token ids" for r in results for row in r.misread]
    return record, lines, equal


def recompute(recording: RecordedRun, steps: Sequence[int], section: ModelSection) -> Iterator[Recomputed]:
    """Recompute steps with the run's model on the device of ``section``."""
    config = recording.config
    policy = load_policy(section, config.lora, seed=config.train.seed)
    initial = copy_adapter(policy)
    reference = initial if config.loss.reference == "warm_start" else None
    for number in tqdm(steps, unit="step", leave=False, disable=None):
        entry = read_step(recording.run.ledger, number)
        if entry.text != "full":
            raise UserError(f'step {number}: --model needs token ids, which ledger.text = "{entry.text}" omits')
        folder = recording.run.checkpoints / f"step_{number - 1:06d}"
        before = initial if number == 1 else _load_adapter(policy, folder) if folder.is_dir() else None
        with memory_errors(f"step {number}", "use another device, such as --device cpu"):
            rows = _logged_rows(recording, number)
            result = recompute_step(policy, entry, config, reference, before, rows)
        yield result


def recompute_step(
    policy: Policy,
    entry: LedgerStep,
    config: Config,
    reference: Mapping[str, Tensor] | None,
    before: Mapping[str, Tensor] | None,
    micro_batch_rows: int,
) -> Recomputed:
    """Recompute one step.

    Args:
        reference: adapter of the reference; None is the bare base.
        before: adapter at the start of the step; None if it no longer exists.
        micro_batch_rows: rows per micro-batch of the training in this step.
    """
    step, batch = entry.step, entry.step.batch
    limit = micro_batch_limit(policy, config.optim)
    limit.rows = micro_batch_rows
    cuts = micro_batches(batch, limit, beta=config.loss.beta)
    reference_drift = policy_drift = None
    if step.logprobs.ref_logprobs is not None:
        logprobs = pack_tokens(reference_logprobs(policy, batch, cuts, config, reference), batch)
        reference_drift = drift(logprobs, step.logprobs.ref_logprobs)
    if before is not None:
        with as_reference(policy, before), torch.no_grad():
            policy.model.train()  # the training applied dropout, with this seed
            torch.manual_seed(dropout_seed(config, step.number - 1, 0))
            logprobs = pack_tokens(batch_logprobs(policy, batch, cuts, config.rollout.temperature), batch)
            policy.model.eval()
        policy_drift = drift(logprobs, step.logprobs.logprobs[0])
    return Recomputed(step.number, reference_drift, policy_drift, tuple(undecodable_rows(policy, entry, config)))


def drift(recomputed: Tensor, recorded: Tensor) -> Drift:
    """Return the distance of two [M] tensors; NaN counts as infinite.

    >>> drift(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
    Drift(tokens=2, largest=0.5, mean=0.25)
    """
    distance = (recomputed.double() - recorded.double()).abs().nan_to_num(nan=torch.inf)
    return Drift(distance.numel(), float(distance.max()), float(distance.mean()))


def undecodable_rows(policy: Policy, entry: LedgerStep, config: Config) -> Iterator[str]:
    """Yield prompts that the tokenizer renders differently and completions that it decodes or ends differently."""
    for b, g in group_member_pairs(entry.step):
        group = entry.step.groups[b]
        case, completion = group.prompt.case, group.completions[g]
        name = f"group {b} (case {case.id}), member {g}"
        prompt = render_prompt(
            policy.tokenizer, case, system_prompt=config.cases.system_prompt, thinking=group.prompt.thinking
        )
        if g == 0 and prompt.ids != group.prompt.ids:
            yield f"{name}: prompt"
        finished = completion.ids[-1] in policy.end_token_ids
        ids = completion.ids[:-1] if finished else completion.ids
        text = policy.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if (text, finished) != (completion.text, completion.finished):
            yield f"{name}: completion"


def _logged_rows(recording: RecordedRun, number: int) -> int:
    """Return the limit of rows per micro-batch in a step: running out of memory lowers that of the config."""
    rows = recording.logged.get(number, {}).get("memory/micro_batch_rows")
    return rows if type(rows) is int and rows > 0 else recording.config.optim.micro_batch_size


def _coarser_dtype(recording: RecordedRun, section: ModelSection) -> str:
    """Return the coarser one of the dtypes of the base in the training and here."""
    dtypes = {str(resolve_dtype(section.dtype, resolve_device(section.device))).removeprefix("torch.")}
    if section.dtype == "auto":
        dtypes.add("float32" if str(recording.made_with.get("device")).startswith("cpu") else "bfloat16")
    return max(dtypes, key=TOLERANCES.__getitem__)


def _drift_lines(name: str, results: Sequence[Recomputed], dtype: str) -> Iterator[str]:
    drifts = {result.step: drift for result in results if (drift := getattr(result, name)) is not None}
    if not drifts:
        yield f"{name:<11}  no step to compare"
        return
    tolerance = TOLERANCES[dtype]
    tokens = sum(drift.tokens for drift in drifts.values())
    mean = math.fsum(drift.mean * drift.tokens for drift in drifts.values()) / tokens
    largest = max(drift.largest for drift in drifts.values())
    yield (
        f"{name:<11}  {len(drifts):,} of {len(results):,} steps, {tokens:,} tokens: max |Δ logprob| {largest:.3g}, "
        f"mean {mean:.3g}; tolerance in {dtype}: {tolerance[0]:g} and {tolerance[1]:g}"
    )
    for step, drift in drifts.items():
        if not drift.within(tolerance):
            measured = f"max |Δ logprob| {drift.largest:.3g}, mean {drift.mean:.3g}"
            yield f"step {step}: {name}: {measured} exceeds the rounding tolerance"


def _load_adapter(policy: Policy, checkpoint: Path) -> dict[str, Tensor]:
    """Return the adapter of a checkpoint without changing the policy."""
    with as_reference(policy, copy_adapter(policy)):
        load_checkpoint(checkpoint, policy, torch.optim.AdamW(policy.adapter_parameters().values()))
        return copy_adapter(policy)
