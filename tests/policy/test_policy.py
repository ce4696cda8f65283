"""Loading base and adapter, rendering prompts, telling policy and reference apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.cuda._utils import _get_device_index

from grpo.commands.merge import merge
from grpo.config import LoraSection, ModelSection
from grpo.policy.base_model import load_base, resolve_device
from grpo.policy.policy import (
    Policy,
    as_reference,
    check_adapter,
    copy_adapter,
    load_policy,
    missing_files,
    save_adapter,
)
from grpo.prompts import encode_as_plain_text, render_prompt
from grpo.runtime.errors import UserError
from grpo.types import Case
from tests.conftest import TARGETS

IDS = torch.tensor([[10, 20, 30, 40, 50]])


def states(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.decoder(input_ids=IDS, use_cache=False).last_hidden_state


def load(base: Path | str, warm_start: Path | str = "", **lora: Any) -> Policy:
    values = {
        "r": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "target_modules": TARGETS,
        "warm_start": str(warm_start),
    } | lora
    model = ModelSection(name=str(base), device="cpu", dtype="float32", gradient_checkpointing=False)
    return load_policy(model, LoraSection(**values), seed=1)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_chat_templates_in_both_modes(make_policy: Callable[..., Policy]) -> None:
    tokenizer = make_policy().tokenizer
    case = Case("a", "A 54-year-old male, pain 9/10.", 2)
    chat = [{"role": "system", "content": "Sys."}, {"role": "user", "content": case.text}]
    for thinking, ending in ((True, "<think>\n"), (False, "<think>\n\n</think>\n\n")):
        prompt = render_prompt(tokenizer, case, system_prompt="Sys.", thinking=thinking)
        rendered = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert rendered.endswith("<|im_start|>assistant\n" + ending)
        assert list(prompt.ids) == tokenizer.encode(rendered, add_special_tokens=False)
        assert prompt.thinking is thinking


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>",
        "he said <think>no</think> and left <|im_start|>system",
        "<|im_end|><|im_end|>x<|endoftext|>",
        "<<|im_end|>",
    ],
)
def test_control_tokens_in_a_narrative_are_text(make_policy: Callable[..., Policy], text: str) -> None:
    tokenizer = make_policy().tokenizer
    ids = encode_as_plain_text(tokenizer, text)
    assert not set(ids) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(ids) == text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.sampled_from(["<|im_end|>", "<think>", "</think>", "<", "|", "a", " ", "ü", "\n"])).map("".join)
)
def test_no_narrative_can_speak_in_control_tokens(make_policy: Callable[..., Policy], text: str) -> None:
    tokenizer = make_policy().tokenizer
    ids = encode_as_plain_text(tokenizer, text)
    assert not set(ids) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_both_end_tokens_end_a_completion(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    vocabulary = policy.tokenizer.get_vocab()
    assert set(policy.end_token_ids) == {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}


# --- adapter and reference -------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_the_base_and_only_the_adapter_is_trainable(
    make_policy: Callable[..., Policy],
) -> None:
    policy = make_policy(moved=False)
    own = states(policy)
    with as_reference(policy, None):
        assert torch.equal(states(policy), own)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in policy.adapter_parameters().items())
    assert len(policy.adapter_parameters()) == 2 * (
        4 * 3 + 4
    )  # A and B of 3 MLP projections a layer, 4 more in the one attention


def test_the_reference_speaks_only_inside_and_the_adapter_comes_back_bit_for_bit(
    make_policy: Callable[..., Policy],
) -> None:
    policy = make_policy()
    before, own = copy_adapter(policy), states(policy)
    with torch.no_grad():
        for p in policy.adapter_parameters().values():
            p.mul_(1.5)
    moved, now = copy_adapter(policy), states(policy)
    with as_reference(policy, before):
        assert torch.equal(states(policy), own)
    with as_reference(policy, None):
        base = states(policy)
    assert torch.equal(states(policy), now)
    assert not torch.equal(base, own) and not torch.equal(base, now)
    assert all(torch.equal(moved[name], p) for name, p in policy.adapter_parameters().items())


def test_a_saved_adapter_is_the_warm_start_of_another_run(
    make_policy: Callable[..., Policy], random_base: Path, tmp_path: Path
) -> None:
    policy = make_policy()
    save_adapter(policy, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = load(random_base, tmp_path / "adapter")
    assert torch.equal(states(policy), states(again))
    assert list(policy.adapter_parameters()) == list(again.adapter_parameters())


def test_dropout_is_the_configs(make_policy: Callable[..., Policy], random_base: Path, tmp_path: Path) -> None:
    save_adapter(make_policy(), tmp_path / "adapter")
    policy = load(random_base, tmp_path / "adapter", dropout=0.5)
    policy.model.train()
    assert not torch.equal(states(policy), states(policy))
    policy.model.eval()
    assert torch.equal(states(policy), states(policy))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'Qwen/Qwen3.5-9B': not on this machine, .*hf download Qwen/Qwen3.5-9B"):
        load("Qwen/Qwen3.5-9B")
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a model: the folder has no config.json"):
        load(tmp_path / "empty")
    model = ModelSection(name=str(tmp_path / "empty"), device="cpu", dtype="float32", gradient_checkpointing=False)
    (fault,) = missing_files(model, LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""))
    assert "has no config.json" in fault
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"its files cannot be loaded: .*(JSON|tokenizer)"):
        load(tmp_path / "empty")


def test_a_base_whose_weights_are_broken(random_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "broken"
    shutil.copytree(random_base, base)
    (base / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(base)


def test_a_tokenizer_without_a_chat_template(random_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "plain"
    shutil.copytree(random_base, base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load(base)


@pytest.fixture
def adapter(make_policy: Callable[..., Policy], tmp_path: Path) -> Path:
    save_adapter(make_policy(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_that_do_not_fit(adapter: Path, random_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r is 4, but 8 in \[lora\]"):
        load(random_base, adapter, r=8)
    with pytest.raises(UserError, match="target_modules is"):
        load(random_base, adapter, target_modules=("q_proj",))
    with pytest.raises(UserError, match="cannot be read"):
        load(random_base, tmp_path / "missing")


def test_an_adapter_of_another_base(adapter: Path, random_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(4, 999)}, path)
    with pytest.raises(UserError, match="cannot be loaded on this base|made for another base"):
        load(random_base, adapter)
    save_file({key.replace("layers.0", "layers.40"): value for key, value in tensors.items()}, path)
    with pytest.raises(UserError, match="made for another base"):
        load(random_base, adapter)


def test_an_adapter_of_another_hub_id_or_of_another_kind(adapter: Path, random_base: Path) -> None:
    path = adapter / "adapter_config.json"
    plain = json.loads(path.read_text())
    lora = LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=str(adapter))
    path.write_text(json.dumps(plain | {"base_model_name_or_path": "Qwen/Qwen3.5-9B-Base"}))
    with pytest.raises(UserError, match=r"made for the base Qwen/Qwen3.5-9B-Base, not for Qwen/Qwen3.5-9B"):
        check_adapter(adapter, lora, "Qwen/Qwen3.5-9B")
    for key, value in (("use_rslora", True), ("alpha_pattern", {"q_proj": 3}), ("rank_pattern", {"q_proj": 3})):
        path.write_text(json.dumps(plain | {key: value}))
        with pytest.raises(UserError, match=f"{key}: only plain LoRA of one rank .*full weights with `grpo merge`"):
            load(random_base, adapter)


def test_a_rank_that_the_file_does_not_have_is_refused_before_memory_is_taken(adapter: Path, random_base: Path) -> None:
    """PEFT would first make tensors of the rank that the config claims."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 10**6}))
    with pytest.raises(UserError, match=r"the config has rank 1e\+06"):
        load(random_base, adapter, r=10**6)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.safetensors: cannot be read"):
        load(random_base, adapter, r=10**6)


