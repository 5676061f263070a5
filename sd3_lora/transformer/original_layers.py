"""Where the linear layers of diffusers' transformer lie in the original SD3 (MMDiT), whose names other programs use.

The original joins what diffusers splits: q, k and v are rows of one layer, in this order. In three layers it has the
halves of the rows, shift and scale, in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_ATTENTION = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
}
_IN_BLOCKS = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_OUTSIDE = {
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class OriginalPlace:
    """Which rows of which original layer are a layer of diffusers'.

    Attributes:
        layer: the original's name, such as joint_blocks.0.x_block.attn.qkv.
        part: which of its parts, from 0.
        parts: how many parts of equal height it has: three of q, k, v, else one.
        is_swapped: whether the halves of the rows are in the other order.
    """

    layer: str
    part: int = 0
    parts: int = 1
    is_swapped: bool = False

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """This layer's rows of a tensor of the original, in diffusers' order; `(parts * out, …)` to `(out, …)`."""
        return self.reordered(tensor.chunk(self.parts)[self.part])

    def reordered(self, tensor: torch.Tensor) -> torch.Tensor:
        """This layer's rows in the other program's order, `(out, …)`."""
        return torch.cat(tensor.chunk(2)[::-1]) if self.is_swapped else tensor


WHOLE = OriginalPlace("")  # all rows, as they are


def original_places(names: Iterable[str]) -> dict[str, OriginalPlace]:
    """The places of a transformer's layers, by diffusers' names; layers without one are left out.

    Args:
        names: of all modules of the transformer, since the last block's modulation differs.
    """
    matches = {name: _BLOCK.fullmatch(name) for name in names}
    last = max((int(match[1]) for match in matches.values() if match), default=-1)
    places = {}
    for name, match in matches.items():
        if match is None:
            if name in _OUTSIDE:
                places[name] = OriginalPlace(_OUTSIDE[name], is_swapped=name == "norm_out.linear")
            continue
        block, layer = f"joint_blocks.{match[1]}.", match[2]
        if layer in _IN_BLOCKS:
            # The last block's text stream has a shift and a scale alone.
            is_swapped = layer == "norm1_context.linear" and int(match[1]) == last
            places[name] = OriginalPlace(block + _IN_BLOCKS[layer], is_swapped=is_swapped)
        for pattern, joined in _ATTENTION.items():
            for part, letter in enumerate("qkv"):
                if layer == pattern.format(letter):
                    places[name] = OriginalPlace(block + joined, part, 3)
    return places
