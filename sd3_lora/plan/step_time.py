"""How much a streamed step computes and copies: to tell which of two plans is the faster one, not how long it takes.

How many FLOPs are worth a byte is measured where there is a GPU: 1,000 on one, 4,000 on another, few in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from sd3_lora.common.memory import drop_workspaces, free_memory, round_up
from sd3_lora.plan.step_memory import StepShape, image_tokens
from sd3_lora.transformer.base_weights import BasePrecision, make_hollow, values_in_4_bits
from sd3_lora.transformer.placement import Placement
from sd3_lora.transformer.streaming import pieces_of

import torch

# About the FLOPs of a T4 (22 TFLOP/s) while its link copies a byte (11 GB/s): for a plan without a GPU.
FLOPS_A_BYTE = 2048
# The share of a large product's rate that a step reaches on an H100, with its attention and its norms.
STEP_SHARE = 0.45
# A solid-state disk reads at a tenth of the link's rate.
FILES_SLOWDOWN = 10


@dataclass(frozen=True)
class StepSize:
    """The sizes of a step.

    Attributes:
        rows: of the trained model's batch.
        tokens: of a picture.
        text_tokens: of a prompt.
        width: C, of the transformer.
        base_rows: of a pass of the base alone, without gradient; 0 where there is none.
    """

    rows: int
    tokens: int
    text_tokens: int
    width: int
    base_rows: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], shape: StepShape) -> StepSize:
        """The size of a training step."""
        tokens = image_tokens(config, shape.latent_size)
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return cls(shape.rows, tokens, shape.text_tokens, width, shape.base_rows)


@dataclass(frozen=True)
class PieceCost:
    """The bytes and FLOPs of a piece of the base.

    Attributes:
        block: that it is of.
        part: of that block, such as attn.
        size: in bytes, as `layout` has them.
        share: of the part's weights.
        counts: of the numbers in each of its matrices.
    """

    block: int
    part: str
    size: int
    share: float
    counts: tuple[int, ...] = ()

    @property
    def is_modulation(self) -> bool:
        """Whether it computes with one row a picture."""
        return self.part.startswith("norm")

    def flops(self, size: StepSize) -> float:
        """FLOPs of its forward, with its share of attention's scores."""
        tokens, text_tokens, width = size.tokens, size.text_tokens, size.width
        both = tokens + text_tokens
        part = {
            "attn": 8 * both * width**2 + 4 * both**2 * width,
            "attn2": 8 * tokens * width**2 + 4 * tokens**2 * width,
            "ff": 16 * tokens * width**2,
            "ff_context": 16 * text_tokens * width**2,
        }
        return size.rows * self.share * part.get(self.part, 0.0)


def model_costs(config: Mapping[str, Any], dtype: torch.dtype, precision: BasePrecision | None) -> list[PieceCost]:
    """The bytes and FLOPs of all pieces of a model.

    Of 4-bit weights their values alone are copied; the scales stay on the device.

    Args:
        config: of the transformer.
        dtype: of a base that is not in 4 bits.
        precision: nf4, or None.
    """
    hollow = pieces_of(make_hollow(dict(config), dtype).transformer_blocks)
    parts = [tuple(piece.names[0].split(".")[1:3]) for piece in hollow]
    counts = [tuple(weight.numel() for weight in piece.weights) for piece in hollow]
    sizes = [
        sum(round_up(values_in_4_bits(n) if precision == "nf4" else n * dtype.itemsize) for n in piece)
        for piece in counts
    ]
    whole: Counter[tuple[str, ...]] = Counter()
    for part, size in zip(parts, sizes, strict=True):
        whole[part] += size
    return [
        PieceCost(int(part[0]), part[1], size, size / whole[part], numbers)
        for part, size, numbers in zip(parts, sizes, counts, strict=True)
    ]


class Passes(NamedTuple):
    """FLOPs of the two passes of a step."""

    forward: float
    backward: float


@dataclass(frozen=True)
class StepCost:
    """The computation and the copies of a step, both in FLOPs: a copy counts as what is computed in its time."""

    computed: Passes
    copied: Passes

    @property
    def time(self) -> tuple[float, float]:
        """To compare two steps by: in each pass the longer of both hides the other; then what is less.

        What one leaves of the link's time is of no use to the other.
        """
        longer = map(max, self.computed, self.copied)
        return sum(longer), sum(self.computed) + sum(self.copied)


