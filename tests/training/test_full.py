"""Training of the whole transformer, `--full`: its gradients, its updates, its files, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PROMPT, Prepared
from safetensors.torch import load_file
from training_runs import Run, Script, train, training_script

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def train_full(script: Script, prepared: Prepared, folder: Path, *words: object, code: int = 0) -> Run:
    return train(script, prepared, folder, "--full", "--learning_rate", 1e-3, *words, code=code)


def same_tensors(left: Path, right: Path) -> bool:
    mine, theirs = load_file(left), load_file(right)
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    shared = [*prepared.flags, "--device", "cpu", "--max_train_steps", 4, "--checkpointing_steps", 2]
    words = [*shared, "--output_dir", folder, "--full", "--learning_rate", 1e-3, "--checkpoints_total_limit", 3]
    assert training_script().main([str(word) for word in words]) == 0
    return folder


def test_all_weights_are_trained_and_nothing_else(whole: Path, prepared: Prepared) -> None:
    before = load_file(prepared.model / WEIGHTS)
    after = load_file(whole / WEIGHTS)
    assert before.keys() == after.keys()
    unchanged = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    assert unchanged == {"pos_embed.pos_embed"}


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    script: Script, prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    words = ["--checkpointing_steps", 2, "--checkpoints_total_limit", 3]
    train_full(script, prepared, tmp_path / "a", "--max_train_steps", 2, *words)
    run = train_full(
        script, prepared, tmp_path / "a", "--max_train_steps", 4, *words, "--resume_from_checkpoint", "latest"
    )
    assert "resumed from" in run.out
    assert same_tensors(run.folder / WEIGHTS, whole / WEIGHTS)
    moments = "checkpoint-4/moments/moments.safetensors"
    assert same_tensors(run.folder / moments, whole / moments)
    assert run.losses == Run(whole, "", "").losses


def test_the_folder_is_a_model_that_draws(script: Script, prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    drawn = script(
        "inference",
        *("--pretrained_model_name_or_path", whole, "--prompt", PROMPT, "--device", "cpu", "--num_steps", 2),
        *("--height", 64, "--width", 64, "--data_df_path", prepared.embeddings, "--outdir", tmp_path),
    )
    assert drawn.code == 0, drawn.err
    assert list(tmp_path.glob("*/*.png"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(whole)
    name, tensor = next(iter(load_file(whole / WEIGHTS).items()))
    assert torch.equal(pipeline.transformer.state_dict()[name], tensor)
    record = json.loads((whole / "run.json").read_text())
    assert record["plan"]["whole"] is True
    assert record["wrote"] == str(whole / "transformer")
