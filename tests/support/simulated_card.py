"""A CUDA card without a card: tensors that report ``cuda:N``, hold CPU numbers and raise when devices mix.

    with simulated_card(index=1, cards=2) as card:
        grpo.train.main([...])                       # model.device = "cuda:1" trains on the simulated card

Everything happens inside the context manager, which puts every patched name back. Inside:

- An operation whose tensors lie on different devices raises `RuntimeError`, as on CUDA. CPU indices of a CUDA tensor
  and 0-d CPU operands pass, as they do there. `numpy` refuses a tensor on the card.
- ``torch.cuda`` is answered, and each function that takes a device checks it with torch's own
  ``torch.cuda._utils._get_device_index``: `torch.cuda.set_device` refuses a device without an index. As with CUDA, the
  current card is 0 until somebody sets another.
- Only the card ``index`` belongs to this process. A tensor made on another one raises `WrongCard`, where CUDA would
  silently spend that card's memory.
- A CUDA graph records the operations between ``capture_begin`` and ``capture_end``. As with CUDA, the capture changes
  nothing that existed before, a host synchronisation inside it raises, and ``replay`` runs the same operations over the
  same memory.
- `Card.out_of_memory` makes allocations fail inside chosen calls of a function.
- ``init_process_group("nccl")`` becomes Gloo, which exchanges the CPU numbers under the tensors.

What it cannot show:

- Streams and events: there is one order, the program's. A missing synchronisation goes unnoticed.
- Triton and other CUDA kernels: a Triton launch raises `RuntimeError`, so the plain torch operations run instead.
- NCCL: neither its deadlocks, nor its time-outs, nor its watchdog. Nor FSDP, nor peer access between cards.
- Speed, rounding and memory: results are those of the CPU, `torch.cuda.mem_get_info` is a constant, the peak is 0, and
  CUDA's random numbers are the CPU's.
- The foreach and fused paths of optimisers and of gradient clipping, which torch takes for plain tensors alone.
- Operations whose CUDA kernels check more than the devices (alignment, dtypes, asserts on the device).
"""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.cuda._utils import _get_device_index
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.runtime.out_of_memory import OutOfMemory

aten = torch.ops.aten
INNER = "lazy"
"""The device type that the C++ side sees. Its backward runs in the caller's thread, and no real tensor has it."""
CPU_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default}
SYNCS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default}


class WrongCard(AssertionError):
    """A tensor was made on a card that belongs to another process."""