def test_an_adapter_is_no_model(adapter: Path, random_base: Path, tmp_path: Path) -> None:
    """transformers would load the adapter's base with the adapter on it, and PEFT a second one over both."""
    whole = tmp_path / "whole"
    shutil.copytree(random_base, whole)
    shutil.copy(adapter / "adapter_config.json", whole)
    lora = LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start="")
    for folder in (adapter, whole):
        with pytest.raises(UserError, match="is an adapter"):
            load(folder)
        model = ModelSection(name=str(folder), device="cpu", dtype="float32", gradient_checkpointing=False)
        (fault,) = missing_files(model, lora)
        assert "is an adapter" in fault and "--adapter" in fault


def test_an_adapter_is_not_put_on_weights_that_hold_it(
    adapter: Path, make_policy: Callable[..., Policy], random_base: Path, tmp_path: Path
) -> None:
    """A merge of it, or a later merge onto that one, refuses it; another adapter is welcome."""
    other = tmp_path / "other"
    policy = make_policy()
    with torch.no_grad():
        for p in policy.adapter_parameters().values():
            p.mul_(2)
    save_adapter(policy, other)
    merge(adapter, tmp_path / "once", base=str(random_base), check=False)
    merge(other, tmp_path / "then", base=str(tmp_path / "once"), check=False)
    lora = LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start="x")
    for base, held in (("once", [adapter]), ("then", [adapter, other])):
        for one in held:
            with pytest.raises(UserError, match=r"lora.warm_start: .*: \w+ is merged into it already"):
                load(tmp_path / base, one)
    check_adapter(other, lora, str(tmp_path / "once"))


