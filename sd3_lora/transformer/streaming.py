"""A base whose matrices stay on the host and are streamed to the device, a piece of a block at a time.

A piece is the matrices of one part of a block, or half of them: an attention's inputs, a modulation. The device holds
two buffers or more, each as large as the largest piece. While a piece computes in one, the next pieces are prefetched
into the others. Forward needs the pieces first to last. Backward recomputes a block, and then needs its pieces last to
first, for the gradients of its inputs.

Pieces differ in the time of their copy and of their computation: a modulation of SD3-Medium has 27 MiB and computes
with one row. With two buffers the device would wait for its copy and for the next one's; with six all of these copies
run behind an attention. Training streams modulations once a step: in backward, for the next step
(`modulations_ahead.py`).

Where the device has room for some blocks, those stay there whole. While they compute, others are copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.gpu.copy_stream import Copy, CopyStream
from sd3_lora.gpu.cuda_graph import CapturedCall, call_in_capture
from sd3_lora.gpu.packed_tensors import layout, views
from sd3_lora.gpu.pinned_memory import pinned_buffers, pinned_bytes

import torch
from diffusers import SD3Transformer2DModel
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True, eq=False)
class Piece:
    """Linear layers of one part of a block: frozen ones, or trained ones.

    Attributes:
        names: of their weights, as the transformer's files have them.
        layers: in the order of `torch.nn.Module.modules`.
    """

    names: tuple[str, ...]
    layers: tuple[torch.nn.Linear, ...]

    @property
    def weights(self) -> list[torch.Tensor]:
        """The layers' matrices, where they are while they are not on the device."""
        return [layer.weight.detach() for layer in self.layers]


def pieces_of(
    blocks: Sequence[torch.nn.Module],
    streamed_blocks: Collection[int] | None = None,
    trained: bool = False,
    prefix: str = "transformer_blocks",
) -> list[Piece]:
    """The pieces of blocks, in the order in which forward needs them.

    None has more weights than the largest matrix of all, for which there must be room.

    Args:
        blocks: of the transformer, or layers of a text encoder, with or without a LoRA.
        streamed_blocks: the indices of those whose pieces are returned; None for all.
        trained: whether they are the pieces of trained matrices, and not of frozen ones.
        prefix: of the blocks' names in the model's files.
    """
    groups: list[dict[str, torch.nn.Linear]] = []
    largest = max((_size(layer) for block in blocks for _, layer in _linear_layers(block, trained)), default=0)
    for index, block in enumerate(blocks):
        if streamed_blocks is not None and index not in streamed_blocks:
            continue
        for part, module in block.named_children():
            room = 0
            for name, layer in _linear_layers(module, trained):
                # peft moves a layer that gets a LoRA into that as its base layer, and a LoRA into one of another kind.
                path = f"{prefix}.{index}.{part}.{name}.weight".replace(".base_layer", "")
                if _size(layer) > room:
                    groups.append({})
                    room = largest
                room -= _size(layer)
                groups[-1][path] = layer
    return [Piece(tuple(group), tuple(group.values())) for group in groups]


def _linear_layers(module: torch.nn.Module, trained: bool) -> list[tuple[str, torch.nn.Linear]]:
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer.weight.requires_grad == trained
    ]


def _size(layer: torch.nn.Linear) -> int:
    return layer.in_features * layer.out_features  # a weight in 4 bits has other sizes


class PieceSource(Protocol):
    """Where the matrices of pieces come from: `PinnedPieces`, or `MappedPieces` (`mapped_pieces.py`)."""

    @property
    def sizes(self) -> list[int]:
        """The bytes of each piece, laid out as `layout` says."""

    @property
    def host_bytes(self) -> int:
        """The bytes of pinned host memory."""

    def fill(self, index: int, destination: torch.Tensor) -> None:
        """Queues the copy of piece `index` into `destination`, uint8 of its size, on the current stream."""

    def prefetch(self, index: int) -> None:
        """A prefetch hint: piece `index` will probably be needed next."""


