"""The processes of one run under ``torchrun``, and what they tell each other. Nothing is pickled: texts and numbers go
as JSON, tensors as they are.

Every operation is called by all ranks in the same order, and with one rank it is the identity. So the loop has one
path: what is a function of (seed, step) each rank computes for itself, its own groups it samples and trains, and
everything else it is told here.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from grpo.runtime.errors import UserError
from grpo.runtime.interrupts import by_default

T = TypeVar("T")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What ``torchrun`` puts into the environment of each process."""
LOOK_S = 0.0005
"""Between two looks whether the others have answered: only there does Python hear a signal."""

WATCHDOG_S = 60.0
"""After a rank is lost by its timeout, NCCL's watchdog leaves the others so long to save the last step: it ends the
process without a word. In a sharded layer, whose collectives are torch's own, it is the only limit."""

HUSH_S = 2.0
"""A rank that ends without a word leaves this to the one that speaks: ``torchrun`` ends the others 0.1 s after the
first that ended."""


class RankError(UserError):
    """Processes that cannot be one run: says what to change."""


class Elsewhere(RankError):
    """What stops this rank, rank 0 has said already."""


class RankLost(RuntimeError):
    """Another rank ended, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 — a device is a value
    """Where the tensors lie that ranks exchange: on CUDA the rank's own card."""
    timeout_s: float = float("inf")
    """A rank that does not answer for so long is lost."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Which of ``count`` things, prompts or cases, are this rank's: contiguous, as even as can be.

        >>> [list(Ranks(rank, 4).mine(6)) for rank in range(4)], list(Ranks(1, 4).mine(1))
        ([[0], [1, 2], [3], [4, 5]], [])
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, own: Sequence[T], kind: TypeAdapter[list[T]]) -> list[T]:
        """What all ranks hold, in their order: things shared out by `mine` are in their own order again.

        Args:
            kind: what they are: dataclasses, tuples, numbers and texts.
        """
        if self.size == 1:
            return list(own)
        return kind.validate_python([one for part in self.exchange(list(own)) for one in part])

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; with more than one rank as JSON reads it, a dataclass as its fields."""
        if self.size == 1:
            return [value]
        return [json.loads(told) for told in self._swap(json.dumps(value, default=_plain).encode())]

    def told(self, value: T) -> T:
        """Rank 0's value, which is one of JSON."""
        found: T = self.exchange(value)[0]
        return found

    def alike(self, value: Mapping[str, Any]) -> None:
        """All ranks hold the value of rank 0.

        Raises:
            RankError: on rank 0, names every other rank and its keys, dotted where mappings lie in mappings.
            Elsewhere: on the others.
        """
        first, *others = self.exchange(_dotted(value))
        apart: dict[str, list[int]] = {}
        for rank, other in enumerate(others, 1):
            if keys := sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)):
                apart.setdefault(", ".join(keys), []).append(rank)
        if apart:
            told = "; ".join(f"rank {', '.join(map(str, those))}: another {keys}" for keys, those in apart.items())
            raise (RankError if self.leads else Elsewhere)(f"not at one with rank 0: {told}")

    @contextlib.contextmanager
    def together(self, *faults: type[Exception]) -> Iterator[None]:
        """All ranks come out of it, or none: what one of ``faults`` stops on one rank stops all.

        Raises:
            RankError: on rank 0, says what stopped another.
            Elsewhere: on the others.
        """
        fault = None
        try:
            yield
        except faults as error:
            fault = error
        told = self.exchange(None if fault is None else str(fault))
        if self.leads and fault is not None:
            raise fault
        for rank, text in enumerate(told):
            if text is not None:
                raise RankError(f"rank {rank}: {text}") if self.leads else Elsewhere(text)

    def sum_(self, flat: Tensor) -> None:
        """Adds up [n] over the ranks, in place, to the same bits on every one of them: each sums its share of the n in
        the order of the ranks and in float64, and rounds once. 2·(size − 1)/size of the bytes go out and come in, as
        with any all-reduce."""
        if self.size == 1:
            return
        share = -(-flat.numel() // self.size)
        sent = flat.new_zeros(self.size * share)
        sent[: flat.numel()] = flat
        parts = torch.empty_like(sent)
        with _answered():
            self._wait(dist.all_to_all_single(parts, sent, async_op=True))
        total = torch.zeros(share, dtype=torch.float64, device=flat.device)
        for part in parts.view(self.size, share):
            total += part
        with _answered():
            self._wait(dist.all_gather(list(sent.chunk(self.size)), total.to(flat.dtype), async_op=True))
        flat.copy_(sent[: flat.numel()])

    def sum_gradients(self, parameters: Iterable[Tensor], loss: Tensor) -> Tensor:
        """The gradients of all ranks added up, in place and in one flat `sum_`, and the sum of their losses []. Every
        parameter has one."""
        if self.size == 1:
            return loss
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(grad.flatten().float() for grad in grads), loss.detach().float()[None]])
        self.sum_(flat)
        for grad, total in zip(grads, flat[:-1].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
        return flat[-1]

    def copy_(self, tensors: Iterable[Tensor]) -> None:
        """Puts rank 0's values into every rank's tensors."""
        if self.size == 1:
            return
        with torch.no_grad(), _answered():
            for tensor in tensors:
                there = tensor.detach().to(self.device).contiguous()
                self._wait(dist.broadcast(there, 0, async_op=True))
                tensor.copy_(there)

    def _wait(self, work: dist.Work | None) -> None:
        """Wait for the others, and on CUDA let the stream wait: raises what the collective met."""
        assert work is not None  # None is for processes outside the group
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RankLost("another rank did not answer within train.rank_timeout_s")
            time.sleep(LOOK_S)
        work.wait()

    def _swap(self, payload: bytes) -> list[bytes]:
        with _answered():
            sizes = torch.zeros(self.size, dtype=torch.long, device=self.device)
            length = torch.tensor([len(payload)], device=self.device)
            self._wait(dist.all_gather(list(sizes.chunk(self.size)), length, async_op=True))
            longest = int(sizes.max())
            own = torch.zeros(longest, dtype=torch.uint8)
            own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            whole = torch.empty(self.size * longest, dtype=torch.uint8, device=self.device)
            self._wait(dist.all_gather(list(whole.chunk(self.size)), own.to(self.device), async_op=True))
        rows = whole.view(self.size, longest).cpu().numpy()
        return [row[:size].tobytes() for row, size in zip(rows, sizes.tolist(), strict=True)]


ALONE = Ranks()
"""A run of one process."""


@contextlib.contextmanager
def joined(device: str, *, timeout_s: int) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started this process with; `ALONE` where it did not.

    Args:
        device: the config's: with CUDA each rank takes the card of its LOCAL_RANK and speaks NCCL, else Gloo.
        timeout_s: a rank that does not answer for so long is lost.

    Raises:
        RankError: half an environment, or more ranks than cards.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        yield ALONE
        return
    rank, size, local, beside = _environment()
    place = _place(device, size, local, beside)
    if size == 1:
        yield Ranks(device=place)
        return
    try:
        with by_default():  # it waits for the others in C++, and nothing has begun that a signal could spoil
            _connect(place, timeout_s)
    except RuntimeError as error:
        raise RankError(
            f"rank {rank} of {size} found no others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{_first_line(error)}"
        ) from None
    yield Ranks(rank, size, place, timeout_s)
    dist.destroy_process_group()  # after an error the process ends, and the others see that


def _connect(device: torch.device, timeout_s: float) -> None:
    """Find the other ranks, see that each has a card of its own, and join them."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        check_cards(store, rank, size, str(torch.cuda.get_device_properties(device).uuid))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s + WATCHDOG_S),
    )


def check_cards(store: dist.Store, rank: int, size: int, uuid: str) -> None:
    """Refuse two ranks on one card, which NCCL does not support, before it is asked.

    Args:
        uuid: of this rank's card.
    """
    store.set(f"card of rank {rank}", uuid)
    ranks_of: dict[str, list[str]] = {}
    for other in range(size):
        ranks_of.setdefault(store.get(f"card of rank {other}").decode(), []).append(str(other))
    for card, ranks in ranks_of.items():
        if len(ranks) > 1:
            raise RankError(
                f"ranks {', '.join(ranks)} use one CUDA device ({card}), and each needs its own: lower "
                f'--nproc-per-node, give each process another CUDA_VISIBLE_DEVICES, or use model.device = "cpu"'
            )


def expected() -> Ranks:
    """This process before it has joined the others: for them the first on each host speaks."""
    size, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "0")
    return Ranks(int(local), int(size)) if size.isdecimal() and local.isdecimal() and int(size) > 1 else ALONE


def require_alone(program: str) -> None:
    """Exits with 2, and one line a host, where ``torchrun`` started more than one process of a program that is one."""
    ranks = expected()
    if ranks.size == 1:
        return
    if ranks.leads:
        print(f"error: {program} is one process, not {ranks.size}: start it with python -m {program}", file=sys.stderr)
    else:
        hush()
    sys.exit(2)


def hush() -> None:
    """Before the end of a rank for which another speaks."""
    time.sleep(HUSH_S)


def leave(code: int) -> NoReturn:
    """Ends the process. Python's own end joins torch's threads, and one that waits for a rank that hangs would keep the
    process for the rest of the timeout; by then it was killed. So where the ranks did not part, it ends without."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def launcher(ranks: Ranks) -> str:
    """The start of a command line that starts as many ranks, up to the program's name."""
    if ranks.size == 1:
        return "python -m"
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    hosts = f"--nnodes {ranks.size // beside} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    return f"torchrun {'--standalone' if beside == ranks.size else hosts} --nproc-per-node {beside} -m"


def _environment() -> tuple[int, int, int, int]:
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise RankError(
            f"the environment names RANK or WORLD_SIZE, but not {', '.join(missing)}: start the ranks with "
            f"`torchrun --nproc-per-node N -m grpo.train ...`, or unset RANK and WORLD_SIZE to run alone"
        )
    try:
        rank, size, local, beside = (int(os.environ[name]) for name in TORCHRUN[:4])
    except ValueError:
        told = ", ".join(f"{name}={os.environ[name]!r}" for name in TORCHRUN[:4])
        raise RankError(f"not numbers: {told}: start the ranks with `torchrun`") from None
    if not (0 <= rank < size and 0 <= local < beside <= size):
        raise RankError(f"rank {rank} of {size}, {local} of {beside} on this host: start the ranks with `torchrun`")
    return rank, size, local, beside


def _place(device: str, size: int, local: int, beside: int) -> torch.device:
    """Of a rank: what the config's device means for it."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not cards):
        return torch.device("cpu")
    if ":" in device and size > 1:
        raise RankError(f'model.device = "{device}" is one card, but there are {size} ranks: use "cuda" or "auto"')
    if beside > cards > 1 or not cards:
        raise RankError(
            f'model.device = "{device}": {beside} ranks on a host with {cards} CUDA device(s), and each needs one: '
            f'lower --nproc-per-node, or use model.device = "cpu"'
        )
    if ":" not in device:  # where each process sees one card, as SLURM arranges it, `check_cards` compares them
        return torch.device("cuda", local if cards > 1 else 0)
    if (place := torch.device(device)).index >= cards:
        raise RankError(f'model.device = "{device}": this machine has {cards} CUDA device(s)')
    return place


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RankLost):
        raise
    except RuntimeError as error:
        slow = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = "did not answer within train.rank_timeout_s" if slow else "ended"
        raise RankLost(f"another rank {what}: {_reason(error)}") from None


def _plain(value: Any) -> Any:
    """A dataclass or a mapping as a dict: JSON knows all else that ranks tell each other."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(value)


def _dotted(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> _dotted({"torch": "2.9", "loss": {"beta": 0.1, "kl": "k3"}})
    {'torch': '2.9', 'loss.beta': 0.1, 'loss.kl': 'k3'}
    """
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _dotted(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _reason(error: Exception) -> str:
    """Gloo's first sentence, without the line of its source."""
    told = _first_line(error)
    return (told.partition("] ")[2] or told).partition(". ")[0]
