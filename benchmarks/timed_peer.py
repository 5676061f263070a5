"""Runs another trainer's script as it is, and times its optimizer steps from outside.

    python benchmarks/timed_peer.py WARM STEPS REPORT SCRIPT [its flags]

The report is one JSON line, written after STEPS steps; then the script is left, unless the word before WARM is
`to_the_end`. It needs torch and accelerate alone, because the script may have a Python of its own.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


class Enough(BaseException):
    """Leaves the script."""


class Clock:
    """Counts steps; reads the clock at step `warm` and step `steps`, when the device is through with them."""

    def __init__(self, warm: int, steps: int):
        self.warm, self.steps, self.count = warm, steps, 0
        self.times: list[float] = []

    def tick(self) -> None:
        """Another step was taken."""
        self.count += 1
        if self.count in (self.warm, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            if self.count == self.warm and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def report(self) -> dict[str, float]:
        """Milliseconds a step, and the peak in GiB of torch's allocator over the timed steps."""
        first, last = self.times
        peak = torch.cuda.max_memory_allocated() / 1024**3 if torch.cuda.is_available() else 0.0
        return {"ms": round(1000 * (last - first) / (self.steps - self.warm), 2), "allocated_gib": round(peak, 2)}


def main(argv: list[str]) -> None:
    """Runs the script until the clock has seen enough, or to its end."""
    to_the_end = argv[0] == "to_the_end"
    argv = argv[to_the_end:]
    warm, steps, report, script = int(argv[0]), int(argv[1]), Path(argv[2]), argv[3]
    clock = Clock(warm, steps)
    take_step = AcceleratedOptimizer.step

    def step(self: AcceleratedOptimizer, *words: Any, **more: Any) -> Any:
        result = take_step(self, *words, **more)
        if self.gradient_state.sync_gradients:
            clock.tick()
            if clock.count == steps:
                report.write_text(json.dumps(clock.report()), encoding="utf-8")
                if not to_the_end:
                    raise Enough
        return result

    AcceleratedOptimizer.step = step
    sys.argv = [script, *argv[4:]]
    with contextlib.suppress(Enough):
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
