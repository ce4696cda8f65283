"""What an evaluation is asked to do, checked before anything is loaded: config or model, adapter, cases, settings."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.cases import load
from grpo.config import Config, Thinking, load_config, resolve
from grpo.evaluation.comparison import Evaluated, check_same_cases, read_evaluation
from grpo.policy.adapter_files import lora_section, system_prompt
from grpo.policy.base_model import card_name, context_of, load_tokenizer, pick_device, pick_dtype
from grpo.policy.policy import check_adapter, missing_parts
from grpo.prompts import encode_plain, render_prompt
from grpo.run.input_hashes import ADAPTER_FILES, MODEL_FILES, cases_sha256, folder_sha256
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards import Reward, load_reward
from rewards.safe_files import is_regular

CARD = "configs/v49.toml"
"""What a bare MODEL is evaluated with: the card's token budget, temperature and modes, under the system prompt that the
model or adapter brings (see `grpo.policy.adapter_files.system_prompt`)."""
MODES = {"on": ("on",), "off": ("off",), "both": ("on", "off")}
BARE = "none"
"""``--adapter none``: the base alone."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One evaluation, checked: nothing is loaded yet."""

    name: str
    """Of the config or the model, for the folder."""
    config: Config
    """Its [lora] names the adapter; "" is the base alone."""
    reward: Reward
    sets: Mapping[str, tuple[Case, ...]]
    samples: int
    settings: Mapping[str, Any]
    """All that the answers depend on, as JSON."""
    before: Evaluated | None
    """What ``--against`` names."""
    left_out: tuple[str, ...]
    """Rows and values of the case files that were dropped or set aside, a line each kind."""
    opened: Mapping[Thinking, bool]
    """Mode → whether its prompt ends inside an opened ``<think>``, which decides how an answer is parsed."""


def ask(arguments: argparse.Namespace) -> Asked:
    """What the command line asks for, cheapest checks first; every missing file is named at once."""
    config = configured(arguments)
    reward = load_reward(config.reward.set)
    before = read_evaluation(arguments.against) if arguments.against else None
    sets, left_out = load_sets(config, arguments.cases, missing_parts(config.model, config.lora))
    if before is not None:
        check_same_cases(sets, before, arguments.against)
    device = pick_device(config.model.device)
    adapter = config.lora.warm_start
    if adapter:
        key = "lora.warm_start" if arguments.adapter is None else "--adapter"
        check_adapter(resolve(adapter), config.lora, config.model.name, key=key)
    opened = check_room(config, sets)
    settings = {
        "model_sha256": folder_sha256(model_folder(config.model.name), MODEL_FILES),
        "adapter_sha256": folder_sha256(resolve(adapter), ADAPTER_FILES) if adapter else None,
        "cases": {name: cases_sha256(cases) for name, cases in sets.items()},
        "thinking": list(config.evaluate.thinking),
        "samples": arguments.samples,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "temperature": config.evaluate.temperature,
        "seed": config.train.seed,
        "system_prompt": config.cases.system_prompt,
        "formats": list(reward.formats),
        "device": card_name(device),
        "dtype": str(pick_dtype(config.model.dtype, device)).removeprefix("torch."),
    }
    name = config.name if arguments.what.endswith(".toml") else set_name(arguments.what)
    return Asked(name, config, reward, sets, arguments.samples, settings, before, left_out, opened)


def check_room(config: Config, sets: Mapping[str, Sequence[Case]]) -> dict[Thinking, bool]:
    """Makes sure that every prompt and the token budget fit the model's context; mode → `Asked.opened`. Loads the
    tokenizer, not the model.

    Raises:
        UserError: they do not; names the largest budget that fits every case.
    """
    tokenizer, context = load_tokenizer(config.model.name), context_of(config.model.name)
    system, budget = config.cases.system_prompt, config.evaluate.max_new_tokens
    frames = {
        mode: render_prompt(tokenizer, Case("frame", "", 1), system_prompt=system, thinking=mode == "on")
        for mode in config.evaluate.thinking
    }
    frame = max(len(prompt.ids) for prompt in frames.values())
    told = [(len(encode_plain(tokenizer, case.text)), case.id, name) for name, cases in sets.items() for case in cases]
    length, ident, name = max(told)
    room = context - frame - length
    if budget > room:
        which = f"case {ident!r} of {name} takes {frame + length} tokens as a prompt, the model's context is {context}"
        if room < 1:
            raise UserError(f"{which}: no answer to it fits; leave it out, or shorten it")
        raise UserError(
            f"evaluate.max_new_tokens = {budget} does not fit: {which}; at most {room} fit: --max-new-tokens {room}"
        )
    return {mode: prompt.thinking for mode, prompt in frames.items()}


