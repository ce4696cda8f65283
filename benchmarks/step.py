"""One training step beside a peer's, on the same model, prompts and adapter, interleaved round by round.

    python benchmarks/step.py --against trl --rounds 5 --record benchmarks/step.json
    python benchmarks/step.py --config configs/v49_random.toml --device cuda --dtype bfloat16 \
        --set optim.micro_batch_size=2 --set rollout.max_new_tokens=256 --rounds 1 --no-memory

Three ways to take the same step: TRL's GRPOTrainer; our loop with our engine; our loop with transformers' `generate`
in the engine's place. TRL runs its own `train()`; what it does between `on_step_begin` and `on_step_end` is its step,
and between two of its steps ours run on the same prompts. The first round is a warm-up and left out.

rollout   prompts → sampled ids, texts and rewards (TRL: `_generate` and `_calculate_rewards`)
update    advantages, reference forward, loss, backward, clipping, optimiser, metrics (TRL: the rest of its step)

What is made equal: weights, warm start and its copy as the reference, rendered prompts (checked id by id), budget,
temperature, reward, loss, rows a micro-batch, dtype, no checkpointing. What cannot be: the tokens drawn. The learning
rate is 1e-12, so that no policy moves and all lengths come from one distribution; every ratio is given as it is and a
sampled token, too. On a CPU that others use as well, the ratios of processor seconds say more than those of the clock:
they are given beside them (and of no meaning on CUDA). Peak memory is taken in a process of its own for each way, above
what it held before its first step.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from grpo.batch import group_advantages, make_batch
from grpo.config import Config, load_config
from grpo.dynamic_sampling import sample_step
from grpo.metrics import advantage_by_component, compute_token_terms, step_metrics
from grpo.policy.base_model import card_name, resolve_device
from grpo.policy.policy import Policy, load_policy
from grpo.prompts import prompts_for_step
from grpo.run.setup import Setup, load_setup
from grpo.scoring import score_groups
from grpo.types import Completion, Group, Prompt, StepRecord
from grpo.update import update_policy
from rewards import Score

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"
STILL = (
    "optim.learning_rate=1e-12",
    'optim.schedule="constant"',
    "model.gradient_checkpointing=false",
)
"""No policy moves."""
AS_TRL = {
    "loss.surrogate": "clip",
    "loss.token_weights": "sequence",
    "loss.kl": "k3",
    "advantage.kind": "group",
    "advantage.epsilon": 1e-4,
    "advantage.ddof": 1,
    "advantage.truncated_in_baseline": True,
    "optim.inner_epochs": 1,
    "rollout.resample_rounds": 0,
}
"""What the config must say for TRL's `loss_type="grpo"` to be the same step."""
PHASES = ("rollout", "update", "step")
PEER = "trl"


@dataclass(frozen=True, slots=True)
class Taken:
    """One step of one way."""

    rollout: float
    """Seconds by the clock."""
    update: float
    step: float
    rollout_cpu: float
    """Processor seconds of all threads."""
    update_cpu: float
    step_cpu: float
    tokens: int
    """Sampled, end tokens included."""
    longest: int


def step_prompts(setup: Setup, step: int) -> list[Prompt]:
    """Return the prompts of a step (0-based)."""
    return prompts_for_step(setup.cases, setup.epoch_indices, setup.policy.tokenizer, setup.config, step)


def now(device: torch.device) -> np.ndarray:
    """Seconds of the monotonic clock and of the processor, [2], the device having finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return np.array([time.perf_counter(), time.process_time()])


def taken(rollout: np.ndarray, step: np.ndarray, lengths: Sequence[int]) -> Taken:
    """From the seconds [2] of the rollout and of the whole step."""
    (rollout_s, rollout_cpu), (step_s, step_cpu) = rollout.tolist(), step.tolist()
    return Taken(
        rollout_s, step_s - rollout_s, step_s, rollout_cpu, step_cpu - rollout_cpu, step_cpu, sum(lengths), max(lengths)
    )


def our_config(path: Path, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The config as both sides can run it, and all that was laid over the file.

    Raises:
        ValueError: it asks for a step that TRL's `loss_type="grpo"` does not take.
    """
    laid = list(overrides)
    config, _ = load_config(path, laid)
    if config.lora.warm_start:  # what TRL makes of a loaded adapter is a copy of it
        laid.append('loss.reference="warm_start"')
        config, _ = load_config(path, laid)
    found = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in AS_TRL}
    if wrong := [f"{key} = {found[key]!r}, expected {value!r}" for key, value in AS_TRL.items() if found[key] != value]:
        raise ValueError(f"{path}: no equal step in TRL: {'; '.join(wrong)}")
    rows = config.rollout.prompts_per_step * config.rollout.group_size
    if rows % config.optim.micro_batch_size:
        raise ValueError(f"{path}: optim.micro_batch_size: expected a divisor of {rows} rows, TRL cuts evenly")
    return config, laid


