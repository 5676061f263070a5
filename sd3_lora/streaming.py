"""A frozen base whose blocks live on the host and visit the device one after another.

The device holds two buffers, each as large as the largest block. While a block computes in one, the block that is
needed next is copied into the other. In forward that is the block after; in backward, which computes each block anew
from its input (`checkpointing.py`), the block before. Where forward and backward meet, both blocks are there already.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from sd3_lora.command_line import UserError
from sd3_lora.copy_stream import Copy, CopyStream
from sd3_lora.memory import GIB, round_up

import torch
from diffusers import SD3Transformer2DModel
from torch.autograd.graph import increment_version

_PAGE_BYTES = 4096


class BlockSource(Protocol):
    """Where the frozen tensors of blocks come from: `PinnedBlocks`, or `MappedBlocks` (`mapped_blocks.py`)."""

    @property
    def sizes(self) -> list[int]:
        """The bytes of each block, laid out as `layout` says."""

    @property
    def host_bytes(self) -> int:
        """What of the host's memory is pinned."""

    def fill(self, index: int, destination: torch.Tensor) -> None:
        """Queues the copy of block `index` into `destination`, uint8 of its size, on the current stream."""

    def announce(self, index: int) -> None:
        """Says which block will be asked for next, as far as one can know."""

    def tensors(self, index: int) -> list[torch.Tensor]:
        """What the block's frozen tensors are while it is not on the device, in the order of `frozen_tensors`."""


def stream_transformer(
    transformer: SD3Transformer2DModel, device: torch.device, source: BlockSource | None = None
) -> StreamedBlocks:
    """Moves to the device what is not frozen in a block; the rest of the blocks will visit it.

    Args:
        transformer: on the host, its LoRA attached. It must not be moved afterwards, nor get other layers.
        device: where it computes.
        source: of the blocks' frozen tensors; None for `PinnedBlocks`.

    Raises:
        UserError: the driver does not pin so much host memory.
    """
    streamed = StreamedBlocks(transformer.transformer_blocks, device, source)
    for child in transformer.children():
        if child is not transformer.transformer_blocks:
            child.to(device)
    return streamed


class PinnedBlocks:
    """The frozen tensors of each block in one buffer of the host; pinned where the device is a GPU.

    The blocks' own memory is freed as they are taken over: beside all of them there is one twice at most.

    Args:
        blocks: whose frozen parameters and buffers are taken over, and are left pointing at the host's buffers.
        device: that they will be copied to.

    Raises:
        UserError: the driver does not pin so much host memory.
    """

    def __init__(self, blocks: Sequence[torch.nn.Module], device: torch.device):
        self._buffers: list[torch.Tensor] = []
        self._views: list[list[torch.Tensor]] = []
        self._pinned: list[int] = []
        # Before the first is pinned, so that those before a failure are unpinned too.
        weakref.finalize(self, unpin, self._pinned, device).atexit = False
        for block in blocks:
            tensors = frozen_tensors(block)
            buffer = whole_pages(layout(tensors)[-1])
            self._views.append(views(buffer, tensors))
            for tensor, view in zip(tensors, self._views[-1], strict=True):
                view.copy_(tensor.detach())
                tensor.data = view
            self._buffers.append(buffer)
            if device.type == "cuda":
                pin(buffer, self.host_bytes)
                self._pinned.append(buffer.data_ptr())

    @property
    def sizes(self) -> list[int]:
        """The bytes of each block."""
        return [buffer.numel() for buffer in self._buffers]

    @property
    def host_bytes(self) -> int:
        """What all blocks hold."""
        return sum(self.sizes)

    def fill(self, index: int, destination: torch.Tensor) -> None:
        """Queues the copy of block `index` into `destination`, uint8 of its size, on the current stream."""
        destination.copy_(self._buffers[index], non_blocking=True)

    def announce(self, index: int) -> None:
        """Changes nothing: every block is here."""

    def tensors(self, index: int) -> list[torch.Tensor]:
        """The block's frozen tensors on the host, in the order of `frozen_tensors`."""
        return self._views[index]


def whole_pages(size: int) -> torch.Tensor:
    """uint8 of `size`, which shares no page with anything else: no page can be pinned twice."""
    room = torch.empty(size + 2 * _PAGE_BYTES, dtype=torch.uint8)
    start = -room.data_ptr() % _PAGE_BYTES
    return room[start : start + size]


