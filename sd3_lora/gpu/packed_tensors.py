"""Tensors side by side in one buffer, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Sequence

from sd3_lora.common.memory import round_up

import torch


def layout(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The offset of each tensor in a buffer that holds them all, and at the end the buffer's size, in bytes.

    Each begins where torch's allocator would place it: alignment decides which kernel runs, and so the numbers.
    """
    offsets = [0]
    for tensor in tensors:
        end = offsets[-1] + tensor.numel() * tensor.element_size()
        offsets.append(round_up(end))
    return offsets


def views(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of `buffer` with the shapes and dtypes of the tensors."""
    return [
        buffer[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for offset, tensor in zip(layout(tensors), tensors, strict=False)
    ]
