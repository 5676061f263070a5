"""Random draws and the pictures' order: made for the global batch from seeded generators, then sliced by rank.

So the number of processes changes nothing: two ranks with a batch of 1 see the numbers of one process with 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd3_lora.training.pool import Pool

import torch


class GlobalDraws:
    """One CPU generator: each draw is made for all ranks, and each rank keeps its part.

    Args:
        seed: of the generator.
        batch_size: of one rank.
        rank: of this process.
        world_size: how many processes.
    """

    def __init__(self, seed: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.generator = torch.Generator().manual_seed(seed)
        self.global_batch_size = batch_size * world_size
        self.rank_slice = slice(rank * batch_size, (rank + 1) * batch_size)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """This rank's `(B, *shape)` standard normal float32."""
        return torch.randn(self.global_batch_size, *shape, generator=self.generator)[self.rank_slice]

    def uniform(self) -> torch.Tensor:
        """This rank's `(B,)` uniform float32 in [0, 1)."""
        return torch.rand(self.global_batch_size, generator=self.generator)[self.rank_slice]


class DataOrder:
    """An endless order of the pictures of some pools.

    A pool's pictures come in passes: each picture `repeats` times in a pass, each pass in a new order, none cut short.
    Every batch takes as many pictures from each pool, one of each in turn, so that each rank's part has them alike.

    Args:
        pools: whose pictures are counted through, the first pool's first (`TrainingData.images`).
        seed: of the first pool's order; each further pool's is one more.
    """

    def __init__(self, pools: Sequence[Pool], seed: int):
        self._orders = []
        first_index = 0
        for number, pool in enumerate(pools):
            self._orders.append(_PoolOrder(pool, first_index, seed + number))
            first_index += len(pool.images)

    def take(self, count: int) -> list[int]:
        """The next `count` picture indices.

        Raises:
            ValueError: `count` cannot be divided by the number of pools.
        """
        share, rest = divmod(count, len(self._orders))
        if rest:
            raise ValueError(f"a batch of {count} pictures cannot take as many from each of {len(self._orders)} pools")
        taken = [order.take(share) for order in self._orders]
        return [index for one_of_each in zip(*taken, strict=True) for index in one_of_each]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, for a checkpoint: the first pool's state, as it was when there was only one pool."""
        first, *further = (order.state_dict() for order in self._orders)
        return {**first, "further_pools": further} if further else first

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken.

        Raises:
            ValueError: that was with another number of pools.
        """
        for order, saved in zip(self._orders, [state, *state.get("further_pools", [])], strict=True):
            order.load_state_dict(saved)


class _PoolOrder:
    """The endless order of one pool's pictures; `first_index` is the index of its first one."""

    def __init__(self, pool: Pool, first_index: int, seed: int):
        self._pool, self._first_index = pool, first_index
        self._generator = torch.Generator().manual_seed(seed)
        self._permutation = torch.empty(0, dtype=torch.long)
        self._position = 0

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if self._position == len(self._permutation):
                self._permutation = torch.randperm(self._pool.pass_length, generator=self._generator)
                self._position = 0
            places = self._permutation[self._position : self._position + count - len(taken)]
            self._position += len(places)
            taken += (self._first_index + places % len(self._pool.images)).tolist()
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self._generator.get_state(),
            "permutation": self._permutation,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._permutation = state["permutation"]
        self._position = state["position"]
