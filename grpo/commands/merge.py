"""``grpo merge ADAPTER --out DIR``: merge a LoRA adapter into its base, giving full weights that need no PEFT.

The base is loaded into host memory, merged (`grpo.policy.merging`), and saved as the class it was published with. The
result is then loaded again and compared with base + adapter. Exit codes: 0 merged, 2 bad input, 3 a file cannot be
written, 130 interrupted.
"""

import argparse
import gc
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.config import embedded_path, resolve_path
from grpo.policy.adapter_files import (
    adapter_sha256,
    base_model_of,
    check_lora_tensors,
    check_not_merged_already,
    check_same_base,
    config_of_parent_run,
    load_adapter,
    merged_adapter_hashes,
    read_adapter_config,
    read_json_object,
    system_prompt,
)
from grpo.policy.base_model import HUB_ID, device_option, load_base, load_tokenizer, model_folder, resolve_device
from grpo.policy.merging import merge_adapter
from grpo.prompts import end_token_ids, render_prompt
from grpo.report.model_card import model_card
from grpo.run.folder import write_json
from grpo.runtime.atomic_files import atomic_folder, disk_errors
from grpo.runtime.cli import make_parser, run_command
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import memory_errors
from grpo.runtime.terminal import escape_control
from grpo.types import Case

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
MAX_SHARD_SIZE = "5GB"
COMPANION_FILES = (
    "tokenizer*.json", "vocab*.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template*.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "LICENSE*",
)  # fmt: skip
"""Files of the base that are copied unchanged: data only, never code."""
CHECK_CASES = (
    "A 78-year-old female arrived intubated for airway protection. Central line placed. BP 120/58, HR 150, RR 20.",
    "34-year-old man, ankle twisted at football. Pain 4/10. HR 78, RR 14, SpO2 99%, BP 128/76.",
    "Fever and cough for three days in a 6-year-old girl, drinking well. HR 112, RR 22, SpO2 97%, temp 38.6 C.",
)
"""Invented cases for the logit check, used with thinking and without."""


@dataclass(frozen=True, slots=True)
class LogitCheck:
    """The merged model compared with base + adapter on `CHECK_CASES`, both in the dtype of the merged weights."""

    largest: float
    """Largest absolute difference of a logit."""
    effect: float
    """Largest absolute change that the adapter makes to a logit of the base, for comparison with ``largest``."""
    agree: int
    """Positions with the same most likely token."""
    positions: int


@dataclass(frozen=True, slots=True)
class MergeResult:
    folder: Path
    base: str
    modules: int
    shards: int
    bytes: int
    dtype: str
    check: LogitCheck | None


def merge(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    check: bool = True,
    device: str = "auto",
    progress: bool = False,
) -> MergeResult:
    """Write the merged model to the new folder ``out``; after an error or Ctrl-C, nothing is left of it.

    Args:
        base: name or folder of the base; None takes it from the adapter.
        dtype: of all floating-point tensors: a key of `DTYPES`, or "auto" for each tensor's dtype in the base.
        check: compare the result with base + adapter (`compare`), which loads the two one after the other.
        device: of the check, as for ``model.device``.
        progress: show a progress bar.

    Raises:
        UserError: the adapter or the base cannot be merged.
        DiskError: ``out`` cannot be written.
    """
    name = base_model_of(adapter) if base is None else base
    check_device = resolve_device(device) if check else None
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists, and is never overwritten: choose another folder")
    config = read_adapter_config(adapter)
    check_same_base(adapter / "adapter_config.json", config, name)
    check_not_merged_already(name, adapter)
    check_lora_tensors(adapter, config)
    tokenizer, prompt = load_tokenizer(name), system_prompt(name, adapter)
    card = model_card(adapter.absolute().parent, merged=True) if config_of_parent_run(adapter) else None

    model, state, modules = merge_adapter(name, adapter, DTYPES.get(dtype), progress=progress)
    size = sum(tensor.nbytes for tensor in state.values())
    generation = _generation_config(model_folder(name), tokenizer, model)
    _check_space(out, size)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as staging:
        _save(model, state, generation, model_folder(name), staging)
        weights_dtype = model.dtype
        del model, state
        comparison = compare(name, adapter, staging, prompt, weights_dtype, check_device) if check_device else None
        write_json(staging / "merge.json", _record(name, adapter, dtype, modules, comparison, prompt))
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")
        for path in staging.iterdir():  # safetensors and `write_json` write for the owner only; follow the umask
            path.chmod(staging.stat().st_mode & 0o666)
        shards = len(list(staging.glob("*.safetensors")))
        if os.path.lexists(out):
            raise UserError(f"{out}: was created by another program during the merge: choose another folder")
    return MergeResult(out, name, modules, shards, size, dtype, comparison)


