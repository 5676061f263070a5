"""Reckons how long a step of SD3-Medium takes whose base is streamed, by the buffers and blocks on the device.

Without a GPU: `StreamedBlocks` itself says when which piece is copied. Pieces are copied one after another, and
computed one after another, each when its copy has arrived; a copy begins when the visit that asked for it does. Norms
and the like are left out.

    python benchmarks/stream_buffers.py --tflops 22 --gb_per_s 11
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.plan.memory_plan import STREAM_BUFFERS, spread_streamed_blocks
from sd3_lora.plan.step_time import PieceCost, StepSize, model_costs
from sd3_lora.transformer.streaming import Piece, StreamedBlocks

import random_sd3
import torch
from tables import streamed_as

TEXT_TOKENS = 154
LAUNCH_S = 30e-6  # the least that a piece takes
BACKWARD = {"attn": 2.2, "ff": 1.1, "ff_context": 1.1}  # times forward: fused attention computes its scores again
# Buffers, and blocks that stay beside the most of them.
SETTINGS = (*((count, 0) for count in sorted(STREAM_BUFFERS)), *((max(STREAM_BUFFERS), stay) for stay in (6, 12, 18)))


def visits(parts: Sequence[PieceCost]) -> list[tuple[int, float]]:
    """A step with every block but the last recomputed: which part, and how many times its forward this visit takes.

    Their modulations were computed in the step before, and are computed here for the next one (`ModulationsAhead`).
    """
    last = parts[-1].block
    found = [(index, 1.0) for index, part in enumerate(parts) if part.block == last or not part.is_modulation]
    for block in range(last, -1, -1):
        own = [index for index, part in enumerate(parts) if part.block == block]
        if block < last:
            found += [(index, 1.0) for index in own]
        found += [(index, BACKWARD[parts[index].part]) for index in reversed(own) if parts[index].part in BACKWARD]
    return found


class Link:
    """A source of pieces that only keeps the time: when the device is through, and when each piece has arrived."""

    def __init__(self, parts: Sequence[PieceCost], bytes_per_s: float):
        self.sizes, self.host_bytes = [512] * len(parts), 0  # nothing is copied
        self.computed = self._copied = 0.0
        self.arrivals = [0.0] * len(parts)
        self._copy_s = [part.size / bytes_per_s for part in parts]

    def fill(self, index: int, _: torch.Tensor) -> None:
        """A copy begins behind the one before, and behind what has been computed."""
        self._copied = max(self._copied, self.computed) + self._copy_s[index]
        self.arrivals[index] = self._copied

    def prefetch(self, index: int) -> None:
        """Changes nothing."""


@torch.no_grad()
def step_s(
    parts: Sequence[PieceCost], forward_s: Sequence[float], bytes_per_s: float, buffers: int, staying: int = 0
) -> float:
    """Seconds of the third step in a row, when all is prefetched; so many blocks stay on the device."""
    streamed_blocks = spread_streamed_blocks(parts[-1].block + 1, staying)
    streamed_parts = [index for index, part in enumerate(parts) if part.block in streamed_blocks]
    link = Link([parts[index] for index in streamed_parts], bytes_per_s)
    layers = {index: torch.nn.Linear(1, 1).requires_grad_(False) for index in streamed_parts}
    pieces = [Piece((parts[index].part,), (layer,)) for index, layer in layers.items()]
    streamed = StreamedBlocks(pieces, torch.device("cpu"), link, buffers)
    ends = []
    for _ in range(3):
        streamed.begin_pass()
        for index, times in visits(parts):
            if index in layers:
                layers[index](torch.zeros(1))
                link.computed = max(link.computed, link.arrivals[streamed_parts.index(index)])
            link.computed += max(LAUNCH_S, times * forward_s[index])
        ends.append(link.computed)
    return ends[-1] - ends[-2]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=22, help="What the GPU computes in a second. A T4: 22.")
    parser.add_argument("--gb_per_s", type=float, default=11, help="What its link copies. A T4: 11.")
    arguments = parser.parse_args(argv)
    with torch.device("meta"):
        transformer = random_sd3.make_transformer("sd3-medium")
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    parts = model_costs(transformer.config, torch.float16, None)
    heads = [streamed_as(*setting) for setting in SETTINGS]
    print(f"| s a step | {' | '.join(heads)} | computation alone |")
    print("| --- |" + " ---: |" * (len(heads) + 1))
    for resolution in (1024, 512):
        size = StepSize(1, (resolution // 16) ** 2, TEXT_TOKENS, width)
        forward_s = [part.flops(size) / arguments.tflops / 1e12 for part in parts]
        alone = sum(max(LAUNCH_S, times * forward_s[index]) for index, times in visits(parts))
        seconds = [step_s(parts, forward_s, arguments.gb_per_s * 1e9, *setting) for setting in SETTINGS]
        print(f"| {resolution} px | {' | '.join(f'{s:.2f}' for s in (*seconds, alone))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
