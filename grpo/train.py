"""The loop and nothing else: ``python -m grpo.train configs/tiny.toml``.

    cases → prompts → groups of completions → rewards → advantages → clipped, KL-anchored update of the adapter

Everything is built and checked before the first rollout. Exit codes: 0 done, 2 bad input, 3 a file could not be
written, 4 another rank was lost, 130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP; after 3, 4 and these --resume goes
on. Under ``torchrun`` each process runs this loop: see `grpo.ranks`.
"""

import argparse
import contextlib
import os
import resource
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor
from tqdm import tqdm

from grpo.account import advantage_shares, step_metrics, token_account
from grpo.advantage import zero_variance
from grpo.batch import baseline, make_batch
from grpo.cases import CaseError, cases_for_step, row_key, stream
from grpo.checkpoint import CheckpointError, Progress, damage, latest_checkpoint, load_checkpoint, save_checkpoint
from grpo.config import Config, ConfigError, Source, load_config, resolve
from grpo.durable import DiskError, placed
from grpo.evaluation.answers import evaluate
from grpo.evaluation.fingerprint import ADAPTER_FILES, cases_sha256, folder_sha256
from grpo.evaluation.rates import summarise
from grpo.examine import UnsoundReward, check_reward, examine, gather
from grpo.ledger import LEDGER_VERSION, write_step
from grpo.model_card import CardError, write_model_card
from grpo.policy import ModelError, Policy, adapter_copy, load_policy, missing_parts, render_prompt, save_adapter
from grpo.ranks import ALONE, Elsewhere, RankError, RankLost, Ranks, expected, hush, joined, launcher, leave
from grpo.recorded.terminal import error_lines, say_anyhow, tell, visible
from grpo.rollout import PromptError, check_length, rollout
from grpo.roofline import Costs, Rates, costs_of, floor_of, measure_rates, weights_read
from grpo.run import (
    Run,
    RunError,
    add_evaluation,
    add_metrics,
    before_after,
    check_folder,
    continue_run,
    evaluations,
    finite,
    is_started,
    locked,
    start_run,
)
from grpo.score import score_groups
from grpo.stop import Stop, Stopped, listening
from grpo.types import Case, Completion, Dropped, Group, Prompt, Step
from grpo.update import OutOfMemory, learning_rate, update
from rewards import Reward, RewardError, Score

T = TypeVar("T")
Sampled = tuple[tuple[Completion, ...], tuple[Score, ...]]
"""A group's completions and their scores."""
CHECKED_AT_ONCE = 1 << 24
"""Entries of a tensor; a copy of them takes 128 MB."""
SAMPLED = TypeAdapter(list[Sampled])


class NotFinite(ArithmeticError):
    """Too many steps in a row had a loss or gradient that is not finite."""


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
    CardError,
    CheckpointError,
    NotFinite,
    OutOfMemory,
    RankError,
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
    costs: Costs
    """Of a token, and below of this device: how fast a step could be."""
    rates: Rates


def train(setup: Setup, run: Run, stop: Stop, progress: Progress) -> None:
    """The steps after ``progress`` up to ``train.steps``, with their records, checkpoints and evaluations.

    Raises:
        Stopped: by a signal. What is done is on the disk.
    """
    config, policy, ranks = setup.config, setup.policy, setup.policy.ranks
    standing = partial(unless_stopped, setup, run, stop)
    standing(progress, evaluate_due, setup, run, progress.step)
    first = progress.step
    steps = range(first, config.train.steps)
    bar = tqdm(steps, initial=first, total=config.train.steps, unit="step", disable=not ranks.leads)
    for step in bar:
        started = time.perf_counter()
        groups, scores, dropped = standing(progress, sample_step, setup, step)
        sampled = time.perf_counter()
        rewards = np.array([[score.total for score in row] for row in scores])
        batch = make_batch(groups, rewards, config)
        with keeping(setup, run, progress):
            agree_to_go_on(ranks, stop)
        with stop.within_grace():
            updated = update(policy, batch, config, setup.optimizer, setup.reference, step=step)
        moved = time.perf_counter()
        done = Step(step + 1, groups, scores, batch, updated.tokens, dropped, *updated.figures)
        if ranks.leads:
            record = write_down(setup, run, done, {"rollout": sampled - started, "update": moved - sampled})
            bar.set_postfix_str(postfix(record, config))
        progress = Progress(done.number, progress.skipped_in_a_row + 1 if updated.skipped else 0)
        if is_due(progress, config):
            standing(progress, ranks.alike, {"adapter": checksum(policy.trainable().values())})
            if ranks.leads:
                save_checkpoint(run.checkpoints, policy, setup.optimizer, progress, config.checkpoint)
        check_finite(progress, groups, config)
        standing(progress, evaluate_due, setup, run, done.number)
    if ranks.leads:
        with placed(run.adapter) as aside:
            save_adapter(policy, aside)
            write_model_card(run.path, aside / "README.md")