def pin(buffer: torch.Tensor, total: int) -> None:
    """Pins what `whole_pages` made; `total` bytes, it included, are told in the error."""
    # Not pin_memory(): torch's host allocator rounds up to a power of two, SD3-Medium's block from 162 to 256 MiB.
    size = -(-buffer.numel() // _PAGE_BYTES) * _PAGE_BYTES
    error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    if error:
        raise UserError(
            f"the driver did not pin {total / GIB:.1f} GiB of host memory for the streamed transformer "
            f"(CUDA error {error}): close other programs, or do without streaming"
        )


def unpin(addresses: list[int], device: torch.device) -> None:
    """Undoes `pin`."""
    if addresses:
        torch.cuda.synchronize(device)  # a copy for a block that nobody waited for may still be under way
        for address in addresses:
            torch.cuda.cudart().cudaHostUnregister(address)


def frozen_tensors(block: torch.nn.Module) -> list[torch.Tensor]:
    """The block's parameters that are not trained, and its buffers."""
    return [tensor for tensor in (*block.parameters(), *block.buffers()) if not tensor.requires_grad]


def layout(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The offset of each tensor in a buffer that holds them all, and at the end the buffer's size, in bytes.

    Where torch's allocator would begin a tensor: kernels are chosen by alignment too, and are to be the same.
    """
    offsets = [0]
    for tensor in tensors:
        end = offsets[-1] + tensor.numel() * tensor.element_size()
        offsets.append(round_up(end))
    return offsets


def views(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the same shapes and dtypes, which lie in `buffer`."""
    return [
        buffer[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for offset, tensor in zip(layout(tensors), tensors, strict=False)
    ]


class StreamedBlocks:
    """Blocks whose frozen tensors are on the device only while they compute, and until the buffer is needed again.

    Forward, backward and their results stay what they are for resident blocks, bit for bit. For backward all blocks but
    the last two must be checkpointed (`checkpoint_blocks`): the weights that another saved are no longer there, and
    autograd refuses ("modified by an inplace operation"). Any order of blocks gives right results; one that is neither
    forward nor backward only waits for its copies.

    A hook before each block is all there is, none after it: a recomputation that stops early, as soon as it has what
    backward needs, would skip one.

    Args:
        blocks: their trainable parameters are moved to the device. 4-bit weights of bitsandbytes are streamed like
            others; their scales (a few percent) stay on the device. (Of such a block that should have been checkpointed
            autograd only notices the other tensors.)
        device: where the blocks compute.
        source: of the frozen tensors; None for `PinnedBlocks`.

    Attributes:
        device_bytes: what the two buffers hold.
        host_bytes: what of the host's memory the source has pinned.
        copies: how many blocks have been copied to the device so far.
    """

    def __init__(self, blocks: torch.nn.ModuleList, device: torch.device, source: BlockSource | None = None):
        self._device = device
        self._tensors = [frozen_tensors(block) for block in blocks]
        self._source: BlockSource = source or PinnedBlocks(list(blocks), device)
        self._copy_stream = CopyStream(device)
        largest = max(self._source.sizes)
        self._buffers: list[torch.Tensor] = []
        # In the copy stream's pool: a copy that is under way when all this is dropped cannot hit others' memory.
        self._copy_stream.start(lambda: self._buffers.extend(self._empty(largest) for _ in range(2)))
        # Block i is always in buffer i % 2, in forward as in backward: a saved view of a weight that autograd does not
        # know of (bitsandbytes keeps one) then sees the same weight again after the block has been computed anew.
        self._views = [views(self._buffers[i % 2], tensors) for i, tensors in enumerate(self._tensors)]
        self._held: list[int | None] = [None, None]
        self._arrivals = [Copy(), Copy()]
        self._latest: int | None = None
        self.device_bytes = 2 * largest
        self.host_bytes = self._source.host_bytes
        self.copies = 0
        for index, block in enumerate(blocks):
            self._place_trained(block)
            block.register_forward_pre_hook(lambda *_, index=index: self._visit(index))

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _place_trained(self, block: torch.nn.Module) -> None:
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self._device)
            quant_state: Any = getattr(parameter, "quant_state", None)
            if quant_state is not None:
                quant_state.to(self._device)

    def _visit(self, index: int) -> None:
        """Has block `index` ready, and starts to copy the block that comes next."""
        if self._held[index % 2] != index:
            self._load(index)
        self._copy_stream.wait(self._arrivals[index % 2])
        for tensor, view in zip(self._tensors[index], self._views[index], strict=True):
            tensor.data = view
        following, upcoming = self._following(index)
        self._latest = index
        # Never into this block's own buffer, as at the seam of two passes of an odd number of blocks.
        if following % 2 != index % 2 and self._held[following % 2] != following:
            self._load(following)
        if upcoming not in self._held:
            self._source.announce(upcoming)

    def _following(self, index: int) -> tuple[int, int]:
        """The block to copy while this one computes, and the one to copy after it; at worst it costs time."""
        count = len(self._tensors)
        if self._latest is not None and index == self._latest - 1:  # backward
            if index > 1:
                return index - 1, index - 2
            return 0, min(2, count - 1)  # forward follows, and finds 0 and 1 here
        if index < count - 2:
            return index + 1, index + 2
        if torch.is_grad_enabled():
            return count - 1, max(count - 3, 0)  # backward follows, and finds the last two here
        return (index + 1) % count, (index + 2) % count  # or a forward

    def _load(self, index: int) -> None:
        """Starts to copy block `index` into its buffer, whose block goes back to the host.

        All that the block there computed has been queued: in forward, as a later block is visited; in backward, as the
        visit of an earlier block, which computes it anew, comes when autograd is through with the later one.
        """
        slot = index % 2
        leaving = self._held[slot]
        if leaving is not None:
            for tensor, host in zip(self._tensors[leaving], self._source.tensors(leaving), strict=True):
                tensor.data = host
            # Else autograd would take what is in the buffer then for the weight that it saved.
            increment_version(self._tensors[leaving])
        destination = self._buffers[slot][: self._source.sizes[index]]
        self._arrivals[slot] = self._copy_stream.start(lambda: self._source.fill(index, destination))
        self._held[slot] = index
        self.copies += 1
