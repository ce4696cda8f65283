"""A LoRA adapter on disk: what it was trained on, and what it adds to each weight.

    W' = W + scaling · B A

Only plain LoRA on linear layers is that and nothing else; `read_config` refuses the rest by name.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from grpo.config import Lora, embedded, load_config, resolve
from grpo.runtime.errors import UserError
from grpo.runtime.tensor_files import open_tensors
from rewards.safe_files import Unreadable, clipped, is_regular, open_regular
from rewards.safe_files import read_json as read_any

TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
PLAIN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Keys of ``adapter_config.json`` that plain LoRA may set. Any other key that is set names a variant whose weights are
not W + scaling · B A, or not only that: allowed by name, so that a variant yet to come is refused too."""
INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ …) train against a changed one."""


LONGEST_NAME, LONGEST_PATTERN, MOST_REPEATS = 300, 2000, 6


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one weight: scaling · B A."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""
    scaling: float
    transposed: bool = False
    """The weight is stored [in, out], as GPT-2's are (PEFT's ``fan_in_fan_out``)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight it was made for."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


def merged_weight(weight: Tensor, delta: Delta) -> Tensor:
    """W + scaling · B A in float32 (arXiv 2106.09685, eq. 3): a new tensor, not yet cast.

    Args:
        weight: [out, in], or [in, out] where ``delta.transposed``; any floating dtype.

    B = 0 gives W. Raises UserError where the shapes differ.

    >>> one = Delta(a=torch.tensor([[1.0, 2.0]]), b=torch.tensor([[3.0]]), scaling=0.5)
    >>> merged_weight(torch.tensor([[10.0, 20.0]]), one)
    tensor([[11.5000, 23.0000]])
    """
    if tuple(weight.shape) != delta.shape:
        raise UserError(f"made for a weight of shape {delta.shape}, the base has {tuple(weight.shape)}")
    product = delta.b.float() @ delta.a.float()
    return torch.add(weight.float(), product.T if delta.transposed else product, alpha=delta.scaling)


