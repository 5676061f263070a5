"""Random draws: the same whatever the number of processes; and the order of the pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sd3_lora.common.records import InstanceImage, TrainingBatch
from sd3_lora.training.checkpoints import pack, read_state, unpack
from sd3_lora.training.draws import DataOrder, GlobalDraws, places_of_pass
from sd3_lora.training.flow import load_noise_table
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.micro_batches import InputSampler
from sd3_lora.training.pool import Pool, pass_length

import pytest
import torch
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st


def pool(count: int, repeats: int = 1) -> Pool:
    return Pool([InstanceImage(f"{number:04d}", Path("a.png"), "a") for number in range(count)], repeats=repeats)


def order_of(count: int, seed: int) -> DataOrder:
    """Of one pool, each picture once in a pass."""
    return DataOrder([pool(count)], seed)


@pytest.mark.parametrize("count", [2, 1], ids=["full", "the end of a pass"])
def test_every_rank_notes_the_noise_levels_of_all(count: int) -> None:
    table = load_noise_table({"shift": 3.0}, None)

    def drawn(rank: int, world_size: int, batch_size: int, count: int) -> tuple[list[float], list[float]]:
        """What is noted, and what the rank computes with."""
        draws = GlobalDraws(7, batch_size, rank, world_size)
        config = {"shift_factor": 0.0, "scaling_factor": 1.0}
        sampler = InputSampler(draws, config, table, FlowConfig(), torch.float32, torch.device("cpu"))
        rows = torch.zeros(count, 16, 2, 2)
        ids = tuple(map(str, range(count)))
        inputs = sampler.sample(TrainingBatch(ids, rows, rows, rows[..., 0], rows[:, 0, 0], torch.ones(count)))
        return sampler.sigmas, inputs.sigmas.flatten().tolist()

    noted, mine = zip(*(drawn(rank, 2, 2, count) for rank in range(2)), strict=True)
    assert noted[0] == noted[1] == mine[0] + mine[1] == drawn(0, 1, 4, 2 * count)[1]


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 1), (2, 3), (4, 2)])
def test_ranks_slice_what_one_process_draws(world_size: int, batch_size: int) -> None:
    whole = GlobalDraws(7, world_size * batch_size)
    ranks = [GlobalDraws(7, batch_size, rank, world_size) for rank in range(world_size)]
    for _ in range(3):
        assert torch.equal(torch.cat([rank.uniform() for rank in ranks]), whole.uniform())
        assert torch.equal(torch.cat([rank.normal((16, 2, 3)) for rank in ranks]), whole.normal((16, 2, 3)))
    assert {rank.global_batch_size for rank in ranks} == {whole.global_batch_size}
    pictures = list(range(whole.global_batch_size))
    assert [pictures[rank.rank_slice] for rank in ranks] == [
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
    assert order_of(20, 0).take(20) == order_of(20, 0).take(20) != order_of(20, 1).take(20)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draws = GlobalDraws(3, 2)
    draws.normal((4,))
    draws.uniform()
    order_of(5, 3).take(20)
    assert torch.equal(torch.get_rng_state(), before)


@given(count=st.integers(1, 9), sizes=st.lists(st.integers(0, 12), max_size=12), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_pass_has_every_picture_once(count: int, sizes: list[int], seed: int) -> None:
    order = order_of(count, seed)
    taken: list[int] = []
    for size in sizes:
        part = order.take(size)
        assert len(part) == size
        taken += part
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    assert order_of(count, seed).take(len(taken)) == taken  # however it is cut


def test_five_pictures_in_windows_of_four_are_seen_alike() -> None:
    order = order_of(5, 0)
    windows = [order.take(4) for _ in range(10)]
    assert all(len(window) == 4 for window in windows)
    assert Counter(picture for window in windows for picture in window) == dict.fromkeys(range(5), 8)


def test_each_pass_has_an_order_of_its_own() -> None:
    order = order_of(8, 0)
    assert len({tuple(order.take(8)) for _ in range(6)}) == 6


def test_an_order_goes_on_from_its_state() -> None:
    order = order_of(5, 11)
    order.take(7)  # amid the second pass
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(order.state_dict(), tensors)
    expected = order.take(23)
    resumed = order_of(5, 99)
    resumed.load_state_dict(unpack(packed, tensors))
    assert resumed.take(23) == expected


def test_the_order_of_one_pool_is_that_of_earlier_builds() -> None:
    generator = torch.Generator().manual_seed(3)
    order = order_of(7, 3)
    for _ in range(3):
        assert order.take(7) == torch.randperm(7, generator=generator).tolist()


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit"])
def test_an_order_goes_on_from_an_earlier_builds_checkpoint(optimizer: str) -> None:
    """Of two pictures."""
    saved = read_state(PROJECT / "tests" / "data" / "cc752f5" / optimizer / "checkpoint-3")["order"]
    assert set(saved) == {"generator", "permutation", "position"}
    generator = torch.Generator()
    generator.set_state(saved["generator"])
    expected = saved["permutation"][saved["position"] :].tolist()
    expected += [index for _ in range(3) for index in torch.randperm(2, generator=generator).tolist()]
    order = order_of(2, 99)
    order.load_state_dict(saved)
    assert order.take(len(expected)) == expected
    assert order_of(2, 0).state_dict().keys() == saved.keys()  # so that the earlier build reads what this one writes


# Several pools, and repeats


def test_repeats_make_a_picture_come_that_many_times_a_pass() -> None:
    order = DataOrder([pool(3, repeats=4)], 0)
    passes = [order.take(12) for _ in range(4)]
    for taken in passes:
        assert Counter(taken) == dict.fromkeys(range(3), 4)
    assert any(sorted(taken[:3]) != [0, 1, 2] for taken in passes)  # shuffled over the whole pass


def test_each_pool_has_its_part_of_every_batch() -> None:
    """One of each in turn; each pool in passes of its own length."""
    order = DataOrder([pool(3), pool(5, repeats=2)], 0)
    batches = [order.take(4) for _ in range(15)]
    first = [index for batch in batches for index in batch[::2]]
    second = [index for batch in batches for index in batch[1::2]]
    for taken, indices, repeats in ((first, range(3), 1), (second, range(3, 8), 2)):
        length = len(indices) * repeats
        for start in range(0, 30, length):
            assert Counter(taken[start : start + length]) == dict.fromkeys(indices, repeats)
    assert first == order_of(3, 0).take(30)  # whatever comes beside it


def test_each_pool_has_a_shuffle_of_its_own() -> None:
    batches = DataOrder([pool(8), pool(8)], 0).take(16)
    assert [index + 8 for index in batches[::2]] != batches[1::2]
    seeds = [tuple(DataOrder([pool(8), pool(8)], seed).take(16)[1::2]) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_each_rank_takes_as_many_from_each_pool() -> None:
    draws = [GlobalDraws(0, 2, rank, 2) for rank in range(2)]
    batches = [DataOrder([pool(3), pool(5)], 0).take(each.global_batch_size)[each.rank_slice] for each in draws]
    assert [[index >= 3 for index in batch] for batch in batches] == [[False, True]] * 2


def test_a_batch_takes_as_many_from_each_pool() -> None:
    with pytest.raises(ValueError, match="a batch of 3 pictures cannot take as many from each of 2 pools"):
        DataOrder([pool(2), pool(2)], 0).take(3)


def test_an_order_of_two_pools_goes_on_from_its_state() -> None:
    pools = [pool(3), pool(5, repeats=2)]
    order = DataOrder(pools, 11)
    order.take(8)  # amid a pass of both
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(order.state_dict(), tensors)
    expected = order.take(40)
    resumed = DataOrder(pools, 99)
    resumed.load_state_dict(unpack(packed, tensors))
    assert resumed.take(40) == expected
    with pytest.raises(ValueError, match="zip"):
        DataOrder(pools[:1], 11).load_state_dict(unpack(packed, tensors))


def test_a_pass_is_over_when_each_pool_had_one() -> None:
    assert pass_length([pool(5)]) == 5
    assert pass_length([pool(5, repeats=3)]) == 15
    assert pass_length([pool(5, repeats=3), pool(20)]) == 20


def test_a_pool_is_not_empty_and_repeats_at_least_once() -> None:
    with pytest.raises(ValueError, match="a pool of 0 pictures"):
        pool(0)
    with pytest.raises(ValueError, match="2 pictures that come 0 times a pass"):
        pool(2, repeats=0)


# Pictures of several shapes


def shaped(shapes: str, seed: int = 0, repeats: int = 1) -> DataOrder:
    """One picture a letter, which is its shape."""
    return DataOrder([pool(len(shapes), repeats)], seed, shapes)


@given(
    shapes=st.text("abc", min_size=2, max_size=14).filter(lambda text: len(set(text)) > 1),
    count=st.integers(1, 6),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
def test_batches_have_one_shape_and_every_picture_comes_as_often(
    shapes: str, count: int, repeats: int, seed: int
) -> None:
    """Over 10 epochs, and over each of them."""
    order, pools = shaped(shapes, seed, repeats), [pool(len(shapes), repeats)]
    batches_a_pass = places_of_pass(pools, shapes, count) // count
    seen: Counter[int] = Counter()
    for epoch in range(1, 11):
        for batch in (order.take(count) for _ in range(batches_a_pass)):
            assert len({shapes[index] for index in batch}) == 1
            assert 1 <= len(batch) <= count
            seen.update(batch)
        assert seen == dict.fromkeys(range(len(shapes)), repeats * epoch)


def test_each_pass_has_its_batches_in_an_order_of_their_own() -> None:
    order = shaped("aaaabbbbcccc")
    passes = [tuple("aaaabbbbcccc"[order.take(2)[0]] for _ in range(6)) for _ in range(8)]
    assert len(set(passes)) > 4


def test_one_shape_is_the_order_of_earlier_builds() -> None:
    """Without smaller batches, and with a state that earlier builds read."""
    order, plain = shaped("aaaaa"), order_of(5, 0)
    assert [order.take(4) for _ in range(9)] == [plain.take(4) for _ in range(9)]
    assert order.state_dict().keys() == plain.state_dict().keys()
    assert places_of_pass([pool(5)], "aaaaa", 4) == pass_length([pool(5)]) == 5


def test_an_order_of_shapes_goes_on_from_its_state() -> None:
    order = shaped("aaabbbbc", 11)
    for _ in range(5):  # amid the second pass
        order.take(3)
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(order.state_dict(), tensors)
    expected = [order.take(3) for _ in range(20)]
    resumed = shaped("aaabbbbc", 99)
    resumed.load_state_dict(unpack(packed, tensors))
    assert [resumed.take(3) for _ in range(20)] == expected


@given(
    mine=st.text("abc", min_size=2, max_size=9).filter(lambda text: len(set(text)) > 1),
    more=st.text("abc", max_size=9),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
def test_class_pictures_have_the_shape_of_the_pictures_beside_them(mine: str, more: str, count: int, seed: int) -> None:
    """One to one; each of a shape as often as the others of it; a pass has all of those that are taken at all."""
    theirs = "".join(set(mine)) + more
    shapes, pools = mine + theirs, [pool(len(mine)), pool(len(theirs))]
    order = DataOrder(pools, seed, shapes)
    batches_a_pass = places_of_pass(pools, shapes, count) // count
    seen: Counter[int] = Counter()
    for _ in range(batches_a_pass):
        batch = order.take(2 * count)
        assert len({shapes[index] for index in batch}) == 1
        assert [index < len(mine) for index in batch] == [True, False] * (len(batch) // 2)
        seen.update(batch)
    assert len({seen[index] for index in range(len(mine))}) == 1
    for shape in set(mine):
        times = [seen[index] for index in range(len(mine), len(shapes)) if shapes[index] == shape]
        assert 1 <= max(times) - min(times) + 1 <= 2
        assert min(times) >= 1
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(order.state_dict(), tensors)
    expected = [order.take(2 * count) for _ in range(8)]
    resumed = DataOrder(pools, seed + 1, shapes)
    resumed.load_state_dict(unpack(packed, tensors))
    assert [resumed.take(2 * count) for _ in range(8)] == expected


def test_a_shape_without_class_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match="a further pool has no picture of shape b"):
        DataOrder([pool(2), pool(2)], 0, "abaa")


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (4, 1), (2, 3)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_picture_of_a_smaller_batch_weighs_as_in_a_full_one(
    world_size: int, batch_size: int, count: int, fills: bool
) -> None:
    """The mean over ranks of the means over their rows is the sum over the pictures, over the full batch's size."""
    losses = torch.rand(9, generator=torch.Generator().manual_seed(1))
    pictures = [5, 7, 2, 8][:count]
    shares = [GlobalDraws(0, batch_size, rank, world_size).share(pictures, fills) for rank in range(world_size)]
    assert len({len(share.pictures) for share in shares}) == 1
    full = world_size * batch_size
    if count == full:
        assert all(share.weights is None for share in shares)
        assert [index for share in shares for index in share.pictures] == pictures
        return
    means = [(share.weights * losses[share.pictures]).mean() for share in shares]
    assert torch.stack(means).mean() == pytest.approx(losses[pictures].sum() / full)
    assert {share.of_full for share in shares} == {count / full}
    assert len(shares[0].pictures) == (batch_size if fills else -(-count // world_size))


def test_ranks_slice_what_one_process_draws_for_a_smaller_batch() -> None:
    whole, ranks = GlobalDraws(7, 4), [GlobalDraws(7, 2, rank, 2) for rank in range(2)]
    for pictures in ([3], [3, 1], [3, 1, 2], [3, 1, 2, 0]):
        count, each = len(pictures), len(ranks[0].share(pictures).pictures)
        assert torch.equal(torch.cat([rank.normal((2,), each) for rank in ranks])[:count], whole.normal((2,), count))
        assert torch.equal(torch.cat([rank.uniform(each) for rank in ranks])[:count], whole.uniform(count))