def unless_stopped(setup: Setup, run: Run, stop: Stop, progress: Progress, act: Callable[..., T], *given: Any) -> T:
    """What ``act`` returns, which leaves the policy as it is. A signal ends it at once, and ``progress`` is saved."""
    with keeping(setup, run, progress), stop.at_once():
        return act(*given)


@contextlib.contextmanager
def keeping(setup: Setup, run: Run, progress: Progress) -> Iterator[None]:
    """What ends the run inside leaves the policy as it is, and ``progress`` is saved."""
    try:
        yield
    except (Stopped, RankLost):
        saved = run.checkpoints / f"step_{progress.step:06d}"
        if setup.policy.ranks.leads and progress.step and damage(saved):
            save_checkpoint(run.checkpoints, setup.policy, setup.optimizer, progress, setup.config.checkpoint)
        raise


def agree_to_go_on(ranks: Ranks, stop: Stop) -> None:
    """Raises `Stopped` where any rank was asked to stop: none begins an update that another has left. One that was
    asked still says so, to those that were not; others that do not answer have its grace."""
    with stop.within_grace():
        asked = [number for number in ranks.exchange(stop.requested) if number is not None]
    if asked:
        raise Stopped(asked[0])


def checksum(tensors: Iterable[Tensor]) -> int:
    """Of their bits, without a copy of a whole tensor: torch sums integers in a wider copy."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = (tensor.detach().reshape(-1).view(integers[tensor.element_size()]) for tensor in tensors)
    return sum(int(part.sum(dtype=torch.int64)) for whole in flat for part in whole.split(CHECKED_AT_ONCE))


def write_down(setup: Setup, run: Run, done: Step, phases: dict[str, float]) -> dict[str, Any]:
    """A step's line of the metrics, once it and the step's record in the ledger are on the disk.

    Args:
        phases: seconds of the rollout and of the update.
    """
    config, started = setup.config, time.perf_counter()
    account = token_account(done.tokens, done.batch, config.loss)
    shares = advantage_shares(done, config.advantage)
    lr = learning_rate(config, done.number * config.optim.inner_epochs - 1)
    record = finite(step_metrics(done, account, shares, config) | {"lr": lr})
    if config.ledger.every and done.number % config.ledger.every == 0:
        write_step(run.ledger, done, account, shares, record, text=config.ledger.text)
    record |= cost(done, setup, phases | {"account": time.perf_counter() - started})
    add_metrics(run, record)
    return record


def is_due(progress: Progress, config: Config) -> bool:
    """Whether a checkpoint is: by the config, after the last step, and before the run ends for want of finite steps."""
    asked = progress.step % config.checkpoint.every == 0 or progress.step == config.train.steps
    return asked or progress.skipped_in_a_row > config.train.max_skipped_steps


def check_finite(progress: Progress, groups: Sequence[Group], config: Config) -> None:
    """Raises `NotFinite` after more steps in a row than ``train.max_skipped_steps`` allows."""
    if progress.skipped_in_a_row > config.train.max_skipped_steps:
        ids = ", ".join(repr(group.prompt.case.id) for group in groups)
        raise NotFinite(
            f"step {progress.step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
            f"finite, train.max_skipped_steps = {config.train.max_skipped_steps}; cases of the last one: {ids}"
        )


def build(config: Config, ranks: Ranks = ALONE) -> Setup:
    """Everything a run needs, cheapest checks first: no weights are loaded while a file is missing or the reward is
    unsound."""
    material = gather(config)
    if faults := [*material.faults, *missing_parts(config.model, config.lora)]:
        raise MissingInput("\n       ".join(faults))
    assert material.cases is not None  # else there were faults
    for line in material.left_out if ranks.leads else ():
        print(f"left out  {visible(line)}", file=sys.stderr)
    check_reward(config, examine(config, material))
    cases, sets = material.cases, dict(material.sets)
    policy = load_policy(config.model, config.lora, seed=config.train.seed, ranks=ranks)
    check_prompts(policy, [*cases, *(case for members in sets.values() for case in members)], config)
    section = config.optim
    optimizer = torch.optim.AdamW(
        policy.trainable().values(),
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
    )
    base = policy.model.get_base_model()
    costs = costs_of(base)
    return Setup(
        config=config,
        reward=material.reward,
        cases=cases,
        epoch=stream(cases, config.cases.oversample),
        sets=sets,
        policy=policy,
        reference=adapter_copy(policy) if config.loss.reference == "warm_start" else None,
        optimizer=optimizer,
        costs=costs,
        rates=measure_rates(policy.device, base.dtype, weights_read(costs)),
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


def sample_step(
    setup: Setup, step: int
) -> tuple[tuple[Group, ...], tuple[tuple[Score, ...], ...], tuple[Dropped, ...]]:
    """The groups of a step (0-based), their scores, and what drop-and-refill left out.

    Round 0 samples the step's cases. Each of up to ``rollout.refill_rounds`` more samples further cases, as many as
    there are groups whose rewards are all equal, and those of them that vary take the equal ones' places. What is
    drawn is a function of (seed, step, round, case, member) alone.
    """
    config = setup.config
    met: Counter[str] = Counter()
    groups: list[Group] = []
    scores: list[tuple[Score, ...]] = []
    dropped: list[Dropped] = []
    for round_ in range(1 + config.rollout.refill_rounds):
        silent = [b for b, group in enumerate(groups) if is_silent(group, scores[b], config)]
        wanted = len(silent) if round_ else config.rollout.prompts_per_step
        if not wanted:
            break
        prompts = prompts_for_step(setup, step, round_)[:wanted]
        fresh, fresh_scores = sample_prompts(setup, prompts, noise_keys(prompts, config, step, met))
        if not round_:
            groups, scores = list(fresh), list(fresh_scores)
            continue
        for group, row in zip(fresh, fresh_scores, strict=True):
            if is_silent(group, row, config):
                dropped.append(left_out(group, row))
            else:
                b = silent.pop(0)
                dropped.append(left_out(groups[b], scores[b]))
                groups[b], scores[b] = group, row
    return tuple(groups), tuple(scores), tuple(dropped)


def sample_prompts(
    setup: Setup, prompts: Sequence[Prompt], keys: Sequence[Sequence[int]]
) -> tuple[list[Group], list[tuple[Score, ...]]]:
    """A group and its scores for every prompt, the same on every rank: each samples and scores its share."""
    config, ranks = setup.config, setup.policy.ranks
    share = ranks.mine(len(prompts))
    groups = rollout(
        setup.policy,
        [prompts[i] for i in share],
        [keys[i] for i in share],
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        ignore_end=config.rollout.ignore_end,
    )
    scores = score_groups(setup.reward, groups, config)
    own = [(group.completions, row) for group, row in zip(groups, scores, strict=True)]
    everyone = ranks.gather(own, SAMPLED)
    found = [Group(prompt, completions) for prompt, (completions, _) in zip(prompts, everyone, strict=True)]
    return found, [row for _, row in everyone]


def is_silent(group: Group, scores: Sequence[Score], config: Config) -> bool:
    """No completion of the group will have an advantage."""
    finished = np.array([[completion.finished for completion in group.completions]])
    members = baseline(finished, config.advantage)
    return bool(zero_variance([[score.total for score in scores]], in_baseline=members)[0])


def left_out(group: Group, scores: Sequence[Score]) -> Dropped:
    """What is kept of a group that is not trained on."""
    return Dropped(
        group.prompt.case.id,
        tuple(len(completion.ids) for completion in group.completions),
        tuple(completion.finished for completion in group.completions),
        tuple(score.total for score in scores),
    )


def prompts_for_step(setup: Setup, step: int, round_: int = 0) -> list[Prompt]:
    """The prompts of a step; ``round_`` > 0 gives those that refill it, from a shuffle of their own. With
    ``thinking = "mixed"`` every other one thinks, the phase changing with the step."""
    config = setup.config
    seed = row_key("refill", config.train.seed, round_) if round_ else config.train.seed
    cases = cases_for_step(setup.cases, setup.epoch, seed=seed, step=step, count=config.rollout.prompts_per_step)
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


def noise_keys(prompts: Sequence[Prompt], config: Config, step: int, met: Counter[str]) -> list[list[int]]:
    """Keys of (seed, step, case, member). A case that a step meets again counts its members on: ``met`` remembers how
    many it has had."""
    keys = []
    for prompt in prompts:
        first = met[prompt.case.id]
        met[prompt.case.id] += config.rollout.group_size
        members = range(first, met[prompt.case.id])
        keys.append([row_key("rollout", config.train.seed, step, prompt.case.id, member) for member in members])
    return keys


def cost(step: Step, setup: Setup, phases: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, sampled tokens a second, shares of the roofline of all ranks' devices together, and rank 0's
    peak memory so far (of the device on CUDA, else of the process)."""
    device, ranks = setup.policy.device, setup.policy.ranks.size
    floor = floor_of(step, setup.config, setup.costs, setup.rates)
    kept = sum(len(completion.ids) for group in step.groups for completion in group.completions)
    tokens = kept + sum(sum(one.lengths) for one in step.dropped)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **{f"time/{phase}_s": seconds for phase, seconds in phases.items()},
        "tokens_per_s/rollout": tokens / phases["rollout"],
        "tokens_per_s/step": tokens / sum(phases.values()),
        "roofline/rollout": floor.rollout / phases["rollout"] / ranks,
        "roofline/update": floor.update / phases["update"] / ranks,
        "roofline/step": floor.step / sum(phases.values()) / ranks,
        "memory/peak_bytes": peak,
    }


