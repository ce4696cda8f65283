"""Base, tokenizer and LoRA: loading them, telling them apart, and rendering prompts through the chat template.

The reference is never a second model. It is the base with the adapter disabled, or the same weights with the adapter's
tensors swapped for those it started from.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grpo.adapter import AdapterError, readable, refuse_merged_twice
from grpo.config import Lora, Model, embedded, resolve
from grpo.plan import RANDOM, frozen_parameters
from grpo.types import Case, Prompt

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Qwen ends a turn with the first and a document with the second. A sampler that knows only one runs to the cap."""
ODD_BUT_EXACT = ("use_rslora", "alpha_pattern", "rank_pattern", "layers_to_transform")
"""Keys of an adapter's config that are not trained or run here, but that a merge takes exactly as PEFT does."""
_SLOT = "\ue000CASE\ue001"
"""Stands for the narrative while the chat template is rendered: private-use characters no template holds."""


class ModelError(ValueError):
    """A model or an adapter that cannot be used: says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The trainable model and what is needed to speak with it."""

    model: Any
    """`peft.PeftModel` around the frozen base."""
    tokenizer: Any
    end_ids: tuple[int, ...]
    device: torch.device
    context: int
    """Positions the base was made for."""

    @property
    def body(self) -> Any:
        """The decoder without its head, adapter layers included: ids → last hidden states."""
        return self.model.get_base_model().base_model

    @property
    def head(self) -> Any:
        """The output embedding: last hidden states → logits. Frozen, and never adapted."""
        return self.model.get_base_model().get_output_embeddings()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by name, in a fixed order. fp32 masters."""
        return {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}


def load_policy(model: Model, lora: Lora, *, seed: int) -> Policy:
    """Base + adapter on their device, ready to sample and to train.

    Raises:
        ModelError: the base is not on this machine, the adapter belongs to another base, disagrees with ``[lora]``,
            or is loaded without any effect on the logits.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    device = pick_device(model.device)
    base, tokenizer = load_base(model.name, device=device, dtype=pick_dtype(model.dtype, device))
    _check_targets(base, lora)
    if lora.warm_start:
        folder = resolve(lora.warm_start)
        check_adapter(folder, lora, model.name)
        with _named(folder, "adapter"):
            wrapped = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        _check_tensors(folder, wrapped)
        _set_dropout(wrapped, lora.dropout)
    else:
        torch.manual_seed(seed)
        wrapped = get_peft_model(
            base,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.eval()
    config = base.config.get_text_config()
    policy = Policy(wrapped, tokenizer, end_ids(tokenizer, base), device, config.max_position_embeddings)
    _check_head(policy)
    if lora.warm_start:
        _check_effect(policy, folder)
    return policy


def missing_parts(model: Model, lora: Lora) -> tuple[str, ...]:
    """One line for each part of the policy that is not on this machine: looked up, not loaded."""
    from transformers.utils import cached_file

    faults = []
    try:
        _refuse_adapter(model.name)
        if model.name not in RANDOM and not cached_file(_where(model.name), "config.json", local_files_only=True):
            faults.append(_not_here(model.name))
    except ModelError as error:
        faults.append(str(error))
    except (OSError, ValueError):
        faults.append(_not_here(model.name))
    if lora.warm_start and not (resolve(lora.warm_start) / "adapter_config.json").is_file():
        faults.append(
            f"lora.warm_start: {resolve(lora.warm_start) / 'adapter_config.json'}: cannot be read: no such file"
        )
    return tuple(faults)


def _where(name: str) -> str:
    return str(resolve(name)) if embedded(name) or Path(name).expanduser().exists() else name


def _not_here(name: str) -> str:
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
    if name in RANDOM:
        from grpo.random_base import random_base

        need, free = frozen_parameters(RANDOM[name]) * dtype.itemsize, free_bytes(device)
        if need > free:
            raise ModelError(
                f"model.name = {name!r}: {need:,} bytes of weights do not fit the {free:,} that {device} has free"
            )

        base, tokenizer = random_base(name, device=device, dtype=dtype)
        return base.requires_grad_(False), tokenizer
    _refuse_adapter(name)
    tokenizer = load_tokenizer(name)
    with _loading(name):
        base = AutoModelForCausalLM.from_pretrained(_where(name), dtype=dtype, local_files_only=True)
    base.requires_grad_(False)
    return base.to(device), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base, from files on this machine."""
    from transformers import AutoTokenizer

    if name in RANDOM:
        from grpo.random_base import random_tokenizer

        return random_tokenizer()
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(_where(name), local_files_only=True)
    if tokenizer.chat_template is None:
        raise ModelError(f"model.name = {name!r}: its tokenizer has no chat template, so no prompt can be rendered")
    return tokenizer


def context_of(name: str) -> int:
    """Positions a base was made for, by its config alone."""
    from transformers import AutoConfig

    if name in RANDOM:
        from grpo.random_base import text_config

        return int(text_config(RANDOM[name]).max_position_embeddings)
    with _loading(name):
        config = AutoConfig.from_pretrained(_where(name), local_files_only=True)
    return int(config.get_text_config().max_position_embeddings)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        here = resolve(name)
        if not (here / "config.json").is_file() and (here.is_dir() or isinstance(error, OSError)):
            raise ModelError(f"{_not_here(name)} ({said})") from None
        raise ModelError(f"model.name = {name!r}: its files cannot be loaded: {said}") from None


def _refuse_adapter(name: str) -> None:
    """transformers would load an adapter's base, put the adapter on it, and say nothing of either."""
    from transformers.utils import cached_file

    try:
        found = cached_file(_where(name), "adapter_config.json", local_files_only=True)
    except (OSError, ValueError):
        found = None
    if found is None:
        return
    raise ModelError(
        f"model.name = {name!r}: holds an adapter (adapter_config.json), and a model is expected here: name its base, "
        f"and the adapter as lora.warm_start or --adapter"
    )


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is a device, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f'model.device = "{name}": no CUDA device here; use "auto" or "cpu"')
    device = torch.device(name)
    if (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ModelError(f'model.device = "{name}": this machine has {torch.cuda.device_count()} CUDA device(s)')
    return device


def free_bytes(device: torch.device) -> int:
    """Of the device's memory, what PyTorch has reserved and does not use included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def end_ids(tokenizer: Any, base: Any) -> tuple[int, ...]:
    """Every id that ends a completion: what the generation config and the tokenizer name, and both of Qwen's."""
    named = base.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    ids.discard(None)
    if not ids:
        raise ModelError("neither the tokenizer nor the generation config names an end token")
    return tuple(sorted(ids))


def render_prompt(tokenizer: Any, case: Case, *, system_prompt: str, thinking: bool) -> Prompt:
    """The chat up to where the answer begins, as ids. Control tokens come from the template alone: a narrative that
    contains ``<|im_end|>`` or ``<think>`` reaches the model as those characters.

    The narrative is encoded by itself, between the template's two halves; for ordinary text that gives the ids of
    encoding the whole chat at once.
    """
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": system_prompt}, {"role": "user", "content": _SLOT}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    before, slot, after = chat.partition(_SLOT)
    if not slot or _SLOT in after:
        raise ModelError("the chat template does not show the user's turn exactly once")
    opened = after.rstrip().endswith("<think>")
    ids = (*_encode(tokenizer, before), *encode_plain(tokenizer, case.text), *_encode(tokenizer, after))
    return Prompt(case, ids, opened)


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in which nothing is a control token: a control token's spelling is cut after its first character
    and encoded in pieces."""
    control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not any(token in text for token in control):
        return _encode(tokenizer, text)
    pattern = "|".join(re.escape(token) for token in control)
    cuts = [match.start() + 1 for match in re.finditer(f"(?=({pattern}))", text)]
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [i for piece in pieces for i in _encode(tokenizer, piece)]


@contextlib.contextmanager
def adapter_swapped(policy: Policy, tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside, the model speaks as the reference: with ``tensors`` in the adapter's place, or, for None, as the bare
    base. Outside, the adapter holds the very bits it held before."""
    if tensors is None:
        with policy.model.disable_adapter():
            yield
        return
    own = {name: p.detach().clone() for name, p in policy.trainable().items()}
    _copy_in(policy, tensors)
    try:
        yield
    finally:
        _copy_in(policy, own)


def adapter_copy(policy: Policy) -> dict[str, Tensor]:
    """The adapter's tensors as they are now."""
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def save_adapter(policy: Policy, folder: Path) -> None:
    """Writes the adapter in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    # "auto" would ask the hub whether the vocabulary grew; `lm_head` and embeddings are never trained here
    policy.model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card: the run writes its own
    config = folder / "adapter_config.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    told["target_modules"] = sorted(told["target_modules"])  # PEFT holds a set: in another order in every process
    config.write_text(json.dumps(told, indent=2, sort_keys=True), encoding="utf-8")


def _copy_in(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.copy_(tensors[name])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _set_dropout(wrapped: Any, p: float) -> None:
    """The config's dropout, whatever the warm start was trained with."""
    for name, module in wrapped.named_modules():
        if name.endswith("lora_dropout"):
            for key in module:
                module[key] = nn.Dropout(p) if p else nn.Identity()


def _check_targets(base: Any, lora: Lora) -> None:
    """Every target names a linear layer of the decoder: a typo would silently train less than the config says."""
    linear = {name.rpartition(".")[2] for name, m in base.base_model.named_modules() if isinstance(m, nn.Linear)}
    if unknown := sorted(set(lora.target_modules) - linear):
        raise ModelError(
            f"lora.target_modules: {', '.join(unknown)}: no such linear layer in the decoder (`lm_head` is never "
            f"adapted); it has {', '.join(sorted(linear))}"
        )


def check_adapter(folder: Path, lora: Lora, base: str, *, key: str = "lora.warm_start") -> None:
    """Refuses an adapter that is not what ``[lora]`` says, is more than plain LoRA of one rank, was made for another
    base, or is in the base's weights already. Reads its config and the names and shapes of its tensors, and the
    tensors themselves where the base is a merged one.

    Args:
        key: what named it, for the message.

    Raises:
        ModelError: says which, and what to do.
    """
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{key}: {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{key}: {path}: not valid JSON: {_first_line(error)}") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise ModelError(f"{key}: {path}: not a LoRA adapter")
    wanted = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": sorted(lora.target_modules)}
    targets = found.get("target_modules")
    there = {**found, "target_modules": sorted(targets) if isinstance(targets, list) else targets}
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ModelError(f"{key}: {path}: {name} is {there.get(name)!r}, [lora] says {value!r}")
    own = found.get("base_model_name_or_path")
    if isinstance(own, str) and HUB_ID.fullmatch(own) and HUB_ID.fullmatch(base) and own != base:
        raise ModelError(f"{key}: {path}: made for the base {own}, model.name says {base}")
    if odd := [name for name in (*ODD_BUT_EXACT, "use_dora", "modules_to_save") if found.get(name)]:
        way_out = "; `python -m grpo.merge` makes full weights of it, which are" if {*odd} <= {*ODD_BUT_EXACT} else ""
        raise ModelError(
            f"{key}: {path}: {', '.join(odd)}: only plain LoRA of one rank is trained or run here{way_out}"
        )
    if found.get("bias", "none") != "none":
        raise ModelError(f"{key}: {path}: trains biases; only plain LoRA weights are trained or run here")
    try:
        _check_rank(folder / "adapter_model.safetensors", lora.r)
        refuse_merged_twice(base, folder)
    except AdapterError as error:
        raise ModelError(f"{key}: {error}") from None


def _check_rank(path: Path, r: int) -> None:
    """The file's own rank, by its header: PEFT makes the tensors that the config asks for before it reads the file."""
    with readable(path) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            shape = file.get_slice(name).get_shape()
            if ".lora_A." in name and list(shape)[:1] != [r]:
                raise AdapterError(f"{path}: {name} has shape {tuple(shape)}, r is {r}")


def _check_tensors(folder: Path, wrapped: Any) -> None:
    """Every LoRA tensor of the model must come from the file, and every tensor of the file must have its place."""
    path = folder / "adapter_model.safetensors"
    with _named(folder, "adapter"), safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    expected = {n.replace(".default.", "."): tuple(p.shape) for n, p in wrapped.named_parameters() if "lora_" in n}
    if wrong := sorted(set(shapes) ^ set(expected)) or [k for k in expected if shapes[k] != expected[k]]:
        raise ModelError(
            f"lora.warm_start: {path}: made for another base: {len(wrong)} tensors differ in name or "
            f"shape, first {wrong[0]}"
        )


@contextlib.contextmanager
def _named(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"lora.warm_start: {what} {folder}: cannot be loaded on this base: {_first_line(error)}"
        ) from None


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Sampling and loss know a model as body and head. One that caps or scales the head's products is another."""
    ids = torch.tensor([_encode(policy.tokenizer, "ESI")], device=policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits
    ours = policy.head(policy.body(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits, ours.to(logits.dtype), rtol=1e-2, atol=1e-2):
        kind = type(policy.model.get_base_model()).__name__
        raise ModelError(
            f"{kind}: its logits are not the products of its head: a softcapping or a scale stands between, which "
            f"training here does not know. Turn it off in the model's config.json, or take another base"
        )


@torch.no_grad()
def _check_effect(policy: Policy, folder: Path) -> None:
    """An adapter can load without an error and without an effect, when its module names match nothing that runs."""
    ids = torch.tensor([_encode(policy.tokenizer, "ESI triage: chest pain, 120/58.")], device=policy.device)
    with_adapter = policy.body(input_ids=ids, use_cache=False).last_hidden_state
    with policy.model.disable_adapter():
        without = policy.body(input_ids=ids, use_cache=False).last_hidden_state
    if torch.equal(with_adapter, without):
        raise ModelError(
            f"lora.warm_start: {folder}: loads, but changes nothing: its weights are zero or not connected"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
