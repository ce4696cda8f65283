"""A Qwen3.5 in miniature: the same layers, chat template, control tokens and end tokens at a hundredth of a percent of
the size, with random weights."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.runtime.terminal import tolerate_narrow_encodings

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<think>", "</think>")
"""Single ids like the special tokens, but kept when decoding: the parser looks for them."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% else -%}
<think>
{% endif -%}
{%- endif -%}
"""


def make_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE with digits apart, Qwen's control tokens and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL) - len(PLAIN_ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """A Qwen3.5 text model of about a million parameters with random weights."""
    from transformers import GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(seed)
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
    model = Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            max_position_embeddings=1024,
            pad_token_id=vocabulary["<|endoftext|>"],
            eos_token_id=ends[0],
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=vocabulary["<|endoftext|>"])
    return model


def make_full_width(layers: int, seed: int) -> Any:
    """Random weights in the exact shape of Qwen3.5-9B, bfloat16, with as many of its 32 layers as asked for."""
    from transformers import GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=layers, dtype="bfloat16"))
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(eos_token_id=[248046, 248044], pad_token_id=248044)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.tiny_world.model --layers 4 --out DIR``: a full-width random model to try the real recipe
    on, with the embedded model's tokenizer. Returns the exit code."""
    tolerate_narrow_encodings()
    from transformers import AutoTokenizer

    from grpo.config import TINY_WORLD_DIR

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_world.model", description=main.__doc__)
    parser.add_argument("--layers", type=int, default=4, choices=range(4, 33, 4))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    model = make_full_width(arguments.layers, seed=0)
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(TINY_WORLD_DIR / "base").save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
