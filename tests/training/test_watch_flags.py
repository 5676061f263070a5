"""When a run is looked at, and by which names."""

from __future__ import annotations

import importlib
from typing import Any

from sd3_lora.common.command_line import UserError, WrongFlags
from sd3_lora.training.watch_flags import WatchFlags

import pytest
from conftest import TRAINING_SCRIPT


def parsed(*words: object) -> WatchFlags:
    groups = importlib.import_module(TRAINING_SCRIPT).COMMAND_LINE.parse([str(word) for word in words])
    (flags,) = (group for group in groups if isinstance(group, WatchFlags))
    return flags


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({}, [4, 8, 10]),  # with the checkpoints, every 4 steps here, and after the last step
        ({"validation_steps": 3}, [3, 6, 9, 10]),
        ({"validation_epochs": 1}, [3, 5, 8, 10]),  # of 2.5 steps each
        ({"validation_epochs": 2}, [5, 10]),
        ({"save_every_n_steps": 3}, [3, 6, 9, 10]),
        ({"save_every_n_steps": 3, "validation_steps": 5}, [5, 10]),
        ({"save_every_n_steps": 3, "validation_steps": 5, "validation_with_saves": True}, [3, 5, 6, 9, 10]),
        ({"validation_steps": 100}, [10]),
    ],
)
def test_when_pictures_are_drawn(flags: dict[str, Any], steps: list[int]) -> None:
    watch = WatchFlags(validation_prompt=["a dog"], **flags)
    drawn = [step for step in range(1, 11) if watch.draws_at(step, 2.5, step % 4 == 0, step == 10)]
    assert drawn == steps


def test_without_a_prompt_nothing_is_drawn() -> None:
    assert not any(WatchFlags(save_every_n_steps=1).draws_at(step, 1, True, True) for step in range(1, 5))


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        (["--save_sample_prompt", "a dog"], ["--validation_prompt", "a dog"]),
        (["--test_prompt", "a dog"], ["--validation_prompt", "a dog"]),
        (["--test-prompt", "a dog", "--validation_prompt", "a cat"], ["--validation_prompt", "a dog", "a cat"]),
        (["--test_prompts_file", "p.txt"], ["--validation_prompts_file", "p.txt"]),
        (["--n_save_sample", 2], ["--num_validation_images", 2]),
        (["--test_num_per_prompt", 3], ["--num_validation_images", 3]),
        (["--test_negative_prompt", "blurry"], ["--validation_negative_prompt", "blurry"]),
        (["--save_sample_negative_prompt", "blurry"], ["--validation_negative_prompt", "blurry"]),
        (["--test_seed", 7], ["--validation_seed", 7]),
        (["--save_infer_steps", 9], ["--validation_num_steps", 9]),
        (["--save_guidance_scale", 5], ["--validation_guidance", 5]),
        (["--save_interval", 5], ["--save_every_n_steps", 5]),
        (
            ["--save_model_every_n_steps", 5, "--auto_test_model"],
            ["--save_every_n_steps", 5, "--validation_with_saves"],
        ),
    ],
    ids=lambda words: str(words[0]),
)
def test_the_names_of_older_trainers(typed: list[Any], ours: list[Any]) -> None:
    prompt = ["--validation_prompt", "x"]
    assert parsed(*typed, *prompt) == parsed(*ours, *prompt) != parsed(*prompt)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"validation_steps": 5}, '--validation_steps draws nothing without a prompt: add --validation_prompt "a'),
        ({"validation_seed": 5}, "--validation_seed draws nothing without a prompt"),
        ({"validation_prompt": ["x"], "validation_seed": -1}, "--validation_seed -1 must be at least 0"),
        ({"validation_prompt": ["x"], "validation_steps": 0}, "--validation_steps 0 must be at least 1"),
        (
            {"validation_prompt": ["x"], "validation_guidance": float("nan")},
            "--validation_guidance nan must be a finite",
        ),
        ({"validation_prompt": ["x"], "validation_with_saves": True}, "--validation_with_saves needs --save_every_n_"),
        ({"validation_prompt": ["a", "photo", "of", "a", "dog"]}, '--validation_prompt "a photo of a dog"'),
        ({"early_warning_steps": 0}, "--early_warning_steps 0 must be at least 1"),
    ],
)
def test_bad_values(flags: dict[str, Any], says: str) -> None:
    with pytest.raises((UserError, WrongFlags)) as error:
        WatchFlags(**flags)
    assert says in str(error.value)


def test_zero_is_a_seed() -> None:
    assert WatchFlags(validation_prompt=["x"], validation_seed=0).validation_seed == 0
