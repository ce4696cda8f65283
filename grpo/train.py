"""The loop and nothing else: ``python -m grpo.train configs/tiny.toml``.

    cases → prompts → groups of completions → rewards → advantages → clipped, KL-anchored update of the adapter

Everything is built and checked before the first rollout. Exit codes: 0 done, 2 bad input, 3 a file could not be
written, 4 another rank was lost, 130, 143, 129 stopped by SIGINT, SIGTERM, SIGHUP; after 3, 4 and these --resume goes
on. Under ``torchrun`` each process runs this loop: see `grpo.runtime.distributed`.
"""

import argparse
import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from grpo.batch import make_batch
from grpo.config import Config, Source, load_config
from grpo.dynamic_sampling import sample_step
from grpo.evaluation.answers import evaluate
from grpo.evaluation.metrics import summarise
from grpo.metrics import advantage_shares, step_metrics, token_account
from grpo.policy.policy import save_adapter
from grpo.report.model_card import write_model_card
from grpo.run.checkpoint import Progress, damage, save_checkpoint
from grpo.run.exit_messages import INPUT_ERRORS, NotFinite, how_to_go_on, say_refused, say_stopped
from grpo.run.folder import Run, add_evaluation, add_metrics, before_after, check_folder, evaluations, finite, locked
from grpo.run.ledger import LEDGER_VERSION, write_step
from grpo.run.resume import check_alike, checksum, open_run, start_alike
from grpo.run.roofline import floor_of
from grpo.run.self_check import DriftWarning, check_on_cuda
from grpo.run.setup import Setup, build, plan, with_check
from grpo.runtime.atomic_files import DiskError, placed
from grpo.runtime.distributed import RankLost, Ranks, expected, joined, leave
from grpo.runtime.interrupts import Stop, Stopped, listening
from grpo.runtime.out_of_memory import OutOfMemory
from grpo.runtime.terminal import fit, say_anyhow, tell, visible
from grpo.types import Group, Step
from grpo.update import learning_rate, update

T = TypeVar("T")
KEEPING = (Stopped, RankLost, OutOfMemory)
"""What ends a run and leaves the policy as the last completed step left it."""

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's format without the rate, for which 80 columns have no room; the metrics record the seconds of every step."""


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
    drift = DriftWarning(policy.head.weight.dtype, config.rollout.temperature)
    bar = tqdm(steps, initial=first, total=config.train.steps, bar_format=BAR_FORMAT, disable=not ranks.leads)
    for step in bar:
        started = time.perf_counter()
        groups, scores, dropped = standing(progress, sample_step, setup, step)
        sampled = time.perf_counter()
        rewards = np.array([[score.total for score in row] for row in scores])
        batch = make_batch(groups, rewards, config)
        with keeping(setup, run, progress):
            agree_to_go_on(ranks, stop)
        with stop.within_grace(), keeping(setup, run, progress, (OutOfMemory,)):
            updated = update(policy, batch, config, setup.optimizer, setup.reference, step=step)
        moved = time.perf_counter()
        done = Step(step + 1, groups, scores, batch, updated.tokens, dropped, *updated.figures)
        if ranks.leads:
            record = write_down(setup, run, done, {"rollout": sampled - started, "update": moved - sampled})
            bar.set_postfix_str(postfix(record, config))
            drift.look(done.number, record["sampler/max_abs_logprob_diff"])
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
def keeping(
    setup: Setup, run: Run, progress: Progress, faults: tuple[type[BaseException], ...] = KEEPING
) -> Iterator[None]:
    """Save ``progress`` when one of ``faults`` ends the run inside, unless the policy has moved since."""
    try:
        yield
    except faults as error:
        if getattr(error, "midway", False):
            raise
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
    with tqdm(total=total, bar_format=BAR_FORMAT, leave=False, disable=hidden) as bar:
        for name, mode in due:
            bar.set_description(f"evaluate {fit(name, 18).rstrip()}, thinking {mode}")
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
        with stop.at_once(), ranks.together(*INPUT_ERRORS):
            check = check_on_cuda(setup.policy)
        with stop.at_once():
            setup = with_check(setup, check)
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
        go_on = how_to_go_on(arguments, out, ranks or expected()) if isinstance(error, OutOfMemory) else ""
        say_refused(error, ranks, go_on)
        return 2
    except DiskError as error:
        print(f"error: {error}\n       {how_to_go_on(arguments, out, ranks or expected())}", file=sys.stderr)
        return 3
    except (Stopped, KeyboardInterrupt, RankLost) as error:
        ranks = ranks or expected()
        return say_stopped(error, stop, ranks, how_to_go_on(arguments, out, ranks))
    if not ranks.leads:
        return 0
    if records := evaluations(run):
        tell(f"\n{before_after(records)}\n")
    tell(f"adapter   {run.adapter}\nmetrics   {run.metrics}" + (f"\nanswers   {run.path / 'eval'}" if records else ""))
    tell(f"look      python -m grpo report {run.path}; python -m grpo replay {run.path}")
    return 0


if __name__ == "__main__":
    leave(main())
