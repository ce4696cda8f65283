"""How many bytes a device can still give: what a base, and a micro-batch that is cut by memory, are held against."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

UNLIMITED = 1 << 60
"""Version 1 of control groups writes no limit as one larger than this."""


def free_bytes(device: torch.device) -> int:
    """On CUDA the card's, what PyTorch has reserved and does not use included. Else the host's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unreserved_bytes(device) + unused
    return host_free()


def unreserved_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that nothing holds, PyTorch's allocator included."""
    properties = torch.cuda.get_device_properties(device)
    return card_free(properties, lambda: torch.cuda.mem_get_info(device)[0])


def card_free(properties: Any, reported: Callable[[], int], root: Path = Path("/")) -> int:
    """Return the free bytes of a card. An integrated card shares the host's memory, and has what the host has
    available: what CUDA reports there counts the page cache as used, and after reading an 18 GB checkpoint next to
    nothing seems free.

    Args:
        properties: of the card, as `torch.cuda.get_device_properties` gives them.
        reported: reads what CUDA reports; called only where the card has memory of its own.
        root: of the host's file system.
    """
    return host_free(root) if properties.is_integrated else reported()


def host_free(root: Path = Path("/")) -> int:
    """Return what the host has available, as far as the process's control group lets it: a container sees the memory of
    its whole host."""
    return max(0, min([host_available(root / "proc/meminfo"), *group_rooms(root)]))


def host_available(meminfo: Path) -> int:
    """What the kernel could give without swapping; where it does not say, all memory there is."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = meminfo.read_text(encoding="ascii").splitlines()
        told = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(told.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def group_rooms(root: Path) -> Iterator[int]:
    """What each control group that limits this process has left, from its own to the outermost that can be seen. Cached
    files count as free: the kernel drops them first.

    Args:
        root: of the file system.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, place = line.split(":", 2)
            if number == "0":
                yield from _rooms(root / "sys/fs/cgroup", place, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _rooms(root / "sys/fs/cgroup/memory", place, *names)


def _rooms(mount: Path, place: str, limit: str, used: str, cached: str) -> Iterator[int]:
    own = mount / place.lstrip("/")
    if not own.is_relative_to(mount) or ".." in own.parts:
        own = mount
    for group in (own, *own.parents):
        if not group.is_relative_to(mount):
            return
        with contextlib.suppress(OSError, ValueError, KeyError):
            told = (group / limit).read_text(encoding="ascii").strip()
            if told != "max" and int(told) < UNLIMITED:
                stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
                in_use = int((group / used).read_text(encoding="ascii")) - int(stat[cached])
                yield int(told) - in_use
