"""Pictures while training: drawn from the same noise each time, and the run is as if none had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd3_lora.transformer.lora import LORA_FILE

import pytest
from conftest import PROMPT, Prepared
from PIL import Image
from training_runs import Run, Script, same_lora, train

CLASS_PROMPT = "a photo of a robot"
DRAWS = ["--validation_prompt", PROMPT, CLASS_PROMPT, "--validation_num_steps", 2, "--validation_guidance", 3]
LEARNS = ["--learning_rate", 0.01, "--lora_dropout", 0.3]


def steps_drawn(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run.folder / "samples").glob("step_*"))


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


@pytest.fixture(scope="module")
def without(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with dropout, without pictures."""
    import importlib

    from conftest import TRAINING_SCRIPT

    folder = tmp_path_factory.mktemp("without")
    words = [*prepared.flags, "--device", "cpu", "--max_train_steps", 3, "--output_dir", folder, *LEARNS]
    assert importlib.import_module(TRAINING_SCRIPT).main([str(word) for word in words]) == 0
    return Run(folder, "", "")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--use_ema"],
        ["--stream_blocks", 2, "--gradient_checkpointing", "--modulations_ahead", "on"],
        ["--deterministic", "on"],
    ],
    ids=lambda words: " ".join(map(str, words)) or "plain",
)
def test_the_run_is_as_if_nothing_had_been_drawn(
    script: Script, prepared: Prepared, tmp_path: Path, without: Run, words: list[Any]
) -> None:
    """Bit for bit, with dropout, before and after every step."""
    run = train(script, prepared, tmp_path, *LEARNS, *words, *DRAWS, "--validation_steps", 1)
    assert steps_drawn(run) == [0, 1, 2, 3]
    assert run.losses == without.losses
    assert same_lora(run.folder / LORA_FILE, without.folder / LORA_FILE)
    names = [path.name for path in sorted((tmp_path / "samples" / "step_000003").iterdir())]
    assert names == ["00_a-photo-of-sks-robot_00.png", "01_a-photo-of-a-robot_00.png"]