class Stream:
    """A stream or an event that does nothing."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = torch.device("cuda", _card_index(device))

    def nothing(self, *_: Any, **__: Any) -> "Stream":
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Stream") -> float:
        return 0.0

    def is_capturing(self) -> bool:
        return _state().graph is not None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Graph:
    """A CUDA graph: the operations of a capture, and the memory they read and write."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._storages: set[int] = set()

    def capture_begin(self, *_: Any, **__: Any) -> None:
        card = _state()
        if card.graph is not None:
            raise RuntimeError("CUDA error: a capture is under way already")
        self._calls.clear()
        card.graph = self

    def capture_end(self) -> None:
        _state().graph = None

    def reset(self) -> None:
        self._calls.clear()

    def pool(self) -> tuple[int, int]:
        return 0, id(self)

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note an operation. It runs for its output's shape alone: what it would write into, it leaves, unless the
        capture itself made it."""
        written = [value for value, where in _with_schema(func, args, kwargs) if where is not None and where.is_write]
        if written and not all(tensor.untyped_storage()._cdata in self._storages for tensor in _tensors(written)):
            out = written[0]
        else:
            out = _run(func, *args, **kwargs)
        if _makes_memory(func):
            self._storages |= {tensor.untyped_storage()._cdata for tensor in _tensors([out])}
        self._calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        _state().replays += 1
        for func, args, kwargs, out in self._calls:
            fresh = _run(func, *args, **kwargs)
            if _makes_memory(func):
                for old, new in zip(_tensors([out]), _tensors([fresh]), strict=True):
                    old.copy_(new)


class Card:
    """The state of the simulated card, and what a test can ask of it."""

    def __init__(self, index: int, cards: int, free_bytes: int) -> None:
        self.index, self.cards, self.free_bytes = index, cards, free_bytes
        self.current = 0
        self.graph: Graph | None = None
        self.backends: list[str] = []
        """What `init_process_group` was asked for."""
        self.replays = 0
        self.allocations = 0
        """Tensors made on the card so far."""
        self._room: int | None = None

    @contextlib.contextmanager
    def out_of_memory(
        self, owner: Any, name: str, *, calls: Collection[int] = (0,), after: int = 0
    ) -> Iterator[list[int]]:
        """Let allocations fail during some calls of ``owner.name``; yield the 0-based numbers of the calls that failed.

        Args:
            calls: 0-based; ``range(sys.maxsize)`` is all of them.
            after: allocations of such a call that still succeed.
        """
        real, failed, count = getattr(owner, name), [], iter(range(sys.maxsize))

        def run(*args: Any, **kwargs: Any) -> Any:
            number = next(count)
            if number not in calls:
                return real(*args, **kwargs)
            self._room = after
            try:
                return real(*args, **kwargs)
            except (torch.OutOfMemoryError, OutOfMemory):
                failed.append(number)
                raise
            finally:
                self._room = None

        with mock.patch.object(owner, name, run):
            yield failed

    def allocate(self) -> None:
        """Count an allocation, or refuse it."""
        if self._room is not None:
            if self._room == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. (simulated)")
            self._room -= 1
        self.allocations += 1

    def check(self, index: int) -> None:
        if index >= self.cards:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        if index != self.index:
            raise WrongCard(f"a tensor is made on cuda:{index}, and only cuda:{self.index} belongs to this process")


_active: list[Card] = []


def _state() -> Card:
    if not _active:
        raise RuntimeError("a tensor of the simulated card is used outside `simulated_card`")
    return _active[-1]


def _card_index(device: Any = None) -> int:
    """As torch.cuda's own functions read a device: None is the current card."""
    if isinstance(device, str):
        device = torch.device(device)
    if device is None or (isinstance(device, torch.device) and device.type == "cuda" and device.index is None):
        return _state().current
    index = _get_device_index(device, optional=True)
    if index >= _state().cards:
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")
    return int(index)


