"""The log-probabilities of recorded steps, computed again with the model: what a replay without it cannot check.

The reference's for every step; the policy's for the steps whose adapter is still there: the first one, made from the
warm start or the seed, and those after a kept checkpoint. The micro-batches are cut as the training cut them, so on the
same machine the same bits come out; elsewhere the forward pass rounds otherwise, and `TOLERANCES` says how much of that
is taken for rounding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from grpo.cases import row_key
from grpo.config import Config, Model
from grpo.inspection.run_reader import Recording
from grpo.metrics import rows
from grpo.micro_batch_limit import room
from grpo.policy.base_model import card_name, pick_device, pick_dtype
from grpo.policy.policy import Policy, adapter_copy, adapter_swapped, load_policy
from grpo.prompts import render_prompt
from grpo.run.checkpoint import load_checkpoint
from grpo.run.ledger import Entry, read_step
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import memory_errors
from grpo.types import Batch
from grpo.update import Cut, micro_batches, packed, reference_logprobs, scored

TOLERANCES = {"float32": (1e-4, 1e-6), "bfloat16": (0.5, 0.02)}
"""The base's dtype → largest and mean |Δ logprob| of a step, in nats, that are taken for rounding.

On the same machine 0 is expected and was found, whatever the number of threads. With the embedded model another cut
into micro-batches moves a float32 log-probability by at most 1e-6 (mean 5e-10), and bfloat16 for float32 by at most
0.04 (mean 2e-4). The bfloat16 figures leave room for the larger logits of a 9B model, where none was measured.
"""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the log-probabilities of a step lie from the recorded ones."""

    tokens: int
    largest: float
    """max |Δ|, nats."""
    mean: float
    """mean |Δ|, nats."""

    def within(self, allowed: tuple[float, float]) -> bool:
        """Neither the largest nor the mean is beyond what is allowed."""
        return self.largest <= allowed[0] and self.mean <= allowed[1]


@dataclass(frozen=True, slots=True)
class Recomputed:
    """One step with the model."""

    step: int
    reference: Drift | None
    """None with beta = 0, where the reference was never run."""
    policy: Drift | None
    """None where the adapter that the step began with is gone."""
    misread: tuple[str, ...]
    """Rows whose ids are not their text: "group 1 (case c4), member 0: completion"."""

    def within(self, allowed: tuple[float, float]) -> bool:
        """Nothing is farther apart than that, and every row reads as its ids."""
        return not self.misread and all(one.within(allowed) for one in (self.reference, self.policy) if one)


def on_device(recording: Recording, device: str | None) -> Model:
    """Return the run's ``[model]`` with the device that computes it here.

    Args:
        device: None is the run's own.

    Raises:
        UserError: this machine has no such device.
    """
    section = recording.config.model
    try:
        return section.model_copy(update={"device": str(pick_device(device or section.device))})
    except UserError as error:
        raise UserError(f"{error}" if device else f"{error}: --device cpu computes the run's model there") from None


def recompute(recording: Recording, steps: Sequence[int], section: Model) -> Iterator[Recomputed]:
    """Each of these steps with the model.

    Args:
        section: the run's, on the device of `on_device`.

    Raises:
        UserError: base, adapter or checkpoint cannot be loaded.
        UserError: a step without token ids (``ledger.text`` other than "full").
    """
    config = recording.config
    policy = load_policy(section, config.lora, seed=config.train.seed)
    first = adapter_copy(policy)
    reference = first if config.loss.reference == "warm_start" else None
    for number in tqdm(steps, unit="step", leave=False, disable=None):
        entry = read_step(recording.run.ledger, number)
        if entry.text != "full":
            raise UserError(f'step {number}: --model needs token ids, and ledger.text = "{entry.text}" kept them out')
        folder = recording.run.checkpoints / f"step_{number - 1:06d}"
        before = first if number == 1 else _adapter(policy, folder) if folder.is_dir() else None
        with memory_errors(f"step {number}", "use another device, such as --device cpu"):
            recomputed = recompute_step(policy, entry, config, reference, before)
        yield recomputed


def recompute_step(
    policy: Policy,
    entry: Entry,
    config: Config,
    reference: Mapping[str, Tensor] | None,
    before: Mapping[str, Tensor] | None,
) -> Recomputed:
    """One step with the model.

    Args:
        reference: tensors that take the adapter's place for the reference; None is the bare base.
        before: the adapter that the step began with; None if it is gone.
    """
    step, batch = entry.step, entry.step.batch
    cuts = micro_batches(batch, room(policy, config.optim, batch), beta=config.loss.beta)
    ref = None
    if step.tokens.ref_logprobs is not None:
        ref = drift(packed(reference_logprobs(policy, batch, cuts, config, reference), batch), step.tokens.ref_logprobs)
    own = None
    if before is not None:
        with adapter_swapped(policy, before):
            own = drift(policy_logprobs(policy, batch, cuts, config, step=step.number - 1), step.tokens.logprobs[0])
    return Recomputed(step.number, ref, own, tuple(misread_rows(policy, entry, config)))


