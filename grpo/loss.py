"""The loss: a surrogate and a KL term per token, and a weighted sum over tokens. Tensors and floats only.

The normalizer is an input: `token_weights` fixes the weight of each completion's tokens for the whole optimizer step,
and `grpo_loss` only sums. Any split of the step into micro-batches therefore gives the same gradient. Arithmetic is in
float32, or in float64 if logprobs are float64.
"""

from __future__ import annotations

import math  # noqa: F401 — used in doctests
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SurrogateInputs:
    """Inputs of a surrogate, [N,T] each, zero at padding.

    Only `logprobs` and `log_ratio` carry a gradient. `log_ratio` is logprobs - old_logprobs in nats,
    `advantages` repeats the completion's advantage.
    """

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class ClipRange:
    """Clip range of the ratio: [1 - low, 1 + high]; `dual` > 1 caps the ratio of negative advantages."""

    low: float
    high: float
    dual: float | None


@dataclass(frozen=True, slots=True)
class SurrogateTerms:
    """Outputs of a surrogate, [N,T] each: the objective to maximize, the ratio, and where clipping had an effect."""

    objective: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LossTerms:
    """The loss and its terms; everything except `loss` is detached.

    loss [] is the scalar to call backward on. per_token [N,T] is each token's weighted contribution and sums
    to the loss. ratio [N,T] is the importance ratio the surrogate used (1 at padding). clipped_low and
    clipped_high [N,T] bool mark the tokens whose surrogate gradient clipping set to zero (cispo: whose weight
    was capped). kl [N,T] holds the estimator's values in nats, unweighted, or is None without a reference.
    """

    loss: Tensor
    per_token: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor | None


# --- surrogates -------------------------------------------------------------------------------------------


def _clipped(ratio: Tensor, advantages: Tensor, clip: ClipRange) -> SurrogateTerms:
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    return SurrogateTerms(
        objective=torch.minimum(ratio * advantages, bounded * advantages),
        ratio=ratio,
        clipped_low=(advantages < 0) & (ratio < 1 - clip.low),
        clipped_high=(advantages > 0) & (ratio > 1 + clip.high),
    )


def clip_surrogate(tokens: SurrogateInputs, clip: ClipRange) -> SurrogateTerms:
    """min(ratio·A, clip(ratio, 1 - low, 1 + high)·A) with ratio = exp(log_ratio) (PPO, arXiv 1707.06347).

    The gradient is zero iff A > 0 and ratio > 1 + high (`clipped_high`) or A < 0 and ratio < 1 - low
    (`clipped_low`). high > low is DAPO's clip-higher (arXiv 2503.14476).

    >>> double = torch.full((1, 1), math.log(2.0))
    >>> one = torch.ones(1, 1)
    >>> clip_surrogate(SurrogateInputs(one, double, one, one.bool()), ClipRange(0.2, 0.3, None)).objective
    tensor([[1.3000]])
    """
    return _clipped(tokens.log_ratio.exp(), tokens.advantages, clip)


def dual_clip_surrogate(tokens: SurrogateInputs, clip: ClipRange) -> SurrogateTerms:
    """max(min(ratio·A, clip(ratio)·A), dual·A) where A < 0, else as "clip" (dual-clip PPO, arXiv 1912.09729).

    Bounds the loss of a token with negative advantage that became much likelier. `clipped_high` also marks tokens
    with A < 0 and ratio > dual.

    >>> triple = torch.full((1, 1), math.log(3.0))
    >>> one = torch.ones(1, 1)
    >>> dual_clip_surrogate(SurrogateInputs(one, triple, -one, one.bool()), ClipRange(0.2, 0.2, 2.0)).objective
    tensor([[-2.]])
    """
    assert clip.dual is not None
    single = clip_surrogate(tokens, clip)
    floored = torch.maximum(single.objective, clip.dual * tokens.advantages)
    negative = tokens.advantages < 0
    return SurrogateTerms(
        objective=torch.where(negative, floored, single.objective),
        ratio=single.ratio,
        clipped_low=single.clipped_low,
        clipped_high=single.clipped_high | (negative & (single.ratio > clip.dual)),
    )


