"""inference.py: the stock pipeline's pictures, and noise that no batch changes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

from sd3_lora.drawing.contact_sheet import rows_of_run
from sd3_lora.drawing.pictures import folder_name, plan_pictures

import numpy as np
import pytest
import torch
from conftest import PROMPT, TRAINING_SCRIPT, Prepared
from PIL import Image
from safetensors.torch import load_file, save_file
from small_transformer import needs_gpu


@pytest.fixture(scope="module")
def lora(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that visibly changes the tiny model's pictures: lora_B is scaled up by its alpha."""
    import importlib

    folder = tmp_path_factory.mktemp("lora")
    flags = ["--output_dir", folder, "--max_train_steps", 4, "--learning_rate", 0.05, "--lora_alpha", 64]
    assert importlib.import_module(TRAINING_SCRIPT).main([str(word) for word in [*prepared.flags, *flags]]) == 0
    return folder


def base_flags(prepared: Prepared, outdir: Path) -> list[object]:
    return [
        "--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings,
        "--outdir", outdir, "--num_steps", 3, "--max_sequence_length", 20,
    ]  # fmt: skip


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_the_picture_is_the_stock_pipelines(script, prepared: Prepared, lora: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    prompt = "a robot in a forest"  # not in the parquet: the text encoders run
    flags = [*base_flags(prepared, tmp_path), "--lora", lora, "--prompt", prompt, "--negative_prompt", "blurry"]
    assert script("inference", *flags, "--seed", 3, "--guidance", 4).code == 0
    ours = pixels(tmp_path / "000_a-robot-in-a-forest" / "img_00.png")

    pipeline = StableDiffusion3Pipeline.from_pretrained(prepared.model, torch_dtype=torch.float32)
    pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    (plan,) = plan_pictures(tmp_path, [prompt], 1, {"seed": 3})
    stock = pipeline(
        prompt,
        negative_prompt="blurry",
        num_inference_steps=3,
        guidance_scale=4.0,
        max_sequence_length=20,
        height=64,
        width=64,
        latents=plan.noise((16, 8, 8))[None],
    ).images[0]
    assert np.abs(ours - np.asarray(stock).astype(int)).max() <= 1  # embeddings are stored in float16

    without = script("inference", *base_flags(prepared, tmp_path / "without"), "--prompt", prompt, "--seed", 3)
    assert without.code == 0
    plain = pixels(tmp_path / "without" / "000_a-robot-in-a-forest" / "img_00.png")
    assert np.abs(plain - ours).mean() > 1  # the LoRA had its effect


def test_noise_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    def noises(prompts: list[str], seed: int) -> list[torch.Tensor]:
        return [plan.noise((16, 8, 8)) for plan in plan_pictures(tmp_path, prompts, 4, {"seed": seed})]

    alone = noises(["a"], 0)
    assert all(torch.equal(*pair) for pair in zip([*alone, *alone], noises(["b", "a"], 0), strict=True))
    distinct = alone + noises(["a"], 1)
    assert all(not torch.equal(distinct[i], distinct[j]) for i in range(8) for j in range(i))
    assert abs(torch.stack(distinct).std().item() - 1) < 0.05


def test_a_prompt_draws_the_same_wherever_it_is_in_the_list(script, prepared: Prepared, tmp_path: Path) -> None:
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT]
    assert script("inference", *flags, "--prompt", "a photo of a robot").code == 0
    other = [*base_flags(prepared, tmp_path / "other"), "--prompt", "a photo of a robot"]
    assert script("inference", *other, "--prompt", PROMPT).code == 0
    left, right = (next(folder.glob("*_a-photo-of-sks-robot/*.png")) for folder in (tmp_path, tmp_path / "other"))
    assert (left.parent.name[:3], right.parent.name[:3]) == ("000", "001")
    assert np.array_equal(pixels(left), pixels(right))


def test_a_prompt_given_twice_is_drawn_twice(tmp_path: Path) -> None:
    plans = plan_pictures(tmp_path, ["a", "b", "a"], 2, {"seed": 0})
    assert [plan.path.relative_to(tmp_path).as_posix() for plan in plans] == [
        *(f"000_a/img_0{index}.png" for index in range(4)),
        *(f"001_b/img_0{index}.png" for index in range(2)),
    ]


def test_the_batch_changes_nothing(script, prepared: Prepared, lora: Path, tmp_path: Path) -> None:
    pictures = []
    for batch_size in (1, 3):
        outdir = tmp_path / str(batch_size)
        flags = [*base_flags(prepared, outdir), "--lora", lora, "--prompt", PROMPT, "--num_images", 3]
        assert script("inference", *flags, "--batch_size", batch_size).code == 0
        pictures.append([pixels(path) for path in sorted(outdir.glob("*/img_*.png"))])
    assert len(pictures[0]) == 3
    for one, together in zip(*pictures, strict=True):
        assert np.abs(one - together).max() <= 1


