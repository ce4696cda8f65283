"""The processes of one run under ``torchrun`` and the collectives between them.

All ranks call every operation in the same order, and with one rank each is the identity, so the loop has one path: what
is a function of (seed, step) each rank computes for itself, it samples and trains its own groups, and receives
everything else here. Objects are pickled by torch between the ranks of one run, which must trust each other.
"""

import contextlib
import copyreg
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.runtime.errors import UserError
from grpo.runtime.interrupts import default_handlers

T = TypeVar("T")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that ``torchrun`` sets for each process."""

WATCHDOG_S = 60.0
"""After a rank is lost by its timeout, NCCL's watchdog leaves the others so long to save the last step: it ends the
process without a word."""

QUIET_EXIT_DELAY_S = 2.0
"""Seconds a silent rank waits before exiting, so that rank 0 can print the error: ``torchrun`` kills all ranks 0.1 s
after the first exit."""


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    """Rebuild a read-only mapping such as `rewards.Score.parts`, whose class cannot be pickled by name."""
    return MappingProxyType(mapping)


copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


class ReportedByMainRank(UserError):
    """This rank must stop; rank 0 has already reported why."""


class RankLost(RuntimeError):
    """Another rank ended or did not respond in time."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 — a device is a value
    """Device of the tensors that ranks exchange: with CUDA the rank's own card."""
    timeout_s: float = float("inf")
    """A rank that does not respond for this long is lost."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the run folder and prints."""
        return self.rank == 0

    def slice_of(self, count: int) -> range:
        """Return which of ``count`` items (prompts, cases) belong to this rank: contiguous, as even as possible.

        >>> [list(World(rank, 4).slice_of(6)) for rank in range(4)], list(World(1, 4).slice_of(1))
        ([[0], [1, 2], [3], [4, 5]], [])
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def all_gather(self, items: Sequence[T]) -> list[T]:
        """Return the items of all ranks in rank order, which restores the order of items divided by `slice_of`."""
        return [item for part in self.all_gather_object(items) for item in part]

    def all_gather_object(self, value: T) -> list[T]:
        """Return the value of each rank, by rank."""
        values = [value] * self.size
        if self.size > 1:
            self._run(dist.all_gather_object, values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value."""
        return self.all_gather_object(value)[0]

    def error(self, message: str) -> UserError:
        """Return the exception with which all ranks stop at once: only rank 0 prints the message."""
        return UserError(message) if self.is_main else ReportedByMainRank(message)

    def check_identical(self, value: Mapping[str, Any]) -> None:
        """Check that all ranks have the same value as rank 0; otherwise raise `error`, which names the other ranks and
        the dotted keys that differ."""
        first, *others = self.all_gather_object(value)
        ranks_of: dict[str, list[str]] = {}
        for rank, other in enumerate(others, 1):
            if keys := differing_keys(first, other):
                ranks_of.setdefault(", ".join(keys), []).append(str(rank))
        if ranks_of:
            differences = (f"rank {', '.join(ranks)}: other {keys}" for keys, ranks in ranks_of.items())
            raise self.error(f"the ranks differ from rank 0: {'; '.join(differences)}")

    @contextlib.contextmanager
    def fail_together(self, *faults: type[Exception]) -> Iterator[None]:
        """Context that all ranks leave normally, or none: if one of ``faults`` is raised on one rank, it is raised on
        rank 0, which prints it, and `ReportedByMainRank` on the others."""
        fault = None
        try:
            yield
        except faults as error:
            fault = error
        for rank, reason in enumerate(self.all_gather_object(fault)):
            if reason is not None:
                if not self.is_main:
                    raise ReportedByMainRank(str(reason))
                if rank:
                    reason.args = (f"rank {rank}: {reason}",)
                raise reason

    def all_reduce_(self, flat: Tensor) -> None:
        """Sum [n] over the ranks in place. Summed in float64 and rounded once, the result is the same on every rank."""
        if self.size > 1:
            total = flat.double()
            self._run(dist.all_reduce, total)
            flat.copy_(total)

    def all_reduce_gradients(self, parameters: Iterable[Tensor], loss: Tensor) -> Tensor:
        """Sum the gradients over the ranks in place, in one `all_reduce_`; return the sum of the losses, []. Every
        parameter must have a gradient."""
        if self.size == 1:
            return loss
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(grad.flatten().float() for grad in grads), loss.detach().float()[None]])
        self.all_reduce_(flat)
        for grad, total in zip(grads, flat[:-1].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
        return flat[-1]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of every rank with those of rank 0."""
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                values = tensor.detach().to(self.device).contiguous()
                self._run(dist.broadcast, values, 0)
                tensor.copy_(values)

    def _run(self, collective: Callable[..., object], *arguments: Any) -> None:
        """Run a collective in a thread, so that signals are handled and the timeout applies while this rank waits."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                if self.device.type == "cuda":  # the current card is a property of the thread
                    torch.cuda.set_device(self.device)
                collective(*arguments)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            done.result(self.timeout_s)
        except TimeoutError:
            raise RankLost(f"another rank did not respond within train.rank_timeout_s = {self.timeout_s:g} s") from None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = str(error).strip().partition("\n")[0][:200]
            raise RankLost(f"another rank ended: {text}") from None


SINGLE_PROCESS = World()
"""A run of one process."""


@contextlib.contextmanager
def init_world(device: str, *, timeout_s: int) -> Iterator[World]:
    """Join the other ranks that ``torchrun`` started; `SINGLE_PROCESS` without ``torchrun``.

    Args:
        device: ``model.device``; with CUDA each rank uses the card of its LOCAL_RANK and NCCL, else Gloo.
        timeout_s: a rank that does not respond for this long is lost.

    Raises:
        UserError: the environment is incomplete, there are more ranks than cards, or the others cannot be reached.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        yield SINGLE_PROCESS
        return
    rank, size, local_rank, local_size = _environment()
    rank_device = _rank_device(device, size, local_rank, local_size)
    if size == 1:
        yield World(device=rank_device)
        return
    try:
        with default_handlers():  # the rendezvous waits in C++, and no work is lost yet if a signal ends the process
            _connect(rank_device, timeout_s)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank}/{size} could not reach the other ranks at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {error}"
        ) from None
    yield World(rank, size, rank_device, timeout_s)
    dist.destroy_process_group()  # after an error the process ends, and the others notice that


def _connect(device: torch.device, timeout_s: float) -> None:
    """Find the other ranks, check that each has a card of its own, and create the process group."""
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
    """Raise `UserError` if two ranks use the same card (given by its UUID), which NCCL does not support."""
    store.set(f"card of rank {rank}", uuid)
    ranks_of: dict[str, list[str]] = {}
    for other in range(size):
        ranks_of.setdefault(store.get(f"card of rank {other}").decode(), []).append(str(other))
    for card, ranks in ranks_of.items():
        if len(ranks) > 1:
            raise UserError(
                f"ranks {', '.join(ranks)} use one CUDA device ({card}), and each needs its own: lower "
                f'--nproc-per-node, give each process another CUDA_VISIBLE_DEVICES, or use model.device = "cpu"'
            )


def launched_world() -> World:
    """Return this process's place on its host before the ranks have joined; local rank 0 prints for all of them."""
    size, local_rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "0")
    if size.isdecimal() and local_rank.isdecimal() and int(size) > 1:
        return World(int(local_rank), int(size))
    return SINGLE_PROCESS


