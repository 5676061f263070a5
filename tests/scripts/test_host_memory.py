"""The host's memory runs out: one sentence, nothing in part, no file taken for a damaged one, and the run goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sd3_lora.stage_one import images
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import Prepared, save_pictures
from training_runs import Script, fail_in, same_lora, train

TOO_MUCH = 1 << 60
SENTENCE = r"the host's memory ran out \(1099511627776.0 MiB more were asked for\)"


def test_training_keeps_its_last_whole_step(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--max_train_steps", 4, "--seed", 3, "--vram_budget_gib", 4]
    whole = train(script, prepared, tmp_path / "whole", *words)
    fail_in(monkeypatch, {4}, lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    run = train(script, prepared, tmp_path / "run", *words, code=2)
    said = rf"{SENTENCE} at step 4: close other programs; (.*) is kept; to go on, type `(.*)`"
    kept, again = re.fullmatch(said, run.error).groups()  # type: ignore[union-attr]
    assert kept == str(run.folder / "checkpoint-3")
    assert again.endswith("--resume_from_checkpoint latest")
    go_on = train(script, prepared, run.folder, *words, "--resume_from_checkpoint", "latest")
    assert go_on.losses == whole.losses
    assert same_lora(go_on.folder / LORA_FILE, whole.folder / LORA_FILE)


def test_a_checkpoint_without_memory_names_the_one_before(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd3_lora.training import state

    save, words = state.Outputs.save_checkpoint, ["--max_train_steps", 4, "--checkpointing_steps", 1]

    def failing(outputs: Any, training: Any, *given: Any) -> None:
        if training.step == 3:
            raise MemoryError
        save(outputs, training, *given)

    monkeypatch.setattr(state.Outputs, "save_checkpoint", failing)
    run = train(script, prepared, tmp_path / "run", *words, code=2)
    assert run.error.startswith(f"the host's memory ran out (MemoryError); {run.folder / 'checkpoint-2'} is kept; ")


def test_a_picture_is_not_broken_by_it(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Else --skip_broken would leave it out for good."""
    path = save_pictures(tmp_path / "pictures", [(64, 64)])[0]
    words = [*prepared.flags[:2], "--instance_data_dir", tmp_path / "pictures", "--output_path", tmp_path / "latents"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_to_rgb", lambda *_: bytearray(TOO_MUCH))
        result = script("precompute_latents", *words, "--skip_broken")
    assert result.code == 2
    fault = f"the host's memory ran out (MemoryError) while {path} was decoded"
    assert result.err == f"error: {fault}: close other programs, or remove the picture\n"
    assert script("precompute_latents", *words, "--skip_broken").code == 0
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 1
