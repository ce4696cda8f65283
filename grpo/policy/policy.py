"""The policy: a frozen base with a LoRA adapter.

The reference is never a second model: it is the base with the adapter disabled, or the base with the adapter's initial
tensors swapped in.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config import LoraSection, ModelSection, resolve_path
from grpo.policy.adapter_files import (
    check_lora_tensors,
    check_not_merged_already,
    check_same_base,
    load_adapter,
    read_adapter_config,
)
from grpo.policy.base_model import (
    check_is_not_adapter,
    load_base,
    local_path_or_name,
    missing_model_message,
    resolve_device,
    resolve_dtype,
)
from grpo.policy.memory_plan import RANDOM_SHAPES
from grpo.policy.optional_kernels import allow_fla_in_layers
from grpo.prompts import encode, end_token_ids
from grpo.runtime.distributed import SINGLE_PROCESS, World
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import LOADING, memory_errors
from rewards.safe_files import is_regular, shorten

MERGE_ONLY_KEYS = ("use_rslora", "alpha_pattern", "rank_pattern", "layers_to_transform")
"""Keys of an adapter's config that are not supported in training, but that `grpo merge` handles."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Optional kernels to use on CUDA if they are available. `grpo.run.self_check` disables those that fail."""

    triton: bool = True
    """Decode with `grpo.qwen3_5.decode_ops_triton` instead of `grpo.qwen3_5.decode_ops`."""
    graphs: bool = True
    """Replay the decode step as a CUDA graph."""
    fla: bool = True
    """Train with the scan of flash-linear-attention instead of `grpo.qwen3_5.gated_delta_scan`."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The trainable model with its tokenizer and device."""

    model: Any
    """`peft.PeftModel` around the frozen base."""
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    device: torch.device
    context_length: int
    """Context length of the base [tokens]."""
    world: World = SINGLE_PROCESS
    """The processes that train this policy together."""
    kernels: Kernels = Kernels()

    @property
    def decoder(self) -> Any:
        """The decoder with its adapter layers, without the head: ids → last hidden states."""
        return self.model.get_base_model().base_model

    @property
    def lm_head(self) -> Any:
        """The output embedding: last hidden states → logits. Frozen, and never adapted."""
        return self.model.get_base_model().get_output_embeddings()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's fp32 parameters by name, in a fixed order."""
        return {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}


@memory_errors("loading the model", LOADING)
def load_policy(model: ModelSection, lora: LoraSection, *, seed: int, ranks: World = SINGLE_PROCESS) -> Policy:
    """Load base and adapter onto their device, ready to sample and to train.

    Raises:
        UserError: the base is not on this machine, or the adapter belongs to another base, contradicts ``[lora]``, or
            has no effect on the model.
    """
    allow_fla_in_layers(model.kernels == "auto")
    device = resolve_device(model.device) if ranks.device.type == "cpu" else ranks.device
    base, tokenizer = load_base(model.name, device=device, dtype=resolve_dtype(model.dtype, device))
    _check_targets(base, lora)
    if lora.warm_start:
        folder = resolve_path(lora.warm_start)
        check_adapter(folder, lora, model.name)
        try:
            wrapped = load_adapter(base, folder, device=device, is_trainable=True)
        except UserError as error:
            raise UserError(f"lora.warm_start: {error}") from None
        _set_dropout(wrapped, lora.dropout)
    else:
        wrapped = _fresh_adapter(base, lora, seed)
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.eval()
    config = base.config.get_text_config()
    policy = Policy(
        wrapped,
        tokenizer,
        end_token_ids(tokenizer, base),
        device,
        config.max_position_embeddings,
        ranks,
        kernels=Kernels(triton=model.kernels == "auto", fla=model.kernels == "auto"),
    )
    _check_head(policy)
    if lora.warm_start:
        _check_effect(policy, folder)
    return policy


def _fresh_adapter(base: Any, lora: LoraSection, seed: int) -> Any:
    """Wrap the base with a new adapter: A ~ U(-1/√i, 1/√i) for input width i, as in PEFT, and B = 0. It is drawn on the
    CPU in fp32, so that a seed gives the same adapter on every device and for every dtype of the base; PEFT would round
    it to that dtype."""
    from peft import LoraConfig, get_peft_model

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
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(wrapped.named_parameters()):
            if ".lora_A." in name:
                bound = p.shape[1] ** -0.5
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
    return wrapped


