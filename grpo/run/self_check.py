"""Compare the kernels with plain PyTorch before a run relies on them, and switch off those that differ.

A wrong kernel raises no error; the rewards just fall. So two short prompts with eight rows, under a non-zero adapter,
are passed through everything that can differ:

    each Triton op                  against its plain namesake, on copies of the same buffers
    five tokens decoded with them   against plain ops: logits and buffers
    the same as a CUDA graph        against the eager step: one token eager, one captured, two more replayed
    log-probabilities decoded with  against those of the trainer's forward pass
    the adapter's gradient          against that of transformers' own modules
    the same through fla's scan     against the plain scan

A kernel that differs or raises is replaced by the plain one, with one warning. If plain PyTorch does not agree with
itself, no result can be trusted, and the run stops.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import grpo.forward as passes
import grpo.qwen3_5.decode as decode
import grpo.qwen3_5.decode_ops as plain
import grpo.qwen3_5.train_forward as shared_prefix
from grpo.forward import Forward
from grpo.logprobs import log_distribution, token_logprobs
from grpo.policy.optional_kernels import allow_fla_in_layers
from grpo.policy.policy import Kernels, Policy, as_reference
from grpo.policy.transformers_forward import transformers_hidden_states
from grpo.qwen3_5.decode_state import KeyValues, Recurrent
from grpo.qwen3_5.weights import readable
from grpo.run.folder import nan_to_none
from grpo.runtime.errors import UserError
from grpo.runtime.out_of_memory import LOADING, memory_errors
from grpo.types import Case, Prompt

PROMPT_LENGTHS = (5, 67)
"""Below and above 64, the chunk length of the prefill."""
ROWS = 8
STEPS = 4
"""Forced tokens: the first is decoded eagerly, the second captured, and the graph replayed for the others."""
OPS = ("norm", "swiglu", "convolve", "remember", "attend")
"""The functions of `grpo.qwen3_5.decode_ops`."""
REPLACEMENTS = {"triton": "plain PyTorch", "graphs": "no CUDA graphs", "fla": "no flash-linear-attention"}
"""Field of `Kernels` → what is used if it is switched off, in the order of the checks."""
NUDGE = 0.05
"""Standard deviation of the noise added to the adapter's B, without which a fresh adapter has no effect."""
ROUNDING: dict[torch.dtype, float] = {torch.float32: 2**-16, torch.bfloat16: 2**-9}
"""Relative error allowed per op. In bfloat16 it is the rounding of a result. In float32 that would be 2⁻²⁴; 256 times
as much allows for sums in another order and other approximations of exp."""
ROUNDINGS: dict[str, tuple[int, bool]] = {
    "op": (32, False),
    "triton": (12, True),
    "graphs": (12, True),
    "logprob": (6, True),
    "gradient": (40, True),
    "fla": (40, True),
}
"""Roundings allowed in each comparison, and whether they accumulate as the square root of the number of layers.

Correct code on a CPU in bfloat16, in roundings per √layers (models of 4, 8 and 32 layers): logprob 2.1, 1.4 and 1.5,
gradient 16, 7 and 8. In float32: less than 0.1. The faults planted in tests/run/test_self_check.py: 12 and 60 or more.
"""
DRIFT_BAND: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference [nats] of a token between sampler and trainer that the dtype explains at temperature 1. In
bfloat16 a logit of 32 has an error of 32 · 2⁻⁸ = 0.125, and two logits on either side make 4 · 0.125 = 0.5. Measured
over 3,500 tokens per step of the tiny model on a CPU: at most 0.03 in bfloat16 and 4e-6 in float32."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The kernels that passed, the differences measured, and one warning for each kernel that did not pass."""

    kernels: Kernels
    figures: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the record for ``config.json``; a non-finite difference is None, since JSON has no NaN."""
        return asdict(self.kernels) | {"differences": nan_to_none(self.figures), "warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True)
class Probe:
    """Prompts, and rows with given tokens."""

    prompts: tuple[Prompt, ...]
    owners: tuple[int, ...]
    """The prompt of each row."""
    tokens: Tensor
    """[ROWS, STEPS + 1] long."""


Comparison = tuple[str, str, Callable[[], dict[str, float]]]
"""Key of `ROUNDINGS`, what is compared with, and a function that measures the differences by name."""


def with_checked_kernels(policy: Policy) -> Policy:
    """Return the policy with the kernels that pass the check, which requires CUDA, and warn of the others."""
    check = check_on_cuda(policy)
    return policy if check is None else with_kernels(policy, check.kernels)


def with_kernels(policy: Policy, kernels: Kernels) -> Policy:
    """Return the policy with other kernels, also in transformers' layers, which fill the caches of prompts."""
    allow_fla_in_layers(kernels.fla)
    return replace(policy, kernels=kernels)


