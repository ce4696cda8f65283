"""Build a base with random weights in the shape of a real model, to measure what a step costs without its files.

Such a model generates noise. So that rewards still differ, its tokenizer ends each decoded text with an answer whose
level is a checksum of the ids.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from grpo.config import TINY_WORLD_DIR
from grpo.policy.memory_plan import RANDOM_SHAPES, ModelShape

SEED = 0


class AnsweringTokenizer(PreTrainedTokenizerFast):
    """The embedded tokenizer, with an answer after each text. Ids above its vocabulary decode to nothing."""

    def decode(self, token_ids: Any, *arguments: Any, **options: Any) -> Any:
        """Return the decoded text, followed by ``ANSWER: ESI n`` with n = 1 + Σ ids mod 5; a list for lists of ids."""
        if len(token_ids) and isinstance(token_ids[0], list | tuple):
            return [self.decode(ids, *arguments, **options) for ids in token_ids]
        text = super().decode(token_ids, *arguments, **options)
        return f"{text}</think>\nANSWER: ESI {level_from_ids(token_ids)}"


def level_from_ids(ids: Sequence[int]) -> int:
    """Return a level from 1 to 5.

    >>> level_from_ids([3, 4]), level_from_ids([])
    (3, 1)
    """
    return 1 + sum(ids) % 5


def build_random_model(name: str, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the model ``random:NAME`` and its tokenizer. The weights are always the same on one type of device."""
    tokenizer = load_random_tokenizer()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(SEED)
        with torch.device(device):
            model = Qwen3_5ForCausalLM(qwen3_5_config(RANDOM_SHAPES[name]))
    finally:
        torch.set_default_dtype(before)
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def load_random_tokenizer() -> Any:
    """Return the tokenizer of all random models."""
    return AnsweringTokenizer.from_pretrained(TINY_WORLD_DIR / "base", local_files_only=True)


def qwen3_5_config(shape: ModelShape) -> Qwen3_5TextConfig:
    """Return the configuration for a shape; every k-th layer is full attention, including the last."""
    every = shape.num_hidden_layers // shape.full_attention_layers
    kinds = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(shape.num_hidden_layers)]
    sizes = {name: size for name, size in asdict(shape).items() if name != "full_attention_layers"}
    return Qwen3_5TextConfig(layer_types=kinds, **sizes)
