"""What a step of a config costs on this device: ``python -m benchmarks.bench configs/tiny.toml``.

Runs the training loop itself, without evaluations, in a folder that is thrown away, and looks at the clock where its
phases meet. The first step compiles, captures and warms up: it is told apart. Beside every phase stands the least that
the device's bandwidth and matmul rate, measured on the spot, would allow (`benchmarks.roofline`). Exit codes: 0 done, 2
bad input, 130 interrupted.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grpo.train as loop
import grpo.update as updating
from benchmarks.roofline import Costs, Floor, Rates, floor_of, limits_of, now
from grpo.config import Config, ConfigSource, load_config
from grpo.engine.sampling import Drawn, sample
from grpo.policy.policy import Policy
from grpo.rollout import ENGINES
from grpo.run import step_record
from grpo.run.checkpoint import Progress
from grpo.run.folder import create_run, provenance, write_json
from grpo.run.setup import Setup, describe_run, device_name, load_setup
from grpo.runtime.atomic_files import DiskError
from grpo.runtime.distributed import require_single_process
from grpo.runtime.errors import INPUT_ERRORS
from grpo.runtime.interrupts import Interrupted, Interrupts, handle_signals
from grpo.runtime.terminal import tolerate_narrow_encodings
from grpo.types import Prompt, StepRecord

AIMS = {"step": 0.6, "decode": 0.7}
"""Shares of the roofline that the project wants on a data-centre GPU with a full-size model."""
PARTS = {
    "rollout": ("prefill", "decode", "reward"),
    "update": ("reference", "train", "optimizer"),
    "account": (),
    "step": (),
}
"""Phases, and what they are made of. What a phase has beyond its parts is in "decode" and "train"."""
NAMES = {"reference": "reference forward", "train": "forward and backward", "optimizer": "optimiser"}


@dataclass(frozen=True, slots=True)
class Taken:
    """One step as it was taken."""

    seconds: dict[str, float]
    floor: dict[str, float]
    tokens: int
    """Sampled, those of dropped groups included."""
    drift: dict[str, float]
    """Of the sampler's log-probabilities from the trainer's, nats."""
    metrics: dict[str, float]


class Clock:
    """Collects a `Taken` a step from the seams of the loop."""

    def __init__(self, setup: Setup, costs: Costs, rates: Rates) -> None:
        self._setup, self._costs, self._rates = setup, costs, rates
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._optimizer_started = 0.0
        self.steps: list[Taken] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds added to the part."""

        def run(*arguments: Any, **named: Any) -> Any:
            started = self._now()
            result = function(*arguments, **named)
            self._spent[part] += self._now() - started
            return result

        return run

    def timing_metrics(self, step: StepRecord, setup: Setup, phases: dict[str, float]) -> dict[str, float]:
        """`grpo.run.step_record.timing_metrics`, and the step's record."""
        metrics = TIMING_METRICS(step, setup, phases)
        spent, self._spent = self._spent, defaultdict(float)
        spent["decode"] = phases["rollout"] - spent["prefill"] - spent["reward"]
        spent["train"] = phases["update"] - spent["reference"] - spent["optimizer"]
        seconds = {**spent, **phases, "step": sum(phases.values())}
        floor = by_part(floor_of(step, setup.config, self._costs, self._rates))
        tokens = round(metrics["tokens_per_s/rollout"] * phases["rollout"])
        self.steps.append(Taken(seconds, floor, tokens, drift(step), metrics))
        return metrics

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the loop is timed."""
        seams: list[tuple[Any, str, Any]] = [
            (step_record, "timing_metrics", self.timing_metrics),
            (loop, "score_groups", self.timed("reward", loop.score_groups)),
            (updating, "reference_logprobs", self.timed("reference", updating.reference_logprobs)),
        ]
        starts = {name: engine.args[0] for name, engine in ENGINES.items() if isinstance(engine, partial)}
        engines = {name: partial(sample, self.timed("prefill", start)) for name, start in starts.items()}
        optimizer = self._setup.optimizer
        with ExitStack() as stack:
            for owner, name, value in seams:
                stack.enter_context(replaced(vars(owner), {name: value}))
            stack.enter_context(replaced(ENGINES, engines))
            for handle in (
                optimizer.register_step_pre_hook(self._before_optimizer),
                optimizer.register_step_post_hook(self._after_optimizer),
            ):
                stack.callback(handle.remove)
            yield

    def _before_optimizer(self, *_: object) -> None:
        self._optimizer_started = self._now()

    def _after_optimizer(self, *_: object) -> None:
        self._spent["optimizer"] += self._now() - self._optimizer_started

    def _now(self) -> float:
        return now(self._setup.policy.device)


TIMING_METRICS = step_record.timing_metrics


@contextmanager
def replaced(table: dict[str, Any], values: dict[str, Any]) -> Iterator[None]:
    """Inside, the table holds these values."""
    before = {name: table[name] for name in values}
    table.update(values)
    try:
        yield
    finally:
        table.update(before)


def by_part(floor: Floor) -> dict[str, float]:
    """Its phases and their parts by name."""
    names = ("prefill", "decode", "reference", "train", "rollout", "update", "step")
    return {name: getattr(floor, name) for name in names}


def drift(step: StepRecord) -> dict[str, float]:
    """How far what tokens were drawn with is from what the trainer computes for them, nats."""
    apart = step.batch.sampler_logprobs[step.batch.completion_mask] - step.logprobs.logprobs[0]
    return {
        "mean_abs": float(apart.abs().mean()),
        "rms": float(apart.square().mean().sqrt()),
        "max_abs": float(apart.abs().max()),
    }


def take(setup: Setup, limits: tuple[Costs, Rates], source: ConfigSource, stop: Interrupts) -> list[Taken]:
    """Run the config's steps, timed."""
    clock = Clock(setup, *limits)
    with tempfile.TemporaryDirectory() as folder, clock.watching():
        run = create_run(
            Path(folder) / "run", setup.config, source, setup.reward, device=device_name(setup.policy.device)
        )
        loop.train(setup, run, stop, Progress())
    return clock.steps