def test_no_text_encoder_where_the_prompts_are_known(script, prepared, lora, tmp_path, monkeypatch) -> None:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", refuse)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", refuse)
    known = script("inference", *base_flags(prepared, tmp_path), "--lora", lora, "--prompt", PROMPT)
    assert known.code == 0
    assert "no text encoder is loaded" in known.out
    with pytest.raises(AssertionError, match="a text encoder was loaded"):
        script("inference", *base_flags(prepared, tmp_path), "--lora", lora, "--prompt", "unknown")
    with pytest.raises(AssertionError, match="a text encoder was loaded"):  # embeddings of another length
        script("inference", *base_flags(prepared, tmp_path), "--prompt", PROMPT, "--max_sequence_length", 33)


def test_settings_are_in_the_picture_and_a_rerun_draws_nothing(script, prepared, lora, tmp_path, monkeypatch) -> None:
    flags = [*base_flags(prepared, tmp_path), "--lora", lora, "--lora_scale", 0.5, "--prompt", PROMPT, "--seed", 7]
    assert script("inference", *flags, "--height", 96, "--width", 64).code == 0
    (path,) = tmp_path.glob("*/img_00.png")
    with Image.open(path) as picture:
        assert picture.size == (64, 96)
        settings = json.loads(picture.text["sd3_lora"])
    assert {key: settings[key] for key in ("prompt", "seed", "steps", "guidance", "height", "width")} == {
        "prompt": PROMPT, "seed": 7, "steps": 3, "guidance": 7.0, "height": 96, "width": 64
    }  # fmt: skip
    before = path.stat().st_mtime_ns
    again = script("inference", *flags, "--height", 96, "--width", 64)
    assert "1 of them drawn before" in again.out
    assert path.stat().st_mtime_ns == before
    assert "0 of them drawn before" in script("inference", *flags, "--height", 96, "--width", 64, "--seed", 8).out


def test_pictures_are_never_replaced(script, prepared: Prepared, lora: Path, tmp_path: Path) -> None:
    """Another seed, LoRA or scale gets another name; each of them is known again."""
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT]
    variants = [[], ["--seed", 1], ["--lora", lora], ["--lora", lora, "--lora_scale", 0.5]]
    names = ["img_00.png", "img_00_2.png", "img_00_3.png", "img_00_4.png"]
    contents: dict[str, bytes] = {}
    for more, name in zip(variants, names, strict=True):
        result = script("inference", *flags, *more)
        assert ("1 of them beside pictures of other settings, which are kept" in result.out) == (name != names[0])
        found = {path.name: path.read_bytes() for path in tmp_path.glob("*/*.png")}
        assert found.keys() == {*contents, name}
        assert contents.items() <= found.items()
        contents = found
    for more in variants:
        assert "1 of them drawn before" in script("inference", *flags, *more).out
    (folder,) = tmp_path.glob("000_*")
    (folder / names[0]).write_bytes(b"of another program, or cut short")
    assert script("inference", *flags).code == 0
    assert (folder / names[0]).read_bytes() == b"of another program, or cut short"
    assert np.array_equal(pixels(folder / "img_00_5.png"), np.asarray(Image.open(io.BytesIO(contents[names[0]]))))


def test_a_picture_of_other_weights_is_drawn_anew(script, prepared: Prepared, tmp_path: Path) -> None:
    """One matrix of the transformer, a norm of the VAE or of a text encoder, another schedule: each is another."""
    model = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    flags = [*base_flags(prepared, tmp_path / "out"), "--prompt", "a fish", "--pretrained_model_name_or_path", model]

    def draw() -> str:
        result = script("inference", *flags)
        assert result.code == 0, result.err
        return result.out

    assert "0 of them drawn before" in draw()
    for name, tensor in (
        ("transformer/diffusion_pytorch_model.safetensors", "transformer_blocks.1.attn.to_k.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_norm_out.bias"),
        ("text_encoder_3/model.safetensors", "encoder.final_layer_norm.weight"),
    ):
        tensors = load_file(model / name)
        tensors[tensor] = tensors[tensor] + 0.125
        save_file(tensors, model / name, {"format": "pt"})
        assert "0 of them drawn before" in draw(), name
    schedule = model / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"shift": 1.5}))
    assert "0 of them drawn before" in draw()
    assert "1 of them drawn before" in draw()