def postfix(record: dict[str, Any], config: Config) -> str:
    """The bar's figures of the last step."""
    kl = record.get(f"kl/{config.loss.kl}")
    shown = f"reward {record['reward/mean']:+.2f}, clipped {100 * record['completions/clipped_ratio']:.0f} %"
    return shown if kl is None else f"{shown}, KL {kl:.4f}"


def evaluate_due(setup: Setup, run: Run, step: int) -> None:
    """Evaluates what the config asks for after ``step`` steps, in every mode, and writes the records down. What is
    written already is not evaluated again."""
    section = setup.config.evaluate
    at_an_end = step in (0, setup.config.train.steps)
    names = [
        *(section.ends if at_an_end else ()),
        *(section.during if at_an_end or step % section.every == 0 else ()),
    ]
    if not names:
        return
    ranks = setup.policy.ranks
    records = evaluations(run) if ranks.leads else []
    there = ranks.told([[record["step"], record["cases"], record["thinking"]] for record in records])
    due = [(name, mode) for name in names for mode in section.thinking if [step, name, mode] not in there]
    total, hidden = sum(len(setup.sets[name]) for name, _ in due), not (due and ranks.leads)
    with tqdm(total=total, unit="case", leave=False, disable=hidden) as bar:
        for name, mode in due:
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
            if ranks.leads:
                add_evaluation(run, record, verdicts, text=setup.config.ledger.text == "full")


