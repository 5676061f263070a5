"""Random draws: made for the global batch from one seeded generator, then sliced by rank.

So the number of processes changes nothing: two ranks with a batch of 1 see the numbers of one process with 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class GlobalDraws:
    """One CPU generator whose every draw is made for all ranks, of which each keeps its part.

    Args:
        seed: of the generator.
        batch_size: of one rank.
        rank: of this process.
        world_size: how many processes.
    """

    def __init__(self, seed: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.generator = torch.Generator().manual_seed(seed)
        self.global_batch_size = batch_size * world_size
        self.mine = slice(rank * batch_size, (rank + 1) * batch_size)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """This rank's `(B, *shape)` standard normal float32."""
        return torch.randn(self.global_batch_size, *shape, generator=self.generator)[self.mine]

    def uniform(self) -> torch.Tensor:
        """This rank's `(B,)` uniform float32 in [0, 1)."""
        return torch.rand(self.global_batch_size, generator=self.generator)[self.mine]


class DataOrder:
    """An endless order of the pictures: each once in every pass, each pass shuffled anew, no pass cut short.

    Args:
        count: how many pictures.
        seed: of the shuffles.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self._generator = torch.Generator().manual_seed(seed)
        self._permutation = torch.empty(0, dtype=torch.long)
        self._position = 0

    def take(self, count: int) -> list[int]:
        """The next `count` picture indices."""
        taken: list[int] = []
        while len(taken) < count:
            if self._position == len(self._permutation):
                self._permutation = torch.randperm(self.count, generator=self._generator)
                self._position = 0
            wanted = self._permutation[self._position : self._position + count - len(taken)]
            self._position += len(wanted)
            taken += wanted.tolist()
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, for a checkpoint."""
        return {
            "generator": self._generator.get_state(),
            "permutation": self._permutation,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        self._generator.set_state(state["generator"])
        self._permutation = state["permutation"]
        self._position = state["position"]