def test_the_png_s_text_does_no_harm_elsewhere(script, prepared: Prepared, tmp_path: Path) -> None:
    """ComfyUI's page parses `workflow` or `prompt` as JSON, and reads tEXt as UTF-8, although it is Latin-1."""
    flags = [*base_flags(prepared, tmp_path), "--negative_prompt", "blurry", "--seed", 3]
    assert script("inference", *flags, "--prompt", "ein grüner Hund", "--prompt", PROMPT).code == 0
    for prompt, kind, other in (("ein grüner Hund", b"iTXt", b"tEXt"), (PROMPT, b"tEXt", b"iTXt")):
        (path,) = tmp_path.glob(f"*_{folder_name(prompt)}/img_00.png")
        content = path.read_bytes()
        assert content.count(kind + b"parameters\0") == content.count(kind + b"sd3_lora\0") == 1
        assert other not in content
        with Image.open(path) as picture:
            assert set(picture.info) == {"parameters", "sd3_lora"}
            lines = picture.info["parameters"].splitlines()
        assert lines == [
            prompt, "Negative prompt: blurry", "Steps: 3, Sampler: Euler, CFG scale: 7.0, Seed: 3, Size: 64x64, "
            f"Model: {Path(prepared.model).name}",
        ]  # fmt: skip


