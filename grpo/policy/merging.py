"""Merge a LoRA adapter into the model class that its base was published with.

An adapter is trained on the causal language model (``model.layers…``), but its base may be published as a larger model
that contains it (``model.language_model.layers…`` beside a vision tower). PEFT matches modules by name, so an adapter
loaded on the published class would change nothing. Here both classes share their modules: the adapter is merged through
the first, and the weights are saved from the second.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.policy.adapter_files import load_adapter, open_safetensors
from grpo.policy.base_model import load_weights, loading_errors, model_folder
from grpo.runtime.errors import UserError
from grpo.runtime.tensor_files import TensorHeader, read_tensor_header

FILE_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Safetensors' names of the dtypes that a base may contain; the others belong to quantized weights."""
CPU = torch.device("cpu")


def merge_adapter(
    name: str, adapter: Path, dtype: torch.dtype | None, *, progress: bool = False
) -> tuple[Any, dict[str, Tensor], int]:
    """Return (published model, state dict to save, number of merged modules), on the CPU.

    Each adapted weight becomes W + scaling · B A (arXiv 2106.09685, eq. 3), by PEFT's `merge_and_unload`. Tensors of
    the base's files that its class does not load, such as multi-token prediction heads, are copied.

    Args:
        name: name or folder of the base.
        adapter: a folder that passed `read_adapter_config` and `check_lora_tensors`.
        dtype: of all floating-point tensors; None keeps each tensor's dtype.
        progress: show a progress bar.

    Raises:
        UserError: base or adapter cannot be loaded, do not match, or give a value that is not finite.
    """
    from peft.tuners.lora import LoraLayer

    published, causal_lm, unused = load_published(name, dtype)
    wrapped = load_adapter(causal_lm, adapter, device=CPU)
    layers = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    if causal_lm.config.get_text_config().tie_word_embeddings and causal_lm.get_output_embeddings() in layers:
        raise UserError(f"{adapter}: adapts lm_head, which is tied to the input embeddings: a merge would change both")
    merged = {id(layer.get_base_layer().weight) for layer in layers}
    try:
        wrapped.merge_and_unload(progressbar=progress, safe_merge=True)
    except ValueError:
        raise UserError(f"{adapter}: merged weights are not finite: use --dtype bfloat16 or float32") from None
    parameters = published.state_dict(keep_vars=True)
    unmerged = {key: tensor for key, tensor in parameters.items() if id(tensor) not in merged}
    state = {key: tensor.detach() for key, tensor in parameters.items()}
    state |= _tensors_of_files(model_folder(name), unused, unmerged, dtype)
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} is not finite as {tensor.dtype}: use --dtype bfloat16 or float32")
    return published, state, len(layers)


def load_published(name: str, dtype: torch.dtype | None) -> tuple[Any, Any, set[str]]:
    """Return the base as the class in its ``architectures``, as the causal language model that training uses, and the
    names of tensors in its files that the class does not load.

    For a text checkpoint both are the same object; otherwise the second is built around the decoder and the head of the
    first. An ``architectures`` that transformers does not provide for this config is ignored.
    """
    import transformers

    folder = model_folder(name)
    with loading_errors(name) as source:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        headers = {key: header for path in _weight_files(folder) for key, header in read_tensor_header(path).items()}
        _check_not_quantized(config, headers)
        with torch.device("meta"):
            causal_lm = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        published_class: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if getattr(published_class, "config_class", None) is not type(config):
            published_class = type(causal_lm)
        published, unexpected = load_weights(published_class, source, device=CPU, dtype=dtype or "auto")
        ignored = re.compile("|".join(published._keys_to_ignore_on_load_unexpected or ["(?!)"]))
        unused = {key for key in headers if key in unexpected or ignored.search(key)}
        if published_class is type(causal_lm):
            return published, published, unused
        setattr(causal_lm, causal_lm.base_model_prefix, published.get_decoder())
        causal_lm.set_output_embeddings(published.get_output_embeddings())
        if any(p.is_meta for p in causal_lm.parameters()):
            raise UserError(f"{published_class.__name__} does not contain a {type(causal_lm).__name__}")
    return published, causal_lm.eval(), unused


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _check_not_quantized(config: Any, headers: Mapping[str, TensorHeader]) -> None:
    quantized = ["quantization_config is set"] if getattr(config, "quantization_config", None) is not None else []
    quantized += [f"{key} is {header.dtype}" for key, header in headers.items() if header.dtype not in FILE_DTYPES]
    if quantized:
        raise UserError(f"{quantized[0]}: a quantized base cannot be merged; pass the original with --base")


def _tensors_of_files(
    folder: Path, unused: set[str], unmerged: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the tensors to take from the base's files: those in ``unused`` and, if ``dtype`` is None, those that were
    cast when they were loaded (norms in float32 beside bfloat16 matrices)."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        headers = read_tensor_header(path)
        with open_safetensors(path) as file:
            for key, header in headers.items():
                if key in unused:
                    tensor = file.get_tensor(key)
                    tensors[key] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
                elif dtype is None and key in unmerged and unmerged[key].dtype != FILE_DTYPES[header.dtype]:
                    tensors[key] = file.get_tensor(key)
    return tensors
