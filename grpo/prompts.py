"""Turn cases into prompts: the control tokens of the chat template, with plain text between them."""

import re
from collections.abc import Sequence
from typing import Any

from grpo.cases import cases_for_step, stable_seed
from grpo.config import Config
from grpo.runtime.errors import UserError
from grpo.types import Case, Prompt

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Qwen ends a turn with the first and a document with the second; a sampler must stop at either."""
_SYSTEM, _CASE = "\ue000SYSTEM\ue001", "\ue000CASE\ue001"
"""Placeholders for system prompt and narrative while the chat template is rendered; private-use characters."""


def prompts_for_step(
    cases: Sequence[Case], epoch: Sequence[int], tokenizer: Any, config: Config, step: int, resample_round: int = 0
) -> list[Prompt]:
    """Return the prompts of a step (0-based), a pure function of (seed, step). With ``thinking = "mixed"`` every other
    prompt opens thinking, starting with the first in even steps and the second in odd ones.

    Args:
        epoch: indices into ``cases``, see `grpo.cases.oversampled_indices`.
        resample_round: > 0 for the prompts that replace groups without variance; they have a shuffle of their own.
    """
    seed = stable_seed("refill", config.train.seed, resample_round) if resample_round else config.train.seed
    chosen = cases_for_step(cases, epoch, seed=seed, step=step, count=config.rollout.prompts_per_step)
    thinking_of = {"on": lambda i: True, "off": lambda i: False, "mixed": lambda i: (i + step) % 2 == 0}
    thinking, system = thinking_of[config.rollout.thinking], config.cases.system_prompt
    return [render_prompt(tokenizer, case, system_prompt=system, thinking=thinking(i)) for i, case in enumerate(chosen)]


def end_token_ids(tokenizer: Any, base: Any) -> tuple[int, ...]:
    """Return every id that ends a completion: those of the generation config and the tokenizer, and both of Qwen's."""
    eos = base.generation_config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    ids.discard(None)
    if not ids:
        raise UserError("neither the tokenizer nor the generation config defines an end token")
    return tuple(sorted(ids))


def render_prompt(tokenizer: Any, case: Case, *, system_prompt: str, thinking: bool) -> Prompt:
    """Return the chat as ids, up to where the answer begins. All control tokens come from the template: ``<|im_end|>``
    or ``<think>`` in a narrative or a system prompt reaches the model as ordinary characters.

    The narrative is encoded separately, between the two halves of the template; for ordinary text this gives the
    same ids as encoding the whole chat at once. So is a system prompt that would give control tokens.

    Raises:
        UserError: the chat template does not contain each turn once, or a text has no encoding in plain tokens.
    """
    head_template, placeholder, after = _rendered(tokenizer, _SYSTEM, thinking).partition(_CASE)
    before_system, _, after_system = head_template.partition(_SYSTEM)
    inline, _, rest = _rendered(tokenizer, system_prompt, thinking).partition(_CASE)
    if (
        not placeholder
        or _SYSTEM not in head_template
        or any(placeholder in part for placeholder in (_CASE, _SYSTEM) for part in (after_system, after, rest))
    ):
        raise UserError("the chat template must contain the system turn and then the user turn, each exactly once")
    opens_thinking = after.rstrip().endswith("<think>")
    head = encode(tokenizer, inline)
    control, edges = control_token_ids(tokenizer), (encode(tokenizer, before_system), encode(tokenizer, after_system))
    if [i for i in head if i in control] != [i for part in edges for i in part if i in control]:
        intact = inline.startswith(before_system) and inline.endswith(after_system)  # the template may have trimmed it
        system_text = inline[len(before_system) : len(inline) - len(after_system)] if intact else system_prompt
        head = [*edges[0], *encode_as_plain_text(tokenizer, system_text), *edges[1]]
    ids = (*head, *encode_as_plain_text(tokenizer, case.text), *encode(tokenizer, after))
    return Prompt(case, ids, opens_thinking)


def _rendered(tokenizer: Any, system_prompt: str, thinking: bool) -> str:
    """Return the chat as text, with `_CASE` in place of the narrative."""
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": system_prompt}, {"role": "user", "content": _CASE}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return str(chat)


def control_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that plain text must not contain: all tokens added to the vocabulary, except the unknown token."""
    return frozenset(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}


def encode_as_plain_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without any control token. A text that contains the spelling of one is split after its
    first character and encoded in pieces; if that is not enough (a normalizer may produce the spelling), each character
    is encoded separately.

    Raises:
        UserError: a single character is a control token, or the text contains a lone surrogate.
    """
    control = control_token_ids(tokenizer)
    for cut in (_unsplit, _split_control_spellings, _split_characters):
        ids = [i for piece in cut(tokenizer, text) for i in encode(tokenizer, piece)]
        if control.isdisjoint(ids):
            return ids
    raise UserError("text contains a character that is a control token of this tokenizer and cannot be encoded")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, including control tokens."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        raise UserError("text contains a lone surrogate and cannot be encoded") from None


def _unsplit(tokenizer: Any, text: str) -> list[str]:
    return [text]


def _split_control_spellings(tokenizer: Any, text: str) -> list[str]:
    control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in control)
    cuts = [match.start() + 1 for match in re.finditer(f"(?=({pattern}))", text)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _split_characters(tokenizer: Any, text: str) -> list[str]:
    return list(text)
