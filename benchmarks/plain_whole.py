"""The whole transformer trained by a plain loop, as one writes it: bitsandbytes' 8-bit AdamW in gradient hooks, bf16,
diffusers' gradient checkpointing, kernels launched one by one.

    python benchmarks/plain_whole.py sd3-medium 1024 WARM STEPS REPORT

The report is one JSON line. `step.py full` runs it beside ours, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.memory import GIB

import bitsandbytes
import random_sd3
import torch
from timed_peer import Clock

TEXT_TOKENS = 154


def load(model: str, device: torch.device) -> torch.nn.Module:
    """Random weights in bfloat16, each with an optimizer of its own that backward calls."""
    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer = random_sd3.make_transformer(model)
    torch.set_default_dtype(torch.float32)
    transformer.train().enable_gradient_checkpointing()
    optimizers = {weight: bitsandbytes.optim.AdamW8bit([weight], lr=1e-5) for weight in transformer.parameters()}

    def apply(weight: torch.nn.Parameter) -> None:
        optimizers[weight].step()
        weight.grad = None

    for weight in optimizers:
        weight.register_post_accumulate_grad_hook(apply)
    return transformer


def main(argv: list[str]) -> None:
    """Trains some steps on one picture's noise."""
    model, side = argv[0], int(argv[1]) // 8
    clock, report = Clock(int(argv[2]), int(argv[3])), Path(argv[4])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    transformer = load(model, device)
    options = {"device": device, "dtype": torch.bfloat16}
    latents = torch.randn(1, 16, side, side, **options)
    inputs = {
        "hidden_states": latents,
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096, **options),
        "pooled_projections": torch.randn(1, 2048, **options),
    }
    for _ in range(clock.steps):
        velocity = transformer(**inputs, return_dict=False)[0]
        (velocity.float() - latents.float()).square().mean().backward()
        clock.tick()
    row = clock.report()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        row["device_gib"] = round((total - free) / GIB, 2)
    report.write_text(json.dumps(row) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
