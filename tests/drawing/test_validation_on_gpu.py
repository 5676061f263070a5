"""Validation on a GPU: the run has the bits of one without, and nothing of a drawing stays on the device."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import TRAINING_SCRIPT
from small_transformer import needs_gpu
from training_runs import Flags, Script, same_lora, train

DRAWS = ["--validation_prompt", "a photo of sks fish", "--validation_num_steps", 2, "--validation_steps", 2]


@needs_gpu
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--capture", "off", "--lora_dropout", 0.3],
        ["--use_ema"],
        ["--recompute_blocks", 5, "--stream_blocks", 6],
        ["--recompute_blocks", 6, "--stream_blocks", 6, "--offload_inputs", "on", "--stream_buffers", 2],
        ["--base_precision", "nf4"],
        ["--optimizer", "schedule_free_adamw"],
    ],
    ids=lambda words: " ".join(map(str, words)) or "as it is",
)
def test_the_run_is_as_if_nothing_had_been_drawn(
    script: Script, on_miniature: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[Any]
) -> None:
    """A captured step is freed before each drawing, and captured again; the tensors of the others are as they were."""
    shared = ["--device", "cuda", "--deterministic", "on", "--mixed_precision", "fp16", "--max_train_steps", 7]
    shared += ["--lora_dropout", 0, *words]
    allocated: list[int] = []
    module = importlib.import_module(TRAINING_SCRIPT)
    take_step = module.optimizer_step

    def step(*given: Any) -> Any:
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
        return take_step(*given)

    without = train(script, on_miniature, tmp_path / "without", *shared)
    monkeypatch.setattr(module, "optimizer_step", step)
    run = train(script, on_miniature, tmp_path / "with", *shared, *DRAWS, "--early_warning_steps", 2)
    assert "failed (" not in run.out + run.err
    folders = sorted(path.name for path in (run.folder / "samples").glob("step_*"))
    assert folders == [f"step_{step:06d}" for step in (0, 2, 4, 6, 7)]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["execution"]["captured"] == ("--capture" not in words)
    assert run.losses == without.losses
    assert same_lora(run.folder / LORA_FILE, without.folder / LORA_FILE)
    assert abs(allocated[4] - allocated[6]) < 1 << 20  # of steps 5 and 7, each the first after a drawing
