"""Memory of the host that a GPU copies from by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sd3_lora.common.command_line import UserError
from sd3_lora.common.memory import GIB

import torch

_SLAB_BYTES = 256 * 1024**2


def _slabs(sizes: Sequence[int]) -> list[list[int]]:
    """The sizes, in their order, by the slab that they share."""
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
    """What `pinned_buffers` takes."""
    return sum(_power_of_two(sum(slab)) for slab in _slabs(sizes))


def pinned_buffers(sizes: Sequence[int], device: torch.device) -> Iterator[torch.Tensor]:
    """uint8 of each size on the host, made as they are asked for; pinned where the device is a GPU.

    By torch's own allocator, which alone makes memory that a CUDA graph may copy from. It rounds up to a power of two,
    an attention of SD3-Medium from 36 MiB to 64; so several share a slab of such a size.

    Args:
        sizes: multiples of 512.
        device: that is copied to.

    Raises:
        UserError: the driver does not pin so much.
    """
    for slab in _slabs(sizes):
        try:
            room = torch.empty(_power_of_two(sum(slab)), dtype=torch.uint8, pin_memory=device.type == "cuda")
        except RuntimeError as error:
            raise UserError(
                f"the driver did not pin {pinned_bytes(sizes) / GIB:.1f} GiB of host memory for the streamed "
                f"transformer ({str(error).splitlines()[0]}): close other programs, or do without streaming"
            ) from error
        yield from room[: sum(slab)].split(slab)
