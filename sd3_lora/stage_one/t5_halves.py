"""T5's blocks in halves, attention and feed-forward. A streamed T5 has one half on the device at a time.

Only the hidden states pass from one half to the next, and the larger half has three quarters of a block's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.gpu.packed_tensors import layout, views

import torch


class _NoAttention(torch.nn.Module):
    """Takes the attention layer's place: returns the hidden states unchanged, no position bias, no scores."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None, None]:
        return hidden_states, None, None


@dataclass(frozen=True)
class Half:
    """Half a block with its weights on the host.

    Attributes:
        block: transformers' own.
        layer: the half, its weights on the meta device until `place`.
        layers: the half, and an identity in place of the other half. The block clamps fp16 after each of them; after
            the identity that is a second time, which changes nothing.
        buffer: uint8 on the host; it holds the weights at the offsets of `layout`.
    """

    block: Any
    layer: torch.nn.Module
    layers: torch.nn.ModuleList
    buffer: torch.Tensor

    def place(self, destination: torch.Tensor) -> None:
        """Copies the weights to the device into `destination`, over those of the half before."""
        destination = destination[: self.buffer.numel()]
        destination.copy_(self.buffer)
        self._set(views(destination, list(self.layer.parameters())))
        self.block.layer = self.layers

    def leave(self) -> None:
        """Moves the weights to the meta device again."""
        self._set([torch.empty_like(parameter, device="meta") for parameter in self.layer.parameters()])

    def _set(self, values: list[torch.Tensor]) -> None:
        for (name, _), value in zip(list(self.layer.named_parameters()), values, strict=True):
            module, _, leaf = name.rpartition(".")
            setattr(self.layer.get_submodule(module), leaf, torch.nn.Parameter(value, requires_grad=False))


def _halves(block: torch.nn.Module) -> list[torch.nn.Module]:
    """Attention and feed-forward: an encoder's blocks have no other layers."""
    return list(block.get_submodule("layer").children())


def set_dtypes(blocks: torch.nn.ModuleList, dtype: torch.dtype) -> None:
    """Casts as transformers does when it loads T5: `wo` stays float32 (`T5PreTrainedModel._keep_in_fp32_modules`)."""
    for name, parameter in blocks.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.float32 if name.endswith("wo.weight") else dtype)


def half_bytes(blocks: torch.nn.ModuleList) -> int:
    """Bytes of the largest half's weights."""
    return max(layout(list(layer.parameters()))[-1] for block in blocks for layer in _halves(block))


def read_halves(weights: TensorFiles, blocks: torch.nn.ModuleList) -> Iterator[Half]:
    """Reads the halves into two buffers in turn: one is overwritten when the next but one is read.

    Args:
        weights: T5's files.
        blocks: of transformers' encoder, on the meta device, already in their dtypes.
    """
    size = half_bytes(blocks)
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
    for index, block in enumerate(blocks):
        for half, layer in enumerate(_halves(block)):
            parameters = list(layer.parameters())
            buffer = buffers[half][: layout(parameters)[-1]]
            for (name, _), view in zip(layer.named_parameters(), views(buffer, parameters), strict=True):
                view.copy_(weights.tensor(f"encoder.block.{index}.layer.{half}.{name}"))
            alone = [layer, torch.nn.Identity()] if half == 0 else [_NoAttention(), layer]
            yield Half(block, layer, torch.nn.ModuleList(alone), buffer)
