"""The loop and nothing else: ``python -m grpo.train configs/tiny.toml``.

    cases → prompts → groups of completions → rewards → advantages → clipped, KL-anchored update of the adapter

Everything is built and checked before the first rollout. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grpo.advantage import zero_variance
from grpo.batch import make_batch
from grpo.budget import budget_stats
from grpo.cases import CaseError, cases_for_step, row_key, stream
from grpo.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from grpo.config import Config, ConfigError, load_config
from grpo.evaluate import evaluate, summarise
from grpo.examine import UnsoundReward, check_reward, examine, gather
from grpo.policy import ModelError, Policy, adapter_copy, load_policy, missing_parts, render_prompt, save_adapter
from grpo.rollout import PromptError, check_length, rollout
from grpo.run import (
    Run,
    RunError,
    add_evaluation,
    add_metrics,
    before_after,
    check_folder,
    continue_run,
    evaluations,
    start_run,
)
from grpo.stats import Stats, mean_of, means
from grpo.types import Case, Group, Prompt
from grpo.update import Updated, learning_rate, update
from rewards import Reward, RewardError, Score


class NotFinite(ArithmeticError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class MissingInput(ValueError):
    """Files that a run needs and this machine does not have: all of them, not the first."""


INPUT_ERRORS = (
    MissingInput,
    ConfigError,
    CaseError,
    ModelError,
    PromptError,
    RewardError,
    UnsoundReward,
    RunError,
    CheckpointError,
    NotFinite,
)
"""What a person can mend: one clear line and exit code 2. Anything else is a fault of ours and keeps its traceback."""


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a run is made of, loaded and checked."""

    config: Config
    reward: Reward
    cases: tuple[Case, ...]
    epoch: tuple[int, ...]
    sets: dict[str, tuple[Case, ...]]
    policy: Policy
    reference: dict[str, Tensor] | None
    optimizer: torch.optim.Optimizer


def train(setup: Setup, run: Run, *, first_step: int) -> None:
    """Steps ``first_step`` … ``train.steps``, with their records, checkpoints and evaluations."""
    config, policy = setup.config, setup.policy
    skipped_in_a_row = 0
    if first_step == 0:
        evaluate_sets(setup, run, step=0, names=[*config.evaluate.ends, *config.evaluate.during])
    bar = tqdm(range(first_step, config.train.steps), initial=first_step, total=config.train.steps, unit="step")
    for step in bar:
        started = time.perf_counter()
        prompts = prompts_for_step(setup, step)
        groups = rollout(
            policy,
            prompts,
            noise_keys(prompts, config, step),
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
        )
        rolled_out = time.perf_counter()
        scores = score_groups(setup.reward, groups)
        rewards = np.array([[score.total for score in row] for row in scores])
        batch = make_batch(groups, rewards, config)
        updated = update(policy, batch, config, setup.optimizer, setup.reference, step=step)
        record = metrics(setup, groups, scores, rewards, updated, step=step)
        record |= cost(groups, policy.device, rollout_s=rolled_out - started, update_s=time.perf_counter() - rolled_out)
        add_metrics(run, record)
        bar.set_postfix_str(postfix(record, config))
        skipped_in_a_row = skipped_in_a_row + updated.skipped if updated.skipped else 0
        if skipped_in_a_row > config.train.max_skipped_steps:
            ids = ", ".join(repr(prompt.case.id) for prompt in prompts)
            raise NotFinite(f"step {step + 1}: {skipped_in_a_row} updates in a row were not finite; cases {ids}")
        done = step + 1
        if done % config.evaluate.every == 0 and done < config.train.steps:
            evaluate_sets(setup, run, step=done, names=list(config.evaluate.during))
        if done % config.checkpoint.every == 0 or done == config.train.steps:
            save_checkpoint(run.checkpoints, policy, setup.optimizer, step=done, keep=config.checkpoint.keep)
    evaluate_sets(setup, run, step=config.train.steps, names=[*config.evaluate.ends, *config.evaluate.during])
    save_adapter(policy, run.adapter)


