"""The evaluation that a command line requests, checked before the model is loaded: config, adapter, cases, settings."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.cases import load_cases
from grpo.config import Config, ThinkingMode, load_config, resolve_path
from grpo.evaluation.comparison import Evaluated, check_same_cases, read_evaluation
from grpo.policy.adapter_files import lora_section_of, system_prompt
from grpo.policy.base_model import (
    card_name,
    load_tokenizer,
    model_folder,
    read_context_length,
    resolve_device,
    resolve_dtype,
)
from grpo.policy.policy import check_adapter, missing_files
from grpo.prompts import encode_as_plain_text, render_prompt
from grpo.run.input_hashes import ADAPTER_FILES, MODEL_FILES, cases_sha256, folder_sha256
from grpo.runtime.errors import UserError
from grpo.types import Case
from rewards import Reward, load_reward
from rewards.safe_files import InvalidFile, check_no_links_out, is_regular, read_json

CARD_CONFIG = "configs/v49.toml"
"""The token budget, temperature and modes for a bare MODEL; its system prompt comes from the model or adapter (see
`grpo.policy.adapter_files.system_prompt`)."""
MODES = {"on": ("on",), "off": ("off",), "both": ("on", "off")}
NO_ADAPTER = "none"
"""``--adapter none``: the base alone."""


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """A checked evaluation; no model is loaded yet."""

    name: str
    """Of the config or the model; part of the default folder."""
    config: Config
    """Its [lora] names the adapter; "" is the base alone."""
    reward: Reward
    sets: Mapping[str, tuple[Case, ...]]
    samples: int
    settings: Mapping[str, Any]
    """Everything that the answers depend on, as JSON."""
    before: Evaluated | None
    """The evaluation given by ``--against``."""
    dropped: tuple[str, ...]
    """One line per kind of row or value that was dropped from the case files."""
    thinking: Mapping[ThinkingMode, bool]
    """Mode → whether its prompts end inside an open ``<think>``, which determines how an answer is parsed."""


def parse_request(arguments: argparse.Namespace) -> EvaluationRequest:
    """Return the evaluation that the command line requests, cheapest checks first; one error lists all missing files.

    Raises:
        UserError: a file is missing or invalid, or the token budget does not fit the model's context.
    """
    config = build_config(arguments)
    reward = load_reward(config.reward.set)
    before = read_evaluation(arguments.against) if arguments.against else None
    sets, dropped = load_sets(config, arguments.cases, missing_files(config.model, config.lora))
    if before is not None:
        check_same_cases(sets, before, arguments.against)
    device = resolve_device(config.model.device)
    adapter = config.lora.warm_start
    if adapter and arguments.adapter is None:
        check_adapter(resolve_path(adapter), config.lora, config.model.name, key="lora.warm_start")
    config, thinking = fit_to_context(config, sets)
    settings = {
        "model_sha256": folder_sha256(model_folder(config.model.name), MODEL_FILES),
        "adapter_sha256": folder_sha256(resolve_path(adapter), ADAPTER_FILES) if adapter else None,
        "cases": {name: cases_sha256(cases) for name, cases in sets.items()},
        "thinking": list(config.evaluate.thinking),
        "samples": arguments.samples,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "temperature": config.evaluate.temperature,
        "seed": config.train.seed,
        "system_prompt": config.cases.system_prompt,
        "formats": list(reward.formats),
        "device": card_name(device),
        "dtype": str(resolve_dtype(config.model.dtype, device)).removeprefix("torch."),
    }
    name = config.name if arguments.what.endswith(".toml") else set_name(arguments.what)
    return EvaluationRequest(name, config, reward, sets, arguments.samples, settings, before, dropped, thinking)


def build_config(arguments: argparse.Namespace) -> Config:
    """Return the config with the command line's overrides. A MODEL is evaluated with `CARD_CONFIG`."""
    options = {key: value for key, value in vars(arguments).items() if "." in key}
    options["evaluate.thinking"] = MODES.get(options["evaluate.thinking"])
    if not arguments.what.endswith(".toml"):
        return config_for_model(arguments.what, arguments.adapter, options, overrides=arguments.set)
    config, _ = load_config(arguments.what, [*arguments.set, *override_each(options)])
    return config if arguments.adapter is None else with_adapter(config, arguments.adapter)