class CardTensor(Tensor):
    """A tensor on the simulated card: ``numbers`` is a CPU tensor with the same strides."""

    numbers: Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor, index: int) -> "CardTensor":
        with torch.inference_mode(numbers.is_inference()):  # a view of a tensor from outside is no inference tensor
            made: CardTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                numbers.size(),
                strides=numbers.stride(),
                storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype,
                device=torch.device(INNER, index),
            )
        made.numbers, made.index = numbers, index
        return made

    device = property(lambda self: torch.device("cuda", self.index))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.index

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> Any:
        return self.numbers.untyped_storage()

    def pin_memory(self, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError(f"cannot pin '{self.type()}': only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = CardTensor(self.numbers.clone(), self.index)
        return nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.numbers}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sees every operation, those that make a tensor out of nothing included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU numbers, and give its results the device that CUDA would give them."""
    if _is_composite(func):  # in inference mode nothing above has taken it apart
        with _Dispatch():
            return func.decompose(*args, **kwargs)
    tensors = list(_tensors([args, kwargs]))
    ours = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    target, kwargs = _target(kwargs, ours)
    if not ours and target is None:
        return func(*args, **kwargs)
    if target is not None:
        _state().check(target)
    if func not in COPIES:
        _check_devices(func, args, tensors, ours)
    bare_args, bare_kwargs = _bare(args), _bare(kwargs)
    if func is aten.is_pinned.default:
        return False
    syncs = func in SYNCS or (func in COPIES and len(tensors) > len(ours)) or (func in COPIES and target is None)
    graph = _state().graph
    if graph is not None and syncs and ours:
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
    if target is not None and _makes_memory(func):
        _state().allocate()
    out = _run(func, *bare_args, **bare_kwargs) if graph is None else graph.record(func, bare_args, bare_kwargs)
    if func is aten._to_copy.default and out is bare_args[0]:
        out = out.clone()
    given = {id(tensor.numbers): tensor for tensor in ours} if func._schema.is_mutable else {}
    given |= {id(tensor): tensor for tensor in tensors} if func._schema.is_mutable else {}
    return _dressed(out, given, target)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    if func is aten.mm.dtype:  # bf16 operands with a float32 result: CUDA alone has it
        return args[0].to(args[2]) @ args[1].to(args[2])
    return func(*args, **kwargs)


def _target(kwargs: dict[str, Any], ours: list[CardTensor]) -> tuple[int | None, dict[str, Any]]:
    """The card that results lie on, None for another device; and the arguments for the CPU."""
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    device = kwargs.get("device")
    if device is None:
        return (ours[0].index if ours else None), kwargs
    device = torch.device(device)
    if device.type not in ("cuda", INNER):
        return None, kwargs
    index = device.index if device.index is not None else ours[0].index if ours else _state().current
    return index, {**kwargs, "device": torch.device("cpu")}


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor], ours: list[CardTensor]) -> None:
    """Raise the error that CUDA raises where an operation's tensors lie on different devices."""
    cards = {tensor.index for tensor in ours}
    others = [tensor for tensor in tensors if not isinstance(tensor, CardTensor)]
    if len(cards) == 1:
        written = func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], CardTensor)
        if func in CPU_INDICES:
            values = args[2:3]
            bad = not isinstance(args[0], CardTensor) or any(v.dim() and not isinstance(v, CardTensor) for v in values)
        else:
            bad = bool(written) or any(tensor.dim() > 0 for tensor in others)
        if not bad:
            return
    if not cards:
        return
    names = sorted({str(tensor.device) for tensor in tensors})
    shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(names)}! "
        f"({func}: {shapes})"
    )


def _makes_memory(func: Any) -> bool:
    return bool(func._schema.returns) and all(value.alias_info is None for value in func._schema.returns)


def _with_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args) or argument.name in kwargs:
            yield (args[i] if i < len(args) else kwargs[argument.name]), argument.alias_info


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from _tensors(value)


def _bare(value: Any) -> Any:
    if isinstance(value, CardTensor):
        return value.numbers
    if isinstance(value, (list, tuple)):
        return type(value)([_bare(part) for part in value])
    return {key: _bare(part) for key, part in value.items()} if isinstance(value, dict) else value


def _dressed(out: Any, given: dict[int, Tensor], target: int | None) -> Any:
    if isinstance(out, Tensor):
        if id(out) in given:
            return given[id(out)]
        return out if target is None or isinstance(out, CardTensor) else CardTensor(out, target)
    return type(out)([_dressed(part, given, target) for part in out]) if isinstance(out, (list, tuple)) else out


# --- the patches -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def simulated_card(*, index: int = 0, cards: int = 1, free_bytes: int = 64 << 30) -> Iterator[Card]:
    """Simulate CUDA inside; see the module's docstring.

    Args:
        index: the card that belongs to this process.
        cards: how many this machine has.
        free_bytes: what `torch.cuda.mem_get_info` reports as free.
    """
    card = Card(index, cards, free_bytes)
    lifted = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        _active.append(card)
        stack.callback(_active.remove, card)
        for owner, names in _answers(card):
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))
        stack.enter_context(_forgotten_choices())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda:0")`: by way of the CPU, then `to`
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.enter_context(_Dispatch())
        yield card