# --- a peer ----------------------------------------------------------------------------------------------------------


def generated(
    policy: Policy, prompts: Sequence[Prompt], owners: Sequence[int], noise: np.ndarray, temperature: float
) -> Drawn:
    """An engine that is transformers' ``generate``, every row prefilled as it does. It is spared the log-probabilities:
    they are zeros."""
    rows, budget = [prompts[b].ids for b in owners], noise.shape[1]
    width = max(len(ids) for ids in rows)
    padded = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in rows], device=policy.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=policy.device)
    with torch.inference_mode():
        said = policy.model.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=budget,
            pad_token_id=0,
            **({"eos_token_id": list(policy.end_token_ids)} if policy.end_token_ids else {"min_new_tokens": budget}),
        )[:, width:].tolist()
    ends = [next((t + 1 for t, i in enumerate(ids) if i in policy.end_token_ids), len(ids)) for ids in said]
    return [ids[:n] for ids, n in zip(said, ends, strict=True)], [[0.0] * n for n in ends]


def beside(setup: Setup, limits: tuple[Costs, Rates], source: ConfigSource, stop: Interrupts) -> Taken:
    """The second of two steps of the same loop with ``generate`` in the engine's place."""
    config = setup.config.model_copy(update={"train": setup.config.train.model_copy(update={"steps": 2})})
    with replaced(ENGINES, dict.fromkeys(ENGINES, generated)):
        return take(replace(setup, config=config), limits, source, stop)[-1]


# --- what is said ----------------------------------------------------------------------------------------------------


def summary(steps: Sequence[Taken], made: float) -> dict[str, Any]:
    """Medians over the steps after the first."""
    first, *rest = steps
    taken = rest or [first]
    seconds = {name: statistics.median(one.seconds.get(name, 0.0) for one in taken) for name in first.seconds}
    floor = {name: statistics.median(one.floor[name] for one in taken) for name in first.floor}
    return {
        "seconds": seconds,
        "step_seconds": [one.seconds["step"] for one in taken],
        "floor_seconds": floor,
        "achieved": {name: floor[name] / seconds[name] for name in floor if seconds.get(name)},
        "tokens": statistics.median(one.tokens for one in taken),
        "drift_nats": {name: max(one.drift[name] for one in taken) for name in first.drift},
        "peak_bytes": steps[-1].metrics["memory/peak_bytes"],
        "made_seconds": made,
        "first_step_seconds": first.seconds["step"],
    }


def peer_summary(peer: Taken, seconds: dict[str, float]) -> dict[str, Any]:
    """The peer's seconds, and their ratios to ours."""
    return {
        "seconds": peer.seconds,
        "times_ours": {name: peer.seconds[name] / seconds[name] for name in ("rollout", "step")},
    }


