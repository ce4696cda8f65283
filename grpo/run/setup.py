"""Load and check everything a run needs before its first rollout; cheapest checks first."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from grpo.cases import oversampled_indices
from grpo.config import Config
from grpo.policy.policy import Kernels, Policy, copy_adapter, load_policy, missing_files
from grpo.preflight.checks import load_inputs, require_sound_reward, run_checks
from grpo.prompts import render_prompt
from grpo.rollout import check_length
from grpo.run.self_check import SelfCheck, with_kernels
from grpo.runtime.distributed import SINGLE_PROCESS, World
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import LOADING, memory_errors
from grpo.runtime.terminal import escape_control
from grpo.types import Case
from grpo.update import MicroBatchLimit, micro_batch_limit
from rewards import Reward


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a run needs, loaded and checked."""

    config: Config
    reward: Reward
    cases: tuple[Case, ...]
    epoch_indices: tuple[int, ...]
    evaluation_sets: dict[str, tuple[Case, ...]]
    policy: Policy
    reference: dict[str, Tensor] | None
    optimizer: torch.optim.Optimizer
    micro_batch_limit: MicroBatchLimit
    """Lowered during the run if the device runs out of memory."""
    check: SelfCheck | None = None
    """Which kernels passed; None if none was checked."""


def with_check(setup: Setup, check: SelfCheck | None) -> Setup:
    """Return the setup with the kernels that passed the check on every rank."""
    if check is None:
        return setup
    choices = setup.policy.world.all_gather_object(asdict(check.kernels))
    kernels = Kernels(**{name: all(choice[name] for choice in choices) for name in choices[0]})
    return replace(setup, policy=with_kernels(setup.policy, kernels), check=replace(check, kernels=kernels))


@memory_errors("setup", LOADING)
def load_setup(config: Config, ranks: World = SINGLE_PROCESS) -> Setup:
    """Return the setup of a config. No weights are loaded if a file is missing or the reward is unsound."""
    material = load_inputs(config)
    if faults := [*material.file_errors, *missing_files(config.model, config.lora)]:
        raise UserError("\n       ".join(faults))
    assert material.cases is not None  # guaranteed without faults
    for line in material.dropped_rows if ranks.is_main else ():
        print(f"warning: {escape_control(line)}", file=sys.stderr)
    require_sound_reward(config, run_checks(config, material))
    cases, sets = material.cases, dict(material.sets)
    policy = load_policy(config.model, config.lora, seed=config.train.seed, ranks=ranks)
    check_prompts(policy, [*cases, *(case for members in sets.values() for case in members)], config)
    section = config.optim
    optimizer = torch.optim.AdamW(
        policy.adapter_parameters().values(),
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
    )
    return Setup(
        config=config,
        reward=material.reward,
        cases=cases,
        epoch_indices=oversampled_indices(cases, config.cases.oversample),
        evaluation_sets=sets,
        policy=policy,
        reference=copy_adapter(policy) if config.loss.reference == "warm_start" else None,
        optimizer=optimizer,
        micro_batch_limit=micro_batch_limit(policy, config.optim),
    )


def check_prompts(policy: Policy, cases: Sequence[Case], config: Config) -> None:
    """Raise `UserError` if a prompt and the token budget exceed the context. A token is at least one byte, so only
    long texts are encoded to find out."""
    budget = max(config.rollout.max_new_tokens, config.evaluate.max_new_tokens)
    system = config.cases.system_prompt
    empty = render_prompt(policy.tokenizer, Case("empty", "", 1), system_prompt=system, thinking=False)
    for case in cases:
        if len(case.text.encode()) + len(empty.ids) + budget > policy.context_length:
            prompt = render_prompt(policy.tokenizer, case, system_prompt=system, thinking=False)
            check_length(policy, prompt, budget)


def device_name(device: torch.device) -> str:
    """Return the name of a device for people: "cpu (2 threads)" or the name of the card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads != 1)})"


def describe_run(setup: Setup) -> str:
    """Return the sizes of the run as lines of at most 80 columns, unless a name or a reason is long."""
    config, policy, rollout = setup.config, setup.policy, setup.config.rollout
    rows = rollout.prompts_per_step * rollout.group_size
    trained = sum(p.numel() for p in policy.adapter_parameters().values())
    frozen = sum(p.numel() for p in policy.model.parameters()) - trained
    reason = f" (unsound or not, allowed: {config.reward.unsound_reason})" if config.reward.allow_unsound else ""
    ranks = f", one of {policy.world.size} ranks" if policy.world.size > 1 else ""
    return "\n".join(
        (
            f"model     {config.model.name} on {policy.device}{ranks}",
            f"weights   {frozen:,} frozen, {trained:,} trained (LoRA r={config.lora.r})",
            f"cases     {len(setup.cases):,}, a stream of {len(setup.epoch_indices):,} after oversampling",
            f"reward    {setup.reward.name}{reason}",
            f"step      {rollout.prompts_per_step:,} prompts × {rollout.group_size:,} completions; "
            f"inner epochs: {config.optim.inner_epochs:,}",
            f"budget    {rollout.max_new_tokens:,} tokens per completion, {rows * rollout.max_new_tokens:,} per step",
            f"run       {config.train.steps:,} steps",
        )
    )
