"""Frozen values passed between modules, and the key to their dimensions.

Dimensions: B prompts per step · G completions per prompt (one group) · N = B·G rows · T completion tokens of the
longest row · E inner epochs · M = ΣL completion tokens of a step, packed row after row.
Column t of every [N,T] tensor describes completion token t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewards import Score

if TYPE_CHECKING:  # cases and configs can be read without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One patient's presentation.

    Example: ``Case(id="train-000017", text="A 34-year-old male ...", esi=2, tags=("severe_pain",))``
    """

    id: str
    text: str
    """The narrative alone; it becomes the user turn. May be patient data."""
    gold_level: int
    """Gold ESI level, 1 (most acute) to 5."""
    tags: tuple[str, ...] = ()
    """Subsets that an evaluation reports separately."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A case as token ids: the rendered chat up to where the answer begins."""

    case: Case
    ids: tuple[int, ...]
    thinking: bool
    """Whether the prompt ends inside an open ``<think>``."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. Training uses these very ids; the text is never encoded again."""

    ids: tuple[int, ...]
    """Length L ≥ 1, including the end token if one was drawn."""
    sampler_logprobs: tuple[float, ...]
    """[L] nats: log-probability of each id under the distribution it was drawn from, temperature included."""
    finished: bool
    """Whether the last id is an end token; False if the token budget truncated the completion."""
    text: str
    """The decoded ids without the end token."""


@dataclass(frozen=True, slots=True)
class Group:
    """G completions of one prompt: the unit within which advantages are normalized."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """All rows of one step. Advantages and token weights are fixed here, before the split into micro-batches.

    Example: 2 prompts with 4 completions each, the longest of 31 tokens: N = 8, T = 31.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    """N rows, ragged."""
    completion_ids: tuple[tuple[int, ...], ...]
    """N rows, ragged."""
    completion_mask: Tensor
    """[N,T] bool, True at completion tokens."""
    sampler_logprobs: Tensor
    """[N,T] fp32 nats; 0 at padding."""
    baseline_mask: Tensor
    """[N] bool; whether a completion counts in the mean and std of its group."""
    advantages: Tensor
    """[N] fp64."""
    token_weights: Tensor
    """[N,T] fp32; weight of each token in the loss of the whole step, 0 at padding."""


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """Log-probabilities of one step's completion tokens as the update computed them; packed, on the CPU."""

    logprobs: Tensor
    """[E,M] fp32 nats, under the policy at the start of each inner epoch; row 0 is also the old policy."""
    ref_logprobs: Tensor | None
    """[M] fp32 nats; None if beta = 0, when the reference is not run."""
    entropy: Tensor
    """[M] fp32 nats, under the policy before its first update."""


@dataclass(frozen=True, slots=True)
class ReplacedGroup:
    """A sampled group that was replaced because its rewards did not vary: it cost tokens and gave no gradient."""

    case_id: str
    lengths: tuple[int, ...]
    finished: tuple[bool, ...]
    rewards: tuple[float, ...]
    """All equal, or equal among the finished completions if truncated ones are not in the baseline."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One completed training step: everything its metrics are computed from and the ledger stores."""

    number: int
    """1 for the first step."""
    groups: tuple[Group, ...]
    scores: tuple[tuple[Score, ...], ...]
    """[B][G], in the order of ``groups``."""
    batch: Batch
    logprobs: StepLogprobs
    replaced_groups: tuple[ReplacedGroup, ...]
    backward_loss: float
    """Loss of the first inner epoch as the backward pass computed it, in fp32 on the training device."""
    grad_norm: float
    """Gradient norm of the last inner epoch, before clipping."""
    skipped_updates: int
    """Number of inner epochs without an optimizer step because loss or gradient was not finite."""
