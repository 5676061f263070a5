"""Random draws: the same whatever the number of processes; and the order of the pictures."""

from __future__ import annotations

from collections import Counter

from sd3_lora.training.checkpoints import pack, unpack
from sd3_lora.training.draws import DataOrder, GlobalDraws

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 1), (2, 3), (4, 2)])
def test_ranks_slice_what_one_process_draws(world_size: int, batch_size: int) -> None:
    whole = GlobalDraws(7, world_size * batch_size)
    ranks = [GlobalDraws(7, batch_size, rank, world_size) for rank in range(world_size)]
    for _ in range(3):
        assert torch.equal(torch.cat([rank.uniform() for rank in ranks]), whole.uniform())
        assert torch.equal(torch.cat([rank.normal((16, 2, 3)) for rank in ranks]), whole.normal((16, 2, 3)))
    assert {rank.global_batch_size for rank in ranks} == {whole.global_batch_size}
    pictures = list(range(whole.global_batch_size))
    assert [pictures[rank.mine] for rank in ranks] == [
        pictures[i * batch_size : (i + 1) * batch_size] for i in range(world_size)
    ]


def test_shapes_and_ranges() -> None:
    draws = GlobalDraws(0, 500)
    normal, uniform = draws.normal((4,)), draws.uniform()
    assert normal.shape == (500, 4)
    assert normal.dtype == uniform.dtype == torch.float32
    assert normal.mean().abs() < 0.1
    assert normal.std() == pytest.approx(1, abs=0.05)
    assert uniform.shape == (500,)
    assert 0 <= uniform.min() < 0.02
    assert 0.98 < uniform.max() < 1


def test_seeds_differ_and_repeat_and_zero_is_one() -> None:
    first = {seed: GlobalDraws(seed, 2).normal((3,)) for seed in (0, 1, 2)}
    for seed, numbers in first.items():
        assert torch.equal(GlobalDraws(seed, 2).normal((3,)), numbers)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert DataOrder(20, 0).take(20) == DataOrder(20, 0).take(20) != DataOrder(20, 1).take(20)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draws = GlobalDraws(3, 2)
    draws.normal((4,))
    draws.uniform()
    DataOrder(5, 3).take(20)
    assert torch.equal(torch.get_rng_state(), before)


@given(count=st.integers(1, 9), sizes=st.lists(st.integers(0, 12), max_size=12), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_pass_has_every_picture_once(count: int, sizes: list[int], seed: int) -> None:
    order = DataOrder(count, seed)
    taken: list[int] = []
    for size in sizes:
        part = order.take(size)
        assert len(part) == size
        taken += part
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    assert DataOrder(count, seed).take(len(taken)) == taken  # however it is cut


def test_five_pictures_in_windows_of_four_are_seen_alike() -> None:
    order = DataOrder(5, 0)
    windows = [order.take(4) for _ in range(10)]
    assert all(len(window) == 4 for window in windows)
    assert Counter(picture for window in windows for picture in window) == dict.fromkeys(range(5), 8)


def test_passes_are_shuffled_anew() -> None:
    order = DataOrder(8, 0)
    assert len({tuple(order.take(8)) for _ in range(6)}) == 6


def test_an_order_goes_on_from_its_state() -> None:
    order = DataOrder(5, 11)
    order.take(7)  # amid the second pass
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(order.state_dict(), tensors)
    expected = order.take(23)
    resumed = DataOrder(5, 99)
    resumed.load_state_dict(unpack(packed, tensors))
    assert resumed.take(23) == expected