def check_on_cuda(policy: Policy) -> SelfCheck | None:
    """Run `self_check` and print its warnings; return None without CUDA, where only plain PyTorch runs."""
    if policy.device.type != "cuda":
        return None
    with memory_errors("self-check", LOADING):
        check = self_check(policy)
    for line in check.warnings:
        print(line, file=sys.stderr)
    return check


def self_check(policy: Policy) -> SelfCheck:
    """Return which of the policy's kernels agree with plain PyTorch. The adapter is restored bit for bit, and no global
    random state is used. A model without kernels of ours is not checked.

    Raises:
        UserError: plain decoding differs from the trainer's forward pass, or that pass's gradient from
            transformers'.
    """
    if not readable(policy):
        return SelfCheck(policy.kernels)
    with as_reference(policy, nudged_adapter(policy)):
        figures: dict[str, float] = {}
        probe, kernels, warnings = make_probe(policy), policy.kernels, []
        if fault := first_fault(plain_comparisons(policy, probe), policy, figures):
            raise UserError(
                f"self-check in plain PyTorch: {fault}: sampler and trainer disagree, so nothing can be trained or "
                f'evaluated here; try model.dtype = "float32", or other versions of torch and transformers'
            )
        for name, replacement in REPLACEMENTS.items():
            comparisons = kernel_comparisons(replace(policy, kernels=kernels), probe, name)
            if fault := first_fault(comparisons, policy, figures):
                kernels = replace(kernels, **{name: False})
                warnings.append(f"warning: using {replacement}: {fault}")
        allow_fla_in_layers(kernels.fla)
        return SelfCheck(kernels, figures, tuple(warnings))


def without(policy: Policy, *kernels: str) -> Policy:
    """Return the policy with some fields of `Kernels` switched off."""
    return replace(policy, kernels=replace(policy.kernels, **dict.fromkeys(kernels, False)))


def plain_comparisons(policy: Policy, probe: Probe) -> Iterator[Comparison]:
    """Yield the comparisons of plain decoding with the trainer's pass and of that pass with transformers' modules."""
    policy = without(policy, "triton", "graphs", "fla")
    forward = passes.forward_of(policy)

    def sampler_and_trainer() -> dict[str, float]:
        logits = decode_probe(policy, probe)["logits"]
        logprobs, _ = train_probe(policy, probe, forward)
        sampled = log_distribution(logits, 1.0).gather(-1, probe.tokens[..., None].to(logits.device)).flatten()
        span = logits.amax() - logits.amin()
        return {"a log-probability of the plain decode step": difference(sampled, logprobs, span)}

    yield "logprob", "the trainer's forward pass", sampler_and_trainer
    yield (
        "gradient",
        "transformers' modules",
        lambda: gradient_differences(policy, probe, forward, policy, transformers_hidden_states),
    )


def kernel_comparisons(policy: Policy, probe: Probe, kernel: str) -> Iterator[Comparison]:
    """Yield the comparisons that decide about a field of `Kernels`; none if the policy does not use it."""
    eager = without(policy, "graphs")
    if kernel == "triton" and (ops := decode.ops_of(policy)) is not plain:
        yield "op", "plain PyTorch", lambda: op_differences(eager, probe, ops)
        yield "triton", "plain PyTorch", lambda: decoded_differences(eager, without(eager, "triton"), probe)
    if kernel == "graphs" and decode.uses_graphs(policy):
        yield "graphs", "the eager step", lambda: decoded_differences(policy, eager, probe)
    if kernel == "fla" and shared_prefix.uses_fla(policy):
        forward, slow = passes.forward_of(policy), without(eager, "fla")
        yield (
            "fla",
            "the plain scan",
            lambda: (
                decoded_differences(eager, slow, probe) | gradient_differences(eager, probe, forward, slow, forward)
            ),
        )