def _answers(card: Card) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield torch.cuda, _device_answers(card) | _memory_answers(card) | _stream_answers()
    yield torch.cuda.graphs, {"CUDAGraph": Graph}
    yield torch._C, {"_host_emptyCache": lambda: None}
    yield torch.cuda.graph, {"default_capture_stream": Stream()}
    yield torch.accelerator, {"current_stream": Stream, "is_available": lambda: True}
    yield nn.Module, {"_apply": _apply}
    yield ThreadPoolExecutor, {"submit": _submit}
    yield Tensor, {"to": _to, "cuda": _cuda}
    real = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        card.backends.append(str(backend))
        real("gloo", *args, **kwargs)

    yield dist, {"init_process_group": init_process_group}
    with contextlib.suppress(ImportError):
        from triton.runtime.jit import JITFunction

        yield JITFunction, {"run": _refuse_launch}


def _refuse_launch(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the simulated card runs no Triton kernels")


@contextlib.contextmanager
def _forgotten_choices() -> Iterator[None]:
    """The decoder remembers for each device which operations work on it: what it learns here is of no use outside."""
    from grpo.qwen3_5 import decode

    forget = getattr(decode.pieces, "cache_clear", lambda: None)
    forget()
    try:
        yield
    finally:
        forget()


def _device_answers(card: Card) -> dict[str, Any]:
    def set_device(device: Any) -> None:
        index = _get_device_index(device)
        if index >= card.cards:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        if index >= 0:
            card.current = index

    def exchange(index: int) -> int:
        before = card.current
        set_device(index)
        return before

    def properties(device: Any = None) -> SimpleNamespace:
        index = _card_index(device)
        return SimpleNamespace(
            name="simulated card",
            uuid=f"simulated-{index}",
            major=9,
            minor=0,
            total_memory=80 << 30,
            multi_processor_count=132,
            is_integrated=0,
            warp_size=32,
            gcnArchName="",
        )

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: card.cards,
        "current_device": lambda: card.current,
        "set_device": set_device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_name": lambda device=None: f"simulated card {_card_index(device)}",
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (9, 0) if _card_index(device) >= 0 else (0, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": None,
        "get_rng_state_all": lambda: [torch.get_rng_state()] * card.cards,
        "set_rng_state_all": lambda states: None,
    }


def _memory_answers(card: Card) -> dict[str, Any]:
    def nothing(device: Any = None) -> None:
        _card_index(device)

    def none_used(device: Any = None) -> int:
        _card_index(device)
        return 0

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        _card_index(device)
        return card.free_bytes, 80 << 30

    used = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    return {
        **dict.fromkeys(used, none_used),
        "memory_stats": lambda device=None: {},
        "mem_get_info": mem_get_info,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "reset_peak_memory_stats": nothing,
        "synchronize": nothing,
        "set_per_process_memory_fraction": lambda fraction, device=None: nothing(device),
    }


def _stream_answers() -> dict[str, Any]:
    return {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "Event": lambda *_, **__: Stream(),
        "stream": lambda stream: stream if stream is not None else contextlib.nullcontext(),
        "current_stream": Stream,
        "default_stream": Stream,
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: _state().graph is not None,
    }


def _indexed(value: Any) -> Any:
    """A CUDA device without an index is the current card: torch asks the driver for it, so it is asked here before."""
    if isinstance(value, (str, torch.device)) and str(value) == "cuda":
        return torch.device("cuda", _state().current)
    return value


_real_submit = ThreadPoolExecutor.submit


def _submit(self: ThreadPoolExecutor, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """transformers loads in threads, and a dispatch mode belongs to one thread."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with _Dispatch():
            return run(*args, **kwargs)

    return _real_submit(self, inside, *args, **kwargs)


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs = {key: _indexed(value) for key, value in kwargs.items()}
    return torch._C.TensorBase.to(self, *map(_indexed, args), **kwargs)


def _cuda(self: Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
    return self.to(torch.device("cuda", _card_index(device)), non_blocking=non_blocking)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As `nn.Module._apply`, for parameters that cannot take another kind of tensor as their data: tied ones stay
    tied, though each is a new object."""
    made: dict[int, nn.Parameter] = {}
    for module in self.modules() if recurse else [self]:
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                with torch.no_grad():
                    data = fn(p)
                made[id(p)] = p if data is p else nn.Parameter(data, p.requires_grad)
            module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self