def table(found: dict[str, Any]) -> str:
    """A line a phase, with its parts below it."""
    lines = [f"{'phase':<26}{'seconds':>9}{'tokens/s':>11}{'roofline, s':>13}{'achieved':>10}"]
    for phase, parts in PARTS.items():
        for name in (phase, *parts):
            if name not in found["seconds"]:
                continue
            seconds, floor = found["seconds"][name], found["floor_seconds"].get(name)
            speed = f"{found['tokens'] / seconds:,.0f}" if seconds and name in PARTS else ""
            least = f"{floor:>13.3f}{floor / seconds:>10.1%}" if floor and seconds else ""
            label = NAMES.get(name, name)
            lines.append(f"{label if name == phase else '  ' + label:<26}{seconds:>9.3f}{speed:>11}{least}".rstrip())
    return "\n".join(lines)


def said(found: dict[str, Any], setup: Setup, rates: Rates) -> str:
    """The report on our own steps."""
    apart, steps = found["drift_nats"], found["step_seconds"]
    device = device_name(setup.policy.device)
    where = "on the device" if setup.policy.device.type == "cuda" else "of the whole process"
    lines = [
        f"device    {device}: {rates.bandwidth / 1e9:,.1f} GB/s, {rates.matmul / 1e12:,.3f} TFLOP/s, as measured",
        f"made      all but the steps in {found['made_seconds']:.1f} s; the first step, which warms up, "
        f"{found['first_step_seconds']:.2f} s",
        f"steps     {len(steps)} measured, {min(steps):.2f} to {max(steps):.2f} s; medians below; "
        f"{found['tokens']:,.0f} sampled tokens a step",
        "",
        table(found),
        "",
        f"drift     sampler against trainer, nats a token: mean |x| {apart['mean_abs']:.1e}, rms {apart['rms']:.1e}, "
        f"max {apart['max_abs']:.1e}",
        f"memory    peak {found['peak_bytes'] / 1e9:.2f} GB {where}",
        *(
            f"aim       {name} at {aim:.0%} of its roofline or more: {found['achieved'][name]:.0%}, "
            f"{'met' if found['achieved'][name] >= aim else 'missed'}"
            for name, aim in AIMS.items()
            if setup.policy.device.type == "cuda"
        ),
    ]
    return "\n".join(lines)


def peer_line(peer: dict[str, Any]) -> str:
    """The report on the peer."""
    times = peer["times_ours"]
    return (
        f"generate  the same loop on transformers' generate: step {peer['seconds']['step']:.2f} s, "
        f"{times['step']:.2f} times ours; rollout {times['rollout']:.2f} times"
    )


def bench_config(path: str, overrides: Sequence[str], steps: int) -> tuple[Config, ConfigSource]:
    """The config without its evaluations, for so many steps."""
    without = (
        "evaluate.before_and_after={}",
        "evaluate.periodic={}",
        "optim.warmup_steps=0",
        "checkpoint.every=1000000",
    )
    return load_config(path, [*overrides, *without, f"train.steps={steps}"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    tolerate_narrow_encodings()
    require_single_process("benchmarks.bench")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that warms up (default: 3)")
    parser.add_argument("--against", choices=["generate"], help="take a step with transformers' generate as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: its folder is not there; make it first")
    os.umask(0o077)
    try:
        return bench(arguments)
    except INPUT_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DiskError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Interrupted as stopped:
        print(f"stopped by {stopped.name}; nothing is kept", file=sys.stderr)
        return stopped.exit_code


def bench(arguments: argparse.Namespace) -> int:
    """The whole of it. A signal ends it, and the folder that it works in goes with it."""
    with handle_signals() as stop:
        with stop.at_once():
            config, source = bench_config(arguments.config, arguments.set, arguments.steps + 1)
            started = now(torch.device("cpu"))
            setup = load_setup(config)
            made = now(setup.policy.device) - started
            limits = limits_of(setup.policy)
        print(f"config    {source.path}\n{describe_run(setup)}", flush=True)
        found = summary(take(setup, limits, source, stop), made)
        print(said(found, setup, limits[1]), flush=True)
        facts = {
            "config": str(source.path),
            "overrides": source.overrides,
            **provenance(device_name(setup.policy.device)),
        }
        facts["machine"] |= asdict(limits[1])
        if arguments.json:  # before the peer, which may take longer than anyone waits
            write_json(arguments.json, facts | found)
        if arguments.against:
            found["generate"] = peer_summary(beside(setup, limits, source, stop), found["seconds"])
            print(peer_line(found["generate"]))
            if arguments.json:
                write_json(arguments.json, facts | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
