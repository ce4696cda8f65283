"""The frozen values that cross borders, and the dimension key.

Dimensions: B prompts a step · G completions a prompt (one group) · N = B·G rows · T completion tokens of the
widest row · E inner epochs · M = ΣL completion tokens of a step, packed row after row.
Column t of every [N,T] tensor speaks of completion token t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewards import Score

if TYPE_CHECKING:  # cases and configs are looked at without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One patient's presentation, as the policy will read it.

    Example: ``Case(id="train-000017", text="A 34-year-old male ...", esi=2, tags=("severe_pain",))``
    """

    id: str
    text: str
    """The narrative and nothing else: it becomes the user turn. May be a patient's data."""
    esi: int
    """Gold ESI level, 1 (most acute) to 5."""
    tags: tuple[str, ...] = ()
    """Names of subsets that an evaluation reports on its own."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A case as the policy sees it: token ids of the rendered chat, up to where the answer begins."""

    case: Case
    ids: tuple[int, ...]
    thinking: bool
    """True if the prompt ends inside an opened ``<think>``."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled, as it was sampled: these ids are scored and trained, never text encoded again."""

    ids: tuple[int, ...]
    """Length L ≥ 1; the end token, if one was drawn, is the last."""
    sampler_logprobs: tuple[float, ...]
    """(L), nats, of the distribution each id was drawn from (temperature included)."""
    finished: bool
    """The last id is an end token. False: the token budget cut it."""
    text: str
    """The ids decoded, end token left out."""


@dataclass(frozen=True, slots=True)
class Group:
    """G completions of one prompt: the unit within which advantages are normalised."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """All rows of one step. Advantages and token weights are fixed here, before any micro-batch is cut.

    Example: 2 prompts of 4 completions, the longest 31 tokens: N = 8, T = 31.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    """N rows, ragged."""
    completion_ids: tuple[tuple[int, ...], ...]
    """N rows, ragged."""
    completion_mask: Tensor
    """[N,T] bool, built from lengths."""
    sampler_logprobs: Tensor
    """[N,T] fp32 nats; 0 in the padding."""
    in_baseline: Tensor
    """[N] bool; the completions that mean and std of their group are made of."""
    advantages: Tensor
    """[N] fp64."""
    token_weights: Tensor
    """[N,T] fp32; the weight of each token in the loss of the whole step, 0 in the padding."""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """The log-probabilities of one step's completion tokens as the update met them, on the CPU, packed."""

    logprobs: Tensor
    """[E,M] fp32 nats, of the policy at the start of each inner epoch; row 0 is also the old policy's."""
    ref_logprobs: Tensor | None
    """[M] fp32 nats; None with beta = 0, where the reference is never run."""
    entropy: Tensor
    """[M] fp32 nats, of the policy before its first update."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that was sampled and left out because it had no variance. Costs tokens, teaches nothing."""

    case_id: str
    lengths: tuple[int, ...]
    finished: tuple[bool, ...]
    rewards: tuple[float, ...]
    """All equal, or, where truncated completions are out of the baseline, equal among the others."""


@dataclass(frozen=True, slots=True)
class Step:
    """One training step, complete: all that its metrics are computed from, and what the ledger keeps."""

    number: int
    """1 for the first."""
    groups: tuple[Group, ...]
    scores: tuple[tuple[Score, ...], ...]
    """[B][G], beside ``groups``."""
    batch: Batch
    tokens: TokenRecord
    dropped: tuple[Dropped, ...]
    trained_loss: float
    """Of the first inner epoch, as the backward pass had it: in fp32 on the run's own device."""
    grad_norm: float
    """Before clipping; the last inner epoch's."""
    skipped: int
    """Inner epochs whose loss or gradient was not finite: no optimiser step was taken."""
