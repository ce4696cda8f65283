"""A LoRA adapter on disk: its config, its tensors, and what it was trained on.

    W' = W + scaling · B A

Only plain LoRA on linear layers is supported; `read_adapter_config` rejects everything else. All files are checked
before PEFT reads them.
"""

import contextlib
import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from grpo.config import LoraSection, embedded_path, load_config, resolve_path
from grpo.policy.base_model import HUB_ID
from grpo.runtime.errors import UserError
from grpo.runtime.tensor_files import open_tensors, read_tensor_header
from rewards.safe_files import InvalidFile, is_regular, open_regular, shorten
from rewards.safe_files import read_json as read_any

PLAIN_LORA_KEYS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Keys of ``adapter_config.json`` that plain LoRA may set. Any other key that is set belongs to a variant whose weights
are not just W + scaling · B A. This is an allow-list, so that future variants are rejected too."""
NEUTRAL_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base unchanged; the others (PiSSA, OLoRA, LoftQ …) train against a modified base."""
MAX_PATTERN_CHARS, MAX_REPETITIONS = 2000, 6


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of a plain LoRA adapter.

    Raises:
        UserError: another method, a LoRA variant, or a value of the wrong type.
    """
    path = folder / "adapter_config.json"
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shorten(config.get('peft_type'))}: only LoRA adapters are supported")
    if unsupported := sorted(key for key, value in config.items() if value and key not in PLAIN_LORA_KEYS):
        keys = shorten(", ".join(unsupported), 200)[1:-1]
        raise UserError(f"{path}: {keys}: only plain LoRA can be run or merged exactly; use PEFT for this adapter")
    if config.get("bias", "none") != "none":
        raise UserError(f'{path}: bias is {shorten(config["bias"])}: only bias = "none" is supported')
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool | str)) or init not in NEUTRAL_INITS:
        raise UserError(
            f"{path}: init_lora_weights is {shorten(init)}: trained against a modified base; convert it first "
            f"(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    numbers = {key: config.get(key) for key in ("r", "lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{path}: {key} must be an object, got {type(config[key]).__name__}")
        for pattern, value in (config.get(key) or {}).items():
            _check_pattern(path, key, pattern)
            numbers[f"{key}.{pattern}"] = value
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            _check_pattern(path, key, config[key])
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{path}: {shorten(key)[1:-1]} must be a number above 0, got {shorten(value, 40)}")
    return config


def check_lora_tensors(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that ``adapter_model.safetensors`` can be read, that its values are finite, and that the config has no rank
    beyond its tensors: PEFT allocates what the config claims. `load_adapter` compares names and shapes with the base.

    Args:
        config: of `read_adapter_config`.

    Raises:
        UserError: the first problem found, or a file that cannot be read.
    """
    path = folder / "adapter_model.safetensors"
    if not is_regular(path) and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{path}: cannot be read: the folder has only a pickle (adapter_model.bin), which can run code and is "
            f"never opened: ask its author for safetensors"
        )
    largest = 0
    with open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(key)
            largest = max([largest, *tensor.shape])
            if not torch.isfinite(tensor).all():
                raise UserError(f"{path}: {shorten(key)[1:-1]}: contains values that are not finite")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > largest:
        raise UserError(f"{path}: the config has rank {rank:g}, but no dimension of a tensor is above {largest}")


def load_adapter(base: Any, folder: Path, *, device: torch.device, is_trainable: bool = False) -> Any:
    """Return a `peft.PeftModel` of the base with an adapter on it, after checking that names and shapes match exactly:
    PEFT ignores superfluous tensors and leaves absent ones at their initial values.

    Args:
        folder: passed `read_adapter_config` and `check_lora_tensors`.
        device: of the base and the adapter; PEFT itself would choose the current CUDA device.

    Raises:
        UserError: the adapter does not match the base.
    """
    from peft import PeftModel

    path = folder / "adapter_model.safetensors"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(
                base, str(folder), is_trainable=is_trainable, torch_device=str(device), low_cpu_mem_usage=True
            )
        in_file = {key: header.shape for key, header in read_tensor_header(path).items()}
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder}: cannot be loaded on this base: {reason}") from None
    expected = {n.replace(".default.", "."): tuple(p.shape) for n, p in wrapped.named_parameters() if "lora_" in n}
    wrong = sorted(name for name in expected.keys() | in_file.keys() if expected.get(name) != in_file.get(name))
    if wrong:
        raise UserError(
            f"{path}: made for another base: {len(wrong)} tensors differ from {type(base).__name__} in name or shape, "
            f"first {shorten(wrong[0])[1:-1]}"
        )
    return wrapped


def config_of_parent_run(adapter: Path) -> dict[str, Any] | None:
    """Return the resolved config of the run whose ``adapter/`` this is; None if the adapter is not in a run folder."""
    path = adapter.absolute().parent / "config.json"
    if adapter.name != "adapter" or not is_regular(path):
        return None
    config: Any = read_json_object(path).get("config")
    try:
        complete = isinstance(config["model"]["name"], str) and isinstance(config["cases"]["system_prompt"], str)
    except (KeyError, TypeError):
        return None
    return config if complete else None


