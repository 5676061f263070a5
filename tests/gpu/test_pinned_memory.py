"""Memory that is pinned: in slabs that torch's allocator does not round up."""

from __future__ import annotations

from typing import Any

import sd3_lora.gpu.pinned_memory
from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.pinned_memory import pinned_buffers, pinned_bytes
from sd3_lora.transformer.streaming import PinnedPieces, pieces_of

import pytest
import torch
from small_transformer import CPU, GPU, make_transformer


def test_pieces_share_slabs_of_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what torch's allocator of pinned memory gives, whatever it is asked for."""
    monkeypatch.setattr(sd3_lora.gpu.pinned_memory, "_SLAB_BYTES", 4096)
    sizes = 10 * [512]
    buffers = list(pinned_buffers(sizes, CPU))
    assert [buffer.numel() for buffer in buffers] == sizes
    rooms = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in buffers}
    assert list(rooms.values()) == [4096, 1024]
    for buffer in buffers:
        buffer.fill_(len(rooms))
    assert all((buffer == len(rooms)).all() for buffer in buffers)
    assert pinned_bytes(sizes) == 5120
    assert pinned_bytes([512, 8000 * 512, 512]) == 8192 * 512  # larger slabs for larger pieces


def test_memory_is_pinned_for_a_gpu_and_a_driver_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, refused = (pieces_of(make_transformer().transformer_blocks) for _ in range(2))
    asked, empty = [], torch.empty

    def refuse(*size: Any, pin_memory: bool, **words: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand much more")
        return empty(*size, **words)

    monkeypatch.setattr(torch, "empty", refuse)
    PinnedPieces(pieces, CPU)
    with pytest.raises(UserError, match=r"^the driver did not pin 0\.0 GiB .* \(CUDA error: out of memory\): close "):
        PinnedPieces(refused, GPU)
    assert asked == [False, True]
