"""Load a base model and its tokenizer from this machine: nothing is downloaded, and no code of theirs is run."""

import argparse
import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grpo.config import resolve_path
from grpo.policy.memory_plan import RANDOM_SHAPES, base_parameter_count
from grpo.policy.optional_kernels import guard_optional_kernels
from grpo.runtime.tensor_files import read_tensor_header
from rewards.safe_files import MEBIBYTE, InvalidFile, is_regular, read_json

# read when transformers is first imported: no downloads, no telemetry, no kernels from the hub, whatever a model sets
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")

from huggingface_hub.errors import StrictDataclassError

from grpo.runtime.errors import UserError

LOAD_ERRORS = (
    OSError, SafetensorError, StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
)  # fmt: skip
"""Exceptions that transformers and its dependencies raise for invalid model files."""
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""RuntimeErrors caused by the device, not by a file."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLE_GLOBS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_JSON_BYTES = 256 * MEBIBYTE
"""Size limit of a model's JSON files; a tokenizer.json takes about 20 MB."""


def load_base(name: str, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the frozen base and its tokenizer.

    A checkpoint in the multimodal layout (text model beside a vision tower) gives its text model. A name in
    `RANDOM_SHAPES` reads no weights.
    """
    from transformers import AutoModelForCausalLM

    if device.type == "cuda":
        prepare_cuda(device)
    if name in RANDOM_SHAPES:
        from grpo.policy.random_model import build_random_model

        need, memory = base_parameter_count(RANDOM_SHAPES[name]) * dtype.itemsize, host_memory()
        if device.type == "cpu" and need > memory:  # CUDA reports that it is out of memory; a CPU would swap
            raise UserError(f"model.name = {name!r}: needs {need:,} bytes for its weights; this machine has {memory:,}")
        base, tokenizer = build_random_model(name, device=device, dtype=dtype)
    else:
        check_is_not_adapter(name)
        tokenizer = load_tokenizer(name)
        with loading_errors(name) as source:
            base, _ = load_weights(AutoModelForCausalLM, source, device=device, dtype=dtype)
    guard_optional_kernels(base)
    return base.requires_grad_(False), tokenizer


def host_memory() -> int:
    """Return the physical memory of this machine [bytes]."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_weights(
    model_class: Any, source: str, *, device: torch.device, dtype: torch.dtype | str
) -> tuple[Any, set[str]]:
    """Return a model of a transformers class with the weights of ``source``, a folder or hub id, and the tensors of the
    files that it does not use, except those that its class ignores on purpose. To be called inside `loading_errors`.

    Unlike transformers, refuse files that lack a weight instead of drawing it at random."""
    from transformers.utils import logging

    # PEFT still calls what transformers 6 will rename; not actionable for users
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    logging.set_verbosity_error()  # its notes on missing fused kernels repeat on every start
    logging.disable_progress_bar()
    model, info = model_class.from_pretrained(
        source,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        device_map={"": device},  # directly: in host memory, every rank would hold a copy of its own first
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"no weights for {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
    return model, set(info["unexpected_keys"])


def prepare_cuda(device: torch.device) -> None:
    """Make a CUDA device the current one, and disable kernels that are slow or imprecise for this program."""
    torch.cuda.set_device(device)  # CUDA graphs and Triton use the current device only
    # On sm_90, torch >= 2.11 prefers cuDNN attention. It builds a plan for each new shape, which here is every step,
    # and with an explicit mask its gradient is NaN at lengths of 64 mod 128 (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Split-K products would round their partial sums to half precision.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a base; it must have a chat template."""
    from transformers import AutoTokenizer

    if name in RANDOM_SHAPES:
        from grpo.policy.random_model import load_random_tokenizer

        return load_random_tokenizer()
    with loading_errors(name) as source:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise UserError(f"model.name = {name!r}: its tokenizer has no chat template, so no prompt can be rendered")
    return tokenizer


def read_context_length(name: str) -> int:
    """Return the context length of a base, from its config alone."""
    from transformers import AutoConfig

    if name in RANDOM_SHAPES:
        from grpo.policy.random_model import qwen3_5_config

        return int(qwen3_5_config(RANDOM_SHAPES[name]).max_position_embeddings)
    with loading_errors(name) as source:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return int(config.get_text_config().max_position_embeddings)


def local_path_or_name(name: str) -> str:
    """Return the folder of a model if it exists; else its name, which the loaders look up in the hub's local cache."""
    folder = resolve_path(name)
    return str(folder) if os.path.exists(folder) else name


def model_folder(name: str) -> Path:
    """Return the folder with a base's files on this machine."""
    from transformers.utils import cached_file

    with loading_errors(name) as source:
        return Path(str(cached_file(source, "config.json", local_files_only=True))).parent


def missing_model_message(name: str) -> str:
    """Return why a name is not a model on this machine, and what to do."""
    if name.startswith("random:"):
        return f"model.name = {name!r}: no such random model; choose from {', '.join(RANDOM_SHAPES)}"
    if resolve_path(name).is_dir():
        return f"model.name = {name!r}: not a model: the folder has no config.json"
    if not HUB_ID.fullmatch(name):
        return f"model.name = {name!r}: no such folder, and not a hub id of the form owner/name"
    return (
        f"model.name = {name!r}: not on this machine, and this program downloads nothing. Fetch it once with "
        f"`hf download {name}`, or set model.name to a folder with config.json, tokenizer and safetensors"
    )


@contextlib.contextmanager
def loading_errors(name: str) -> Iterator[str]:
    """Check a model's folder with `check_model_files`, provide what to pass to the loaders, and turn their errors into
    UserErrors."""
    from transformers.utils import cached_file

    source = local_path_or_name(name)
    try:
        config = cached_file(source, "config.json", local_files_only=True)
        if config is not None:
            check_model_files(Path(str(config)).parent)
        yield source
    except DEVICE_ERRORS:
        raise
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        folder = resolve_path(name)
        if not is_regular(folder / "config.json") and (folder.is_dir() or isinstance(error, OSError)):
            raise UserError(f"{missing_model_message(name)} ({reason})") from None
        raise UserError(f"model.name = {name!r}: its files cannot be loaded: {reason}") from None


def check_is_not_adapter(name: str) -> None:
    """Raise UserError if a model is an adapter: transformers would silently load its base with the adapter on it."""
    from transformers.utils import cached_file

    try:
        config = cached_file(local_path_or_name(name), "adapter_config.json", local_files_only=True)
    except (OSError, ValueError):
        return
    if config is not None:
        raise UserError(
            f"model.name = {name!r}: is an adapter (adapter_config.json); expected a model. Pass its base here, and "
            f"the adapter as lora.warm_start or --adapter"
        )


def check_model_files(folder: Path) -> None:
    """Check a model's folder before a library opens it: no pickles, no remote code, no pipes, no oversized or deeply
    nested JSON, no invalid safetensors header, no index that refers to files elsewhere.

    Raises:
        UserError: names the file.
    """
    for file in folder.glob("*"):
        if file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model") and not is_regular(file):
            raise UserError(f"{file.name} is not a regular file")
    if not any(folder.glob("*.safetensors")) and any(any(folder.glob(pattern)) for pattern in PICKLE_GLOBS):
        raise UserError("pickles (.bin) can run code and are never opened; save the model as safetensors")
    file = folder
    try:
        for file in sorted(folder.glob("*.json")):
            table = read_json(file, most=MAX_JSON_BYTES, foreign=True)
            if isinstance(table, dict) and (key := _remote_code_key(table)):
                raise UserError(f"{file.name}: requests remote code ({key}), which is never run here")
            if file.name.endswith(".index.json") and isinstance(table, dict):
                _check_index(file, table.get("weight_map"))
        for file in sorted(folder.glob("*.safetensors")):
            read_tensor_header(file)
    except InvalidFile as error:
        raise UserError(f"{file.name}: {error}") from None


def _check_index(file: Path, weight_map: object) -> None:
    files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and name == Path(name).name for name in files):
        raise UserError(f"{file.name}: weight_map must give a file of the same folder for each tensor")