def test_lora_scales(script, prepared: Prepared, lora: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, flags in {
        "none": [],
        "zero": ["--lora", lora, "--lora_scale", 0],
        "one": ["--lora", lora],
        "halves": ["--lora", lora, "--lora_scale", 0.5, "--lora", lora / "pytorch_lora_weights.safetensors",
                   "--lora_scale", 0.5],
    }.items():  # fmt: skip
        assert script("inference", *base_flags(prepared, tmp_path / name), "--prompt", PROMPT, *flags).code == 0
        drawn[name] = pixels(next((tmp_path / name).glob("*/img_00.png")))
    assert np.abs(drawn["none"] - drawn["zero"]).max() <= 1
    assert np.abs(drawn["one"] - drawn["halves"]).max() <= 1
    assert np.abs(drawn["one"] - drawn["none"]).mean() > 1


def test_merged_and_unmerged(script, prepared: Prepared, lora: Path, tmp_path: Path) -> None:
    """The same but for rounding. What was drawn unmerged is kept, and not the other way round."""
    flags = [*base_flags(prepared, tmp_path / "out"), "--lora", lora, "--prompt", PROMPT]
    assert script("inference", *flags).code == 0
    (merged,) = (tmp_path / "out").glob("*/img_*.png")
    exact = script("inference", *flags, "--unmerged")
    assert "0 of them drawn before" in exact.out
    unmerged = merged.with_name("img_00_2.png")
    assert np.abs(pixels(merged) - pixels(unmerged)).max() <= 1
    notes = [json.loads(Image.open(path).text["sd3_lora"]).get("lora_merged") for path in (merged, unmerged)]
    assert notes == [True, None]
    merged.unlink()
    assert "1 of them drawn before" in script("inference", *flags).out  # as those of earlier builds
    without = script("inference", *base_flags(prepared, tmp_path / "base"), "--prompt", PROMPT)
    assert without.code == 0
    (base,) = (tmp_path / "base").glob("*/img_*.png")
    assert "lora_merged" not in Image.open(base).text["sd3_lora"]


@pytest.mark.parametrize("words", [[], ["--unmerged"], ["--stream_blocks", 2]], ids=str)
def test_a_sweep_draws_what_each_strength_draws_alone(
    script, prepared: Prepared, lora: Path, tmp_path: Path, words: list[Any]
) -> None:
    flags = ["--lora", lora, "--prompt", PROMPT, *words]
    sweep = script("inference", *base_flags(prepared, tmp_path / "sweep"), *flags, "--lora_scale", 1, 0, 0.5)
    assert sweep.code == 0
    for scale in (1, 0, 0.5):
        outdir = tmp_path / str(scale)
        assert script("inference", *base_flags(prepared, outdir), *flags, "--lora_scale", scale).code == 0
        (alone,), (swept,) = outdir.glob("*/*.png"), (tmp_path / "sweep").glob(f"*/*scale{scale:g}.png")
        assert np.array_equal(pixels(alone), pixels(swept))


def test_within_a_budget_batches_are_filled_and_decoded_at_once(
    script, prepared: Prepared, lora: Path, tmp_path: Path, monkeypatch
) -> None:
    """The plan of a GPU, made on a CPU. Five pictures are three and two, and the first three are written first."""
    from sd3_lora.drawing.sampling import Sampler

    denoise, batches = Sampler.denoise, []
    flags = [*base_flags(prepared, tmp_path / "all"), "--lora", lora, "--prompt", PROMPT, "--num_images", 5]

    def noted(sampler: Sampler, noise: torch.Tensor, *rest: Any) -> torch.Tensor:
        batches.append(len(noise))
        if len(batches) == 2 and stops:
            raise KeyboardInterrupt
        return denoise(sampler, noise, *rest)

    monkeypatch.setattr(Sampler, "denoise", noted)
    monkeypatch.setattr("sd3_lora.plan.memory_plan.MOST_DRAWN", 4)
    stops = True
    stopped = script("inference", *flags, "--vram_budget_gib", 20)
    assert stopped.code == 130
    assert "drew 3 of 5 pictures" in stopped.out
    assert "decode" not in [line.split(" (")[0] for line in stopped.out.splitlines()]
    stops = False
    assert "5 pictures of 64×64, 3 of them drawn before" in script("inference", *flags, "--vram_budget_gib", 20).out
    assert batches == [3, 2, 2]
    batches.clear()
    plain = [*base_flags(prepared, tmp_path / "plain"), "--lora", lora, "--prompt", PROMPT, "--num_images", 5]
    assert script("inference", *plain).code == 0
    assert batches == [1] * 5  # no budget: on a CPU more at a time are no faster
    for path in sorted((tmp_path / "plain").glob("*/img_*.png")):
        assert np.abs(pixels(path) - pixels(tmp_path / "all" / path.parent.name / path.name)).max() <= 1


@needs_gpu
@pytest.mark.parametrize(
    "words",
    [[], ["--unmerged"], ["--stream_blocks", 2], ["--compile", "on"], ["--vram_budget_gib", 3]],
    ids=lambda words: " ".join(map(str, words)) or "merged",
)
def test_a_gpu_draws_the_same_captured(
    script, prepared: Prepared, lora: Path, tmp_path: Path, words: list[Any]
) -> None:
    """Base and LoRA, skip-layer guidance in some of the steps, and a smaller last batch."""
    flags = ["--lora", lora, "--prompt", PROMPT, "--num_images", 3, "--compare", "--mixed_precision", "no"]
    flags += ["--skip_guidance_layers", 1, "--skip_layer_guidance_start", 0, "--skip_layer_guidance_stop", 1]
    plain = ["--unmerged", "--capture", "off", "--compile", "off", "--batch_size", 1]
    assert script("inference", *base_flags(prepared, tmp_path / "plain"), *flags, *plain).code == 0
    captured = ["--capture", "on", "--batch_size", 2, *words]
    result = script("inference", *base_flags(prepared, tmp_path / "captured"), *flags, *captured)
    assert result.code == 0
    assert "replayed as one CUDA graph" in result.out
    compared = json.loads((tmp_path / "captured" / "run.json").read_text())
    assert compared["execution"]["captured"]
    assert compared["execution"]["compiled"] == ("--compile" in words)
    assert compared["plan"]["merged"] == ("--unmerged" not in words)
    paths = sorted((tmp_path / "plain").glob("*/img_*.png"))
    assert len(paths) == 6
    for path in paths:
        drawn = tmp_path / "captured" / path.parent.name / path.name
        assert np.abs(pixels(path) - pixels(drawn)).max() <= 2


def test_a_picture_that_cannot_be_written_ends_the_run(script, prepared: Prepared, tmp_path: Path, monkeypatch) -> None:
    """Though it is written in a thread; the others are there."""
    from sd3_lora.drawing.pictures import PicturePlan

    write = PicturePlan.write

    def full(plan: PicturePlan, content: bytes) -> None:
        if plan.image_index == 1:
            raise OSError(28, "No space left on device")
        write(plan, content)

    monkeypatch.setattr(PicturePlan, "write", full)
    result = script("inference", *base_flags(prepared, tmp_path), "--prompt", PROMPT, "--num_images", 3)
    assert result.code == 2
    assert "the disk is full" in result.err
    assert len(list(tmp_path.glob("*/img_*.png"))) == 2


def test_the_base_and_the_lora_side_by_side(script, prepared: Prepared, lora: Path, tmp_path: Path) -> None:
    """The base's pictures are those of a run without the LoRA, exactly, and are known by it; so are the LoRA's."""
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT, "--num_images", 2]
    compared = script("inference", *flags, "--lora", lora, "--compare", "--batch_size", 2)
    assert "4 pictures of 64×64, 0 of them drawn before" in compared.out
    (folder,) = tmp_path.glob("000_*")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["img_00.png", "img_00_base.png", "img_01.png", "img_01_base.png"]
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        sheet.load()
    assert "2 of them drawn before" in script("inference", *flags).out
    assert "2 of them drawn before" in script("inference", *flags, "--lora", lora).out
    assert "4 of them drawn before" in script("inference", *flags, "--lora", lora, "--compare").out
    assert sorted(path.name for path in folder.iterdir()) == names
    alone = [*base_flags(prepared, tmp_path / "alone"), "--prompt", PROMPT, "--num_images", 2, "--batch_size", 2]
    assert script("inference", *alone).code == 0
    for number in range(2):
        base = pixels(next((tmp_path / "alone").glob(f"*/img_0{number}.png")))
        assert np.array_equal(pixels(folder / f"img_0{number}_base.png"), base)
        assert np.abs(pixels(folder / f"img_0{number}.png") - base).mean() > 1


