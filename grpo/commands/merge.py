"""Base + LoRA adapter → full weights that need no PEFT: ``python -m grpo merge ADAPTER --out DIR``.

    W' = W + scaling · B A        in float32, then cast

The base's own safetensors files are read tensor by tensor and written out shard by shard; the model is never built.
Memory holds about one shard of the base and one of the result, whatever the model's size. The result keeps the base's
tensor names, so a multimodal checkpoint stays one, its vision tower copied as it is.

Exit codes: 0 merged, 2 bad input, 130 interrupted.
"""

import argparse
import gc
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from grpo.config import embedded, resolve
from grpo.policy.adapter_files import (
    Delta,
    base_of,
    merged_digests,
    merged_weight,
    read_config,
    read_json,
    read_pairs,
    refuse_merged_twice,
    run_config,
    system_prompt,
    weights_digest,
)
from grpo.policy.base_model import HUB_ID, device_option, load_base, pick_device
from grpo.policy.merged_weights import Stored, base_folder, base_tensors, blank_model, match_deltas, read_tensors
from grpo.prompts import end_ids, render_prompt
from grpo.report.model_card import model_card
from grpo.run.folder import write_json
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.runtime.terminal import error_lines, say_anyhow, visible
from grpo.types import Case

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
COPIED = (
    "tokenizer*.json", "vocab*.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template*.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "LICENSE*",
)  # fmt: skip
"""Files of the base that go along as they are: data only, never code."""
PROBES = (
    "A 78-year-old female arrived intubated for airway protection. Central line placed. BP 120/58, HR 150, RR 20.",
    "34-year-old man, ankle twisted at football. Pain 4/10. HR 78, RR 14, SpO2 99%, BP 128/76.",
    "Fever and cough for three days in a 6-year-old girl, drinking well. HR 112, RR 22, SpO2 97%, temp 38.6 C.",
)
"""Invented cases that the check reads, with thinking and without."""


