"""float32 → bfloat16 by chance: right on average, exact where it can be, and the same each time."""

from __future__ import annotations

from sd3_lora.training.stochastic_rounding import mixed, random_bits, round_stochastically, step_keys

import torch

CPU = torch.device("cpu")
COUNT = 1 << 20


def bits(count: int, seed: int = 0, step: int = 1, tensor: int = 0) -> torch.Tensor:
    return random_bits(torch.arange(count, dtype=torch.int32), step_keys(seed, step, tensor + 1, CPU)[tensor])


def test_the_hash_is_lowbias32() -> None:
    """Computed by Python's integers."""

    def reference(value: int) -> int:
        value = (value ^ value >> 16) * 0x7FEB352D % 2**32
        value = (value ^ value >> 15) * 0x846CA68B % 2**32
        return value ^ value >> 16

    numbers = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    signed = torch.tensor(numbers).to(torch.int32)
    assert [int(value) % 2**32 for value in mixed(signed)] == list(map(reference, numbers))


def test_bits_are_even_and_those_of_steps_tensors_and_seeds_are_unlike() -> None:
    first = bits(COUNT)
    others = [bits(COUNT, step=2), bits(COUNT, tensor=1), bits(COUNT, seed=1), bits(COUNT, seed=2**40)]
    for each in (first, *others):
        assert int(each.min()) == 0
        assert int(each.max()) == 65535
        assert abs(float(each.double().mean()) - 32767.5) < 5 * 18918 / COUNT**0.5
    for other in others:
        correlation = torch.corrcoef(torch.stack([first.double(), other.double()]))[0, 1]
        assert abs(float(correlation)) < 5 / COUNT**0.5
    neighbours = torch.corrcoef(torch.stack([first[1:].double(), first[:-1].double()]))[0, 1]
    assert abs(float(neighbours)) < 5 / COUNT**0.5


def test_a_number_that_bfloat16_has_stays() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(COUNT).bfloat16(), torch.tensor([0.0, -0.0, 1e-38, -3.0]).bfloat16()])
    assert torch.equal(round_stochastically(values.float(), bits(len(values))), values)


def test_the_mean_is_the_number_itself() -> None:
    for value in (1.001, -1.001, 0.3, 1e-20, -123.456):
        rounded = round_stochastically(torch.full((COUNT,), value), bits(COUNT)).double()
        low, high = rounded.unique().tolist()
        exact = float(torch.tensor(value))
        assert low < exact < high
        spread = ((exact - low) * (high - exact) / COUNT) ** 0.5
        assert abs(float(rounded.mean()) - exact) < 5 * spread


def test_small_updates_add_up() -> None:
    """A thousand of 1e-4 on 1.0: plain bfloat16 stays where it is."""
    weights, plain = torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    for step in range(1, 1001):
        weights = round_stochastically(weights.float() + 1e-4, bits(4096, step=step))
        plain = (plain.float() + 1e-4).bfloat16()
    assert torch.equal(plain, torch.ones(4096).bfloat16())
    assert abs(float(weights.double().mean()) - 1.1) < 1e-3
