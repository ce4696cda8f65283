"""A base's safetensors files, looked at and read without ever building the model.

A model is made on the meta device only, where it has names and shapes but no weights; it says which tensor of the files
loads into which module.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo.policy.adapter_files import Delta, read_json, readable, scaling
from grpo.policy.base_model import HUB_ID, LOAD_ERRORS, check_base, found_at
from grpo.runtime.errors import UserError
from rewards.safe_files import is_regular

STORED = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Safetensors' names of the types that a base may hold; only floating ones are merged or cast."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the base, not yet read."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def written_as(self, dtype: torch.dtype | None) -> torch.dtype:
        """Its dtype in the result; None keeps every tensor's own."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Its size in the result."""
        return math.prod(self.shape) * self.written_as(dtype).itemsize


def base_folder(name: str) -> Path:
    """The folder that holds a base's files on this machine; nothing is downloaded."""
    from transformers.utils import cached_file

    try:
        found = cached_file(found_at(name), "config.json", local_files_only=True)
    except (OSError, ValueError):
        found = None
    if found is None:
        fetch = f"fetch it with `hf download {name}`, or " if HUB_ID.fullmatch(name) else ""
        raise UserError(f"base {name!r}: no config.json of it on this machine: {fetch}give its folder with --base")
    return Path(found).parent


def base_tensors(folder: Path) -> tuple[Stored, ...]:
    """Every tensor of a base, in the order of its safetensors files: a single one, or shards with an index.

    Raises UserError: no safetensors, a shard that is missing or disagrees with the index, or a quantised tensor.
    """
    index, listed = folder / "model.safetensors.index.json", None
    if is_regular(index):
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(n, str) and n == Path(n).name for n in listed.values()):
            raise UserError(f"{index}: weight_map must name a file of the same folder for each tensor")
    elif not is_regular(folder / "model.safetensors"):
        pickled = any(folder.glob("*.bin"))
        why = "pickles (.bin) can run code and are never opened; have the model saved as safetensors" if pickled else ""
        raise UserError(f"{folder}: no model.safetensors and no index of shards here{': ' if why else ''}{why}")
    files = sorted(set(listed.values())) if listed is not None else ["model.safetensors"]
    tensors = tuple(stored for file in files for stored in _tensors_of(folder / file))
    if listed is not None and {t.key: t.file.name for t in tensors} != listed:
        raise UserError(f"{index}: does not list the tensors that its files hold: fetch the base again")
    return tensors


def blank_model(folder: Path) -> Any:
    """The text model that a base's config describes, on the meta device: names and shapes, no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        check_base(folder)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(
                f"{folder}: a quantised base cannot be merged exactly: give the unquantised one with --base"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if is_regular(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"{folder}: no causal language model that transformers knows: {_first_line(error)}") from None
    return model


def match_deltas(
    model: Any, tensors: Sequence[Stored], config: Mapping[str, Any], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Delta]:
    """Tensor name in the base's files → what the adapter adds to it.

    A file's names need not be the loaded model's: Qwen3.5's text model is ``model.language_model.*`` in the published
    checkpoint and ``model.*`` once loaded. They are matched by the renamings that transformers itself loads with.

    Args:
        model: `blank_model` of the base.
        config, pairs: `read_config` and `read_pairs` of the adapter.

    Raises:
        UserError: a module of the adapter that the model lacks, that is no linear layer, that is tied to another or
            that the files hold no weight of its shape for; or one that the config targets and the adapter leaves out.
    """
    modules = dict(model.named_modules())
    if strange := [name for name in pairs if name not in modules]:
        raise UserError(
            f"adapter: {len(strange)} of its {len(pairs)} modules are not in {type(model).__name__}, "
            f"first {strange[0]}: it was made for another base, or for another class of this one"
        )
    if absent := sorted(_targeted(config, modules) - pairs.keys()):
        raise UserError(f"adapter: {len(absent)} modules that it targets have no tensors in it, first {absent[0]}")
    keys, shapes = _loaded_names(model, tensors), {t.key: t.shape for t in tensors}
    deltas: dict[str, Delta] = {}
    for name, (a, b) in pairs.items():
        delta = Delta(a, b, scaling(config, name), _is_transposed(model, name, modules[name]))
        key = keys.get(f"{name}.weight")
        if key is None:
            raise UserError(f"adapter: {name}: the base's files hold no weight that loads into this module as it is")
        if shapes[key] != delta.shape:
            raise UserError(
                f"adapter: {name}: made for a weight of shape {delta.shape}, the base's {key} is {shapes[key]}"
            )
        deltas[key] = delta
    return deltas


def read_tensors(tensors: Sequence[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors in order, one file open at a time."""
    for path, members in itertools.groupby(tensors, key=lambda stored: stored.file):
        with readable(path) as file:
            for stored in members:
                yield stored, file.get_tensor(stored.key)


def _tensors_of(path: Path) -> list[Stored]:
    with readable(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if strange := [f"{key} is {s.get_dtype()}" for key, s in slices.items() if s.get_dtype() not in STORED]:
            raise UserError(
                f"{path}: {strange[0]}: a quantised base cannot be merged exactly: give the unquantised one"
            )
        return [Stored(key, path, tuple(s.get_shape()), STORED[s.get_dtype()]) for key, s in slices.items()]


def _targeted(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> set[str]:
    """The modules that PEFT would wrap for this config."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    try:
        targets = LoraConfig(**{key: config[key] for key in keys if config.get(key) is not None})
        return {name for name in modules if name and check_target_module_exists(targets, name)}
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"adapter_config.json: its targets cannot be read: {_first_line(error)}") from None


def _loaded_names(model: Any, tensors: Sequence[Stored]) -> dict[str, str]:
    """Name in the loaded model → name in the base's files, for tensors that are loaded as they are."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    names: dict[str, str] = {}
    for stored in tensors:
        name, converted = rename_source_key(stored.key, renamings, converters, model.base_model_prefix, state)
        if name not in state and stored.key in state:
            name, converted = stored.key, None
        if converted is None and names.setdefault(name, stored.key) != stored.key:
            raise UserError(f"{stored.file}: {names[name]} and {stored.key} both load into {name}")
    return names


def _is_transposed(model: Any, name: str, module: nn.Module) -> bool:
    """Whether the module's weight is stored [in, out]: its class decides, as in PEFT, not ``fan_in_fan_out``."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D):
        raise UserError(f"adapter: {name}: a {type(module).__name__}: only LoRA on linear layers is merged")
    if model.config.get_text_config().tie_word_embeddings and module is model.get_output_embeddings():
        raise UserError(f"adapter: {name}: tied to the input embeddings, which a merge would change as well")
    return isinstance(module, Conv1D)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
