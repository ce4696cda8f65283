"""A case → the ids that the policy sees: the chat template's own control tokens, and plain text between them."""

import re
from collections.abc import Sequence
from typing import Any

from grpo.cases import cases_for_step, row_key
from grpo.config import Config
from grpo.runtime.errors import UserError
from grpo.types import Case, Prompt

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Qwen ends a turn with the first and a document with the second. A sampler that knows only one runs to the cap."""
_SYSTEM, _CASE = "\ue000SYSTEM\ue001", "\ue000CASE\ue001"
"""Stand for system prompt and narrative while the chat template is rendered: private-use characters no template
holds."""


def prompts_for_step(
    cases: Sequence[Case], epoch: Sequence[int], tokenizer: Any, config: Config, step: int, resample_round: int = 0
) -> list[Prompt]:
    """Return the prompts of a step (0-based), a pure function of (seed, step). With ``thinking = "mixed"`` every other
    one thinks, the phase changing with the step.

    Args:
        epoch: indices into ``cases``, see `grpo.cases.stream`.
        resample_round: > 0 gives the prompts that replace groups without variance, from a shuffle of their own.
    """
    seed = row_key("refill", config.train.seed, resample_round) if resample_round else config.train.seed
    chosen = cases_for_step(cases, epoch, seed=seed, step=step, count=config.rollout.prompts_per_step)
    thinks = {"on": lambda i: True, "off": lambda i: False, "mixed": lambda i: (i + step) % 2 == 0}
    thinking, system = thinks[config.rollout.thinking], config.cases.system_prompt
    return [render_prompt(tokenizer, case, system_prompt=system, thinking=thinking(i)) for i, case in enumerate(chosen)]


def end_ids(tokenizer: Any, base: Any) -> tuple[int, ...]:
    """Every id that ends a completion: what the generation config and the tokenizer name, and both of Qwen's."""
    named = base.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    ids.discard(None)
    if not ids:
        raise UserError("neither the tokenizer nor the generation config names an end token")
    return tuple(sorted(ids))


def render_prompt(tokenizer: Any, case: Case, *, system_prompt: str, thinking: bool) -> Prompt:
    """The chat up to where the answer begins, as ids. Control tokens come from the template alone: a narrative or a
    system prompt that contains ``<|im_end|>`` or ``<think>`` reaches the model as those characters.

    The narrative is encoded by itself, between the template's two halves; for ordinary text that gives the ids of
    encoding the whole chat at once. So is a system prompt in which, or at whose edges, a control token is spelled.

    Raises:
        UserError: a chat template that does not show both turns once; a text that cannot be written in plain tokens.
    """
    before, slot, after = _rendered(tokenizer, _SYSTEM, thinking).partition(_CASE)
    opening, _, between = before.partition(_SYSTEM)
    inline, _, again = _rendered(tokenizer, system_prompt, thinking).partition(_CASE)
    if (
        not slot
        or _SYSTEM not in before
        or any(slot in part for slot in (_CASE, _SYSTEM) for part in (between, after, again))
    ):
        raise UserError("the chat template does not show the system's and the user's turn exactly once, in this order")
    opened = after.rstrip().endswith("<think>")
    head = encode(tokenizer, inline)
    control, around = control_ids(tokenizer), (encode(tokenizer, opening), encode(tokenizer, between))
    if [i for i in head if i in control] != [i for part in around for i in part if i in control]:
        whole = inline.startswith(opening) and inline.endswith(between)  # as the template wrote it, trimmed or not
        said = inline[len(opening) : len(inline) - len(between)] if whole else system_prompt
        head = [*around[0], *encode_plain(tokenizer, said), *around[1]]
    ids = (*head, *encode_plain(tokenizer, case.text), *encode(tokenizer, after))
    return Prompt(case, ids, opened)


def _rendered(tokenizer: Any, system_prompt: str, thinking: bool) -> str:
    """The chat as text, `_CASE` in the narrative's place."""
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": system_prompt}, {"role": "user", "content": _CASE}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return str(chat)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that no plain text may give: every token that was added to the vocabulary, but for the one that stands for
    what the vocabulary cannot spell."""
    return frozenset(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in which nothing is a control token: a control token's spelling is cut after its first character
    and encoded in pieces. Where that is not enough (a normaliser may spell a control token that the text does not),
    every character is encoded by itself.

    Raises:
        UserError: a character that is a control token of its own, or half a surrogate pair.
    """
    control = control_ids(tokenizer)
    for cut in (_whole, _within_spellings, _characters):
        ids = [i for piece in cut(tokenizer, text) for i in encode(tokenizer, piece)]
        if control.isdisjoint(ids):
            return ids
    raise UserError("a text holds a character that is a control token of this tokenizer: it has no plain spelling")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as the tokenizer gives them, control tokens included."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        raise UserError("a text holds half a surrogate pair, which no tokenizer can write") from None


def _whole(tokenizer: Any, text: str) -> list[str]:
    return [text]


def _within_spellings(tokenizer: Any, text: str) -> list[str]:
    control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in control)
    cuts = [match.start() + 1 for match in re.finditer(f"(?=({pattern}))", text)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _characters(tokenizer: Any, text: str) -> list[str]:
    return list(text)
