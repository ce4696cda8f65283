"""Merging: the arithmetic against loops and PEFT's own, the files, what is refused, and the models that come out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

from grpo.cases import load_jsonl_cases
from grpo.commands.merge import compare, format_result, main, merge
from grpo.config import TINY_WORLD_DIR, load_config
from grpo.policy.adapter_files import base_model_of, config_of_parent_run, system_prompt
from grpo.run.folder import create_run
from grpo.runtime.errors import UserError
from rewards import load_reward, parse_answer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|tie_word_embeddings).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match.*:RuntimeWarning"),
]  # what transformers and PEFT say to users, not to these tests

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """A PEFT adapter on a base, every tensor of it random."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | lora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1, generator=generator)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def peft_merges(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    return dict(model.state_dict())


@pytest.fixture
def adapter(random_base: Path, tmp_path: Path) -> Path:
    return make_adapter(random_base, tmp_path / "adapter")


# --- arithmetic ------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"o_pro": 99, "mlp.*": 5}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"o_proj": 1}},
    "some layers": {"layers_to_transform": [0, 3]},
    "a pattern of targets": {"target_modules": r".*\.layers\.[12]\.mlp\.(up|down)_proj"},
    "excluded": {"exclude_modules": ["layers.0.mlp.up_proj"]},
    "the head": {"target_modules": ["lm_head", "up_proj"]},
    "recurrent projections": {"target_modules": ["in_proj_qkv", "out_proj"]},
    "a flag that means nothing on these layers": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_result_is_pefts_own(name: str, random_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(random_base, tmp_path / "adapter", **VARIANTS[name])
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_base), str(adapter))
    layers = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    merged = merge(adapter, tmp_path / "out", base=str(random_base), check=False)
    assert merged.modules == len(layers) > 0
    got, wanted, before = weights(tmp_path / "out"), peft_merges(random_base, adapter), weights(random_base)
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert torch.allclose(value, wanted[key], atol=1e-6), key
        assert torch.equal(value, before[key]) == (key.removesuffix(".weight") not in layers), key


def test_weights_stored_the_other_way_round(random_base: Path, tmp_path: Path) -> None:
    """GPT-2 stores [in, out], some of it square, and ties its embeddings."""
    vocabulary = len(AutoTokenizer.from_pretrained(random_base))
    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=512)).save_pretrained(
        base
    )
    for name in TOKENIZER:
        shutil.copy(random_base / name, base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merged = merge(adapter, tmp_path / "out", base=str(base))
    got, wanted = weights(tmp_path / "out"), peft_merges(base, adapter)
    assert merged.modules == 6 and all(torch.allclose(got[key], wanted[key], atol=1e-6) for key in got)
    assert merged.check is not None and merged.check.largest < 1e-4 < merged.check.effect


def test_half_precision_is_the_float32_merge_within_rounding(adapter: Path, random_base: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        merge(adapter, tmp_path / dtype, base=str(random_base), dtype=dtype, check=False)
    exact = weights(tmp_path / "float32")
    for dtype, precision in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        folder = tmp_path / str(dtype).removeprefix("torch.")
        for key, value in weights(folder).items():
            assert value.dtype == dtype
            assert torch.allclose(value.float(), exact[key], rtol=precision, atol=precision / 4), key
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


# --- layouts ---------------------------------------------------------------------------------------------------------


def multimodal(text: Any, folder: Path, **save: Any) -> Path:
    """The layout of the published checkpoint: the text model beside a vision tower."""
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text.config.to_dict(), vision_config=vision))
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(folder, **save)
    return folder


def test_the_multimodal_layout_stays_one_and_its_text_model_is_merged(
    adapter: Path, random_base: Path, tmp_path: Path
) -> None:
    """PEFT would load the text model's adapter on the published class, and change nothing."""
    base = multimodal(AutoModelForCausalLM.from_pretrained(random_base), tmp_path / "whole", max_shard_size="300KB")
    for name in TOKENIZER:
        shutil.copy(random_base / name, base)
    assert len(list(base.glob("*.safetensors"))) > 3 and any("language_model" in key for key in weights(base))
    merged = merge(adapter, tmp_path / "out", base=str(base))
    merge(adapter, tmp_path / "plain", base=str(random_base), check=False)
    assert merged.check is not None and merged.check.largest < 1e-4 < merged.check.effect
    before, after, plain = weights(base), weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if "visual" in key)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is Qwen3_5ForCausalLM
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    ids = torch.arange(1, 40)[None]
    text = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_base), str(adapter)).eval()
    with torch.no_grad():
        published = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
        expected = text(input_ids=ids).logits
        with text.disable_adapter():
            unadapted = text(input_ids=ids).logits
    assert torch.allclose(published, expected, atol=1e-4) and (published - unadapted).abs().max() > 0.1


