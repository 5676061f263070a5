"""Trained matrices that stay on the host: in backward each is updated on the device as soon as it has its gradient,
and goes back changed.

Numbers are those of resident layers, bit for bit: the products are those that autograd computes for a linear layer.
Biases, norms and all that is not a block's matrix stay on the device, with hooks of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sd3_lora.gpu.copy_stream import Copy, CopyStream
from sd3_lora.transformer.streaming import Piece, PinnedPieces, StreamedBlocks, move_the_rest, pieces_of

import torch
from diffusers import SD3Transformer2DModel
from torch.autograd import Variable

Update = Callable[[str, torch.Tensor, torch.Tensor], None]


class TrainedPieces(PinnedPieces):
    """Pinned pieces whose matrices are also copied back, on a stream of their own.

    Args:
        pieces: as of `PinnedPieces`.
        device: likewise.
        paths: likewise.

    Raises:
        UserError: the driver does not pin so much host memory.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device, paths: Sequence[Path] = ()):
        super().__init__(pieces, device, paths)
        self._departures = CopyStream(device)
        self._hosts = [piece.weights for piece in pieces]
        # The latest copy of a piece, and the latest one out of a buffer on the device, while they may be under way.
        self._of_piece: dict[int, Copy] = {}
        self._of_buffer: dict[int, Copy] = {}

    def fill(self, index: int, destination: torch.Tensor) -> None:
        """Queues the copy of piece `index` into `destination`, once what is copied back has left both."""
        for copy in (self._of_piece.get(index), self._of_buffer.get(destination.data_ptr())):
            if copy is not None:
                self._departures.wait(copy)
        super().fill(index, destination)

    def leave(self, index: int, position: int, weight: torch.Tensor) -> None:
        """Queues the copy of a matrix back to the host.

        Args:
            index: of its piece.
            position: in the piece.
            weight: in the buffer on the device.
        """
        host = self._hosts[index][position]
        copy = self._departures.start(lambda: host.copy_(weight, non_blocking=True))
        self._of_piece[index] = self._of_buffer[weight.untyped_storage().data_ptr()] = copy

    def join(self) -> None:
        """Has everything that is queued on the device from now on wait for all copies back."""
        if self._of_piece:
            self._departures.join()
        self.forget()

    def forget(self) -> None:
        """Forgets the copies back: they are done, or of a CUDA graph."""
        self._of_piece.clear()
        self._of_buffer.clear()


class TrainedBlocks(StreamedBlocks):
    """Streamed linear layers that are trained.

    Each must be used once in a pass, as in SD3. At the end of a backward pass nothing is under way on the device but
    what its current stream waits for: then the host's matrices may be read once that is synchronised.

    Args:
        pieces: of trained layers.
        device: that computes.
        source: of the matrices.
        buffers: as of `StreamedBlocks`.

    Attributes:
        names: of the streamed matrices, as `named_parameters` has them.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device, source: TrainedPieces, buffers: int = 2):
        self._trained, self._names = source, [piece.names for piece in pieces]
        self.names = frozenset(name for names in self._names for name in names)
        self._update: Update | None = None
        self._begin: Callable[[], None] = lambda: None
        self._end: Callable[[], None] = lambda: None
        self._will_join = False
        super().__init__(pieces, device, source, buffers)

    def train(self, update: Update, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Has matrices updated from now on.

        Args:
            update: called in backward with a matrix's name, itself on the device, and its gradient.
            begin: called before each pass with a gradient.
            end: called at the end of its backward.
        """
        self._update, self._begin, self._end = update, begin, end

    def begin_pass(self, prefetch: bool = True, skipped_blocks: Sequence[int] = ()) -> None:
        """As of `StreamedBlocks`."""
        is_captured = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._will_join and not is_captured:  # the last backward failed
            self._join()
            self.forget()
        self._will_join = False
        self._trained.forget()
        if torch.is_grad_enabled():
            self._begin()
        super().begin_pass(prefetch, skipped_blocks)

    def _forward_of(
        self, index: int, position: int, bias: torch.Tensor | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        ask, take = partial(self._weight, index, position), partial(self._take, index, position)
        return partial(_forward_trained, ask, take, bias)

    def _take(self, index: int, position: int, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Updates a matrix, and has it copied back."""
        if self._update is None:
            return
        if not self._will_join:
            self._will_join = True
            Variable._execution_engine.queue_callback(self._join)
        self._update(self._names[index][position], weight, gradient)
        self._trained.leave(index, position, weight)

    def _join(self) -> None:
        """Ends a backward pass, on the stream that called it."""
        self._trained.join()
        self._copy_stream.join()
        self._end()
        self._will_join = False


def stream_trained(
    transformer: SD3Transformer2DModel,
    device: torch.device,
    buffers: int = 2,
    streamed_blocks: Collection[int] | None = None,
    paths: Sequence[Path] = (),
) -> TrainedBlocks:
    """Moves all to the device but the trained matrices of the streamed blocks.

    Args:
        transformer: these matrices on the host, all trained.
        device: where it computes.
        buffers: on the device.
        streamed_blocks: their indices; None for all.
        paths: the files that they are read from, as of `PinnedPieces`.

    Raises:
        UserError: the driver does not pin so much host memory.
    """
    pieces = pieces_of(transformer.transformer_blocks, streamed_blocks, trained=True)
    streamed = TrainedBlocks(pieces, device, TrainedPieces(pieces, device, paths), buffers)
    move_the_rest(transformer, pieces, device, streamed)
    return streamed


def _forward_trained(
    ask: Callable[[], torch.Tensor],
    take: Callable[[torch.Tensor, torch.Tensor], None],
    bias: torch.Tensor | None,
    x: torch.Tensor,
) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        return torch.nn.functional.linear(x, ask().to(x.dtype), bias)
    result: torch.Tensor = _MultiplyTrained.apply(x, bias, ask, take)
    return result


def _is_flat(x: torch.Tensor) -> bool:
    """Whether torch multiplies all rows at once, and adds the bias in the same kernel."""
    return x.dim() == 2 or (x.dim() == 3 and x.is_contiguous())


class _MultiplyTrained(torch.autograd.Function):
    """A linear layer. Its matrix is not saved but asked for again, and given away with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        ask: Callable[[], torch.Tensor],
        take: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(x)  # which a checkpoint's hooks see, and recompute
        ctx.ask, ctx.take = ask, take
        weight = ask().to(x.dtype)
        if _is_flat(x):
            return torch.nn.functional.linear(x, weight, bias)
        # As torch multiplies with a matrix that needs a gradient; with another one it may multiply batch by batch.
        product = x.reshape(-1, x.shape[-1]).mm(weight.t()).view(*x.shape[:-1], len(weight))
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        held = ctx.ask()  # after what was saved: that may be recomputed only now, with other matrices
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x, of_bias = None, None
        if ctx.needs_input_grad[0]:
            of_x = rows.mm(held.to(x.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_bias = rows.sum(0) if _is_flat(x) else gradient.sum(tuple(range(gradient.dim() - 1)))
        of_weight = rows.t().mm(x.reshape(-1, x.shape[-1]))
        ctx.take(held, of_weight.to(held.dtype))
        return of_x, of_bias, None, None
