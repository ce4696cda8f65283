"""The plan: counts against the modules that transformers and PEFT really build, bytes against tensors really held."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config import Config, load_config
from grpo.logprobs import token_logprobs
from grpo.policy.memory_plan import (
    ACTIVATION_BYTES,
    CHUNK_TOKENS,
    MemoryEstimate,
    ModelShape,
    base_parameter_count,
    estimate_memory,
    linear_modules,
    lora_parameter_count,
    make_plan,
    read_shape,
)
from grpo.policy.policy import Policy
from tests.support.saved_tensors import kept_bytes

CONFIGS = Path(__file__).parents[2] / "configs"


def config(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)[0]


def by_part(lines: tuple[MemoryEstimate, ...]) -> dict[str, int]:
    return {line.part: line.bytes for line in lines}


def test_the_counts_are_those_of_the_real_modules(make_policy: Callable[..., Policy], random_base: Path) -> None:
    shape = read_shape(str(random_base))
    assert shape is not None and shape.hidden_size == 128 and shape.full_attention_layers == 1
    policy = make_policy(r=4)
    trained = sum(p.numel() for p in policy.adapter_parameters().values())
    total = sum(p.numel() for p in policy.model.parameters())
    assert base_parameter_count(shape) == total - trained
    targets = policy.model.peft_config["default"].target_modules
    assert lora_parameter_count(shape, sorted(targets), 4) == (trained, len(policy.adapter_parameters()) // 2)
    widths = {
        name.rsplit(".", 1)[-1]: (module.in_features, module.out_features)
        for name, module in policy.model.get_base_model().named_modules()
        if hasattr(module, "in_features") and "layers" in name and "lora" not in name and "base_layer" not in name
    }
    assert {name: sizes[1:] for name, sizes in linear_modules(shape).items()} == widths


def test_qwen35_9b_has_the_published_counts() -> None:
    shape = read_shape("Qwen/Qwen3.5-9B")
    assert shape is not None
    assert round(base_parameter_count(shape) / 1e9, 3) == 8.954
    assert lora_parameter_count(shape, config("v49").lora.target_modules, 32) == (58_195_968, 128)


def test_the_multimodal_layout_is_read_through_its_text_part(tmp_path: Path) -> None:
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": 64,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    }
    text["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    shape = read_shape(str(tmp_path))
    assert shape is not None
    assert (shape.hidden_size, shape.num_hidden_layers, shape.full_attention_layers) == (64, 4, 1)


@pytest.mark.parametrize(
    "content", ['{"model_type": "llama"}', "[]", "not json", '{"model_type": "qwen3_5", "attention_bias": true}']
)
def test_an_unknown_shape_is_none_and_the_plan_goes_on(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert read_shape(str(tmp_path)) is None
    assert read_shape("owner/some-model") is None and read_shape(str(tmp_path / "nowhere")) is None
    plan = make_plan(config("v49"), None, None)
    assert plan.memory == () and plan.trained is None and plan.completions == 2400


def test_the_batch_arithmetic() -> None:
    run = config("v49", "rollout.prompts_per_step=8", "optim.micro_batch_size=24", "optim.inner_epochs=2")
    plan = make_plan(run, ModelShape(), 300)
    assert (plan.rows, plan.micro_batches, plan.inner_epochs) == (64, 3, 2)
    assert plan.max_tokens_per_step == 64 * 1024 and plan.completions == 300 * 64


def cache_bytes(policy: Policy, rows: int, tokens: int) -> tuple[int, int]:
    """(KV, state) bytes of a cache that really holds so many tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=policy.model.get_base_model().config.get_text_config())
    with torch.inference_mode():
        policy.decoder(input_ids=torch.ones(rows, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    sizes = [0, 0]
    for layer in cache.layers:
        held: list[Any] = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        held += [
            t for v in vars(layer).values() if isinstance(v, dict) for t in v.values() if isinstance(t, torch.Tensor)
        ]
        floats = sum(t.numel() * t.element_size() for t in held if t.is_floating_point())
        sizes[0 if getattr(layer, "keys", None) is not None else 1] += floats
    return sizes[0], sizes[1]


def test_cache_bytes_are_what_a_cache_holds(make_policy: Callable[..., Policy], random_base: Path) -> None:
    policy, shape = make_policy(), read_shape(str(random_base))
    assert shape is not None
    run = config("tiny", "rollout.prompts_per_step=1", "rollout.group_size=3", "optim.micro_batch_size=3",
                 "rollout.max_new_tokens=40", "evaluate.batch_size=1", "evaluate.max_new_tokens=1")  # fmt: skip
    lines = by_part(estimate_memory(run, shape, 24))
    assert (lines["KV cache"], lines["DeltaNet state"]) == cache_bytes(policy, 3, 64)


def test_the_cache_is_planned_for_whichever_needs_more_training_or_evaluation() -> None:
    few = by_part(estimate_memory(config("v49", "evaluate.batch_size=1"), ModelShape(), 200))
    many = by_part(estimate_memory(config("v49", "evaluate.batch_size=80"), ModelShape(), 200))
    assert few["KV cache"] == 8 * 1224 * 32 * 1024 and many["KV cache"] == 10 * few["KV cache"]


def test_activation_bytes_are_near_what_backward_keeps(make_policy: Callable[..., Policy], random_base: Path) -> None:
    policy, shape = make_policy(), read_shape(str(random_base))
    assert shape is not None
    width = shape.hidden_size + shape.intermediate_size
    measured = kept_bytes(policy, (1,) * 128, (2,) * 128) / (256 * shape.num_hidden_layers * width)
    assert pytest.approx(measured, rel=0.25) == ACTIVATION_BYTES["cpu"]


def test_memory_of_v49_by_hand() -> None:
    lines = by_part(estimate_memory(config("v49"), ModelShape(), 200))
    assert lines == {
        "base weights": 2 * 8_953_803_264,
        "adapter": 16 * 58_195_968,
        "KV cache": 36 * 1224 * 32 * 1024,
        "DeltaNet state": 36 * 24 * (32 * 128 * 128 * 4 + 8192 * 4 * 2),
        "sampler": 36 * 248_320 * 22,
        "activations": 8 * 1224 * 32 * 12 * (4096 + 12288),
        "logits": 1024 * 248_320 * 10,
    }


def test_what_each_choice_does_to_the_estimate() -> None:
    base = config("v49")
    plan = by_part(estimate_memory(base, ModelShape(), 200))
    saving = by_part(estimate_memory(config("v49", "model.gradient_checkpointing=true"), ModelShape(), 200))
    assert saving["activations"] == 8 * 1224 * (32 * 4096 * 2 + 12 * 16384)
    two, rows = (by_part(estimate_memory(config("v49", o), ModelShape(), 200)) for o in
                 ("optim.micro_batch_tokens=3000", "optim.micro_batch_tokens=100"))  # fmt: skip
    assert two["activations"] == plan["activations"] / 4 and rows["activations"] == plan["activations"] / 8
    assert {k: v for k, v in saving.items() if k != "activations"} == {
        k: v for k, v in plan.items() if k != "activations"
    }
    full = by_part(estimate_memory(config("v49", "model.dtype=float32"), ModelShape(), 200))
    assert full["base weights"] == 2 * plan["base weights"] and full["adapter"] == plan["adapter"]
    on_cpu = by_part(estimate_memory(config("v49", "model.device=cpu"), ModelShape(), 200))
    assert on_cpu["activations"] > full["activations"]
    assert on_cpu | {"activations": full["activations"]} == full
    warm = by_part(estimate_memory(config("v49", "loss.reference=warm_start"), ModelShape(), 200))
    assert warm["adapter"] == 20 * 58_195_968
    whole = make_plan(base, ModelShape(), None)
    shared = plan["base weights"] + plan["adapter"]
    assert (
        whole.peak("update") > shared
        and whole.peak("rollout") + whole.peak("update") == sum(by_part(whole.memory).values()) + shared
    )


def test_the_chunk_is_the_one_that_the_update_uses() -> None:
    assert inspect.signature(token_logprobs).parameters["chunk_tokens"].default == CHUNK_TOKENS