def _remote_code_key(table: Mapping[str, Any]) -> str:
    """Return the key of a config that would make a library load code (its own, or a kernel of the hub), or ""."""
    if table.get("auto_map"):
        return "auto_map"
    for key, value in table.items():
        if key.endswith("attn_implementation") and "/" in str(value):
            return key
        if isinstance(value, dict) and key.endswith("_config") and (inner := _remote_code_key(value)):
            return inner
    return ""


def resolve_device(name: str, *, cards: int | None = None) -> torch.device:
    """Return the device for ``model.device``: ``auto`` is the current CUDA device if there is one, else the CPU. A CUDA
    device always has an index, which `torch.cuda.set_device` requires.

    Args:
        cards: number of CUDA devices; None asks torch.

    Raises:
        UserError: no such device on this machine.
    """
    if cards is None:
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not cards):
        return torch.device("cpu")
    if not cards:
        raise UserError(f'model.device = "{name}": no CUDA device here; use "auto" or "cpu"')
    index = None if name == "auto" else torch.device(name).index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    if index >= cards:
        raise UserError(f'model.device = "{name}": this machine has {cards} CUDA device(s)')
    return torch.device("cuda", index)


def device_option(name: str) -> str:
    """Parse a ``--device`` option: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise argparse.ArgumentTypeError(f"{name!r}: expected auto, cpu, cuda or cuda:N")
    return name


def card_name(device: torch.device) -> str:
    """Return the name of a CUDA device's hardware, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for ``model.dtype``: ``auto`` is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
