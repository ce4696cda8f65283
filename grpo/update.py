"""One batch → μ optimiser steps on the adapter.

    for each inner epoch:
        for each micro-batch:  logprobs → loss (a weighted sum, already normalised for the whole step) → backward
        clip the gradient, step

Rows of one prompt stay together, so that it is computed once; the long ones come first, so that memory that does not
suffice is missed at once. Since the loss is a plain sum, the cut changes nothing but memory. Old log-probabilities are
the first epoch's own: the policy has not moved before its first optimiser step, so they cost no forward pass and the
ratio is exactly 1 there. Rows that cannot move the policy (no weight, or no advantage and no KL) are scored without a
backward pass.
"""

import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from grpo.cases import stable_seed
from grpo.config import Config
from grpo.forward import forward_of
from grpo.logprobs import spread, token_logprobs, token_slots
from grpo.loss import LossTerms, grpo_loss, silent_rows
from grpo.micro_batch_limit import Room, room
from grpo.policy.policy import Policy, as_reference
from grpo.runtime.out_of_memory import UPDATE, OutOfMemory, memory_errors
from grpo.types import Batch, StepLogprobs

T = TypeVar("T")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the steps after warm-up that is done, in [0, 1) → factor on the learning rate."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch."""

    rows: Tensor
    """[n] long, of the batch."""
    silent: bool = False
    """None of them can move the policy."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What `update_policy` did."""

    logprobs: StepLogprobs
    loss: float
    """Of the first inner epoch, as the backward pass had it."""
    grad_norm: float
    """Before clipping; the last inner epoch's."""
    skipped: int
    """Inner epochs whose loss or gradient was not finite: no optimiser step was taken."""

    @property
    def figures(self) -> tuple[float, float, int]:
        return self.loss, self.grad_norm, self.skipped


def update_policy(
    policy: Policy,
    batch: Batch,
    config: Config,
    optimizer: torch.optim.Optimizer,
    reference: Mapping[str, Tensor] | None,
    *,
    step: int,
) -> UpdateResult:
    """Moves the adapter by μ = ``optim.inner_epochs`` clipped steps on one batch, alike on every rank of the policy:
    each computes the rows of its own groups, then the sums over all rows are exchanged.

    Args:
        step: of the run, 0-based; with μ it gives the position in the learning-rate schedule.
        reference: tensors that take the adapter's place for the reference; None is the bare base. Only looked at if
            ``loss.beta`` > 0.
    """
    space = room(policy, config.optim, batch)
    ref = None
    if config.loss.beta > 0:
        with memory_errors("reference", UPDATE, policy.world):
            ref = fitting(
                lambda cuts: reference_logprobs(policy, batch, cuts, config, reference), policy, batch, config, space
            )
    seen: list[Tensor] = []
    entropy = torch.zeros(0)
    losses: list[float] = []
    norm, skipped = 0.0, 0
    policy.model.train()
    for epoch in range(config.optim.inner_epochs):
        old = seen[0] if seen else None
        noise = stable_seed(
            "dropout", config.train.seed, step, epoch, *([policy.world.rank] if policy.world.rank else [])
        )

        def one_pass(
            cuts: tuple[MicroBatch, ...], noise: int = noise, old: Tensor | None = old
        ) -> tuple[Tensor, Tensor, Tensor]:
            optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(noise % 2**63)  # the update's only noise
            done = forward_backward(policy, batch, cuts, config, old, ref)
            for p in policy.adapter_parameters().values():
                if p.grad is None:  # nothing could move it, but AdamW's momentum still does
                    p.grad = torch.zeros_like(p)
            return done

        with memory_errors("update", UPDATE, policy.world, midway=epoch > 0):
            logprobs, entropies, total = fitting(one_pass, policy, batch, config, space)
        total = policy.world.all_reduce_gradients(policy.adapter_parameters().values(), total)
        if epoch == 0:
            entropy = entropies
        seen.append(logprobs)
        norm = float(torch.nn.utils.clip_grad_norm_(policy.adapter_parameters().values(), config.optim.max_grad_norm))
        losses.append(float(total))
        if math.isfinite(norm) and math.isfinite(losses[-1]):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step * config.optim.inner_epochs + epoch)
            optimizer.step()
        else:
            skipped += 1
    optimizer.zero_grad(set_to_none=True)
    policy.model.eval()
    return UpdateResult(token_record(policy, batch, seen, ref, entropy), losses[0], norm, skipped)