def stream_transformer(
    transformer: SD3Transformer2DModel,
    device: torch.device,
    source: PieceSource | None = None,
    buffers: int = 2,
    streamed_blocks: Collection[int] | None = None,
) -> StreamedBlocks:
    """Moves all to the device but the frozen matrices of the streamed blocks.

    Args:
        transformer: these matrices on the host, its LoRA attached. It must not be moved afterwards, nor get other
            layers.
        device: where it computes.
        source: of the matrices, in the order of `pieces_of`; None for `PinnedPieces`.
        buffers: on the device.
        streamed_blocks: their indices; None for all.

    Raises:
        UserError: the driver does not pin so much host memory.
    """
    pieces = pieces_of(transformer.transformer_blocks, streamed_blocks)
    streamed = StreamedBlocks(pieces, device, source, buffers)
    move_the_rest(transformer, pieces, device, streamed)
    return streamed


def move_the_rest(
    model: torch.nn.Module, pieces: Sequence[Piece], device: torch.device, streamed: StreamedBlocks
) -> None:
    """Moves all to the device but the pieces' matrices, and has `streamed` told of each pass."""
    streamed_matrices = {id(layer.weight) for piece in pieces for layer in piece.layers}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in streamed_matrices:
            tensor.data = tensor.data.to(device)
    model.register_forward_pre_hook(
        lambda _, __, kwargs: streamed.begin_pass(skipped_blocks=kwargs.get("skip_layers") or ()), with_kwargs=True
    )