def test_several_scales_of_one_lora_are_a_sweep(
    script, prepared: Prepared, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = labels_of_sheets(monkeypatch)
    flags = [*base_flags(prepared, tmp_path), "--lora", lora, "--prompt", PROMPT]
    assert script("inference", *flags, "--lora_scale", 0.5).code == 0  # with a name of its own
    swept = script("inference", *flags, "--lora_scale", 0, 0.5, "--lora_scale", 1, "--compare")
    assert "3 pictures of 64×64, 1 of them drawn before" in swept.out  # and no base beside a LoRA at 0
    (folder,) = tmp_path.glob("000_*")
    names = ["img_00.png", "img_00_scale0.png", "img_00_scale1.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert labels == [[""], ["base (LoRA at 0)", "LoRA at 0.5", "LoRA at 1"]]
    assert script("inference", *base_flags(prepared, tmp_path / "base"), "--prompt", PROMPT).code == 0
    half, none, whole = (pixels(folder / name) for name in names)
    assert np.array_equal(none, pixels(next((tmp_path / "base").glob("*/img_00.png"))))
    assert np.abs(half - none).mean() > 0.5
    assert np.abs(half - whole).mean() > 0.5
    assert "3 of them drawn before" in script("inference", *flags, "--lora_scale", 0, 0.5, 1).out


def labels_of_sheets(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The labels of the pictures on each contact sheet that will be drawn."""
    labels = list[list[str]]()

    def noted(pictures: list[Any]) -> Any:
        labels.append([picture.variant for picture in pictures])
        return rows_of_run(pictures)

    monkeypatch.setattr("inference.rows_of_run", noted)
    return labels


def test_several_loras_are_said_to_be_added_up(
    script, prepared: Prepared, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who meant to compare them reads how; the way that is said does it."""
    labels = labels_of_sheets(monkeypatch)
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT]
    file = lora / "pytorch_lora_weights.safetensors"
    both = script("inference", *flags, "--lora", lora, file, "--lora_scale", 0.7, 0.5, "--compare")
    assert f"2 LoRAs added up in each picture ({lora.name}: 0.7, {lora.name}: 0.5); to see one beside" in both.out
    assert labels.pop() == ["base", "with the LoRAs at 0.7 and 0.5"]
    for scale in (1, 0.4):  # each alone, in one folder
        alone = script("inference", *flags, "--lora", lora, "--lora_scale", scale, "--compare")
        assert "added up" not in alone.out
    assert labels == [["base", "with the LoRA"], ["base", "with the LoRA at 0.4"]]
    names = ["img_00.png", "img_00_2.png", "img_00_3.png", "img_00_base.png"]
    assert sorted(path.name for path in tmp_path.glob("000_*/*.png")) == names
    refused = script("inference", *flags, "--lora", lora, file, "--lora_scale", 0, 0, "--compare")
    assert (refused.code, "--compare has nothing beside the base" in refused.err) == (2, True)
    refused = script("inference", *flags, "--lora", lora, file, "--lora_scale", 0, 0.5, 1)
    assert "2 --lora and 3 --lora_scale: give one for each, since they are added up" in refused.err


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_other_formats_are_known_again(script, prepared: Prepared, lora: Path, tmp_path: Path, kind: str) -> None:
    flags = [*base_flags(prepared, tmp_path), "--lora", lora, "--prompt", "ein grüner Hund"]
    assert script("inference", *flags).code == 0
    assert "0 of them drawn before" in script("inference", *flags, "--format", kind).out
    assert "1 of them drawn before" in script("inference", *flags, "--format", kind).out
    (path,) = tmp_path.glob(f"*/img_00.{kind}")
    assert np.abs(pixels(path) - pixels(path.with_suffix(".png"))).mean() < 12  # of a picture that is nearly noise
    with Image.open(tmp_path / f"contact_sheet.{kind}") as sheet:
        assert sheet.format == {"jpg": "JPEG", "webp": "WEBP"}[kind]


@pytest.mark.parametrize(
    "more",
    [
        *(["--scheduler", name] for name in ("heun", "dpmpp_2m", "unipc")),
        ["--timestep_shift", 1],
        ["--skip_guidance_layers", 1, "--skip_layer_guidance_stop", 1],
    ],
    ids=lambda more: str(more[1]),
)
def test_how_it_is_denoised_changes_the_picture(script, prepared: Prepared, tmp_path: Path, more) -> None:
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT]
    assert script("inference", *flags).code == 0
    assert "0 of them drawn before" in script("inference", *flags, *more).out
    assert "1 of them drawn before" in script("inference", *flags, *more).out
    first, second = (pixels(path) for path in sorted(tmp_path.glob("*/*.png")))
    assert not np.array_equal(first, second)


def test_the_numbers_of_skip_layer_guidance(script, prepared: Prepared, tmp_path: Path) -> None:
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT, "--skip_guidance_layers", 1, 0, "--num_steps", 4]
    numbers = [(2.8, 0.01, 0.5), (5.0, 0.01, 0.5), (2.8, 0.3, 0.9), (2.8, 0.01, 0.9)]
    names = [f"--skip_layer_guidance_{name}" for name in ("scale", "start", "stop")]
    for values in numbers:
        assert (
            script("inference", *flags, *(word for pair in zip(names, values, strict=True) for word in pair)).code == 0
        )
    drawn = [pixels(path) for path in sorted(tmp_path.glob("*/*.png"))]
    assert all(not np.array_equal(drawn[i], drawn[j]) for i in range(len(numbers)) for j in range(i))
    with Image.open(sorted(tmp_path.glob("*/*.png"))[0]) as picture:
        noted = json.loads(picture.text["sd3_lora"])["skip_layer_guidance"]
    assert noted == {"layers": [0, 1], "scale": 2.8, "start": 0.01, "stop": 0.5}


