"""How many bytes a device can still give: what a base, and a micro-batch that is cut by memory, are held against."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

UNLIMITED = 1 << 60
"""Version 1 of control groups writes no limit as one larger than this."""


def free_bytes(device: torch.device) -> int:
    """On CUDA the card's, what PyTorch has reserved and does not use included. Else the host's, as far as the process's
    control group lets it: a container sees the memory of its whole host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([host_available(Path("/proc/meminfo")), *group_rooms(Path("/"))]))


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