def machine(setup: Setup) -> dict[str, Any]:
    """What `start_run` is told about the device."""
    return {"device": device_name(setup.policy.device), "rates": asdict(setup.rates)}


def device_name(device: torch.device) -> str:
    """For people: "cpu (2 threads)" or the name of the card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads != 1)})"


def plan(setup: Setup) -> str:
    """What is about to happen: the batch arithmetic and the sizes, for a person to check before it starts."""
    config, policy = setup.config, setup.policy
    rows = config.rollout.prompts_per_step * config.rollout.group_size
    trained = sum(p.numel() for p in policy.trainable().values())
    frozen = sum(p.numel() for p in policy.model.parameters()) - trained
    reason = f" (unsound or not, allowed: {config.reward.reason})" if config.reward.allow_unsound else ""
    ranks = f", one of {policy.ranks.size} ranks" if policy.ranks.size > 1 else ""
    return "\n".join(
        (
            f"model     {config.model.name} on {policy.device}{ranks}: {frozen:,} frozen, {trained:,} trained "
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m grpo.train",
        description="Train a LoRA adapter with GRPO.",
        epilog="Exit codes: 0 done, 2 bad input, 3 a file could not be written, 4 another rank was lost, 130, 143, 129 "
        "stopped by SIGINT, SIGTERM, SIGHUP; after 3, 4 and these the same command with --resume goes on.",
    )
    made.add_argument("config", help="a TOML file, for example configs/tiny.toml")
    made.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    made.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )
    return made


def inputs(setup: Setup) -> dict[str, str]:
    """What the config names and does not hold, by sha256: a resume with other contents is no continuation."""
    config = setup.config
    named = {f"evaluate.{kind}.{name}": name for kind in ("ends", "during") for name in getattr(config.evaluate, kind)}
    start = {"lora.warm_start": folder_sha256(resolve(config.lora.warm_start), ADAPTER_FILES)}
    return {
        "reward.set": setup.reward.sha256,
        "cases.train": cases_sha256(setup.cases),
        **{key: cases_sha256(setup.sets[name]) for key, name in named.items()},
        **(start if config.lora.warm_start else {}),
    }


def open_run(out: Path, setup: Setup, source: Source) -> tuple[Run, Progress]:
    """The folder of a run that is started, or, where one was started before, continued from its last whole
    checkpoint, which is put in place."""
    if not is_started(out):
        run = start_run(out, setup.config, source, setup.reward, inputs=inputs(setup), **machine(setup))
        return run, Progress()
    checkpoint, damaged = latest_checkpoint(out / "checkpoints")
    for line in damaged:
        print(f"damaged   {line}", file=sys.stderr)
    progress = load_checkpoint(checkpoint, setup.policy, setup.optimizer) if checkpoint else Progress()
    if progress.step > setup.config.train.steps:
        raise CheckpointError(
            f"{checkpoint}: beyond the {setup.config.train.steps} steps of this run (train.steps): not its own"
        )
    tell(f"resume    from {checkpoint or 'the start: no checkpoint was saved yet'}")
    return continue_run(out, progress, setup.config, inputs(setup)), progress


def check_alike(setup: Setup) -> None:
    """Raises `RankError` where a rank has other inputs than rank 0 or another base; of one that is sharded, what is
    whole on every rank is compared."""
    policy = setup.policy
    if policy.ranks.size == 1:
        return  # there is nobody to differ from, and inputs are read to be hashed
    frozen = [p for p in policy.model.parameters() if not p.requires_grad and not hasattr(p, "to_local")]
    policy.ranks.alike(inputs(setup) | {"model.name's weights": [checksum([p]) for p in frozen]})


def start_alike(setup: Setup, progress: Progress) -> Progress:
    """Adapter, optimiser and progress of rank 0, which alone has read the run folder, on every rank."""
    ranks, optimizer = setup.policy.ranks, setup.optimizer
    parameters = list(setup.policy.trainable().values())
    ranks.copy_(parameters)
    if ranks.told(bool(optimizer.state)):
        for p in parameters:
            if not optimizer.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.zeros(()), **moments}
            ranks.copy_(optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq"))
    return Progress(**ranks.told(asdict(progress)))


def run_config(
    arguments: argparse.Namespace, out: Path, config: Config, source: Source, stop: Stop, ranks: Ranks
) -> Run:
    """The whole run, in a folder that is rank 0's alone."""
    with contextlib.ExitStack() as held:
        versions = {"torch": torch.__version__, "ledger": LEDGER_VERSION}
        with stop.at_once():  # before the base is loaded, which ranks of different configs do not do in step
            ranks.alike(versions | config.model_dump(mode="json"))
        was_there, progress, run = out.is_dir(), Progress(), Run(out)
        with ranks.together(*INPUT_ERRORS):
            if ranks.leads:
                check_folder(out, config, resume=arguments.resume)
                if was_there:
                    held.enter_context(locked(out))
        with stop.at_once(), ranks.together(*INPUT_ERRORS):
            setup = build(config, ranks)
        with stop.at_once():
            check_alike(setup)
        with ranks.together(*INPUT_ERRORS):
            if ranks.leads:
                told = f"config    {source.path}\n{plan(setup)}"
                tell("\n".join(visible(line) for line in told.splitlines()))
                if not was_there:  # a folder is made only now, when nothing can be wrong with the input any more
                    held.enter_context(locked(out))
                check_folder(out, config, resume=arguments.resume)  # since then another process may have been here
                run, progress = open_run(out, setup, source)
        with stop.at_once():
            progress = start_alike(setup, progress)
        train(setup, run, stop, progress)
        return run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    say_anyhow()
    arguments = parser().parse_args(argv)
    os.umask(0o077)  # narratives may be patients' data: what a run writes is its owner's alone
    out, stop, ranks = None, Stop(), None
    try:
        with listening() as stop:
            config, source = load_config(arguments.config, arguments.set)
            out = arguments.out or Path("runs") / config.name
            with joined(config.model.device, timeout_s=config.train.rank_timeout_s) as ranks:
                run = run_config(arguments, out, config, source, stop, ranks)
    except INPUT_ERRORS as error:
        say_refused(error, ranks)
        return 2
    except DiskError as error:
        print(f"error: {error}\n       {how_to_go_on(arguments, out, ranks or expected())}", file=sys.stderr)
        return 3
    except (Stopped, KeyboardInterrupt, RankLost) as error:
        ranks = ranks or expected()
        return say_stopped(error, stop, ranks, how_to_go_on(arguments, out, ranks))
    if not ranks.leads:
        return 0
    tell(f"\n{before_after(evaluations(run))}\n")
    tell(f"adapter   {run.adapter}\nmetrics   {run.metrics}\nanswers   {run.path / 'eval'}")
    tell(f"look      python -m grpo.report {run.path}; python -m grpo.replay {run.path}")
    return 0