@dataclass(frozen=True, slots=True)
class Check:
    """The merged model against base + adapter on `PROBES`, both loaded in the merged weights' dtype."""

    largest: float
    """The largest difference of a logit."""
    effect: float
    """The largest difference that the adapter makes to the base's logits: what ``largest`` is to be held against."""
    agree: int
    """Positions at which the most likely token is the same."""
    positions: int


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did."""

    folder: Path
    base: str
    modules: int
    shards: int
    bytes: int
    dtype: str
    check: Check | None


def merge(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    max_shard_bytes: int = 5 * 10**9,
    check: bool = True,
    device: str = "auto",
    progress: Callable[[int, int], object] = lambda written, total: None,
) -> Merged:
    """Writes the merged model to ``out``: aside first, then renamed. What is already there is never touched.

    Args:
        base: its name or folder; None takes the adapter's own.
        dtype: of every floating tensor written: a name of `DTYPES`, or "auto" for each tensor's own in the base.
        max_shard_bytes: no file holds more, unless a single tensor does.
        check: also measure the result against base + adapter (`compare`); loads both, one after the other.
        device: that runs the check, as ``model.device``.
        progress: called with the bytes just merged and the bytes of the whole.

    Raises one of `INPUT_ERRORS`: what cannot be merged, and why.
    """
    name, target = base_of(adapter) if base is None else base, None if dtype == "auto" else DTYPES[dtype]
    checked_on = pick_device(device) if check else None
    if os.path.lexists(out):
        raise UserError(f"{out}: already there, and nothing is ever overwritten: name another folder")
    config = read_config(adapter)
    _check_origin(adapter, config, name)
    refuse_merged_twice(name, adapter)
    folder = base_folder(name)
    model, tensors = blank_model(folder), base_tensors(folder)
    deltas = match_deltas(model, tensors, config, read_pairs(adapter, config))
    total, prompt = sum(t.bytes_as(target) for t in tensors), system_prompt(name, adapter)
    card = model_card(adapter.absolute().parent, merged=True) if run_config(adapter) else None
    _check_space(out, total)

    held = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        held = Path(tempfile.mkdtemp(prefix=".merge-", dir=out.parent))
        (aside := held / "merged").mkdir()  # of the usual mode: a temporary folder's is 0700
        _write_companions(folder, aside, model, target)
        shards = _write_shards(tensors, deltas, aside, target, max_shard_bytes, progress)
        shown = next(t.written_as(target) for t in tensors if t.key in deltas)
        measured = compare(name, adapter, aside, prompt, shown, checked_on) if checked_on else None
        write_json(aside / "merge.json", _record(name, adapter, dtype, len(deltas), measured, prompt))
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        for path in aside.iterdir():  # safetensors and `write_json` write for the owner alone; here the umask decides
            path.chmod(aside.stat().st_mode & 0o666)
        _sync(aside)
        os.rename(aside, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    except torch.OutOfMemoryError:
        raise UserError(
            f"the check does not fit the memory of {checked_on}: name another with --device, or leave it out with "
            f"--no-check"
        ) from None
    finally:
        if held is not None:
            shutil.rmtree(held, ignore_errors=True)
    return Merged(out, name, len(deltas), shards, total, dtype, measured)


def shard_spans(sizes: Sequence[int], limit: int) -> tuple[tuple[int, int], ...]:
    """Cuts a row of sizes into spans (start, stop) that sum to at most ``limit`` each, filled in order. A size above
    the limit stands alone.

    >>> shard_spans([3, 3, 3, 9, 1], 6)
    ((0, 2), (2, 3), (3, 4), (4, 5))
    """
    spans, start, filled = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and filled + size > limit:
            spans.append((start, i))
            start, filled = i, 0
        filled += size
    return (*spans, (start, len(sizes))) if sizes else ()


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" (decimal) or "2GiB" (binary), at least 1.

    >>> parse_size("5GB"), parse_size("1.5GiB")
    (5000000000, 1610612736)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMG]i?B)", text.strip(), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * SIZES[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: expected a size such as 5GB, 500MB or 2GiB")
    return size


def compare(base: str, adapter: Path, merged: Path, system: str, dtype: torch.dtype, device: torch.device) -> Check:
    """Base + adapter and the merged model on the same prompts, teacher-forced: the largest difference of a logit.

    The two are loaded one after the other, so that memory holds one model.
    """
    from peft import PeftModel

    model, tokenizer = load_base(base, device=device, dtype=dtype)
    prompts = [
        list(render_prompt(tokenizer, Case(f"probe-{i}", text, 3), system_prompt=system, thinking=thinking).ids)
        for i, text in enumerate(PROBES)
        for thinking in (True, False)
    ]
    model = PeftModel.from_pretrained(model, str(adapter), torch_device=str(device)).eval()
    wanted = _logits(model, prompts)
    with model.disable_adapter():
        plain = _logits(model, prompts)
    del model
    gc.collect()
    model, _ = load_base(str(merged), device=device, dtype=dtype)
    got = _logits(model.eval(), prompts)
    if not (torch.isfinite(wanted).all() and torch.isfinite(got).all()):
        raise UserError(f"check: logits are not finite in {dtype}: merge with --dtype float32 or bfloat16")
    return Check(
        largest=float((got - wanted).abs().max()),
        effect=float((plain - wanted).abs().max()),
        agree=int((got.argmax(-1) == wanted.argmax(-1)).sum()),
        positions=len(wanted),
    )


def _check_origin(adapter: Path, config: Mapping[str, Any], base: str) -> None:
    own = config.get("base_model_name_or_path")
    if isinstance(own, str) and HUB_ID.fullmatch(own) and HUB_ID.fullmatch(base) and own != base:
        raise UserError(f"{adapter}: made for the base {own}, not for {base}")


def _check_space(out: Path, size: int) -> None:
    there = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(f"{there}: {free / 1e9:.1f} GB free, but the merged model takes {size / 1e9:.1f} GB")


def _write_companions(base: Path, folder: Path, model: Any, target: torch.dtype | None) -> None:
    """Config, generation config, tokenizer and chat template."""
    from transformers import AutoTokenizer

    for source in sorted({path for pattern in COPIED for path in base.glob(pattern) if path.is_file()}):
        shutil.copyfile(source, folder / source.name)
    config = read_json(base / "config.json")
    write_json(folder / "config.json", config if target is None else _with_dtype(config, str(target)[len("torch.") :]))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{base}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if tokenizer.chat_template is None:
        raise UserError(f"{base}: its tokenizer has no chat template, so no prompt can be rendered")
    path = base / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    named = generation.get("eos_token_id")
    ends = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(end) is int for end in ends):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, got {named!r:.80}")
    generation["eos_token_id"] = ends + [i for i in end_ids(tokenizer, model) if i not in ends]
    if generation.get("pad_token_id") is None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    write_json(folder / "generation_config.json", generation)


def _with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config, every part of a multimodal one included, saying the dtype that is written."""
    parts = {k: _with_dtype(v, name) if k.endswith("_config") and isinstance(v, dict) else v for k, v in config.items()}
    return {key: value for key, value in parts.items() if key != "torch_dtype"} | {"dtype": name}


