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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grpo.adapter import AdapterError, read_config, readable, refuse_merged_twice
from grpo.config import Lora, Model, resolve
from grpo.free_memory import free_bytes
from grpo.plan import RANDOM, frozen_parameters
from grpo.ranks import ALONE, Ranks
from grpo.tensorfile import declared
from grpo.types import Case, Prompt
from rewards.reading import MEBIBYTE, Unreadable, clipped, is_regular, read_json

# read when transformers is first imported: nothing is downloaded, asked for or told, whatever a model's files say
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from huggingface_hub.errors import StrictDataclassError

LOAD_ERRORS = (
    OSError, SafetensorError, StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
)  # fmt: skip
"""What transformers and the libraries below it raise over a model's files."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Qwen ends a turn with the first and a document with the second. A sampler that knows only one runs to the cap."""
ODD_BUT_EXACT = ("use_rslora", "alpha_pattern", "rank_pattern", "layers_to_transform")
"""Keys of an adapter's config that are not trained or run here, but that a merge takes exactly as PEFT does."""
_SYSTEM, _CASE = "\ue000SYSTEM\ue001", "\ue000CASE\ue001"
"""Stand for system prompt and narrative while the chat template is rendered: private-use characters no template
holds."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MOST_TOKENIZER = 256 * MEBIBYTE


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
    ranks: Ranks = ALONE
    """Who else holds this policy."""
    sharded: bool = False
    """The decoder layers' weights lie spread over the ranks: only the modules' own forward can read them, and every
    call of it is made by all ranks together."""

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


def load_policy(model: Model, lora: Lora, *, seed: int, ranks: Ranks = ALONE) -> Policy:
    """Base + adapter on their device, ready to sample and to train. With ``model.shard`` and more than one rank, the
    base is read into the host's memory, and each rank's device gets its part.

    Raises:
        ModelError: the base is not on this machine, the adapter belongs to another base, disagrees with ``[lora]``,
            or is loaded without any effect on the logits.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

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
    policy = Policy(wrapped, tokenizer, end_ids(tokenizer, base), here, config.max_position_embeddings, ranks)
    _check_head(policy)
    if lora.warm_start:
        _check_effect(policy, folder)
    return spread(policy, device) if shard else policy


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
        _refuse_adapter(model.name)
        if model.name not in RANDOM and not cached_file(found_at(model.name), "config.json", local_files_only=True):
            faults.append(_not_here(model.name))
    except ModelError as error:
        faults.append(str(error))
    except (OSError, ValueError):
        faults.append(_not_here(model.name))
    if lora.warm_start and not is_regular(resolve(lora.warm_start) / "adapter_config.json"):
        faults.append(
            f"lora.warm_start: {resolve(lora.warm_start) / 'adapter_config.json'}: cannot be read: no such file"
        )
    return tuple(faults)


def found_at(name: str) -> str:
    """What the loaders are given for a model's name: its folder where there is one, else the name, for the cache."""
    folder = resolve(name)
    return str(folder) if os.path.exists(folder) else name


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
    with _loading(name) as where:
        base = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    base.requires_grad_(False)
    return base.to(device), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base, from files on this machine."""
    from transformers import AutoTokenizer

    if name in RANDOM:
        from grpo.random_base import random_tokenizer

        return random_tokenizer()
    with _loading(name) as where:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ModelError(f"model.name = {name!r}: its tokenizer has no chat template, so no prompt can be rendered")
    return tokenizer


def context_of(name: str) -> int:
    """Positions a base was made for, by its config alone."""
    from transformers import AutoConfig

    if name in RANDOM:
        from grpo.random_base import text_config

        return int(text_config(RANDOM[name]).max_position_embeddings)
    with _loading(name) as where:
        config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    return int(config.get_text_config().max_position_embeddings)


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
    except LOAD_ERRORS as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        here = resolve(name)
        if not is_regular(here / "config.json") and (here.is_dir() or isinstance(error, OSError)):
            raise ModelError(f"{_not_here(name)} ({said})") from None
        raise ModelError(f"model.name = {name!r}: its files cannot be loaded: {said}") from None


def _refuse_adapter(name: str) -> None:
    """transformers would load an adapter's base, put the adapter on it, and say nothing of either."""
    from transformers.utils import cached_file

    try:
        found = cached_file(found_at(name), "adapter_config.json", local_files_only=True)
    except (OSError, ValueError):
        found = None
    if found is None:
        return
    raise ModelError(
        f"model.name = {name!r}: holds an adapter (adapter_config.json), and a model is expected here: name its base, "
        f"and the adapter as lora.warm_start or --adapter"
    )


