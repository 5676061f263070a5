"""A cache of whole and tiled posteriors says which are which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.records import InstanceImage, LatentPosterior
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.stage_one.latent_cache import LatentCache
from sd3_lora.stage_one.vae_tiles import VaeWork, vae_weight_bytes, working_bytes
from sd3_lora.training.artefacts import StageOne
from sd3_lora.training.crops import choose_crops
from sd3_lora.training.data_flags import DataConfig
from sd3_lora.training.stage_one_request import StageOneRequest

import pytest
import torch
from conftest import Prepared, Result, save_pictures
from safetensors import safe_open
from training_runs import Script, train, write_again

Budget = Callable[[int | None], list[object]]


@pytest.fixture
def within(tiny_sd3: Path) -> Budget:
    """`--vram_budget_gib` that just fits a tile of so many pixels of a 256 px picture; None for the whole."""

    def words(side: int | None) -> list[object]:
        files = ModelFiles(ModelConfig(str(tiny_sd3)))
        work = VaeWork("encode", "fp32", PictureSize.square(256))
        needed = vae_weight_bytes(files, "fp32") + working_bytes(files, work, side, 1)
        return ["--vram_budget_gib", 0.75 + (needed + 1000) / GIB]

    return words


@pytest.fixture
def run(script: Callable[..., Result], tiny_sd3: Path, tmp_path: Path) -> Callable[..., Result]:
    """Caches the folder `pictures`, two square ones at first, into `latents`."""
    save_pictures(tmp_path / "pictures", [(256, 256), (256, 256)])

    def call(*words: object) -> Result:
        shared = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", tmp_path / "pictures"]
        shared += ["--device", "cpu", "--resolution", 256, "--output_path", tmp_path / "latents"]
        result = script("precompute_latents", *shared, *words)
        assert result.code == 0, result.err
        return result

    return call


@pytest.fixture
def tiles(tiny_sd3: Path, tmp_path: Path) -> Callable[[], list[dict[str, int]]]:
    """Of each picture in the folder, by its name."""

    def read() -> list[dict[str, int]]:
        files = ModelFiles(ModelConfig(str(tiny_sd3)))
        cache = LatentCache(tmp_path / "latents", files.provenance(["vae"], "fp32", 256))
        return [cache.tiles(hash_file(path)) for path in sorted((tmp_path / "pictures").iterdir())]

    return read


def test_a_tiled_posterior_says_so_and_a_whole_one_stays(
    run: Callable[..., Result], within: Budget, tiles: Callable[..., list[dict[str, int]]], tmp_path: Path
) -> None:
    assert "in tiles" not in run(*within(None)).out
    before = {path.name: path.read_bytes() for path in (tmp_path / "latents").glob("*.safetensors")}
    save_pictures(tmp_path / "pictures" / "more", [(256, 256)], seed=3)
    result = run(*within(192), "--recursive")
    assert "in tiles of 192 px" in result.out
    assert result.out.count("note: at its borders a tile sees less") == 1
    after = {path.name: path.read_bytes() for path in (tmp_path / "latents").glob("*.safetensors")}
    assert before.items() <= after.items()
    assert len(after) == 3
    (tmp_path / "pictures" / "more" / "00.png").rename(tmp_path / "pictures" / "02.png")
    (tmp_path / "pictures" / "more").rmdir()
    assert tiles() == [{}, {}, {"256x256+0+0": 192}]
    assert "3 of 3 pictures cached before (1 of them in tiles)" in run().out


def test_overwrite_replaces_what_is_less_whole_and_nothing_else(
    run: Callable[..., Result], within: Budget, tiles: Callable[..., list[dict[str, int]]], tmp_path: Path
) -> None:
    run(*within(128))
    assert "2 of 2 pictures cached before (2 of them in tiles)" in run().out
    assert "wrote 2 crops" in run(*within(192), "--overwrite").out
    assert tiles() == [{"256x256+0+0": 192}] * 2
    assert "wrote 0 crops" in run(*within(128), "--overwrite").out
    assert tiles() == [{"256x256+0+0": 192}] * 2
    assert "wrote 2 crops" in run("--overwrite").out
    assert tiles() == [{}, {}]
    assert "wrote 0 crops" in run(*within(128), "--overwrite").out


def test_each_variant_has_its_own(
    run: Callable[..., Result], within: Budget, tiles: Callable[..., list[dict[str, int]]]
) -> None:
    run(*within(None))
    run(*within(128), "--random_flip")
    assert tiles() == [{"256x256+0+0-flip": 128}] * 2


def test_a_forced_tile_replaces_others_under_overwrite_alone(
    run: Callable[..., Result], tiles: Callable[..., list[dict[str, int]]]
) -> None:
    assert "note: " not in run().out
    note = "note: 2 of 2 pictures were cached otherwise than --vae_tile 128: add --overwrite to encode them again\n"
    result = run("--vae_tile", 128)
    assert note in result.out
    assert "wrote 0 crops" in result.out
    assert tiles() == [{}, {}]
    for flag, px in ((128, 128), (192, 192), (128, 128), ("whole", None), (512, None)):
        result = run("--vae_tile", flag, "--overwrite")
        assert ("wrote 2 crops" in result.out) == (flag != 512)  # of a picture of 256 px: whole already
        assert "were cached otherwise" not in result.out
        assert tiles() == [{"256x256+0+0": px} if px else {}] * 2
    assert "note: " not in run("--vae_tile", "whole").out


def test_training_says_once_how_many_are_tiled(script: Script, private: Prepared, tmp_path: Path) -> None:
    files = ModelFiles(ModelConfig(str(private.model)))
    cache = LatentCache(private.latents, files.provenance(["vae"], "fp32", 64), "white")
    assert "in tiles" not in train(script, private, tmp_path / "whole", "--max_train_steps", 1).out
    for name in ("01.png", "03.png"):
        path = private.pictures / name
        image = InstanceImage(hash_file(path), path, "")
        found = cache.look(image.image_id)
        assert found
        zeros = torch.zeros(16, 8, 8)
        posteriors = [LatentPosterior(image.image_id, name, zeros.clone(), zeros.clone()) for name in found.variants]
        cache.add(image, found.size, posteriors, tile_px=32)
    said = train(script, private, tmp_path / "tiled", "--max_train_steps", 1).out
    assert said.count("note: 2 of 5 pictures were encoded in tiles, which differ a little from the whole") == 1


def test_only_the_first_process_says_it(
    private: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(str(private.model))
    request = StageOneRequest(DataConfig(latents_path=str(private.latents)), model, ModelFiles(model), 64, "cpu")
    path = private.pictures / "01.png"
    image = InstanceImage(hash_file(path), path, "")
    cache = StageOne(request).open_latents()
    zeros = torch.zeros(16, 8, 8)
    cache.add(image, (64, 64), [LatentPosterior(image.image_id, "64x64+0+0", zeros, zeros.clone())], tile_px=32)
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        choose_crops(request, (image,), cache)
        assert capsys.readouterr().out.count("1 of 1 pictures were encoded in tiles") == count


def test_a_file_of_before_tiles_were_noted_is_whole(private: Prepared) -> None:
    path = min(private.latents.glob("*.safetensors"))
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    assert '"tiles_px": {}' in metadata["sd3_lora"]
    write_again(path, sd3_lora=metadata["sd3_lora"].replace(', "tiles_px": {}', ""))
    files = ModelFiles(ModelConfig(str(private.model)))
    cache = LatentCache(private.latents, files.provenance(["vae"], "fp32", 64))
    assert cache.variants(path.stem)
    assert cache.tiles(path.stem) == {}
