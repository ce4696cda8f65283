"""The policy: a frozen base with a LoRA adapter, checked against each other, and the reference it is held to.

The reference is never a second model. It is the base with the adapter disabled, or the same weights with the adapter's
tensors swapped for those it started from.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grpo.config import Lora, Model, resolve
from grpo.policy.adapter_files import read_config, readable, refuse_merged_twice
from grpo.policy.base_model import (
    DEVICE_ERRORS,
    HUB_ID,
    found_at,
    load_base,
    not_here,
    pick_device,
    pick_dtype,
    refuse_adapter,
)
from grpo.policy.memory_plan import RANDOM
from grpo.policy.optional_kernels import allow_fla_in_layers
from grpo.prompts import encode, end_ids
from grpo.runtime.distributed import ALONE, Ranks
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import LOADING, memory_errors
from grpo.runtime.tensor_files import declared
from rewards.safe_files import clipped, is_regular

ODD_BUT_EXACT = ("use_rslora", "alpha_pattern", "rank_pattern", "layers_to_transform")
"""Keys of an adapter's config that are not trained or run here, but that a merge takes exactly as PEFT does."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Which kernels run on CUDA beside torch's own, each only where it is available. `grpo.run.self_check` switches off
    those that fail."""

    triton: bool = True
    """Decode with `grpo.qwen3_5.decode_ops_triton` instead of `grpo.qwen3_5.decode_ops`."""
    graphs: bool = True
    """Replay the decode step as a CUDA graph."""
    fla: bool = True
    """Train through the scan of flash-linear-attention instead of `grpo.qwen3_5.gated_delta_scan`'s."""


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
    ranks: Ranks = ALONE
    """Who else holds this policy."""
    sharded: bool = False
    """The decoder layers' weights lie spread over the ranks: only the modules' own forward can read them, and every
    call of it is made by all ranks together."""
    kernels: Kernels = Kernels()

    @property
    def independent_ranks(self) -> Ranks:
        """The ranks, if their forward passes do not wait for each other: only then can they agree on an error in one.
        Of a sharded policy, this process alone."""
        return ALONE if self.sharded else self.ranks

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


@memory_errors("loading the model", LOADING)
def load_policy(model: Model, lora: Lora, *, seed: int, ranks: Ranks = ALONE) -> Policy:
    """Base + adapter on their device, ready to sample and to train. With ``model.shard`` and more than one rank, the
    base is read into the host's memory, and each rank's device gets its part.

    Raises:
        UserError: the base is not on this machine, the adapter belongs to another base, disagrees with ``[lora]``,
            or is loaded without any effect on the logits.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    allow_fla_in_layers(model.kernels == "auto")
    device = pick_device(model.device) if ranks.device.type == "cpu" else ranks.device
    shard = model.shard and ranks.size > 1
    here = torch.device("cpu") if shard else device
    base, tokenizer = load_base(model.name, device=here, dtype=pick_dtype(model.dtype, device))
    _check_targets(base, lora)
    if lora.warm_start:
        folder = resolve(lora.warm_start)
        check_adapter(folder, lora, model.name)
        with _named(folder, "adapter"):
            declared(folder / "adapter_model.safetensors")
        with _named(folder, "adapter"):
            # PEFT's own choice would be "cuda", which safetensors takes for card 0, whatever the base lies on
            wrapped = PeftModel.from_pretrained(base, str(folder), is_trainable=True, torch_device=str(here))
        _check_tensors(folder, wrapped)
        _set_dropout(wrapped, lora.dropout)
    else:
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
        init_adapter(wrapped, seed)
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.eval()
    config = base.config.get_text_config()
    policy = Policy(
        wrapped,
        tokenizer,
        end_ids(tokenizer, base),
        here,
        config.max_position_embeddings,
        ranks,
        kernels=Kernels(triton=model.kernels == "auto", fla=model.kernels == "auto"),
    )
    _check_head(policy)
    if lora.warm_start:
        _check_effect(policy, folder)
    return spread(policy, device) if shard else policy


@torch.no_grad()
def init_adapter(wrapped: Any, seed: int) -> None:
    """Draw every A from U(-1/√i, 1/√i), i its input width, as PEFT does, but on the CPU and in fp32: PEFT's own draw is
    rounded to the base's dtype. A seed gives the same adapter on every device and base dtype. B stays zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(wrapped.named_parameters()):
        if ".lora_A." in name:
            bound = p.shape[1] ** -0.5
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))