def say_refused(error: Exception, ranks: Ranks | None) -> None:
    """One line in all where it can be. Before the ranks have joined (None), the first on each host speaks; then rank 0,
    and another for what it alone has met."""
    leads = (ranks or expected()).leads
    if leads or (isinstance(error, RankError) if ranks is None else not isinstance(error, (Elsewhere, NotFinite))):
        told = error if leads or ranks is None else RankError(f"rank {ranks.rank}: {error}")
        print(error_lines(told), file=sys.stderr)
    else:
        hush()


def say_stopped(error: BaseException, stop: Stop, ranks: Ranks, go_on: str) -> int:
    """Says once what ended a run that nothing was wrong with; the exit code. Where a signal was heard, a rank that is
    lost is one that heard it too. Rank 0 speaks for all, and rank 1 when it may be rank 0 that is lost: without a
    signal, or with the one that torchrun sends then."""
    lost = isinstance(error, RankLost)
    mend = "if it said why, mend that first"
    if lost and stop.requested is None:
        if ranks.rank < 2:
            print(f"\nerror: rank {ranks.rank}: {error}; {mend}; {go_on}", file=sys.stderr)
        return 4
    stopped = error if isinstance(error, Stopped) else Stopped(stop.requested or signal.SIGINT)
    torchrun = stopped.number == signal.SIGTERM and ranks.size > 1
    with contextlib.suppress(OSError):  # after SIGHUP there may be nobody to tell
        if ranks.leads or (ranks.rank == 1 and lost and torchrun):
            who = "" if ranks.leads else f"rank {ranks.rank}: "
            why = " (torchrun sends it when another rank has ended)" if torchrun else ""
            what = f"; {mend}" if lost and torchrun else ""
            print(f"\n{who}stopped by {stopped.name}{why}{what}; {go_on}", file=sys.stderr)
    return stopped.exit_code


def how_to_go_on(arguments: argparse.Namespace, out: Path | None, ranks: Ranks) -> str:
    """For a person whose run was stopped: what is kept, and the command that continues."""
    if out is None or not is_started(out):
        return "nothing was started yet"
    try:
        checkpoint, _ = latest_checkpoint(out / "checkpoints")
    except CheckpointError:
        checkpoint = None
    kept = f"kept up to {checkpoint.name}" if checkpoint else "no step is kept yet"
    overrides = [part for override in arguments.set for part in ("--set", override)]
    again = shlex.join([arguments.config, *(["--out", str(out)] if arguments.out else []), *overrides, "--resume"])
    return f"{kept}; go on with: {launcher(ranks)} grpo.train {again}"


if __name__ == "__main__":
    leave(main())
