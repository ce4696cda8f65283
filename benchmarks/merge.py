"""Peak memory and time of merging a model of several gigabytes.

    python benchmarks/merge.py --gigabytes 5 --record benchmarks/merge.json

Writes a Qwen3.5 of full width with random bfloat16 weights in shards of a gigabyte, and a LoRA adapter of the card's
shape, into a temporary folder; merges them in a child process without the logit check; checks a few weights against the
formula; deletes everything. The peak is the child's largest resident set (Linux' VmHWM), which counts the pages of the
base that are mapped.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from grpo.config import EMBEDDED

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARD = 10**9
RANK, ALPHA = 32, 16
VOCABULARY = 32_000


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of a weight's size, the same for the same seed; a drawn block repeated, for the time's sake."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1 << 20, generator=generator).mul_(0.02).to(dtype)
    count = torch.Size(shape).numel()
    return block.repeat(-(-count // len(block)))[:count].reshape(shape).clone()


def make_base(folder: Path, gigabytes: float) -> dict[str, torch.Size]:
    """Shards of a full-width model with as many layers as the size allows; its tensors' shapes."""
    layer_bytes = 0.43e9  # of a layer in bfloat16
    layers = max(4, 4 * round((gigabytes * 1e9 - 4 * VOCABULARY * 4096) / layer_bytes / 4))
    config = Qwen3_5TextConfig(num_hidden_layers=layers, vocab_size=VOCABULARY, dtype="bfloat16")
    config.architectures = ["Qwen3_5ForCausalLM"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir()
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / "base" / name, folder)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + 2 * shape.numel() > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * shape.numel()
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    seeds = {name: i for i, name in enumerate(shapes)}
    for file, names in zip(files, shards, strict=True):
        save_file({n: draw(tuple(shapes[n]), torch.bfloat16, seeds[n]) for n in names}, folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shapes


def make_adapter(folder: Path, base: Path, shapes: dict[str, torch.Size]) -> int:
    """An adapter of the card's shape; how many modules it speaks of."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    tensors: dict[str, torch.Tensor] = {}
    modules = [n.removesuffix(".weight") for n in shapes if n.removesuffix(".weight").endswith(TARGETS)]
    for i, module in enumerate(modules):
        rows, columns = shapes[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw((RANK, columns), torch.float32, 10_000 + 2 * i)
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw((rows, RANK), torch.float32, 10_001 + 2 * i)
    save_file(tensors, folder / "adapter_model.safetensors")
    return len(modules)


def one(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a sharded model."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[name], framework="pt") as file:
        return file.get_tensor(name).clone()


def check(base: Path, adapter: Path, out: Path, modules: list[str]) -> None:
    """The written weights are round(W + alpha/r · B A), to the bit."""
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for module in modules:
            a, b = (file.get_tensor(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
            wanted = (one(base, f"{module}.weight").float() + ALPHA / RANK * (b @ a)).bfloat16()
            off = (one(out, f"{module}.weight") != wanted).float().mean()
            assert off < 1e-3, f"{module}: {off:.2%} of its weights are not the formula's"


def child(statement: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python process that runs a statement."""
    report = "; print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", statement + report], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, int(done.stdout.split()[-1]) * 1024


def measure(root: Path, gigabytes: float) -> dict[str, Any]:
    """The record of one merge."""
    base, adapter, out = root / "base", root / "adapter", root / "merged"
    shapes = make_base(base, gigabytes)
    modules = make_adapter(adapter, base, shapes)
    files = sorted(base.glob("*.safetensors"))
    arguments = [str(adapter), "--out", str(out), "--no-check", "--max-shard-size", "1GB"]
    _, floor = child("import grpo.commands.merge, peft, transformers.models.qwen3_5.modeling_qwen3_5")
    load = os.getloadavg()[0]
    seconds, peak = child(f"from grpo.commands.merge import main; assert main({arguments!r}) == 0")
    names = [n.removesuffix(".weight") for n in shapes if n.removesuffix(".weight").endswith(TARGETS)]
    check(base, adapter, out, [names[0], names[len(names) // 2], names[-1]])
    largest = max(file.stat().st_size for file in files)
    return {
        "base_bytes": sum(file.stat().st_size for file in files),
        "base_shards": len(files),
        "largest_shard_bytes": largest,
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "modules": modules,
        "merged_shards": len(list(out.glob("*.safetensors"))),
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "imports_alone_bytes": floor,
        "peak_above_imports_in_shards": round((peak - floor) / largest, 2),
        "load_average_before": round(load, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--record", type=Path)
    parser.add_argument(
        "--scratch", type=Path, help="where the files are made (default: the system's temporary folder)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as root:
        figures = measure(Path(root), arguments.gigabytes)
    facts = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "peft")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **figures,
    }
    print(json.dumps(facts, indent=1))
    if arguments.record:
        arguments.record.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
