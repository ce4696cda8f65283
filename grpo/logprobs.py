"""From hidden states to log-probabilities: the one shift and the one temperature of the project.

Everything after this file speaks of completion token t in column t of an [N,T] tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Prompts and completions as one right-padded batch; every mask is built from lengths, never from ids.

    input_ids [n,S] long and attention_mask [n,S] bool go into the model. predicts [n,T] long is the index in
    0 .. S-1 of the position whose hidden state predicts completion token t: P_i - 1 + t, and 0 at padding.
    completion_ids [n,T] long and completion_mask [n,T] bool are the sampled tokens, end token included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor
    completion_ids: Tensor
    completion_mask: Tensor


def join(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_id: int) -> Joined:
    """The batch of n sequences prompt_i + completion_i, and where each completion token is predicted.

    Args:
        prompt_ids: n lists of token ids, P_i >= 1 each.
        completion_ids: n lists of token ids, L_i >= 1 each; S = max(P_i + L_i), T = max(L_i).
        pad_id: fills up on the right; it may also be a real token, for no mask looks at ids.

    Raises:
        ValueError: no rows, a different number of prompts and completions, or an empty one.

    >>> joined = join([[7, 8], [9]], [[1], [2, 3]], pad_id=0)
    >>> joined.input_ids.tolist(), joined.predicts.tolist()
    ([[7, 8, 1], [9, 2, 3]], [[1, 0], [0, 1]])
    >>> joined.completion_mask.tolist()
    [[True, False], [True, True]]
    """
    if len(prompt_ids) != len(completion_ids) or not prompt_ids:
        raise ValueError(
            f"expected as many completions as prompts and at least one, "
            f"got {len(prompt_ids)} prompts and {len(completion_ids)} completions"
        )
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not len(prompt) or not len(completion):
            raise ValueError(
                f"row {row}: expected at least one token in prompt and completion, "
                f"got {len(prompt)} and {len(completion)}"
            )
    pairs = zip(prompt_ids, completion_ids, strict=True)
    input_ids, attention_mask = _pad([[*prompt, *completion] for prompt, completion in pairs], pad_id)
    padded_ids, completion_mask = _pad(completion_ids, pad_id)
    starts = torch.tensor([len(prompt) for prompt in prompt_ids])[:, None]
    predicts = starts - 1 + torch.arange(padded_ids.shape[1])
    predicts = torch.where(completion_mask, predicts, 0)
    return Joined(input_ids, attention_mask, predicts, padded_ids, completion_mask)


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    padded = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long)
    return padded, torch.arange(width) < lengths[:, None]


def predicting_states(hidden: Tensor, joined: Joined) -> Tensor:
    """The hidden states that predict the completion tokens, [M,H], row by row and without padding.

    Args:
        hidden: [n,S,H], the model's last hidden states for `joined.input_ids`.
        joined: may stay on the CPU; M = number of completion tokens, in the order of
            `joined.completion_ids[joined.completion_mask]`.

    >>> hidden = torch.tensor([[[10.0], [11.0], [12.0]], [[20.0], [21.0], [22.0]]])
    >>> predicting_states(hidden, join([[7, 8], [9]], [[1], [2, 3]], pad_id=0)).flatten()
    tensor([11., 20., 21.])
    """
    rows = joined.completion_mask.nonzero()[:, 0]
    return hidden[rows, joined.predicts[joined.completion_mask]]


def token_slots(completion_mask: Tensor, device: torch.device) -> Tensor:
    """Return the flat indices [M] of the True entries of a mask [n,T], on ``device``. They are computed where the mask
    is: a mask on the CPU is read without a wait for the device.

    >>> token_slots(torch.tensor([[True, False], [True, True]]), torch.device("cpu"))
    tensor([0, 2, 3])
    """
    return completion_mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)


def unpack_tokens(values: Tensor, completion_mask: Tensor, slots: Tensor | None = None) -> Tensor:
    """Return packed values [M] as [n,T], zero at padding. Differentiable, and neither direction synchronizes with the
    device (the derivative of `masked_scatter` does: a `masked_select`, whose size the host has to read).

    Args:
        slots: `token_slots` of the mask, where the caller has them already.

    >>> unpack_tokens(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, False], [True, True]]))
    tensor([[1., 0.],
            [2., 3.]])
    """
    slots = token_slots(completion_mask, values.device) if slots is None else slots
    if values.shape != slots.shape:
        raise ValueError(f"expected one value per True in the mask, {list(slots.shape)}, got {list(values.shape)}")
    return values.new_zeros(completion_mask.numel()).index_copy_(0, slots, values).view(completion_mask.shape)


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """h·Wᵀ, [n,V] in float32 (float64 for float64): hidden [n,H] and head_weight [V,H] of one dtype.

    On CUDA the products of a half-precision head leave their float32 sums as they are. Rounded to bfloat16 first, as
    torch's own product does and on a CPU must, a logit of 20 would be off by up to 0.06 nats.

    >>> head_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    if hidden.is_cuda and head_weight.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, head_weight.T, out_dtype=torch.float32)
    return (hidden @ head_weight.T).to(torch.promote_types(head_weight.dtype, torch.float32))


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax((h·Wᵀ + b)/T)[target] and its entropy, a chunk of tokens at a time.

    With p = softmax(z), z = (h·Wᵀ + b)/T: ∂ log p[y]/∂z = onehot(y) - p and ∂z/∂h = W/T, so

        J = ∂ log p[y]/∂h = ((onehot(y) - p)/T)·W,      [H] per token.

    J needs the p that the forward pass has in hand, and is as small as the hidden state. So forward computes
    J chunk by chunk and drops the logits; backward is grad·J, whatever the loss made of the logprobs. That is
    two products with W in all; recomputing the logits in backward would make it three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float,
        chunk_tokens: int,
        with_jacobian: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(head_weight.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        jacobian = torch.empty_like(hidden, dtype=head_weight.dtype) if with_jacobian else None
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = head_logits(hidden[chunk].to(head_weight.dtype), head_weight)
            if bias is not None:
                logits += bias
            logits /= temperature
            logits -= logits.logsumexp(dim=1, keepdim=True)
            log_p, p = logits, logits.exp()
            target = targets[chunk, None]
            logprobs[chunk] = log_p.gather(1, target).squeeze(1)
            entropy[chunk] = -torch.linalg.vecdot(p, log_p)
            if jacobian is not None:
                slope = p.neg_().scatter_add_(1, target, torch.ones_like(target, dtype=wide))
                jacobian[chunk] = slope.div_(temperature).to(head_weight.dtype) @ head_weight
                del slope
            del logits, log_p, p  # else they live on beside the next chunk's
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _entropy_grad: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return grad[:, None] * jacobian, None, None, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int = 1024,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax((h·Wᵀ + bias)/temperature)[target] and the entropy of that distribution, [M] nats each.

    Args:
        hidden: [M,H], one state per token to be scored; the only input that gets a gradient.
        head_weight: [V,H], frozen. The products run in its dtype, everything after them in float32 (float64
            for a float64 head).
        targets: [M] long, the sampled token ids.
        temperature: > 0, the one the tokens were sampled with. No other place divides by it.
        chunk_tokens: >= 1, tokens whose [chunk_tokens,V] logits are alive at a time; bounds the memory.
        bias: [V] or None, frozen.

    The log-probabilities are differentiable once, in any function of them; the entropy is detached. While
    gradients are on, [M,H] numbers in the head's dtype are kept for the backward pass (for a bfloat16 head
    they come out of a bfloat16 product, so float32 would keep no more digits). M = 0 gives two empty tensors.

    Raises:
        ValueError: temperature not > 0, chunk_tokens < 1, shapes that disagree, or a head that asks for a
            gradient: backward would silently give it none.

    >>> head = torch.tensor([[0.0], [math.log(3.0)]])
    >>> logprobs, entropy = token_logprobs(torch.ones(1, 1), head, torch.tensor([1]), temperature=1.0)
    >>> round(logprobs.exp().item(), 4), round(entropy.item(), 4)
    (0.75, 0.5623)
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"expected a finite temperature > 0, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"expected chunk_tokens >= 1, got {chunk_tokens}")
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"expected hidden [M,H] and head_weight [V,H], got {list(hidden.shape)} and {list(head_weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.long:
        raise ValueError(f"targets: expected int64 [{len(hidden)}], got {targets.dtype} {list(targets.shape)}")
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias: expected [{len(head_weight)}], got {list(bias.shape)}")
    if head_weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("expected a frozen head, got requires_grad; call requires_grad_(False) on it")
    with_jacobian = torch.is_grad_enabled() and hidden.requires_grad
    scored = _ChunkedLogprobs.apply(hidden, head_weight, targets, bias, temperature, chunk_tokens, with_jacobian)
    return cast("tuple[Tensor, Tensor]", scored)


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits/temperature) over the last axis, in float32: the law that a sampler draws from.

    Args:
        logits: [...,V] of any dtype.
        temperature: > 0.

    >>> log_distribution(torch.tensor([0.0, math.log(9.0)]), temperature=2.0).exp()
    tensor([0.2500, 0.7500])
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"expected a finite temperature > 0, got {temperature}")
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
