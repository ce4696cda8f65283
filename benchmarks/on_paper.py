"""A whole step on a CUDA card that is not there: every tensor on it has a shape, a dtype and a place, and no numbers.

    python benchmarks/on_paper.py configs/v49_random.toml --record benchmarks/on_paper.json

The training loop's own code runs: base and adapter are made, a step's completions decoded through captured graphs, the
reference scored, the loss taken back through every layer, the adapter moved. What touches the card is only looked at:

launches   operations that would start a kernel, those that a graph replays included
bytes      what they read and write: operands whole, a tensor that is changed in place twice; of the KV cache all
           columns, of what is written into it those
memory     of all tensors alive at once, without what an allocator loses between them
waits      where the host would have to wait for the card, with file and line: values read, copies to and from it
           (unpinned, as all of ours are)

A tensor on the wrong device, operands of two dtypes, a wait inside a graph, a capture of the default stream: they fail
here as they would there. Not seen: a launch that a library cuts in two, its workspaces, and its choices by device
(attention is counted as torch's own products, AdamW tensor by tensor). What takes how long cannot be known. The seconds
given are a sum over launches, of each the greatest of its bytes over the bandwidth, its FLOPs over the rate and a bare
launch: what a card would need that is never late.

Needs Triton (the test extra brings it) and a C++ compiler: torch's CPU build has no notion of a CUDA device, and thirty
lines give it one.
"""

import argparse
import collections
import ctypes
import json
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

DEVICE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>