def test_a_sharded_base_gives_what_one_file_gives(
    adapter: Path, random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(random_base).save_pretrained(sharded, max_shard_size="500KB")
    for name in TOKENIZER:
        shutil.copy(random_base / name, sharded)
    one = merge(adapter, tmp_path / "one", base=str(random_base), check=False)
    monkeypatch.setattr("grpo.commands.merge.MAX_SHARD_SIZE", "700KB")
    many = merge(adapter, tmp_path / "many", base=str(sharded), check=False)
    assert one.shards == 1 < many.shards == len(list((tmp_path / "many").glob("*.safetensors")))
    first, second = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert one.bytes == many.bytes == sum(v.numel() * v.element_size() for v in second.values())


def test_tensors_that_the_class_does_not_load_and_their_dtypes_are_kept(
    adapter: Path, random_base: Path, tmp_path: Path
) -> None:
    """A multi-token prediction head beside the model, and norms in float32 beside matrices in bfloat16."""
    base = multimodal(AutoModelForCausalLM.from_pretrained(random_base), tmp_path / "whole")
    for name in TOKENIZER:
        shutil.copy(random_base / name, base)
    base_config(dtype="bfloat16")(adapter, base)
    mixed = {key: value + 1e-4 if "norm" in key else value.bfloat16() for key, value in weights(base).items()}
    save_file(
        mixed | {"mtp.fc.weight": torch.ones(3, 2), "extra": torch.ones(2)},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    merge(adapter, tmp_path / "out", base=str(base), check=False)
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 16 and all("language_model" in key for key in changed)
    assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
    merge(adapter, tmp_path / "half", base=str(base), dtype="float16", check=False)
    assert {value.dtype for value in weights(tmp_path / "half").values()} == {torch.float16}


def test_tied_embeddings_stay_tied(random_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "tied"
    config = AutoModelForCausalLM.from_pretrained(random_base).config
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    Qwen3_5ForCausalLM(config).save_pretrained(base)
    for name in TOKENIZER:
        shutil.copy(random_base / name, base)
    assert "lm_head.weight" not in weights(base)
    merged = merge(make_adapter(base, tmp_path / "adapter"), tmp_path / "out", base=str(base))
    assert "lm_head.weight" not in weights(tmp_path / "out")
    assert merged.check is not None and merged.check.largest < 1e-4 < merged.check.effect
    head = make_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head, which is tied to the input embeddings"):
        merge(head, tmp_path / "never", base=str(base))


# --- what lies beside the weights ------------------------------------------------------------------------------------


def test_companions_go_along_and_code_does_not(adapter: Path, random_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_base, base)
    for name in ("modeling_x.py", "training_args.bin", "notes.txt"):
        (base / name).write_text("x")
    tokenizer = AutoTokenizer.from_pretrained(base)
    im_end, end_of_text = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    for named in (im_end, [end_of_text], None):
        (base / "generation_config.json").write_text(
            json.dumps({"eos_token_id": named, "top_k": 20, "do_sample": True})
        )
        out = tmp_path / f"out-{named}"
        merge(adapter, out, base=str(base), check=False)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert sorted(model.generation_config.eos_token_id) == sorted([im_end, end_of_text])
        assert model.generation_config.top_k == 20 and model.generation_config.pad_token_id is not None
        assert sorted(path.name for path in out.iterdir()) == [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "merge.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    (base / "generation_config.json").unlink()
    merge(adapter, tmp_path / "out", base=str(base), check=False)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends) == sorted([im_end, end_of_text])
    (tmp_path / "usual").write_text("")
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "usual").stat().st_mode}
    assert str(tmp_path) not in (out / "merge.json").read_text("utf-8")
    chat = [{"role": "user", "content": "Chest pain."}]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)


