"""One batch → μ optimizer steps on the adapter.

    reference log-probabilities, if beta > 0
    for each inner epoch:
        zero the gradient
        for each micro-batch:  logprobs → loss (a weighted sum, already normalized for the whole step) → backward
        sum the gradients over the ranks, clip, step

Rows of one prompt stay together, so that the prompt is computed once; the longest come first, so that too little memory
shows at once. Because the loss is a plain sum, the split changes nothing but memory. The old log-probabilities are
those of the first epoch: the policy does not change before its first optimizer step, so they cost no forward pass, and
the ratio is exactly 1 there. Rows that cannot move the policy (no weight, or no advantage and no KL) are scored without
a backward pass.
"""

import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from grpo.cases import stable_seed
from grpo.config import Config, OptimSection
from grpo.forward import forward_of
from grpo.logprobs import token_logprobs, token_slots, unpack_tokens
from grpo.loss import LossTerms, grpo_loss, silent_rows
from grpo.policy.policy import Policy, as_reference
from grpo.qwen3_5.train_forward import shared
from grpo.runtime.out_of_memory import UPDATE, OutOfMemory, memory_errors
from grpo.types import Batch, StepLogprobs

T = TypeVar("T")
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Fraction of the steps after warm-up that is done, in [0, 1) → factor on the learning rate."""


@dataclass(slots=True)
class MicroBatchLimit:
    """The largest micro-batch. `halve_until_it_fits` lowers it for the rest of the run."""

    rows: int
    tokens: int | None = None
    """None for no limit. A single row is a micro-batch whatever its length."""
    share_prompts: bool = True
    """Whether a prompt is computed once for all of its rows; otherwise every row is padded to the widest."""

    def admits(self, batch: Batch, rows: Sequence[int]) -> bool:
        """Return whether these rows can be one micro-batch."""
        return len(rows) <= self.rows and (self.tokens is None or self.count_tokens(batch, rows) <= self.tokens)

    def count_tokens(self, batch: Batch, rows: Sequence[int]) -> int:
        """Return the number of tokens that are computed for these rows."""
        if not self.share_prompts:
            return len(rows) * max(len(batch.prompt_ids[i]) + len(batch.completion_ids[i]) for i in rows)
        prompts = {batch.prompt_ids[i] for i in rows}
        return sum(len(ids) for ids in prompts) + sum(len(batch.completion_ids[i]) for i in rows)


def micro_batch_limit(policy: Policy, section: OptimSection) -> MicroBatchLimit:
    """Return the limit with which a run starts."""
    return MicroBatchLimit(section.micro_batch_size, section.micro_batch_tokens, shared(policy))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of a batch that are computed together."""

    rows: Tensor
    """[n] long."""
    silent: bool = False
    """None of them can move the policy: no backward pass."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What `update_policy` computed."""

    logprobs: StepLogprobs
    loss: float
    """Loss of the first inner epoch as the backward pass computed it."""
    grad_norm: float
    """Gradient norm of the last inner epoch, before clipping."""
    skipped: int
    """Number of inner epochs without an optimizer step because loss or gradient was not finite."""

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
    limit: MicroBatchLimit | None = None,
) -> UpdateResult:
    """Move the adapter by μ = ``optim.inner_epochs`` clipped steps on one batch, identically on every rank: each rank
    computes the rows of its own groups, then the gradients are summed over all ranks.

    Args:
        step: 0-based step of the run; together with μ it gives the position in the learning-rate schedule.
        reference: adapter tensors of the reference; None is the bare base. Not used if ``loss.beta`` is 0.
        limit: of the micro-batches; lowered if the device runs out of memory. None starts from the config.
    """
    limit = limit or micro_batch_limit(policy, config.optim)
    parameters = list(policy.adapter_parameters().values())
    split = partial(micro_batches, batch, limit, beta=config.loss.beta, rows=rank_rows(policy, batch, config))
    ref_logprobs = None
    if config.loss.beta > 0:
        with memory_errors("reference", UPDATE, policy.world):
            score = partial(reference_logprobs, policy, batch, config=config, reference=reference)
            ref_logprobs = halve_until_it_fits(score, split, limit)
    epoch_logprobs: list[Tensor] = []
    losses: list[float] = []
    entropy, grad_norm, skipped = torch.zeros(0), 0.0, 0
    policy.model.train()
    for epoch in range(config.optim.inner_epochs):
        old_logprobs = epoch_logprobs[0] if epoch_logprobs else None
        with memory_errors("update", UPDATE, policy.world, midway=epoch > 0):
            seed = dropout_seed(config, step, epoch, policy.world.rank)
            run = partial(forward_backward, policy, batch, config, old_logprobs, ref_logprobs, seed)
            logprobs, entropies, loss = halve_until_it_fits(run, split, limit)
        loss = policy.world.all_reduce_gradients(parameters, loss)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm))
        losses.append(float(loss))
        if math.isfinite(grad_norm) and math.isfinite(losses[-1]):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step * config.optim.inner_epochs + epoch)
            optimizer.step()
        else:
            skipped += 1
        entropy = entropy if epoch_logprobs else entropies
        epoch_logprobs.append(logprobs)
    optimizer.zero_grad(set_to_none=True)
    policy.model.eval()
    recorded = collect_logprobs(policy, batch, epoch_logprobs, ref_logprobs, entropy)
    return UpdateResult(recorded, losses[0], grad_norm, skipped)


