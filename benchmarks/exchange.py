"""Milliseconds to average a LoRA's gradient over the GPUs of this machine, by size: what a step exchanges.

torchrun --nproc-per-node 2 benchmarks/exchange.py --result FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.devices import choose_device

import torch
from accelerate import Accelerator
from evaluate import VERSIONS, circumstances

# A LoRA on SD3-Medium's attention has 0.587 million parameters a rank, in float32: 9 MiB at rank 4, 287 at rank 128.
SIZES_MIB = (4, 18, 72, 288, 576)
ROUNDS = 20


def exchange_ms(accelerator: Accelerator, size_mib: int) -> float:
    """One exchange as the training script has it, the mean of some."""
    gradient = torch.randn(size_mib * 1024**2 // 4, device=accelerator.device)

    def exchange() -> None:
        for _ in range(ROUNDS):
            gradient.copy_(accelerator.reduce(gradient, "mean"))
        if gradient.is_cuda:
            torch.cuda.synchronize()

    exchange()  # connections are made
    start = time.perf_counter()
    exchange()
    return 1000 * (time.perf_counter() - start) / ROUNDS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    arguments = parser.parse_args(argv)
    accelerator = Accelerator()
    rows = []
    for size in SIZES_MIB:
        ms = exchange_ms(accelerator, size)
        # Each GPU sends, and gets, this share of the gradient: a ring's.
        sent = 2 * (accelerator.num_processes - 1) / accelerator.num_processes * size * 1024**2
        rows.append({"mib": size, "ms": round(ms, 3), "gb_per_s": round(sent / ms / 1e6, 1)})
        accelerator.print(rows[-1])
    if accelerator.is_main_process and arguments.result:
        result = circumstances(choose_device("auto"), VERSIONS)
        result |= {"gpus": accelerator.num_processes, "rows": rows}
        arguments.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