def gspo_surrogate(tokens: SurrogateInputs, clip: ClipRange) -> SurrogateTerms:
    """min(s·A, clip(s)·A) with s = exp(mean of log_ratio over the completion) (GSPO, arXiv 2507.18071).

    s is a function of every logprob of the row and is constant over its tokens, so with "sequence" weights
    the row adds min(s·A, clip(s)·A)/N. A completion is clipped as a whole.

    >>> log_ratio = torch.tensor([[0.0, 2 * math.log(2.0)]])
    >>> one = torch.ones(1, 2)
    >>> gspo_surrogate(SurrogateInputs(one, log_ratio, one, one.bool()), ClipRange(0.5, 2.0, None)).objective
    tensor([[2., 2.]])
    """
    lengths = tokens.mask.sum(dim=1, keepdim=True).clamp(min=1)
    mean_log_ratio = tokens.log_ratio.sum(dim=1, keepdim=True) / lengths
    ratio = torch.where(tokens.mask, mean_log_ratio.expand_as(tokens.log_ratio), 0.0).exp()
    return _clipped(ratio, tokens.advantages, clip)


def cispo_surrogate(tokens: SurrogateInputs, clip: ClipRange) -> SurrogateTerms:
    """detach(min(ratio, 1 + high))·A·logprob: the weight is capped, and every token keeps its gradient.

    CISPO, arXiv 2506.13585, without a lower bound: `low` has no effect. `clipped_high` marks the tokens whose
    weight was capped, whatever the sign of A.

    >>> logprobs = torch.tensor([[-2.0]])
    >>> one = torch.ones(1, 1)
    >>> cispo_surrogate(SurrogateInputs(logprobs, one, one, one.bool()), ClipRange(0.0, 0.5, None)).objective
    tensor([[-3.]])
    """
    ratio = tokens.log_ratio.detach().exp()
    return SurrogateTerms(
        objective=ratio.clamp(max=1 + clip.high) * tokens.advantages * tokens.logprobs,
        ratio=ratio,
        clipped_low=torch.zeros_like(tokens.mask),
        clipped_high=ratio > 1 + clip.high,
    )


def unclipped_surrogate(tokens: SurrogateInputs, clip: ClipRange) -> SurrogateTerms:
    """ratio·A, without clipping: importance-weighted REINFORCE.

    >>> double = torch.full((1, 1), math.log(2.0))
    >>> one = torch.ones(1, 1)
    >>> unclipped_surrogate(SurrogateInputs(one, double, one, one.bool()), ClipRange(0.0, 0.0, None)).objective
    tensor([[2.]])
    """
    ratio = tokens.log_ratio.exp()
    nowhere = torch.zeros_like(tokens.mask)
    return SurrogateTerms(ratio * tokens.advantages, ratio, clipped_low=nowhere, clipped_high=nowhere)


SURROGATES: dict[str, Callable[[SurrogateInputs, ClipRange], SurrogateTerms]] = {
    "clip": clip_surrogate,
    "dual_clip": dual_clip_surrogate,
    "gspo": gspo_surrogate,
    "cispo": cispo_surrogate,
    "none": unclipped_surrogate,
}


# --- KL estimators ----------------------------------------------------------------------------------------


def k1(d: Tensor, ratio: Tensor) -> Tensor:
    """-d with d = ref_logprob - logprob. Unbiased in value; as an on-policy loss its expected gradient is 0.

    >>> k1(torch.tensor([-0.5]), torch.ones(1))
    tensor([0.5000])
    """
    return -d


def k2(d: Tensor, ratio: Tensor) -> Tensor:
    """d²/2. Biased in value; as an on-policy loss its gradient is that of KL(policy || reference).

    >>> k2(torch.tensor([-0.5]), torch.ones(1))
    tensor([0.1250])
    """
    return d.square() / 2


def k3(d: Tensor, ratio: Tensor) -> Tensor:
    """exp(d) - d - 1 >= 0. Unbiased in value; its on-policy gradient is that of KL(reference || policy).

    The estimator of GRPO (arXiv 2402.03300). expm1 is accurate for small d.

    >>> k3(torch.tensor([math.log(2.0)]), torch.ones(1))
    tensor([0.3069])
    """
    return torch.expm1(d) - d


