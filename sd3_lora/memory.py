"""A stage of work and what it took: time, peak device memory, peak host memory. GiB is 1024³ bytes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

GIB = 1024**3
_SAMPLE_INTERVAL_S = 0.02
_ALIGNMENT_BYTES = 512  # CUDA's allocator rounds every tensor up to it


def round_up(size: int) -> int:
    """The bytes that CUDA's allocator gives for `size`."""
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@dataclass
class StageReport:
    """What one stage took.

    Attributes:
        name: of the stage.
        elapsed_s: seconds.
        peak_device_gib: the most that torch's allocator held for tensors; 0 on a CPU.
        peak_reserved_gib: the most that the allocator took from the driver; 0 on a CPU.
        peak_host_gib: the most anonymous and pinned memory of this process (without the mapped weight files, which
            the system can drop), where the system tells; else its resident set.
    """

    name: str
    elapsed_s: float = 0.0
    peak_device_gib: float = 0.0
    peak_reserved_gib: float = 0.0
    peak_host_gib: float = 0.0

    def sentence(self) -> str:
        """One line for the user."""
        device = f", device {self.peak_device_gib:.2f} GiB" if self.peak_device_gib else ""
        return f"{self.name}: {self.elapsed_s:.1f} s, peak host {self.peak_host_gib:.2f} GiB{device}"


@contextmanager
def memory_stage(
    name: str, device: torch.device, reports: list[StageReport], say: Callable[[str], None] = print
) -> Iterator[StageReport]:
    """Measures the block, says its line and appends it to `reports`.

    The block must itself delete what it loaded; on leaving, the allocator's cache is handed back, so that the next
    stage starts from nothing.
    """
    report = StageReport(name)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sampler = PeakSampler(host_bytes)
    start = time.perf_counter()
    try:
        with sampler:
            yield report
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    finally:
        report.elapsed_s = time.perf_counter() - start
        report.peak_host_gib = sampler.peak / GIB
        if device.type == "cuda":
            report.peak_device_gib = torch.cuda.max_memory_allocated(device) / GIB
            report.peak_reserved_gib = torch.cuda.max_memory_reserved(device) / GIB
        reports.append(report)
        free_memory(device)
    say(report.sentence())


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


class PeakSampler:
    """Reads a number again and again in a thread while the block runs, and keeps the largest.

    Args:
        read: what to sample, such as `host_bytes`.
        interval_s: between two samples.
    """

    def __init__(self, read: Callable[[], int], interval_s: float = _SAMPLE_INTERVAL_S):
        self.peak = 0
        self._interval_s = interval_s
        self._read = read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _sample(self) -> None:
        self.peak = max(self.peak, self._read())

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def __enter__(self) -> PeakSampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()


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