@torch.no_grad()
def policy_logprobs(policy: Policy, batch: Batch, cuts: tuple[Cut, ...], config: Config, *, step: int) -> Tensor:
    """[M] as the first inner epoch of a 0-based step met them, dropout and its noise included."""
    policy.model.train()
    torch.manual_seed(row_key("dropout", config.train.seed, step, 0) % 2**63)
    whole = scored(policy, batch, cuts, config.rollout.temperature)
    policy.model.eval()
    return packed(whole, batch)


def drift(now: Tensor, then: Tensor) -> Drift:
    """How far apart two [M] tensors are; NaN counts as infinitely far.

    >>> drift(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
    Drift(tokens=2, largest=0.5, mean=0.25)
    """
    apart = (now.double() - then.double()).abs().nan_to_num(nan=torch.inf)
    return Drift(apart.numel(), float(apart.max()), float(apart.mean()))


def misread_rows(policy: Policy, entry: Entry, config: Config) -> Iterator[str]:
    """Prompts that the tokenizer renders otherwise, and completions that it decodes otherwise or that end otherwise."""
    for b, g in rows(entry.step):
        group = entry.step.groups[b]
        case, completion = group.prompt.case, group.completions[g]
        where = f"group {b} (case {case.id}), member {g}"
        prompt = render_prompt(
            policy.tokenizer, case, system_prompt=config.cases.system_prompt, thinking=group.prompt.thinking
        )
        if g == 0 and prompt.ids != group.prompt.ids:
            yield f"{where}: prompt"
        finished = completion.ids[-1] in policy.end_ids
        ids = completion.ids[:-1] if finished else completion.ids
        text = policy.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if (text, finished) != (completion.text, completion.finished):
            yield f"{where}: completion"


def tolerance(recording: Recording, section: Model) -> tuple[str, tuple[float, float]]:
    """The coarser of the dtypes that the training and this machine give the base, and its `TOLERANCES`."""
    dtypes = {str(pick_dtype(section.dtype, pick_device(section.device))).removeprefix("torch.")}
    if section.dtype == "auto":
        dtypes.add("float32" if str(recording.made_with.get("device")).startswith("cpu") else "bfloat16")
    coarser = max(dtypes, key=TOLERANCES.__getitem__)
    return coarser, TOLERANCES[coarser]


def rounding_causes(recording: Recording, section: Model) -> list[str]:
    """Return why the log-probabilities may differ from the recorded ones in their last bits: equal bits need the same
    kind of device and the same micro-batches."""
    trained, here = str(recording.made_with.get("device")), card_name(pick_device(section.device))
    causes = [] if here in (trained, trained.partition(" (")[0]) else [f"trained on {trained}, computed on {here}"]
    if recording.config.optim.micro_batch_tokens == "auto":
        causes.append('optim.micro_batch_tokens = "auto" cuts micro-batches by the memory that is free')
    return causes


def model_lines(
    found: Sequence[Recomputed], dtype: str, allowed: tuple[float, float], epochs: int, causes: Sequence[str] = ()
) -> list[str]:
    """What the model said, for people.

    Args:
        epochs: inner epochs of a step.
        causes: of rounding, see `rounding_causes`.
    """
    lines = []
    for name in ("reference", "policy"):
        drifts = {one.step: drift for one in found if (drift := getattr(one, name)) is not None}
        if not drifts:
            lines.append(f"{name:<11}  no step to compare")
            continue
        tokens = sum(one.tokens for one in drifts.values())
        mean = math.fsum(one.mean * one.tokens for one in drifts.values()) / tokens
        largest = max(one.largest for one in drifts.values())
        lines.append(
            f"{name:<11}  {len(drifts):,} of {len(found):,} steps, {tokens:,} tokens: max |Δ logprob| {largest:.3g}, "
            f"mean {mean:.3g}; rounding in {dtype} may be {allowed[0]:g} and {allowed[1]:g}"
        )
        if largest and all(one.within(allowed) for one in drifts.values()):
            why = f": {'; '.join(causes)}" if causes else ""
            lines.append(f"{name:<11}  equal within rounding, not to the bit{why}")
        lines += [
            f"step {step}: {name}: max |Δ logprob| {one.largest:.3g}, mean {one.mean:.3g} is no rounding"
            for step, one in drifts.items()
            if not one.within(allowed)
        ]
    lines += [f"step {one.step}: {row} is not what its token ids say" for one in found for row in one.misread]
    gone = sum(one.policy is None for one in found)
    if gone:
        lines.append(f"not checked  policy in {gone:,} steps: no checkpoint of just before them is kept")
    if epochs > 1:
        lines.append("not checked  policy in inner epochs after the first: adapters between them are never kept")
    return lines


def _adapter(policy: Policy, checkpoint: Path) -> dict[str, Tensor]:
    """The adapter of a checkpoint; the policy's own stays."""
    own = adapter_copy(policy)
    with adapter_swapped(policy, own):
        load_checkpoint(checkpoint, policy, torch.optim.AdamW(policy.trainable().values()))
        return adapter_copy(policy)
