"""The frozen values that cross borders, and the dimension key.

Dimensions: B prompts a step · G completions a prompt (one group) · N = B·G rows · T completion tokens of the
widest row. Column t of every [N,T] tensor speaks of completion token t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    advantages: Tensor
    """[N] fp32."""
    token_weights: Tensor
    """[N,T] fp32; the weight of each token in the loss of the whole step, 0 in the padding."""
