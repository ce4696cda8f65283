"""Base and tokenizer: found on this machine, looked through, loaded. Nothing is downloaded, nothing of them is run."""

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

from grpo.config import resolve
from grpo.policy.memory_plan import RANDOM, frozen_parameters
from grpo.policy.optional_kernels import guard_optional_kernels
from grpo.runtime.free_memory import free_bytes
from grpo.runtime.tensor_files import declared
from rewards.safe_files import MEBIBYTE, Unreadable, is_regular, read_json

# read when transformers is first imported: nothing is downloaded, asked for or told, whatever a model's files say
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")

from huggingface_hub.errors import StrictDataclassError

from grpo.runtime.errors import UserError

LOAD_ERRORS = (
    OSError, SafetensorError, StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
)  # fmt: skip
"""What transformers and the libraries below it raise over a model's files."""
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""RuntimeErrors that are the device's and say nothing of a file."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MOST_TOKENIZER = 256 * MEBIBYTE


def load_base(name: str, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The frozen base and its tokenizer, from files on this machine: nothing is ever downloaded.

    A checkpoint in the multimodal layout (text model beside a vision tower) gives its text model. A name in `RANDOM`
    reads no weights at all.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # PEFT still calls what transformers 6 will rename; nothing a user could act on
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    logging.set_verbosity_error()  # its notes on missing fused kernels repeat on every start; `plan` says what matters
    logging.disable_progress_bar()
    if device.type == "cuda":
        prepare_cuda(device)
    if name in RANDOM:
        from grpo.policy.random_model import random_base

        need, free = frozen_parameters(RANDOM[name]) * dtype.itemsize, free_bytes(device)
        if need > free:
            raise UserError(
                f"model.name = {name!r}: {need:,} bytes of weights do not fit the {free:,} that {device} has free"
            )

        base, tokenizer = random_base(name, device=device, dtype=dtype)
        guard_optional_kernels(base)
        return base.requires_grad_(False), tokenizer
    refuse_adapter(name)
    tokenizer = load_tokenizer(name)
    with _loading(name) as where:
        base = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            device_map={"": device},  # not into the host's memory first, where each rank would hold 18 GB
        )
    guard_optional_kernels(base)
    return base.requires_grad_(False), tokenizer


def prepare_cuda(device: torch.device) -> None:
    """Make a card the current one and set what the recipe's numbers depend on."""
    torch.cuda.set_device(device)  # graphs are captured, and Triton launches, on the current device alone
    # On sm_90 torch >= 2.11 asks cuDNN's attention first. It builds a plan for every new shape, which is every step
    # here, and with an explicit mask its gradient is NaN at lengths of 64 mod 128 (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Split-K products would round their partial sums to half precision.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base, from files on this machine."""
    from transformers import AutoTokenizer

    if name in RANDOM:
        from grpo.policy.random_model import random_tokenizer

        return random_tokenizer()
    with _loading(name) as where:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise UserError(f"model.name = {name!r}: its tokenizer has no chat template, so no prompt can be rendered")
    return tokenizer


def context_of(name: str) -> int:
    """Positions a base was made for, by its config alone."""
    from transformers import AutoConfig

    if name in RANDOM:
        from grpo.policy.random_model import text_config

        return int(text_config(RANDOM[name]).max_position_embeddings)
    with _loading(name) as where:
        config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    return int(config.get_text_config().max_position_embeddings)


def found_at(name: str) -> str:
    """What the loaders are given for a model's name: its folder where there is one, else the name, for the cache."""
    folder = resolve(name)
    return str(folder) if os.path.exists(folder) else name


def not_here(name: str) -> str:
    """Why a name is no model on this machine, and what to do."""
    if name.startswith("random:"):
        return f"model.name = {name!r}: no such random model; there are {', '.join(RANDOM)}"
    if resolve(name).is_dir():
        return f"model.name = {name!r}: holds no config.json, so it is no model"
    if not HUB_ID.fullmatch(name):
        return f"model.name = {name!r}: no such folder, and not a hub id of the form owner/name"
    return (
        f"model.name = {name!r}: not on this machine, and this program downloads nothing. Fetch it once with "
        f"`hf download {name}`, or set model.name to a folder that holds config.json, tokenizer and safetensors"
    )


@contextlib.contextmanager
def _loading(name: str) -> Iterator[str]:
    """What the loaders are to be given, once nothing in it is what they would obey (see `check_base`)."""
    from transformers.utils import cached_file

    where = found_at(name)
    try:
        found = cached_file(where, "config.json", local_files_only=True)
        if found is not None:
            check_base(Path(str(found)).parent)
        yield where
    except DEVICE_ERRORS:
        raise
    except LOAD_ERRORS as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        here = resolve(name)
        if not is_regular(here / "config.json") and (here.is_dir() or isinstance(error, OSError)):
            raise UserError(f"{not_here(name)} ({said})") from None
        raise UserError(f"model.name = {name!r}: its files cannot be loaded: {said}") from None


def refuse_adapter(name: str) -> None:
    """transformers would load an adapter's base, put the adapter on it, and say nothing of either."""
    from transformers.utils import cached_file

    try:
        found = cached_file(found_at(name), "adapter_config.json", local_files_only=True)
    except (OSError, ValueError):
        found = None
    if found is None:
        return
    raise UserError(
        f"model.name = {name!r}: holds an adapter (adapter_config.json), and a model is expected here: name its base, "
        f"and the adapter as lora.warm_start or --adapter"
    )


def check_base(folder: Path) -> None:
    """What the libraries would obey, wait for or unpickle in a model's folder is refused before they see it.

    Raises:
        UserError: names the file.
    """
    for file in folder.glob("*"):
        if file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model") and not is_regular(file):
            raise UserError(f"{file.name} is no file")
    if not any(folder.glob("*.safetensors")) and any(any(folder.glob(kind)) for kind in PICKLES):
        raise UserError("pickles (.bin) can run code and are never opened: have the model saved as safetensors")
    file = folder
    try:
        for file in sorted(folder.glob("*.json")):
            table = read_json(file, most=MOST_TOKENIZER, foreign=True)
            if isinstance(table, dict) and (named := _names_code(table)):
                raise UserError(f"{file.name}: {named} asks for code, which no model brings along here")
        for file in sorted(folder.glob("*.safetensors")):
            declared(file)
    except Unreadable as error:
        raise UserError(f"{file.name}: {error}") from None


def _names_code(table: Mapping[str, Any]) -> str:
    """The key of a config that would have a library load code: its own, or a kernel of the hub."""
    if table.get("auto_map"):
        return "auto_map"
    for key, value in table.items():
        if key.endswith("attn_implementation") and "/" in str(value):
            return key
        if isinstance(value, dict) and key.endswith("_config") and (inner := _names_code(value)):
            return inner
    return ""


def pick_device(name: str, *, cards: int | None = None) -> torch.device:
    """Return the device that ``model.device`` names: ``auto`` is the current CUDA device where there is one, else the
    CPU. A CUDA device always comes with its index: `torch.cuda.set_device` refuses one without.

    Args:
        cards: CUDA devices of this machine; None asks torch.

    Raises:
        UserError: this machine has no such device.
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
    """Return the value of a ``--device`` option.

    Raises:
        ArgumentTypeError: it names no device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise argparse.ArgumentTypeError(f"{name!r}: expected auto, cpu, cuda or cuda:N")
    return name


def card_name(device: torch.device) -> str:
    """Return the model of a CUDA card, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