def first_fault(comparisons: Iterable[Comparison], policy: Policy, figures: dict[str, float]) -> str | None:
    """Record the largest difference of each comparison in ``figures``; return a message about the first one that
    exceeds its limit or cannot be measured."""
    for name, other, measure in comparisons:
        try:
            what, value = max(measure().items(), key=lambda pair: pair[1])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # failures to compile, launch or capture have many types
            figures[name] = math.inf
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        figures[name] = value
        if value > (limit := limit_of(name, policy)):
            return f"{what} differs from {other} by {value:.2g} (limit {limit:.2g})"
    return None


def op_differences(policy: Policy, probe: Probe, ops: Any) -> dict[str, float]:
    """Decode the probe with plain ops, run each op of ``ops`` on copies of the same buffers, and return the largest
    difference of each."""
    differences: dict[str, float] = {}

    def compared(name: str, *arguments: Any) -> Tensor:
        copies = [copy_buffers(x) if isinstance(x, (KeyValues, Recurrent)) else x for x in arguments]
        pairs = [(getattr(ops, name)(*copies), getattr(plain, name)(*arguments))]
        for copy, original in zip(copies, arguments, strict=True):
            if isinstance(original, (KeyValues, Recurrent)):
                pairs += [(getattr(copy, slot), getattr(original, slot)) for slot in original.__slots__]
        label = f"the Triton op {name}"
        differences[label] = max(differences.get(label, 0.0), *(difference(*pair) for pair in pairs))
        return pairs[0][1]

    decode_probe(policy, probe, SimpleNamespace(**{name: partial(compared, name) for name in OPS}))
    return differences


def copy_buffers(buffers: KeyValues | Recurrent) -> KeyValues | Recurrent:
    """Return the buffers of one layer, cloned."""
    return replace(buffers, **{name: getattr(buffers, name).clone() for name in buffers.__slots__})


@torch.inference_mode()
def decode_probe(policy: Policy, probe: Probe, ops: Any = None) -> dict[str, Tensor]:
    """Decode the probe's tokens with the policy's kernels, or with other ops. Return the logits [ROWS, STEPS + 1, V]
    and the decoder's buffers by name, with zeros in the columns that no row has written."""
    tokens = probe.tokens.to(policy.device)
    allow_fla_in_layers(policy.kernels.fla)
    logits, decoder = decode.start_own(policy, probe.prompts, probe.owners, STEPS + 1)
    assert isinstance(decoder, decode.GraphDecoder)
    if ops is not None:
        decoder.ops = ops
    steps = [logits.clone(), *(decoder.step(tokens[:, t]).clone() for t in range(STEPS))]
    state = decoder.state
    seen = state.unseen == 0
    decoded = {"logits": torch.stack(steps, 1), "positions": state.positions.clone(), "mask": seen.clone()}
    for number, layer in enumerate(state.layers):
        for name in layer.__slots__:
            buffer = getattr(layer, name)
            if isinstance(layer, KeyValues):
                buffer = torch.where(seen[:, None, :, None], buffer, 0)
            decoded[f"{name} of layer {number}"] = buffer.clone()
    return decoded


def decoded_differences(policy: Policy, other: Policy, probe: Probe) -> dict[str, float]:
    """Return the differences of logits and buffers after decoding with two policies, by name."""
    actual, expected = decode_probe(policy, probe), decode_probe(other, probe)
    return {f"the decode step ({name})": difference(actual[name], tensor) for name, tensor in expected.items()}


