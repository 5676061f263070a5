"""The VAE's tile: whole where it fits, else the largest that does, and how far its numbers are from the whole's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import BudgetConfig, ModelConfig
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.gpu.budget import DeviceBudget, open_budget
from sd3_lora.plan import memory_plan
from sd3_lora.stage_one import text_encoder_plan, vae_tiles
from sd3_lora.stage_one.images import open_rgb
from sd3_lora.stage_one.vae_tiles import (
    SIDES_PX,
    AskedTile,
    VaeTile,
    VaeWork,
    choose_tile,
    read_asked_tile,
    vae_weight_bytes,
)

import numpy as np
import pytest
import torch
from conftest import PROJECT, PROMPT, Prepared, Result, save_pictures
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

CONTEXT = GIB // 2
CPU = torch.device("cpu")
FULL = PictureSize.square(1024)
DECODE = VaeWork("decode", "fp32", FULL)


def budget(gib: float) -> DeviceBudget:
    """`gib` for tensors, beside CUDA's own."""
    return DeviceBudget(CONTEXT + int(gib * GIB), CONTEXT, CPU)


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return ModelFiles(ModelConfig())


@pytest.fixture
def full_files(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    """SD3's own width and weights: 83.8 million of them."""
    monkeypatch.setattr(vae_tiles, "vae_weight_bytes", lambda files, precision: 4 * 83_800_000)
    monkeypatch.setattr(ModelFiles, "read_config", lambda self, name: {"block_out_channels": (128, 256, 512, 512)})
    return files


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MINIATURE / "vae")


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """`(1, 3, 256, 256)` in [-1, 1]: a photo of the examples."""
    pixels = open_rgb(PROJECT / "examples" / "robot" / "01.png").resize((256, 256))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1


# The choice


@pytest.mark.parametrize(
    ("task", "precision", "whole", "tile_512"),
    [  # the figures that were measured: whole, and a quarter of those in tiles with 4 pictures of 3 · 1024² numbers
        ("encode", "fp32", 2.8, 2.9 / 4 + 12 * 4 / 1024),
        ("decode", "fp32", 3.8, 4.1 / 4 + 12 * 4 / 1024),
        ("encode", "fp16", 1.5, 1.6 / 4 + 12 * 2 / 1024),
        ("decode", "bf16", 1.9, 2.2 / 4 + 12 * 2 / 1024),
    ],
)
def test_the_estimate_is_what_was_measured(
    full_files: ModelFiles, task: Any, precision: str, whole: float, tile_512: float
) -> None:
    weights, work = 4 * 83_800_000 / GIB, VaeWork(task, precision, FULL)
    ample = budget(weights + whole + 0.001)
    tile = choose_tile(full_files, work, ample)
    assert tile.side_px is None
    assert sum(tile.predicted_parts(ample).values()) / GIB == pytest.approx(0.5 + weights + whole)
    assert choose_tile(full_files, work, budget(weights + whole - 0.001)).side_px == 768
    tile = choose_tile(full_files, work, budget(weights + tile_512 + 0.001))
    assert (tile.side_px, tile.working_bytes / GIB) == (512, pytest.approx(tile_512))
    assert choose_tile(full_files, work, budget(weights + tile_512 - 0.001)).side_px == 384


def test_a_narrower_vae_takes_less(files: ModelFiles) -> None:
    tile = choose_tile(files, DECODE, budget(80))
    assert tile.working_bytes / GIB == pytest.approx(3.8 * 32 / 128)
    weights = AutoencoderKL.from_pretrained(MINIATURE / "vae", torch_dtype=torch.float16)
    assert vae_weight_bytes(files, "fp16") == sum(p.numel() * p.element_size() for p in weights.parameters())


def test_more_memory_never_means_a_smaller_tile(full_files: ModelFiles) -> None:
    sides = []
    for tenth in range(3, 90):
        room = budget(tenth / 10)
        try:
            tile = choose_tile(full_files, DECODE, room)
        except UserError:
            sides.append(0)
            continue
        assert sum(tile.predicted_parts(room).values()) <= room.total_bytes
        sides.append(tile.side_px or 1024)
    assert sides == sorted(sides)
    assert set(sides) == {0, *SIDES_PX, 1024}