def configured(arguments: argparse.Namespace) -> Config:
    """The config with the command line laid over it. A MODEL is evaluated with the card's, and without its adapter."""
    overrides = list(arguments.set)
    given = {
        "thinking": list(MODES[arguments.thinking]) if arguments.thinking else None,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": 0.0 if arguments.greedy else arguments.temperature,
        "batch_size": arguments.batch_size,
    }
    overrides += [f"evaluate.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if arguments.what.endswith(".toml"):
        config, _ = load_config(arguments.what, overrides)
        adapter = arguments.adapter
    else:
        _check_model(arguments.what)
        model = f"model.name={json.dumps(arguments.what)}"
        adapter = BARE if arguments.adapter is None else arguments.adapter
        # the prompt that model and adapter were trained under; an override of one's own comes after it
        prompt = system_prompt(arguments.what, None if adapter == BARE else resolve(adapter))
        config, _ = load_config(CARD, [model, f"cases.system_prompt={json.dumps(prompt)}", *overrides])
    if adapter is None:
        return config
    lora = (
        config.lora.model_copy(update={"warm_start": "", "r": 1})
        if adapter == BARE
        else lora_section(resolve(adapter), adapter)
    )
    return config.model_copy(update={"lora": lora})


def _check_model(name: str) -> None:
    """A run folder holds a config.json too, and is not a model."""
    if is_regular(resolve(name) / "reward.json"):
        raise UserError(
            f"{name}: is a run folder: name its config, and its adapter with --adapter {Path(name) / 'adapter'}"
        )


def load_sets(
    config: Config, file: str | None, faults: Sequence[str]
) -> tuple[dict[str, tuple[Case, ...]], tuple[str, ...]]:
    """The sets of ``[evaluate]``, or the one of ``--cases``, named after its file; and what was left out of them.

    Args:
        faults: what is already known to be missing.

    Raises:
        UserError: all that is missing or unreadable, a line each.
    """
    files = {set_name(file): file} if file is not None else config.evaluate.ends | config.evaluate.during
    if not files:
        raise UserError("no cases: [evaluate] names no set; name a file with --cases")
    found, left_out, faults = {}, [], list(faults)
    for name, path in files.items():
        try:
            loaded = load(config.cases.format, path, strict=config.cases.strict)
        except UserError as error:
            faults.append(f"{name}: {error}" + ("" if file is not None else " (name another file with --cases)"))
        else:
            found[name] = loaded.cases
            left_out += [f"{name}: {finding}" for finding in loaded.report.findings]
    if faults:
        raise UserError("\n       ".join(faults))
    return found, tuple(left_out)


def set_name(file: str) -> str:
    """What the cases of a file are called: its name without ending, in the letters that a set may have.

    >>> set_name("data/my cases.v2.jsonl"), set_name("embedded:cases/test.jsonl"), set_name("mimic-iv-ed:/data/ed")
    ('my-cases.v2', 'test', 'ed')
    """
    path = re.sub("^[a-z-]+:", "", file)  # "embedded:" or a loader's name
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")[:80] or "cases"


def model_folder(name: str) -> Path:
    """Where a model's files lie on this machine: a folder, ``embedded:base``, or the cache behind a hub id."""
    from transformers.utils import cached_file

    folder = resolve(name)
    return folder if folder.is_dir() else Path(str(cached_file(name, "config.json", local_files_only=True))).parent


def default_folder(asked: Asked) -> Path:
    """``runs/eval-NAME-HASH``: other settings, another folder."""
    digest = hashlib.sha256(json.dumps(asked.settings, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"eval-{asked.name}-{digest[:8]}"
