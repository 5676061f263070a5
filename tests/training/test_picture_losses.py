"""`python -m sd3_lora.losses`: each picture's loss at fixed noise, and which picture or caption stands out."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import sd3_lora.losses as command
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.gpu.budget import BudgetTooSmall
from sd3_lora.plan.step_memory import DenoisingShape
from sd3_lora.stage_one.crop_boxes import crop_boxes
from sd3_lora.training.data_flags import DataConfig
from sd3_lora.training.picture_losses import FixedNoise, PictureLoss, distinct_names, ranked, robust_scores

import numpy as np
import pytest
import torch
from conftest import PROJECT, PROMPT, Prepared, Result, save_pictures
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from training_runs import Script, train

SCRIPT = "sd3_lora.losses"


def data_flags(stage_one: Prepared) -> list[object]:
    """Without those that are of training alone."""
    words = list(stage_one.flags)
    return words[: words.index("--report_to")]


def measure(script: Script, folder: Path, *words: object, code: int = 0) -> tuple[list[dict[str, Any]], Result]:
    """The pictures of the file that it wrote, and what it printed."""
    result = script(SCRIPT, "--device", "cpu", "--output_dir", folder, *words)
    assert result.code == code, result.out + result.err
    path = folder / command.LOSSES_FILE
    assert path.is_file() == (code == 0)
    return (json.loads(path.read_text(encoding="utf-8"))["pictures"] if code == 0 else []), result


def plain_loss(stage_one: Prepared, name: str, prompt: str, level: int, levels: int, seed: int) -> float:
    """One picture's loss at one level, as the paper has it."""
    from sd3_lora.stage_one.embedding_store import EmbeddingStore

    transformer = SD3Transformer2DModel.from_pretrained(stage_one.model / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(stage_one.model / "scheduler")
    config = json.loads((stage_one.model / "vae" / "config.json").read_text())
    path = stage_one.pictures / name
    (box,) = crop_boxes(*Image.open(path).size, PictureSize.square(64), num_crops=1, flip=False)
    tensors = load_file(stage_one.latents / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors")
    (mean,) = (tensor for key, tensor in tensors.items() if box.name in key and "mean" in key)
    latents = (mean.float() - config["shift_factor"]) * config["scaling_factor"]
    row = int((level + 0.5) * 1000 / levels)
    sigma, noise = scheduler.sigmas[row], torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    with EmbeddingStore(stage_one.embeddings) as store:
        embedding = store.read(prompt)
    with torch.no_grad():
        velocity = transformer(
            ((1 - sigma) * latents + sigma * noise)[None],
            encoder_hidden_states=embedding.prompt_embeds[None].float(),
            pooled_projections=embedding.pooled_prompt_embeds[None].float(),
            timestep=scheduler.timesteps[row][None],
        ).sample[0]
    return float(((velocity - (noise - latents)) ** 2).mean())


def test_the_losses_are_those_of_a_plain_loop(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    words = [*data_flags(prepared), "--num_crops", 1, "--noise_levels", 3, "--seed", 7, "--batch_size", 4]
    pictures, result = measure(script, tmp_path, *words)
    assert len({picture["image_id"] for picture in pictures}) == 5
    for picture in pictures[:2]:
        for level in range(3):
            for key, prompt in (("losses", PROMPT), ("without_caption", "")):
                expected = plain_loss(prepared, picture["name"], prompt, level, 3, 7)
                assert picture[key][level] == pytest.approx(expected, rel=1e-4)
        assert picture["loss"] == pytest.approx(np.mean(picture["losses"]))
        assert picture["caption_gain"] == pytest.approx(np.mean(picture["without_caption"]) - picture["loss"])
    assert f"wrote {tmp_path / command.LOSSES_FILE}" in result.out
    again, _ = measure(script, tmp_path / "again", *words[:-1], 64)
    for one, other in zip(pictures, again, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)


def test_a_wrong_caption_and_a_broken_picture_rank_first(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the miniature: one of five captions names another background, and a sixth picture is noise."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PROJECT / "examples" / "robot", "robot")
    captions = Path("robot/metadata.jsonl")
    wrong = "a photo of a large sks robot at the top on a plain green background"
    text = captions.read_text().replace("a photo of a large sks robot at the top on a pink background", wrong)
    assert wrong in text
    noise = {"file_name": "06.png", "text": "a photo of a medium sks robot in the middle on a plain red background"}
    captions.write_text(text.rstrip("\n") + f"\n{json.dumps(noise)}\n")
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("robot/06.png")
    for name in ("compute_embeddings", "precompute_latents"):
        assert script(name, "--instance_data_dir", "robot", "--device", "cpu").code == 0
    pictures, result = measure(script, tmp_path / "out", "--instance_data_dir", "robot")
    assert {picture["name"] for picture in pictures[:2]} == {"05.jpg", "06.png"}
    said = {picture["name"]: picture["suspicions"] for picture in pictures}
    assert said.pop("05.jpg") == [
        f"05.jpg: read its caption {wrong!r}, which helps far less than those of the others do"
    ]
    (of_noise,) = said.pop("06.png")
    assert of_noise.startswith("06.png: look at the picture, which may be broken or of something else")
    assert not any(said.values())
    assert of_noise in result.out
    lines = [line.split()[0] for line in result.out.splitlines() if line[:2].isdigit() and ": " not in line]
    assert lines == [picture["name"] for picture in pictures]


def test_it_takes_the_data_of_a_run_and_its_lora(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    run = train(script, prepared, tmp_path / "run", "--learning_rate", 0.1)
    before = (run.folder / "run.json").read_bytes()
    plain, _ = measure(script, run.folder)
    assert {picture["caption"] for picture in plain} == {PROMPT}
    trained, _ = measure(script, run.folder, "--lora", run.folder)
    assert {p["image_id"]: p["loss"] for p in plain} != {p["image_id"]: p["loss"] for p in trained}
    assert (run.folder / "run.json").read_bytes() == before


def test_what_is_typed_wins_over_the_run(tmp_path: Path) -> None:
    flags = {"instance_data_dir": "dog", "instance_prompt": "a dog", "data_df_path": "e", "random_flip": True}
    flags |= {"pretrained_model_name_or_path": "x/y", "revision": "abc"}
    (tmp_path / "run.json").write_text(json.dumps({"flags": flags}))
    assert command.as_in_run(DataConfig(), tmp_path) == DataConfig(
        instance_data_dir="dog", instance_prompt="a dog", data_df_path="e", random_flip=True
    )
    assert command.as_in_run(DataConfig(concepts_list="c.json", random_flip=False), tmp_path) == DataConfig(
        concepts_list="c.json", data_df_path="e", random_flip=False
    )
    assert command.as_in_run(ModelConfig(), tmp_path) == ModelConfig("x/y", "abc")
    assert command.as_in_run(ModelConfig("z/w"), tmp_path) == ModelConfig("z/w")
    assert command.as_in_run(DataConfig(), tmp_path / "nothing") == DataConfig()


def test_the_plan_is_drawings(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """A sentence where not even one row fits, with the budget that would do."""
    words = [*data_flags(prepared), "--device", "cpu", "--output_dir", tmp_path / "out"]
    whole = script(SCRIPT, *words, "--vram_budget_gib", 4, "--plan")
    assert whole.code == 0, whole.err
    assert "; 16 rows together" in whole.out
    assert "predicted peak: " in whole.out
    small = script(SCRIPT, *words, "--vram_budget_gib", 0.76)
    assert small.code == 2
    assert small.err.startswith("error: the budget is too small for one picture: type --vram_budget_gib 0.")
    needed = float(small.err.split("--vram_budget_gib ")[1].split(",")[0])
    fits = script(SCRIPT, *words, "--vram_budget_gib", needed, "--plan")
    assert fits.code == 0, fits.err
    assert not (tmp_path / "out").exists()


def test_shapes_and_several_captions(script: Script, tiny_sd3: Path, tmp_path: Path) -> None:
    """Each caption is a row; pictures of one shape share their noise."""
    pictures = tmp_path / "pictures"
    save_pictures(pictures, [(64, 64), (64, 64), (128, 64), (128, 64)])
    (pictures / "00.txt").write_text("a dog\na robot\n")
    shared = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", pictures, "--device", "cpu"]
    text, latents = tmp_path / "e.parquet", tmp_path / "latents"
    prompt = ["--instance_prompt", "a cat"]
    assert script("compute_embeddings", *shared, *prompt, "--max_sequence_length", 20, "--output_path", text).code == 0
    bucket = ["--use_aspect_ratio_bucket"]
    assert script("precompute_latents", *shared, *bucket, "--output_path", latents).code == 0
    rows, _ = measure(
        script, tmp_path / "out", *shared, *prompt, *bucket, "--data_df_path", text, "--latents_path", latents
    )
    assert sorted((row["name"], row["caption"]) for row in rows) == [
        ("00.png", "a dog"),
        ("00.png", "a robot"),
        ("01.png", "a cat"),
        ("02.png", "a cat"),
        ("03.png", "a cat"),
    ]


def test_flags_of_drawing_and_weighting_change_nothing_and_are_noted(
    script: Script, prepared: Prepared, tmp_path: Path
) -> None:
    words = [*data_flags(prepared), "--noise_levels", 1]
    plain, result = measure(script, tmp_path / "plain", *words)
    assert "note: " not in result.out
    more = ["--t5_dropout", 0.5, "--masked_loss", "--alpha_mask"]
    noted, result = measure(script, tmp_path / "noted", *words, *more)
    assert "note: --t5_dropout, --masked_loss, --alpha_mask change nothing: each loss is of the whole " in result.out
    assert noted == plain
    _, result = measure(script, tmp_path / "one", *words, "--caption_dropout", 0.1)
    assert "note: --caption_dropout changes nothing: " in result.out


def test_every_flag_that_is_not_read_is_noted() -> None:
    values: dict[str, Any] = dict.fromkeys(command.IDLE_FLAGS, 0.5) | {"masked_loss": True}
    for masks in ({"alpha_mask": True, "mask_data_dir": None}, {"alpha_mask": False, "mask_data_dir": "m"}):
        given = values | masks
        note = command.idle_note(DataConfig(**given)) or ""
        assert all((f"--{name}" in note) == bool(given[name]) for name in command.IDLE_FLAGS)
    assert command.idle_note(DataConfig(instance_data_dir="dog", num_crops=1)) is None


def test_files_of_one_name_are_told_apart(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """Two concepts with the same file names: the table and the file name their folders."""
    paths = [Path(path) for path in ("a/01.png", "b/01.png", "b/02.png", "x/b/03.png", "y/b/03.png")]
    assert distinct_names(paths) == ["a/01.png", "b/01.png", "02.png", "x/b/03.png", "y/b/03.png"]
    assert distinct_names([Path("01.png"), Path("a/01.png")]) == ["01.png", "a/01.png"]
    assert distinct_names([]) == []
    names = sorted(path.name for path in prepared.pictures.glob("*.png"))
    for folder, kept in (("cats", names[:2]), ("dogs", names[2:4])):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(kept):
            shutil.copy(prepared.pictures / name, tmp_path / folder / f"{number}.png")
    concepts = [{"instance_prompt": PROMPT, "instance_data_dir": str(tmp_path / folder)} for folder in ("cats", "dogs")]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    words = [str(word) for word in data_flags(prepared)]
    for flag in ("--instance_data_dir", "--instance_prompt"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    words += ["--concepts_list", str(tmp_path / "concepts.json"), "--noise_levels", "1"]
    pictures, result = measure(script, tmp_path / "out", *words)
    assert sorted(picture["name"] for picture in pictures) == ["cats/0.png", "cats/1.png", "dogs/0.png", "dogs/1.png"]
    assert all(f"\n{picture['name']} " in result.out for picture in pictures)


def test_what_is_missing_is_named_and_nothing_is_written(script: Script, private: Prepared, tmp_path: Path) -> None:
    flags, out = data_flags(private), tmp_path / "out"

    def error(*words: object) -> str:
        _, result = measure(script, out, *words, code=2)
        assert not out.exists()
        assert result.err.count("error: ") == 1
        return result.err

    assert "--lora: there is no nowhere/at/all" in error(*flags, "--lora", "nowhere/at/all")
    assert "--noise_levels" in error(*flags, "--noise_levels", 0)
    assert "unknown argument --max_train_steps" in error(*flags, "--max_train_steps", 3)
    assert "nothing.parquet is not there: type `python compute_embeddings.py" in error(
        *flags, "--data_df_path", tmp_path / "nothing.parquet"
    )
    assert "type `python compute_embeddings.py" in error(*flags, "--instance_prompt", "a prompt that it lacks")
    next(private.latents.glob("*.safetensors")).unlink()
    assert "type `python precompute_latents.py" in error(*flags)


def test_as_it_is_typed(prepared: Prepared, tmp_path: Path) -> None:
    words = ["-m", SCRIPT, *data_flags(prepared), "--device", "cpu", "--output_dir", tmp_path, "--noise_levels", 1]
    result = subprocess.run(
        [sys.executable, *map(str, words)], cwd=PROJECT, check=False, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / command.LOSSES_FILE).is_file()


def test_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them, and half again, until the plan takes them."""
    tried: list[int] = []

    def plan(files: None, shape: DenoisingShape, budget: None, asked: None) -> str:
        tried.append(shape.batch_size)
        if shape.batch_size > 3:
            raise BudgetTooSmall("too small", 2 * 1024**3)
        return "plan"

    monkeypatch.setattr(command, "plan_denoising", plan)
    shape = DenoisingShape(20, (8, 8), 97, torch.float32, 0)
    found: Any = command.plan_forwards(None, shape, None, None)  # type: ignore[arg-type]
    assert found == ("plan", 2)
    assert tried == [20, 10, 5, 2]


# The scores


def test_the_first_line_names_the_command_without_a_model(script: Script, tmp_path: Path) -> None:
    result = script(SCRIPT, "--data_df_path", tmp_path / "missing.parquet", "--output_dir", tmp_path, "--device", "cpu")
    assert result.code == 2
    assert result.out.startswith("no --pretrained_model_name_or_path: sd3_lora.losses runs on the bundled miniature")


def test_robust_scores() -> None:
    assert robust_scores([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx([v / 1.4826 for v in (-2, -1, 0, 1, 97)])
    assert robust_scores([1.0, 1.0, 1.0, 2.0]) == pytest.approx([0, 0, 0, 1 / (1.2533 * 0.25)])
    assert robust_scores([5.0, 5.0]) == [0.0, 0.0]


def test_a_score_of_each_kind() -> None:
    def loss(name: str, with_caption: float, without: tuple[float, float]) -> PictureLoss:
        return PictureLoss(name, name, name, (with_caption, with_caption), without)

    usual = [loss(str(i), 0.5 + 0.01 * i, (0.8, 0.4)) for i in range(5)]
    no_help, broken = loss("no help", 0.6, (0.8, 0.4)), loss("broken", 0.52, (0.2, 1.6))
    first, second, *others = ranked([*usual, no_help, broken])
    assert {first.name, second.name} == {"no help", "broken"}
    scored = {each.name: each for each in (first, second, *others)}
    assert scored["broken"].factor == pytest.approx(4.0)  # a quarter of one median, four times the other
    assert all(each.factor == pytest.approx(1.0) for each in others)
    (of_caption,), (of_picture,) = (list(scored[name].suspicions()) for name in ("no help", "broken"))
    assert "caption" in of_caption
    assert "4.0 times off" in of_picture
    assert not [said for each in others for said in each.suspicions()]


def test_noise_levels_are_spread(miniature_files: Any) -> None:
    from sd3_lora.training.flow import load_noise_table

    table = load_noise_table(miniature_files.read_scheduler_config(), None)
    fixed = FixedNoise(table, 4, 3)
    assert fixed.indices == [125, 375, 625, 875]
    assert torch.equal(fixed.noise((2, 3, 3)), torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(3)))