def scaling(config: Mapping[str, Any], module: str) -> float:
    """alpha / r of one module, or alpha / sqrt(r) with ``use_rslora`` (arXiv 2312.03732).

    Args:
        config: `read_config`. The first key of ``rank_pattern`` (``alpha_pattern``) that matches the end of the
            module's name replaces ``r`` (``lora_alpha``), as in PEFT.

    >>> config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 16}}
    >>> scaling(config, "model.layers.0.self_attn.q_proj"), scaling(config, "model.layers.0.mlp.up_proj")
    (0.5, 2.0)
    >>> scaling(config | {"use_rslora": True}, "model.layers.0.mlp.up_proj")
    4.0
    """
    r, alpha = rank(config, module), _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def rank(config: Mapping[str, Any], module: str) -> float:
    """r of one module: that of ``rank_pattern``, else ``r``."""
    return _by_pattern(config.get("rank_pattern"), module, config["r"])


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter that is W + scaling · B A and nothing else.

    Raises:
        UserError: another method, a variant that cannot be merged exactly, or a value of the wrong kind.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {clipped(config.get('peft_type'))}: only LoRA adapters can be used")
    if odd := sorted(key for key, value in config.items() if value and key not in PLAIN):
        named = clipped(", ".join(odd), 200)[1:-1]
        raise UserError(f"{path}: {named}: only plain LoRA can be run or merged exactly; use it with PEFT as it is")
    if config.get("bias", "none") != "none":
        bias = clipped(config["bias"])
        raise UserError(f'{path}: bias is {bias}: trained biases are neither run nor merged, only bias = "none" is')
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool | str)) or init not in INITS:
        raise UserError(
            f"{path}: init_lora_weights is {clipped(init)}: trained against a changed base; convert it first "
            f"(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for where in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(where) or {}, dict):
            raise UserError(f"{path}: {where} must be an object, got {type(config[where]).__name__}")
        for pattern in config.get(where) or {}:
            _refuse_endless(path, where, pattern)
    for where in ("target_modules", "exclude_modules"):
        if isinstance(config.get(where), str):
            _refuse_endless(path, where, config[where])
    numbers = {key: config.get(key) for key in ("r", "lora_alpha")}
    numbers |= {f"{w}.{k}": v for w in ("rank_pattern", "alpha_pattern") for k, v in (config.get(w) or {}).items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{path}: {clipped(key)[1:-1]} must be a number above 0, got {clipped(value, 40)}")
    return config


def read_pairs(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name in the loaded model → (A [r, in], B [out, r]), from ``adapter_model.safetensors``.

    Raises:
        UserError: a tensor that is no half of a pair, not finite, or of another rank than the config's.
    """
    path = folder / "adapter_model.safetensors"
    if not is_regular(path) and (folder / "adapter_model.bin").exists():
        raise UserError(f"{folder}: holds a pickle (adapter_model.bin), which can run code and is never opened: "
                           f"have its author save it as safetensors")  # fmt: skip
    halves: dict[str, dict[str, Tensor]] = {}
    with readable(path) as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            match = TENSOR.fullmatch(key)
            if not match or len(key) > LONGEST_NAME:
                raise UserError(f"{path}: {clipped(key)[1:-1]}: not one of the two LoRA matrices of a linear layer")
            halves.setdefault(match["module"], {})[match["side"]] = file.get_tensor(key)
    if not halves:
        raise UserError(f"{path}: holds no tensors")
    return {module: _pair(f"{path}: {module}", sides, rank(config, module)) for module, sides in sorted(halves.items())}


def run_config(adapter: Path) -> dict[str, Any] | None:
    """The resolved config of the run whose ``adapter/`` this is; None for an adapter that lies in no run folder."""
    path = adapter.absolute().parent / "config.json"
    if adapter.name != "adapter" or not is_regular(path):
        return None
    held: Any = read_json(path).get("config")
    try:
        told = isinstance(held["model"]["name"], str) and isinstance(held["cases"]["system_prompt"], str)
    except (KeyError, TypeError):
        return None
    return held if told else None


def base_of(adapter: Path) -> str:
    """The base that an adapter was trained on: its run's ``model.name``, else what PEFT wrote down.

    Raises UserError where neither says.
    """
    config, path = run_config(adapter), adapter / "adapter_config.json"
    name = config["model"]["name"] if config else read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: names no base: say which it was trained on")
    return name


def system_prompt(base: str, adapter: Path | None) -> str:
    """The system prompt that goes with a model: that of the adapter's run; else the one that a merged folder keeps in
    its ``merge.json``; else that of the shipped config for this base.

    >>> system_prompt("embedded:base", None)
    'Extract clinical fields, apply the ESI algorithm, then state the ESI level.'
    """
    if adapter and (config := run_config(adapter)):
        return str(config["cases"]["system_prompt"])
    note = resolve(base) / "merge.json"
    if is_regular(note) and isinstance(said := read_json(note).get("system_prompt"), str):
        return said
    shipped, _ = load_config("configs/tiny.toml" if embedded(base) else "configs/v49.toml")
    return shipped.cases.system_prompt


def weights_digest(adapter: Path) -> str:
    """SHA-256 of an adapter's weights, hexadecimal. Raises UserError where they cannot be read."""
    path = adapter / "adapter_model.safetensors"
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def merged_digests(base: str) -> tuple[str, ...]:
    """The weights' SHA-256 of every adapter that a base's ``merge.json`` says is in its weights, in order; () without
    that file."""
    note = resolve(base) / "merge.json"
    if not is_regular(note):
        return ()
    said = read_json(note)
    before, last = said.get("merged_before"), said.get("adapter")
    digests = [*(before if isinstance(before, list) else ()), last.get("sha256") if isinstance(last, dict) else None]
    return tuple(digest for digest in digests if isinstance(digest, str))


def refuse_merged_twice(base: str, adapter: Path) -> None:
    """Raises UserError where the base's ``merge.json`` says that this very adapter is in its weights already:
    W + 2 · scaling · B A is nobody's model. A base without that file, or with other adapters', passes."""
    if (merged := merged_digests(base)) and weights_digest(adapter) in merged:
        raise UserError(f"{base}: {adapter.name} is merged into it already: use it without this adapter")


def lora_section(folder: Path, name: str) -> Lora:
    """The [lora] section of a config that describes an adapter as it is.

    Args:
        name: what the section names it by.

    Raises:
        UserError: no such folder, or not an adapter of plain LoRA.
    """
    if is_regular(folder / "adapter" / "adapter_config.json") and not is_regular(folder / "adapter_config.json"):
        raise UserError(f"{folder}: is a run folder: its adapter is {folder / 'adapter'}")
    path, found = folder / "adapter_config.json", read_config(folder)
    targets = found.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{path}: target_modules must be a list of layer names")
    r, alpha = int(found["r"]), float(found["lora_alpha"])
    if r != found["r"]:
        raise UserError(f"{path}: r must be a whole number, got {clipped(found['r'])}")
    try:
        return Lora(r=r, alpha=alpha, dropout=0.0, target_modules=tuple(sorted(targets)), warm_start=name)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        raise UserError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError with the file and the reason."""
    try:
        found = read_any(path, foreign=True)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


@contextlib.contextmanager
def readable(path: Path) -> Iterator[Any]:
    """An open safetensors file, its tensors not yet read. Raises UserError with the file and the reason."""
    try:
        with open_tensors(path) as file:
            yield file
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None


def _pair(where: str, sides: Mapping[str, Tensor], r: float) -> tuple[Tensor, Tensor]:
    if sides.keys() != {"A", "B"}:
        raise UserError(f"{where}: holds lora_{next(iter(sides))} alone, expected A and B")
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == r:
        raise UserError(f"{where}: A is {tuple(a.shape)} and B {tuple(b.shape)}, expected [r, in], [out, r], r = {r}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UserError(f"{where}: holds values that are not finite")
    return a, b


def _refuse_endless(path: Path, where: str, pattern: str) -> None:
    """PEFT tries these patterns on every module's name, and without a limit: nothing that repeats may hold a
    repetition, and few may stand beside each other."""
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*+\]", "x", pattern)
    holds = [False]
    for i, sign in enumerate(plain):
        if sign == "(":
            holds.append(False)
        elif sign == ")" and len(holds) > 1:
            inner = holds.pop()
            if inner and plain[i + 1 : i + 2] in ("*", "+", "{"):
                raise UserError(f"{path}: {where}: a pattern repeats what repeats, which may never end")
            holds[-1] |= inner
        elif sign in "*+{|":
            holds[-1] = True
    if len(pattern) > LONGEST_PATTERN or sum(map(plain.count, "*+{")) > MOST_REPEATS:
        raise UserError(f"{path}: {where}: a pattern that is too long, or has over {MOST_REPEATS} repetitions")


def _by_pattern(patterns: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    try:
        hits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(hits, otherwise)
    except re.error as error:
        raise UserError(f"adapter_config.json: a key of rank_pattern or alpha_pattern is no pattern: {error}") from None