def computed_flops(costs: Sequence[PieceCost], size: StepSize, recomputed: Collection[int]) -> Passes:
    """FLOPs of a micro-batch: forward; in backward twice that, and forward again of the recomputed blocks.

    A pass of the base alone counts with forward.

    Args:
        costs: of all pieces.
        size: of the step.
        recomputed: indices of blocks.
    """
    forward = sum(piece.flops(size) for piece in costs)
    recompute = sum(piece.flops(size) for piece in costs if piece.block in recomputed)
    return Passes(forward * (1 + size.base_rows / size.rows), 2 * forward + recompute)


class BlockSize(NamedTuple):
    """Bytes of a block's pieces."""

    modulations: int
    others: int


def block_sizes(costs: Sequence[PieceCost]) -> list[BlockSize]:
    """The bytes of all blocks, added up from their pieces."""
    sizes = [[0, 0] for _ in range(costs[-1].block + 1)]
    for piece in costs:
        sizes[piece.block][0 if piece.is_modulation else 1] += piece.size
    return [BlockSize(*size) for size in sizes]


def copied_flops(
    sizes: Sequence[BlockSize], placement: Placement, flops_a_byte: float = FLOPS_A_BYTE, base_pass: bool = False
) -> Passes:
    """The FLOPs that would be computed in the time of a micro-batch's copies.

    A piece is copied once in each pass: recomputed, a block is still there for its gradients. A modulation that is
    computed ahead is copied once a step: in backward, for the next one. Another is copied in forward, and where its
    block is recomputed in backward too: its gradient needs no matrix.

    Trained, all are copied in both passes: in backward with the optimizer's state, about as large, and back again
    meanwhile, as the link has two directions.

    Args:
        sizes: of all blocks.
        placement: which of them are streamed, and from where.
        flops_a_byte: of the device.
        base_pass: whether the base alone has a pass too, which copies all of its pieces once more.
    """
    ahead = placement.ahead_blocks
    both = sum(sizes[block].others for block in placement.streamed)
    forward = sum(sizes[block].modulations for block in placement.streamed if block not in ahead)
    backward = sum(sizes[block].modulations for block in placement.streamed if block in placement.recomputed)
    if placement.whole:
        forward = sum(sizes[block].modulations for block in placement.streamed)
        backward = both + 2 * forward
    if base_pass:
        forward += sum(sum(sizes[block]) for block in placement.streamed)
    slower = flops_a_byte * (FILES_SLOWDOWN if placement.stream_from == "files" else 1)
    return Passes(slower * (both + forward), slower * (both + backward))


@cache
def measure_flops_a_byte(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOPs that a step computes on the device while the link copies a byte from pinned memory.

    Measured in a tenth of a second, once; a power of the square root of two, so that the same machine makes the same
    plan. Without a GPU a T4's.

    Args:
        device: that computes.
        dtype: in which it multiplies.
    """
    if device.type != "cuda":
        return FLOPS_A_BYTE
    rate = STEP_SHARE * _flops_a_second(device, dtype) / bytes_a_second(device)
    drop_workspaces(device)
    free_memory(device)
    return 2 ** (round(2 * math.log2(rate)) / 2)


def _flops_a_second(device: torch.device, dtype: torch.dtype) -> float:
    rows, width = 4096, 1536  # of SD3-Medium at 1024 px
    x, weight = (torch.zeros(size, width, dtype=dtype, device=device) for size in (rows, width))
    return 2 * rows * width**2 / _seconds(lambda: torch.mm(x, weight))


def bytes_a_second(device: torch.device) -> float:
    """Bytes a second that a GPU's link copies from pinned memory."""
    host = torch.empty(24 * 1024**2, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty_like(host, device=device)
    return len(host) / _seconds(lambda: on_device.copy_(host, non_blocking=True))


def _seconds(run: Callable[[], object]) -> float:
    """The fastest of three rounds, since others may be using the device."""
    return min(device_seconds(run, 10) for _ in range(3))


def device_seconds(run: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` calls by the GPU's clock, after one to warm up."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / count