def compare(
    base: str, adapter: Path, merged: Path, system: str, dtype: torch.dtype, device: torch.device
) -> LogitCheck:
    """Compare the logits of base + adapter and of the merged model on the same prompts, loading one after the other."""
    with memory_errors("the check", "choose another device with --device, or skip the check with --no-check"):
        model, tokenizer = load_base(base, device=device, dtype=dtype)
        prompts = [
            list(render_prompt(tokenizer, Case(f"check-{i}", text, 3), system_prompt=system, thinking=thinking).ids)
            for i, text in enumerate(CHECK_CASES)
            for thinking in (True, False)
        ]
        model = load_adapter(model, adapter, device=device).eval()
        expected = _logits(model, prompts)
        with model.disable_adapter():
            plain = _logits(model, prompts)
        del model
        gc.collect()
        model, _ = load_base(str(merged), device=device, dtype=dtype)
        logits = _logits(model.eval(), prompts)
    if not (torch.isfinite(expected).all() and torch.isfinite(logits).all()):
        raise UserError(f"check: logits are not finite in {dtype}: merge with --dtype float32 or bfloat16")
    return LogitCheck(
        largest=float((logits - expected).abs().max()),
        effect=float((plain - expected).abs().max()),
        agree=int((logits.argmax(-1) == expected.argmax(-1)).sum()),
        positions=len(expected),
    )


@torch.inference_mode()
def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits [tokens,V] of all positions of all prompts, fp32 on the CPU."""
    device = next(model.parameters()).device
    rows = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in prompts]
    return torch.cat([row.float().cpu() for row in rows])


def _check_space(out: Path, size: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(f"{existing}: {free / 1e9:.1f} GB free, but the merged model needs {size / 1e9:.1f} GB")


def _generation_config(base: Path, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Return the base's generation config with all end tokens that training stops at."""
    path = base / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    eos = generation.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(end) is int for end in ends):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, got {eos!r:.80}")
    generation["eos_token_id"] = ends + [i for i in end_token_ids(tokenizer, model) if i not in ends]
    if generation.get("pad_token_id") is None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    return generation


def _save(model: Any, state: Mapping[str, Tensor], generation: Mapping[str, Any], base: Path, folder: Path) -> None:
    """Write weights, config, generation config, tokenizer and chat template."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # transformers validates what it writes: bases with odd values exist
    model.save_pretrained(folder, state_dict=dict(state), max_shard_size=MAX_SHARD_SIZE)
    write_json(folder / "generation_config.json", dict(generation))
    for source in sorted({path for pattern in COMPANION_FILES for path in base.glob(pattern) if path.is_file()}):
        shutil.copyfile(source, folder / source.name)


def _record(
    base: str, adapter: Path, dtype: str, modules: int, check: LogitCheck | None, prompt: str
) -> dict[str, Any]:
    """Return the contents of ``merge.json``. Of folders it has only the last name: the file is published."""
    return {
        "base": base if HUB_ID.fullmatch(base) or embedded_path(base) else Path(base).name,
        "adapter": {"name": adapter.name, "sha256": adapter_sha256(adapter), "modules": modules},
        "merged_before": list(merged_adapter_hashes(base)),
        "dtype": dtype,
        "check": asdict(check) if check else None,
        "system_prompt": prompt,
    }


def format_result(result: MergeResult) -> str:
    """Return the terminal output."""
    check = result.check
    lines = [
        f"base      {result.base}",
        f"merged    {result.modules} modules, {result.bytes / 1e9:.3f} GB in {result.shards} file(s), "
        f"dtype {result.dtype}, in {result.folder}",
    ]
    if check is None:
        return "\n".join([*lines, "check     skipped"])
    lines += [
        f"check     largest logit difference to base + adapter: {check.largest:.2g}; the adapter itself changes "
        f"one by up to {check.effect:.2g}",
        f"          same most likely token at {check.agree} of {check.positions} positions",
    ]
    return "\n".join(lines)


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "merge",
        "Merge a LoRA adapter into its base.",
        examples=["grpo merge runs/tiny/adapter --out merged", "grpo merge embedded:v46 --out merged --dtype bfloat16"],
    )
    parser.add_argument("adapter", help="folder in PEFT's layout, for example runs/tiny/adapter, or embedded:v46")
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist yet")
    parser.add_argument("--base", help="name or folder of the base (default: the one recorded with the adapter)")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="auto keeps each tensor's dtype in the base"
    )
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="compare logits with base + adapter"
    )
    parser.add_argument("--device", type=device_option, default="auto", help="of the check: auto, cpu, cuda, cuda:1")
    return parser


def run(arguments: argparse.Namespace) -> int:
    result = merge(
        resolve_path(arguments.adapter),
        arguments.out,
        base=arguments.base,
        dtype=arguments.dtype,
        check=arguments.check,
        device=arguments.device,
        progress=sys.stderr.isatty(),
    )
    print("\n".join(escape_control(line) for line in format_result(result).splitlines()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(argument_parser(), run, argv, if_interrupted="nothing was written")