def require_single_process(program: str) -> None:
    """Exit with code 2 if ``torchrun`` started several processes of a program that supports only one."""
    ranks = launched_world()
    if ranks.size == 1:
        return
    if ranks.is_main:
        print(f"error: {program} does not support torchrun: run it as a single process", file=sys.stderr)
    else:
        time.sleep(QUIET_EXIT_DELAY_S)
    sys.exit(2)


def exit_process(code: int) -> NoReturn:
    """End the process. If the process group still exists after an error, a thread may wait for a rank that hangs, and
    Python's own exit would wait for that thread."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def launch_prefix(ranks: World) -> str:
    """Return the start of a command line that starts as many ranks, up to the name of the program."""
    if ranks.size == 1:
        return "python -m"
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    hosts = f"--nnodes {ranks.size // local_size} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    return f"torchrun {'--standalone' if local_size == ranks.size else hosts} --nproc-per-node {local_size} -m"


def _environment() -> tuple[int, int, int, int]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
    if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
        raise UserError(
            f"RANK or WORLD_SIZE is set, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: launch "
            f"with `torchrun --nproc-per-node N -m grpo train ...`, or unset RANK and WORLD_SIZE to run one process"
        )
    texts = [os.environ[name] for name in TORCHRUN_VARIABLES[:4]]
    rank, size, local_rank, local_size = (int(text) if text.isdecimal() else -1 for text in texts)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        values = ", ".join(f"{name}={os.environ[name]!r}" for name in TORCHRUN_VARIABLES[:4])
        raise UserError(f"{values} are not ranks of one run: launch with `torchrun`")
    return rank, size, local_rank, local_size


def _rank_device(device: str, size: int, local_rank: int, local_size: int) -> torch.device:
    """Return the device that ``model.device`` means for one rank."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not cards):
        return torch.device("cpu")
    if ":" in device and size > 1:
        raise UserError(f'model.device = "{device}" is one card, but there are {size} ranks: use "cuda" or "auto"')
    if local_size > cards > 1 or not cards:
        raise UserError(
            f'model.device = "{device}": {local_size} ranks on a host with {cards} CUDA device(s), and each needs one: '
            f'lower --nproc-per-node, or use model.device = "cpu"'
        )
    if ":" not in device:  # if each process sees one card, as SLURM arranges it, `check_cards` compares them
        return torch.device("cuda", local_rank if cards > 1 else 0)
    if (chosen := torch.device(device)).index >= cards:
        raise UserError(f'model.device = "{device}": this machine has {cards} CUDA device(s)')
    return chosen


def differing_keys(first: Any, other: Any, prefix: str = "") -> list[str]:
    """Return the sorted dotted keys in which two nested mappings differ.

    >>> differing_keys({"torch": "2.9", "loss": {"beta": 0.1, "kl": "k3"}}, {"loss": {"beta": 0.2, "kl": "k3"}})
    ['loss.beta', 'torch']
    """
    if not isinstance(first, Mapping) or not isinstance(other, Mapping):
        return [] if first == other else [prefix]
    dotted = {key: f"{prefix}.{key}" if prefix else key for key in first.keys() | other.keys()}
    return sorted(d for key, name in dotted.items() for d in differing_keys(first.get(key), other.get(key), name))