def missing_files(model: ModelSection, lora: LoraSection) -> tuple[str, ...]:
    """Return one message for each part of the policy that is not on this machine, without loading anything."""
    from transformers.utils import cached_file

    messages = []
    try:
        check_is_not_adapter(model.name)
        source = local_path_or_name(model.name)
        if model.name not in RANDOM_SHAPES and not cached_file(source, "config.json", local_files_only=True):
            messages.append(missing_model_message(model.name))
    except UserError as error:
        messages.append(str(error))
    except (OSError, ValueError):
        messages.append(missing_model_message(model.name))
    path = resolve_path(lora.warm_start) / "adapter_config.json"
    if lora.warm_start and not is_regular(path):
        messages.append(f"lora.warm_start: {path}: cannot be read: no such file")
    return tuple(messages)


@contextlib.contextmanager
def as_reference(policy: Policy, tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Context in which the policy is the reference: the adapter contains ``tensors``, or is disabled if None. On exit
    the adapter is restored bit for bit."""
    if tensors is None:
        with policy.model.disable_adapter():
            yield
        return
    trained = copy_adapter(policy)
    _copy_in(policy, tensors)
    try:
        yield
    finally:
        _copy_in(policy, trained)


def copy_adapter(policy: Policy) -> dict[str, Tensor]:
    """Return a copy of the adapter's tensors."""
    return {name: p.detach().clone() for name, p in policy.adapter_parameters().items()}


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    # "auto" would ask the hub whether the vocabulary grew; `lm_head` and embeddings are never trained here
    policy.model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the run writes one of its own
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT, ordered differently in each process
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _copy_in(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in policy.adapter_parameters().items():
            p.copy_(tensors[name])


def _set_dropout(wrapped: Any, p: float) -> None:
    """Set the dropout of the config, whatever the warm start was trained with."""
    for name, module in wrapped.named_modules():
        if name.endswith("lora_dropout"):
            for key in module:
                module[key] = nn.Dropout(p) if p else nn.Identity()


def _check_targets(base: Any, lora: LoraSection) -> None:
    """Check that each target is a linear layer of the decoder: PEFT would silently ignore a typo."""
    linear = {name.rpartition(".")[2] for name, m in base.base_model.named_modules() if isinstance(m, nn.Linear)}
    if unknown := sorted(set(lora.target_modules) - linear):
        raise UserError(
            f"lora.target_modules: {', '.join(unknown)}: no such linear layer in the decoder (`lm_head` is never "
            f"adapted); choose from {', '.join(sorted(linear))}"
        )


def check_adapter(folder: Path, lora: LoraSection, base: str, *, key: str = "lora.warm_start") -> None:
    """Check that an adapter is plain LoRA of one rank, matches ``[lora]`` and the base, and is not merged into it.

    Args:
        key: the config key or option that the adapter comes from, for the message.

    Raises:
        UserError: the first problem found, and what to do.
    """
    path = folder / "adapter_config.json"
    try:
        config = read_adapter_config(folder)
        targets = config.get("target_modules")
        if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
            targets = sorted(targets)
        recorded = {**config, "target_modules": targets}
        expected = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": sorted(lora.target_modules)}
        for name, value in expected.items():
            if recorded.get(name) != value:
                raise UserError(f"{path}: {name} is {shorten(recorded.get(name))}, but {value!r} in [lora]")
        check_same_base(path, config, base)
        unsupported = {name for name in (*MERGE_ONLY_KEYS, "layers_pattern", "exclude_modules") if config.get(name)}
        if unsupported:
            advice = "; convert it to full weights with `grpo merge`" if unsupported <= {*MERGE_ONLY_KEYS} else ""
            raise UserError(
                f"{path}: {', '.join(sorted(unsupported))}: only plain LoRA of one rank is supported{advice}"
            )
        check_lora_tensors(folder, config)
        check_not_merged_already(base, folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Check that logits = head(hidden states), as sampling and loss assume."""
    ids = torch.tensor([encode(policy.tokenizer, "ESI")], device=policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits
    products = policy.lm_head(policy.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits, products.to(logits.dtype), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{type(policy.model.get_base_model()).__name__}: logits ≠ lm_head(hidden states): the model applies "
            f"softcapping or scaling after the head, which is not supported. Disable it in config.json, or use another "
            f"base"
        )


@torch.no_grad()
def _check_effect(policy: Policy, folder: Path) -> None:
    """Check that a loaded adapter changes the hidden states."""
    ids = torch.tensor([encode(policy.tokenizer, "ESI triage: chest pain, 120/58.")], device=policy.device)
    adapted = policy.decoder(input_ids=ids, use_cache=False).last_hidden_state
    with policy.model.disable_adapter():
        plain = policy.decoder(input_ids=ids, use_cache=False).last_hidden_state
    if torch.equal(adapted, plain):
        raise UserError(
            f"lora.warm_start: {folder}: the adapter has no effect on the model: its weights are zero or its module "
            f"names do not match"
        )