class PinnedPieces:
    """The matrices of each piece in the host's memory; pinned where the device is a GPU.

    Args:
        pieces: whose matrices are left pointing at it.
        device: that they will be copied to.
        paths: the files, for blocks that were left in them (`streamed_blocks` of `load_transformer`): the matrices are
            read from there, one at a time, in the layers' dtype. Without any, the layers' matrices are copied, and
            freed piece by piece, so that no more than one piece is there twice.

    Raises:
        UserError: the driver does not pin so much host memory.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device, paths: Sequence[Path] = ()):
        self.sizes = [layout(piece.weights)[-1] for piece in pieces]
        self.host_bytes = pinned_bytes(self.sizes)
        self._buffers: list[torch.Tensor] = []
        with TensorFiles(paths) as files:
            for piece, buffer in zip(pieces, pinned_buffers(self.sizes, device), strict=True):
                values = [files.tensor(name) for name in piece.names] if paths else piece.weights
                for layer, view, value in zip(piece.layers, views(buffer, piece.weights), values, strict=True):
                    view.copy_(value)
                    layer.weight.data = view
                self._buffers.append(buffer)

    def fill(self, index: int, destination: torch.Tensor) -> None:
        """Queues the copy of piece `index` into `destination`, uint8 of its size, on the current stream."""
        destination.copy_(self._buffers[index], non_blocking=True)

    def prefetch(self, index: int) -> None:
        """Changes nothing: every piece is here."""


@dataclass(eq=False)
class _Slot:
    """A buffer on the device.

    Attributes:
        buffer: uint8, as large as the largest piece.
        index: of the piece in it, if any.
        weights: that piece's matrices, which lie in it.
        arrival: of the latest copy into it.
        seen: by piece, the views of its matrices in the buffer: to make them takes longer than to start a copy.
    """

    buffer: torch.Tensor
    index: int | None = None
    weights: list[torch.Tensor] = field(default_factory=list)
    arrival: Copy = field(default_factory=Copy)
    seen: dict[int, list[torch.Tensor]] = field(default_factory=dict)


class StreamedBlocks:
    """Linear layers whose matrices are on the device only while they multiply, and until the buffer is needed again.

    Forward and backward give the results of resident layers, bit for bit, in any order: a layer requests its matrix
    whenever it multiplies, in backward too, and autograd saves none. The requests of a pass are remembered, and
    prefetched in the next pass of its kind. The backward of the first pass with a gradient is not prefetched, and waits
    for its copies.

    Args:
        pieces: in 16 or 32 bits, or in bitsandbytes' 4, whose scales (a few percent) stay on the device.
        device: where they compute.
        source: of the matrices; None for `PinnedPieces`.
        buffers: on the device, 2 or more: while a piece computes in one, those that come next are copied into the
            others.

    Attributes:
        device_bytes: of the buffers.
        host_bytes: of the host memory that the source has pinned.
        copies: how many pieces have been copied to the device so far.
    """

    def __init__(
        self, pieces: Sequence[Piece], device: torch.device, source: PieceSource | None = None, buffers: int = 2
    ):
        self._source: PieceSource = source or PinnedPieces(pieces, device)
        self._like = [piece.weights for piece in pieces]
        self._device = device
        self._copy_stream = CopyStream(device)
        largest = max(self._source.sizes)
        count = min(buffers, len(pieces))
        self._slots: list[_Slot] = []  # the one used longest ago first

        def make_slots() -> None:
            # In the copy stream's pool: a copy that is under way when all this is dropped cannot hit others' memory.
            self._slots += [_Slot(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(count)]

        self._copy_stream.start(make_slots)
        self._current: _Slot | None = None
        # By whether there is a gradient, and by the blocks left out: the pieces that the last such pass requested.
        self._all = list(range(len(pieces)))
        self._remembered: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
        self._expected: list[int] = []
        self._asked: list[int] = []
        self._is_as_expected = True
        self._captured_by: WeakSet[CapturedCall] = WeakSet()  # it holds what holds this
        self._is_captured_elsewhere = False
        self._may_be_replayed = False
        self.device_bytes = count * largest
        self.host_bytes = self._source.host_bytes
        self.copies = 0
        for index, piece in enumerate(pieces):
            for position, layer in enumerate(piece.layers):
                packed: Any = layer
                quant_state: Any = getattr(layer.weight, "quant_state", None)
                if quant_state is not None:
                    quant_state.to(device)
                # Nothing here holds the layer, which would hold itself.
                ask = partial(self._weight, index, position)
                if quant_state is None:
                    packed.forward = self._forward_of(index, position, layer.bias)
                else:
                    packed.forward = partial(_forward_packed, ask, layer.bias, quant_state, packed.compute_dtype)

    def _forward_of(
        self, index: int, position: int, bias: torch.Tensor | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """How the layer at `position` of piece `index` multiplies; not of one in 4 bits."""
        return partial(_forward, partial(self._weight, index, position), bias)

    def begin_pass(self, prefetch: bool = True, skipped_blocks: Sequence[int] = ()) -> None:
        """To be called before each pass.

        Args:
            prefetch: whether pieces are prefetched: for the transformer. Without it no copy is under way at the end.
            skipped_blocks: that this pass leaves out, as skip-layer guidance does in every second one.
        """
        is_captured = _is_capturing(self._device)
        if is_captured or self._may_be_replayed:
            # A graph copies all that it needs, whatever the buffers hold when it is replayed. Nothing outside of it can
            # wait for its copies, and each replay leaves other pieces in the buffers than are noted here.
            for slot in self._slots:
                slot.index = None
        self._note_graphs(is_captured)
        self._current = None
        self._asked, self._expected = [], []
        self._is_as_expected = True
        if prefetch:
            kind = torch.is_grad_enabled(), tuple(skipped_blocks)
            self._expected = self._remembered.get(kind, self._all)
            self._remembered[kind] = self._asked  # backward's requests follow

    def forget(self) -> None:
        """Has every piece copied anew: to be called once the matrices that they are copied from have changed.

        They may change only while no copy is under way.
        """
        self._current = None
        for slot in self._slots:
            slot.index = None

    def _note_graphs(self, is_captured: bool) -> None:
        """Notes who captures this pass, and whether a graph of this or of an earlier pass may be replayed."""
        call = call_in_capture()
        if is_captured and call:
            self._captured_by.add(call)
        self._is_captured_elsewhere |= is_captured and call is None
        self._may_be_replayed = self._is_captured_elsewhere or any(not call.gave_up for call in self._captured_by)

    def _weight(self, index: int, position: int) -> torch.Tensor:
        """A matrix on the device, for what is queued now."""
        if self._current is None or self._current.index != index:
            self._current = self._stream(index)
        return self._current.weights[position]

    def _stream(self, index: int) -> _Slot:
        """The slot of piece `index`, valid for what is queued from now on; prefetches the next pieces."""
        coming = self._upcoming(index)
        wanted = [index, *coming[: len(self._slots) - 1]]
        slot = self._bring(index, wanted)
        self._slots.remove(slot)
        self._slots.append(slot)
        self._copy_stream.wait(slot.arrival)
        for piece in wanted[1:]:
            self._bring(piece, wanted)
        for piece in coming[len(self._slots) - 1 :]:
            if self._held(piece) is None:
                self._source.prefetch(piece)
        return slot

    def _upcoming(self, index: int) -> list[int]:
        """The pieces after this one: as many as there are slots, or as are known."""
        at = len(self._asked)
        self._asked.append(index)
        self._is_as_expected &= at < len(self._expected) and self._expected[at] == index
        if not self._is_as_expected:
            return []
        coming = self._expected[at + 1 : at + 1 + len(self._slots)]
        # A graph ends with no copy under way; nor may one be under way into a buffer when a graph is replayed.
        if not self._may_be_replayed:
            coming += itertools.islice(itertools.cycle(self._expected), len(self._slots) - len(coming))
        return coming

    def _held(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.index == index), None)

    def _bring(self, index: int, wanted: Sequence[int]) -> _Slot:
        """The slot that holds piece `index`, or will: of those with no wanted piece, the one used longest ago.

        All that multiplies with the piece in that slot has been queued: a layer uses its matrix as soon as it has it.
        """
        held = self._held(index)
        if held:
            return held
        slot = next(slot for slot in self._slots if slot.index not in wanted)
        slot.index = None  # should the copy fail
        destination = slot.buffer[: self._source.sizes[index]]
        slot.arrival = self._copy_stream.start(lambda: self._source.fill(index, destination))
        if index not in slot.seen:
            slot.seen[index] = views(slot.buffer, self._like[index])
        slot.index, slot.weights = index, slot.seen[index]
        self.copies += 1
        return slot


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _forward(ask: Callable[[], torch.Tensor], bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if not (x.requires_grad and torch.is_grad_enabled()):  # nothing is saved
        return torch.nn.functional.linear(x, ask(), bias)
    weight = ask()
    place, start = weight.untyped_storage().data_ptr(), weight.storage_offset()

    def pack(saved: torch.Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != place:
            return saved  # autocast's copy of a matrix of another dtype
        return saved.shape, saved.stride(), saved.storage_offset() - start  # transposed, in most cases

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        shape, stride, offset = packed
        weight = ask()
        return weight.as_strided(shape, stride, weight.storage_offset() + offset)

    # A checkpoint's hooks see nothing that these have packed, neither in forward nor when it is recomputed.
    with saved_tensors_hooks(pack, unpack):
        return torch.nn.functional.linear(x, weight, bias)


class _MultiplyPacked(torch.autograd.Function):
    """`bitsandbytes.matmul_4bit`, which itself keeps the matrix for backward where no hook sees it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ask: Callable[[], torch.Tensor], bias: torch.Tensor | None, state: Any
    ) -> torch.Tensor:
        import bitsandbytes  # its import takes seconds, and only this needs it

        ctx.ask, ctx.state = ask, state
        return bitsandbytes.matmul_4bit(x, ask(), bias=bias, quant_state=state)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        from bitsandbytes.functional import dequantize_4bit

        (gradient,) = gradients
        unpacked = dequantize_4bit(ctx.ask().view(-1, 1), ctx.state).to(gradient.dtype)
        return torch.matmul(gradient, unpacked), None, None, None


def _forward_packed(
    ask: Callable[[], torch.Tensor], bias: torch.Tensor | None, state: Any, dtype: torch.dtype, x: torch.Tensor
) -> torch.Tensor:
    bias = None if bias is None else bias.to(dtype)
    return _MultiplyPacked.apply(x.to(dtype), ask, bias, state).to(x.dtype)
