"""Training on pictures of several shapes: what is computed, counted, planned, and resumed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from sd3_lora.common.model_files import MINIATURE
from sd3_lora.gpu.budget import DeviceBudget
from sd3_lora.plan.memory_plan import Plan, TrainingTask
from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared, save_pictures
from training_runs import Flags, Script, patch_loss, same_lora, train, training_script, watch_batches

BUCKETS = ["--use_aspect_ratio_bucket"]


@pytest.fixture(scope="module")
def mixed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The five pictures in three shapes: 80x48, twice 64x64, twice 48x80; one crop of each."""
    import precompute_latents

    latents = tmp_path_factory.mktemp("mixed") / "latents"
    words = ["--pretrained_model_name_or_path", str(prepared.model), "--instance_data_dir", str(prepared.pictures)]
    words += [*BUCKETS, "--num_crops", "1", "--device", "cpu", "--output_path", str(latents)]
    assert precompute_latents.main(words) == 0
    return Prepared(prepared.model, prepared.pictures, prepared.embeddings, latents)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_picture_counts_the_same_over_ten_epochs(
    script: Script, mixed: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """One shape a micro-batch; by the pictures that the log names, and by their weights."""
    seen = watch_batches(monkeypatch)
    words = ["--train_batch_size", batch_size, "--lora_blocks", 0, "--lora_layers", "attn.to_k"]
    shared = [*mixed.flags, *BUCKETS, "--device", "cpu", "--output_dir", tmp_path / "out"]
    result = script(TRAINING_SCRIPT, *shared, "--num_train_epochs", 10, *words)
    assert result.code == 0, result.err
    assert "5 pictures at 64 px (2 of 48x80, 2 of 64x64, 1 of 80x48), seed 0" in result.out
    assert len(seen) == 10 * (5 if batch_size == 1 else 3)
    counts, weights = Counter[str](), Counter[str]()
    for inputs, names in seen:
        assert len(inputs.latents) == len(names)
        for name, weight in zip(names, inputs.loss_weights.tolist(), strict=True):
            counts[name] += 1
            weights[name] += weight / len(names)
    assert counts == {f"{index:02d}.png": 10 for index in range(5)}
    assert set(weights.values()) == {10 / batch_size}


def test_the_logged_loss_is_a_pictures(
    script: Script, mixed: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a smaller batch too, whose gradient counts less: here each loss is the mean of its weights."""
    patch_loss(monkeypatch, lambda _, loss: loss * 0 + 1)
    original = training_script().flow_matching_loss
    monkeypatch.setattr(training_script(), "flow_matching_loss", lambda *words: original(*words) * words[4].mean())
    run = train(script, mixed, tmp_path / "out", *BUCKETS, "--train_batch_size", 4, "--max_train_steps", 6)
    assert [line["loss"] for line in run.losses] == pytest.approx([1.0] * 6)


def test_a_resumed_run_is_bit_identical(
    script: Script, mixed: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*BUCKETS, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 2]
    whole = train(script, mixed, tmp_path / "whole", *words, "--max_train_steps", 7)
    train(script, mixed, tmp_path / "parts", *words, "--max_train_steps", 2)
    again = ["--resume_from_checkpoint", "latest"]
    train(script, mixed, tmp_path / "parts", *words, "--max_train_steps", 4, *again)
    parts = train(script, mixed, tmp_path / "parts", *words, "--max_train_steps", 7, *again)
    assert same_lora(whole.folder / LORA_FILE, parts.folder / LORA_FILE)
    assert whole.losses == parts.losses
    states = [each.folder / "checkpoint-7" / "state.safetensors" for each in (whole, parts)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_buckets_are_part_of_a_runs_identity(
    script: Script, prepared: Prepared, mixed: Prepared, tmp_path: Path
) -> None:
    train(script, mixed, tmp_path / "out", *BUCKETS)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["identity"]["--use_aspect_ratio_bucket"] is True
    again = ["--resume_from_checkpoint", "latest", "--max_train_steps", 5]
    refused = train(script, prepared, tmp_path / "out", *again, code=2)
    assert "was trained with --use_aspect_ratio_bucket: type --use_aspect_ratio_bucket to go on" in refused.error


def test_pictures_of_one_shape_give_the_bits_of_today(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """With buckets of one size: its crops are those of the square."""
    words = ["--train_batch_size", 2, "--num_crops", 3]
    one = ["--bucket_min", 64, "--bucket_max", 64]
    runs = [
        train(script, prepared, tmp_path / name, *words, *more) for name, more in (("a", []), ("b", [*BUCKETS, *one]))
    ]
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(runs[0].lora[name], tensor) for name, tensor in runs[1].lora.items())


def test_each_shape_computes_what_it_would_alone(
    script: Script, mixed: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positional embedding is cut to enclose all shapes, and each still gets its own middle of it."""
    seen = watch_batches(monkeypatch)
    words = [*BUCKETS, "--max_train_steps", 1]
    together = train(script, mixed, tmp_path / "together", *words, "--seed", 3)
    (name,) = seen[0][1]
    (tmp_path / "one").mkdir()
    shutil.copy(mixed.pictures / name, tmp_path / "one" / name)
    alone = train(script, mixed, tmp_path / "alone", *words, "--seed", 3, "--instance_data_dir", tmp_path / "one")
    assert alone.losses[0]["loss"] == pytest.approx(together.losses[0]["loss"], rel=1e-6)


def test_latents_of_another_shape_are_missing(
    script: Script, prepared: Prepared, mixed: Prepared, tmp_path: Path
) -> None:
    refused = train(script, mixed, tmp_path / "a", code=2)
    assert "has no crop of 64x64 px of 00.png, but one of 80x48: add the --use_aspect_ratio_bucket of then, or" in (
        refused.error
    )
    refused = train(script, prepared, tmp_path / "b", *BUCKETS, code=2)
    assert "has no crop of 80x48 px of 00.png, but one of 64x64: type `python precompute_latents.py" in refused.error
    assert "--use_aspect_ratio_bucket" in refused.error


def test_latents_are_made_in_the_asked_shapes(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = [*BUCKETS, "--bucket_step", 32, "--bucket_max", 96, "--latents_path", tmp_path / "latents"]
    run = train(script, prepared, tmp_path / "out", *words, "--center_crop")
    assert "5 pictures at 64 px (" in run.out or "5 pictures at 64 px," in run.out
    assert json.loads((tmp_path / "latents" / "run.json").read_text())["flags"]["bucket_step"] == 32


def test_the_plan_counts_the_largest_shape(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the positional embedding that encloses all of them: 32 instead of 16 patches a side, 256 channels."""
    planned: list[tuple[TrainingTask, Plan]] = []
    original = training_script().plan_training

    def noted(task: TrainingTask, budget: DeviceBudget) -> Plan:
        planned.append((task, original(task, budget)))
        return planned[-1][1]

    monkeypatch.setattr(training_script(), "plan_training", noted)
    shared = ["--pretrained_model_name_or_path", MINIATURE, "--device", "cpu", "--vram_budget_gib", 4, "--plan"]
    for words in ([], [*BUCKETS, "--bucket_max", 512], [*BUCKETS, "--bucket_max", 256]):
        result = script(TRAINING_SCRIPT, *shared, "--resolution", 256, *words, "--output_dir", tmp_path)
        assert result.code == 0, result.err
    assert [task.shape.latent_size for task, _ in planned] == [(32, 32)] * 3
    assert [task.shape.enclosing_size for task, _ in planned] == [(32, 32), (64, 64), (32, 32)]
    weights = [plan.forecast.largest.parts["weights"] for _, plan in planned]
    assert [size - weights[0] for size in weights] == [0, 4 * 256 * (32**2 - 16**2), 0]


def test_the_miniature_trains_on_mixed_shapes(script: Script, tmp_path: Path) -> None:
    """All of it, from the pictures on; smaller batches too. The printed command is the one that trains."""
    save_pictures(tmp_path / "pictures", [(200, 130), (150, 150), (90, 140), (300, 200)])
    model = ["--pretrained_model_name_or_path", MINIATURE, "--instance_data_dir", tmp_path / "pictures"]
    model += ["--device", "cpu"]
    text = ["--instance_prompt", "a photo of sks fish", "--max_sequence_length", 20]
    assert script("compute_embeddings", *model, *text, "--output_path", tmp_path / "e.parquet").code == 0
    crops = ["--resolution", 64, *BUCKETS, "--bucket_step", 16, "--bucket_no_upscale"]
    made = script("precompute_latents", *model, *crops, "--output_path", tmp_path / "latents")
    assert made.code == 0, made.err
    assert "--resolution 64 --use_aspect_ratio_bucket --bucket_step 16 --bucket_no_upscale" in made.out
    stage_one = Flags([*model, "--data_df_path", tmp_path / "e.parquet", "--latents_path", tmp_path / "latents"])
    words = ["--seed", 0, "--report_to", "none", "--train_batch_size", 2, "--max_train_steps", 4]
    run = train(script, stage_one, tmp_path / "out", *crops, *words)
    assert "4 pictures at 64 px (1 of 48x80, 1 of 64x64, 2 of 80x48)" in run.out
    assert len(run.losses) == 4
    assert (run.folder / LORA_FILE).is_file()
