"""One batch → μ optimiser steps on the adapter.

    for each inner epoch:
        for each micro-batch:  logprobs → loss (a weighted sum, already normalised for the whole step) → backward
        clip the gradient, step

Rows of one prompt stay together, so that it is computed once; the long ones come first, so that memory that does not
suffice is missed at once. Since the loss is a plain sum, the cut changes nothing but memory. Old log-probabilities are
the first epoch's own: the policy has not moved before its first optimiser step, so they cost no forward pass and the
ratio is exactly 1 there. Rows that cannot move the policy (no advantage, and no KL) are scored without a backward pass.
"""

import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from grpo.cases import row_key
from grpo.config import Config
from grpo.forward.memory import Room, room
from grpo.forward.modules import predicting_states_by_modules
from grpo.forward.shared_prefix import predicting_states_shared, shared
from grpo.logprobs import spread, token_logprobs
from grpo.loss import LossTerms, grpo_loss
from grpo.policy import Policy, adapter_swapped
from grpo.types import Batch, TokenRecord

T = TypeVar("T")
Forward = Callable[[Policy, Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]
"""(policy, N prompts, N completions) → the hidden states [M,H] that predict the completion tokens."""
FORWARDS: dict[str, Forward] = {"shared": predicting_states_shared, "modules": predicting_states_by_modules}
"""Qwen3.5, each prompt once; any causal language model, row by row."""
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the steps after warm-up that is done, in [0, 1) → factor on the learning rate."""


class OutOfMemory(MemoryError):
    """A micro-batch does not fit the device, nor does half of it. Names the keys to lower."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A micro-batch."""

    rows: Tensor
    """[n] long, of the batch."""
    silent: bool = False
    """None of them can move the policy."""


@dataclass(frozen=True, slots=True)
class Updated:
    """What `update` did."""

    tokens: TokenRecord
    loss: float
    """Of the first inner epoch, as the backward pass had it."""
    grad_norm: float
    """Before clipping; the last inner epoch's."""
    skipped: int
    """Inner epochs whose loss or gradient was not finite: no optimiser step was taken."""

    @property
    def figures(self) -> tuple[float, float, int]:
        return self.loss, self.grad_norm, self.skipped


def update(
    policy: Policy,
    batch: Batch,
    config: Config,
    optimizer: torch.optim.Optimizer,
    reference: Mapping[str, Tensor] | None,
    *,
    step: int,
) -> Updated:
    """Moves the adapter by μ = ``optim.inner_epochs`` clipped steps on one batch.

    Args:
        step: of the run, 0-based; with μ it gives the position in the learning-rate schedule.
        reference: tensors that take the adapter's place for the reference; None is the bare base. Only looked at if
            ``loss.beta`` > 0.
    """
    space = room(policy, config.optim, batch)
    ref = None
    if config.loss.beta > 0:
        ref = fitting(lambda cuts: reference_logprobs(policy, batch, cuts, config, reference), batch, config, space)
    seen: list[Tensor] = []
    entropy = torch.zeros(0)
    losses: list[float] = []
    norm, skipped = 0.0, 0
    policy.model.train()
    for epoch in range(config.optim.inner_epochs):
        old = seen[0] if seen else None

        def one_pass(cuts: tuple[Cut, ...], epoch: int = epoch, old: Tensor | None = old) -> tuple[Tensor, ...]:
            optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(row_key("dropout", config.train.seed, step, epoch) % 2**63)  # the update's only noise
            return backward(policy, batch, cuts, config, old, ref)

        logprobs, entropies, total = fitting(one_pass, batch, config, space)
        if epoch == 0:
            entropy = entropies
        seen.append(logprobs)
        norm = float(torch.nn.utils.clip_grad_norm_(policy.trainable().values(), config.optim.max_grad_norm))
        losses.append(float(total))
        if math.isfinite(norm) and math.isfinite(losses[-1]):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step * config.optim.inner_epochs + epoch)
            optimizer.step()
        else:
            skipped += 1
    optimizer.zero_grad(set_to_none=True)
    policy.model.eval()
    tokens = TokenRecord(
        logprobs=torch.stack([packed(values, batch) for values in seen]),
        ref_logprobs=None if ref is None else packed(ref, batch),
        entropy=packed(entropy, batch),
    )
    return Updated(tokens, losses[0], norm, skipped)


