"""T-LoRA: the noisier the latents, the fewer of a LoRA's ranks count (Soboleva et al., arXiv 2507.05964).

Shapes: B batch, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel

_WIDTHS = 8  # a GPU multiplies ranks in eights, the last ones with zeros


class NoiseRanks:
    """Which ranks count in the forward that is under way, row by row; nothing of it is known to the host.

    Of a rank r those are the first `floor((r - least) (1 - sigma)) + least`: all without noise, and `least` in noise
    alone.

    Args:
        least: how many count in noise alone; a layer of a lower rank has all of them.
    """

    def __init__(self, least: int):
        self.least = least
        self._dropped: dict[int, torch.Tensor] = {}

    def follow(self, transformer: SD3Transformer2DModel, ranks: set[int]) -> None:
        """Has each forward of the transformer, from now on, decide for LoRAs of these ranks, by its timesteps."""

        def decide(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            timesteps = kwargs["timestep"] if "timestep" in kwargs else args[3]
            signal = 1 - timesteps.float()[:, None] / 1000  # (B, 1)
            for rank in ranks:
                least = min(self.least, rank)
                kept = ((rank - least) * signal).floor() + least
                positions = torch.arange(-(-rank // _WIDTHS) * _WIDTHS, device=signal.device)
                self._dropped[rank] = positions >= kept  # (B, rank)

        transformer.register_forward_pre_hook(decide, with_kwargs=True)

    def __call__(self, low: torch.Tensor, rank: int) -> torch.Tensor:
        """`(B, …, rank)`, with zeros for the ranks that do not count; perhaps padded to a multiple of 8."""
        dropped = self._dropped[rank][:, : low.shape[-1]]
        return low.masked_fill(dropped.view(len(dropped), *[1] * (low.dim() - 2), -1), 0)
