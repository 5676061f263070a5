"""Bytes of the host and of the device: counted, and given back. GiB is 1024³ bytes."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch

GIB = 1024**3
_ALIGNMENT_BYTES = 512  # CUDA's allocator rounds every tensor up to it


def round_up(size: int) -> int:
    """The bytes that CUDA's allocator gives for `size`."""
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def free_memory(device: torch.device) -> None:
    """Collects what nothing refers to, and returns what the allocators keep of the device's and of pinned memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        _free_pinned_memory()


def drop_workspaces(device: torch.device) -> None:
    """Has cuBLAS give up the workspaces that it keeps for each stream; where it needs one it makes it.

    Else that of a stream on which nothing is computed any more would stay to the end.
    """
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()


def _free_pinned_memory() -> None:
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    elif hasattr(torch._C, "_host_emptyCache"):  # older ones
        torch._C._host_emptyCache()


def host_bytes() -> int:
    """Anonymous and pinned memory of this process, in bytes; its resident set where there is no /proc."""
    pinned = 0
    if torch.cuda.is_initialized() and hasattr(torch.cuda, "host_memory_stats_as_nested_dict"):  # the driver's
        pinned = torch.cuda.host_memory_stats_as_nested_dict()["allocated_bytes"]["current"]
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 + pinned
    return psutil.Process().memory_info().rss


def available_host_bytes() -> int:
    """What this process may still take of the host's memory: of the machine's, and of its control groups' limits."""
    rooms = _rooms_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([psutil.virtual_memory().available, *rooms])


def _rooms_in_groups(own: Path, mounted: Path) -> list[int]:
    """For each control group that limits memory, what is left; the pages of files do not count, as they can go."""
    # A container may see the host's names of groups, and its own group where they would begin: all levels are tried.
    names = [line.split(":", 2)[2].lstrip("/") for line in own.read_text().splitlines()] if own.exists() else []
    levels = {level for name in names for level in (Path(name), *Path(name).parents)}
    rooms = []
    for root, limit, used, files in (
        (mounted, "memory.max", "memory.current", ("inactive_file", "active_file")),
        (
            mounted / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file"),
        ),
    ):
        for folder in (root / level for level in levels):
            if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - sum(int(counts[name]) for name in files)
                rooms.append(int(most) - taken)
    return rooms