@pytest.mark.parametrize("name", ["recontextualization", "art", "property"])
def test_a_prompt_set_that_ships(script, prepared: Prepared, tmp_path: Path, name: str, monkeypatch) -> None:
    """Its prompts are embedded with the subject in them."""
    from inference import COMMAND_LINE, find_prompts

    from conftest import PROJECT

    path = PROJECT / "examples" / "prompts" / f"{name}.txt"
    config = COMMAND_LINE.parse(["--prompts_file", str(path), "--subject", "sks robot"])[0]
    prompts = find_prompts(config, [], is_miniature=False)
    assert len(prompts) == len(set(prompts)) == 12
    assert all(prompt.count("sks robot") == 1 and "{" not in prompt and "#" not in prompt for prompt in prompts)
    (tmp_path / "two.txt").write_text(path.read_text(encoding="utf-8").split("\n", 3)[0] + "\na red {}\n{} at sea\n")
    flags = [*base_flags(prepared, tmp_path / "out"), "--prompts_file", tmp_path / "two.txt", "--guidance", 1]
    assert script("inference", *flags, "--subject", "sks robot", "--num_steps", 1).code == 0
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["000_a-red-sks-robot", "001_sks-robot-at-sea"]


def test_length_resolution_and_prompt_come_from_the_lora(
    script, prepared: Prepared, lora: Path, tmp_path: Path
) -> None:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    result = script("inference", *flags, "--lora", lora, "--outdir", tmp_path, "--num_steps", 1)
    assert result.code == 0
    (path,) = tmp_path.glob("*/img_00.png")
    with Image.open(path) as picture:
        settings = json.loads(picture.text["sd3_lora"])
    assert (settings["prompt"], settings["max_sequence_length"], settings["height"]) == (PROMPT, 20, 64)


def test_the_precisions_are_those_asked_for(script, prepared: Prepared, tmp_path: Path, monkeypatch) -> None:
    import inference

    seen = {}
    denoise, make_decoder = inference.denoise_all, inference.Decoder

    def denoise_spy(sampler, *rest):
        seen["transformer"] = sampler.transformer.dtype
        return denoise(sampler, *rest)

    def decoder_spy(vae, *rest):
        seen["vae"] = vae.dtype
        return make_decoder(vae, *rest)

    monkeypatch.setattr(inference, "denoise_all", denoise_spy)
    monkeypatch.setattr(inference, "Decoder", decoder_spy)
    flags = [*base_flags(prepared, tmp_path), "--prompt", "unknown"]
    assert "T5 in fp32\n" in script("inference", *flags).out
    assert seen == {"transformer": torch.float32, "vae": torch.float32}
    half = ["--mixed_precision", "bf16", "--vae_precision", "bf16", "--t5_precision", "fp16", "--t5_stream"]
    assert "T5 in fp16, one block at a time\n" in script("inference", *flags, *half).out
    assert seen == {"transformer": torch.bfloat16, "vae": torch.bfloat16}


