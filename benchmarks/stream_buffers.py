"""Reckons how long a step of SD3-Medium takes whose base is streamed, by the number of buffers on the device.

Without a GPU: `StreamedBlocks` itself says when which piece is copied. Pieces are copied one after another, and
computed one after another, each when its copy has arrived; a copy begins when the visit that asked for it does. Norms
and the like are left out.

    python benchmarks/stream_buffers.py --tflops 22 --gb_per_s 11
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.streaming import Piece, StreamedBlocks, layout, pieces_of

import random_sd3
import torch

TEXT_TOKENS = 154
LAUNCH_S = 30e-6  # the least that a piece takes
BACKWARD = {"attn": 2.2, "ff": 1.1, "ff_context": 1.1}  # times forward: fused attention computes its scores again
COUNTS = (2, 3, 4, 6, 10)


@dataclass(frozen=True)
class Part:
    """A piece of the real size.

    Attributes:
        block: that it is of.
        name: of the part of the block.
        size: in bytes.
    """

    block: int
    name: str
    size: int

    def flops(self, tokens: int, width: int) -> float:
        """Of its forward, with what is computed beside its products where that counts: attention's scores."""
        whole = tokens + TEXT_TOKENS
        return {
            "attn": 8 * whole * width**2 + 4 * whole**2 * width,
            "ff": 16 * tokens * width**2,
            "ff_context": 16 * TEXT_TOKENS * width**2,
        }.get(self.name, 0.0)


def visits(parts: Sequence[Part]) -> list[tuple[int, float]]:
    """A step with every block computed anew: which part, and how many times its forward this visit takes."""
    found = [(index, 1.0) for index in range(len(parts))]
    last = parts[-1].block
    for block in range(last, -1, -1):
        own = [index for index, part in enumerate(parts) if part.block == block]
        if block < last:  # what the last block keeps is needed at once
            found += [(index, 1.0) for index in own]
        found += [(index, BACKWARD[parts[index].name]) for index in reversed(own) if parts[index].name in BACKWARD]
    return found


class Link:
    """A source of pieces that only keeps the time: when the device is through, and when each piece has arrived."""

    def __init__(self, parts: Sequence[Part], bytes_per_s: float):
        self.sizes, self.host_bytes = [512] * len(parts), 0  # nothing is copied
        self.computed = self._copied = 0.0
        self.arrivals = [0.0] * len(parts)
        self._copy_s = [part.size / bytes_per_s for part in parts]

    def fill(self, index: int, _: torch.Tensor) -> None:
        """A copy begins behind the one before, and behind what has been computed."""
        self._copied = max(self._copied, self.computed) + self._copy_s[index]
        self.arrivals[index] = self._copied

    def announce(self, index: int) -> None:
        """Changes nothing."""


@torch.no_grad()
def step_s(parts: Sequence[Part], forward_s: Sequence[float], bytes_per_s: float, buffers: int) -> float:
    """Seconds of the third step in a row, when all is foreseen."""
    layers = [torch.nn.Linear(1, 1).requires_grad_(False) for _ in parts]
    link = Link(parts, bytes_per_s)
    pieces = [Piece((part.name,), (layer,)) for part, layer in zip(parts, layers, strict=True)]
    streamed = StreamedBlocks(pieces, torch.device("cpu"), link, buffers)
    ends = []
    for _ in range(3):
        streamed.begin_pass()
        for index, times in visits(parts):
            layers[index](torch.zeros(1))
            link.computed = max(link.computed, link.arrivals[index]) + max(LAUNCH_S, times * forward_s[index])
        ends.append(link.computed)
    return ends[-1] - ends[-2]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=22, help="What the GPU computes in a second. A T4: 22.")
    parser.add_argument("--gb_per_s", type=float, default=11, help="What its link copies. A T4: 11.")
    arguments = parser.parse_args(argv)
    with torch.device("meta"):
        transformer = random_sd3.make_transformer("sd3-medium").half().requires_grad_(False)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    parts = []
    for piece in pieces_of(transformer.transformer_blocks):
        _, block, name, *_ = piece.names[0].split(".")
        parts.append(Part(int(block), name, layout(piece.weights)[-1]))
    print(f"| s a step | {' | '.join(f'{count} buffers' for count in COUNTS)} | computation alone |")
    print("| --- |" + " ---: |" * (len(COUNTS) + 1))
    for resolution in (1024, 512):
        forward_s = [part.flops((resolution // 16) ** 2, width) / arguments.tflops / 1e12 for part in parts]
        alone = sum(max(LAUNCH_S, times * forward_s[index]) for index, times in visits(parts))
        seconds = [step_s(parts, forward_s, arguments.gb_per_s * 1e9, count) for count in COUNTS]
        print(f"| {resolution} px | {' | '.join(f'{s:.2f}' for s in (*seconds, alone))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
