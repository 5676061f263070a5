"""Recompute: some blocks keep only their inputs for backward, which recomputes their activations (Chen et al., arXiv
1604.06174). Those inputs may be offloaded to the host meanwhile.

Shapes: B batch, S text tokens, L image tokens, C channels of the transformer.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sd3_lora.gpu.copy_stream import Copy, CopyStream

import torch
from diffusers import SD3Transformer2DModel
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recompute_blocks(transformer: SD3Transformer2DModel, indices: Sequence[int], offload_inputs: bool = False) -> None:
    """Keeps only the inputs of some blocks for backward, which recomputes their activations.

    Losses and gradients stay the same, bit for bit: dropout draws the same mask again.

    Best are the first k of n blocks, because backward begins with the last. With activations A and an input I a block,
    the end of forward holds (n - k) A + k I whichever they are. If they are the first, that is the peak, as the kept
    activations are gone when the first A is recomputed. If they were the last, such an A would come on top.

    k = n - 1 has the peak of k = n, A + (n - 1) I, with one block less to recompute: backward needs the last block's
    activations at once.

    Args:
        transformer: the model; its blocks may be streamed.
        indices: of the blocks to recompute; none keeps all activations.
        offload_inputs: whether the inputs too leave the device until backward, through pinned memory; the last
            recomputed block's input stays, as it would be needed first.
    """
    if not indices:
        transformer.disable_gradient_checkpointing()
        return
    chosen = {transformer.transformer_blocks[index]: place for place, index in enumerate(sorted(indices))}
    offload = _InputOffload(len(chosen) - 1) if offload_inputs else None
    # The generators' states are needed only where dropout draws, and cannot be read while a CUDA graph is captured.
    draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in transformer.modules())

    def run(block: torch.nn.Module, *inputs: Any) -> Any:
        place = chosen.get(block)
        if place is None:
            return block(*inputs)
        if offload is None:
            return recomputed(block, inputs, draws)
        # These hooks see no saved tensors of the block itself: checkpoint's are nested in them, and the inner ones win.
        with offload.hooks(place):
            return recomputed(block, inputs, draws)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=run)


def recomputed(block: Callable[..., Any], inputs: tuple[Any, ...], draws: bool) -> Any:
    """What a block computes, of which backward computes the activations again.

    Args:
        block: to call.
        inputs: of it, which are kept.
        draws: whether dropout draws in it: then the generators' states are kept too.
    """
    try:
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)
    except BaseException as error:
        # torch 2.11 leaves its hooks in force for as long as the frames of the error live, and whoever handles it may
        # compute something else meanwhile: a step that could not be captured runs kernel by kernel.
        traceback.clear_frames(error.__traceback__)
        raise


class _InputOffload:
    """Moves the inputs of recomputed blocks to the host in forward, and back in backward.

    Args:
        last: the place of the last recomputed block, whose inputs stay on the device.
    """

    def __init__(self, last: int):
        self._last = last
        self._copies: CopyStream | None = None
        self._leaving: list[tuple[Copy, torch.Tensor]] = []
        # Pinning takes longer than the copy, and cannot be done while a graph is captured. All copies are on one
        # stream, so what is overwritten has been read.
        self._spare: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._before: Callable[[], _BlockInputs | None] = lambda: None

    def hooks(self, place: int) -> saved_tensors_hooks:
        """The hooks under which the recomputed block of this place among them runs."""
        if place == 0:  # there are some only if the last pass failed, perhaps in a capture: no copy to wait for
            self._leaving.clear()
        self._let_go()
        inputs = _BlockInputs(self, self._before, place == self._last)
        # Weak, here and from block to block: the graph alone holds them, so they go when it goes.
        self._before = weakref.ref(inputs)
        return saved_tensors_hooks(inputs.pack, inputs.unpack)

    def copies(self, device: torch.device) -> CopyStream:
        """The stream, made when the device is known."""
        if self._copies is None:
            self._copies = CopyStream(device)
        return self._copies

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Starts to copy `tensor` to the host; returns the copy."""
        spare = self._spare.setdefault((tensor.shape, tensor.dtype), [])
        host = spare.pop() if spare else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy = self.copies(tensor.device).start(lambda: host.copy_(tensor, non_blocking=True))
        self._leaving.append((copy, tensor.detach()))
        return host

    def give_back(self, hosts: list[torch.Tensor]) -> None:
        """Takes back what `send` returned, when backward no longer needs it."""
        for host in hosts:
            self._spare[host.shape, host.dtype].append(host)

    def _let_go(self) -> None:
        # The copies have had a whole block's computation to finish. Waiting for them on the device and then freeing
        # the source is deterministic; record_stream would free it only once the host sees that the copy is done,
        # and the host runs ahead.
        for copy, tensor in self._leaving:
            self.copies(tensor.device).wait(copy)
        self._leaving.clear()


class _BlockInputs:
    """The inputs of one recomputed block in one forward.

    Args:
        offload: that copies.
        before: returns the inputs of the block that ran before, which backward needs next.
        stay: whether these inputs stay on the device.
    """

    def __init__(self, offload: _InputOffload, before: Callable[[], _BlockInputs | None], stay: bool):
        self._offload = offload
        self._before = before
        self._stay = stay
        self._device = torch.device("cpu")
        self._hosts: list[torch.Tensor] = []
        weakref.finalize(self, offload.give_back, self._hosts).atexit = False
        self._asked_for: set[int] = set()
        self._fetched: dict[int, torch.Tensor] = {}
        self._copy = Copy()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | int:
        """An index into the host's copies, or the tensor itself."""
        # hidden_states (B, L, C) and encoder_hidden_states (B, S, C) belong to the block; temb (B, C) is shared by all.
        if tensor.dim() < 3 or self._stay:
            return tensor.detach()
        self._device = tensor.device
        self._hosts.append(self._offload.send(tensor))
        return len(self._hosts) - 1

    def unpack(self, packed: torch.Tensor | int) -> torch.Tensor:
        """The tensor on the device; prefetches the inputs of the block before."""
        tensor = self._take(packed) if isinstance(packed, int) else packed
        before = self._before()
        if before is not None:
            before.fetch()
        return tensor

    def _take(self, index: int) -> torch.Tensor:
        if index not in self._asked_for:
            self.fetch()
        self._offload.copies(self._device).wait(self._copy)
        self._asked_for.remove(index)
        return self._fetched.pop(index)

    def fetch(self) -> None:
        """Starts to copy back what is not on its way yet."""
        missing = [index for index in range(len(self._hosts)) if index not in self._asked_for]
        if missing:
            self._asked_for.update(missing)
            self._copy = self._offload.copies(self._device).start(lambda: self._bring(missing))

    def _bring(self, missing: list[int]) -> None:
        for index in missing:
            host = self._hosts[index]
            self._fetched[index] = torch.empty(host.shape, dtype=host.dtype, device=self._device)
            self._fetched[index].copy_(host, non_blocking=True)
