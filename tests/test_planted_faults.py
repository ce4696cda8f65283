"""Faults planted in the maths, one at a time: the tests of the maths must fail on every one of them.

A fault is an exact replacement in the source of one module. The faulty source is compiled in memory into a
fresh module, and the tests that take only `maths` run on it. Executing source text is safe here: it is the
project's own, with one replacement that stands below. A fault whose old text no longer occurs exactly once
fails, so the list cannot rot.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from tests import test_advantage, test_logprobs, test_loss
from tests.support.maths_modules import REAL, Maths


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    old: str
    new: str


ADVANTAGE = (
    Fault("ddof ignored", "np.maximum(counts - ddof, 1)", "np.maximum(counts, 1)"),
    Fault("ddof always 1", "np.maximum(counts - ddof, 1)", "np.maximum(counts - 1, 1)"),
    Fault("epsilon under the root", "np.sqrt(squares / np.maximum(counts - ddof, 1)) + epsilon",
          "np.sqrt(squares / np.maximum(counts - ddof, 1) + epsilon)"),
    Fault("epsilon as a floor", "np.sqrt(squares / np.maximum(counts - ddof, 1)) + epsilon",
          "np.maximum(np.sqrt(squares / np.maximum(counts - ddof, 1)), epsilon)"),
    Fault("epsilon left out", "counts - ddof, 1)) + epsilon", "counts - ddof, 1))"),
    Fault("variance for std", "return np.sqrt(squares / np.maximum(counts - ddof, 1)) + epsilon",
          "return squares / np.maximum(counts - ddof, 1) + epsilon"),
    Fault("no zero-variance rule", "highest <= lowest", "highest < -np.inf"),
    Fault("zero variance by tolerance", "highest <= lowest", "highest - lowest <= 1e-12"),
    Fault("lonely member is not zero variance", "highest <= lowest", "highest == lowest"),
    Fault("mean over the batch", "means = np.where(baseline_mask, values, 0.0).sum(axis=1, keepdims=True) / counts",
          "means = np.where(baseline_mask, values, 0.0).sum() / counts.sum()"),
    Fault("mean over left-out baseline_mask too",
          "np.where(baseline_mask, values, 0.0).sum(axis=1, keepdims=True) / counts",
          "values.mean(axis=1, keepdims=True)"),
    Fault("left-out baseline_mask keep an advantage", "return np.where(baseline_mask, values - means, 0.0)",
          "return values - means"),
    Fault("sign of the advantage", "values - means", "means - values"),
    Fault("no centring", "np.where(baseline_mask, values - means, 0.0)", "np.where(baseline_mask, values, 0.0)"),
    Fault("batch std by group", "rewards.reshape(1, -1), baseline_mask.reshape(1, -1), epsilon, ddof)",
          "rewards[:1], baseline_mask[:1], epsilon, ddof)"),
    Fault("group std over the batch", '"group": group_divisor', '"group": batch_divisor'),
    Fault("Dr. GRPO with a std", '"mean_only": unit_divisor', '"mean_only": group_divisor'),
    Fault("leave-one-out factor inverted", "return (counts - 1) / counts", "return counts / (counts - 1)"),
    Fault("leave-one-out factor of G, not of the baseline_mask",
          "counts = np.maximum(baseline_mask.sum(axis=1, keepdims=True), 2)\n    return",
          "counts = np.full((len(baseline_mask), 1), baseline_mask.shape[1])\n    return"),
    Fault("leave-one-out without factor", "return (counts - 1) / counts", "return counts / counts"),
    Fault("split by each part's own divisor", "_center(part, baseline_mask) / divisor)",
          "_center(part, baseline_mask) / (divisor if len(parts) == 1 else divisor + 0.5))"),
    Fault("split of cancelling parts", "name: np.where(uniform, 0.0, _center(part, baseline_mask) / divisor)",
          "name: _center(part, baseline_mask) / np.where(uniform, epsilon + 1e-9, divisor)"),
    Fault("G = 1 let through", "or matrix.shape[1] < 2:", "or matrix.shape[1] < 1:"),
    Fault("NaN let through", "if not np.isfinite(matrix).all():", "if np.isinf(matrix).any():"),
    Fault("reward table written to", "    baseline_mask = _baseline_mask(in_baseline, matrix)\n    return _normalize(",
          "    baseline_mask = _baseline_mask(in_baseline, matrix)\n    matrix -= matrix.mean()\n"
          "    return _normalize("),
    Fault("infinite divisor let through", "for values in (divisor, *normalized.values()):",
          "for values in normalized.values():"),
    Fault("float32", "matrix = np.asarray(values, dtype=np.float64)",
          "matrix = np.asarray(values, dtype=np.float32).astype(np.float64)"),
)  # fmt: skip

LOSS = (
    Fault("sign of the loss", "per_token = -_masked(token_weights", "per_token = _masked(token_weights"),
    Fault("min for max", "torch.minimum(ratio * advantages, bounded * advantages)",
          "torch.maximum(ratio * advantages, bounded * advantages)"),
    Fault("no gradient on the bound itself", "torch.minimum(ratio * advantages, bounded * advantages)",
          "torch.minimum(torch.where(ratio == bounded.detach(), ratio, ratio.detach()) * advantages,"
          " torch.where((ratio < 1 + clip.high) & (ratio > 1 - clip.low), ratio, bounded.detach())"
          " * advantages)"),
    Fault("only the clipped branch", "torch.minimum(ratio * advantages, bounded * advantages)",
          "bounded * advantages"),
    Fault("clip bounds swapped", "ratio.clamp(1 - clip.low, 1 + clip.high)",
          "ratio.clamp(1 - clip.high, 1 + clip.low)"),
    Fault("clip_high on both sides", "ratio.clamp(1 - clip.low,", "ratio.clamp(1 - clip.high,"),
    Fault("clip_low on both sides", "ratio.clamp(1 - clip.low, 1 + clip.high)",
          "ratio.clamp(1 - clip.low, 1 + clip.low)"),
    Fault("clip bound inverted", "ratio.clamp(1 - clip.low,", "ratio.clamp(1 / (1 + clip.low),"),
    Fault("clipped_low without the sign of A", "(advantages < 0) & (ratio < 1 - clip.low)",
          "ratio < 1 - clip.low"),
    Fault("clipped_high without the sign of A", "(advantages > 0) & (ratio > 1 + clip.high)",
          "ratio > 1 + clip.high"),
    Fault("clipped_high with clip_low", "(ratio > 1 + clip.high),", "(ratio > 1 + clip.low),"),
    Fault("ratio inverted", "log_ratio = current - _masked(old_logprobs.detach(), mask, compute_dtype)",
          "log_ratio = _masked(old_logprobs.detach(), mask, compute_dtype) - current"),
    Fault("ratio without exp", "return _clipped(tokens.log_ratio.exp(), tokens.advantages, clip)",
          "return _clipped(1 + tokens.log_ratio, tokens.advantages, clip)"),
    Fault("ratio detached", "return _clipped(tokens.log_ratio.exp(), tokens.advantages, clip)",
          "return _clipped(tokens.log_ratio.detach().exp(), tokens.advantages, clip)"),
    Fault("dual clip for every sign", "objective=torch.where(negative, floored, single.objective)",
          "objective=floored"),
    Fault("dual clip for good tokens", "negative = tokens.advantages < 0",
          "negative = tokens.advantages > 0"),
    Fault("dual clip by min", "floored = torch.maximum(", "floored = torch.minimum("),
    Fault("dual clip not counted", "single.clipped_high | (negative & (single.ratio > clip.dual))",
          "single.clipped_high"),
    Fault("dual clip drops clip-high", "single.clipped_high | (negative & (single.ratio > clip.dual))",
          "negative & (single.ratio > clip.dual)"),
    Fault("GSPO mean over the width", "lengths = tokens.mask.sum(dim=1, keepdim=True).clamp(min=1)",
          "lengths = tokens.mask.shape[1]"),
    Fault("GSPO sum instead of mean", "keepdim=True) / lengths", "keepdim=True)"),
    Fault("GSPO arithmetic mean of ratios",
          "mean_log_ratio = tokens.log_ratio.sum(dim=1, keepdim=True) / lengths",
          "mean_log_ratio = ((tokens.log_ratio.exp() * tokens.mask).sum(1, keepdim=True) / lengths)"
          ".clamp(min=1e-9).log()"),
    Fault("GSPO gradient of the token only",
          "ratio = torch.where(tokens.mask, mean_log_ratio.expand_as(tokens.log_ratio), 0.0).exp()",
          "ratio = torch.where(tokens.mask, (mean_log_ratio - tokens.log_ratio / lengths).detach()"
          " + tokens.log_ratio / lengths, 0.0).exp()"),
    Fault("CISPO without detach", "ratio = tokens.log_ratio.detach().exp()",
          "ratio = tokens.log_ratio.exp()"),
    Fault("CISPO without cap", "ratio.clamp(max=1 + clip.high) * tokens.advantages",
          "ratio * tokens.advantages"),
    Fault("CISPO cap without the one", "ratio.clamp(max=1 + clip.high)", "ratio.clamp(max=clip.high)"),
    Fault("CISPO without logprob", "* tokens.advantages * tokens.logprobs,", "* tokens.advantages,"),
    Fault("CISPO caps from below", "ratio.clamp(max=1 + clip.high)", "ratio.clamp(min=1 + clip.high)"),
    Fault("plain surrogate clips", '"none": unclipped_surrogate', '"none": clip_surrogate'),
    Fault("k1 sign", "return -d\n", "return d\n"),
    Fault("k2 without half", "d.square() / 2", "d.square()"),
    Fault("k3 is k2", '"k3": k3', '"k3": k2'),
    Fault("k2 is k1", '"k2": k2', '"k2": k1'),
    Fault("k3 of -d", "torch.expm1(d) - d", "torch.expm1(-d) + d"),
    Fault("k3 without the one", "return torch.expm1(d) - d", "return torch.exp(d) - d"),
    Fault("k3 by cancellation", "return torch.expm1(d) - d", "return torch.exp(d) - d - 1"),
    Fault("ratio of ratio_k3 detached", "return ratio * k3(d, ratio)",
          "return ratio.detach() * k3(d, ratio)"),
    Fault("ratio_k3 without ratio", "return ratio * k3(d, ratio)", "return k3(d, ratio)"),
    Fault("d inverted", "d = _masked(ref_logprobs.detach(), mask, compute_dtype) - current",
          "d = current - _masked(ref_logprobs.detach(), mask, compute_dtype)"),
    Fault("KL against the old policy", "d = _masked(ref_logprobs.detach(), mask, compute_dtype) - current",
          "d = _masked(old_logprobs.detach(), mask, compute_dtype) - current"),
    Fault("KL rewarded", "result.objective - beta * kl_terms", "result.objective + beta * kl_terms"),
    Fault("KL without beta", "result.objective - beta * kl_terms", "result.objective - kl_terms"),
    Fault("KL detached", "result.objective - beta * kl_terms", "result.objective - beta * kl_terms.detach()"),
    Fault("KL added at beta 0", "result.objective if kl_terms is None or beta == 0 else",
          "result.objective if kl_terms is None else"),
    Fault("old logprobs not detached", "_masked(old_logprobs.detach(), mask", "_masked(old_logprobs, mask"),
    Fault("ref logprobs not detached", "_masked(ref_logprobs.detach(), mask", "_masked(ref_logprobs, mask"),
    Fault("advantages not detached", "advantages.detach()[:, None]", "advantages[:, None]"),
    Fault("token weights not detached", "_masked(token_weights.detach()", "_masked(token_weights"),
    Fault("ratio reported with its graph", "ratio=result.ratio.detach(),", "ratio=result.ratio,"),
    Fault("no mask", "return torch.where(mask, values.to(dtype), 0.0)", "return values.to(dtype)"),
    Fault("mask by multiplication", "return torch.where(mask, values.to(dtype), 0.0)",
          "return values.to(dtype) * mask"),
    Fault("logprobs unmasked", "current = _masked(logprobs, mask, compute_dtype)",
          "current = logprobs.to(compute_dtype)"),
    Fault("weights unmasked", "per_token = -_masked(token_weights.detach(), mask, compute_dtype) * objective",
          "per_token = -token_weights.detach().to(compute_dtype) * objective"),
    Fault("half precision", "compute_dtype = torch.promote_types(logprobs.dtype, torch.float32)",
          "compute_dtype = logprobs.dtype"),
    Fault("normalised by what it sees", "loss=per_token.sum()",
          "loss=per_token.sum() / mask.sum().clamp(min=1)"),
    Fault("mean instead of sum", "loss=per_token.sum()", "loss=per_token.mean()"),
    Fault("weights ignored", "per_token = -_masked(token_weights.detach(), mask, compute_dtype) * objective",
          "per_token = torch.where(mask, -objective, 0.0)"),
    Fault("sequence weights without length", "1 / (len(lengths) * lengths)",
          "torch.full_like(lengths, 1 / len(lengths))"),
    Fault("sequence weights without N", "return 1 / (len(lengths) * lengths)", "return 1 / lengths"),
    Fault("token weights by the mean length", "(1 / lengths.sum()).expand_as",
          "(1 / lengths.mean()).expand_as"),
    Fault("constant weights by the longest seen", "1 / (len(lengths) * max_new_tokens)",
          "1 / (len(lengths) * float(lengths.max()))"),
    Fault("denominators count the left-out",
          "weights[included] = TOKEN_WEIGHTS[kind](sizes[included], max_new_tokens)",
          "weights[included] = TOKEN_WEIGHTS[kind](sizes, max_new_tokens)[included]"),
    Fault("left-out completions weigh", "    weights = torch.zeros_like(sizes)\n",
          "    weights = torch.ones_like(sizes)\n"),
    Fault("beta without reference let through", "if beta > 0 and ref_logprobs is None:",
          "if beta > 1 and ref_logprobs is None:"),
    Fault("another shape let through", "tensor.shape != mask.shape:", "tensor.numel() != mask.numel():"),
    Fault("integer mask let through", "or mask.dtype != torch.bool", "or False"),
)  # fmt: skip

LOGPROBS = (
    Fault("predicted by itself", "predicts = starts - 1 + torch", "predicts = starts + torch"),
    Fault("predicted two before", "predicts = starts - 1 + torch", "predicts = starts - 2 + torch"),
    Fault("predicts runs out of the batch", "predicts = torch.where(completion_mask, predicts, 0)", ""),
    Fault("completion before prompt", "[*prompt, *completion] for", "[*completion, *prompt] for"),
    Fault("left padding", "[*row, *[pad_id] * (width - len(row))]", "[*[pad_id] * (width - len(row)), *row]"),
    Fault("mask from ids", "return padded, torch.arange(width) < lengths[:, None]",
          "return padded, padded != pad_id"),
    Fault("mask one short: the end token is lost", "torch.arange(width) < lengths[:, None]",
          "torch.arange(width) < lengths[:, None] - 1"),
    Fault("mask one long", "torch.arange(width) < lengths[:, None]",
          "torch.arange(width) <= lengths[:, None]"),
    Fault("states of the wrong rows", "rows = joined.completion_mask.nonzero()[:, 0]",
          "rows = joined.completion_mask.nonzero()[:, 1].clamp(max=len(hidden) - 1)"),
    Fault("spread in another order", ".index_copy_(0, slots, values)",
          ".index_copy_(0, slots, values.flip(0))"),
    Fault("spread loses the gradient", ".index_copy_(0, slots, values)",
          ".index_copy_(0, slots, values.detach())"),
    Fault("temperature missing in the forward", "            logits /= temperature\n", ""),
    Fault("temperature multiplied", "logits /= temperature", "logits *= temperature"),
    Fault("temperature before the bias",
          "logits += bias\n            logits /= temperature\n",
          "logits += bias * temperature\n            logits /= temperature\n"),
    Fault("J without temperature", "slope.div_(temperature)", "slope"),
    Fault("J with temperature twice", "slope.div_(temperature)", "slope.div_(temperature**2)"),
    Fault("sign of p in J", "slope = p.neg_()", "slope = p"),
    Fault("one-hot missing in J", ".scatter_add_(1, target, torch.ones_like(target, dtype=wide))", ""),
    Fault("one-hot sign in J", "torch.ones_like(target, dtype=wide)", "-torch.ones_like(target, dtype=wide)"),
    Fault("one-hot replaces p in J", ".scatter_add_(", ".scatter_("),
    Fault("bias missing", "logits += bias", "logits += 0 * bias"),
    Fault("sign of the entropy", "-torch.linalg.vecdot(p, log_p)", "torch.linalg.vecdot(p, log_p)"),
    Fault("entropy of unnormalised logits", "-torch.linalg.vecdot(p, log_p)", "-log_p.mean(1)"),
    Fault("last chunk dropped", "range(0, len(hidden), chunk_tokens)",
          "range(0, max(len(hidden) - chunk_tokens, 0) + 1, chunk_tokens)"),
    Fault("chunks overlap", "range(0, len(hidden), chunk_tokens)", "range(0, len(hidden), chunk_tokens + 1)"),
    Fault("no chunks", "chunk = slice(start, start + chunk_tokens)", "chunk = slice(start, None)"),
    Fault("targets of the first chunk", "target = targets[chunk, None]",
          "target = targets[: len(logits), None]"),
    Fault("softmax without its maximum", "logits.logsumexp(dim=1, keepdim=True)",
          "logits.exp().sum(dim=1, keepdim=True).log()"),
    Fault("gradient ignores the loss", "return grad[:, None] * jacobian",
          "return torch.ones_like(grad)[:, None] * jacobian"),
    Fault("gradient with the wrong sign", "return grad[:, None] * jacobian",
          "return -grad[:, None] * jacobian"),
    Fault("softmax in the head's dtype", "wide = torch.promote_types(head_weight.dtype, torch.float32)",
          "wide = head_weight.dtype"),
    Fault("entropy promises a gradient", "        ctx.mark_non_differentiable(entropy)\n", ""),
    Fault("J computed without need", "with_jacobian = torch.is_grad_enabled() and hidden.requires_grad",
          "with_jacobian = True"),
    Fault("a head with gradient let through", "if head_weight.requires_grad or (", "if False or ("),
    Fault("negative temperature let through", "    if not (math.isfinite(temperature) and temperature > 0):\n"
          "        raise ValueError(f\"expected a finite temperature > 0, got {temperature}\")\n    if chunk",
          "    if not math.isfinite(temperature):\n"
          "        raise ValueError('temperature > 0')\n    if chunk"),
    Fault("sampling at another temperature", "/ temperature).log_softmax(-1)", ").log_softmax(-1)"),
    Fault("logits written to", "(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature)",
          "logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)"),
    Fault("empty completion let through", "if not len(prompt) or not len(completion):",
          "if not len(prompt):"),
)  # fmt: skip

PLANTED = {"advantage": ADVANTAGE, "loss": LOSS, "logprobs": LOGPROBS}
TESTS = {"advantage": test_advantage, "loss": test_loss, "logprobs": test_logprobs}
CASES = [pytest.param(room, fault, id=f"{room}: {fault.name}") for room, faults in PLANTED.items() for fault in faults]


@cache
def source(room: str) -> str:
    return Path(str(getattr(REAL, room).__file__)).read_text(encoding="utf-8")


def checks(room: str) -> list[Callable[[Maths], None]]:
    """The tests of a room whose only argument is the maths."""
    named = inspect.getmembers(TESTS[room], inspect.isfunction)
    return [f for name, f in named if name.startswith("test_") and list(inspect.signature(f).parameters) == ["maths"]]


def planted(room: str, fault: Fault) -> Maths:
    text = source(room)
    assert text.count(fault.old) == 1, f"{fault.name}: the old text occurs {text.count(fault.old)} times, not once"
    module = ModuleType(f"grpo.{room}")  # the real name: dataclasses look their module up by it
    exec(compile(text.replace(fault.old, fault.new), f"<grpo/{room}.py with a fault>", "exec"), module.__dict__)
    return replace(REAL, **{room: module})


def caught_by(check: Callable[[Maths], None], maths: Maths) -> bool:
    """A failed assertion catches a fault, and so does any error that the faulty code runs into."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(maths)
    except (
        AssertionError,
        pytest.fail.Exception,
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ):
        return True
    return False


@pytest.mark.parametrize(("room", "fault"), CASES)
def test_fault_is_caught(room: str, fault: Fault) -> None:
    maths = planted(room, fault)
    assert any(caught_by(check, maths) for check in checks(room)), f"no test of {room} notices: {fault.name}"


@pytest.mark.parametrize("room", PLANTED)
def test_true_module_passes_when_loaded_like_a_fault(room: str) -> None:
    """Otherwise every fault would be caught for the wrong reason."""
    maths = planted(room, Fault("nothing", source(room), source(room)))
    assert len(checks(room)) >= 10
    assert [check.__name__ for check in checks(room) if caught_by(check, maths)] == []


def test_names_are_distinct() -> None:
    for faults in PLANTED.values():
        assert len({fault.name for fault in faults}) == len(faults)
