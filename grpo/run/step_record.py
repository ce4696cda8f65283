"""What a step leaves behind: its ledger entry, its line in ``metrics.jsonl``, and its progress on the terminal."""

import resource
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from grpo.config import Config
from grpo.metrics import advantage_by_component, compute_token_terms, step_metrics
from grpo.run.checkpoint import Progress
from grpo.run.folder import RunFolder, append_metrics, nan_to_none
from grpo.run.ledger import write_step
from grpo.run.setup import Setup
from grpo.runtime.distributed import World
from grpo.runtime.terminal import print_unless_pipe_closed
from grpo.types import StepRecord
from grpo.update import learning_rate

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's format without the rate, which does not fit into 80 columns; the metrics record the seconds of each step."""


def record_step(setup: Setup, run: RunFolder, record: StepRecord, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the step to the ledger and its metrics to ``metrics.jsonl``; return the metrics.

    Args:
        seconds: time of the rollout and of the update.
    """
    config, started = setup.config, time.perf_counter()
    account = compute_token_terms(record.logprobs, record.batch, config.loss)
    shares = advantage_by_component(record, config.advantage)
    lr = learning_rate(config, record.number * config.optim.inner_epochs - 1)
    metrics = nan_to_none(step_metrics(record, account, shares, config) | {"lr": lr})
    if config.ledger.every and record.number % config.ledger.every == 0:
        write_step(run.ledger, record, account, shares, metrics, text=config.ledger.text)
    metrics |= timing_metrics(record, setup, seconds | {"account": time.perf_counter() - started})
    append_metrics(run, metrics)
    return metrics


def timing_metrics(record: StepRecord, setup: Setup, phases: dict[str, float]) -> dict[str, float]:
    """Return the seconds of each phase, the sampled tokens per second, and rank 0's peak memory so far (of the device
    with CUDA, else of the process)."""
    tokens = sum(len(completion.ids) for group in record.groups for completion in group.completions)
    tokens += sum(sum(group.lengths) for group in record.replaced_groups)
    if setup.policy.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(setup.policy.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **{f"time/{phase}_s": seconds for phase, seconds in phases.items()},
        "tokens_per_s/rollout": tokens / phases["rollout"],
        "tokens_per_s/step": tokens / sum(phases.values()),
        "memory/peak_bytes": peak,
        "memory/micro_batch_rows": setup.micro_batch_limit.rows,
    }


def progress_bar(progress: Progress, config: Config, ranks: World) -> Any:
    """Return the remaining steps, with a bar if rank 0's standard error is a terminal."""
    hidden = not (ranks.is_main and sys.stderr.isatty())
    steps = range(progress.step, config.train.steps)
    return tqdm(steps, initial=progress.step, total=config.train.steps, bar_format=BAR_FORMAT, disable=hidden)


def show_progress(bar: Any, metrics: dict[str, Any], config: Config) -> None:
    """Update the bar; without a terminal print one line per step instead."""
    text = progress_text(metrics, config)
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    line = f"step {metrics['step']}/{config.train.steps}  {text}, {seconds:.1f} s"
    print_unless_pipe_closed(line, sys.stderr)


def progress_text(metrics: dict[str, Any], config: Config) -> str:
    """Return the reward, clipped share and KL of a step."""
    kl = metrics.get(f"kl/{config.loss.kl}")
    text = f"reward {metrics['reward/mean']:+.2f}, clipped {100 * metrics['completions/clipped_ratio']:.0f} %"
    return text if kl is None else f"{text}, KL {kl:.4f}"