def check_base(folder: Path) -> None:
    """What the libraries would obey, wait for or unpickle in a model's folder is refused before they see it.

    Raises:
        ModelError: names the file.
    """
    for file in folder.glob("*"):
        if file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model") and not is_regular(file):
            raise ModelError(f"{file.name} is no file")
    if not any(folder.glob("*.safetensors")) and any(any(folder.glob(kind)) for kind in PICKLES):
        raise ModelError("pickles (.bin) can run code and are never opened: have the model saved as safetensors")
    file = folder
    try:
        for file in sorted(folder.glob("*.json")):
            table = read_json(file, most=MOST_TOKENIZER, foreign=True)
            if isinstance(table, dict) and (named := _names_code(table)):
                raise ModelError(f"{file.name}: {named} asks for code, which no model brings along here")
        for file in sorted(folder.glob("*.safetensors")):
            declared(file)
    except Unreadable as error:
        raise ModelError(f"{file.name}: {error}") from None


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
    """The chat up to where the answer begins, as ids. Control tokens come from the template alone: a narrative or a
    system prompt that contains ``<|im_end|>`` or ``<think>`` reaches the model as those characters.

    The narrative is encoded by itself, between the template's two halves; for ordinary text that gives the ids of
    encoding the whole chat at once. So is a system prompt in which, or at whose edges, a control token is spelled.

    Raises:
        ModelError: a chat template that does not show both turns once; a text that cannot be written in plain tokens.
    """
    before, slot, after = _rendered(tokenizer, _SYSTEM, thinking).partition(_CASE)
    opening, _, between = before.partition(_SYSTEM)
    inline, _, again = _rendered(tokenizer, system_prompt, thinking).partition(_CASE)
    if (
        not slot
        or _SYSTEM not in before
        or any(slot in part for slot in (_CASE, _SYSTEM) for part in (between, after, again))
    ):
        raise ModelError("the chat template does not show the system's and the user's turn exactly once, in this order")
    opened = after.rstrip().endswith("<think>")
    head = _encode(tokenizer, inline)
    control, around = control_ids(tokenizer), (_encode(tokenizer, opening), _encode(tokenizer, between))
    if [i for i in head if i in control] != [i for part in around for i in part if i in control]:
        whole = inline.startswith(opening) and inline.endswith(between)  # as the template wrote it, trimmed or not
        said = inline[len(opening) : len(inline) - len(between)] if whole else system_prompt
        head = [*around[0], *encode_plain(tokenizer, said), *around[1]]
    ids = (*head, *encode_plain(tokenizer, case.text), *_encode(tokenizer, after))
    return Prompt(case, ids, opened)


def _rendered(tokenizer: Any, system_prompt: str, thinking: bool) -> str:
    """The chat as text, `_CASE` in the narrative's place."""
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": system_prompt}, {"role": "user", "content": _CASE}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return str(chat)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that no plain text may give: every token that was added to the vocabulary, but for the one that stands for
    what the vocabulary cannot spell."""
    return frozenset(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in which nothing is a control token: a control token's spelling is cut after its first character
    and encoded in pieces. Where that is not enough (a normaliser may spell a control token that the text does not),
    every character is encoded by itself.

    Raises:
        ModelError: a character that is a control token of its own, or half a surrogate pair.
    """
    control = control_ids(tokenizer)
    for cut in (_whole, _within_spellings, _characters):
        ids = [i for piece in cut(tokenizer, text) for i in _encode(tokenizer, piece)]
        if control.isdisjoint(ids):
            return ids
    raise ModelError("a text holds a character that is a control token of this tokenizer: it has no plain spelling")


def _whole(tokenizer: Any, text: str) -> list[str]:
    return [text]


def _within_spellings(tokenizer: Any, text: str) -> list[str]:
    control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in control)
    cuts = [match.start() + 1 for match in re.finditer(f"(?=({pattern}))", text)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _characters(tokenizer: Any, text: str) -> list[str]:
    return list(text)


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
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        raise ModelError("a text holds half a surrogate pair, which no tokenizer can write") from None


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
        found = read_config(folder)
    except AdapterError as error:
        raise ModelError(f"{key}: {error}") from None
    weights = folder / "adapter_model.safetensors"
    if not is_regular(weights):
        raise ModelError(f"{key}: {weights}: cannot be read: no such file")
    wanted = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": sorted(lora.target_modules)}
    targets = found.get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        targets = sorted(targets)
    there = {**found, "target_modules": targets}
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ModelError(f"{key}: {path}: {name} is {clipped(there.get(name))}, [lora] says {value!r}")
    own = found.get("base_model_name_or_path")
    if isinstance(own, str) and HUB_ID.fullmatch(own) and HUB_ID.fullmatch(base) and own != base:
        raise ModelError(f"{key}: {path}: made for the base {own}, model.name says {base}")
    if odd := [name for name in (*ODD_BUT_EXACT, "layers_pattern", "exclude_modules") if found.get(name)]:
        way_out = "; `python -m grpo.merge` makes full weights of it, which are" if {*odd} <= {*ODD_BUT_EXACT} else ""
        raise ModelError(
            f"{key}: {path}: {', '.join(odd)}: only plain LoRA of one rank is trained or run here{way_out}"
        )
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
    with _named(folder, "adapter"):
        shapes = {key: told.shape for key, told in declared(path).items()}
    expected = {n.replace(".default.", "."): tuple(p.shape) for n, p in wrapped.named_parameters() if "lora_" in n}
    if wrong := sorted(set(shapes) ^ set(expected)) or [k for k in expected if shapes[k] != expected[k]]:
        raise ModelError(
            f"lora.warm_start: {path}: made for another base: {len(wrong)} tensors differ in name or "
            f"shape, first {clipped(wrong[0])[1:-1]}"
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