def test_a_smaller_batch_before_tiles_and_only_where_none_was_asked_for(full_files: ModelFiles) -> None:
    def chosen(room: float, smaller_batch: bool) -> tuple[int, int | None]:
        work = VaeWork("encode", "fp32", PictureSize.square(512), 4, smaller_batch)
        tile = choose_tile(full_files, work, budget(0.3122 + room))
        return tile.batch_size, tile.side_px

    whole = 2.8 / 4  # one of 512 px
    assert chosen(4 * whole + 0.001, True) == (4, None)
    assert chosen(4 * whole - 0.001, True) == (3, None)
    assert chosen(whole + 0.001, True) == (1, None)
    assert chosen(whole - 0.001, True) == (1, 384)
    assert chosen(4 * whole - 0.001, False) == (4, 384)


def test_without_a_budget_and_for_a_small_picture_there_are_no_tiles(full_files: ModelFiles) -> None:
    four = replace(DECODE, batch_size=4)
    working = vae_tiles.working_bytes(full_files, four, None, 4)
    assert choose_tile(full_files, four, None) == VaeTile(None, 4, 4 * 83_800_000, working)
    with pytest.raises(UserError, match="needs at least"):  # 128 px is no smaller than the picture
        choose_tile(full_files, replace(DECODE, size=PictureSize.square(128)), budget(0.32))


def test_what_not_the_smallest_tile_fits_is_told_the_smallest_budget_that_would(full_files: ModelFiles) -> None:
    with pytest.raises(UserError) as caught:
        choose_tile(full_files, DECODE, budget(0.41))
    # 0.5 of CUDA + 0.3122 of weights + 4.1 / 64 + 12 · 4 / 1024
    assert str(caught.value) == "the VAE in fp32 needs at least 0.93 GiB: type --vram_budget_gib 0.93"
    typed = open_budget(BudgetConfig(0.93), CPU)
    assert typed
    enough = DeviceBudget(typed.total_bytes, CONTEXT, CPU)
    assert choose_tile(full_files, DECODE, enough).side_px == 128


def test_the_choice_in_words() -> None:
    assert VaeTile(None, 1, 0, 0).describe() == "1 picture at a time, whole"
    assert VaeTile(512, 4, 0, 0).describe() == "4 pictures at a time, in tiles of 512 px"


# --vae_tile


def test_the_flag_is_auto_whole_or_a_side_that_tiles_may_have() -> None:
    def read(flag: str) -> AskedTile:
        return read_asked_tile(flag, PictureSize(256, 512), 8)

    assert [read(flag) for flag in ("auto", "whole", "32", "480")] == ["auto", "whole", 32, 480]
    assert [read(flag) for flag in ("512", "1024")] == ["whole", "whole"]  # the picture is one tile
    for flag, typed in (("100", "96"), ("8", "32"), ("0", "32"), ("-64", "auto"), ("half", "auto")):
        with pytest.raises(UserError) as caught:
            read(flag)
        assert str(caught.value) == (
            f"--vae_tile {flag} is not auto, whole or a multiple of 32 pixels: type --vae_tile {typed}"
        )
        assert read(typed)
    assert read_asked_tile("48", PictureSize.square(512), 4) == 48  # four latents of another VAE


def test_a_forced_tile_is_taken_where_more_fits_and_where_less_would_do(full_files: ModelFiles) -> None:
    for room in (None, budget(80), budget(0.3122 + 4.1 / 16 + 12 * 4 / 1024 + 0.001)):
        assert choose_tile(full_files, DECODE, room, 256).side_px == 256
    assert choose_tile(full_files, DECODE, budget(80), "whole").side_px is None
    four = VaeWork("decode", "fp32", FULL, 4, may_shrink=True)
    each = 4.1 / 16 + 12 * 4 / 1024
    assert choose_tile(full_files, four, budget(0.3122 + 3 * each + 0.001), 256).batch_size == 3
    assert choose_tile(full_files, replace(four, may_shrink=False), budget(80), 256).batch_size == 4


