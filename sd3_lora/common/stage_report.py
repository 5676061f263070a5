"""A stage of work, measured: seconds, peak device memory, peak host memory. GiB is 1024³ bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sd3_lora.common.memory import GIB, free_memory, host_bytes

import torch

_SAMPLE_INTERVAL_S = 0.02


@dataclass
class StageReport:
    """The measurements of one stage.

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
    name: str, device: torch.device, reports: list[StageReport], log: Callable[[str], None] = print
) -> Iterator[StageReport]:
    """Measures the block, logs its line, and appends its report to `reports`.

    The block has to delete what it loaded. At the end the allocator's cache is freed, so that the next stage starts
    with an empty device.
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
    log(report.sentence())


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