def build(config: Config) -> Setup:
    """Everything a run needs, cheapest checks first: no weights are loaded while a file is missing or the reward is
    unsound."""
    material = gather(config)
    if faults := [*material.faults, *missing_parts(config.model, config.lora)]:
        raise MissingInput("\n       ".join(faults))
    assert material.cases is not None  # else there were faults
    check_reward(config, examine(config, material))
    cases, sets = material.cases, dict(material.sets)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    check_prompts(policy, [*cases, *(case for members in sets.values() for case in members)], config)
    section = config.optim
    optimizer = torch.optim.AdamW(
        policy.trainable().values(),
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
    )
    return Setup(
        config=config,
        reward=material.reward,
        cases=cases,
        epoch=stream(cases, config.cases.oversample),
        sets=sets,
        policy=policy,
        reference=adapter_copy(policy) if config.loss.reference == "warm_start" else None,
        optimizer=optimizer,
    )


def check_prompts(policy: Policy, cases: Sequence[Case], config: Config) -> None:
    """Raises `PromptError` for a case whose prompt and token budget do not fit the context. A text has at least a byte
    a token, so only those of many bytes are encoded to find out."""
    budget = max(config.rollout.max_new_tokens, config.evaluate.max_new_tokens)
    system = config.cases.system_prompt
    empty = render_prompt(policy.tokenizer, Case("empty", "", 1), system_prompt=system, thinking=False)
    for case in cases:
        if len(case.text.encode()) + len(empty.ids) + budget > policy.context:
            prompt = render_prompt(policy.tokenizer, case, system_prompt=system, thinking=False)
            check_length(policy, prompt, budget)


def prompts_for_step(setup: Setup, step: int) -> list[Prompt]:
    """The prompts of a step. With ``thinking = "mixed"`` every other one thinks, the phase changing with the step."""
    config = setup.config
    cases = cases_for_step(
        setup.cases, setup.epoch, seed=config.train.seed, step=step, count=config.rollout.prompts_per_step
    )
    thinks = {"on": lambda i: True, "off": lambda i: False, "mixed": lambda i: (i + step) % 2 == 0}
    return [
        render_prompt(
            setup.policy.tokenizer,
            case,
            system_prompt=config.cases.system_prompt,
            thinking=thinks[config.rollout.thinking](i),
        )
        for i, case in enumerate(cases)
    ]


def noise_keys(prompts: Sequence[Prompt], config: Config, step: int) -> list[list[int]]:
    """Keys of (seed, step, case, member). A case that oversampling puts into one step twice counts its members on."""
    met: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        first = met.get(prompt.case.id, 0)
        met[prompt.case.id] = first + config.rollout.group_size
        members = range(first, met[prompt.case.id])
        keys.append([row_key("rollout", config.train.seed, step, prompt.case.id, member) for member in members])
    return keys


def score_groups(reward: Reward, groups: Sequence[Group]) -> list[list[Score]]:
    """[B][G] scores: text only, no tensors."""
    return [
        [
            reward.score(
                text=group.prompt.case.text,
                gold=group.prompt.case.esi,
                completion=completion.text,
                thinking=group.prompt.thinking,
                finished=completion.finished,
                case_id=group.prompt.case.id,
            )
            for completion in group.completions
        ]
        for group in groups
    ]


def metrics(
    setup: Setup,
    groups: Sequence[Group],
    scores: Sequence[Sequence[Score]],
    rewards: np.ndarray,
    updated: Updated,
    *,
    step: int,
) -> dict[str, Any]:
    """One step's line of ``metrics.jsonl``: every name is defined in the README."""
    flat = [score for row in scores for score in row]
    stats: Stats = {
        "reward/mean": mean_of(rewards.flatten()),
        "reward/std_group": mean_of(rewards.std(axis=1, ddof=1)),
        "groups/zero_variance": mean_of(zero_variance(rewards)),
        "completions/no_parse": mean_of(score.answer.level is None for score in flat),
        **budget_stats([completion for group in groups for completion in group.completions]),
        **{f"reward/{name}/mean": mean_of(score.parts[name] for score in flat) for name in setup.reward.components},
        **updated.stats,
    }
    config = setup.config
    return {
        "step": step + 1,
        "loss": updated.loss,
        "grad_norm": updated.grad_norm,
        "lr": learning_rate(config, (step + 1) * config.optim.inner_epochs - 1),
        "skipped": updated.skipped,
        "reward/std_batch": float(rewards.std(ddof=1)),
        **means(stats),
    }


