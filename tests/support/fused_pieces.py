"""The pieces of the decode step as Triton kernels beside plain torch, on random shapes:
tests/qwen3_5/test_decode_ops.py runs this in triton's interpreter, in a process of its own (triton decides at its
import whether it compiles), and on CUDA."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from grpo.qwen3_5 import decode_ops as plain
from grpo.qwen3_5 import decode_ops_triton as fused
from grpo.qwen3_5.decode_state import KeyValues, Recurrent, Rotary, State
from grpo.qwen3_5.weights import Attention, GatedDelta

EPSILON = 1e-6
NEAR = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 4e-2}}
"""How far a kernel may be from plain torch: the order of sums in float32, a few roundings in bfloat16."""


class Draws:
    """Random tensors, some of them slices of wide products, whose rows lie apart, each at a distance of its own."""

    def __init__(self, seed: int, device: str, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device, self._dtype = device, dtype

    def fp32(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)

    def __call__(self, *shape: int) -> Tensor:
        return self.fp32(*shape).to(self._dtype)

    def slices(self, n: int, *widths: int) -> list[Tensor]:
        return [self(n, width + 3 + i)[:, 1 + i : 1 + i + width] for i, width in enumerate(widths)]


def cloned(value: Any) -> Any:
    """Buffers that a piece writes into, once more."""
    names = [name for name in value.__slots__ if isinstance(getattr(value, name), Tensor)]
    return replace(value, **{name: getattr(value, name).clone() for name in names})


def norms(draw: Draws, large: bool) -> Iterator[tuple[Any, ...]]:
    yield draw(2, 8) * 0, draw.fp32(8), EPSILON
    shapes = [(1, 16), (3, 40), (8, 128), (2, 1536)]
    for n, width in [*shapes, (8, 4096)] if large else shapes:
        yield draw(n, width) * 3, draw.fp32(width), EPSILON


def gates(draw: Draws, large: bool) -> Iterator[tuple[Any, ...]]:
    shapes = [(1, 5), (3, 96), (8, 1300)]
    for n, width in [*shapes, (8, 12_288)] if large else shapes:
        yield tuple(x.mul_(8) for x in draw.slices(n, width, width))


def convolutions(draw: Draws, large: bool) -> Iterator[tuple[Any, ...]]:
    shapes = [(1, 6, 4), (3, 200, 4), (2, 1100, 2), (2, 9, 3), (2, 9, 1)]
    for n, channels, taps in [*shapes, (8, 8192, 4)] if large else shapes:
        yield Recurrent(draw(n, taps - 1, channels), draw.fp32(1)), draw.slices(n, channels, 1)[0], draw(taps, channels)


def memories(draw: Draws, large: bool) -> Iterator[tuple[Any, ...]]:
    shapes = [(1, 1, 1, 8, 8), (3, 2, 2, 32, 32), (5, 2, 3, 16, 40), (2, 1, 4, 24, 33)]
    for n, heads, repeat, d_k, d_v in [*shapes, (8, 16, 2, 128, 128)] if large else shapes:
        values = heads * repeat
        mixed, a, b, z = draw.slices(n, 2 * heads * d_k + values * d_v, values, values, values * d_v)
        a[0, 0] = 40.0  # softplus is linear there
        rate = draw.fp32(values).abs() * 2 + 0.01
        rate[0] = 0.01
        mixer: Any = GatedDelta(
            qkvzba=None,  # type: ignore[arg-type]
            out=None,  # type: ignore[arg-type]
            conv=draw(4, 1),
            rate=rate,
            dt_bias=draw.fp32(values),
            norm=draw.fp32(d_v),
            key_heads=heads,
            d_k=d_k,
            d_v=repeat * d_v,
        )
        memory = Recurrent(draw(n, 3, 1), draw.fp32(n, heads, d_k, repeat * d_v))
        yield memory, mixed, a, b, z, mixer, EPSILON


def attentions(draw: Draws, large: bool) -> Iterator[tuple[Any, ...]]:
    shapes = [
        (1, 1, 1, 16, 8, 32, (0,)),
        (3, 2, 2, 32, 8, 64, (0, 20, 63)),
        (2, 2, 3, 24, 24, 192, (64, 191)),
        (4, 1, 4, 40, 16, 800, (5, 130, 511, 799)),
        (2, 2, 2, 8, 4, 40, (0, 39)),
    ]
    wide = (8, 4, 4, 256, 64, 1232, (200, 263, 264, 511, 512, 900, 1024, 1231))
    for n, kv_heads, share, d, turned, columns, positions in [*shapes, wide] if large else shapes:
        heads = kv_heads * share
        queries_and_gates, k, v = draw.slices(n, heads * 2 * d, kv_heads * d, kv_heads * d)
        at = torch.tensor(positions, device=k.device)
        angles = torch.arange(columns, device=k.device)[:, None] * torch.linspace(0.01, 1, turned // 2, device=k.device)
        sin = torch.cat([-angles.sin(), angles.sin()], 1)
        unseen = torch.where(torch.arange(columns, device=k.device) <= at[:, None], 0.0, float("-inf"))
        keys, values = draw(n, kv_heads, columns, d), draw(n, kv_heads, columns, d)
        for i, position in enumerate(positions):
            keys[i, :, position + 1 :], values[i, :, position + 1 :] = float("nan"), float("nan")  # never read
        mixer: Any = Attention(
            qkv=None,  # type: ignore[arg-type]
            out=None,  # type: ignore[arg-type]
            norm=draw.fp32(heads + kv_heads, d),
            kv_heads=kv_heads,
        )
        state = State(at, at, unseen, ())
        rotary = Rotary(torch.cat([angles.cos()] * 2, 1), sin)
        yield queries_and_gates, k, v, mixer, KeyValues(keys, values), state, rotary, columns, EPSILON


def far_apart(draw: Draws) -> tuple[Any, ...]:
    """Attention scores of 320 and of -320: their exponentials are beyond fp32, their shares are not."""
    d, columns = 16, 64
    at = torch.tensor([0, 40], device=draw.fp32(1).device)
    k = draw(2, d)
    queries_and_gates = torch.cat([k, draw(2, d), -k, draw(2, d)], 1)
    norm = torch.ones(3, d, device=k.device)
    norm[:2] *= 20.0
    mixer: Any = Attention(qkv=None, out=None, norm=norm, kv_heads=1)  # type: ignore[arg-type]
    unseen = torch.where(torch.arange(columns, device=k.device) <= at[:, None], 0.0, float("-inf"))
    still = Rotary(torch.ones(columns, 8, device=k.device), torch.zeros(columns, 8, device=k.device))
    memory = KeyValues(*(draw(2, 1, columns, d) for _ in "kv"))
    return queries_and_gates, k, draw(2, d), mixer, memory, State(at, at, unseen, ()), still, columns, EPSILON


def drawn_cases(draw: Draws, large: bool) -> dict[str, Iterator[tuple[Any, ...]]]:
    """The arguments of each piece; with ``large``, the last are of Qwen3.5-9B's shapes."""
    return {
        "norm": norms(draw, large),
        "swiglu": gates(draw, large),
        "convolve": convolutions(draw, large),
        "remember": memories(draw, large),
        "attend": attentions(draw, large),
    }


