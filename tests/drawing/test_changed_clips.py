"""Drawing with LoRAs that change the CLIPs: the stock pipeline's pictures, each variant with embeddings of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.lora_keys import CLIPS

import numpy as np
import pytest
import torch
from conftest import PROMPT, Prepared
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loras import LAYERS, Script
from transformers import CLIPTextModelWithProjection, T5EncoderModel


def base_flags(prepared: Prepared, outdir: Path) -> list[object]:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    return [*flags, "--outdir", outdir, "--num_steps", 3, "--max_sequence_length", 20, "--device", "cpu"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def saved(folder: Path, model: Path, transformer: bool = True) -> Path:
    """A strong LoRA of both CLIPs in diffusers' names, and of the transformer if asked for."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def add(prefix: str, weight: torch.Tensor) -> None:
        tensors[f"{prefix}.lora_A.weight"] = 0.5 * torch.randn(2, weight.shape[1], generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = 0.5 * torch.randn(len(weight), 2, generator=generator)

    for clip in CLIPS:
        for name, weight in load_file(model / clip / "model.safetensors").items():
            if name.endswith(("_proj.weight", "fc1.weight")):
                add(f"{clip}.{name.removesuffix('.weight')}", weight)
    weights = load_file(next((model / "transformer").glob("*.safetensors")))
    for name in LAYERS if transformer else ():
        add(f"transformer.{name}", weights[f"{name}.weight"])
    folder.mkdir()
    save_file(tensors, folder / LORA_FILE)
    return folder


def draw(script: Script, prepared: Prepared, outdir: Path, *words: object) -> dict[str, np.ndarray]:
    """By the file's name, the first prompt's pictures."""
    result = script("inference", *base_flags(prepared, outdir), "--prompt", PROMPT, *words)
    assert result.code == 0, result.err
    return {path.name: pixels(path) for path in outdir.glob("000*/*.png")}


@pytest.mark.parametrize("transformer", [True, False], ids=["with the transformer", "the CLIPs alone"])
def test_the_picture_is_the_stock_pipelines(
    script: Script, prepared: Prepared, tmp_path: Path, transformer: bool
) -> None:
    """Of prompts that the parquet has, and of one that it lacks."""
    from sd3_lora.drawing.pictures import plan_pictures

    lora = saved(tmp_path / "lora", prepared.model, transformer)
    pipeline = StableDiffusion3Pipeline.from_pretrained(prepared.model)
    pipeline.set_progress_bar_config(disable=True)

    def stock(prompt: str) -> np.ndarray:
        (plan,) = plan_pictures(tmp_path, [prompt], 1, {"seed": 0})
        settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 20, "output_type": "np"}
        latents = plan.noise((16, 8, 8))[None]
        (picture,) = pipeline(prompt, negative_prompt="blurry", latents=latents, height=64, width=64, **settings).images
        return (picture * 255).round().astype(int)

    prompts = [PROMPT, "a robot in a forest"]
    before = [stock(prompt) for prompt in prompts]
    pipeline.load_lora_weights(lora)
    words = ["--negative_prompt", "blurry", "--guidance", 4, "--lora", lora, "--prompt", prompts[1]]
    draw(script, prepared, tmp_path / "out", *words)
    for prompt, folder, plain in zip(prompts, sorted((tmp_path / "out").glob("0*")), before, strict=True):
        expected = stock(prompt)
        assert np.abs(pixels(folder / "img_00.png") - expected).max() <= 2
        assert np.abs(plain - expected).mean() > 3


