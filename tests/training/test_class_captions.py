"""Class pictures with prompts of their own: drawn of the prompts of a file, and trained on with their captions."""

from __future__ import annotations

import json
from pathlib import Path

from sd3_lora.stage_one.captions import class_images
from sd3_lora.stage_one.embedding_store import EmbeddingStore

import pytest
import torch
from conftest import TRAINING_SCRIPT, Prepared, save_pictures
from PIL import Image
from training_runs import Script, train, watch_batches

CLASS_PROMPT, PROMPTS = "a photo of a robot", ["a red ball", "a green heart"]


def embed(script: Script, private: Prepared, *more: object) -> None:
    words = ["--pretrained_model_name_or_path", private.model, "--instance_data_dir", private.pictures]
    words += ["--instance_prompt", "a photo of sks robot", "--class_prompt", CLASS_PROMPT, "--device", "cpu"]
    result = script("compute_embeddings", *words, "--output_path", private.embeddings, "--overwrite", *more)
    assert result.code == 0, result.err


def test_captions_beside_class_pictures(tmp_path: Path) -> None:
    """A picture without one has the class prompt; without the flag all have it."""
    folder = tmp_path / "robots"
    save_pictures(folder, [(64, 64)] * 3, seed=1)
    first, second, _ = sorted(folder.glob("*.png"))
    first.with_suffix(".txt").write_text("a red ball\n")
    second.with_suffix(".txt").write_text("b\na\n")
    found = class_images(folder, CLASS_PROMPT, 3, has_captions=True)
    assert [image.prompts for image in found] == [("a red ball",), ("a", "b"), (CLASS_PROMPT,)]
    assert {image.role for image in found} == {"class"}
    assert [image.prompts for image in class_images(folder, CLASS_PROMPT, 3)] == [(CLASS_PROMPT,)] * 3


def test_drawn_in_turn_and_trained_on(script: Script, private: Prepared, tmp_path: Path) -> None:
    folder, file = tmp_path / "robots", tmp_path / "prompts.txt"
    file.write_text("# things\n" + "\n".join(PROMPTS) + "\n")
    folder.mkdir()
    (folder / "class_0001.txt").write_text("mine\n")  # another's caption: the name is not taken
    embed(script, private, "--class_prompts_file", file)
    with EmbeddingStore(private.embeddings) as store:
        assert store.prompts_with_role("class") == (CLASS_PROMPT,)
        assert sorted(store.prompts_with_role("class_caption")) == sorted(PROMPTS)
    words = ["--pretrained_model_name_or_path", private.model, "--class_prompt", CLASS_PROMPT, "--device", "cpu"]
    words += ["--class_data_dir", folder, "--latents_path", private.latents, "--data_df_path", private.embeddings]
    words += ["--num_steps", 1, "--class_prompts_file", file]
    for count in (1, 3):  # as after an interruption
        result = script("draw_class_pictures", *words, "--num_class_images", count)
        assert result.code == 0, result.err
    captions = {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}
    assert captions == {
        "class_0000": "a red ball\n",
        "class_0001": "mine\n",
        "class_0002": "a red ball\n",
        "class_0003": "a green heart\n",
    }
    with Image.open(folder / "class_0003.png") as picture:
        assert json.loads(picture.text["sd3_lora"])["prompt"] == "a green heart"  # type: ignore[attr-defined]

    prior = ["--with_prior_preservation", "--class_prompt", CLASS_PROMPT, "--class_data_dir", folder]
    prior += ["--num_class_images", 3, "--max_train_steps", 1]
    plain = train(script, private, tmp_path / "plain", *prior)
    assert "3 class pictures of" in plain.out
    assert "add --class_captions to train on their captions" in plain.out
    own = train(script, private, tmp_path / "own", *prior, "--class_captions", "--class_prompts_file", file)
    assert "--class_captions" not in own.out
    assert own.losses[0]["loss"] != plain.losses[0]["loss"]
    for path in folder.glob("*.txt"):
        path.write_text(f"{CLASS_PROMPT}\n")
    same = train(script, private, tmp_path / "same", *prior, "--class_captions")
    assert same.losses[0]["loss"] == plain.losses[0]["loss"]
    (folder / "class_0002.txt").write_text("not embedded\n")
    result = script("compute_embeddings", "--class_captions")
    assert result.code == 2
    assert "--class_captions needs the folder of the class pictures: type --class_data_dir FOLDER" in result.err
    embed(script, private, "--class_captions", "--class_data_dir", folder)
    with EmbeddingStore(private.embeddings) as store:
        assert "not embedded" in store.prompts_with_role("class_caption")


def save_named(folder: Path, sizes: list[tuple[int, int]], captions: dict[int, str], seed: int) -> None:
    """Pictures named after their folder, and captions beside some."""
    save_pictures(folder, sizes, seed=seed)
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        path.rename(folder / f"{folder.name}{number}.png")
        if number in captions:
            (folder / f"{folder.name}{number}.txt").write_text(captions[number])