def ratio_k3(d: Tensor, ratio: Tensor) -> Tensor:
    """ratio·(exp(d) - d - 1) with the token's own ratio, not detached (arXiv 2512.02556).

    Value and gradient are those of KL(policy || reference), even for samples from the old policy.

    >>> ratio_k3(torch.tensor([math.log(2.0)]), torch.tensor([2.0]))
    tensor([0.6137])
    """
    return ratio * k3(d, ratio)


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "ratio_k3": ratio_k3,
}


# --- token weights ----------------------------------------------------------------------------------------


def sequence_weights(lengths: Tensor, max_new_tokens: int) -> Tensor:
    """1/(N·L_i): the mean over completions of the mean over their tokens (GRPO, arXiv 2402.03300).

    >>> sequence_weights(torch.tensor([1.0, 2.0]), 4)
    tensor([0.5000, 0.2500])
    """
    return 1 / (len(lengths) * lengths)


def token_mean_weights(lengths: Tensor, max_new_tokens: int) -> Tensor:
    """1/ΣL: the mean over all tokens of the step (DAPO, arXiv 2503.14476).

    >>> token_mean_weights(torch.tensor([1.0, 3.0]), 4)
    tensor([0.2500, 0.2500])
    """
    return (1 / lengths.sum()).expand_as(lengths)


def constant_weights(lengths: Tensor, max_new_tokens: int) -> Tensor:
    """1/(N·L_max): a sum over tokens; the normalizer does not depend on length (Dr. GRPO, arXiv 2503.20783).

    >>> constant_weights(torch.tensor([1.0, 3.0]), 4)
    tensor([0.1250, 0.1250])
    """
    return torch.full_like(lengths, 1 / (len(lengths) * max_new_tokens))


TOKEN_WEIGHTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sequence": sequence_weights,
    "token": token_mean_weights,
    "constant": constant_weights,
}


def token_weights(
    lengths: Sequence[int] | Tensor,
    *,
    kind: str,
    max_new_tokens: int,
    include: Sequence[bool] | Tensor | None = None,
) -> Tensor:
    """Return the weight of each completion's tokens in the loss of the whole optimizer step, [N] float32.

    Args:
        lengths: [N] tokens of each completion of the *whole step*, end token included, 1 .. max_new_tokens.
        kind: "sequence" 1/(N·L_i), "token" 1/ΣL, "constant" 1/(N·max_new_tokens).
        max_new_tokens: the budget of one completion, >= 1.
        include: [N] bool; completions marked False get weight 0.

    An excluded completion counts in no denominator either: N and ΣL count the included ones, so the weights are
    those of a step without the others. (TRL's mask_truncated_completions keeps excluded rows in N for its "grpo"
    and "dr_grpo".) If none is included, all weights are 0.

    Raises:
        ValueError: a length outside 1 .. max_new_tokens, or include not [N] bool.

    >>> token_weights([1, 2, 4], kind="sequence", max_new_tokens=4, include=[True, True, False])
    tensor([0.5000, 0.2500, 0.0000])
    """
    sizes = torch.as_tensor(lengths, dtype=torch.float64)
    outside = (sizes < 1) | (sizes > max_new_tokens)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"completion {row}: expected length 1 .. {max_new_tokens}, got {int(sizes[row])}")
    included = torch.ones_like(sizes, dtype=torch.bool) if include is None else torch.as_tensor(include)
    if included.shape != sizes.shape or (included.dtype != torch.bool and included.numel()):
        raise ValueError(f"include: expected bool {list(sizes.shape)}, got {included.dtype} {list(included.shape)}")
    weights = torch.zeros_like(sizes)
    if included.any():
        weights[included] = TOKEN_WEIGHTS[kind](sizes[included], max_new_tokens)
    return weights.to(torch.float32)


