"""Training on augmented variants: which are drawn, how often, and what is refused."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from sd3_lora.stage_one.crop_boxes import number_of_variant, plain_variant
from sd3_lora.stage_one.latent_cache import LatentCache
from sd3_lora.training.dataset import TrainingData, augmented_counts
from sd3_lora.transformer.lora import LORA_FILE

import pytest
from conftest import Prepared, save_pictures
from training_runs import Script, private_copy, same_lora, train


@pytest.fixture(scope="module")
def augmented(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The finished stage one with two augmented variants of each crop."""
    import precompute_latents

    stage_one = private_copy(prepared, tmp_path_factory.mktemp("augmented"))
    assert precompute_latents.main(latents_of(stage_one, "--num_augmented", 2)) == 0
    return stage_one


def latents_of(stage_one: Prepared, *words: object) -> list[str]:
    """The command that makes its latents."""
    model = ["--pretrained_model_name_or_path", stage_one.model, "--instance_data_dir", stage_one.pictures]
    return [str(word) for word in [*model, "--device", "cpu", "--output_path", stage_one.latents, *words]]


def test_each_variant_comes_equally_often(
    script: Script, augmented: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted over 1,500 pictures: each of nine variants of a crop's three, within four standard deviations."""
    counts: dict[str, Counter[str]] = {}
    original = TrainingData.batch

    def counting(data: TrainingData, indices: Any, draws: Any, *more: Any) -> Any:
        for index, draw in zip(indices, draws.tolist(), strict=True):
            image_id = data.images[index].image_id
            variants = data.variants[image_id]
            counts.setdefault(image_id, Counter())[variants[int(draw * len(variants))]] += 1
        return original(data, indices, draws, *more)

    monkeypatch.setattr(TrainingData, "batch", counting)
    small = ["--lora_blocks", 0, "--lora_layers", "attn.to_k", "--rank", 1]
    train(script, augmented, tmp_path, *small, "--train_batch_size", 15, "--max_train_steps", 100)
    cache = {path.stem: path for path in augmented.latents.glob("*.safetensors")}
    assert counts.keys() == cache.keys()
    for counted in counts.values():
        total, kinds = counted.total(), len(counted)
        assert total == 300
        assert kinds == 3 * len({plain_variant(name) for name in counted})
        expected = total / kinds
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counted.values())


def test_what_is_cached_is_trained_on_unless_told(
    script: Script, augmented: Prepared, prepared: Prepared, tmp_path: Path
) -> None:
    """0 leaves them out, with the bits of a cache without; 1 takes the first of each crop."""
    runs = {
        name: train(script, augmented, tmp_path / name, *words)
        for name, words in (("all", []), ("none", ["--num_augmented", 0]), ("one", ["--num_augmented", 1]))
    }
    plain = train(script, prepared, tmp_path / "plain")
    assert runs["none"].losses == plain.losses
    assert len({tuple(line["loss"] for line in run.losses) for run in runs.values()}) == 3
    pictures = json.loads((tmp_path / "one" / "checkpoint-3" / "pictures.json").read_text())
    for picture in pictures:
        assert augmented_counts(picture["crops"]) == {1}
        assert {number_of_variant(name) for name in picture["crops"]} == {0, 1}
    ranges = ["--num_augmented", 2, "--rotation_degrees", 5, "--brightness_range", 0.1]
    assert train(script, augmented, tmp_path / "named", *ranges).losses == runs["all"].losses


def test_a_resumed_run_is_bit_identical(script: Script, augmented: Prepared, tmp_path: Path) -> None:
    words = ["--num_augmented", 2, "--train_batch_size", 2]
    whole = train(script, augmented, tmp_path / "whole", *words, "--max_train_steps", 6)
    train(script, augmented, tmp_path / "parts", *words, "--max_train_steps", 4)
    again = ["--max_train_steps", 6, "--resume_from_checkpoint", "latest"]
    parts = train(script, augmented, tmp_path / "parts", *words, *again)
    assert same_lora(whole.folder / LORA_FILE, parts.folder / LORA_FILE)
    assert whole.losses == parts.losses
    refused = train(script, augmented, tmp_path / "parts", "--num_augmented", 0, *again, code=2)
    assert "on other crops of 00.png, 01.png" in refused.error
    assert "--num_augmented and --bucket_ flags of then" in refused.error


