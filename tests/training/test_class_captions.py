"""Class pictures with prompts of their own: drawn of the prompts of a file, and trained on with their captions."""

from __future__ import annotations

import json
from pathlib import Path

from sd3_lora.stage_one.captions import class_images
from sd3_lora.stage_one.embedding_store import EmbeddingStore

import pytest
from conftest import Prepared, save_pictures
from PIL import Image
from training_runs import Script, train

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


@pytest.mark.parametrize("script_name", ["train_dreambooth_sd3_lora_miniature"])
def test_a_file_of_prompts_needs_captions(script: Script, script_name: str, tmp_path: Path) -> None:
    words = ["--with_prior_preservation", "--class_prompt", "a", "--class_data_dir", tmp_path]
    result = script(script_name, *words, "--class_prompts_file", "p.txt")
    assert result.code == 2
    assert "--class_prompts_file needs --class_captions" in result.err