def test_prompts_file_with_bom_and_crlf(script, prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\nein grüner Hund\r\n".encode())
    flags = [*base_flags(prepared, tmp_path / "out"), "--prompts_file", tmp_path / "prompts.txt", "--guidance", 1]
    assert script("inference", *flags).code == 0
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["000_a-cat", "001_ein-grüner-hund"]


def test_the_flags_of_diffusers_are_taken(script, prepared: Prepared, tmp_path: Path) -> None:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    flags += ["--output-dir", tmp_path, "--num_inference_steps", 1, "--max_sequence_length", 20, "--prompt", PROMPT]
    assert script("inference", *flags, "--guidance_scale", 2, "--num_images_per_prompt", 2).code == 0
    with Image.open(sorted(tmp_path.glob("*/img_*.png"))[1]) as picture:
        settings = json.loads(picture.text["sd3_lora"])
    assert (settings["steps"], settings["guidance"], settings["image_index"]) == (1, 2.0, 1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "nothing to draw: type --prompt"),
        (["--prompt", "a", "--lora", "nowhere/at-all/here"], "--lora: there is no nowhere/at-all/here: check the"),
        (["--prompt", "a", "--lora", "nobody/nothing"], "--lora nobody/nothing is neither a file or folder"),
        (["--prompt", "a", "--lora", "docs/nothing"], "--lora: there is no docs/nothing in the folder docs: check the"),
        (["--prompt", "a", "--lora", "dog.safetensors"], "--lora: there is no dog.safetensors: check the path"),
        (["--prompt", "a", "--height", "70"], "--height 70 does not fit this model, which takes multiples of 16"),
        (["--prompt", "a", "--width", "4096"], "type --width 256"),
        (["--prompt", "a", "--num_images", "0"], "--num_images 0 must be at least 1"),
        (["--prompt", "a", "--lora_scale", "0.5"], "give one for each"),
        (["--prompt", "a", "--prompts_file", "missing.txt"], "cannot read missing.txt"),
        (["--prompt", "a", "--no_such_flag"], "--no_such_flag"),
        (["--prompt", "a {}"], """'a {}' has {} in place of the subject: add --subject "sks dog\""""),
        (["--prompt", "a", "--subject", "sks dog"], "--subject changes nothing, since no prompt has {}: leave it out"),
        (["--prompt", "a", "--compare"], "--compare draws with a LoRA and without: add --lora"),
        (["--prompt", "a", "--scheduler", "ddim"], "--scheduler: invalid choice: 'ddim'"),
        (["--prompt", "a", "--timestep_shift", "0"], "--timestep_shift 0 must be a positive number"),
        (["--prompt", "a", "--skip_guidance_layers", "7"], "--skip_guidance_layers 7: this model's blocks are 0 to 1"),
        (["--prompt", "a", "--skip_guidance_layers", "1", "--guidance", "1"], "needs --guidance above 1, not 1"),
        (["--prompt", "a", "--skip_layer_guidance_stop", "0.5"], "stop needs --skip_guidance_layers: type the blocks"),
        (
            ["--prompt", "a", "--skip_guidance_layers", "1", "--skip_layer_guidance_start", "0.3"],
            "skip-layer guidance from 0.3 to 0.2 of the steps",
        ),
        (["--prompt", "a", "--format", "gif"], "--format: invalid choice: 'gif'"),
        (["--prompt", "a", "--height", "0"], "--height 0 must be at least 1"),
        (["--prompt", "a", "--seed", "-1"], "there is no random seed here, so type any number"),
        (["--prompt", "a", "--guidance", "nan"], "--guidance nan must be a finite number"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--prompt", "a", "--device", "cpu", "--capture", "on"], "--capture on: it needs a GPU: leave it out"),
        (
            ["--prompt", "a", "--compile", "on", "--stream_blocks", "1"],
            "--compile on: streamed blocks are not compiled: leave it out, or keep all blocks on the device in 16 bits",
        ),
    ],
)
def test_bad_input_is_one_sentence(script, prepared: Prepared, tmp_path: Path, flags, sentence) -> None:
    model = ["--pretrained_model_name_or_path", prepared.model, "--outdir", tmp_path / "out"]
    result = script("inference", *model, *flags)
    assert result.code == 2
    assert sentence in result.err
    assert result.err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*/*.png"))


def test_a_lora_of_another_model_or_a_truncated_one(script, prepared, lora, tmp_path) -> None:
    from conftest import PROJECT

    flags = ["--prompt", "a", "--outdir", tmp_path / "out", "--num_steps", 1]
    other = script("inference", "--pretrained_model_name_or_path", PROJECT / "miniature", "--lora", lora, *flags)
    assert other.code == 2
    assert "was trained on another model" in other.err
    whole = (lora / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    cut = script("inference", *base_flags(prepared, tmp_path / "out"), *flags, "--lora", tmp_path / "cut.safetensors")
    assert cut.code == 2
    assert "is not a whole safetensors file" in cut.err


def test_a_nan_picture_is_not_written(script, prepared: Prepared, tmp_path: Path, monkeypatch) -> None:
    import inference

    load = inference.load_sampler

    def broken(*args: object) -> object:
        sampler, use = load(*args)
        sampler.transformer.proj_out.bias.data.fill_(float("nan"))
        return sampler, use

    monkeypatch.setattr(inference, "load_sampler", broken)
    result = script("inference", *base_flags(prepared, tmp_path), "--prompt", PROMPT)
    assert result.code == 2
    assert result.err == (
        "error: the picture came out as NaN (it would be black): check the model's files and --lora, or lower "
        "--lora_scale and --guidance\n"
    )
    assert not list(tmp_path.glob("*/*.png"))


