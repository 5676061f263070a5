"""Pieces of blocks that stay in the weight files: for a host that cannot hold them all.

The files are mapped: what fits into memory stays in the system's page cache, and the rest is read again at each use.
Forward reads the pieces first to last and backward last to first, so that the latest pages are used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.gpu.packed_tensors import layout, views
from sd3_lora.gpu.pinned_memory import pinned_buffers, pinned_bytes
from sd3_lora.transformer.streaming import Piece

import torch

# One that is being read, one that is read and waits for its copy, and one that is being copied to the device.
RING_SIZE = 3


def ring_sizes(pieces: Sequence[int]) -> list[int]:
    """The sizes of the ring's buffers, by those of the pieces."""
    return [max(pieces)] * min(RING_SIZE, len(pieces))


@dataclass(eq=False)
class _Slot:
    """One buffer of the ring.

    Attributes:
        buffer: uint8, as large as the largest piece.
        index: of the piece that is in it, or will be.
        reading: done when the piece is in it.
        sent: the event behind the latest copy from it; None where no copy is under way.
    """

    buffer: torch.Tensor
    index: int | None = None
    reading: Future[None] = field(default_factory=Future)
    sent: torch.cuda.Event | None = None


class MappedPieces:
    """The matrices of each piece, read from the mapped files into a ring of pinned buffers each time they are streamed.

    A thread reads the prefetched pieces while others are copied and compute. Before it reads into a buffer, it waits
    until the copy from that buffer is done.

    Args:
        pieces: of a transformer whose blocks were left in the files (`streamed_blocks`). A LoRA may be attached.
        device: that they will be copied to.
        paths: the transformer's files. Where their dtype is another, each matrix is converted as it is read.

    Raises:
        UserError: the driver does not pin the ring. Later, from `fill`: a file was removed or changed.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device, paths: Sequence[Path]):
        self._weights = TensorFiles(paths)
        self._names = [piece.names for piece in pieces]
        self._unread = [piece.weights for piece in pieces]
        self.sizes = [layout(tensors)[-1] for tensors in self._unread]
        ring = ring_sizes(self.sizes)
        self.host_bytes = pinned_bytes(ring)
        self._slots = [_Slot(buffer) for buffer in pinned_buffers(ring, device)]  # the least recently used first
        self._thread = ThreadPoolExecutor(1, "weights")

    def prefetch(self, index: int) -> None:
        """Lets the thread read piece `index`, unless it is in the ring already."""
        self._slot(index)

    def fill(self, index: int, destination: torch.Tensor) -> None:
        """Queues the copy of piece `index` into `destination`, uint8 of its size, on the current stream.

        Waits until it is read. That takes no time if the piece was prefetched and the device is busy for longer than
        a read; else the device would have to wait for the files anyway.
        """
        slot = self._slot(index)
        slot.reading.result()
        destination.copy_(slot.buffer[: self.sizes[index]], non_blocking=True)
        slot.sent = _record(destination.device)

    def _slot(self, index: int) -> _Slot:
        """The slot that holds the piece, or the one used longest ago, into which it will be read."""
        slot = next((slot for slot in self._slots if slot.index == index), None)
        if slot is None:
            slot = self._slots[0]
            slot.index = index
            # Without a reference to self, whose executor would else be dropped by its own thread.
            slot.reading = self._thread.submit(_read, slot, self._weights, self._names[index], self._unread[index])
        self._slots.remove(slot)
        self._slots.append(slot)
        return slot


def _read(slot: _Slot, weights: TensorFiles, names: Sequence[str], like: Sequence[torch.Tensor]) -> None:
    """Puts tensors of the files into the slot's buffer, in the dtype of those in `like`."""
    if slot.sent is not None:
        slot.sent.synchronize()
    weights.require_unchanged()
    for name, view in zip(names, views(slot.buffer, like), strict=True):
        view.copy_(weights.tensor(name))


def _record(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all that is queued on the current stream; None on a CPU, which queues nothing."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # else the thread would spin on a core while it waits
    event.record()
    return event