def test_a_mix_is_refused(script: Script, augmented: Prepared, prepared: Prepared, tmp_path: Path) -> None:
    """A picture that was added without; then one whose variants differ by other amounts. The commands mend it."""
    stage_one = private_copy(augmented, tmp_path / "stage_one")
    embeddings = ["--pretrained_model_name_or_path", stage_one.model, "--instance_data_dir", stage_one.pictures]
    embeddings += [
        "--instance_prompt",
        "a photo of sks robot",
        "--output_path",
        stage_one.embeddings,
        "--device",
        "cpu",
    ]
    save_pictures(tmp_path / "new", [(64, 80)], seed=8)[0].rename(stage_one.pictures / "new.png")
    assert script("compute_embeddings", *embeddings, "--max_sequence_length", 20).code == 0
    assert script("precompute_latents", *latents_of(stage_one)).code == 0
    refused = train(script, stage_one, tmp_path / "a", code=2)
    assert f"{stage_one.latents} has 0 augmented variants of a crop of new.png, not 2: type `python" in refused.error
    assert refused.error.endswith("or --num_augmented 0 to train without")
    train(script, stage_one, tmp_path / "without", "--num_augmented", 0)
    assert script("precompute_latents", *shlex.split(refused.error.split("`")[1])[2:]).code == 0
    train(script, stage_one, tmp_path / "a")


def test_other_amounts_are_refused(script: Script, augmented: Prepared, tmp_path: Path) -> None:
    stage_one = private_copy(augmented, tmp_path / "stage_one")
    (path,) = (
        path for path in stage_one.latents.glob("*.safetensors") if source_of(stage_one.latents, path) == "02.png"
    )
    path.unlink()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "02.png").write_bytes((stage_one.pictures / "02.png").read_bytes())
    words = latents_of(Prepared(stage_one.model, alone, stage_one.embeddings, tmp_path / "others"))
    assert script("precompute_latents", *words, "--num_augmented", 2, "--rotation_degrees", 9).code == 0
    (tmp_path / "others" / path.name).rename(path)
    refused = train(script, stage_one, tmp_path / "a", code=2)
    assert "augmented otherwise than those of other pictures: type `python precompute_latents.py" in refused.error
    assert script("precompute_latents", *shlex.split(refused.error.split("`")[1])[2:]).code == 0
    train(script, stage_one, tmp_path / "a")
    refused = train(script, stage_one, tmp_path / "b", "--num_augmented", 2, "--rotation_degrees", 30, code=2)
    assert "not 30: type `python precompute_latents.py" in refused.error
    assert "--num_augmented 2 --rotation_degrees 30" in refused.error
    assert script("precompute_latents", *shlex.split(refused.error.split("`")[1])[2:]).code == 0
    train(script, stage_one, tmp_path / "b", "--num_augmented", 2, "--rotation_degrees", 30)


def source_of(folder: Path, path: Path) -> str | None:
    """The name of a cached picture."""
    return LatentCache(folder, None).source(path.stem)  # type: ignore[arg-type]


def test_missing_variants_and_those_of_new_twins(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Asked for, they are missing; mirrored twins that were cached later lack theirs."""
    stage_one = private_copy(prepared, tmp_path / "stage_one")
    refused = train(script, stage_one, tmp_path / "a", "--num_augmented", 1, code=2)
    assert "has 0 augmented variants of a crop of" in refused.error
    assert script("precompute_latents", *shlex.split(refused.error.split("`")[1])[2:]).code == 0
    train(script, stage_one, tmp_path / "a", "--num_augmented", 1)
    assert script("precompute_latents", *latents_of(stage_one, "--random_flip")).code == 0
    train(script, stage_one, tmp_path / "b", "--random_flip", "no")
    refused = train(script, stage_one, tmp_path / "c", code=2)
    assert "has 0 augmented variants of a crop of" in refused.error
    assert script("precompute_latents", *shlex.split(refused.error.split("`")[1])[2:]).code == 0
    train(script, stage_one, tmp_path / "c")


def test_latents_are_made_on_the_way(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """By a training command alone, masks and class pictures beside them, which are not augmented."""
    save_pictures(tmp_path / "class", [(64, 64)] * 2, seed=9)
    words = ["--num_augmented", 1, "--rotation_degrees", 7, "--latents_path", tmp_path / "latents"]
    words += ["--with_prior_preservation", "--class_prompt", "a photo of a robot", "--num_class_images", 2]
    run = train(script, prepared, tmp_path / "out", *words, "--class_data_dir", tmp_path / "class")
    assert len(run.losses) == 3
    record = json.loads((tmp_path / "latents" / "run.json").read_text())
    assert (record["flags"]["num_augmented"], record["flags"]["rotation_degrees"]) == (1, 7.0)