namespace c10::impl {
struct PaperGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream only() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, PaperGuard)
}

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def make_device() -> None:
    """Teaches torch that there is one CUDA device; it asks once, when it is imported.

    Raises:
        SystemExit: there is no C++ compiler.
    """
    found = find_spec("torch")
    at = Path((found.submodule_search_locations or [""])[0]) if found else Path()
    paths = [f"-I{at / 'include'}", f"-L{at / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{at / 'lib'}"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "device.cpp", Path(folder) / "device.so"
        source.write_text(DEVICE)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", str(source), "-o", str(library), *paths]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit("error: needs g++, the GNU C++ compiler") from None
        ctypes.CDLL(str(library))


make_device()

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda._utils import _get_device_index
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.inference_mode = lambda *_: torch.no_grad()  # where operations keep their composition, and cannot be looked at

import grpo.update as updating
from benchmarks.roofline import Rates, costs_of, floor_of
from grpo.batch import group_advantages, make_batch, reward_matrix
from grpo.config import load_config
from grpo.dynamic_sampling import sample_step
from grpo.engine import sampling
from grpo.policy.memory_plan import RANDOM_SHAPES
from grpo.qwen3_5 import decode
from grpo.run.setup import load_setup
from grpo.runtime.errors import INPUT_ERRORS, UserError
from grpo.types import Case, Prompt, StepRecord

CARDS = {
    "H200": {"bandwidth": 4.3e12, "bfloat16": 790e12, "float32": 50e12, "memory": 141e9},
    "GB10": {"bandwidth": 273e9, "bfloat16": 100e12, "float32": 25e12, "memory": 120e9},
}
LAUNCH = 2.2e-6
"""Seconds that the smallest kernel takes in a graph: an assumption."""
aten = torch.ops.aten
FREE = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.detach", "prim.")
"""Operations that start no kernel, beside those that give a view."""
WRITES = ("aten.copy_.", "aten.fill_.", "aten.zero_.", "aten.zeros", "aten.ones", "aten.full", "aten.new_zeros")
"""Operations that do not read what they write over."""
SIZED_BY_VALUES = (aten.nonzero.default, aten.masked_select.default, aten.masked_scatter_backward.default)
"""Operations whose output's size the host has to read."""
LOOKS_UP = ("aten.embedding.", "aten.index.", "aten.index_select.", "aten.gather.")


@dataclass
class Tally:
    """What was asked of the card."""

    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    bytes: collections.Counter[str] = field(default_factory=collections.Counter)
    flops: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: collections.Counter[str] = field(default_factory=collections.Counter)
    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    peak: int = 0

    def add(self, other: "Tally") -> None:
        for name in ("launches", "bytes", "flops", "seconds", "waits"):
            getattr(self, name).update(getattr(other, name))

    def figures(self) -> dict[str, Any]:
        return {
            "launches": self.launches.total(),
            "bytes": self.bytes.total(),
            "flops": self.flops.total(),
            "seconds": round(self.seconds.total(), 6),
            "peak_bytes": self.peak,
            "waits": dict(self.waits),
            "most": {name: self.launches[name] for name, _ in self.seconds.most_common(12)},
        }


class Paper(TorchDispatchMode):
    """Operations on the card give shapes and are tallied; those on the CPU are done."""

    def __init__(self, card: dict[str, float]) -> None:
        super().__init__()
        self.card = card
        self.tally = Tally()
        self.alive = 0
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, Any] = {}

    @contextmanager
    def tallying(self, apart: bool = False) -> Iterator[Tally]:
        """Inside, what is asked of the card is tallied anew, and outside as well unless it is kept ``apart``."""
        before, self.tally = self.tally, Tally(peak=self.alive)
        try:
            yield self.tally
        finally:
            if not apart:
                before.add(self.tally)
            before.peak = max(before.peak, self.tally.peak)
            self.tally = before

    def launch(self, name: str, moved: int, flops: int = 0, dtype: torch.dtype = torch.float32) -> None:
        """One kernel."""
        rate = self.card["float32" if dtype == torch.float32 else "bfloat16"]
        self.tally.launches[name] += 1
        self.tally.bytes[name] += moved
        self.tally.flops[name] += flops
        self.tally.seconds[name] += max(moved / self.card["bandwidth"], flops / rate, LAUNCH)

    def wait(self, name: str) -> None:
        ours = [f for f in traceback.extract_stack() if f"{Path(__file__).parent.parent / 'grpo'}/" in f.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"
        self.tally.waits[f"{name.removeprefix('aten.').partition('.')[0]} at {place}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        to_card = device is not None and torch.device(device).type == "cuda"
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if not given and not to_card:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.wait("read")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func in (aten.allclose.default, aten.equal.default):
            self.wait(str(func))
            return True
        if not given and func is aten._to_copy.default and not kwargs.get("non_blocking"):
            self.wait("copy to the card")
        if func is aten._to_copy.default and device is not None and not to_card:
            self.wait("copy to the host")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and len(given) == 1:
            self.wait("copy to the card" if isinstance(args[0], FakeTensor) else "copy to the host")
            if not isinstance(args[0], FakeTensor):
                return args[0]
        if func in SIZED_BY_VALUES:
            self.wait(str(func))
        with self._shapes:
            if func is aten.nonzero.default:
                out = torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.long, device=args[0].device)
            elif func is aten._to_copy.default and not given:
                out = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=device)
            else:
                out = func(*args, **kwargs)
        self._note(str(func), func, args, given, out)
        return out

    def _note(self, name: str, func: Any, args: Any, given: list[Tensor], out: Any) -> None:
        made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        for tensor in made:
            self._hold(tensor)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or name.startswith(FREE):
            return
        fresh = [x for x in made if all(x is not y for y in given)]
        changed = [x for x in made if any(x is y for y in given)]
        moved = sum(x.nbytes for x in (*given, *fresh, *changed))
        if name.startswith(LOOKS_UP):
            moved = 2 * sum(x.nbytes for x in fresh)
        if name.startswith(WRITES):
            moved = sum(x.nbytes for x in (*given[1:], *(fresh or changed)))
        flops = 0
        if name.startswith(("aten.mm.", "aten.bmm.", "aten.addmm", "aten.baddbmm")):
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            flops = 2 * left.numel() * right.shape[-1]
        self.launch(name, moved, flops, given[-1].dtype if given else torch.float32)

    def _hold(self, tensor: Tensor) -> None:
        """Counts a storage as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            self.alive -= size
            self._storages.pop(key, None)

        self.alive += size
        self.tally.peak = max(self.tally.peak, self.alive)
        self._storages[key] = weakref.ref(storage, gone)


def sum_of(sizes: dict[str, int]) -> int:
    return sum(sizes.values())


HARDLY_READ = ("keys", "values", "cos", "sin")
"""By the kernel that writes one column of them, or reads one."""
KERNELS: dict[str, Callable[[dict[str, int]], int]] = {
    "_remember": lambda sizes: sum_of(sizes) + sizes["state"],
    "_convolve": lambda sizes: sum_of(sizes) + sizes["conv"],
    "_turn": lambda sizes: sum_of({name: x for name, x in sizes.items() if name not in HARDLY_READ}),
}
"""Bytes that a kernel moves, from those of its arguments, where they are not simply their sum."""


def place(module: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
    """`Module.to`, whose own would exchange a parameter in place, which one without numbers does not allow."""
    device, dtype, *_ = torch._C._nn._parse_to(*arguments, **named)
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                moved = p.detach().to(device=device, dtype=dtype if p.is_floating_point() else None)
                part._parameters[name] = nn.Parameter(moved, p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device=device)
    return module


@contextmanager
def pretended(paper: Paper) -> Iterator[None]:
    """Inside, `torch.cuda` answers for a card that is not there."""
    from triton.runtime.jit import JITFunction

    class Stream:
        """Only which one is current, and what it waits for, is looked at."""

        def __init__(self, device: Any = None) -> None:
            self.waited_for: list[Any] = []

        def wait_stream(self, other: Any) -> None:
            self.waited_for.append(other)

    streams = [Stream()]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        streams.append(chosen)
        try:
            yield
        finally:
            streams.pop()

    class Graph:
        """What a capture asked for; a replay asks for it again."""

        tally: Tally
        ended = False

        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            if streams[-1] is streams[0]:
                raise RuntimeError("the default stream cannot be captured")
            if streams[0] not in streams[-1].waited_for:
                raise RuntimeError("captured before what the current stream has under way")
            self._tallying = paper.tallying(apart=True)
            self.tally = self._tallying.__enter__()

        def capture_end(self) -> None:
            self._tallying.__exit__(None, None, None)
            if self.tally.waits:
                raise RuntimeError(f"a graph cannot wait: {dict(self.tally.waits)}")
            self.ended = True

        def pool(self) -> tuple[int, int]:
            return (0, 1)

        def replay(self) -> None:
            if not self.ended or streams[-1] is not streams[0]:
                raise RuntimeError("a graph is replayed on the current stream, after its capture")
            paper.tally.add(self.tally)

    def run(kernel: Any, *given: Any, **options: Any) -> None:
        names = kernel.arg_names
        if len(given) != len(names):
            raise TypeError(f"{kernel.fn.__name__}: expected {len(names)} arguments, got {len(given)}")
        sizes = {name: x.nbytes for name, x in zip(names, given, strict=True) if isinstance(x, FakeTensor)}
        paper.launch(f"triton {kernel.fn.__name__}", KERNELS.get(kernel.fn.__name__, sum_of)(sizes))

    free = int(paper.card["memory"] * 0.98)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "paper",
        "mem_get_info": lambda device=None: (free - paper.alive, free),
        "memory_reserved": lambda device=None: paper.alive,
        "memory_allocated": lambda device=None: paper.alive,
        "max_memory_allocated": lambda device=None: paper.tally.peak,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: paper.wait("empty_cache"),
        "synchronize": lambda device=None: paper.wait("synchronize"),
        "set_device": _get_device_index,  # torch's own check, and nothing to set
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=None: SimpleNamespace(is_integrated=0),
        "current_device": lambda: 0,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device=None: streams[-1],
    }
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch.multiple(torch.cuda, **answers),
            mock.patch.object(nn.Module, "to", place),
            mock.patch.object(JITFunction, "run", run),
            paper,
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)


def step(path: str, overrides: list[str], card: str, layers: int | None) -> dict[str, Any]:
    """One step of the config on the card, phase by phase.

    Args:
        layers: of the random base; None is all of them.
    """
    if layers:
        for name, shape in RANDOM_SHAPES.items():
            every = shape.num_hidden_layers // shape.full_attention_layers
            RANDOM_SHAPES[name] = replace(shape, num_hidden_layers=layers, full_attention_layers=layers // every)
    config, source = load_config(path, ['model.device="cuda"', 'model.dtype="bfloat16"', *overrides])
    if config.model.name not in RANDOM_SHAPES:
        raise UserError(f"{path}: model.name = {config.model.name!r}: expected one of {', '.join(RANDOM_SHAPES)}")
    rates = Rates(CARDS[card]["bandwidth"], CARDS[card]["bfloat16"])
    paper, phases = Paper(CARDS[card]), {}
    one: list[dict[str, Any]] = []
    plain_step = decode.step

    def watched(*given: Any) -> Tensor:
        with paper.tallying() as tally:
            logits = plain_step(*given)
        one.append(tally.figures())
        return logits

    def whole(ids: Tensor, *_: Any) -> Any:
        """Completions that take the whole budget, of ids that differ."""
        rows, budget = ids.shape
        drawn = np.random.default_rng(0).integers(1, setup.policy.lm_head.weight.shape[0], (rows, budget))
        return drawn.tolist(), np.full((rows, budget), -1.0).tolist()

    with (
        pretended(paper),
        mock.patch.object(decode, "step", watched),
        mock.patch.object(sampling, "_cut", whole),
    ):
        with paper.tallying() as tally:
            setup = load_setup(config)
        phases["made"] = tally.figures()
        with paper.tallying() as tally:
            groups, scores, dropped = sample_step(setup, 0)
        phases["rollout"], decoded = tally.figures(), one[-1]
        batch = make_batch(
            groups,
            group_advantages(groups, reward_matrix(scores), config.advantage),
            config,
        )
        held = paper.alive
        with paper.tallying() as tally:
            done = updating.update_policy(setup.policy, batch, config, setup.optimizer, setup.reference, step=0)
        phases["update"] = tally.figures()
        left = leaving(setup.policy, watched)
    taken = StepRecord(1, groups, scores, batch, done.logprobs, dropped, *done.figures)
    floor = floor_of(taken, config, costs_of(setup.policy.model.get_base_model()), rates)
    return {
        "config": str(source.path),
        "overrides": source.overrides,
        "card": card,
        "layers": setup.policy.model.get_base_model().config.num_hidden_layers,
        "tokens": int(batch.completion_mask.sum()),
        "prompt_tokens": sum(len(ids) for ids in set(batch.prompt_ids)),
        "held_bytes": held,
        "decode_step": decoded,
        "rows_leave": left,
        "phases": phases,
        "floor_seconds": {"rollout": floor.rollout, "decode": floor.decode, "update": floor.update, "step": floor.step},
    }


def leaving(policy: Any, watched: Callable[..., Tensor]) -> dict[str, Any]:
    """Sixteen rows take four tokens, then eight of them take four more: how many of the steps were run and not
    replayed, and how much of the cache's columns each was allowed to read."""
    seen: list[tuple[int, int, int]] = []

    def noted(weights: Any, rotary: Any, state: Any, window: int, *rest: Any) -> Tensor:
        seen.append((len(state.ids), window, state.unseen.shape[1]))
        return watched(weights, rotary, state, window, *rest)

    with mock.patch.object(decode, "step", noted), torch.no_grad():
        logits, decoder = decode.start_own(policy, [Prompt(Case("a", "", 1), (1, 2, 3), False)], [0] * 16, 300)
        rows = []
        for _ in range(4):
            rows.append(len(logits := decoder.step(logits[:, 0].long())))
        decoder.keep(torch.arange(8, device=logits.device))
        logits = logits[:8]
        for _ in range(4):
            rows.append(len(logits := decoder.step(logits[:, 0].long())))
    return {"rows": rows, "stepped": [n for n, _, _ in seen], "columns": [[w, s] for _, w, s in seen]}


