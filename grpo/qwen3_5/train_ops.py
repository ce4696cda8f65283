"""The differentiable pieces of a layer whose weights are frozen: only the adapter and the activations have gradients.

A frozen weight needs no gradient, so its input need not be kept; what is kept is what the adapter's gradient reads.
Derivatives are written out and tested against autograd's in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide(x: Tensor) -> Tensor:
    """In fp32; fp64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class Linear:
    """A frozen weight W [o,i], and of the adapter beside it A [r,i], B [o,r] and scaling s; None where not adapted."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0


def linear(x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """x·Wᵀ + (x·Aᵀ)·(s·B)ᵀ of each layer, [M,o]; x [M,i] in the weights' dtype.

    The products run in x's dtype, on fp32 masters A and B cast once; their gradients come back in the masters' dtype.
    PEFT's layers cast x to fp32 for the adapter instead: equal in fp32, in bfloat16 to the rounding of the products
    (tests/test_forward.py states the tolerances).

    >>> layer = Linear(torch.eye(2), a=torch.ones(1, 2), b=torch.tensor([[1.0], [0.0]]), scaling=0.5)
    >>> linear(torch.tensor([[1.0, 3.0]]), [layer])
    (tensor([[3., 3.]]),)
    """
    flat = [t for layer in layers for t in (layer.weight, layer.a, layer.b)]
    out = _Linear.apply(x, [layer.scaling for layer in layers], *flat)
    return cast("tuple[Tensor, ...]", out)


class _Linear(torch.autograd.Function):
    """With l = x·Aᵀ and g = ∂y:  ∂l = s·g·B,  ∂A = ∂lᵀ·x,  ∂B = s·gᵀ·l,  ∂x = g·W + ∂l·A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], *flat: Tensor | None) -> tuple[Tensor, ...]:
        outputs, lows = [], []
        for s, (weight, a, b) in zip(scalings, _threes(flat), strict=True):
            assert weight is not None
            y = x @ weight.T
            low = None
            if a is not None and b is not None:
                low = x @ a.T.to(x.dtype)
                y.addmm_(low, b.T.to(x.dtype), alpha=s)
            outputs.append(y)
            lows.append(low)
        adapted = any(low is not None for low in lows)
        ctx.save_for_backward(x if adapted else None, *lows, *flat)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.scalings)
        x, *saved = ctx.saved_tensors
        lows, flat = saved[:count], saved[count:]
        grad_x = None
        found: list[Tensor | None] = []
        for g, s, low, (weight, a, b) in zip(grads, ctx.scalings, lows, _threes(flat), strict=True):
            grad_low = None
            found.append(None)
            if low is not None:
                grad_low = (g @ b.to(g.dtype)).mul_(s)
                found += [(grad_low.T @ x).to(a.dtype), (g.T @ low).to(b.dtype).mul_(s)]
            else:
                found += [None, None]
            if ctx.needs_input_grad[0]:
                grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
                if grad_low is not None:
                    grad_x.addmm_(grad_low, a.to(g.dtype))
        return grad_x, None, *found


def _threes(flat: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + ε) · scale over the last axis, computed in fp32 (fp64 for fp64), in x's dtype.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0) * 12.5**0.5
    tensor([3., 4.])
    """
    return cast(Tensor, _RmsNorm.apply(x, scale, epsilon))


class _RmsNorm(torch.autograd.Function):
    """With u = x·ρ, ρ = 1/√(mean x² + ε) and h = g·scale:  ∂x = ρ·(h - u·mean(h·u))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
        whole = wide(x)
        rho = (torch.linalg.vecdot(whole, whole) / x.shape[-1] + epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, rho, scale)
        return (whole * rho).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rho, scale = ctx.saved_tensors
        u = x.to(rho.dtype) * rho
        h = grad.to(rho.dtype) * scale
        share = torch.linalg.vecdot(h, u).div_(x.shape[-1]).unsqueeze(-1)
        return h.sub_(u.mul_(share)).mul_(rho).to(x.dtype), None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, keeping its two inputs alone.

    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 2.0]))
    tensor([  0., 200.])
    """
    return cast(Tensor, _Swiglu.apply(gate, up))


class _Swiglu(torch.autograd.Function):
    """With σ = sigmoid(a):  ∂a = g·b·σ·(1 + a·(1 - σ)),  ∂b = g·a·σ."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, torch.nn.functional.silu(gate).mul_(grad)


def causal_conv(x: Tensor, taps: Tensor) -> Tensor:
    """y[:, t] = Σ_j taps[j]·x[:, t + j]: each channel its own filter of k taps.

    Args:
        x: [n, T + k - 1, C], the k - 1 columns before the first included.
        taps: [k,C], frozen.

    >>> causal_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0], [1.0]])).flatten()
    tensor([12., 23.])
    """
    return cast(Tensor, _CausalConv.apply(x, taps))


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(taps)
        width = x.shape[1] - len(taps) + 1
        y = x[:, :width] * taps[0]
        for j in range(1, len(taps)):
            y.addcmul_(x[:, j : j + width], taps[j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (taps,) = ctx.saved_tensors
        n, width, channels = grad.shape
        out = grad.new_zeros(n, width + len(taps) - 1, channels)
        for j, tap in enumerate(taps):
            out[:, j : j + width].addcmul_(grad, tap)
        return out, None


def recomputed(run: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
    """``run(*given)``, of which only ``given`` is kept: the backward pass computes it once more. Every output must
    depend on an input that needs a gradient, and every such input be used.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> (y,) = recomputed(lambda x: (x * x,), x)
    >>> y.backward(); x.grad
    tensor(6.)
    """
    return cast("tuple[Tensor, ...]", _Recomputed.apply(run, *given))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*given)
        return run(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1:]
        given = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, asked, strict=True)]
        with torch.enable_grad():
            out = ctx.run(*given)
        found = iter(torch.autograd.grad(out, [x for x in given if x.requires_grad], grads))
        return None, *(next(found) if need else None for need in asked)


def to_grid(packed: Tensor, slots: Tensor, rows: int, columns: int) -> Tensor:
    """[m, …] tokens at their places in a grid [rows, columns, …] of zeros; ``slots`` [m] are flat and distinct.

    >>> to_grid(torch.tensor([5.0, 6.0]), torch.tensor([3, 1]), rows=2, columns=2)
    tensor([[0., 6.],
            [0., 5.]])
    """
    return cast(Tensor, _ToGrid.apply(packed, slots, rows * columns)).unflatten(0, (rows, columns))


class _ToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return packed.new_zeros(size, *packed.shape[1:]).index_copy_(0, slots, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


def from_grid(grid: Tensor, slots: Tensor) -> Tensor:
    """What stands at ``slots`` [m] of a grid [rows, columns, …], [m, …]: the inverse of `to_grid`.

    >>> from_grid(torch.tensor([[0.0, 6.0], [0.0, 5.0]]), torch.tensor([3, 1]))
    tensor([5., 6.])
    """
    return cast(Tensor, _FromGrid.apply(grid.flatten(0, 1), slots))


class _FromGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = len(flat)
        return flat.index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, slots, grad), None
