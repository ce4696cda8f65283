"""Check on this machine whether the CUDA path computes what it should, part by part.

    python3 benchmarks/gpu_check.py FOLDER machine attention kernels step capture

machine    packages, driver, card, compilers
attention  which SDPA backend runs for the trainer's masks and head sizes, and its error and gradients against softmax
           in float32
kernels    the decode step's Triton kernels against plain torch at Qwen3.5-9B's shapes, in bfloat16 and float32
step       one step of 64 tokens of a config: finite gradients, and the largest difference between the sampler's and the
           trainer's log-probabilities
capture    the captured decode step of that config against the eager one, and against plain torch

Each part writes FOLDER/check_PART.json as soon as it is done. ``--device cpu --small`` tries the same code without a
card: the kernels in Triton's interpreter if TRITON_INTERPRET=1, else plain torch against itself. Exit codes: 0 all is
well, 1 a part shows a problem or fails. benchmarks/gpu_check.sh runs all of it on a bare machine.
"""

import argparse
import copy
import datetime
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
REQUIRED = ("transformers", "peft", "safetensors", "numpy", "tqdm", "pydantic", "regex", "jinja2", "markupsafe")
OPTIONAL = ("triton", "accelerate", "pytest", "trl", "datasets", "flash-linear-attention")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_ATTENTION_ERROR = {"bfloat16": 3e-2, "float32": 1e-3}
"""Of output and gradients, relative to the largest number of each: a few roundings of 2^-8; sums in another order."""
MAX_LOGIT_DIFF = {"bfloat16": 0.06, "float32": 1e-4}
"""Between two runs of the same kernels, captured and eager: cuBLAS may choose another kernel under capture."""
MAX_DRIFT = {"bfloat16": (0.02, 0.2), "float32": (1e-4, 1e-3)}
"""Mean and largest difference in nats between sampler and trainer, which round in another order. Four random layers in
bfloat16 differ by 0.002 and 0.008 on a CPU, and by 0.04 and 0.16 with a SwiGLU scaled by 0.7."""
CAPTURE_TOKENS = 8

Result = tuple[dict[str, Any], list[str]]
"""The facts of a part's record, and the problems to report."""


def check_machine(arguments: argparse.Namespace) -> Result:
    """Versions, driver and card; needs torch alone."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    problems = [f"{name} is not installed" for name in missing]
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{n: installed(n) for n in ("torch", *REQUIRED, *OPTIONAL)}},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "compilers": {name: shutil.which(name) for name in ("cc", "g++", "nvcc")},
        "driver": nvidia_smi(),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info()
        facts["card"] = {
            "name": card.name,
            "capability": [card.major, card.minor],
            "multiprocessors": card.multi_processor_count,
            "is_integrated": bool(getattr(card, "is_integrated", False)),
            "free_bytes": free,
            "total_bytes": total,
            "cudnn": torch.backends.cudnn.version(),
        }
    elif arguments.device.startswith("cuda"):
        problems.append("torch sees no CUDA device")
    return facts, problems


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi() -> str | None:
    """The driver's own description of the cards; None without a driver."""
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,persistence_mode"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# --- attention -------------------------------------------------------------------------------------------------------


def check_attention(arguments: argparse.Namespace) -> Result:
    """The trainer's own attention against softmax in float32; on CUDA, beside it, what cuDNN would have made of it."""
    from grpo.policy.base_model import prepare_cuda, resolve_device

    device = resolve_device(arguments.device)
    facts: dict[str, Any] = {"torch_default": enabled_backends()}
    if device.type == "cuda":
        prepare_cuda(device)
    facts |= {"enabled": enabled_backends(), "cases": attention_cases(device, DTYPES, small=arguments.small)}
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(True)
        facts["with_cudnn"] = attention_cases(device, ("bfloat16",), small=arguments.small)
    wrong = [
        x for x in facts["cases"] if not (x["finite"] and max(x["errors"].values()) <= MAX_ATTENTION_ERROR[x["dtype"]])
    ]
    return facts, [f"attention differs from softmax: {json.dumps(case)}" for case in wrong]


