"""AdamW's update of one tensor, with its two moments in 8 bits: in plain operations of torch, without the host.

The moments are kept as bitsandbytes keeps them (Dettmers et al., arXiv 2110.02861): 256 numbers share a scale, the
largest of them, and each is the nearest entry of a table. Its own kernels have the rate and the step as numbers of the
host, which a CUDA graph would repeat for ever, and round a bfloat16 weight to the nearest. torchao's have neither
fault, but draw their bits from a generator.

Shapes: N numbers of the tensor, K blocks of 256.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sd3_lora.training.stochastic_rounding import random_bits, round_stochastically

import torch

BLOCK = 256
SMALLEST_IN_8_BITS = 4096  # numbers, as in bitsandbytes: a smaller tensor has its moments in float32


def is_in_8_bits(count: int) -> bool:
    """Whether a tensor of so many numbers has its moments in 8 bits."""
    return count >= SMALLEST_IN_8_BITS


def state_bytes(count: int) -> int:
    """Of the moments of a tensor with so many numbers."""
    if not is_in_8_bits(count):
        return 2 * 4 * count
    return 2 * -(-count // BLOCK) * (BLOCK + 4)


@dataclass(frozen=True)
class Table:
    """What 8 bits stand for, and how the nearest entry is found: torch's binary search takes ten times as long.

    The first 16 bits of a number, which are a bfloat16, say between which two borders it is, but for one border that
    may lie among the numbers that begin so.

    Attributes:
        values: `(256,)` float32, ascending.
        borders: in the middle between two of them; the last one is infinity.
        below: for each 16 bits, how many borders are below all numbers that begin with them, `(65536,)` uint8.
    """

    values: torch.Tensor
    borders: torch.Tensor
    below: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, signed: bool) -> Table:
        """The table of bitsandbytes, from -1 or from 0 to 1."""
        from bitsandbytes.functional import create_dynamic_map  # its import takes seconds, and only this needs it

        values = create_dynamic_map(signed=signed)
        borders = (values[1:] + values[:-1]) / 2
        first = torch.arange(65536, dtype=torch.int32) << 16
        least = torch.minimum(first.view(torch.float32), (first | 0xFFFF).view(torch.float32))
        below = torch.bucketize(least, borders).to(torch.uint8)
        borders = torch.cat([borders, borders.new_full((1,), torch.inf)])
        return cls(*(tensor.to(device) for tensor in (values, borders, below)))

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The entries' places, uint8; of a number in the middle the lower one's.

        Args:
            numbers: float32, from -1 to 1.
        """
        below = self.below[(numbers.view(torch.int32) >> 16) & 0xFFFF]
        return below + (self.borders[below.int()] < numbers)


@dataclass(frozen=True)
class Tables:
    """Of both moments: the first has a sign."""

    first: Table
    second: Table

    @classmethod
    def on(cls, device: torch.device) -> Tables:
        """Both on the device."""
        return cls(Table.on(device, signed=True), Table.on(device, signed=False))


def unpack(packed: torch.Tensor, scale: torch.Tensor, table: Table) -> torch.Tensor:
    """`(K, 256)` uint8 and `(K, 1)` float32 → `(K, 256)` float32."""
    return table.values[packed.int()] * scale