def _write_shards(
    tensors: Sequence[Stored],
    deltas: Mapping[str, Delta],
    folder: Path,
    target: torch.dtype | None,
    limit: int,
    progress: Callable[[int, int], object],
) -> int:
    """Writes the weights and, if there is more than one file, their index; the number of files."""
    spans = shard_spans([t.bytes_as(target) for t in tensors], limit)
    whole, size = len(spans) == 1, sum(t.bytes_as(target) for t in tensors)
    numbered = [f"model-{i:05}-of-{len(spans):05}.safetensors" for i in range(1, len(spans) + 1)]
    files = ["model.safetensors"] if whole else numbered
    stream = read_tensors(tensors)
    for file, (start, stop) in zip(files, spans, strict=True):
        shard: dict[str, Tensor] = {}
        for stored, tensor in itertools.islice(stream, stop - start):
            shard[stored.key] = _finished(stored, tensor, deltas.get(stored.key), target)
            progress(stored.bytes_as(target), size)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if not whole:
        weight_map = {t.key: file for file, span in zip(files, spans, strict=True) for t in tensors[slice(*span)]}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    return len(spans)


def _finished(stored: Stored, tensor: Tensor, delta: Delta | None, target: torch.dtype | None) -> Tensor:
    """The tensor as it is written: merged if the adapter speaks of it, then cast."""
    dtype = stored.written_as(target)
    if delta is None and dtype == tensor.dtype:
        return tensor
    result = (tensor if delta is None else merged_weight(tensor, delta)).to(dtype).contiguous()
    if not torch.isfinite(result).all():
        raise UserError(f"{stored.key}: not finite as {str(dtype)[len('torch.') :]}: use --dtype bfloat16 or float32")
    return result


@torch.inference_mode()
def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """[tokens, V] fp32 on the CPU, of every position of every prompt."""
    device = next(model.parameters()).device
    rows = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in prompts]
    return torch.cat([row.float().cpu() for row in rows])


def _record(base: str, adapter: Path, dtype: str, modules: int, check: Check | None, prompt: str) -> dict[str, Any]:
    """``merge.json``: what was merged into what. Folders by name alone, for the file goes where the weights go."""
    return {
        "base": base if HUB_ID.fullmatch(base) or embedded(base) else Path(base).name,
        "adapter": {"name": adapter.name, "sha256": weights_digest(adapter), "modules": modules},
        "merged_before": list(merged_digests(base)),
        "dtype": dtype,
        "check": asdict(check) if check else None,
        "system_prompt": prompt,
    }


def _sync(folder: Path) -> None:
    for path in (*sorted(folder.iterdir()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def report(merged: Merged) -> str:
    """What was done, for a person."""
    check = merged.check
    lines = [
        f"base      {merged.base}",
        f"merged    {merged.modules} modules, {merged.bytes / 1e9:.3f} GB in {merged.shards} file(s), "
        f"dtype {merged.dtype}, in {merged.folder}",
    ]
    if check is None:
        return "\n".join([*lines, "check     left out"])
    lines += [
        f"check     largest logit difference to base + adapter: {check.largest:.2g}; the adapter itself moves one by "
        f"up to {check.effect:.2g}",
        f"          same most likely token at {check.agree} of {check.positions} positions",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    parser = argparse.ArgumentParser(prog="python -m grpo merge", description="Merge a LoRA adapter into its base.")
    parser.add_argument("adapter", help="folder in PEFT's layout, for example runs/tiny/adapter, or embedded:v46")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--base", help="name or folder of the base (default: the adapter's own)")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="auto: each tensor's own in the base"
    )
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="measure against base + adapter"
    )
    parser.add_argument("--device", type=device_option, default="auto", help="of the check: auto, cpu, cuda, cuda:1")
    arguments = parser.parse_args(argv)
    try:
        with tqdm(unit="B", unit_scale=True, desc="merge", leave=False, delay=1) as bar:

            def advance(written: int, total: int) -> None:
                bar.total = total
                bar.update(written)

            merged = merge(
                resolve(arguments.adapter),
                arguments.out,
                base=arguments.base,
                dtype=arguments.dtype,
                max_shard_bytes=parse_size(arguments.max_shard_size),
                check=arguments.check,
                device=arguments.device,
                progress=advance,
            )
    except INPUT_ERRORS as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was left behind", file=sys.stderr)
        return 130
    print("\n".join(visible(line) for line in report(merged).splitlines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