def pairs_trained_on(
    script: Script, words: list[object], prior: list[object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, set[str]], set[tuple[int, ...]], str]:
    """Picture → the prompts that it came with, the shapes of the micro-batches, and what was printed."""
    seen = watch_batches(monkeypatch)
    embeddings = folder / "embeddings.parquet"
    places = ["--data_df_path", embeddings, "--latents_path", folder / "latents", "--output_dir", folder / "out"]
    result = script(TRAINING_SCRIPT, *words, *prior, *places, "--report_to", "none", "--with_prior_preservation")
    assert result.code == 0, result.err
    with EmbeddingStore(embeddings) as store:
        pooled = {prompt: store.read(prompt).pooled_prompt_embeds.float() for prompt in store.prompts}
    used: dict[str, set[str]] = {}
    for inputs, names in seen:
        for name, row in zip(names, inputs.pooled_prompt_embeds.float(), strict=True):
            used.setdefault(name, set()).update(p for p, known in pooled.items() if torch.equal(known, row))
    return used, {tuple(inputs.latents.shape) for inputs, _ in seen}, result.out


def concepts_in(folder: Path, class_sizes: list[tuple[int, int]]) -> list[object]:
    """The flag of a list of a dog and a cat in two shapes each, with class folders; one class picture has a caption."""
    entries = []
    for seed, name in enumerate(("dog", "cat")):
        save_named(folder / name, [(64, 64), (96, 64)], {}, seed)
        save_named(folder / f"{name}s", class_sizes, {0: f"a {name} on grass"}, 10 + seed)
        subject = {"instance_prompt": f"a photo of sks {name}", "instance_data_dir": str(folder / name)}
        entries.append({**subject, "class_prompt": f"a {name}", "class_data_dir": str(folder / f"{name}s")})
    (folder / "concepts.json").write_text(json.dumps(entries))
    return ["--concepts_list", folder / "concepts.json"]


@pytest.mark.parametrize("is_in_buckets", [False, True], ids=["squares", "buckets"])
def test_with_several_concepts(
    script: Script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str],
    is_in_buckets: bool,
) -> None:  # fmt: skip
    """Each class picture comes with its own caption, or else with the class prompt of its own concept."""
    words: list[object] = ["--pretrained_model_name_or_path", tiny_sd3, "--device", "cpu"]
    words += concepts_in(tmp_path, [(64, 64), (96, 64)])
    buckets = ["--use_aspect_ratio_bucket"] if is_in_buckets else []
    places = {"compute_embeddings": tmp_path / "embeddings.parquet", "precompute_latents": tmp_path / "latents"}
    for name, more in (("compute_embeddings", ["--class_captions"]), ("precompute_latents", buckets)):
        result = script(name, *words, *more, "--output_path", places[name])
        assert result.code == 0, result.err
    prior: list[object] = ["--num_class_images", 2, "--max_train_steps", 8, "--class_captions", *buckets]
    used, shapes, out = pairs_trained_on(script, words, prior, tmp_path, monkeypatch)
    assert "4 pictures and 4 class pictures" in out
    assert "which is not read" not in out
    assert used == {
        **{f"{name}{number}.png": {f"a photo of sks {name}"} for name in ("dog", "cat") for number in (0, 1)},
        **{f"{name}s0.png": {f"a {name} on grass"} for name in ("dog", "cat")},
        **{f"{name}s1.png": {f"a {name}"} for name in ("dog", "cat")},
    }
    assert len(shapes) == (2 if is_in_buckets else 1)
    assert set(in_process) == {"precompute_latents"}  # of the class pictures


def test_drawn_for_each_concept_in_its_shapes(
    script: Script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    """What is missing is drawn of the file's prompts, beside a picture with another caption, and trained on."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words: list[object] = ["--pretrained_model_name_or_path", tiny_sd3, "--device", "cpu"]
    words += concepts_in(tmp_path, [(64, 64)])
    prompts: list[object] = ["--class_captions", "--class_prompts_file", tmp_path / "prompts.txt"]
    buckets = ["--use_aspect_ratio_bucket"]
    places = {"compute_embeddings": tmp_path / "embeddings.parquet", "precompute_latents": tmp_path / "latents"}
    for name, more in (("compute_embeddings", prompts), ("precompute_latents", buckets)):
        result = script(name, *words, *more, "--output_path", places[name])
        assert result.code == 0, result.err
    prior = ["--num_class_images", 3, "--max_train_steps", 12, *prompts, *buckets]
    used, shapes, out = pairs_trained_on(script, words, prior, tmp_path, monkeypatch)
    assert "4 pictures and 6 class pictures" in out, out
    assert {name: used[f"{name}s0.png"] for name in ("dog", "cat")} == {
        name: {f"a {name} on grass"} for name in ("dog", "cat")
    }
    drawn = set().union(*(each for name, each in used.items() if name.startswith("class_")))
    assert drawn == set(PROMPTS)
    assert len(shapes) == 2
    assert in_process.count("draw_class_pictures") >= 2


@pytest.mark.parametrize("script_name", ["train_dreambooth_sd3_lora_miniature"])
def test_a_file_of_prompts_needs_captions(script: Script, script_name: str, tmp_path: Path) -> None:
    words = ["--with_prior_preservation", "--class_prompt", "a", "--class_data_dir", tmp_path]
    result = script(script_name, *words, "--class_prompts_file", "p.txt")
    assert result.code == 2
    assert "--class_prompts_file needs --class_captions" in result.err