def test_t5_is_read_and_the_clips_run(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5's part comes from the parquet; what it has of the CLIPs changes nothing. Without effect, none is loaded."""
    import inference

    lora = saved(tmp_path / "lora", prepared.model)
    expected = draw(script, prepared, tmp_path / "a", "--lora", lora)["img_00.png"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", refuse)
    read_known = inference.read_known

    def without_clips(*args: Any) -> Any:
        tokens, known = 77, read_known(*args)
        for prompt_embeds, pooled in known.values():
            prompt_embeds[:tokens] = pooled[:] = 7
        return known

    monkeypatch.setattr(inference, "read_known", without_clips)
    assert np.array_equal(draw(script, prepared, tmp_path / "b", "--lora", lora)["img_00.png"], expected)
    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", refuse)
    with pytest.raises(AssertionError, match="it was loaded"):
        draw(script, prepared, tmp_path / "c", "--lora", lora)
    draw(script, prepared, tmp_path / "d", "--lora", lora, "--lora_scale", 0)


def test_variants_have_their_own_embeddings(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """A sweep with the base beside it draws what each strength draws alone."""
    lora = saved(tmp_path / "lora", prepared.model)
    swept = draw(script, prepared, tmp_path / "all", "--lora", lora, "--lora_scale", 0.5, 1, "--compare")
    alone = {
        "img_00_base.png": draw(script, prepared, tmp_path / "base")["img_00.png"],
        **{
            f"img_00_scale{scale:g}.png": draw(
                script, prepared, tmp_path / f"{scale}", "--lora", lora, "--lora_scale", scale
            )["img_00.png"]
            for scale in (0.5, 1.0)
        },
    }
    assert swept.keys() == alone.keys()
    for name, picture in swept.items():
        assert np.array_equal(picture, alone[name]), name
    assert np.abs(alone["img_00_scale0.5.png"] - alone["img_00_scale1.png"]).mean() > 1


def test_with_another_lora(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """One of the CLIPs alone and one of the transformer alone are what one file with both is."""
    both = saved(tmp_path / "both", prepared.model)
    tensors = load_file(both / LORA_FILE)
    paths = {}
    for name in ("text_encoder", "transformer"):
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file({key: tensor for key, tensor in tensors.items() if key.startswith(name)}, paths[name])
    words = ["--lora", paths["text_encoder"], "--lora", paths["transformer"]]
    together = draw(script, prepared, tmp_path / "two", *words, "--stream_blocks", 2)["img_00.png"]
    assert np.array_equal(together, draw(script, prepared, tmp_path / "one", "--lora", both)["img_00.png"])
    again = script("inference", *base_flags(prepared, tmp_path / "one"), "--prompt", PROMPT, "--lora", both)
    assert "1 of them drawn before" in again.out


@pytest.mark.parametrize("transformer", [True, False], ids=["with the transformer", "the CLIPs alone"])
def test_merged_and_exported_they_draw_the_same(
    script: Script, prepared: Prepared, tmp_path: Path, transformer: bool
) -> None:
    lora = saved(tmp_path / "lora", prepared.model, transformer)
    expected = draw(script, prepared, tmp_path / "out", "--lora", lora)["img_00.png"]
    model = ["--pretrained_model_name_or_path", prepared.model]
    for form in ("kohya", "a1111"):
        exported = tmp_path / f"{form}.safetensors"
        assert script("sd3_lora.export", lora, "--format", form, "--output", exported, *model).code == 0
        found = draw(script, prepared, tmp_path / form, "--lora", exported)["img_00.png"]
        assert np.abs(found - expected).max() <= 1
    merged = tmp_path / "merged"
    result = script("sd3_lora.merge", lora, "--output_dir", merged, *model)
    assert result.code == 0, result.err
    words = shlex.split(next(line for line in result.out.splitlines() if line.startswith("next: ")))[3:]
    own = ["--prompt", PROMPT, "--num_steps", 3, "--max_sequence_length", 20, "--device", "cpu"]
    assert script("inference", *words, *own, "--outdir", tmp_path / "one").code == 0
    assert np.abs(pixels(tmp_path / "one" / "000_a-photo-of-sks-robot" / "img_00.png") - expected).max() <= 1
    for name in ("vae", "text_encoder_3"):
        (path,) = (merged / name).glob("*.safetensors")
        assert path.samefile(prepared.model / name / path.name)
    StableDiffusion3Pipeline.from_pretrained(merged)


@pytest.mark.parametrize("command", ["losses", "training"])
def test_commands_that_do_not_apply_it(script: Script, prepared: Prepared, tmp_path: Path, command: str) -> None:
    lora = saved(tmp_path / "lora", prepared.model)
    words = [*prepared.flags[:-4], "--output_dir", tmp_path / "out"]  # without trackers and seed
    if command == "losses":
        result = script("sd3_lora.losses", *words, "--lora", lora)
    else:
        result = script("train_dreambooth_sd3_lora_miniature", *words, "--init_lora", lora)
    assert result.code == 2, result.out + result.err
    assert "has LoRA layers of text encoders" in result.err
    assert "does not apply" in result.err
