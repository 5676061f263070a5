"""What training makes of a stage one that left something out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import PROMPT, TRAINING_SCRIPT, Prepared


@pytest.fixture
def with_a_broken_picture(prepared: Prepared, tmp_path: Path) -> list[object]:
    """The flags of training on five good pictures, with latents, and a sixth that does not decode."""
    shutil.copytree(prepared.pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.jpg").write_text("not a picture")
    return [*prepared.flags, "--instance_data_dir", tmp_path / "pictures", "--max_train_steps", 2]


def test_a_broken_picture_is_left_out_when_asked(script, with_a_broken_picture, tmp_path: Path) -> None:
    stopped = script(TRAINING_SCRIPT, *with_a_broken_picture, "--output_dir", tmp_path / "a")
    assert stopped.code == 2
    assert "no latents of broken.jpg" in stopped.err
    going_on = script(TRAINING_SCRIPT, *with_a_broken_picture, "--output_dir", tmp_path / "b", "--skip_broken")
    assert going_on.code == 0
    assert "skipped: " in going_on.out
    assert "5 pictures at 64 px" in going_on.out


def test_a_new_picture_is_not_mistaken_for_a_broken_one(script, with_a_broken_picture, prepared, tmp_path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "new.png")
    flags = [*with_a_broken_picture, "--output_dir", tmp_path / "a", "--skip_broken"]
    stopped = script(TRAINING_SCRIPT, *flags)
    assert stopped.code == 2
    assert "no latents of new.png" in stopped.err
    assert "--skip_broken" in stopped.err  # in the command that mends it


def test_latents_that_training_makes_itself_skip_it_too(script, tiny_sd3: Path, tmp_path: Path, monkeypatch) -> None:
    from sd3_lora import stage_one

    from conftest import save_pictures

    save_pictures(tmp_path / "pictures", [(64, 64)])
    (tmp_path / "pictures" / "broken.jpg").write_text("not a picture")
    model = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", tmp_path / "pictures"]
    prompt = ["--instance_prompt", PROMPT]
    assert script("compute_embeddings", *model, *prompt, "--output_path", tmp_path / "e.parquet").code == 0
    commands = []

    def run(words: list[str], **_: object) -> object:
        commands.append([str(word) for word in words])
        import precompute_latents

        return type("Finished", (), {"returncode": precompute_latents.main(commands[-1][2:])})

    monkeypatch.setattr(stage_one.subprocess, "run", run)
    flags = ["--data_df_path", tmp_path / "e.parquet", "--latents_path", tmp_path / "latents", "--report_to", "none"]
    flags += ["--output_dir", tmp_path / "out", "--max_train_steps", 1, "--skip_broken"]
    assert script(TRAINING_SCRIPT, *model, *prompt, *flags).code == 0
    assert "--skip_broken" in commands[0]