def test_a_runs_adapter_brings_its_base_its_card_and_its_system_prompt(tmp_path: Path) -> None:
    config, source = load_config("configs/tiny.toml", ["cases.system_prompt='Say the level.'"])
    run = create_run(tmp_path / "run", config, source, load_reward(config.reward.set), device="cpu")
    shutil.copytree(TINY_WORLD_DIR / "v46", run.adapter)
    merged = merge(run.adapter, tmp_path / "out")
    assert merged.base == "embedded:base" and merged.check is not None and merged.check.largest < 1e-3
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "not approved for clinical use" in card and "PeftModel" not in card
    assert system_prompt("embedded:base", run.adapter) == system_prompt(str(tmp_path / "out"), None) == "Say the level."
    assert not [p.name for p in (tmp_path / "out").iterdir() if str(tmp_path).encode() in p.read_bytes()]
    (tmp_path / "run" / "config.json").write_text('{"config": {"model": "x", "cases": {}}}')
    assert config_of_parent_run(run.adapter) is None and base_model_of(run.adapter) == "embedded:base"
    merge(TINY_WORLD_DIR / "v46", tmp_path / "bare", check=False)
    assert not (tmp_path / "bare" / "README.md").exists()


# --- the check -------------------------------------------------------------------------------------------------------


def test_the_check_measures_logits(random_base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge(adapter, tmp_path / "out", base=str(random_base))
    assert merged.check is not None
    assert merged.check.agree == merged.check.positions > 100
    assert merged.check.largest < 1e-4 < 0.1 < merged.check.effect
    unmerged = compare(str(random_base), adapter, random_base, "", torch.float32, CPU)
    assert unmerged.largest == unmerged.effect > 0.1 and unmerged.agree < unmerged.positions
    shown = format_result(merged)
    assert f"{merged.check.largest:.2g}" in shown and "16 modules" in shown

    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {key: tensors[key] + 0.01}, path, metadata={"format": "pt"})
    assert (
        compare(str(random_base), adapter, tmp_path / "out", "", torch.float32, CPU).largest > 10 * merged.check.largest
    )


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_here_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["embedded:v46", "--out", str(tmp_path / "out"), "--device", "cuda:1"]
    assert main(argv) == 2 and "no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*argv, "--no-check"]) == 0, "without the check no device is needed"