@pytest.mark.parametrize(
    ("asked", "room", "remedy"),
    [
        ("whole", 0.3122 + 1.1, "4.62 GiB: type --vram_budget_gib 4.62, or --vae_tile 512"),
        (768, 0.3122 + 1.1, "3.17 GiB: type --vram_budget_gib 3.17, or --vae_tile 512"),
        ("whole", 0.32, "4.62 GiB: type --vram_budget_gib 4.62"),  # no tile fits either
    ],
)
def test_a_forced_tile_that_does_not_fit_is_refused_with_what_would_do(
    full_files: ModelFiles, asked: Any, room: float, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        choose_tile(full_files, DECODE, budget(room), asked)
    assert str(caught.value) == f"--vae_tile {asked}: the VAE in fp32 needs at least {remedy}"
    typed = float(remedy.split()[0])
    assert choose_tile(full_files, DECODE, budget(typed - 0.5), asked)


# The numbers


@torch.no_grad()
def run_tiled(vae: AutoencoderKL, tile: VaeTile, picture: torch.Tensor, latents: torch.Tensor) -> Any:
    try:
        tile.apply(vae)
        return vae.encode(picture).latent_dist.mean, vae.decode(latents).sample
    finally:
        vae.disable_tiling()


@torch.no_grad()
def test_a_whole_picture_and_one_no_larger_than_a_tile_are_as_before(vae: AutoencoderKL, picture: torch.Tensor) -> None:
    latents = vae.encode(picture).latent_dist.mean
    for side in (None, 256, 512):
        encoded, decoded = run_tiled(vae, VaeTile(side, 1, 0, 0), picture, latents)
        assert torch.equal(encoded, latents)
        assert torch.equal(decoded, vae.decode(latents).sample)


# Measured on this picture, twice as large as those that the miniature's VAE was trained on: 7.8 and 12.6 % of the
# latents' norm, and 6.2 and 15.2 of 255 in a pixel's mean. (In tiles of 192 px it reconstructs the photo better than
# whole, 4.8 against 6.7 of 255: group norms and attention see pieces of about the size that they were trained on.)
@pytest.mark.parametrize(("side", "latent_bound", "pixel_bound"), [(192, 0.1, 8.0), (128, 0.15, 18.0)])
@torch.no_grad()
def test_tiles_are_near_the_whole_and_each_is_the_vae_s_own(
    vae: AutoencoderKL, picture: torch.Tensor, side: int, latent_bound: float, pixel_bound: float
) -> None:
    latents = vae.encode(picture).latent_dist.mean
    pixels = vae.decode(latents).sample
    encoded, decoded = run_tiled(vae, VaeTile(side, 1, 0, 0), picture, latents)
    assert (encoded.shape, decoded.shape) == (latents.shape, pixels.shape)
    assert 0 < (encoded - latents).norm() / latents.norm() < latent_bound
    assert 0 < (decoded - pixels).abs().mean() * 127.5 < pixel_bound
    # The first tile's part that no other overlaps.
    alone, scale = side * 3 // 4, 8
    first = vae.encode(picture[..., :side, :side]).latent_dist.mean
    assert torch.equal(encoded[..., : alone // scale, : alone // scale], first[..., : alone // scale, : alone // scale])
    first = vae.decode(latents[..., : side // scale, : side // scale]).sample
    assert torch.equal(decoded[..., :alone, :alone], first[..., :alone, :alone])


def test_every_side_is_cut_at_whole_latents() -> None:
    assert all(side * 3 // 4 % 8 == 0 and side // 8 % 4 == 0 for side in SIDES_PX)


# Through the scripts


@pytest.fixture
def tiny_budget(tiny_sd3: Path) -> Callable[[Any, int, int | None], float]:
    """GiB, as typed, that just fit a tile of `side` of a 256 px picture."""

    def gib(task: Any, side: int | None) -> float:
        files = ModelFiles(ModelConfig(str(tiny_sd3)))
        work = VaeWork(task, "fp32", PictureSize.square(256))
        needed = vae_weight_bytes(files, "fp32") + vae_tiles.working_bytes(files, work, side, 1)
        return 0.75 + (needed + 1000) / GIB

    return gib


@pytest.fixture
def cache(script: Callable[..., Result], tiny_sd3: Path, tmp_path: Path) -> Callable[..., Result]:
    save_pictures(tmp_path / "pictures", [(256, 256), (256, 256)])

    def call(*words: object, folder: str = "latents") -> Result:
        shared = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", tmp_path / "pictures"]
        shared += ["--device", "cpu", "--resolution", 256, "--output_path", tmp_path / folder]
        return script("precompute_latents", *shared, *words)

    return call


def test_latents_within_a_budget(
    cache: Callable[..., Result], tiny_budget: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache().code == 0
    assert json.loads((tmp_path / "latents" / "run.json").read_text())["predicted_bytes"] == 0
    capped: list[float] = []
    monkeypatch.setattr(DeviceBudget, "cap", lambda self: capped.append(self.total_bytes / GIB))
    fits = cache("--vram_budget_gib", tiny_budget("encode", None), folder="whole")
    assert fits.code == 0
    assert "VAE in fp32, 1 picture at a time, whole: CUDA 0.75 + VAE 0.00 + working memory 0.01 = 0.76 GiB" in fits.out
    assert "peak: predicted 0.76 GiB, not measured: no GPU" in fits.out
    tiled = cache("--vram_budget_gib", tiny_budget("encode", 192), folder="tiled")
    assert "VAE in fp32, 1 picture at a time, in tiles of 192 px: " in tiled.out
    saved = json.loads((tmp_path / "tiled" / "run.json").read_text())
    assert saved["predicted_bytes"] == pytest.approx(tiny_budget("encode", 192) * GIB, abs=2000)
    assert saved["measured_bytes"] == 0
    assert saved["flags"]["vram_budget_gib"] == tiny_budget("encode", 192)
    assert capped == pytest.approx([tiny_budget("encode", None), tiny_budget("encode", 192)])
    for path in (tmp_path / "latents").glob("*.safetensors"):
        expected, whole, tiles = (load_file(tmp_path / name / path.name) for name in ("latents", "whole", "tiled"))
        for key in expected:
            torch.testing.assert_close(whole[key], expected[key], rtol=1e-5, atol=1e-5)  # another batch
            assert tiles[key].shape == whole[key].shape
            assert (tiles[key] - whole[key]).norm() / whole[key].norm() > 1e-3  # the same batch: tiles alone differ


def test_a_budget_too_small_deletes_and_writes_nothing(
    cache: Callable[..., Result], tiny_budget: Any, tmp_path: Path
) -> None:
    assert cache().code == 0
    before = {path.name for path in (tmp_path / "latents").iterdir()}
    short = ("--vram_budget_gib", tiny_budget("encode", 128) - 1e-4)
    result = cache("--vae_precision", "fp32", "--alpha_background", "mean", "--overwrite", *short)
    assert result.code == 2
    assert result.err == "error: the VAE in fp32 needs at least 0.76 GiB: type --vram_budget_gib 0.76\n"
    assert {path.name for path in (tmp_path / "latents").iterdir()} == before
    assert cache(*short).code == 0  # all cached: nothing needs to fit


def test_a_forced_tile_of_latents_is_the_one_that_a_budget_chooses(
    cache: Callable[..., Result], tiny_budget: Any, tmp_path: Path
) -> None:
    chosen = cache("--vram_budget_gib", tiny_budget("encode", 128), folder="chosen")
    forced = cache("--vae_tile", 128, "--vae_batch_size", 1, folder="forced")
    whole = cache("--vae_tile", 256, "--vae_batch_size", 1, folder="whole")
    assert chosen.out.count("; --overwrite with a larger --vram_budget_gib will replace them\n") == 1
    assert forced.out.count("; --overwrite with --vae_tile whole will replace them\n") == 1
    assert "note: " not in whole.out
    for path in (tmp_path / "chosen").glob("*.safetensors"):
        expected, tiles, pictures = (load_file(tmp_path / name / path.name) for name in ("chosen", "forced", "whole"))
        assert all(torch.equal(tiles[key], expected[key]) for key in expected)
        assert not any(torch.equal(tiles[key], pictures[key]) for key in expected)


def test_a_whole_picture_forced_over_a_small_budget_writes_nothing(
    cache: Callable[..., Result], tiny_budget: Any, tmp_path: Path
) -> None:
    small = ("--vram_budget_gib", tiny_budget("encode", 192), "--vae_precision", "fp32")
    result = cache("--vae_tile", "whole", *small)
    assert result.code == 2
    assert result.err == (
        "error: --vae_tile whole: the VAE in fp32 needs at least 0.77 GiB: "
        "type --vram_budget_gib 0.77, or --vae_tile 192\n"
    )
    assert not list((tmp_path / "latents").glob("*.safetensors"))
    assert cache("--vae_tile", 192, *small).code == 0
    result = cache("--vae_tile", 100)
    assert result.err == "error: --vae_tile 100 is not auto, whole or a multiple of 32 pixels: type --vae_tile 96\n"


def test_a_plan_loads_and_writes_nothing(
    cache: Callable[..., Result],
    script: Callable[..., Result],
    prepared: Prepared,
    tiny_budget: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the VAE is loaded, or the allocator capped")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", load)
    monkeypatch.setattr(DeviceBudget, "cap", load)
    result = cache("--plan")
    assert result.code == 0
    assert result.out.endswith("16 pictures at a time, whole: CUDA 0.75 + VAE 0.00 + working memory 0.18 = 0.93 GiB\n")
    unfinished = tmp_path / "begun" / f".{'0' * 64}.4194305.unfinished"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half")
    result = cache("--plan", "--vram_budget_gib", tiny_budget("encode", 128), folder="begun")
    assert "1 picture at a time, in tiles of 128 px: " in result.out
    assert list(unfinished.parent.iterdir()) == [unfinished]  # perhaps of a run that goes on meanwhile
    flags = ["--pretrained_model_name_or_path", prepared.model, "--outdir", tmp_path / "drawn", "--prompt", PROMPT]
    result = script("inference", *flags, "--height", 256, "--width", 256, "--plan")
    assert result.code == 0
    assert "VAE in fp32, 1 picture at a time, whole: CUDA 0.75" in result.out
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "begun"}


def test_a_picture_is_decoded_within_a_budget(
    script: Callable[..., Result],
    prepared: Prepared,
    tiny_budget: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(name: str, *words: object) -> tuple[Result, np.ndarray]:
        flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
        flags += ["--outdir", tmp_path / name, "--num_steps", 1, "--max_sequence_length", 20, "--prompt", PROMPT]
        result = script("inference", *flags, "--height", 256, "--width", 256, "--device", "cpu", *words)
        assert result.code == 0, result.err
        path = sorted((tmp_path / name).glob("*/img_00*.png"))[-1]  # of other settings: img_00_2.png
        return result, np.asarray(Image.open(path)).astype(int)

    for name in ("UNUSED_BYTES", "WORKSPACE_BYTES"):  # of the transformer: more than the tiny one's budgets
        monkeypatch.setattr(memory_plan, name, 0)
    capped: list[float] = []
    monkeypatch.setattr(DeviceBudget, "cap", lambda self: capped.append(self.total_bytes / GIB))
    _, expected = draw("free")
    _, whole = draw("whole", "--vram_budget_gib", tiny_budget("decode", None))
    result, tiled = draw("tiled", "--vram_budget_gib", tiny_budget("decode", 128))
    assert "in tiles of 128 px" in result.out
    assert capped == pytest.approx([tiny_budget("decode", None), tiny_budget("decode", 128)])
    assert (whole == expected).all()
    assert 0 < np.abs(tiled - expected).mean() < 30
    result, forced = draw("free", "--vae_tile", 128)  # drawn whole before
    assert "1 picture of 256×256, 0 of them drawn before" in result.out
    assert (forced == tiled).all()


def test_a_new_prompt_is_encoded_within_the_same_budget(
    script: Callable[..., Result], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder_plan, "_MARGIN_BYTES", GIB // 4)  # a tiny T5 would fit wherever the VAE does
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    flags += ["--outdir", tmp_path / "drawn", "--num_steps", 1, "--max_sequence_length", 20, "--prompt", "unknown"]
    result = script("inference", *flags, "--device", "cpu", "--vram_budget_gib", 0.9)  # enough to decode 64 px
    assert result.code == 2
    assert result.err == (
        "error: T5 in fp32, one block at a time, 1 prompt at a time needs at least 1.01 GiB: "
        "type --vram_budget_gib 1.01\n"
    )