def cost(groups: Sequence[Group], device: torch.device, *, rollout_s: float, update_s: float) -> dict[str, float]:
    """Seconds, sampled tokens a second, and peak memory so far (of the device on CUDA, else of the process)."""
    tokens = sum(len(completion.ids) for group in groups for completion in group.completions)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "time/rollout_s": rollout_s,
        "time/update_s": update_s,
        "tokens_per_s/rollout": tokens / rollout_s,
        "tokens_per_s/step": tokens / (rollout_s + update_s),
        "memory/peak_bytes": peak,
    }


def postfix(record: dict[str, Any], config: Config) -> str:
    """The bar's figures of the last step."""
    kl = record.get(f"kl/{config.loss.kl}")
    shown = f"reward {record['reward/mean']:+.2f}, clipped {100 * record['completions/clipped_ratio']:.0f} %"
    return shown if kl is None else f"{shown}, KL {kl:.4f}"


def evaluate_sets(setup: Setup, run: Run, *, step: int, names: Sequence[str]) -> None:
    """Evaluates the named sets in every mode of the config and writes the records down."""
    modes = setup.config.evaluate.thinking
    with tqdm(total=len(modes) * sum(len(setup.sets[name]) for name in names), unit="case", leave=False) as bar:
        for name in names:
            for mode in modes:
                bar.set_description(f"evaluate {name}, thinking {mode}")
                verdicts = evaluate(
                    setup.policy,
                    setup.sets[name],
                    setup.config,
                    name=name,
                    thinking=mode == "on",
                    progress=bar.update,
                )
                record = {"step": step, "cases": name, "thinking": mode, **summarise(verdicts, setup.reward)}
                add_evaluation(run, record, verdicts)


def plan(setup: Setup) -> str:
    """What is about to happen: the batch arithmetic and the sizes, for a person to check before it starts."""
    config, policy = setup.config, setup.policy
    rows = config.rollout.prompts_per_step * config.rollout.group_size
    trained = sum(p.numel() for p in policy.trainable().values())
    frozen = sum(p.numel() for p in policy.model.parameters()) - trained
    reason = f" (unsound or not, allowed: {config.reward.reason})" if config.reward.allow_unsound else ""
    return "\n".join(
        (
            f"model     {config.model.name} on {policy.device}: {frozen:,} frozen, {trained:,} trained "
            f"(LoRA r={config.lora.r})",
            f"cases     {len(setup.cases):,}, a stream of {len(setup.epoch):,} after oversampling; "
            f"reward {setup.reward.name}{reason}",
            f"step      {config.rollout.prompts_per_step} prompts × {config.rollout.group_size} completions = {rows} "
            f"completions = {-(-rows // config.optim.micro_batch_size)} micro-batches of "
            f"≤ {config.optim.micro_batch_size}; × {config.optim.inner_epochs} inner epoch(s)",
            f"budget    {config.rollout.max_new_tokens} tokens a completion, "
            f"≤ {rows * config.rollout.max_new_tokens:,} a step",
            f"run       {config.train.steps} steps = {config.train.steps * rows:,} completions",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m grpo.train", description="Train a LoRA adapter with GRPO.")
    parser.add_argument("config", help="a TOML file, for example configs/tiny.toml")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )
    arguments = parser.parse_args(argv)
    os.umask(0o077)  # narratives may be patients' data: what a run writes is its owner's alone
    try:
        config, source = load_config(arguments.config, arguments.set)
        out = arguments.out or Path("runs") / config.name
        check_folder(out, config, resume=arguments.resume)
        setup = build(config)
        print(f"config    {source.path}\n{plan(setup)}", flush=True)
        checkpoint = latest_checkpoint(out / "checkpoints") if arguments.resume else None
        first_step = load_checkpoint(checkpoint, setup.policy, setup.optimizer) if checkpoint else 0
        run = continue_run(out, step=first_step) if arguments.resume else start_run(out, config, source)
        train(setup, run, first_step=first_step)
    except INPUT_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; continue from the last checkpoint with --resume", file=sys.stderr)
        return 130
    print(f"\n{before_after(evaluations(run))}\n")
    print(f"adapter   {run.adapter}\nmetrics   {run.metrics}\nanswers   {run.path / 'eval'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
