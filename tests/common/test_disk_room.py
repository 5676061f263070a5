"""Room on the disk is asked for before a stage begins, by what it will write."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3_lora.common import disk_room
from sd3_lora.common.command_line import UserError, disk_fault
from sd3_lora.common.disk_room import require_room

import pytest
from conftest import PROMPT, TRAINING_SCRIPT, Prepared, Result, save_pictures
from safetensors import SafetensorError

CLASS_PROMPT = "a photo of a robot"
STAGES: dict[str, tuple[Callable[[Prepared], list[Any]], str]] = {
    "compute_embeddings": (
        lambda it: ["--instance_data_dir", it.pictures, "--instance_prompt", "a robot", "--output_path", "e.parquet"],
        "the embeddings take up to",
    ),
    "precompute_latents": (
        lambda it: ["--instance_data_dir", it.pictures, "--output_path", "latents"],
        "the latents take up to",
    ),
    "draw_class_pictures": (
        lambda it: ["--class_prompt", CLASS_PROMPT, "--class_data_dir", "robots", "--data_df_path", it.embeddings],
        "the class pictures take up to",
    ),
    TRAINING_SCRIPT: (
        lambda it: [*it.flags[2:], "--max_train_steps", 4, "--checkpointing_steps", 2, "--output_dir", "out"],
        "2 checkpoints and the LoRA take up to",
    ),
    "inference": (
        lambda it: ["--prompt", PROMPT, "--max_sequence_length", 20, "--data_df_path", it.embeddings],
        "the pictures take up to",
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_without_room_writes_nothing(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, what = STAGES[name]
    typed = ["--device", "cpu", "--pretrained_model_name_or_path", prepared.model, *words(prepared)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk_room, "free_disk_bytes", lambda _: 100)
    result = script(name, *typed)
    assert result.code == 2, result.out + result.err
    assert result.err.startswith("error: the disk of ")
    assert f" has 9.31e-08 GiB left, and {what}" in result.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_enough_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_room, "free_disk_bytes", lambda _: 1000)
    require_room(tmp_path, 1000, "they take")
    with pytest.raises(UserError, match="and they take up to"):
        require_room(tmp_path, 1001, "they take")


def test_the_room_for_embeddings_is_what_they_take(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a part and once in a row, before zstd."""
    compute_embeddings, asked = importlib.import_module("compute_embeddings"), list[int]()
    monkeypatch.setattr(compute_embeddings, "require_room", lambda _, size, __: asked.append(size))
    save_pictures(tmp_path / "pictures", [(64, 64)])
    flags = ["--instance_data_dir", tmp_path / "pictures", "--instance_prompt", PROMPT, "--max_sequence_length", 20]
    flags += ["--output_path", tmp_path / "e.parquet", "--device", "cpu"]
    assert script("compute_embeddings", "--pretrained_model_name_or_path", prepared.model, *flags).code == 0
    assert asked == [2 * 2 * 2 * (77 + 20) * 48]  # two prompts, that of the picture and the empty one


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "can only be read"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "so large a file"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "has failed"),
        (SafetensorError("Error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_what_a_disk_says(error: Exception, words: str) -> None:
    fault = disk_fault(error)
    assert fault is not None
    assert words in fault


def test_other_errors_are_no_disks() -> None:
    assert disk_fault(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))) is None
    assert disk_fault(SafetensorError("invalid header")) is None
