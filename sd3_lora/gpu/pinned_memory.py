"""Pinned host memory, from which a GPU copies while the host goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sd3_lora.common.command_line import UserError, first_line
from sd3_lora.common.memory import GIB

import torch

_SLAB_BYTES = 256 * 1024**2


def _slabs(sizes: Sequence[int]) -> list[list[int]]:
    """The sizes in their order, grouped by the slab that they share."""
    capacity = max(_SLAB_BYTES, _power_of_two(8 * max(sizes)))  # little of it is left over
    slabs: list[list[int]] = [[]]
    for size in sizes:
        if sum(slabs[-1]) + size > capacity:
            slabs.append([])
        slabs[-1].append(size)
    return slabs


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def pinned_bytes(sizes: Sequence[int]) -> int:
    """Bytes of host memory that `pinned_buffers` allocates."""
    return sum(_power_of_two(sum(slab)) for slab in _slabs(sizes))


def pinned_buffers(
    sizes: Sequence[int], device: torch.device, remedy: str = "type --stream_from files"
) -> Iterator[torch.Tensor]:
    """Yields a uint8 buffer of each size on the host; pinned where the device is a GPU.

    They come from torch's allocator, because a CUDA graph may only copy from its memory. It rounds up to a power of
    two (an attention of SD3-Medium from 36 MiB to 64), so several buffers share a slab of such a size.

    Args:
        sizes: in bytes, multiples of 512.
        device: the copies' destination.
        remedy: what a user may do beside closing other programs.

    Raises:
        UserError: the driver does not pin so much.
    """
    for slab in _slabs(sizes):
        try:
            slab_buffer = torch.empty(_power_of_two(sum(slab)), dtype=torch.uint8, pin_memory=device.type == "cuda")
        except RuntimeError as error:
            raise UserError(
                f"the driver did not pin {pinned_bytes(sizes) / GIB:.1f} GiB of host memory for the streamed "
                f"transformer ({first_line(error)}): close other programs, or {remedy}"
            ) from None  # else the host's memory is taken for the cause, whose sentence has no remedy
        yield from slab_buffer[: sum(slab)].split(slab)
