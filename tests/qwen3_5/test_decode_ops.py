"""The decode step's Triton kernels: equal to plain torch in triton's interpreter, compiled for real cards without one,
and equal on the device where there is one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.qwen3_5 import decode
from grpo.qwen3_5 import decode_ops as plain

linux = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux alone")
CARDS = {
    "A100": 80,
    "RTX 3090": 86,
    "L4 and RTX 4090": 89,
    "H100 and H200": 90,
    "B200": 100,
    "B300": 103,
    "RTX 5090": 120,
    "GB10": 121,
}
SMALLEST_SHARED = 99 << 10
"""Bytes of shared memory that a program may have on the smallest of them."""


@linux
def test_the_kernels_in_the_interpreter(random_base: Path) -> None:
    """In a process of its own: triton decides when it is imported whether it compiles or interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fused_pieces", str(random_base)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of the device's memory that a thread of the kernel spills to, by the cubin's own account."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert usage, shown
    return sum(map(int, usage.groups()))


@linux
@pytest.mark.parametrize("card", CARDS)
def test_the_kernels_compile_for_cards_that_are_not_here(
    card: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At Qwen3.5-9B's shapes, on tensors without numbers; compiled to the card's own code, and never launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from grpo.qwen3_5 import decode_ops_triton as fused
    from tests.support.fused_pieces import Draws, drawn_cases

    class NoCard:
        """Asked by triton's launcher what it is to compile for."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", CARDS[card], 32)

        def get_current_device(self) -> int:
            return CARDS[card]  # Triton keeps its compiled kernels by device: another target needs another

        def get_current_stream(self, device: int) -> int:
            return 0

    made: dict[str, list[Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *given: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *given, warmup=True, **named)
        made.setdefault(self.fn.__name__, []).append(kernel)
        if given[0].dtype == torch.float32:
            assert "tf32" not in kernel.asm["ptx"], "fp32 stays fp32"

    monkeypatch.setattr(driver, "_active", NoCard())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    for dtype in (torch.bfloat16, torch.float32):
        draw = Draws(0, "meta", dtype)
        for name, drawn in drawn_cases(draw, large=True).items():
            for given in list(drawn)[-2:]:  # the last is of full size, the one before of an odd one
                getattr(fused, name)(*given)
                aligned = (x.contiguous() if isinstance(x, torch.Tensor) else x for x in given)
                getattr(fused, name)(*aligned)  # loads of several numbers at once
    assert made.keys() == {"_norm", "_swiglu", "_convolve", "_remember", "_turn", "_attend", "_gather"}
    for kernels in made.values():
        for kernel in kernels:
            assert kernel.metadata.target.arch == CARDS[card]
            assert len(kernel.asm["cubin"]) > 1000
            assert kernel.metadata.shared <= SMALLEST_SHARED
            assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0


def test_no_address_is_computed_in_32_bits_where_rows_are_many() -> None:
    """A row's offset is a product with all that a row holds: 33 rows of a long cache are beyond 2^31 numbers."""
    source = (Path(__file__).parents[2] / "grpo" / "qwen3_5" / "decode_ops_triton.py").read_text(encoding="utf-8")
    assert source.count("tl.program_id(0)") == source.count("tl.program_id(0).to(tl.int64)") == 7


@linux
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it compiles")
def test_where_triton_cannot_compile_plain_torch_serves(capsys: pytest.CaptureFixture[str]) -> None:
    decode.pieces.cache_clear()
    assert decode.pieces(torch.device("cuda")) is plain and decode.pieces(torch.device("cuda")) is plain
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("warning: decoding runs in plain PyTorch, which is slower: Triton cannot compile")
    decode.pieces.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_on_the_device(dtype: torch.dtype) -> None:
    from tests.support.fused_pieces import check

    for seed in range(3):
        check("cuda", dtype, seed, large=True)
