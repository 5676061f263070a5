"""Random draws and the pictures' order: made for the global batch from seeded generators, then sliced by rank.

So the number of processes changes nothing: two ranks with a batch of 1 see the numbers of one process with 2.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3_lora.training.pool import Pool, pass_length

import torch
from accelerate.utils import broadcast_object_list


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a batch that may be smaller than the others.

    Attributes:
        pictures: indices, as many on each rank; a place for which there is no picture repeats the batch's last one.
        weights: of each in the loss, so that a picture counts as much as in a full batch; None for a full batch.
        of_full: pictures of all ranks, as a part of a full batch's.
    """

    pictures: list[int]
    weights: torch.Tensor | None = None
    of_full: float = 1.0


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
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.rank_slice = self.rows(batch_size)

    def rows(self, count: int) -> slice:
        """Where this rank's rows lie in a draw for all ranks, each of which has a batch of `count`."""
        return slice(self._rank * count, (self._rank + 1) * count)

    def all_rows(self, count: int) -> slice:
        """Where the rows of all ranks lie in such a draw."""
        return slice(0, self._world_size * count)

    def share(self, pictures: Sequence[int], fills: bool = False) -> RankShare:
        """This rank's part of a batch's pictures, which may be fewer than the global batch size.

        Then each rank computes as few as it can, and the mean over ranks of their mean losses, weighted, is that of a
        full batch in which the missing pictures had no loss.

        Args:
            pictures: indices, of all ranks.
            fills: whether every batch must be full: what is missing repeats the last picture, and has no weight.
        """
        full = self.global_batch_size
        if len(pictures) == full:
            return RankShare(list(pictures[self.rank_slice]))
        count = self._batch_size if fills else math.ceil(len(pictures) / self._world_size)
        places = range(count * self._world_size)[self.rows(count)]
        weights = [count / self._batch_size if place < len(pictures) else 0.0 for place in places]
        taken = [pictures[min(place, len(pictures) - 1)] for place in places]
        return RankShare(taken, torch.tensor(weights), len(pictures) / full)

    def normal(self, shape: Sequence[int], count: int | None = None) -> torch.Tensor:
        """This rank's `(B, *shape)` standard normal float32; of a smaller batch of `count` its first rows' numbers."""
        rows = self.rank_slice if count is None else self.rows(count)
        return torch.randn(self.global_batch_size, *shape, generator=self.generator)[rows]

    def uniform(self, count: int | None = None) -> torch.Tensor:
        """This rank's `(B,)` uniform float32 in [0, 1), likewise."""
        rows = self.rank_slice if count is None else self.rows(count)
        return torch.rand(self.global_batch_size, generator=self.generator)[rows]