def train_probe(policy: Policy, probe: Probe, forward: Forward) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the log-probabilities [M] of the probe's tokens under a forward pass, and the gradient of a weighted sum
    of them for each tensor of the adapter; ``.grad`` is not touched."""
    head, parameters = policy.lm_head, policy.adapter_parameters()
    targets = probe.tokens.flatten().to(policy.device)
    allow_fla_in_layers(policy.kernels.fla)
    with torch.enable_grad():
        hidden = forward(policy, [probe.prompts[owner].ids for owner in probe.owners], probe.tokens.tolist())
        bias = getattr(head, "bias", None)
        logprobs, _ = token_logprobs(hidden, head.weight, targets, temperature=1.0, bias=bias)
        weights = torch.linspace(-1.0, 1.0, len(targets), device=policy.device, dtype=logprobs.dtype)
        gradients = torch.autograd.grad(logprobs @ weights, list(parameters.values()), materialize_grads=True)
    return logprobs.detach(), dict(zip(parameters, gradients, strict=True))


def gradient_differences(
    policy: Policy, probe: Probe, forward: Forward, other_policy: Policy, other: Forward
) -> dict[str, float]:
    """Return ‖a − e‖/‖e‖ of the gradients of two passes for each tensor. If ‖e‖ is below the average norm, that is used
    instead: the remainder of a near cancellation is rounding."""
    _, actual = train_probe(policy, probe, forward)
    _, expected = train_probe(other_policy, probe, other)
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    average = math.sqrt(sum(norm**2 for norm in norms.values()) / len(norms))
    differences = {
        f"the gradient of {name}": float((actual[name] - gradient).norm()) / (max(norms[name], average) or 1.0)
        for name, gradient in expected.items()
    }
    return {name: value if math.isfinite(value) else math.inf for name, value in differences.items()}


def difference(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Return the largest |actual − expected| divided by the largest |expected|, or by ``scale``; infinite if either is
    not finite.

    >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    >>> difference(torch.tensor([float("nan")]), torch.tensor([1.0]))
    inf
    """
    actual, expected = actual.float(), expected.float()
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return math.inf
    scale = expected.abs().amax() if scale is None else scale
    return float((actual - expected).abs().amax() / scale.clamp(min=torch.finfo(torch.float32).tiny))


def limit_of(name: str, policy: Policy) -> float:
    """Return the largest difference that rounding explains, for the dtype and depth of the base. The operands of
    flash-linear-attention are always bfloat16."""
    count, accumulates = ROUNDINGS[name]
    dtype = torch.bfloat16 if name == "fla" else policy.lm_head.weight.dtype
    return count * ROUNDING[dtype] * (math.sqrt(len(policy.decoder.layers)) if accumulates else 1.0)


def make_probe(policy: Policy) -> Probe:
    """Return random rows, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    size = policy.lm_head.weight.shape[0]
    draw = partial(torch.randint, size, generator=generator)
    prompts = tuple(
        Prompt(Case(f"probe{i}", "", 1), tuple(draw((n,)).tolist()), False) for i, n in enumerate(PROMPT_LENGTHS)
    )
    owners = tuple(row * len(prompts) // ROWS for row in range(ROWS))
    return Probe(prompts, owners, draw((ROWS, STEPS + 1)))


def nudged_adapter(policy: Policy) -> dict[str, Tensor]:
    """Return the adapter's tensors with noise on every B."""
    generator = torch.Generator().manual_seed(0)

    def nudge(name: str, p: Tensor) -> Tensor:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        return p.detach() + NUDGE * noise if ".lora_B." in name else p.detach().clone()

    return {name: nudge(name, p) for name, p in policy.adapter_parameters().items()}


class DriftWarning:
    """Warns once if sampler and trainer differ by more than the dtype explains."""

    def __init__(self, dtype: torch.dtype, temperature: float) -> None:
        self.dtype, self.band = str(dtype).removeprefix("torch."), DRIFT_BAND[dtype] / min(1.0, temperature)
        self.done = False

    def warn_once(self, step: int, largest: float | None) -> None:
        """Print the warning if ``sampler/max_abs_logprob_diff`` of a step exceeds the band or is None (not finite)."""
        if self.done or (largest is not None and largest <= self.band):
            return
        self.done = True
        difference = "is not finite" if largest is None else f"is {largest:.2g} nats for a token"
        print(
            f"warning: step {step}: the difference between sampler and trainer {difference}; {self.dtype} explains "
            f'at most {self.band:.2g} (sampler/max_abs_logprob_diff). Try model.kernels = "plain"',
            file=sys.stderr,
        )