def base_model_of(adapter: Path) -> str:
    """Return the base that an adapter was trained on: ``model.name`` of its run, else the name recorded by PEFT.

    Raises UserError if neither exists.
    """
    config, path = config_of_parent_run(adapter), adapter / "adapter_config.json"
    name = config["model"]["name"] if config else read_json_object(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: base_model_name_or_path is not set: pass the base that it was trained on")
    return name


def system_prompt(base: str, adapter: Path | None) -> str:
    """Return the system prompt for a model: from the adapter's run; else from the ``merge.json`` of a merged base; else
    from the shipped config for this base.

    >>> system_prompt("embedded:base", None)
    'Extract clinical fields, apply the ESI algorithm, then state the ESI level.'
    """
    if adapter and (config := config_of_parent_run(adapter)):
        return str(config["cases"]["system_prompt"])
    merge_record = resolve_path(base) / "merge.json"
    if is_regular(merge_record) and isinstance(text := read_json_object(merge_record).get("system_prompt"), str):
        return text
    shipped, _ = load_config("configs/tiny.toml" if embedded_path(base) else "configs/v49.toml")
    return shipped.cases.system_prompt


def adapter_sha256(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's weights, hexadecimal. Raises UserError if they cannot be read."""
    path = adapter / "adapter_model.safetensors"
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except InvalidFile as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def merged_adapter_hashes(base: str) -> tuple[str, ...]:
    """Return the weights' SHA-256 of every adapter merged into a base, in order, from its ``merge.json``; () without
    that file."""
    path = resolve_path(base) / "merge.json"
    if not is_regular(path):
        return ()
    record = read_json_object(path)
    before, last = record.get("merged_before"), record.get("adapter")
    hashes = [*(before if isinstance(before, list) else ()), last.get("sha256") if isinstance(last, dict) else None]
    return tuple(value for value in hashes if isinstance(value, str))


def check_not_merged_already(base: str, adapter: Path) -> None:
    """Raise UserError if the base's ``merge.json`` lists this adapter: W + 2 · scaling · B A is not a trained model."""
    if (hashes := merged_adapter_hashes(base)) and adapter_sha256(adapter) in hashes:
        raise UserError(f"{base}: {adapter.name} is merged into it already: use it without this adapter")


def check_same_base(path: Path, config: Mapping[str, Any], base: str) -> None:
    """Raise UserError if both the adapter's config at ``path`` and the caller name a base on the hub, and not the same.
    Folders are not compared: a base may lie anywhere."""
    trained_on = config.get("base_model_name_or_path")
    if isinstance(trained_on, str) and all(map(HUB_ID.fullmatch, (trained_on, base))) and trained_on != base:
        raise UserError(f"{path}: made for the base {trained_on}, not for {base}")


def lora_section_of(folder: Path, name: str) -> LoraSection:
    """Return the [lora] section of a config that describes an adapter.

    Args:
        name: value of ``warm_start``.

    Raises:
        UserError: not the folder of a plain LoRA adapter.
    """
    if is_regular(folder / "adapter" / "adapter_config.json") and not is_regular(folder / "adapter_config.json"):
        raise UserError(f"{folder}: is a run folder: its adapter is {folder / 'adapter'}")
    path, config = folder / "adapter_config.json", read_adapter_config(folder)
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{path}: target_modules must be a list of layer names")
    r, alpha = int(config["r"]), float(config["lora_alpha"])
    if r != config["r"]:
        raise UserError(f"{path}: r must be a whole number, got {shorten(config['r'])}")
    try:
        return LoraSection(r=r, alpha=alpha, dropout=0.0, target_modules=tuple(sorted(targets)), warm_start=name)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        raise UserError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError with the file and the reason."""
    try:
        value = read_any(path, foreign=True)
    except InvalidFile as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file without reading its tensors. Raises UserError with the file and the reason."""
    try:
        with open_tensors(path) as file:
            yield file
    except InvalidFile as error:
        raise UserError(f"{path}: {error}") from None


def _check_pattern(path: Path, key: str, pattern: str) -> None:
    """Check a regular expression that PEFT matches against every module's name, without a time limit: it must not
    repeat a group, which could nest repetitions, nor contain many repetitions."""
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*+\]", "x", pattern)
    if re.search(r"\)[*+{]", plain):
        raise UserError(f"{path}: {key}: a repeated group, which may take forever to match")
    if len(pattern) > MAX_PATTERN_CHARS or sum(map(plain.count, "*+{")) > MAX_REPETITIONS:
        raise UserError(
            f"{path}: {key}: a pattern of over {MAX_PATTERN_CHARS} characters or {MAX_REPETITIONS} repetitions"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise UserError(f"{path}: {key}: not a regular expression: {error}") from None
