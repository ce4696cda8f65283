"""Peak memory of log-probabilities, entropy and loss, forward and backward, at the true vocabulary.

    python benchmarks/loss_memory.py --record benchmarks/loss_memory.json

Given hidden states [M, H] and a frozen head [248320, H], each way gives the clipped loss with k3, the entropy of
every token, and the gradient on the hidden states. A way runs in a process of its own; its figure is the peak resident
memory (Linux) less what the process held once weights, hidden states and the targets were there.

ours     grpo.logprobs.token_logprobs (a chunk of logits at a time) and grpo.loss.grpo_loss
plain    full logits, log_softmax, gather: as a hand-written loop would have it

H is 1,024, a quarter of the 9B model's, since the products would take half an hour on two cores and what is measured
does not depend on it, but for the one [M, H] that each way returns: at 4,096 wide 0.1 GB more.

The plain way does not fit this machine at 8 × 1024 tokens. It is run at two small counts, and the straight line through
them is read at the full one ("scaled"; every one of its tensors is [M, V], so it is a line).
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.logprobs import token_logprobs
from grpo.loss import grpo_loss

VOCABULARY, WIDTH = 248_320, 1024
TOKENS = 8 * 1024
PLAIN_TOKENS = (128, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGET = 3.5e9

Scored = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [M]."""
    return token_logprobs(hidden, head, targets, temperature=1.0)


def plain(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same, all logits at once."""
    law = (hidden.to(head.dtype) @ head.T).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(law.exp() * law).sum(-1)
    return law.gather(1, targets[:, None])[:, 0], entropy


WAYS: dict[str, Scored] = {"ours": ours, "plain": plain}


def resident() -> int:
    """Bytes this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes it ever held. getrusage will not do: its maximum begins with the starting process's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def random_head(vocabulary: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[V, H] drawn in small pieces, so that making it leaves no peak behind."""
    head = torch.empty(vocabulary, WIDTH, dtype=dtype)
    for piece in head.split(1024):
        piece.copy_(0.02 * torch.randn(piece.shape, generator=generator))
    return head


def one(way: str, dtype: str, tokens: int, vocabulary: int) -> dict[str, Any]:
    """The figures of one way; runs in a process of its own."""
    generator = torch.Generator().manual_seed(0)
    head = random_head(vocabulary, DTYPES[dtype], generator)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    advantages = torch.linspace(-1.0, 1.0, 8)
    row = 8 if tokens % 8 == 0 else 1
    shape = (row, tokens // row)
    before, before_peak, started = resident(), peak(), time.perf_counter()
    logprobs, entropy = WAYS[way](hidden, head, targets)
    logprobs = logprobs.view(shape)
    terms = grpo_loss(
        logprobs,
        logprobs.detach(),
        logprobs.detach() - 0.01,
        advantages[:row].double(),
        torch.ones(shape, dtype=torch.bool),
        torch.full(shape, 1 / tokens),
        surrogate="clip",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        kl="k3",
        beta=0.04,
    )
    terms.loss.backward()
    assert hidden.grad is not None
    return {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_above_bytes": peak() - before,
        "before_bytes": before,
        "peak_before_bytes": before_peak,
        "loss": terms.loss.item(),
        "entropy": entropy.mean().item(),
        "gradient_norm": hidden.grad.double().norm().item(),
    }


def child(way: str, dtype: str, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """`one` in a process of its own."""
    command = [sys.executable, __file__, "--vocabulary", str(arguments.vocabulary)]
    command += ["--one", way, dtype, str(tokens)]
    load = round(os.getloadavg()[0], 2)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) | {"load_average": load}
    figures = f"{found['peak_above_bytes'] / 1e9:6.2f} GB  {found['seconds']:7.1f} s"
    print(f"{way:<6}{dtype:<10}{tokens:>6} tokens  {figures}", file=sys.stderr, flush=True)
    return found


def scaled(few: dict[str, Any], more: dict[str, Any], tokens: int) -> float:
    """Peak bytes at ``tokens`` on the line through two measured counts.

    >>> scaled({"tokens": 1, "peak_above_bytes": 3}, {"tokens": 2, "peak_above_bytes": 5}, 10)
    21.0
    """
    slope = (more["peak_above_bytes"] - few["peak_above_bytes"]) / (more["tokens"] - few["tokens"])
    return few["peak_above_bytes"] + slope * (tokens - few["tokens"])


def measure(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours at the full count, and at the plain way's counts, where both must say the same; the plain way scaled."""
    few, more = (child("plain", dtype, tokens, arguments) for tokens in PLAIN_TOKENS)
    small = child("ours", dtype, PLAIN_TOKENS[-1], arguments)
    full = child("ours", dtype, arguments.tokens, arguments)
    tolerance = 1e-3 if dtype == "float32" else 0.05
    for key in ("entropy", "gradient_norm"):
        assert abs(small[key] / more[key] - 1) < tolerance, f"{dtype}: {key}: the two ways disagree"
    return {
        "ours": full,
        "ours_few_tokens": small,
        "plain_measured": [few, more],
        "plain_scaled_bytes": scaled(few, more, arguments.tokens),
        "within_target": full["peak_above_bytes"] <= TARGET,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--record", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "DTYPE", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, dtype, tokens = arguments.one
        print(json.dumps(one(way, dtype, int(tokens), arguments.vocabulary)))
        return 0
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": version("torch")},
        "machine": f"{platform.machine()}, {cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "tokens": arguments.tokens,
        "vocabulary": arguments.vocabulary,
        "hidden": WIDTH,
        "target_bytes": TARGET,
    }
    record["heads"] = {dtype: measure(dtype, arguments) for dtype in arguments.dtypes}
    print("| head | ours, GB | plain, scaled, GB | ours, s |\n|---|---|---|---|")
    for dtype, found in record["heads"].items():
        cells = (found["ours"]["peak_above_bytes"] / 1e9, found["plain_scaled_bytes"] / 1e9, found["ours"]["seconds"])
        print(f"| {dtype} | {cells[0]:.2f} | {cells[1]:.1f} | {cells[2]:.0f} |")
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    sys.exit(main())