def spread(policy: Policy, device: torch.device) -> Policy:
    """The policy with its decoder layers' matrices cut into as many parts as there are ranks (FSDP2), one on each
    rank's device; a layer is put together while it computes. Adapter, embeddings, head and all that is small stay
    whole on every rank, so that gradients, optimiser and checkpoints are those of an unsharded run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    body = policy.body
    matrices = {p for p in body.layers.parameters() if not p.requires_grad and p.ndim == 2}
    whole = {p for p in policy.model.parameters() if p not in matrices}
    mesh = init_device_mesh(device.type, (policy.ranks.size,))
    for layer in body.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(body, mesh=mesh, ignored_params=whole)
    with torch.no_grad():
        for p in whole:
            p.data = p.data.to(device)
        for buffer in policy.model.buffers():
            buffer.data = buffer.data.to(device)
    return replace(policy, device=device, sharded=True)


def missing_parts(model: Model, lora: Lora) -> tuple[str, ...]:
    """One line for each part of the policy that is not on this machine: looked up, not loaded."""
    from transformers.utils import cached_file

    faults = []
    try:
        refuse_adapter(model.name)
        if model.name not in RANDOM and not cached_file(found_at(model.name), "config.json", local_files_only=True):
            faults.append(not_here(model.name))
    except UserError as error:
        faults.append(str(error))
    except (OSError, ValueError):
        faults.append(not_here(model.name))
    if lora.warm_start and not is_regular(resolve(lora.warm_start) / "adapter_config.json"):
        faults.append(
            f"lora.warm_start: {resolve(lora.warm_start) / 'adapter_config.json'}: cannot be read: no such file"
        )
    return tuple(faults)


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
        raise UserError(
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
        UserError: says which, and what to do.
    """
    path = folder / "adapter_config.json"
    try:
        found = read_config(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    weights = folder / "adapter_model.safetensors"
    if not is_regular(weights):
        raise UserError(f"{key}: {weights}: cannot be read: no such file")
    wanted = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": sorted(lora.target_modules)}
    targets = found.get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        targets = sorted(targets)
    there = {**found, "target_modules": targets}
    for name, value in wanted.items():
        if there.get(name) != value:
            raise UserError(f"{key}: {path}: {name} is {clipped(there.get(name))}, [lora] says {value!r}")
    own = found.get("base_model_name_or_path")
    if isinstance(own, str) and HUB_ID.fullmatch(own) and HUB_ID.fullmatch(base) and own != base:
        raise UserError(f"{key}: {path}: made for the base {own}, model.name says {base}")
    if odd := [name for name in (*ODD_BUT_EXACT, "layers_pattern", "exclude_modules") if found.get(name)]:
        way_out = "; `python -m grpo merge` makes full weights of it, which are" if {*odd} <= {*ODD_BUT_EXACT} else ""
        raise UserError(f"{key}: {path}: {', '.join(odd)}: only plain LoRA of one rank is trained or run here{way_out}")
    try:
        _check_rank(folder / "adapter_model.safetensors", lora.r)
        refuse_merged_twice(base, folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _check_rank(path: Path, r: int) -> None:
    """The file's own rank, by its header: PEFT makes the tensors that the config asks for before it reads the file."""
    with readable(path) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            shape = file.get_slice(name).get_shape()
            if ".lora_A." in name and list(shape)[:1] != [r]:
                raise UserError(f"{path}: {name} has shape {tuple(shape)}, r is {r}")


def _check_tensors(folder: Path, wrapped: Any) -> None:
    """Every LoRA tensor of the model must come from the file, and every tensor of the file must have its place."""
    path = folder / "adapter_model.safetensors"
    with _named(folder, "adapter"):
        shapes = {key: told.shape for key, told in declared(path).items()}
    expected = {n.replace(".default.", "."): tuple(p.shape) for n, p in wrapped.named_parameters() if "lora_" in n}
    if wrong := sorted(set(shapes) ^ set(expected)) or [k for k in expected if shapes[k] != expected[k]]:
        raise UserError(
            f"lora.warm_start: {path}: made for another base: {len(wrong)} tensors differ in name or "
            f"shape, first {clipped(wrong[0])[1:-1]}"
        )


@contextlib.contextmanager
def _named(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DEVICE_ERRORS:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"lora.warm_start: {what} {folder}: cannot be loaded on this base: {_first_line(error)}"
        ) from None


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Sampling and loss know a model as body and head. One that caps or scales the head's products is another."""
    ids = torch.tensor([encode(policy.tokenizer, "ESI")], device=policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits
    ours = policy.head(policy.body(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits, ours.to(logits.dtype), rtol=1e-2, atol=1e-2):
        kind = type(policy.model.get_base_model()).__name__
        raise UserError(
            f"{kind}: its logits are not the products of its head: a softcapping or a scale stands between, which "
            f"training here does not know. Turn it off in the model's config.json, or take another base"
        )


@torch.no_grad()
def _check_effect(policy: Policy, folder: Path) -> None:
    """An adapter can load without an error and without an effect, when its module names match nothing that runs."""
    ids = torch.tensor([encode(policy.tokenizer, "ESI triage: chest pain, 120/58.")], device=policy.device)
    with_adapter = policy.body(input_ids=ids, use_cache=False).last_hidden_state
    with policy.model.disable_adapter():
        without = policy.body(input_ids=ids, use_cache=False).last_hidden_state
    if torch.equal(with_adapter, without):
        raise UserError(f"lora.warm_start: {folder}: loads, but changes nothing: its weights are zero or not connected")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