# --- ours ---------------------------------------------------------------------------------------------------

Sampled = tuple[tuple[Group, ...], tuple[tuple[Score, ...], ...]]


def with_engine(setup: Setup, step: int) -> Sampled:
    """The loop's own rollout."""
    groups, scores, _ = sample_step(setup, step)
    return groups, scores


def with_generate(setup: Setup, step: int) -> Sampled:
    """The same prompts through transformers' `generate`, every row prefilled as it does."""
    config, policy = setup.config, setup.policy
    prompts = [p for p in step_prompts(setup, step) for _ in range(config.rollout.group_size)]
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[i, width - len(prompt.ids) :] = 1
    with torch.inference_mode():
        drawn = policy.model.generate(
            input_ids=ids.to(policy.device),
            attention_mask=mask.to(policy.device),
            do_sample=True,
            temperature=config.rollout.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.rollout.max_new_tokens,
            pad_token_id=policy.end_token_ids[0],
            **endings(config, policy),
            output_scores=True,
            return_dict_in_generate=True,
        )
        picked = drawn.sequences[:, width:]
        logprobs = torch.stack(
            [s.float().log_softmax(-1).gather(1, picked[:, t, None])[:, 0] for t, s in enumerate(drawn.scores)], 1
        )
    ends = () if config.rollout.ignore_eos else policy.end_token_ids
    rows = [completion(policy, i, lp, ends) for i, lp in zip(picked.tolist(), logprobs.tolist(), strict=True)]
    size = config.rollout.group_size
    groups = tuple(Group(prompts[b], tuple(rows[b : b + size])) for b in range(0, len(rows), size))
    return groups, score_groups(setup.reward, groups, config)


WAYS: dict[str, Callable[[Setup, int], Sampled]] = {"engine": with_engine, "generate": with_generate}
"""Our loop by what samples for it."""


def endings(config: Config, policy: Policy) -> dict[str, Any]:
    """What tells `generate` when a row ends: at an end token, or, where those are ignored, never: it draws none."""
    ignored = {"min_new_tokens": config.rollout.max_new_tokens} if config.rollout.ignore_eos else {}
    return {"eos_token_id": list(policy.end_token_ids), **ignored}


def completion(policy: Policy, ids: Sequence[int], logprobs: Sequence[float], ends: Sequence[int]) -> Completion:
    """A row cut after its first end token."""
    length = next((t + 1 for t, i in enumerate(ids) if i in ends), len(ids))
    kept = tuple(ids[:length])
    finished = kept[-1] in ends
    text = policy.tokenizer.decode(kept[:-1] if finished else kept, skip_special_tokens=False)
    return Completion(kept, tuple(logprobs[:length]), finished, text)


def our_step(setup: Setup, sample: Callable[[Setup, int], Sampled], step: int) -> Taken:
    """The loop of `grpo.train` once, its metrics included, without the files it writes."""
    config, policy = setup.config, setup.policy
    started = now(policy.device)
    groups, scores = sample(setup, step)
    sampled = now(policy.device)
    rewards = np.array([[score.total for score in row] for row in scores])
    batch = make_batch(groups, group_advantages(groups, rewards, config.advantage), config)
    updated = update_policy(policy, batch, config, setup.optimizer, setup.reference, step=step)
    done = StepRecord(step + 1, groups, scores, batch, updated.logprobs, (), *updated.figures)
    account = compute_token_terms(done.logprobs, batch, config.loss)
    step_metrics(done, account, advantage_by_component(done, config.advantage), config)
    moved = now(policy.device)
    return taken(sampled - started, moved - started, [len(ids) for ids in batch.completion_ids])


# --- TRL ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """What is seen of TRL's running step."""

    device: torch.device
    started: np.ndarray = field(default_factory=lambda: np.zeros(2))
    rollout: np.ndarray = field(default_factory=lambda: np.zeros(2))
    lengths: tuple[int, ...] = ()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds counted as rollout."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = now(self.device)
            result = function(*args, **kwargs)
            self.rollout = self.rollout + now(self.device) - before
            return result

        return run


