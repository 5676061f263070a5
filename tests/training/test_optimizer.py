"""The optimizer's step over one flat tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

from sd3_lora.gpu.copy_stream import DeviceFlag
from sd3_lora.training.optimizer import bytes_per_parameter, make_optimizer, optimizer_step
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.training.trainables import Trainables, TrainedGroup
from sd3_lora.transformer.flat_parameters import flatten_parameters

import pytest
import torch
from small_transformer import CPU, GPU, needs_gpu


def two_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7, 2))]


def trainables_of(*flats: torch.nn.Parameter, rate: float = 0.1) -> Trainables:
    """A group each."""
    return Trainables([TrainedGroup(f"group {index}", flat, rate) for index, flat in enumerate(flats)])


def test_the_flat_parameter_is_the_others_memory() -> None:
    parameters = two_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    flat = flatten_parameters(parameters)
    assert flat.shape == (15 + 14,)
    assert all(map(torch.equal, parameters, before))
    for _ in range(2):  # backward adds to the gradient where it lies
        (parameters[0].sum() * 2 + (parameters[1] ** 2).sum()).backward()
    assert flat.grad is not None
    assert flat.grad[:15].tolist() == [4.0] * 15
    assert torch.equal(flat.grad[15:].view(7, 2), 4 * before[1])
    flat.data.zero_()
    assert not any(parameter.any() for parameter in parameters)


def test_flat_adamw_is_adamw() -> None:
    """Steps of the flat tensor equal those of its parts, bit for bit, but for the order in which the norm is summed."""
    parts, parameters = two_parameters(), two_parameters()
    config = OptimizerConfig(learning_rate=0.1, max_grad_norm=1e9)
    trainables = trainables_of(flatten_parameters(parameters), rate=config.scaled_rate(1))
    optimizer, _ = make_optimizer(config, trainables, 5)
    theirs = torch.optim.AdamW(parts, lr=0.1, weight_decay=1e-4)
    for _ in range(5):
        for first, second in (parts, parameters):
            ((first @ first.t()).pow(2).sum() + (second.sin()).sum()).backward()
        optimizer_step(trainables, optimizer, torch.amp.GradScaler("cpu", enabled=False), config.max_grad_norm)
        theirs.step()
        theirs.zero_grad()
    assert all(map(torch.equal, parts, parameters))


def test_what_a_trained_parameter_takes() -> None:
    """Itself, its gradient, and AdamW's moments; in float16 an 8-bit step must be undoable."""
    for is_8bit, dtype, size in (
        (False, torch.float16, 16.0),
        (False, torch.float32, 16.0),
        (True, torch.bfloat16, 10.1),
        (True, torch.float16, 16.2),
    ):
        assert bytes_per_parameter(OptimizerConfig(use_8bit_adam=is_8bit), dtype, 4) == pytest.approx(size)


def test_gradients_are_clipped_to_the_norm() -> None:
    flat = flatten_parameters([torch.nn.Parameter(torch.zeros(2))])
    optimizer, scaler = torch.optim.SGD([flat], lr=1.0), torch.amp.GradScaler("cpu", enabled=False)
    assert flat.grad is not None
    for max_norm, moved in ((0.5, [-0.3, -0.4]), (10.0, [-3.0, -4.0])):
        flat.data.zero_()
        flat.grad.copy_(torch.tensor([3.0, 4.0]))
        norm, skipped = optimizer_step(trainables_of(flat), optimizer, scaler, max_norm)
        assert norm.item() == pytest.approx(5.0)  # before clipping
        assert not skipped
        assert flat.tolist() == pytest.approx(moved, rel=1e-4)
        assert flat.grad.tolist() == [0, 0]


def test_the_scaler_skips_an_infinite_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    flat = flatten_parameters([parameter])
    optimizer, scaler = torch.optim.SGD([flat], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(parameter.sum() * math.inf).backward()
    norm, skipped = optimizer_step(trainables_of(flat), optimizer, scaler, 1.0)
    assert not math.isfinite(norm)
    assert skipped
    assert parameter.tolist() == [0, 0]
    assert scaler.get_scale() == 512.0
    scaler.scale(parameter.sum() * 0.5).backward()
    norm, skipped = optimizer_step(trainables_of(flat), optimizer, scaler, 1.0)
    assert norm.item() == pytest.approx(0.5**0.5)  # unscaled before it is measured
    assert not skipped
    assert parameter.tolist() == pytest.approx([-0.5, -0.5])


def eight_bit_run(
    make: Callable[..., torch.optim.Optimizer], infinite: set[int], device: torch.device
) -> tuple[list, list[int]]:
    """Ten steps of a tensor with some blocks of 256, whose gradient is infinite in some; and how many had counted."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.nn.Parameter(torch.randn(5000, generator=generator).to(device))
    flat.grad = torch.zeros_like(flat)
    optimizer, scaler = make([flat], lr=0.1, weight_decay=0.01), torch.amp.GradScaler(device.type, init_scale=1024.0)
    found, counted = [], []
    for number in range(10):
        scaler.scale(torch.zeros((), device=device))  # as backward would have asked for it
        flat.grad.copy_(1024 * torch.randn(5000, generator=generator))
        if number in infinite:
            flat.grad[number] = math.inf
        _, skipped = optimizer_step(trainables_of(flat), optimizer, scaler, 1.0)
        assert bool(skipped) == (number in infinite)
        names = ("state1", "state2", "absmax1", "absmax2")
        state = [optimizer.state[flat][name].clone() for name in names if name in optimizer.state[flat]]
        found.append((flat.detach().clone(), state))
        if number % 3 == 2:
            counted += [state["step"] for state in optimizer.state_dict()["state"].values()]
    return found, counted


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)], ids=["cpu", "gpu"])
@pytest.mark.parametrize("infinite", [set(), {0, 1, 5}, {9}, {2, 8}])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit"])
def test_8_bit_steps_are_bitsandbytes_own_and_infinite_ones_are_undone(
    name: str, infinite: set[int], device: torch.device
) -> None:
    from sd3_lora.training import optimizers_8bit

    import bitsandbytes.optim

    makers = [getattr(module, name) for module in (optimizers_8bit, bitsandbytes.optim)]
    (mine, counts), (theirs, expected) = (eight_bit_run(make, infinite, device) for make in makers)
    assert counts == expected
    for step, ((flat, state), (own, their_state)) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(flat, own), step
        assert all(map(torch.equal, state, their_state)), step  # before its first step that counts, theirs has none


def test_an_8_bit_step_does_not_synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither bitsandbytes for the device nor the scaler for its answer; that is asked for a step later."""
    from sd3_lora.training.optimizers_8bit import AdamW8bit

    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", lambda *_: pytest.fail("it waits"))
    asked: list[int] = []
    answer = DeviceFlag.__bool__
    monkeypatch.setattr(DeviceFlag, "__bool__", lambda self: asked.append(id(self)) or answer(self))
    flat = torch.nn.Parameter(torch.ones(300))
    flat.grad = torch.ones_like(flat)
    optimizer, scaler = AdamW8bit([flat], lr=0.1), torch.amp.GradScaler("cpu")
    for number in range(3):
        scaler.scale(torch.zeros(()))
        before = optimizer._was_skipped
        optimizer_step(trainables_of(flat), optimizer, scaler, 1.0)
        assert asked[number - 1 :] == [id(before)] * min(1, number)
        assert len(asked) == number