def run_both(name: str, given: tuple[Any, ...], tested: Any = fused) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a piece of ``tested`` and its namesake in plain torch return, then what they leave in each buffer."""
    ours, theirs = ([cloned(x) if isinstance(x, (Recurrent, KeyValues)) else x for x in given] for _ in "ab")
    for x in (*theirs, *(ours if tested is plain else ())):
        if isinstance(x, KeyValues):  # a product with what nobody sees: 0 · NaN
            x.keys.nan_to_num_(0.0), x.values.nan_to_num_(0.0)
    yield "output", getattr(tested, name)(*ours), getattr(plain, name)(*theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, (Recurrent, KeyValues)):
            for buffer in mine.__slots__:
                left, right = (getattr(x, buffer).nan_to_num(0.0) for x in (mine, other))
                yield buffer, left, right


def check(device: str, dtype: torch.dtype, seed: int, *, large: bool) -> None:
    """Every piece as a kernel equals its namesake, and leaves the same in the buffers."""
    draw = Draws(seed, device, dtype)
    cases = drawn_cases(draw, large)
    if dtype == torch.float32:  # else plain torch's own product rounds such scores
        cases["attend"] = chain([far_apart(draw)], cases["attend"])
    for name, drawn in cases.items():
        for i, given in enumerate(drawn):
            for part, ours, theirs in run_both(name, given):
                where = f"{name} {i} {dtype} {part}"
                if part == "output":
                    assert ours.dtype == theirs.dtype and ours.is_contiguous(), where
                if (name, part) == ("norm", "output") and device != "cpu":  # both round once; the interpreter cuts off
                    assert (ours != theirs).float().mean() < 0.02, where
                torch.testing.assert_close(
                    ours, theirs, **NEAR[dtype], msg=lambda text, where=where: f"{where}: {text}"
                )


def teach_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as its bits, and would multiply those."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot = InterpreterBuilder.create_dot

    def in_fp32(operand: Any) -> Any:
        if operand.dtype.scalar != bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, in_fp32(a), in_fp32(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def check_rollout(base: Path) -> None:
    """Whole completions with the kernels are those without."""
    from grpo.config import LoraSection, ModelSection
    from grpo.policy.policy import load_policy
    from grpo.qwen3_5 import decode
    from tests.conftest import TARGETS
    from tests.engine.test_engines import FEW, assert_same_draws, move, prompts_of, sample

    policy = load_policy(
        ModelSection(name=str(base), device="cpu", dtype="float32", gradient_checkpointing=False),
        LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""),
        seed=1,
    )
    move(policy)
    prompts = prompts_of(policy, FEW)
    expected = sample(policy, prompts, "own", budget=10)
    with mock.patch.object(decode, "pieces", lambda _: fused):
        assert_same_draws(sample(policy, prompts, "own", budget=10), expected)


def check_itself(base: Path) -> None:
    """The self-check passes the kernels, and refuses one whose output is scaled."""
    from grpo.config import LoraSection, ModelSection
    from grpo.policy.policy import load_policy
    from grpo.qwen3_5 import decode
    from grpo.run.self_check import self_check
    from tests.conftest import TARGETS

    model = ModelSection(name=str(base), device="cpu", dtype="float32", gradient_checkpointing=False)
    policy = load_policy(model, LoraSection(r=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, warm_start=""), seed=1)
    remember = fused.remember
    with mock.patch.object(decode, "pieces", lambda _: fused):
        sound = self_check(policy)
        with mock.patch.object(fused, "remember", lambda *given: 0.7 * remember(*given)):
            faulty = self_check(policy)
    assert sound.kernels.triton and 0.0 < sound.figures["op"] < 1e-5 and sound.figures["triton"] < 1e-5, sound
    assert not faulty.kernels.triton and "the Triton op remember differs" in faulty.warnings[0], faulty


if __name__ == "__main__":
    teach_bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        for seed in range(2):
            check("cpu", dtype, seed, large=False)
    check_rollout(Path(sys.argv[1]))
    check_itself(Path(sys.argv[1]))