def trl_settings(config: Config, policy: Policy, folder: str, steps: int) -> Any:
    """`GRPOConfig` for the same step: no vLLM, no mixed precision, no logging or saving."""
    from trl import GRPOConfig

    rows = config.rollout.prompts_per_step * config.rollout.group_size
    accumulated = rows // config.optim.micro_batch_size
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=config.optim.micro_batch_size,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated,
        num_generations=config.rollout.group_size,
        max_completion_length=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        generation_kwargs=endings(config, policy),
        max_steps=steps,
        loss_type="grpo",
        beta=config.loss.beta,
        epsilon=config.loss.clip_low,
        epsilon_high=config.loss.clip_high,
        mask_truncated_completions=config.loss.mask_truncated,
        learning_rate=config.optim.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=config.optim.beta1,
        adam_beta2=config.optim.beta2,
        adam_epsilon=config.optim.epsilon,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=config.model.device == "cpu",
        use_vllm=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.train.seed,
    )


def as_text(tokenizer: Any, prompt: Prompt) -> str:
    """The rendered chat, which TRL encodes to the very ids that we sample from.

    Raises:
        ValueError: it would not; names the case.
    """
    # a random base's own decode adds an answer
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    text = PreTrainedTokenizerFast.decode(tokenizer, prompt.ids, **options)
    if tuple(tokenizer(text)["input_ids"]) != prompt.ids:
        raise ValueError(f"case {prompt.case.id!r}: decoding and encoding its prompt gives other ids")
    return text


def run_trl(setup: Setup, steps: int, begin: Callable[[], None], after: Callable[[int, Taken], None]) -> None:
    """TRL's own loop over the prompts of our steps 0 … ``steps`` - 1; ``begin`` before its first, ``after`` each."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    config = setup.config
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    watch = Watch(policy.device)
    prompts = [prompt for step in range(steps) for prompt in step_prompts(setup, step)]
    rows = [{"prompt": as_text(policy.tokenizer, p), "row": i} for i, p in enumerate(prompts)]

    def rewards(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        watch.lengths = tuple(len(ids) for ids in completion_ids)
        expected = prompts_of_batch(row, config)
        if row != expected:
            raise ValueError(f"TRL drew the prompts {sorted(set(row))}, expected {sorted(set(expected))}")
        pairs = zip(row, completion_ids, strict=True)
        ends = () if config.rollout.ignore_eos else policy.end_token_ids
        groups = [Group(prompts[i], (completion(policy, ids, [0.0] * len(ids), ends),)) for i, ids in pairs]
        return [scores[0].total for scores in score_groups(setup.reward, groups, config)]

    class Between(TrainerCallback):  # TRL takes nothing simpler
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            begin()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.rollout = np.zeros(2)
            watch.started = now(watch.device)

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            after(state.global_step - 1, taken(watch.rollout, now(watch.device) - watch.started, watch.lengths))

    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = GRPOTrainer(
            model=policy.model,
            reward_funcs=rewards,
            args=trl_settings(config, policy, folder, steps),
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.tokenizer,
            callbacks=[Between()],
        )
        trainer._generate = watch.timed(trainer._generate)
        trainer._calculate_rewards = watch.timed(trainer._calculate_rewards)
        trainer.train()


def prompts_of_batch(row: Sequence[int], config: Config) -> list[int]:
    """The rows of the data set that our step with the first of them is made of, each as often as it has members."""
    count = config.rollout.prompts_per_step
    first = row[0] // count * count
    return [i for i in range(first, first + count) for _ in range(config.rollout.group_size)]


# --- rounds -------------------------------------------------------------------------------------------------


def measure(ways: Sequence[str], config: Config, rounds: int, begin: Callable[[], None]) -> list[dict[str, Any]]:
    """One record a round, the warm-up first: each way's step on the same prompts."""
    setup = load_setup(config)
    records: list[dict[str, Any]] = []

    def ours(step: int, record: dict[str, Any]) -> None:
        names = [name for name in WAYS if name in ways]
        for name in names if step % 2 else reversed(names):
            gc.collect()
            record[name] = asdict(our_step(setup, WAYS[name], step))
        records.append(record)
        shown = "  ".join(f"{name} {record[name]['step']:6.2f} s" for name in ways)
        print(f"round {step}  load {record['load_average']:5.2f}  {shown}", file=sys.stderr, flush=True)
        gc.collect()

    def load() -> dict[str, Any]:
        return {"load_average": round(os.getloadavg()[0], 2)}

    if PEER in ways:
        run_trl(setup, rounds + 1, begin, lambda step, theirs: ours(step, load() | {PEER: asdict(theirs)}))
    else:
        begin()
        for step in range(rounds + 1):
            ours(step, load())
    return records


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(records: Sequence[dict[str, Any]], ways: Sequence[str]) -> dict[str, Any]:
    """Seconds and tokens a second of each way, and its ratios to the peer, round by round.

    >>> one, half = (asdict(taken(np.ones(2) * x, 2 * np.ones(2) * x, [int(10 * x)])) for x in (1.0, 0.5))
    >>> found = summary([{"trl": one, "engine": half}], ["trl", "engine"])["engine"]
    >>> found["step"]["ratio"]["median"], found["step"]["ratio_per_token"]["median"]
    (0.5, 1.0)
    """
    found: dict[str, Any] = {}
    for name in ways:
        found[name] = {"tokens_per_s": spread([r[name]["tokens"] / r[name]["step"] for r in records])}
        found[name]["tokens"] = spread([r[name]["tokens"] for r in records])
        for phase in PHASES:
            found[name][phase] = {"seconds": spread([r[name][phase] for r in records])}
            found[name][phase]["cpu_seconds"] = spread([r[name][f"{phase}_cpu"] for r in records])
            if name != PEER and PEER in ways:
                ratios = [r[name][phase] / r[PEER][phase] for r in records]
                each = [x * r[PEER]["tokens"] / r[name]["tokens"] for x, r in zip(ratios, records, strict=True)]
                cpu_ratios = [r[name][f"{phase}_cpu"] / r[PEER][f"{phase}_cpu"] for r in records]
                found[name][phase] |= {"ratio": spread(ratios), "ratio_per_token": spread(each)}
                found[name][phase]["cpu_ratio"] = spread(cpu_ratios)
    return found


