"""Memory of the host and of the device: counted and freed. GiB is 1024³ bytes."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

GIB = 1024**3
_ALIGNMENT_BYTES = 512  # CUDA's allocator rounds every tensor up to it
# Where Linux says to which control groups a process belongs, and what each of them may use.
_OWN_GROUPS, _ALL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# What CUDA and its libraries say where not torch's allocator, but they themselves lack memory.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUDA out of memory", "_STATUS_ALLOC_FAILED")


def round_up(size: int) -> int:
    """The bytes that CUDA's allocator gives for `size`."""
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def free_disk_bytes(folder: Path) -> int:
    """What is left on the disk where a folder is, or will be."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    return psutil.disk_usage(str(there)).free


def free_memory(device: torch.device) -> None:
    """Collects garbage, and has the allocators return their cached device memory and pinned memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        _free_pinned_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory ran out: torch's allocator had none left, or a library of CUDA's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Within it garbage is looked for among what was made in it alone.

    A model and its libraries are half a million objects: to look through them takes some tenths of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def drop_workspaces(device: torch.device) -> None:
    """Frees the workspaces that cuBLAS keeps for each stream; it makes a new one where it needs one.

    Else the workspace of a stream that is no longer used would stay to the end.
    """
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()


def _free_pinned_memory() -> None:
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    elif hasattr(torch._C, "_host_emptyCache"):  # older builds of torch
        torch._C._host_emptyCache()


def host_bytes() -> int:
    """Bytes of anonymous and pinned memory of this process; of its resident set where there is no /proc."""
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
    """Bytes of host memory that this process may still allocate, by the machine and by its control groups."""
    free = _free_in_groups(_OWN_GROUPS, _ALL_GROUPS)
    return min([psutil.virtual_memory().available, *free])


def _bytes_of_files(statistics: Path, names: Sequence[str]) -> int:
    """What the system keeps of files in a group's memory, and gives away on demand; 0 where it does not say."""
    with suppress(OSError, ValueError):
        counts = dict(line.split() for line in statistics.read_text().splitlines())
        return sum(int(counts.get(name, 0)) for name in names)
    return 0


def _free_in_groups(groups: Path, mounted: Path) -> list[int]:
    """Bytes below the limit of each control group that has one; cached pages of files do not count as used."""
    # A container may see the host's group names but mount its own group at the top: all levels are tried.
    names = [line.split(":", 2)[2].lstrip("/") for line in groups.read_text().splitlines()] if groups.exists() else []
    levels = {level for name in names for level in (Path(name), *Path(name).parents)}
    free = []
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
            with suppress(OSError, ValueError):  # no such group, or one without a limit ("max")
                most, taken = (int((folder / name).read_text()) for name in (limit, used))
                free.append(most - taken + _bytes_of_files(folder / "memory.stat", files))
    return free