def table(found: dict[str, Any]) -> str:
    rows = {"one decode step": found["decode_step"], **found["phases"]}
    lines = [f"{'':<16}{'launches':>10}{'GB':>11}{'TFLOP':>9}{'peak GB':>9}{'on paper, s':>13}  waits"]
    for name, row in rows.items():
        lines.append(
            f"{name:<16}{row['launches']:>10,}{row['bytes'] / 1e9:>11,.2f}{row['flops'] / 1e12:>9,.2f}"
            f"{row['peak_bytes'] / 1e9:>9,.2f}{row['seconds']:>13.4f}  {sum(row['waits'].values())}"
        )
    floor = found["floor_seconds"]
    said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in floor.items())
    return "\n".join([*lines, f"roofline of a {found['card']}: {said}"])


def refused(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the command line, before anything is done."""
    if not find_spec("triton"):
        return "Triton is not installed: pip install -c constraints.txt -e '.[test]'"
    if arguments.layers is not None and (arguments.layers < 4 or arguments.layers % 4):
        return f"--layers {arguments.layers}: expected a multiple of 4, every fourth layer is one of full attention"
    if arguments.record and not arguments.record.absolute().parent.is_dir():
        return f"--record {arguments.record}: its folder is not there; make it first"
    for one in arguments.set:
        if one.replace(" ", "").startswith(("model.device", "model.dtype", "model=")):
            return f"--set {one}: the device is the card, and the dtype bfloat16"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="a TOML file whose model.name is random:…, for example configs/v49_random.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--card", choices=list(CARDS), default="H200")
    parser.add_argument("--layers", type=int, help="of the random base, every fourth of full attention (default: all)")
    parser.add_argument("--record", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if fault := refused(arguments):
        parser.error(fault)
    try:
        found = step(arguments.config, arguments.set, arguments.card, arguments.layers)
    except INPUT_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if arguments.record:
        versions = {"torch": torch.__version__}
        arguments.record.write_text(json.dumps({"derived": True, **versions, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
