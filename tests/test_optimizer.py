"""The optimizer's step over one flat tensor."""

from __future__ import annotations

import math

from sd3_lora.optimizer import flatten_parameters, make_optimizer, optimizer_step
from sd3_lora.training_config import OptimizerConfig

import pytest
import torch


def two_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7, 2))]


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
    flat = flatten_parameters(parameters)
    optimizer, _ = make_optimizer(config, flat, 1, 5)
    theirs = torch.optim.AdamW(parts, lr=0.1, weight_decay=1e-4)
    for _ in range(5):
        for first, second in (parts, parameters):
            ((first @ first.t()).pow(2).sum() + (second.sin()).sum()).backward()
        optimizer_step(flat, optimizer, torch.amp.GradScaler("cpu", enabled=False), config.max_grad_norm)
        theirs.step()
        theirs.zero_grad()
    assert all(map(torch.equal, parts, parameters))


def test_gradients_are_clipped_to_the_norm() -> None:
    flat = flatten_parameters([torch.nn.Parameter(torch.zeros(2))])
    optimizer, scaler = torch.optim.SGD([flat], lr=1.0), torch.amp.GradScaler("cpu", enabled=False)
    assert flat.grad is not None
    for max_norm, moved in ((0.5, [-0.3, -0.4]), (10.0, [-3.0, -4.0])):
        flat.data.zero_()
        flat.grad.copy_(torch.tensor([3.0, 4.0]))
        norm, skipped = optimizer_step(flat, optimizer, scaler, max_norm)
        assert norm.item() == pytest.approx(5.0)  # before clipping
        assert not skipped
        assert flat.tolist() == pytest.approx(moved, rel=1e-4)
        assert flat.grad.tolist() == [0, 0]


def test_the_scaler_skips_an_infinite_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    flat = flatten_parameters([parameter])
    optimizer, scaler = torch.optim.SGD([flat], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(parameter.sum() * math.inf).backward()
    norm, skipped = optimizer_step(flat, optimizer, scaler, 1.0)
    assert not math.isfinite(norm)
    assert skipped
    assert parameter.tolist() == [0, 0]
    assert scaler.get_scale() == 512.0
    scaler.scale(parameter.sum() * 0.5).backward()
    norm, skipped = optimizer_step(flat, optimizer, scaler, 1.0)
    assert norm.item() == pytest.approx(0.5**0.5)  # unscaled before it is measured
    assert not skipped
    assert parameter.tolist() == pytest.approx([-0.5, -0.5])