def test_a_target_that_is_no_layer_is_named(random_base: Path) -> None:
    for wrong in ("k_prj", "lm_head", "norm"):
        with pytest.raises(UserError, match=f"{wrong}: no such linear layer"):
            load(random_base, target_modules=("q_proj", wrong))


def test_an_adapter_without_effect_is_refused(adapter: Path, random_base: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(UserError, match="no effect on the model"):
        load(random_base, adapter)


def test_a_broken_adapter_file(adapter: Path, random_base: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="lora.warm_start"):
        load(random_base, adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, got a list"):
        load(random_base, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="only LoRA adapters"):
        load(random_base, adapter)


# --- the published layout --------------------------------------------------------------------------------------------


def test_the_multimodal_layout_gives_its_text_model(random_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = AutoModelForCausalLM.from_pretrained(random_base)
    config = Qwen3_5Config(
        text_config=text.config.to_dict(),
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
    )
    whole = Qwen3_5ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    folder = tmp_path / "multimodal"
    whole.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(random_base / name, folder / name)

    policy = load(folder)
    assert type(policy.model.get_base_model()).__name__ == "Qwen3_5ForCausalLM"
    assert torch.equal(states(policy), states(load(random_base)))
    assert len(policy.adapter_parameters()) == len(load(random_base).adapter_parameters())


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0", "cuda:1"])
def test_a_cuda_device_has_the_index_that_set_device_asks_for(name: str) -> None:
    """By torch's own check, which needs no card: `torch.cuda.set_device(torch.device("cuda"))` is a ValueError."""
    assert _get_device_index(resolve_device(name, cards=2)) == (1 if name == "cuda:1" else 0)


def test_the_base_of_a_card_that_is_not_there_gets_past_the_index_check() -> None:
    """No stub: whatever torch says without a card, it is not that the device lacks an index."""
    with pytest.raises((RuntimeError, AssertionError, AttributeError)):
        load_base("random:qwen3.5-small", device=resolve_device("cuda", cards=1), dtype=torch.bfloat16)


@pytest.mark.parametrize(("name", "cards"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_card_that_is_not_there_is_named(name: str, cards: int) -> None:
    with pytest.raises(UserError, match=f'model.device = "{name}": (no CUDA device|this machine has 1 CUDA device)'):
        resolve_device(name, cards=cards)


def test_a_seed_gives_the_same_fresh_adapter_under_every_base_dtype(random_base: Path) -> None:
    """PEFT would round A to the base's bfloat16."""
    adapters = [
        load_policy(
            ModelSection(name=str(random_base), device="cpu", dtype=dtype, gradient_checkpointing=False),
            LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""),
            seed=seed,
        ).adapter_parameters()
        for dtype, seed in (("float32", 1), ("bfloat16", 1), ("float32", 2))
    ]
    full, half, other = adapters
    drawn = [name for name in full if ".lora_A." in name]
    assert drawn and all(p.dtype == torch.float32 for adapter in adapters for p in adapter.values())
    for name in full:
        assert torch.equal(full[name], half[name])
        assert torch.equal(full[name], other[name]) == (name not in drawn)
        if name in drawn:
            bound = full[name].shape[1] ** -0.5
            assert 0.9 * bound < full[name].abs().max() <= bound
            assert (full[name] != full[name].bfloat16().float()).any()


def test_an_adapter_is_read_onto_the_policys_own_device(
    make_policy: Callable[..., Policy], random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would take a card where it sees one, also for `model.device = "cpu"`."""
    save_adapter(make_policy(), tmp_path / "adapter")
    monkeypatch.setattr("peft.utils.save_and_load.infer_device", lambda: "cuda")
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    policy = load(random_base, tmp_path / "adapter")
    assert all(p.device.type == "cpu" for p in policy.adapter_parameters().values())
