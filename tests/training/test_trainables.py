"""What is trained, in groups: rates of their own, one norm, one exchange."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.training.optimizer import make_optimizer, optimizer_step
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.training.trainables import Trainables, TrainedGroup, groups_by_rate, pattern_of, require_patterns
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import EMA_FILE

import pytest
import torch
from conftest import Prepared
from test_resume import assert_same_run
from training_runs import Script, same_lora, train


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


# Rates of their own

NAMES = ["attn.to_q.lora_A", "attn.to_q.lora_B", "ff.net.2.lora_A", "ff.net.2.lora_B"]


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("attn", NAMES[:2]),
        ("lora_B", NAMES[1::2]),
        ("net.2", NAMES[2:]),
        ("to_q.lora_A", NAMES[:1]),
        ("2", NAMES[2:]),
        ("att", []),
        ("attn.lora_A", []),
    ],
)
def test_a_pattern_fits_names_in_a_row(pattern: str, fits: list[str]) -> None:
    assert [name for name in NAMES if pattern_of(name, [pattern])] == fits


def test_the_first_pattern_counts_and_the_rest_comes_first() -> None:
    parts = [torch.nn.Parameter(torch.full((2, 3), float(number))) for number in range(4)]
    whole = TrainedGroup("transformer", flatten_parameters(parts), 0.1, tuple(parts))
    groups = groups_by_rate(whole, NAMES, {"attn.to_q.lora_B": 0.4, "attn": 0.2, "lora_B": 0.3})
    assert [(group.name, group.learning_rate) for group in groups] == [
        ("transformer", 0.1),
        ("transformer attn.to_q.lora_B", 0.4),
        ("transformer attn", 0.2),
        ("transformer lora_B", 0.3),
    ]
    assert [group.flat.tolist() for group in groups] == [[2.0] * 6, [1.0] * 6, [0.0] * 6, [3.0] * 6]
    for group in groups:  # the parts are views of their group
        (part,) = group.parts
        group.flat.data.fill_(7.0)
        group.gradient.fill_(8.0)
        assert part.tolist() == [[7.0] * 3] * 2
        assert part.grad is not None
        assert part.grad.tolist() == [[8.0] * 3] * 2
    assert groups_by_rate(whole, NAMES, {}) == [whole]


def test_a_pattern_of_nothing_is_refused() -> None:
    require_patterns({"attn": 0.1, "lora_B": 0.2}, NAMES)
    with pytest.raises(
        UserError, match=r"--lr_pattern conv=0.1: what is trained is attn.to_q.lora_A, attn.to_q.lora_B"
    ):
        require_patterns({"conv": 0.1}, NAMES)
    with pytest.raises(UserError, match=r"--lr_pattern to_q=0.1: patterns before it have all that it fits"):
        require_patterns({"attn": 0.1, "to_q": 0.1}, NAMES)


def test_each_layer_moves_by_its_rate(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Adam's first step is its rate, and lora_B starts at zero."""
    words = ["--lr_pattern", "attn.to_q=1e-3,lora_B=5e-4", "--learning_rate", 1e-4, "--max_train_steps", 1]
    run = train(script, prepared, tmp_path / "run", *words, "--adam_epsilon", 1e-16, "--max_grad_norm", 1e9)
    for name, tensor in run.lora.items():
        if ".lora_B." in name and tensor.any():
            rate = 1e-3 if ".attn.to_q." in name else 5e-4
            assert tensor.abs().max().item() == pytest.approx(rate, rel=1e-3), name
    assert {line["learning_rate"] for line in run.losses} == {1e-4}
    identity = json.loads((run.folder / "run.json").read_text())["identity"]
    assert identity["--lr_pattern"] == "attn.to_q=1e-3,lora_B=5e-4"


def test_equal_rates_change_no_number(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = ["--learning_rate", 0.01, "--max_grad_norm", 1e9]
    runs = [
        train(script, prepared, tmp_path / str(len(more)), *words, *more)
        for more in ([], ["--lr_pattern", "attn.to_q=0.01,lora_B=0.01"])
    ]
    assert [line["loss"] for line in runs[0].losses] == [line["loss"] for line in runs[1].losses]
    assert all(torch.equal(runs[0].lora[name], runs[1].lora[name]) for name in runs[0].lora)


@pytest.mark.parametrize("optimizer", ["AdamW", "adamw_8bit", "adafactor", "schedule_free_adamw"])
def test_resume_is_exact_with_rates_of_their_own(
    script: Script, prepared: Prepared, tmp_path: Path, optimizer: str
) -> None:
    words: list[Any] = ["--optimizer", optimizer, "--lr_pattern", "attn.to_q=0.02,lora_B=0.03"]
    words += [] if optimizer == "schedule_free_adamw" else ["--use_ema"]
    words += ["--learning_rate", 0.01, "--rank", 16, "--lora_dropout", 0.2, "--checkpointing_steps", 3]
    whole = train(script, prepared, tmp_path / "whole", *words, "--max_train_steps", 5)
    part = train(script, prepared, tmp_path / "part", *words, "--max_train_steps", 3)
    again = ["--max_train_steps", 5, "--resume_from_checkpoint", "latest"]
    refused = train(script, prepared, tmp_path / "part", *words, "--lr_pattern", "attn.to_q=0.02", *again, code=2)
    assert "was trained with --lr_pattern attn.to_q=0.02,lora_B=0.03, not attn.to_q=0.02" in refused.error
    train(script, prepared, tmp_path / "part", *words, *again)
    assert_same_run(whole.folder, part.folder, 5)
    if "--use_ema" in words:
        assert same_lora(whole.folder / EMA_FILE, part.folder / EMA_FILE)