def silent_rows(advantages: Tensor, token_weights: Tensor, *, beta: float) -> Tensor:
    """Return [N] bool, True for completions whose gradient is zero under any policy: all their weights are zero, or
    their advantage is zero and there is no KL term.

    Args:
        advantages: [N].
        token_weights: [N,T].
        beta: >= 0, the weight of the KL term.

    >>> silent_rows(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 0.0], [0.5, 0.0]]), beta=0.1).tolist()
    [True, False]
    >>> silent_rows(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.5], [0.5, 0.0]]), beta=0.0).tolist()
    [False, True]
    """
    weightless = (token_weights == 0).all(dim=1)
    return weightless if beta > 0 else weightless | (advantages == 0)


# --- the loss ---------------------------------------------------------------------------------------------


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    token_weights: Tensor,
    *,
    surrogate: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl: str,
    beta: float,
) -> LossTerms:
    """loss = Σ over tokens of weight·(-surrogate + beta·kl): a plain sum, so the losses of micro-batches add up.

    Args:
        logprobs: [N,T] nats, under the policy; the only input that gets a gradient.
        old_logprobs: [N,T] nats, under the policy at the start of the step; on the first pass
            `logprobs.detach()`: the ratio is then exactly 1, and the gradient is not zero.
        ref_logprobs: [N,T] nats, under the reference, or None. With beta = 0 the KL is reported but not trained on.
        advantages: [N], one per completion.
        completion_mask: [N,T] bool, True at completion tokens. Values elsewhere, even NaN and inf, affect neither
            loss nor gradient.
        token_weights: [N,T], `token_weights(...)` of the whole step, constant along each row.
        surrogate, kl: names in SURROGATES and KL_ESTIMATORS.
        clip_low, clip_high: >= 0; the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: > 1 for the surrogate "dual_clip", None for the others.
        beta: >= 0, the weight of the KL term.

    An all-False mask gives a loss of 0 and a zero gradient.

    Raises:
        ValueError: shapes that do not match, mask not bool, or beta > 0 without ref_logprobs.

    >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> terms = grpo_loss(logprobs, logprobs.detach(), None, torch.tensor([3.0]),
    ...     torch.tensor([[True, False]]), torch.tensor([[1.0, 1.0]]),
    ...     surrogate="clip", clip_low=0.2, clip_high=0.2, dual_clip=None, kl="k3", beta=0.0)
    >>> terms.loss.backward()
    >>> terms.loss.item(), logprobs.grad
    (-3.0, tensor([[-3.,  0.]]))
    """
    mask = completion_mask
    _check_shapes(
        mask,
        advantages,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        token_weights=token_weights,
    )
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"beta = {beta} needs ref_logprobs, got None; pass them or set beta = 0")
    compute_dtype = torch.promote_types(logprobs.dtype, torch.float32)
    current = _masked(logprobs, mask, compute_dtype)
    log_ratio = current - _masked(old_logprobs.detach(), mask, compute_dtype)
    token_advantages = _masked(advantages.detach()[:, None].expand_as(mask), mask, compute_dtype)
    tokens = SurrogateInputs(current, log_ratio, token_advantages, mask)
    result = SURROGATES[surrogate](tokens, ClipRange(clip_low, clip_high, dual_clip))
    kl_terms = None
    if ref_logprobs is not None:
        d = _masked(ref_logprobs.detach(), mask, compute_dtype) - current
        kl_terms = KL_ESTIMATORS[kl](d, log_ratio.exp())
    objective = result.objective if kl_terms is None or beta == 0 else result.objective - beta * kl_terms
    per_token = -_masked(token_weights.detach(), mask, compute_dtype) * objective
    return LossTerms(
        loss=per_token.sum(),
        per_token=per_token.detach(),
        ratio=result.ratio.detach(),
        clipped_low=result.clipped_low,
        clipped_high=result.clipped_high,
        kl=None if kl_terms is None else kl_terms.detach(),
    )


def _masked(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values where the mask is True and 0 elsewhere; multiplying by the mask would keep NaN."""
    return torch.where(mask, values.to(dtype), 0.0)


def _check_shapes(mask: Tensor, advantages: Tensor, **tensors: Tensor | None) -> None:
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"completion_mask: expected bool [N,T], got {mask.dtype} {list(mask.shape)}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(f"{name}: expected the mask's shape {list(mask.shape)}, got {list(tensor.shape)}")
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages: expected shape [{len(mask)}], got {list(advantages.shape)}")