def table(found: dict[str, Any], memory: dict[str, int]) -> str:
    """Markdown: one row a way; ratios to TRL as median (least–greatest), by the clock, a sampled token, and by
    processor seconds."""
    titles = ["", "step, s", "tokens/s", *(f"{p} / TRL" for p in PHASES), "a token: step / TRL"]
    titles += [*(f"CPU s: {p} / TRL" for p in PHASES), "peak memory, MB"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, one in found.items():
        cells = [f"{one['step']['seconds']['median']:.2f}", f"{one['tokens_per_s']['median']:.0f}"]
        spreads = [one[phase].get("ratio") for phase in PHASES] + [one["step"].get("ratio_per_token")]
        spreads += [one[phase].get("cpu_ratio") for phase in PHASES]
        cells += [f"{s['median']:.2f} ({s['min']:.2f}–{s['max']:.2f})" if s else "1" for s in spreads]
        cells += [f"{memory[name] / 1e6:.0f}" if name in memory else "–"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


# --- memory -------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak(device: torch.device) -> int:
    """The most bytes held so far, of the device or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage: its maximum begins with that of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def alone(way: str, config: Config) -> dict[str, int]:
    """Peak bytes of two steps above what was held before the first; runs in a process of its own."""
    before: list[int] = []
    device = resolve_device(config.model.device)

    def begin() -> None:
        gc.collect()
        before.append(torch.cuda.memory_allocated(device) if device.type == "cuda" else resident())

    measure([way], config, 1, begin)
    return {"peak_bytes": peak(device) - before[0], "before_bytes": before[0]}


def memory_of(ways: Sequence[str], arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """`alone` for each way."""
    command = [sys.executable, __file__, "--config", str(arguments.config), "--device", arguments.device]
    command += ["--dtype", arguments.dtype, *(part for value in arguments.set for part in ("--set", value))]
    found = {}
    for way in ways:
        done = subprocess.run([*command, "--alone", way], check=True, stdout=subprocess.PIPE, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return found


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def facts(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Where and with what."""
    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": card_name(resolve_device(arguments.device)),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "config": arguments.config.name,
        "overrides": overrides,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=[PEER], default=PEER)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure peak memory")
    parser.add_argument("--alone", choices=[PEER, *WAYS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {arguments.rounds}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    place = [f'model.device="{arguments.device}"', f'model.dtype="{arguments.dtype}"']
    try:
        config, overrides = our_config(arguments.config, [*STILL, *place, *arguments.set])
    except ValueError as error:  # a config's, and what TRL cannot do
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.alone:
        print(json.dumps(alone(arguments.alone, config)))
        return 0
    ways = [PEER, *WAYS]
    record = facts(arguments, overrides)
    rounds = measure(ways, config, arguments.rounds, lambda: None)
    found = summary(rounds[1:], ways)
    memory = {} if arguments.no_memory else memory_of(ways, arguments)
    print(table(found, {name: one["peak_bytes"] for name, one in memory.items()}))
    if arguments.record:
        whole = record | {"summary": found, "memory": memory, "warm_up": rounds[0], "rounds": rounds[1:]}
        arguments.record.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