def test_the_command_writes_once_and_never_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "merged"
    assert main(["embedded:v46", "--out", str(out), "--no-check", "--dtype", "bfloat16"]) == 0
    assert "check     skipped" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for there in (out, tmp_path / "empty", tmp_path / "link"):
        if there.name == "empty":
            there.mkdir()
        if there.name == "link":
            there.symlink_to(tmp_path / "nowhere")
        assert main(["embedded:v46", "--out", str(there), "--no-check"]) == 2
        assert "already exists, and is never overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_an_adapter_says_of_itself_cannot_command_the_terminal(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_key(**{"\x1b[2Jnew": 1})(adapter, tmp_path)
    assert main([str(adapter), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b[2Jnew: only plain LoRA" in said and said.count("\n") == 1


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_broken_off_merge_leaves_nothing_behind(
    fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("grpo.commands.merge.write_json", fail)  # after the weights
    assert main(["embedded:v46", "--out", str(tmp_path / "out")]) == (3 if isinstance(fault, OSError) else 130)
    assert list(tmp_path.iterdir()) == []
    assert ("No space left" in capsys.readouterr().err) == isinstance(fault, OSError)


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert main(["embedded:v46", "--out", str(tmp_path / "out")]) == 2
    assert "GB free, but the merged model needs" in capsys.readouterr().err


# --- what is refused -------------------------------------------------------------------------------------------------

Spoil = Callable[[Path, Path], None]
"""(adapter folder, base folder): what goes wrong."""


def set_key(**values: object) -> Spoil:
    def spoil(adapter: Path, base: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    def spoil(adapter: Path, base: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


def renamed(old: str, new: str) -> Spoil:
    return tensors(lambda t: {key.replace(old, new): value for key, value in t.items()})


def to_pickle(folder: str) -> Spoil:
    def spoil(adapter: Path, base: Path) -> None:
        at = {"adapter": adapter / "adapter_model", "base": base / "model"}[folder]
        at.with_suffix(".safetensors").unlink()
        at.with_suffix(".bin").write_bytes(b"\x80\x04N.")

    return spoil


def sharded(change: Callable[[dict[str, str]], dict[str, str]]) -> Spoil:
    def spoil(adapter: Path, base: Path) -> None:
        (base / "model.safetensors").rename(base / "model-1.safetensors")
        listed = {key: "model-1.safetensors" for key in load_file(base / "model-1.safetensors")}
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": change(listed)}))

    return spoil


def base_config(**values: object) -> Spoil:
    def spoil(adapter: Path, base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def base_tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Spoil:
    def spoil(adapter: Path, base: Path) -> None:
        held = load_file(base / "model.safetensors")
        new = change(held.pop(key))
        save_file(held | ({} if new is None else {key: new}), base / "model.safetensors", metadata={"format": "pt"})

    return spoil


UP = "model.layers.0.mlp.up_proj"
A_OF_UP = f"base_model.model.{UP}.lora_A.weight"
REFUSED: dict[str, tuple[Spoil, str]] = {
    "DoRA": (set_key(use_dora=True), "use_dora: only plain LoRA"),
    "biases": (set_key(bias="lora_only"), "bias is 'lora_only'"),
    "lora_bias": (set_key(lora_bias=True), "lora_bias: only plain LoRA"),
    "saved modules": (set_key(modules_to_save=["lm_head"]), "modules_to_save: only plain LoRA"),
    "a variant yet to come": (set_key(new_config={"x": 1}), "new_config: only plain LoRA"),
    "another method": (set_key(peft_type="IA3"), "peft_type is 'IA3'"),
    "PiSSA": (set_key(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "no rank": (set_key(r=0), "r must be a number above 0"),
    "alpha that is text": (set_key(lora_alpha="8"), "lora_alpha must be a number"),
    "a pattern that is none": (set_key(rank_pattern={"(": 4}), "rank_pattern: not a regular expression"),
    "patterns that are no object": (set_key(alpha_pattern=[1]), "alpha_pattern must be an object"),
    "another rank": (set_key(r=5), "size mismatch"),
    "a rank beyond all memory": (set_key(r=10**30), r"the config has rank 1e\+30"),
    "another base": (set_key(base_model_name_or_path="Qwen/Other"), "made for the base Qwen/Other"),
    "a config that is none": (lambda a, b: (a / "adapter_config.json").write_text("[]") and None, "a JSON object"),
    "no config": (lambda a, b: (a / "adapter_config.json").unlink(), "adapter_config.json: cannot be read"),
    "a target without tensors": (
        tensors(lambda t: {k: v for k, v in t.items() if UP not in k}),
        f"made for another base: 2 tensors differ from Qwen3_5ForCausalLM .* first base_model.model.{UP}.lora_A",
    ),
    "a module too many": (renamed("layers.0", "layers.9"), "made for another base: 12 tensors differ"),
    "a multimodal wrapper's names": (
        renamed("model.model.", "model.model.language_model."),
        "made for another base: 64 tensors differ",
    ),
    "an embedding": (renamed("lora_A.weight", "lora_embedding_A"), "made for another base: 32 tensors differ"),
    "half a pair": (
        tensors(lambda t: {k: v for k, v in t.items() if k != A_OF_UP}),
        "made for another base: 1 tensors differ",
    ),
    "not finite": (tensors(lambda t: t | {A_OF_UP: t[A_OF_UP] * float("nan")}), "not finite"),
    "another width": (
        tensors(lambda t: t | {A_OF_UP: torch.zeros(4, 127)}),
        r"cannot be loaded on this base: .*size mismatch for .*up_proj",
    ),
    "no tensors": (tensors(lambda t: {}), "the config has rank 4, but no dimension of a tensor is above 0"),
    "a broken file": (lambda a, b: (a / "adapter_model.safetensors").write_bytes(b"x" * 9) and None, "cannot be read"),
    "a pickled adapter": (to_pickle("adapter"), "only a pickle"),
    "a pickled base": (to_pickle("base"), r"pickles \(.bin\) can run code"),
    "no weights": (lambda a, b: (b / "model.safetensors").unlink(), "no file named model.safetensors"),
    "an index that leads out": (sharded(lambda m: dict.fromkeys(m, "../x.safetensors")), "a file of the same folder"),
    "a missing shard": (sharded(lambda m: m | {"lm_head.weight": "model-2.safetensors"}), "model-2.safetensors"),
    "a quantised base": (base_config(quantization_config={"quant_method": "fp8"}), "a quantized base cannot be merged"),
    "a quantised tensor": (
        base_tensor(f"{UP}.weight", lambda w: w.to(torch.float8_e4m3fn)),
        f"{UP}.weight is F8_E4M3: a quantized base",
    ),
    "a base without the weight": (
        base_tensor(f"{UP}.weight", lambda w: None),
        f"no weights for 1 tensors of Qwen3_5ForCausalLM, first {UP}",
    ),
    "a model unknown here": (base_config(model_type="unheard_of"), "does not recognize this architecture"),
    "code in the base": (
        base_config(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        r"requests remote code \(auto_map\)",
    ),
    "an end token that is none": (
        lambda a, b: (b / "generation_config.json").write_text('{"eos_token_id": ["x"]}') and None,
        "eos_token_id must be a token id",
    ),
    "no chat template": (lambda a, b: (b / "chat_template.jinja").unlink(), "no chat template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(
    name: str, adapter: Path, random_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSED[name]
    base = tmp_path / "vendor" / "base"
    shutil.copytree(random_base, base)
    spoil(adapter, base)
    before = sorted(tmp_path.rglob("*"))
    where = "vendor/base" if name == "another base" else str(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main([str(adapter), "--out", str(tmp_path / "out"), "--base", where, "--no-check"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and re.search(message, said), said
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_a_base_that_is_not_here(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(adapter), "--base", "", "--out", str(tmp_path / "out")]) == 2, (
        "an empty base is not replaced by the adapter's"
    )
    assert "model.name = ''" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([str(adapter), "--out", str(tmp_path / "out"), "--base", "Qwen/Qwen3.5-9B"]) == 2
    assert "hf download Qwen/Qwen3.5-9B" in capsys.readouterr().err
    set_key(base_model_name_or_path=None)(adapter, tmp_path)
    assert main([str(adapter), "--out", str(tmp_path / "out")]) == 2
    assert "base_model_name_or_path is not set" in capsys.readouterr().err


def test_what_does_not_fit_float16_is_refused(random_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(random_base, tmp_path / "adapter")
    tensors(lambda t: {k: v * 1e4 for k, v in t.items()})(adapter, tmp_path)
    with pytest.raises(UserError, match="not finite.*use --dtype bfloat16"):
        merge(adapter, tmp_path / "out", base=str(random_base), dtype="float16", check=False)


# --- shipping --------------------------------------------------------------------------------------------------------

USAGE = """\
from transformers import AutoTokenizer, AutoModelForCausalLM
from peft import PeftModel
import torch

base    = "Qwen/Qwen3.5-9B"
adapter = "vadimbelsky/qwen3.5-esi-triage-grpo-v49"

tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.bfloat16, device_map="auto")
model = PeftModel.from_pretrained(model, adapter)
model.eval()

SYSTEM = (
    "You are an expert emergency triage nurse. "
    "Extract clinical fields, apply the ESI algorithm step by step, then state the ESI level. "
    "Be concise — stay under 150 words total."
)

case = ("A 78-year-old female arrived intubated for airway protection. "
        "Central line placed. BP 120/58, HR 150, RR 20, SpO2 97%.")

prompt = tokenizer.apply_chat_template(
    [{"role": "system", "content": SYSTEM},
     {"role": "user",   "content": case}],
    tokenize=False, add_generation_prompt=True,
)
out = model.generate(
    **tokenizer(prompt, return_tensors="pt").to(model.device),
    max_new_tokens=1024, temperature=0.1, do_sample=True,
)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""
"""The card's usage code, word for word."""


def test_the_cards_usage_code_runs_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "Qwen/Qwen3.5-9B": str(TINY_WORLD_DIR / "base"),
        "vadimbelsky/qwen3.5-esi-triage-grpo-v49": str(TINY_WORLD_DIR / "v46"),
    }
    code = USAGE
    for published, here in names.items():
        assert code.count(published) == 1
        code = code.replace(published, here)
    torch.manual_seed(0)
    exec(compile(code, "card", "exec"), {})
    said = capsys.readouterr().out
    assert parse_answer(said, thinking=True).level is not None


@pytest.mark.parametrize("thinking", [True, False])
def test_the_merged_model_answers_the_36_cases_as_base_and_adapter_do(thinking: bool, tmp_path: Path) -> None:
    """Plain transformers, greedy: the same ids, all 36, both modes."""
    cases = load_jsonl_cases("embedded:cases/mietic36.jsonl")
    system = system_prompt("embedded:base", None)
    merge(TINY_WORLD_DIR / "v46", tmp_path / "merged", check=False)
    base = AutoModelForCausalLM.from_pretrained(TINY_WORLD_DIR / "base")
    models = {
        "base and adapter": PeftModel.from_pretrained(base, TINY_WORLD_DIR / "v46").eval(),
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(),
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged", padding_side="left")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": case.text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for case in cases
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    said = {
        name: tokenizer.batch_decode(
            model.generate(**batch, max_new_tokens=88, do_sample=False)[:, batch["input_ids"].shape[1] :]
        )
        for name, model in models.items()
    }
    assert len(cases) == 36 and said["merged"] == said["base and adapter"]
    assert sum(parse_answer(text, thinking=thinking).level is not None for text in said["merged"]) >= 34