def test_what_was_denoised_before_a_nan_is_drawn(script, prepared: Prepared, tmp_path: Path, monkeypatch) -> None:
    from sd3_lora.drawing.sampling import Sampler

    denoise = Sampler.denoise

    def broken(sampler: Sampler, noise: torch.Tensor, prompts: list[str], *rest: Any) -> torch.Tensor:
        return denoise(sampler, noise * float("nan") if prompts == ["b"] else noise, prompts, *rest)

    monkeypatch.setattr(Sampler, "denoise", broken)
    result = script("inference", *base_flags(prepared, tmp_path), "--prompt", PROMPT, "--prompt", "b")
    assert result.code == 2
    assert "came out as NaN" in result.err
    assert "drew 1 of 2 pictures" in result.out
    assert len(list(tmp_path.glob("*/*.png"))) == 1


@pytest.mark.parametrize(
    ("precision", "remedy"), [("fp32", "check the model's files"), ("fp16", "type --vae_precision bf16, or")]
)
def test_a_nan_in_the_decoder_is_no_picture(
    script, prepared: Prepared, tmp_path: Path, monkeypatch, precision: str, remedy: str
) -> None:
    """The others of the run are written."""
    from diffusers import AutoencoderKL

    decode, calls = AutoencoderKL.decode, 0

    def broken(vae: AutoencoderKL, *words: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        output = decode(vae, *words, **more)
        if calls == 1:
            output.sample[0, 1, 5, 7] = float("nan")
        return output

    monkeypatch.setattr(AutoencoderKL, "decode", broken)
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT, "--num_images", 2, "--vae_precision", precision]
    result = script("inference", *flags)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "error: the VAE decoded a picture to NaN: " in result.err
    assert remedy in result.err
    assert "(1 of 2 pictures)" in result.err
    assert [path.name for path in tmp_path.glob("*/*.png")] == ["img_01.png"]


@pytest.mark.parametrize("denoised", [0, 1, 2])
def test_an_interruption_loses_one_batch_at_most(
    script, prepared: Prepared, tmp_path: Path, monkeypatch, denoised: int
) -> None:
    from sd3_lora.drawing.sampling import Sampler

    flags = [*base_flags(prepared, tmp_path / "out"), "--prompt", PROMPT, "--num_images", 3]
    denoise, batches = Sampler.denoise, 0

    def interrupted(*args: object) -> object:
        nonlocal batches
        if batches == denoised:
            raise KeyboardInterrupt
        batches += 1
        return denoise(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "denoise", interrupted)
        result = script("inference", *flags)
    assert result.code == 130
    assert "interrupted: run the same command again to go on" in result.err
    drawn = sorted((tmp_path / "out").glob("*/img_*.png"))
    assert len(drawn) == denoised
    if denoised:
        assert f"drew {denoised} of 3 pictures" in result.out
    again = script("inference", *flags)
    assert f"3 pictures of 64×64, {denoised} of them drawn before" in again.out
    whole = script("inference", *base_flags(prepared, tmp_path / "whole"), "--prompt", PROMPT, "--num_images", 3)
    assert whole.code == 0
    for path in sorted((tmp_path / "whole").glob("*/img_*.png")):
        assert np.array_equal(pixels(path), pixels(tmp_path / "out" / path.parent.name / path.name))


def test_another_attention_kernel_is_another_picture(script, prepared: Prepared, tmp_path: Path) -> None:
    flags = [*base_flags(prepared, tmp_path), "--prompt", PROMPT, "--device", "cpu"]
    assert script("inference", *flags).code == 0
    assert "0 of them drawn before" in script("inference", *flags, "--attention_kernel", "math").out
    assert "1 of them drawn before" in script("inference", *flags, "--attention_kernel", "math").out


@pytest.mark.parametrize("name", ["inference", "compute_embeddings", "precompute_latents"])
def test_no_guess_that_does_harm(script, name: str) -> None:
    """Class pictures must not be trained as the subject; recomputing is not streaming."""
    taken = {
        "precompute_latents": {"--class_data_dir", "--num_class_images"},
        "compute_embeddings": {"--class_data_dir"},
    }
    for flag in {"--recompute_blocks", "--class_data_dir", "--num_class_images"} - taken.get(name, set()):
        result = script(name, flag, "3")
        assert result.err == f"error: unknown argument {flag}: `python {name}.py --help_all` lists the flags\n"