def token_record(
    policy: Policy, batch: Batch, seen: Sequence[Tensor], ref: Tensor | None, entropy: Tensor
) -> StepLogprobs:
    """Of all ranks' rows, from [N,T] that are zero but for this rank's."""
    matrices = [entropy, *seen, *(() if ref is None else (ref,))]
    values = torch.stack([packed(matrix, batch) for matrix in matrices]).to(policy.world.device)
    policy.world.all_reduce_(values.view(-1))
    values = values.cpu()
    return StepLogprobs(
        logprobs=values[1 : 1 + len(seen)],
        ref_logprobs=None if ref is None else values[-1],
        entropy=values[0],
    )


def forward_backward(
    policy: Policy, batch: Batch, cuts: Sequence[MicroBatch], config: Config, old: Tensor | None, ref: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over this rank's rows: gradients are added up, and log-probabilities [N,T], entropies [N,T] and the loss
    [] returned, all on the policy's device, and zero where the rows are another rank's.

    Args:
        old, ref: [N,T] of the old policy and of the reference; ``old`` None says that this policy is the old one.
    """
    logprobs, entropies = blank(policy, batch), blank(policy, batch)
    total = torch.zeros((), device=policy.device)
    for cut in cuts:
        with torch.set_grad_enabled(not cut.silent):
            now, entropy, mask = micro_batch_logprobs(policy, batch, cut, config.rollout.temperature)
        width = now.shape[1]
        rows = cut.rows.to(policy.device, non_blocking=True)
        logprobs[rows, :width] = now.detach().float()
        entropies[rows, :width] = entropy.detach().float()
        before = now.detach() if old is None else old[rows, :width]
        terms = _loss(now, before, None if ref is None else ref[rows, :width], batch, cut, mask, config)
        if not cut.silent:
            terms.loss.backward()
        total += terms.loss.detach()
    return logprobs, entropies, total


def fitting(run: Callable[[tuple[MicroBatch, ...]], T], policy: Policy, batch: Batch, config: Config, space: Room) -> T:
    """``run`` over this rank's micro-batches; where the device has no room for one, again with half as much in each.

    Raises:
        OutOfMemory: half does not fit either.
    """
    rows = own_rows(policy, batch, config)
    for half in (False, True):
        cuts = micro_batches(batch, space.halved() if half else space, beta=config.loss.beta, rows=rows)
        try:
            return run(cuts)
        except torch.OutOfMemoryError:
            pass  # its frames hold the tensors: let them go before anything else
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not half:
            print(f"memory    a micro-batch of {space} does not fit: once more with half", file=sys.stderr)
    raise OutOfMemory(f"a micro-batch of {space.halved()} does not fit the device: {UPDATE}")


def own_rows(policy: Policy, batch: Batch, config: Config) -> range:
    """The rows of this rank's groups, among the batch's N."""
    size, count = config.rollout.group_size, len(batch.completion_ids)
    groups = policy.world.slice_of(-(-count // size))
    return range(groups.start * size, min(groups.stop * size, count))


def packed(values: Tensor, batch: Batch) -> Tensor:
    """[M] on the CPU, from [N,T]."""
    return values.cpu()[batch.completion_mask]


def blank(policy: Policy, batch: Batch) -> Tensor:
    """Zeros [N,T] fp32 on the policy's device."""
    return torch.zeros(batch.completion_mask.shape, device=policy.device)


def learning_rate(config: Config, position: int) -> float:
    """Of the optimiser step at a 0-based position: linear warm-up to ``optim.learning_rate``, then the schedule, which
    for "linear" and "cosine" would reach 0 one step after the last."""
    warmup, total = config.optim.warmup_steps, config.train.steps * config.optim.inner_epochs
    if position < warmup:
        return config.optim.learning_rate * (position + 1) / (warmup + 1)
    return config.optim.learning_rate * SCHEDULES[config.optim.schedule]((position - warmup) / (total - warmup))


def micro_batches(
    batch: Batch, space: Room, *, beta: float, rows: Sequence[int] | None = None
) -> tuple[MicroBatch, ...]:
    """The rows, cut into pieces that fit ``space``; rows of one prompt stand together, the longest first.

    Args:
        beta: of the KL, which moves rows of no advantage too. Rows that are silent (`grpo.loss.silent_rows`) come last,
            in pieces of their own.
        rows: None for all.
    """
    prompts = batch.prompt_ids
    lengths = [len(p) + len(c) for p, c in zip(prompts, batch.completion_ids, strict=True)]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    every = range(len(lengths)) if rows is None else rows
    order = sorted(every, key=lambda i: (-longest[prompts[i]], prompts[i], -lengths[i], i))
    silent = silent_rows(batch.advantages, batch.token_weights, beta=beta).tolist()
    cuts: list[MicroBatch] = []
    for kind in (False, True):
        piece: list[int] = []
        for i in (i for i in order if silent[i] is kind):
            if piece and not space.holds(batch, [*piece, i]):
                cuts.append(MicroBatch(torch.tensor(piece), kind))
                piece = []
            piece.append(i)
        if piece:
            cuts.append(MicroBatch(torch.tensor(piece), kind))
    return tuple(cuts)


def micro_batch_logprobs(
    policy: Policy, batch: Batch, cut: MicroBatch, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies [n,T] of a micro-batch under the policy as it stands, and its mask [n,T], T being
    the micro-batch's own widest row."""
    rows = cut.rows.tolist()
    completions = [batch.completion_ids[i] for i in rows]
    forward = forward_of(policy)
    targets = torch.tensor([token for ids in completions for token in ids]).to(policy.device, non_blocking=True)
    head = policy.lm_head
    logprobs, entropy = token_logprobs(
        forward(policy, [batch.prompt_ids[i] for i in rows], completions),
        head.weight,
        targets,
        temperature=temperature,
        bias=getattr(head, "bias", None),
    )
    mask = batch.completion_mask[cut.rows, : max(len(ids) for ids in completions)]
    slots = token_slots(mask, policy.device)
    sent = mask.to(policy.device, non_blocking=True)
    return spread(logprobs, mask, slots), spread(entropy, mask, slots), sent


def reference_logprobs(
    policy: Policy,
    batch: Batch,
    cuts: Sequence[MicroBatch],
    config: Config,
    reference: Mapping[str, Tensor] | None,
) -> Tensor:
    """[N,T] under the reference, without dropout."""
    policy.model.eval()
    with as_reference(policy, reference):
        return scored(policy, batch, cuts, config.rollout.temperature)


@torch.no_grad()
def scored(policy: Policy, batch: Batch, cuts: Sequence[MicroBatch], temperature: float) -> Tensor:
    """Log-probabilities [N,T] under the policy as it stands, on its device."""
    whole = blank(policy, batch)
    for cut in cuts:
        logprobs, _, _ = micro_batch_logprobs(policy, batch, cut, temperature)
        whole[cut.rows.to(policy.device, non_blocking=True), : logprobs.shape[1]] = logprobs.float()
    return whole


def _loss(
    logprobs: Tensor, old: Tensor, ref: Tensor | None, batch: Batch, cut: MicroBatch, mask: Tensor, config: Config
) -> LossTerms:
    section = config.loss
    width = logprobs.shape[1]
    return grpo_loss(
        logprobs,
        old,
        ref,
        batch.advantages[cut.rows].to(logprobs.device, non_blocking=True),
        mask,
        batch.token_weights[cut.rows, :width].to(logprobs.device, non_blocking=True),
        surrogate=section.surrogate,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        dual_clip=section.dual_clip,
        kl=section.kl,
        beta=section.beta,
    )
