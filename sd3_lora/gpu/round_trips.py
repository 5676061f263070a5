"""Tensors of the host that visit the device in turn, are changed there, and go back.

Each visit copies one item to the device and, once it has been changed, back again. Both copies run beside the
computation, on a stream for each direction: the link has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sd3_lora.common.memory import round_up
from sd3_lora.gpu.copy_stream import Copy, CopyStream
from sd3_lora.gpu.pinned_memory import pinned_buffers, pinned_bytes

import torch

Item = tuple[torch.Tensor, ...]
# One that is changed, one that arrives, and one that leaves.
SLOTS = 3


def host_sizes(items: Sequence[Item]) -> list[int]:
    """The bytes of each tensor's buffer on the host."""
    return [round_up(tensor.nbytes) for item in items for tensor in item]


@dataclass(frozen=True)
class RoundTripBytes:
    """What items take.

    Attributes:
        whole: bytes of all of them, as they would stay on the device.
        slots: bytes of the slots there.
        pinned: bytes of host memory.
    """

    whole: int = 0
    slots: int = 0
    pinned: int = 0

    @classmethod
    def of(cls, items: Sequence[Item]) -> RoundTripBytes:
        """Those of `RoundTrips` with these items."""
        whole = sum(tensor.nbytes for item in items for tensor in item)
        return cls(whole, slot_bytes(items), pinned_bytes(host_sizes(items)))


def slot_bytes(items: Sequence[Item]) -> int:
    """The bytes that the slots for these items take on the device."""
    return min(SLOTS, len(items)) * sum(map(round_up, _largest(items)))


def _largest(items: Sequence[Item]) -> list[int]:
    """The bytes of the largest tensor in each place of an item."""
    places = max(map(len, items))
    return [max((item[place].nbytes for item in items if place < len(item)), default=0) for place in range(places)]


@dataclass(eq=False)
class _Slot:
    """Room for one item on the device.

    Attributes:
        buffers: uint8, one for each tensor of an item: compiled kernels must not see two in one memory.
        index: of the item in it, if any.
        arrival: of the latest copy into it.
        departure: of the latest copy out of it.
    """

    buffers: list[torch.Tensor]
    index: int | None = None
    arrival: Copy = field(default_factory=Copy)
    departure: Copy = field(default_factory=Copy)


class RoundTrips:
    """Items on the host, pinned where the device is a GPU, and slots for some of them on the device.

    In a pass each item is visited once at most. The order of the pass before is prefetched; in the first one each
    visit waits for its copy.

    Args:
        items: tensors of the shapes and dtypes, such as meta tensors.
        device: that they visit.

    Attributes:
        host: the items there, to be read and written while no pass is under way and the device is idle.
        host_bytes: of pinned host memory.
        device_bytes: of the slots.

    Raises:
        UserError: the driver does not pin so much host memory.
    """

    def __init__(self, items: Sequence[Item], device: torch.device):
        sizes = host_sizes(items)
        buffers = pinned_buffers(sizes, device, "give the GPU more with --vram_budget_gib, so that fewer blocks are")
        self.host: list[Item] = [tuple(_view(next(buffers), tensor) for tensor in item) for item in items]
        self.host_bytes, self.device_bytes = pinned_bytes(sizes), slot_bytes(items)
        self._arrivals, self._departures = CopyStream(device), CopyStream(device)
        largest = [round_up(size) for size in _largest(items)]

        def make() -> _Slot:
            return _Slot([torch.empty(size, dtype=torch.uint8, device=device) for size in largest])

        self._slots = [make() for _ in range(min(SLOTS, len(items)))]  # the one used longest ago first
        self._expected: list[int] = []
        self._visited: list[int] = []

    def begin(self) -> None:
        """To be called before each pass: no copy may be under way, or the device must be idle.

        Whatever a slot holds is copied anew: a CUDA graph that is replayed leaves other items there.
        """
        if self._visited:
            self._expected = self._visited
        self._visited = []
        for slot in self._slots:
            slot.index, slot.arrival, slot.departure = None, Copy(), Copy()

    def visit(self, index: int) -> Item:
        """The item on the device, valid for what is queued until `leave`; prefetches the next ones."""
        place = len(self._visited)
        self._visited.append(index)
        is_expected = self._expected[: place + 1] == self._visited
        coming = self._expected[place + 1 : place + len(self._slots)] if is_expected else []
        wanted = [index, *coming]
        slot = self._bring(index, wanted)
        self._slots.remove(slot)
        self._slots.append(slot)
        self._arrivals.wait(slot.arrival)
        for other in coming:
            self._bring(other, wanted)
        return tuple(_view(buffer, tensor) for buffer, tensor in zip(slot.buffers, self.host[index], strict=False))

    def _bring(self, index: int, wanted: Sequence[int]) -> _Slot:
        held = next((slot for slot in self._slots if slot.index == index), None)
        if held:
            return held
        slot = next(slot for slot in self._slots if slot.index not in wanted)

        def fill() -> None:
            self._departures.wait(slot.departure)  # of what was in the slot
            for buffer, tensor in zip(slot.buffers, self.host[index], strict=False):
                _view(buffer, tensor).copy_(tensor, non_blocking=True)

        slot.index = None  # should the copy fail
        slot.arrival = self._arrivals.start(fill)
        slot.index = index
        return slot

    def leave(self, index: int) -> None:
        """Queues the copy back to the host, after all that was queued so far."""
        slot = next(slot for slot in self._slots if slot.index == index)

        def empty() -> None:
            for buffer, tensor in zip(slot.buffers, self.host[index], strict=False):
                tensor.copy_(_view(buffer, tensor), non_blocking=True)

        slot.departure = self._departures.start(empty)

    def join(self) -> None:
        """Has everything that is queued on the device from now on wait for all copies."""
        self._arrivals.join()
        self._departures.join()


def _view(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)
