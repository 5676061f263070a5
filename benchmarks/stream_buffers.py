"""Reckons how long a step of SD3-Medium takes whose base is streamed, by the number of buffers on the device.

Without a GPU: pieces are copied one after another, and computed one after another, each when its copy has arrived; a
copy begins when the visit that asked for it does. Norms and the like are left out, and so is a piece's own overlap.

    python benchmarks/stream_buffers.py --tflops 22 --gb_per_s 11
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.streaming import layout, pieces_of

import random_sd3
import torch

TEXT_TOKENS = 154
LAUNCH_S = 30e-6  # the least that a piece takes
BACKWARD = {"attn": 2.2, "ff": 1.1, "ff_context": 1.1}  # times forward: fused attention computes its scores again
COUNTS = (2, 3, 4, 6, 10)


def flops(part: str, tokens: int, width: int) -> float:
    """Of a piece's forward, with what is computed beside its products where that counts: attention's scores."""
    whole = tokens + TEXT_TOKENS
    return {
        "attn": 8 * whole * width**2 + 4 * whole**2 * width,
        "ff": 16 * tokens * width**2,
        "ff_context": 16 * TEXT_TOKENS * width**2,
    }.get(part, 0.0)


def visits(parts: Sequence[Sequence[str]]) -> list[tuple[int, int, float]]:
    """A step with every block computed anew: block, piece in it, and how many times its forward this visit takes."""
    last = len(parts) - 1
    found = [(block, index, 1.0) for block, own in enumerate(parts) for index in range(len(own))]
    for block in range(last, -1, -1):
        own = parts[block]
        if block < last:  # what the last block keeps is needed at once
            found += [(block, index, 1.0) for index in range(len(own))]
        found += [
            (block, index, BACKWARD[own[index]]) for index in range(len(own) - 1, -1, -1) if own[index] in BACKWARD
        ]
    return found


def step_s(
    parts: Sequence[Sequence[str]],
    copy_s: Sequence[Sequence[float]],
    forward_s: Sequence[Sequence[float]],
    buffers: int,
) -> float:
    """Seconds of the third step in a row."""
    order = 3 * visits(parts)
    held: list[tuple[int, int]] = []  # the one visited longest ago first
    arrivals: dict[tuple[int, int], float] = {}
    copied = computed = 0.0
    ends = []
    for at, (block, index, times) in enumerate(order):
        wanted = [visit[:2] for visit in order[at : at + buffers]]
        for piece in wanted:
            if piece not in held:
                if len(held) == buffers:
                    held.remove(next(other for other in held if other not in wanted))
                held.append(piece)
                copied = max(copied, computed) + copy_s[piece[0]][piece[1]]
                arrivals[piece] = copied
        held.remove((block, index))
        held.append((block, index))
        computed = max(computed, arrivals[block, index]) + max(LAUNCH_S, times * forward_s[block][index])
        ends.append(computed)
    return ends[-1] - ends[len(ends) * 2 // 3 - 1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=22, help="What the GPU computes in a second. A T4: 22.")
    parser.add_argument("--gb_per_s", type=float, default=11, help="What its link copies. A T4: 11.")
    arguments = parser.parse_args(argv)
    with torch.device("meta"):
        transformer = random_sd3.make_transformer("sd3-medium").half().requires_grad_(False)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    parts: list[list[str]] = [[] for _ in transformer.transformer_blocks]
    copy_s: list[list[float]] = [[] for _ in parts]
    for piece in pieces_of(transformer.transformer_blocks):
        _, block, part, *_ = piece.names[0].split(".")
        parts[int(block)].append(part)
        copy_s[int(block)].append(layout(piece.weights)[-1] / arguments.gb_per_s / 1e9)
    print(f"| s a step | {' | '.join(f'{count} buffers' for count in COUNTS)} | computation alone |")
    print("| --- |" + " ---: |" * (len(COUNTS) + 1))
    for resolution in (1024, 512):
        tokens = (resolution // 16) ** 2
        forward_s = [[flops(part, tokens, width) / arguments.tflops / 1e12 for part in own] for own in parts]
        alone = sum(max(LAUNCH_S, times * forward_s[block][index]) for block, index, times in visits(parts))
        times = [step_s(parts, copy_s, forward_s, count) for count in COUNTS]
        print(f"| {resolution} px | {' | '.join(f'{seconds:.2f}' for seconds in (*times, alone))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