def attention_cases(device: torch.device, dtypes: Iterable[str], *, small: bool) -> list[dict[str, Any]]:
    """The masks of two micro-batches, prompts and completions, each with ordinary and with low scores."""
    from grpo.qwen3_5.train_forward import lay_out

    rows, shape = (2, (2, 2, 16)) if small else (8, (4, 4, 256))
    # with the second lengths, keys ≡ 64 mod 128, cuDNN is reported to return NaN (pytorch#196678)
    lengths = [(5, 12), (9, 8)] if small else [(200, 1024), (193, 1024)]
    cases = []
    for name, (prompt, completion), low in product(dtypes, lengths, (False, True)):
        layout = lay_out([range(prompt)] * rows, [range(completion)] * rows, device)
        for seen in (layout.prompt_seen, layout.completion_seen):
            case = {"dtype": name, "queries": seen.shape[2], "keys": seen.shape[3], "low_scores": low}
            cases.append(case | attention_case(seen, shape, DTYPES[name], low=low))
    return cases


def enabled_backends() -> dict[str, bool]:
    """The SDPA backends that PyTorch may choose from."""
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


class AttentionCalls(TorchDispatchMode):
    """Records which fused attention operation PyTorch dispatches to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name and "backward" not in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def attention_case(seen: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, *, low: bool) -> dict[str, Any]:
    """Which backend runs, its seconds, and its largest errors.

    Args:
        seen: [n,1,t,s] bool.
        shape: key heads, queries that share one, head size.
        low: whether all scores are about -150, beyond what exp keeps in float32.
    """
    from grpo.qwen3_5.train_forward import _mix

    n, _, t, s = seen.shape
    kv_heads, share, d = shape
    generator = torch.Generator(seen.device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(n, length, heads, d, generator=generator, device=seen.device).to(dtype)
        for length, heads in ((t, kv_heads * share), (s, kv_heads), (s, kv_heads), (t, kv_heads * share))
    )
    if low:
        away = math.sqrt(150.0 / math.sqrt(d))
        q, k = q * 0.1 + away, k * 0.1 - away
    inputs = [x.requires_grad_() for x in (q.detach(), k.detach(), v)]
    seconds = []
    for _ in range(3):
        started = clock(seen.device)
        with AttentionCalls() as calls:
            output = _mix(*inputs, seen, d**-0.5)
        gradients = torch.autograd.grad(output, inputs, grad)
        seconds.append(clock(seen.device) - started)
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
    exact = softmax_attention(*exact_inputs, seen, d**-0.5)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.float())
    pairs = zip(("output", "q", "k", "v"), (output, *gradients), (exact, *exact_gradients), strict=True)
    # with low scores the gradients of q and k are small differences of large numbers: only that they are finite
    errors = {name: relative_error(ours, theirs) for name, ours, theirs in pairs if not (low and name in ("q", "k"))}
    return {
        "backend": calls.names[0] if calls.names else "math",
        "seconds": seconds,
        "finite": all(bool(x.isfinite().all()) for x in (output, *gradients)),
        "errors": errors,
    }


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(scale·q·kᵀ where seen)·v, written out: q [n,t,h,d], k and v [n,s,g,d], seen [n,1,t,s] → [n,t,h,d]."""
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, 2) for x in (k, v))
    scores = torch.einsum("nthd,nshd->nhts", q, k) * scale
    return torch.einsum("nhts,nshd->nthd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|.

    >>> relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    return float((ours.detach().float() - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp(min=1e-30))


def clock(device: torch.device) -> float:
    """Seconds, the device having finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- kernels ---------------------------------------------------------------------------------------------------------


def check_kernels(arguments: argparse.Namespace) -> Result:
    """Every kernel, on odd shapes and on the 9B's. One that raises does not keep the others from being checked."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from fused_pieces import NEAR, Draws, drawn_cases, fused, plain, run_both, teach_bfloat16

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        teach_bfloat16()
    tested = fused if interpreted or arguments.device.startswith("cuda") else plain
    found, problems = {}, []
    for dtype_name, dtype in DTYPES.items():
        for name, cases in drawn_cases(Draws(0, arguments.device, dtype), large=not arguments.small).items():
            where = f"{name} {dtype_name}"
            try:
                worst = [worst_of(run_both(name, given, tested), **NEAR[dtype]) for given in cases]
                found[where] = {"cases": len(worst), **max(worst, key=lambda one: one["of_tolerance"])}
                if not found[where]["of_tolerance"] <= 1:
                    problems.append(f"{where}: differs from plain torch: {found[where]}")
            except Exception as error:  # a compiler's or a driver's, of many kinds
                traceback.print_exc()
                found[where] = {"error": short(error)}
                problems.append(f"{where}: {short(error)}")
    return {"tested": tested.__name__, "interpreted": interpreted, "kernels": found}, problems


def worst_of(pairs: Iterator[tuple[str, Tensor, Tensor]], rtol: float, atol: float) -> dict[str, Any]:
    """The largest difference of a case, and how much of the tolerance it takes; infinite where only one is finite."""
    worst: dict[str, Any] = {"where": "", "max_abs": 0.0, "of_tolerance": 0.0}
    for where, ours, theirs in pairs:
        if not ours.numel():  # a convolution of one tap keeps nothing
            continue
        apart = (ours.float() - theirs.float()).abs()
        share = float((apart / (atol + rtol * theirs.float().abs())).nan_to_num(nan=math.inf, posinf=math.inf).max())
        if share >= worst["of_tolerance"]:
            worst = {"where": where, "max_abs": float(apart.max()), "of_tolerance": share}
    return worst


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


# --- a step ----------------------------------------------------------------------------------------------------------


@cache
def load(config_path: str, *overrides: str) -> Any:
    """Everything for the config's steps of 64 tokens, loaded once per process."""
    from benchmarks.bench import bench_config
    from grpo.run.setup import load_setup

    config, _ = bench_config(config_path, ["rollout.max_new_tokens=64", *overrides], 1)
    setup = load_setup(config)
    move_adapter(setup.policy)
    return setup


def load_from(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """What `load` returns, and the facts of every record about it."""
    from benchmarks.roofline import limits_of
    from grpo.run.setup import device_name

    started = time.perf_counter()
    overrides = [f"model.device={arguments.device}", *arguments.set]
    setup = load(arguments.config, *overrides)
    facts = {"config": arguments.config, "overrides": overrides, "load_seconds": time.perf_counter() - started}
    machine = {"device": device_name(setup.policy.device), "rates": asdict(limits_of(setup.policy)[1])}
    return setup, facts | machine | {"enabled": enabled_backends(), "dtype": dtype_of(setup.policy)}


def move_adapter(policy: Any) -> None:
    """Add noise to the adapter: one that is fresh changes nothing, and would hide a fault of its products."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.adapter_parameters().values():
            p.add_(0.01 * torch.randn(p.shape, generator=generator).to(p.device))


def dtype_of(policy: Any) -> str:
    return str(policy.model.get_base_model().dtype).removeprefix("torch.")


def check_step(arguments: argparse.Namespace) -> Result:
    """The loop's first step, of which the update is as `grpo.train` makes it."""

    from grpo.batch import group_advantages, make_batch, reward_matrix
    from grpo.dynamic_sampling import sample_step
    from grpo.update import update_policy

    setup, facts = load_from(arguments)
    config, policy = setup.config, setup.policy
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)
    times = [clock(policy.device)]
    groups, scores, _ = sample_step(setup, 0)
    times.append(clock(policy.device))
    batch = make_batch(
        groups,
        group_advantages(groups, reward_matrix(scores), config.advantage),
        config,
    )
    gradients: dict[str, float] = {}
    hook = setup.optimizer.register_step_pre_hook(lambda *_: gradients.update(gradient_norms(policy)))
    updated = update_policy(policy, batch, config, setup.optimizer, setup.reference, step=0)
    hook.remove()
    times.append(clock(policy.device))
    apart = (batch.sampler_logprobs[batch.completion_mask] - updated.logprobs.logprobs[0]).abs()
    facts |= {
        "tokens": len(apart),
        "rollout_seconds": times[1] - times[0],
        "update_seconds": times[2] - times[1],
        "drift_nats": {"mean_abs": float(apart.mean()), "max_abs": float(apart.max())},
        "loss": updated.loss,
        "grad_norm": updated.grad_norm,
        "skipped": updated.skipped,
        "gradient_tensors": len(gradients),
        "peak_bytes": torch.cuda.max_memory_allocated(policy.device) if policy.device.type == "cuda" else None,
    }
    return facts, step_problems(facts, gradients)


def gradient_norms(policy: Any) -> dict[str, float]:
    return {name: float(p.grad.norm()) for name, p in policy.adapter_parameters().items()}


def step_problems(facts: dict[str, Any], gradients: dict[str, float]) -> list[str]:
    """Gradients that are not finite or zero, and a sampler that is another policy than the trainer's."""
    problems = []
    if facts["skipped"] or not math.isfinite(facts["grad_norm"]) or not math.isfinite(facts["loss"]):
        problems.append(f"the update was skipped or is not finite: loss {facts['loss']}, norm {facts['grad_norm']}")
    if bad := [name for name, norm in gradients.items() if not 0 < norm < math.inf]:
        problems.append(f"{len(bad)} gradients are zero or not finite, the first of them {bad[0]}")
    for (name, value), most in zip(facts["drift_nats"].items(), MAX_DRIFT[facts["dtype"]], strict=True):
        if not value <= most:
            problems.append(f"sampler against trainer: {name} {value:.2g} nats, expected at most {most:g}")
    return problems


@torch.inference_mode()
def check_capture(arguments: argparse.Namespace) -> Result:
    """The same forced tokens through a captured decode step, an eager one and one of plain torch."""
    from grpo.prompts import prompts_for_step
    from grpo.qwen3_5 import decode
    from grpo.qwen3_5 import decode_ops as plain

    with torch.inference_mode(False):
        setup, facts = load_from(arguments)
    policy, size = setup.policy, setup.config.rollout.group_size
    prompts = prompts_for_step(setup.cases, setup.epoch_indices, setup.policy.tokenizer, setup.config, 0)
    owners = [b for b in range(len(prompts)) for _ in range(size)]
    first, captured = decode.start_own(policy, prompts, owners, CAPTURE_TOKENS)
    assert isinstance(captured, decode.GraphDecoder)
    eager, unfused = (copy_decoder(captured) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"captured": [], "plain": []}
    for _ in range(CAPTURE_TOKENS):
        ids = torch.randint(first.shape[1], (len(owners),), generator=generator).to(policy.device)
        eager._warm = unfused._warm = False  # never captured
        expected = eager.step(ids)
        found["captured"].append(float((captured.step(ids) - expected).abs().max()))
        with mock.patch.object(decode, "pieces", lambda _: plain):
            apart = unfused.step(ids).log_softmax(-1) - expected.log_softmax(-1)
        found["plain"].append(float(apart.gather(1, ids[:, None]).abs().max()))
    dtype, problems = facts["dtype"], []
    if policy.device.type == "cuda" and captured._captured is None:
        problems.append("no CUDA graph was captured")
    for name, most in (("captured", MAX_LOGIT_DIFF[dtype]), ("plain", MAX_DRIFT[dtype][1])):
        if not all(value <= most for value in found[name]):
            problems.append(f"{name} against eager: differences {found[name]}, expected at most {most:g}")
    return facts | {"rows": len(owners), "max_abs_diff": found}, problems


def copy_decoder(decoder: Any) -> Any:
    """A decoder that goes on from the same state in buffers of its own."""
    state, copied = decoder._state, copy.copy(decoder)
    layers = [replace(layer, **{n: getattr(layer, n).clone() for n in layer.__slots__}) for layer in state.layers]
    buffers = {name: getattr(state, name).clone() for name in ("ids", "positions", "unseen")}
    copied._state = replace(state, **buffers, layers=tuple(layers))
    return copied


# --- the command line ------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "machine": check_machine,
    "attention": check_attention,
    "kernels": check_kernels,
    "step": check_step,
    "capture": check_capture,
}


def run_part(part: str, arguments: argparse.Namespace) -> bool:
    """Run a part and write its record, also if it raises; return whether all is well."""
    started = time.perf_counter()
    try:
        facts, problems = PARTS[part](arguments)
    except Exception as error:  # whatever it is, the other parts have something to tell
        traceback.print_exc()
        facts, problems = {}, [short(error)]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {"part": part, "ok": not problems, "problems": problems, "date": datetime.date.today().isoformat()}
    record |= {"torch": torch.__version__, "card": card, "seconds": round(time.perf_counter() - started, 2), **facts}
    (arguments.folder / f"check_{part}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{part:<10} {'PROBLEM' if problems else 'ok'}", *problems, sep="\n  ", flush=True)
    return not problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="records are written here")
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--config", default="configs/v49_random.toml", help="of the step")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder}: not a folder; make it first")
    return 0 if all([run_part(part, arguments) for part in arguments.parts]) else 1


if __name__ == "__main__":
    sys.exit(main())