class DataOrder:
    """An endless order of the pictures of some pools.

    A pool's pictures come in passes: each picture `repeats` times in a pass, each pass in a new order, none cut short.
    Every batch takes as many pictures from each pool, one of each in turn, so that each rank's part has them alike.

    Pictures of several shapes come in batches of one shape, in a new order of batches in each pass. What is left of a
    shape at the end of a pass is a smaller batch. Further pools give pictures of that shape, in passes of their own.

    Args:
        pools: whose pictures are counted through, the first pool's first (`TrainingData.images`).
        seed: of the first pool's order; each further pool's is one more.
        shapes: of each picture, in that order; None where all have one.

    Raises:
        ValueError: a further pool lacks a shape that the first one has.
    """

    def __init__(self, pools: Sequence[Pool], seed: int, shapes: Sequence[Hashable] | None = None):
        # How often each picture was taken; None where no picture has several captions to be taken in turn.
        images = [image for pool in pools for image in pool.images]
        has_turns = any(image.other_prompts for image in images)
        self._turns = torch.zeros(len(images), dtype=torch.long) if has_turns else None
        self._shapes = shapes if shapes is not None and len(set(shapes)) > 1 else None
        first, *further = _indices(pools)
        self._first: _PoolOrder | _ShapeOrder
        self._further: list[_PoolOrder | _PartnerOrder]
        if self._shapes is None:
            self._first = _PoolOrder(first, seed)
            self._further = [_PoolOrder(places, seed + number) for number, places in enumerate(further, start=1)]
        else:
            self._first = _ShapeOrder(first, self._shapes, seed)
            self._further = [
                _PartnerOrder(places, self._shapes, {self._shapes[place] for place in first}, seed + number)
                for number, places in enumerate(further, start=1)
            ]

    def take(self, count: int) -> list[int]:
        """The next `count` picture indices; of pictures of several shapes the next batch's, which may be fewer.

        Raises:
            ValueError: `count` cannot be divided by the number of pools.
        """
        pools = 1 + len(self._further)
        share, rest = divmod(count, pools)
        if rest:
            raise ValueError(f"a batch of {count} pictures cannot take as many from each of {pools} pools")
        mine = self._first.take(share)
        shape = None if self._shapes is None else self._shapes[mine[0]]
        others = [
            order.take(len(mine)) if isinstance(order, _PoolOrder) else order.take(len(mine), shape)
            for order in self._further
        ]
        return [index for one_of_each in zip(mine, *others, strict=True) for index in one_of_each]

    def turns(self, indices: Sequence[int]) -> list[int]:
        """How often each of these pictures was taken before: which of its captions comes. Counts them as taken.

        All are 0 where no picture has several captions.
        """
        turns = []
        for index in indices:
            turns.append(0 if self._turns is None else int(self._turns[index]))
            if self._turns is not None:
                self._turns[index] += 1
        return turns

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, for a checkpoint: the first pool's state, as it was when there was only one pool."""
        first, *further = (order.state_dict() for order in (self._first, *self._further))
        state = {**first, "further_pools": further} if further else first
        return state if self._turns is None else {**state, "turns": self._turns.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken.

        Raises:
            ValueError: that was with another number of pools.
        """
        orders = [self._first, *self._further]
        for order, saved in zip(orders, [state, *state.get("further_pools", [])], strict=True):
            order.load_state_dict(saved)
        if self._turns is not None:
            self._turns = state["turns"].clone()


def _indices(pools: Sequence[Pool]) -> list[list[int]]:
    """The pictures of a pass of each pool, counted through."""
    starts = itertools.accumulate((len(pool.images) for pool in pools), initial=0)
    return [[start + number for number in pool.places] for start, pool in zip(starts, pools, strict=False)]


class _PoolOrder:
    """The endless order of some pictures, passes of the same places."""

    def __init__(self, places: Sequence[int], seed: int):
        self._places = places
        self._generator = torch.Generator().manual_seed(seed)
        self._permutation = torch.empty(0, dtype=torch.long)
        self._position = 0

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if self._position == len(self._permutation):
                self._permutation = torch.randperm(len(self._places), generator=self._generator)
                self._position = 0
            numbers = self._permutation[self._position : self._position + count - len(taken)]
            self._position += len(numbers)
            taken += [self._places[number] for number in numbers.tolist()]
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


class _ShapeOrder:
    """The endless order of one pool's pictures in batches of one shape."""

    def __init__(self, places: Sequence[int], shapes: Sequence[Hashable], seed: int):
        self._places, self._shapes = places, shapes
        self._generator = torch.Generator().manual_seed(seed)
        self._permutation = torch.empty(0, dtype=torch.long)  # of a pass, batch after batch
        self._sizes = torch.empty(0, dtype=torch.long)  # of these batches
        self._position = 0  # the next batch

    def take(self, count: int) -> list[int]:
        if self._position == len(self._sizes):
            self._shuffle(count)
        start, size = int(self._sizes[: self._position].sum()), int(self._sizes[self._position])
        self._position += 1
        return [self._places[place] for place in self._permutation[start : start + size].tolist()]

    def _shuffle(self, count: int) -> None:
        of_shape: dict[Hashable, list[int]] = {}
        for place in torch.randperm(len(self._places), generator=self._generator).tolist():
            of_shape.setdefault(self._shapes[self._places[place]], []).append(place)
        batches = [places[i : i + count] for places in of_shape.values() for i in range(0, len(places), count)]
        batches = [batches[i] for i in torch.randperm(len(batches), generator=self._generator).tolist()]
        self._permutation = torch.tensor([place for batch in batches for place in batch])
        self._sizes, self._position = torch.tensor([len(batch) for batch in batches]), 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self._generator.get_state(),
            "permutation": self._permutation,
            "batch_sizes": self._sizes,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._permutation, self._sizes = state["permutation"], state["batch_sizes"]
        self._position = state["position"]


class _PartnerOrder:
    """The endless orders of a further pool's pictures, one of each shape that the first pool has."""

    def __init__(self, places: Sequence[int], shapes: Sequence[Hashable], wanted: Collection[Hashable], seed: int):
        of_shape: dict[Hashable, list[int]] = {}
        for place in places:
            of_shape.setdefault(shapes[place], []).append(place)
        lacking = [shape for shape in wanted if shape not in of_shape]
        if lacking:
            raise ValueError(f"a further pool has no picture of shape {lacking[0]}")
        self._orders = {shape: _PoolOrder(mine, seed) for shape, mine in of_shape.items()}

    def take(self, count: int, shape: Hashable) -> list[int]:
        return self._orders[shape].take(count)

    def state_dict(self) -> dict[str, Any]:
        return {"shapes": [order.state_dict() for order in self._orders.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for order, saved in zip(self._orders.values(), state["shapes"], strict=True):
            order.load_state_dict(saved)


def places_of_pass(pools: Sequence[Pool], shapes: Sequence[Hashable], global_batch_size: int) -> int:
    """`pass_length`, with the places that stay empty where a shape's last batch is smaller than the others.

    Args:
        pools: the pictures.
        shapes: of each picture, as for `DataOrder`.
        global_batch_size: pictures of the first pool in a full batch of all ranks.
    """
    if len(set(shapes)) == 1:
        return pass_length(pools)
    first, *further = (Counter(shapes[place] for place in places) for places in _indices(pools))
    rounds = [math.ceil(count / first[shape]) for counts in further for shape, count in counts.items() if first[shape]]
    places = global_batch_size * sum(math.ceil(count / global_batch_size) for count in first.values())
    return places * max([1, *rounds])


def choose_seed(asked: int | None, earlier: Mapping[str, Any]) -> int:
    """The seed of the flag (0 is one too), of the checkpoint, or drawn; the same on every rank."""
    drawn: list[Any] = [asked]
    if asked is None:
        drawn = [earlier.get("--seed", random.randrange(2**31))]
        broadcast_object_list(drawn)
    return int(drawn[0])