def backward(
    policy: Policy, batch: Batch, cuts: Sequence[Cut], config: Config, old: Tensor | None, ref: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the batch: gradients are added up, and log-probabilities [N,T], entropies [N,T] and the loss []
    returned, all on the policy's device.

    Args:
        old, ref: [N,T] of the old policy and of the reference; ``old`` None says that this policy is the old one.
    """
    logprobs, entropies = blank(policy, batch), blank(policy, batch)
    total = torch.zeros((), device=policy.device)
    for cut in cuts:
        with torch.set_grad_enabled(not cut.silent):
            now, entropy, mask = score(policy, batch, cut, config.rollout.temperature)
        width = now.shape[1]
        rows = cut.rows.to(policy.device)
        logprobs[rows, :width] = now.detach().float()
        entropies[rows, :width] = entropy.detach().float()
        before = now.detach() if old is None else old[rows, :width]
        terms = _loss(now, before, None if ref is None else ref[rows, :width], batch, cut, mask, config)
        if not cut.silent:
            terms.loss.backward()
        total += terms.loss.detach()
    return logprobs, entropies, total


def fitting(run: Callable[[tuple[Cut, ...]], T], batch: Batch, config: Config, space: Room) -> T:
    """``run`` over the batch's micro-batches; where the device has no room for one, again with half as much in each.

    Raises:
        OutOfMemory: half does not fit either.
    """
    for half in (False, True):
        try:
            return run(micro_batches(batch, space.halved() if half else space, beta=config.loss.beta))
        except torch.OutOfMemoryError:
            pass  # its frames hold the tensors: let them go before anything else
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not half:
            print(f"memory    a micro-batch of {space} does not fit: once more with half", file=sys.stderr)
    raise OutOfMemory(
        f"a micro-batch of {space.halved()} does not fit the device: lower optim.micro_batch_size or "
        f"optim.micro_batch_tokens, set model.gradient_checkpointing = true, or lower rollout.max_new_tokens"
    )


def blank(policy: Policy, batch: Batch) -> Tensor:
    """Zeros [N,T] fp32 on the policy's device."""
    return torch.zeros(batch.completion_mask.shape, device=policy.device)


def packed(values: Tensor, batch: Batch) -> Tensor:
    """[M] on the CPU, from [N,T]."""
    return values.cpu()[batch.completion_mask]


def learning_rate(config: Config, position: int) -> float:
    """Of the optimiser step at a 0-based position: linear warm-up to ``optim.learning_rate``, then the schedule, which
    for "linear" and "cosine" would reach 0 one step after the last."""
    warmup, total = config.optim.warmup_steps, config.train.steps * config.optim.inner_epochs
    if position < warmup:
        return config.optim.learning_rate * (position + 1) / (warmup + 1)
    return config.optim.learning_rate * SCHEDULES[config.optim.schedule]((position - warmup) / (total - warmup))


def micro_batches(batch: Batch, space: Room, *, beta: float) -> tuple[Cut, ...]:
    """All rows, cut into pieces that fit ``space``; rows of one prompt stand together, the longest first.

    Args:
        beta: with 0, rows of no advantage are silent and come last, in pieces of their own.
    """
    prompts = batch.prompt_ids
    lengths = [len(p) + len(c) for p, c in zip(prompts, batch.completion_ids, strict=True)]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    order = sorted(range(len(lengths)), key=lambda i: (-longest[prompts[i]], prompts[i], -lengths[i], i))
    silent = [beta == 0 and float(a) == 0 for a in batch.advantages]
    cuts: list[Cut] = []
    for kind in (False, True):
        piece: list[int] = []
        for i in (i for i in order if silent[i] is kind):
            if piece and not space.holds(batch, [*piece, i]):
                cuts.append(Cut(torch.tensor(piece), kind))
                piece = []
            piece.append(i)
        if piece:
            cuts.append(Cut(torch.tensor(piece), kind))
    return tuple(cuts)


def score(policy: Policy, batch: Batch, cut: Cut, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies [n,T] of a micro-batch under the policy as it stands, and its mask [n,T], T being
    the micro-batch's own widest row."""
    rows = cut.rows.tolist()
    completions = [batch.completion_ids[i] for i in rows]
    forward = FORWARDS["shared" if shared(policy) else "modules"]
    targets = torch.tensor([token for ids in completions for token in ids], device=policy.device)
    head = policy.head
    logprobs, entropy = token_logprobs(
        forward(policy, [batch.prompt_ids[i] for i in rows], completions),
        head.weight,
        targets,
        temperature=temperature,
        bias=getattr(head, "bias", None),
    )
    mask = batch.completion_mask[cut.rows, : max(len(ids) for ids in completions)].to(policy.device)
    return spread(logprobs, mask), spread(entropy, mask), mask


def reference_logprobs(
    policy: Policy,
    batch: Batch,
    cuts: Sequence[Cut],
    config: Config,
    reference: Mapping[str, Tensor] | None,
) -> Tensor:
    """[N,T] under the reference, without dropout."""
    policy.model.eval()
    with adapter_swapped(policy, reference):
        return scored(policy, batch, cuts, config.rollout.temperature)


@torch.no_grad()
def scored(policy: Policy, batch: Batch, cuts: Sequence[Cut], temperature: float) -> Tensor:
    """Log-probabilities [N,T] under the policy as it stands, on its device."""
    whole = blank(policy, batch)
    for cut in cuts:
        logprobs, _, _ = score(policy, batch, cut, temperature)
        whole[cut.rows.to(policy.device), : logprobs.shape[1]] = logprobs.float()
    return whole


def _loss(
    logprobs: Tensor, old: Tensor, ref: Tensor | None, batch: Batch, cut: Cut, mask: Tensor, config: Config
) -> LossTerms:
    section = config.loss
    width = logprobs.shape[1]
    return grpo_loss(
        logprobs,
        old,
        ref,
        batch.advantages[cut.rows].to(logprobs.device),
        mask,
        batch.token_weights[cut.rows, :width].to(logprobs.device),
        surrogate=section.surrogate,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        dual_clip=section.dual_clip,
        kl=section.kl,
        beta=section.beta,
    )
