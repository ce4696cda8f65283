"""One batch → μ optimiser steps on the adapter.

    for each inner epoch:
        for each micro-batch:  logprobs → loss (a weighted sum, already normalised for the whole step) → backward
        clip the gradient, step

Rows are sorted by length and cut into micro-batches; since the loss is a plain sum, the cut changes nothing but
memory. Old log-probabilities are the first epoch's own: the policy has not moved before its first optimiser step, so
they cost no forward pass and the ratio is exactly 1 there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.cases import row_key
from grpo.config import Config
from grpo.logprobs import join, predicting_states, spread, token_logprobs
from grpo.loss import LossTerms, grpo_loss
from grpo.policy import Policy, adapter_swapped
from grpo.types import Batch, TokenRecord

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the steps after warm-up that is done, in [0, 1) → factor on the learning rate."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A micro-batch: which rows of the batch, [n] long."""

    rows: Tensor


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
    cuts = micro_batches(batch, config.optim.micro_batch_size)
    ref = reference_logprobs(policy, batch, cuts, config, reference) if config.loss.beta > 0 else None
    seen: list[list[Tensor]] = []
    entropies: list[Tensor] = []
    losses: list[float] = []
    norm, skipped = 0.0, 0
    policy.model.train()
    for epoch in range(config.optim.inner_epochs):
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(row_key("dropout", config.train.seed, step, epoch) % 2**63)  # the only noise of the update
        seen.append([])
        total = torch.zeros((), device=policy.device)
        for i, cut in enumerate(cuts):
            logprobs, entropy, mask = score(policy, batch, cut, config.rollout.temperature)
            seen[epoch].append(logprobs.detach())
            if epoch == 0:
                entropies.append(entropy.detach())
            terms = _loss(logprobs, seen[0][i], ref[i] if ref else None, batch, cut, mask, config)
            if config.loss.beta > 0 or batch.advantages[cut.rows].any():
                terms.loss.backward()
            total += terms.loss.detach()
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
        logprobs=torch.stack([packed(batch, cuts, values) for values in seen]),
        ref_logprobs=packed(batch, cuts, ref) if ref else None,
        entropy=packed(batch, cuts, entropies),
    )
    return Updated(tokens, losses[0], norm, skipped)


def packed(batch: Batch, cuts: tuple[Cut, ...], values: Sequence[Tensor]) -> Tensor:
    """[M] on the CPU, in the batch's order of rows, from the [n,T] of each micro-batch."""
    whole = torch.zeros(batch.completion_mask.shape)
    for cut, piece in zip(cuts, values, strict=True):
        whole[cut.rows, : piece.shape[1]] = piece.float().cpu()
    return whole[batch.completion_mask]


def learning_rate(config: Config, position: int) -> float:
    """Of the optimiser step at a 0-based position: linear warm-up to ``optim.learning_rate``, then the schedule, which
    for "linear" and "cosine" would reach 0 one step after the last."""
    warmup, total = config.optim.warmup_steps, config.train.steps * config.optim.inner_epochs
    if position < warmup:
        return config.optim.learning_rate * (position + 1) / (warmup + 1)
    return config.optim.learning_rate * SCHEDULES[config.optim.schedule]((position - warmup) / (total - warmup))


def micro_batches(batch: Batch, size: int) -> tuple[Cut, ...]:
    """The rows sorted by total length and cut into pieces of at most ``size``: little padding, nothing left out."""
    lengths = [len(p) + len(c) for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return tuple(Cut(torch.tensor(order[i : i + size])) for i in range(0, len(order), size))


def score(policy: Policy, batch: Batch, cut: Cut, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies [n,T] of a micro-batch under the policy as it stands, and its mask [n,T], T being
    the micro-batch's own widest row. Prompt and completion are one right-padded sequence: padding on the right is
    never seen by a causal model, so no mask is needed."""
    rows = cut.rows.tolist()
    joined = join([batch.prompt_ids[i] for i in rows], [batch.completion_ids[i] for i in rows], pad_id=0)
    hidden = policy.body(input_ids=joined.input_ids.to(policy.device), use_cache=False).last_hidden_state
    mask = joined.completion_mask
    head = policy.head
    logprobs, entropy = token_logprobs(
        predicting_states(hidden, joined),
        head.weight,
        joined.completion_ids[mask].to(policy.device),
        temperature=temperature,
        bias=getattr(head, "bias", None),
    )
    mask = mask.to(policy.device)
    return spread(logprobs, mask), spread(entropy, mask), mask


@torch.no_grad()
def reference_logprobs(
    policy: Policy,
    batch: Batch,
    cuts: tuple[Cut, ...],
    config: Config,
    reference: Mapping[str, Tensor] | None,
) -> list[Tensor]:
    """[n,T] of each micro-batch under the reference, without dropout."""
    policy.model.eval()
    with adapter_swapped(policy, reference):
        return [score(policy, batch, cut, config.rollout.temperature)[0] for cut in cuts]


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