def override_each(values: Mapping[str, object]) -> list[str]:
    """Return the ``--set`` arguments for config keys and values, without those that are None."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]


def config_for_model(
    model: str, adapter: str | None, options: Mapping[str, object], *, overrides: Sequence[str] = ()
) -> Config:
    """Return `CARD_CONFIG` for a model and an adapter (none by default), with the system prompt they were trained with.

    Args:
        options: config key → value, or None for the card's.
        overrides: arguments of ``--set``.

    Raises:
        UserError: the model is a run folder, the adapter cannot be used with it, or an option is invalid.
    """
    if is_regular(resolve_path(model) / "reward.json"):
        adapter_folder = Path(model) / "adapter"
        raise UserError(f"{model}: is a run folder: give its config, and its adapter with --adapter {adapter_folder}")
    adapter = NO_ADAPTER if adapter is None else adapter
    prompt = system_prompt(model, None if adapter == NO_ADAPTER else resolve_path(adapter))
    defaults = override_each({"model.name": model, "cases.system_prompt": prompt})
    config, _ = load_config(CARD_CONFIG, [*defaults, *overrides, *override_each(options)])
    return with_adapter(config, adapter)


def with_adapter(config: Config, adapter: str) -> Config:
    """Return the config with the [lora] section of the adapter given by ``--adapter``."""
    if adapter == NO_ADAPTER:  # a fresh adapter, which does not change the model, as small as possible
        unchanged = {"warm_start": "", "r": 1, "target_modules": ("down_proj",)}
        return config.model_copy(update={"lora": config.lora.model_copy(update=unchanged)})
    lora = lora_section_of(resolve_path(adapter), adapter)
    check_adapter(resolve_path(adapter), lora, config.model.name, key="--adapter")
    return config.model_copy(update={"lora": lora})


def load_sets(
    config: Config, file: str | None, faults: Sequence[str]
) -> tuple[dict[str, tuple[Case, ...]], tuple[str, ...]]:
    """Return the sets of ``[evaluate]``, or that of ``--cases`` named after its file, and what was dropped from them.

    Args:
        faults: other files that are already known to be missing.

    Raises:
        UserError: one line for each missing or unreadable file.
    """
    files = {set_name(file): file} if file is not None else config.evaluate.before_and_after | config.evaluate.periodic
    if not files:
        raise UserError("no cases: [evaluate] has no set; give a file with --cases")
    sets, dropped, faults = {}, [], list(faults)
    for name, path in files.items():
        try:
            loaded = load_cases(config.cases.format, path, strict=config.cases.strict)
        except UserError as error:
            faults.append(f"{name}: {error}" + ("" if file is not None else " (give another file with --cases)"))
        else:
            sets[name] = loaded.cases
            dropped += [f"{name}: {note}" for note in loaded.notes]
    if faults:
        raise UserError("\n       ".join(faults))
    return sets, tuple(dropped)


def set_name(file: str) -> str:
    """Return the name of the set in a file: the file name without its suffix, in the characters allowed for a set.

    >>> set_name("data/my cases.v2.jsonl"), set_name("embedded:cases/test.jsonl"), set_name("mimic-iv-ed:/data/ed")
    ('my-cases.v2', 'test', 'ed')
    """
    path = re.sub("^[a-z-]+:", "", file)  # "embedded:" or the name of a loader
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")[:80] or "cases"


def fit_to_context(
    config: Config, sets: Mapping[str, Sequence[Case]], *, shorten: bool = False
) -> tuple[Config, dict[ThinkingMode, bool]]:
    """Check that each prompt and the token budget fit the model's context, and return the config and
    `EvaluationRequest.thinking`. Load the tokenizer only.

    Args:
        shorten: reduce a budget that does not fit.

    Raises:
        UserError: the model is missing, or they do not fit; gives the largest budget that does.
    """
    if faults := missing_files(config.model, config.lora):
        raise UserError("\n       ".join(faults))
    tokenizer, context = load_tokenizer(config.model.name), read_context_length(config.model.name)
    budget, system = config.evaluate.max_new_tokens, config.cases.system_prompt
    empty_prompts = {
        mode: render_prompt(tokenizer, Case("empty", "", 1), system_prompt=system, thinking=mode == "on")
        for mode in config.evaluate.thinking
    }
    narrative, case_id, name = max(
        (len(encode_as_plain_text(tokenizer, case.text)), case.id, name)
        for name, cases in sets.items()
        for case in cases
    )
    length = narrative + max(len(prompt.ids) for prompt in empty_prompts.values())
    longest = f"case {case_id!r} of {name} takes {length} tokens as a prompt, the model's context is {context}"
    largest = context - length
    if largest < 1:
        raise UserError(f"{longest}: no answer fits; remove the case or shorten it")
    if budget > largest and not shorten:
        raise UserError(
            f"evaluate.max_new_tokens = {budget} does not fit: {longest}; use at most --max-new-tokens {largest}"
        )
    evaluate = config.evaluate.model_copy(update={"max_new_tokens": min(budget, largest)})
    thinking = {mode: prompt.thinking for mode, prompt in empty_prompts.items()}
    return config.model_copy(update={"evaluate": evaluate}), thinking


def default_folder(request: EvaluationRequest) -> Path:
    """Return ``runs/eval-NAME-HASH``, with a hash of the settings."""
    digest = hashlib.sha256(json.dumps(request.settings, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"eval-{request.name}-{digest[:8]}"


def check_output_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Check that the folder is new, empty, or has answers sampled with these settings; write nothing.

    Raises:
        UserError: it contains something else, or answers of another evaluation.
    """
    path = out / "settings.json"
    if not is_regular(path):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: already exists and is not an evaluation: choose another folder with --out")
        return
    try:
        check_no_links_out(out)
        before = read_json(path)
    except InvalidFile as error:
        raise UserError(f"{path}: {error}: delete {out} to start over") from None
    if before != settings:
        recorded = before if isinstance(before, dict) else {}
        changed = sorted(key for key in settings.keys() | recorded.keys() if settings.get(key) != recorded.get(key))
        raise UserError(
            f"{out}: contains answers with a different {', '.join(changed)}: choose another folder with --out, or "
            f"delete it"
        )