def forward_backward(
    policy: Policy,
    batch: Batch,
    config: Config,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    seed: int,
    cuts: Sequence[MicroBatch],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of this rank's rows, starting from zero.

    Args:
        old_logprobs, ref_logprobs: [N,T] of the old policy and of the reference; ``old_logprobs`` is None if this
            policy is the old one.
        seed: of the dropout.

    Returns:
        log-probabilities [N,T], entropies [N,T] and loss [], all on the policy's device; zero in rows of other ranks.
    """
    parameters = policy.adapter_parameters().values()
    for p in parameters:
        p.grad = None
    torch.manual_seed(seed)  # dropout is the only randomness of the update
    logprobs, entropies = zeros_like_batch(policy, batch), zeros_like_batch(policy, batch)
    total = torch.zeros((), device=policy.device)
    for cut in cuts:
        with torch.set_grad_enabled(not cut.silent):
            new, entropy, mask = micro_batch_logprobs(policy, batch, cut, config.rollout.temperature)
        width = new.shape[1]
        rows = cut.rows.to(policy.device, non_blocking=True)
        logprobs[rows, :width] = new.detach().float()
        entropies[rows, :width] = entropy.detach().float()
        old = new.detach() if old_logprobs is None else old_logprobs[rows, :width]
        ref = None if ref_logprobs is None else ref_logprobs[rows, :width]
        terms = _loss(new, old, ref, batch, cut, mask, config)
        if not cut.silent:
            terms.loss.backward()
        total += terms.loss.detach()
    for p in parameters:
        if p.grad is None:  # no row can move it, but AdamW's momentum still does
            p.grad = torch.zeros_like(p)
    return logprobs, entropies, total


def halve_until_it_fits(
    run: Callable[[tuple[MicroBatch, ...]], T], split: Callable[[], tuple[MicroBatch, ...]], limit: MicroBatchLimit
) -> T:
    """Return ``run(split())``. While the device runs out of memory, halve the rows of the largest micro-batch, which
    lowers ``limit`` for the rest of the run, and start again.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    while True:
        cuts = split()
        try:
            return run(cuts)
        except torch.OutOfMemoryError:
            pass  # the frames of the exception hold tensors: leave it before freeing memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = max(len(cut.rows) for cut in cuts)
        if rows == 1:
            raise OutOfMemory(f"a micro-batch of a single row does not fit the device's memory: {UPDATE}")
        limit.rows = rows // 2
        print(
            f"warning: a micro-batch of {rows} rows does not fit the device's memory: limited to {limit.rows} "
            f"for the rest of this run",
            file=sys.stderr,
        )


def dropout_seed(config: Config, step: int, epoch: int, rank: int = 0) -> int:
    """Return the seed of the dropout in an inner epoch. It depends on the rank, since ranks compute different rows."""
    return stable_seed("dropout", config.train.seed, step, epoch, *([rank] if rank else [])) % 2**63


def collect_logprobs(
    policy: Policy, batch: Batch, epoch_logprobs: Sequence[Tensor], ref_logprobs: Tensor | None, entropy: Tensor
) -> StepLogprobs:
    """Collect the rows of all ranks from [N,T] tensors that are zero in rows of other ranks."""
    matrices = [entropy, *epoch_logprobs, *(() if ref_logprobs is None else (ref_logprobs,))]
    values = torch.stack([pack_tokens(matrix, batch) for matrix in matrices]).to(policy.world.device)
    policy.world.all_reduce_(values.view(-1))
    values = values.cpu()
    return StepLogprobs(
        logprobs=values[1 : 1 + len(epoch_logprobs)],
        ref_logprobs=None if ref_logprobs is None else values[-1],
        entropy=values[0],
    )


def rank_rows(policy: Policy, batch: Batch, config: Config) -> range:
    """Return the rows of this rank's groups among the N rows of the batch."""
    size, count = config.rollout.group_size, len(batch.completion_ids)
    groups = policy.world.slice_of(-(-count // size))
    return range(groups.start * size, min(groups.stop * size, count))


def pack_tokens(values: Tensor, batch: Batch) -> Tensor:
    """Return the completion tokens of [N,T] as [M] on the CPU."""
    return values.cpu()[batch.completion_mask]


def zeros_like_batch(policy: Policy, batch: Batch) -> Tensor:
    """Return zeros [N,T] fp32 on the policy's device."""
    return torch.zeros(batch.completion_mask.shape, device=policy.device)


def learning_rate(config: Config, position: int) -> float:
    """Return the learning rate of the optimizer step at a 0-based position: linear warm-up to ``optim.learning_rate``,
    then the schedule; "linear" and "cosine" would reach 0 one step after the last."""
    warmup, total = config.optim.warmup_steps, config.train.steps * config.optim.inner_epochs
    if position < warmup:
        return config.optim.learning_rate * (position + 1) / (warmup + 1)
    return config.optim.learning_rate * LR_SCHEDULES[config.optim.schedule]((position - warmup) / (total - warmup))


def micro_batches(
    batch: Batch, limit: MicroBatchLimit, *, beta: float, rows: Sequence[int] | None = None
) -> tuple[MicroBatch, ...]:
    """Split rows into micro-batches within ``limit``; rows of one prompt stay together, the longest come first.

    Args:
        beta: weight of the KL, which also moves rows without advantage. Silent rows (`grpo.loss.silent_rows`) come
            last, in micro-batches of their own.
        rows: the rows to split; None for all.
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
            if piece and not limit.admits(batch, [*piece, i]):
                cuts.append(MicroBatch(torch.tensor(piece), kind))
                piece = []
            piece.append(i)
        if piece:
            cuts.append(MicroBatch(torch.tensor(piece), kind))
    return tuple(cuts)


def micro_batch_logprobs(
    policy: Policy, batch: Batch, cut: MicroBatch, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, entropies and mask of a micro-batch under the current policy, [n,T] each; T is the
    length of its longest completion."""
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
    return unpack_tokens(logprobs, mask, slots), unpack_tokens(entropy, mask, slots), sent


def reference_logprobs(
    policy: Policy,
    batch: Batch,
    cuts: Sequence[MicroBatch],
    config: Config,
    reference: Mapping[str, Tensor] | None,
) -> Tensor:
    """Return the log-probabilities [N,T] under the reference, without dropout."""
    policy.model.eval()
    with as_reference(policy, reference):
        return batch_logprobs(policy, batch, cuts, config.rollout.temperature)


@torch.no_grad()
def batch_logprobs(policy: Policy, batch: Batch, cuts: Sequence[MicroBatch], temperature: float) -> Tensor:
    """Return the log-probabilities [N,T] under the current policy, on its device; zero in rows without micro-batch."""
    result = zeros_like_batch(policy, batch)
    for cut in cuts:
        logprobs, _, _ = micro_batch_logprobs(policy, batch, cut, temperature)
        result[cut.rows.to(policy.device, non_blocking=True), : logprobs.shape[1]] = logprobs.float()
    return result


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
