"""What is trained, in groups: rates of their own, one norm, one exchange."""

from __future__ import annotations

from sd3_lora.training.config import OptimizerConfig
from sd3_lora.training.optimizer import make_optimizer, optimizer_step
from sd3_lora.training.trainables import Trainables, TrainedGroup
from sd3_lora.transformer.flat_parameters import flatten_parameters

import pytest
import torch


def group(name: str, numbers: int, rate: float) -> TrainedGroup:
    return TrainedGroup(name, flatten_parameters([torch.nn.Parameter(torch.zeros(numbers))]), rate)


@pytest.fixture
def trainables() -> Trainables:
    return Trainables([group("transformer", 3, 0.1), group("clip", 2, 0.01)])


def test_each_group_has_its_rate(trainables: Trainables) -> None:
    """Adam's first step is its rate."""
    config = OptimizerConfig(lr_scheduler="linear", max_grad_norm=1e9)
    optimizer, schedule = make_optimizer(config, trainables, 5)
    assert schedule.get_last_lr() == [0.1, 0.01]
    for gradient in trainables.gradients:
        gradient.fill_(1.0)
    optimizer_step(trainables, optimizer, torch.amp.GradScaler("cpu", enabled=False), config.max_grad_norm)
    moved = [parameter.tolist() for parameter in trainables.parameters]
    assert moved[0] == pytest.approx([-0.1] * 3, rel=1e-5)
    assert moved[1] == pytest.approx([-0.01] * 2, rel=1e-5)
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.08, 0.008])
    assert not any(gradient.any() for gradient in trainables.gradients)


def test_groups_are_clipped_by_one_norm(trainables: Trainables) -> None:
    trainables.gradients[0].fill_(2.0)
    trainables.gradients[1].fill_(2.0)
    assert trainables.clip(1.0).item() == pytest.approx(20**0.5)
    assert torch.cat(trainables.gradients).tolist() == pytest.approx([2 / 20**0.5] * 5, rel=1e-5)


def test_gradients_are_exchanged_where_they_lie(trainables: Trainables) -> None:
    before = [gradient.data_ptr() for gradient in trainables.gradients]
    for gradient in trainables.gradients:
        gradient.fill_(4.0)
    trainables.reduce(lambda gradient: gradient / 2)
    assert torch.cat(trainables.gradients).tolist() == [2.0] * 5
    assert [gradient.data_ptr() for gradient in trainables.gradients] == before
    assert trainables.numel == 5


def test_a_group_needs_a_gradient() -> None:
    bare = TrainedGroup("transformer", torch.nn.Parameter(torch.zeros(2)), 0.1)
    with pytest.raises(ValueError, match="the group transformer has no gradient: flatten its parameters first"):
        Trainables([bare]).gradients  # noqa: B018