def pack(values: torch.Tensor, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    """`(K, 256)` float32 → the nearest entries, uint8, and the scales `(K, 1)`."""
    scale = values.abs().amax(dim=1, keepdim=True)
    return table.nearest(values / torch.where(scale > 0, scale, 1.0)), scale


@dataclass(frozen=True)
class Settings:
    """What is the same in every step.

    Attributes:
        betas: the moments' decays.
        epsilon: beside the root of the second.
        max_norm: to which a tensor's gradient is clipped, by itself.
        by_chance: whether bfloat16 weights are rounded so, or to the nearest.
    """

    betas: tuple[float, float]
    epsilon: float
    max_norm: float
    by_chance: bool = True


class Update(NamedTuple):
    """One tensor's update in one step, all on the device.

    Attributes:
        counts: a bool scalar: whether it is to be made. If not, all stays as it is, bit for bit.
        square: of the norm of the tensor's gradient, a float32 scalar.
        numbers: `step_numbers`, `(4,)` float32.
        key: of the random bits, two int32.
    """

    counts: torch.Tensor
    square: torch.Tensor
    numbers: torch.Tensor
    key: torch.Tensor


class PackedMoments(NamedTuple):
    """Both moments of K blocks: `(K, 256)` uint8, and their scales `(K, 1)` float32."""

    first: torch.Tensor
    first_scale: torch.Tensor
    second: torch.Tensor
    second_scale: torch.Tensor


class Moments(NamedTuple):
    """Both moments of a small tensor, `(N,)` float32."""

    first: torch.Tensor
    second: torch.Tensor


def new_moments(count: int, device: torch.device) -> PackedMoments | Moments:
    """Those of a tensor of so many numbers before its first step."""
    if not is_in_8_bits(count):
        return Moments(torch.zeros(count, device=device), torch.zeros(count, device=device))
    blocks = -(-count // BLOCK)
    zero_of_first, zero_of_second = 127, 0  # the tables' entries for 0
    return PackedMoments(
        torch.full((blocks, BLOCK), zero_of_first, dtype=torch.uint8, device=device),
        torch.zeros(blocks, 1, device=device),
        torch.full((blocks, BLOCK), zero_of_second, dtype=torch.uint8, device=device),
        torch.zeros(blocks, 1, device=device),
    )


def step_numbers(rate: float, weight_decay: float, betas: tuple[float, float], step: int) -> list[float]:
    """What of an update changes from step to step: rate, what is kept of a weight, and the moments' corrections.

    Args:
        rate: the learning rate.
        weight_decay: of AdamW.
        betas: the moments' decays.
        step: from 1.
    """
    beta1, beta2 = betas
    return [rate, 1 - rate * weight_decay, 1 / (1 - beta1**step), 1 / (1 - beta2**step)]


def _adamw(
    weights: torch.Tensor, gradient: torch.Tensor, moments: Moments, update: Update, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AdamW (arXiv 1711.05101): the new weights and moments, all float32 in the weights' shape."""
    beta1, beta2 = settings.betas
    rate, kept, first_correction, second_correction = update.numbers.unbind()
    clipped = gradient * (settings.max_norm / (update.square.sqrt() + 1e-6)).clamp(max=1.0)
    first = beta1 * moments.first + (1 - beta1) * clipped
    second = beta2 * moments.second + (1 - beta2) * clipped * clipped
    moved = (first * first_correction) / ((second * second_correction).sqrt() + settings.epsilon)
    return kept * weights - rate * moved, first, second


def _rounded(
    values: torch.Tensor, dtype: torch.dtype, start: int, key: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """New weights in their dtype, bfloat16 by chance; `start` is the first one's place in its tensor."""
    if dtype != torch.bfloat16 or not settings.by_chance:
        return values.to(dtype)
    # Compiled, `start` must be a constant: Inductor (torch 2.11) leaves places after a variable in 64 bits.
    places = torch.arange(start, start + values.numel(), dtype=torch.int32, device=values.device)
    return round_stochastically(values, random_bits(places.view_as(values), key))


def _replace(tensors: Iterable[torch.Tensor], results: Iterable[torch.Tensor], counts: torch.Tensor) -> None:
    """Writes the results of an update that counts; of another, nothing changes."""
    for tensor, result in zip(tensors, results, strict=True):
        tensor.copy_(torch.where(counts, result, tensor))


def update_small(
    weights: torch.Tensor, gradient: torch.Tensor, moments: Moments, update: Update, settings: Settings
) -> None:
    """Updates `(N,)` weights and their moments in place.

    Args:
        weights: float32 or bfloat16.
        gradient: likewise; not clipped yet.
        moments: of them.
        update: of this step.
        settings: of all steps.
    """
    new, first, second = _adamw(weights.float(), gradient.float(), moments, update, settings)
    _replace((weights, *moments), (_rounded(new, weights.dtype, 0, update.key, settings), first, second), update.counts)


def update_blocks(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    moments: PackedMoments,
    update: Update,
    settings: Settings,
    tables: Tables,
    start: int = 0,
) -> None:
    """Updates `(K, 256)` weights and their moments in place.

    Args:
        weights: float32 or bfloat16.
        gradient: likewise; not clipped yet.
        moments: of them.
        update: of this step.
        settings: of all steps.
        tables: of the 8 bits.
        start: the first weight's place in its tensor.
    """
    before = Moments(
        unpack(moments.first, moments.first_scale, tables.first),
        unpack(moments.second, moments.second_scale, tables.second),
    )
    new, first, second = _adamw(weights.float(), gradient.float(), before, update, settings)
    results = (
        _rounded(new, weights.dtype, start, update.key, settings),
        *pack(first, tables.first),
        *pack(second, tables.second),
    )
    _replace((weights, *moments), results, update.counts)
