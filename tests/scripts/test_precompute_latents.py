"""Pictures to posteriors, through the script: the VAE's own numbers, computed once, added to, resumed."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import precompute_latents
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.stage_one import latent_cache
from sd3_lora.stage_one.crop_boxes import crop_boxes, crop_rgb, to_pixels
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.stage_one.images import open_rgb
from sd3_lora.stage_one.latent_cache import LatentCache, normalize_latents

import numpy as np
import pytest
import torch
from conftest import Prepared, Result, save_pictures, save_tiny_sd3
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image, ImageOps
from safetensors.torch import load, load_file
from training_runs import write_again

WIDE, SQUARE, TALL = "00.png", "01.png", "02.png"  # 96×64, 64×64, 64×90 pixels
Cached = dict[str, dict[str, torch.Tensor]]  # by picture, by variant.mean and variant.std


@pytest.fixture
def cache(script: Callable[..., Result], tiny_sd3: Path, pictures: Path, tmp_path: Path) -> Callable[..., Result]:
    """`cache("--random_flip")` runs the script into the folder `latents`."""

    def call(*words: object, model: Path = tiny_sd3) -> Result:
        shared = ["--pretrained_model_name_or_path", model, "--instance_data_dir", pictures, "--device", "cpu"]
        return script("precompute_latents", *shared, "--output_path", tmp_path / "latents", *words)

    return call


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    return tmp_path / "latents"


@pytest.fixture(scope="module")
def vae(tiny_sd3: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_sd3 / "vae")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The picture and variant of each crop, by batch of the VAE."""
    calls: list[list[tuple[str, str]]] = []
    encode = precompute_latents.encode

    def watched(compute: Any, crops: list[Any], device: torch.device) -> Any:
        calls.append([(crop.image.path.name, crop.box.name) for crop in crops])
        return encode(compute, crops, device)

    monkeypatch.setattr(precompute_latents, "encode", watched)
    return calls


@pytest.fixture
def no_vae(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, loading a VAE fails."""

    def forbid() -> None:
        def load(*_: Any, **__: Any) -> Any:
            raise AssertionError("the VAE is loaded")

        monkeypatch.setattr(AutoencoderKL, "from_pretrained", load)

    return forbid


def variants(latents: Path, picture: Path) -> list[str]:
    names = load_file(latents / f"{hash_file(picture)}.safetensors")
    return sorted(name.removesuffix(".mean") for name in names if name.endswith(".mean"))


def read(latents: Path) -> Cached:
    return {path.stem: load(path.read_bytes()) for path in sorted(latents.glob("*.safetensors"))}


def bit_equal(one: Cached, other: Cached) -> bool:
    return one.keys() == other.keys() and all(
        one[key].keys() == other[key].keys() and all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        for key in one
    )


def refused(result: Result, *parts: str) -> bool:
    """One sentence on stderr, exit code 2, no traceback."""
    assert result.code == 2, repr(result.err)
    assert result.err.splitlines()[-1].startswith("error: "), repr(result.err)
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err
    return True


# The VAE's own numbers


@torch.no_grad()
def test_the_cache_holds_what_the_vae_says_of_each_crop(prepared: Prepared, vae: AutoencoderKL) -> None:
    files = ModelFiles(ModelConfig(str(prepared.model)))
    cache = LatentCache(prepared.latents, files.provenance(["vae"], "fp32", 64), "white")
    count = 0
    for path in sorted(prepared.pictures.glob("*.png")):
        picture, image_id = open_rgb(path), hash_file(path)
        boxes = crop_boxes(*picture.size, PictureSize.square(64), 3, flip=False)
        assert cache.variants(image_id) == tuple(sorted(box.name for box in boxes))
        assert cache.look(image_id).size == picture.size  # type: ignore[union-attr]
        for box in boxes:
            expected = vae.encode(to_pixels(crop_rgb(picture, box))[None]).latent_dist
            found = cache.read(image_id, box.name)
            assert found.mean.dtype == found.std.dtype == torch.float32
            torch.testing.assert_close(found.mean, expected.mean[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.std, expected.std[0], rtol=1e-5, atol=1e-5)
            count += 1
    assert count == 13  # one crop of the square picture, three of each of the four others


@torch.no_grad()
def test_decoding_a_cached_mean_as_the_stock_pipeline_does_gives_the_posterior_s_mode(prepared: Prepared) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(prepared.model)
    pipeline.set_progress_bar_config(disable=True)
    # A velocity of zero: what goes into the sampler is what the pipeline decodes.
    pipeline.transformer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states),)
    path = prepared.pictures / "00.png"
    box = crop_boxes(*open_rgb(path).size, PictureSize.square(64), 1, flip=False)[0]
    mean = load_file(prepared.latents / f"{hash_file(path)}.safetensors")[f"{box.name}.mean"][None]
    drawn = pipeline(
        prompt_embeds=torch.zeros(1, 97, 48), pooled_prompt_embeds=torch.zeros(1, 24), guidance_scale=0.0,
        height=64, width=64, num_inference_steps=2, output_type="pt",
        latents=normalize_latents(mean, pipeline.vae.config),
    ).images  # fmt: skip
    mode = pipeline.vae.encode(to_pixels(crop_rgb(open_rgb(path), box))[None]).latent_dist.mode()
    expected = (pipeline.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    without_shift = pipeline.vae.decode(mode + pipeline.vae.config.shift_factor).sample / 2 + 0.5
    assert (without_shift.clamp(0, 1) - expected).abs().max() > 1e-3


def test_a_batch_gives_what_one_picture_gives(cache: Callable[..., Result], latents: Path, encoded: list[Any]) -> None:
    assert cache("--vae_batch_size", 4, "--random_flip").code == 0
    together = read(latents)
    assert max(map(len, encoded)) == 4
    shutil.rmtree(latents)
    encoded.clear()
    assert cache("--vae_batch_size", 1, "--random_flip").code == 0
    assert set(map(len, encoded)) == {1}
    alone = read(latents)
    assert together.keys() == alone.keys()
    for key, tensors in alone.items():
        assert tensors.keys() == together[key].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(together[key][name], tensor, rtol=1e-5, atol=1e-5)


def test_the_default_batch_takes_the_memory_of_one_large_crop() -> None:
    sizes = {side: precompute_latents.LatentConfig().batch_size(side) for side in (2048, 1024, 768, 512, 256, 128)}
    assert sizes == {2048: 1, 1024: 1, 768: 1, 512: 4, 256: 16, 128: 16}
    assert precompute_latents.LatentConfig(vae_batch_size=3).batch_size(1024) == 3


def test_fp16_is_recorded_and_stored(cache: Callable[..., Result], latents: Path) -> None:
    cache()
    exact = read(latents)
    assert cache("--vae_precision", "fp16", "--overwrite", "--center_crop").code == 0
    for key, tensors in read(latents).items():
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float16
            assert 0 < (tensor.float() - exact[key][name]).abs().max() < 0.02
    assert "VAE in fp16" in cache("--center_crop").out  # as the cache has it


# Variants


def test_crops_along_the_longer_side(cache: Callable[..., Result], latents: Path, pictures: Path) -> None:
    assert cache().code == 0
    assert variants(latents, pictures / WIDE) == ["64x64+0+0", "64x64+16+0", "64x64+32+0"]
    assert variants(latents, pictures / SQUARE) == ["64x64+0+0"]
    assert variants(latents, pictures / TALL) == ["64x64+0+0", "64x64+0+13", "64x64+0+26"]


@pytest.mark.parametrize("words", [["--center_crop"], ["--num_crops", "1"], ["--center_crop", "--num_crops", "5"]])
def test_one_crop_from_the_centre(
    cache: Callable[..., Result], latents: Path, pictures: Path, words: list[str]
) -> None:
    assert cache(*words).code == 0
    found = [variants(latents, pictures / name) for name in (WIDE, SQUARE, TALL)]
    assert found == [["64x64+16+0"], ["64x64+0+0"], ["64x64+0+13"]]


def test_two_crops_are_the_ends(cache: Callable[..., Result], latents: Path, pictures: Path) -> None:
    assert cache("--num_crops", 2).code == 0
    found = [variants(latents, pictures / name) for name in (WIDE, SQUARE, TALL)]
    assert found == [["64x64+0+0", "64x64+32+0"], ["64x64+0+0"], ["64x64+0+0", "64x64+0+26"]]


@torch.no_grad()
def test_a_flip_is_the_posterior_of_the_mirrored_pixels(
    cache: Callable[..., Result], latents: Path, pictures: Path, vae: AutoencoderKL
) -> None:
    assert cache("--random_flip", "--center_crop").code == 0
    assert variants(latents, pictures / SQUARE) == ["64x64+0+0", "64x64+0+0-flip"]
    tensors = load_file(latents / f"{hash_file(pictures / SQUARE)}.safetensors")
    pixels = torch.from_numpy(np.array(ImageOps.mirror(Image.open(pictures / SQUARE)))).permute(2, 0, 1)
    expected = vae.encode((pixels.float() / 127.5 - 1)[None]).latent_dist
    torch.testing.assert_close(tensors["64x64+0+0-flip.mean"], expected.mean[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tensors["64x64+0+0-flip.std"], expected.std[0], rtol=1e-5, atol=1e-5)
    mirrored_latents = tensors["64x64+0+0.mean"].flip(-1)  # an encoder is not symmetric: this would be wrong
    assert (tensors["64x64+0+0-flip.mean"] - mirrored_latents).abs().max() > 1e-3


def test_the_resolution_is_the_model_s_own_or_as_asked(
    cache: Callable[..., Result], latents: Path, pictures: Path
) -> None:
    assert "; 64 px, VAE in fp32" in cache("--center_crop").out
    assert cache("--center_crop", "--resolution", 32, "--overwrite").code == 0
    tensors = load_file(latents / f"{hash_file(pictures / WIDE)}.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "32x32+8+0.mean": (16, 4, 4),
        "32x32+8+0.std": (16, 4, 4),
    }


@torch.no_grad()
def test_what_shows_through_transparent_pixels(
    cache: Callable[..., Result], latents: Path, pictures: Path, vae: AutoencoderKL
) -> None:
    for path in pictures.iterdir():
        path.unlink()
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture.save(pictures / "half.png")
    for background, color in (("white", (255, 255, 255)), ("mean", (255, 0, 0))):
        assert cache("--alpha_background", background, "--overwrite").code == 0
        flat = Image.new("RGB", (64, 64), color)
        flat.paste((255, 0, 0), (0, 0, 32, 64))
        pixels = torch.from_numpy(np.array(flat)).permute(2, 0, 1).float() / 127.5 - 1
        (tensors,) = read(latents).values()
        expected = vae.encode(pixels[None]).latent_dist.mean[0]
        torch.testing.assert_close(tensors["64x64+0+0.mean"], expected, rtol=1e-5, atol=1e-5)
    assert refused(
        cache("--alpha_background", "white"), "was made with alpha_background mean, not white", "--overwrite"
    )


# Computed once, added to, resumed


def test_a_second_run_loads_no_vae(cache: Callable[..., Result], latents: Path, no_vae: Callable[[], None]) -> None:
    cache()
    before = {path.name: path.read_bytes() for path in latents.glob("*.safetensors")}
    no_vae()
    result = cache()
    assert result.code == 0
    assert "3 of 3 pictures cached before" in result.out
    assert "wrote 0 crops of 0 pictures" in result.out
    assert {path.name: path.read_bytes() for path in latents.glob("*.safetensors")} == before


def test_a_deleted_file_is_computed_again_alone(
    cache: Callable[..., Result], latents: Path, pictures: Path, encoded: list[Any]
) -> None:
    cache("--center_crop")
    before = read(latents)
    (latents / f"{hash_file(pictures / SQUARE)}.safetensors").unlink()
    encoded.clear()
    assert "2 of 3 pictures cached before" in cache("--center_crop").out
    assert encoded == [[(SQUARE, "64x64+0+0")]]
    after = read(latents)
    assert after.keys() == before.keys()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_cache_that_holds_more_is_valid(
    cache: Callable[..., Result], latents: Path, pictures: Path, no_vae: Callable[[], None]
) -> None:
    cache("--random_flip")
    before = read(latents)
    (pictures / TALL).unlink()
    no_vae()
    for words in ([], ["--center_crop"], ["--num_crops", 2], ["--num_crops", 2, "--random_flip"]):
        result = cache(*words)
        assert result.code == 0
        assert "2 of 2 pictures cached before" in result.out
    assert bit_equal(read(latents), before)


def test_what_is_missing_is_added_and_the_rest_stays(
    cache: Callable[..., Result], latents: Path, pictures: Path, encoded: list[Any]
) -> None:
    cache("--center_crop")
    before = read(latents)
    encoded.clear()
    result = cache("--random_flip", "--vae_batch_size", 100)
    assert "wrote 11 crops of 3 pictures" in result.out
    assert sorted(encoded[0]) == [
        *((WIDE, f"64x64+{x}+0{flip}") for x, flip in [(0, ""), (0, "-flip"), (16, "-flip"), (32, ""), (32, "-flip")]),
        (SQUARE, "64x64+0+0-flip"),
        *((TALL, f"64x64+0+{y}{flip}") for y, flip in [(0, ""), (0, "-flip"), (13, "-flip"), (26, ""), (26, "-flip")]),
    ]
    after = read(latents)
    assert bit_equal({key: {name: after[key][name] for name in tensors} for key, tensors in before.items()}, before)
    assert [len(variants(latents, pictures / name)) for name in (WIDE, SQUARE, TALL)] == [6, 2, 6]


def test_a_changed_picture_gets_its_own_file(
    cache: Callable[..., Result], latents: Path, pictures: Path, encoded: list[Any]
) -> None:
    cache("--center_crop")
    before = read(latents)
    encoded.clear()
    save_pictures(pictures, [(64, 64)], seed=7)  # 00.png
    cache("--center_crop")
    assert encoded == [[(WIDE, "64x64+0+0")]]
    after = read(latents)
    assert len(after) == 4
    assert bit_equal({key: after[key] for key in before}, before)


def test_an_interrupted_run_leaves_whole_files_and_goes_on(
    cache: Callable[..., Result],
    latents: Path,
    encoded: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cache("--center_crop", "--vae_batch_size", 1).code == 0
    undisturbed = read(latents)
    shutil.rmtree(latents)
    encoded.clear()
    watched = precompute_latents.encode

    def interrupted(*args: Any) -> Any:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return watched(*args)

    with monkeypatch.context() as patch:
        patch.setattr(precompute_latents, "encode", interrupted)
        result = cache("--center_crop", "--vae_batch_size", 1)
    assert result.code == 130
    assert "run the same command again to go on" in result.err
    assert [path.suffix for path in latents.iterdir()] == [".safetensors"]  # and one was under way
    assert all(tensors.keys() == undisturbed[key].keys() for key, tensors in read(latents).items())

    (latents / f".{'0' * 64}.4194305.unfinished").write_bytes(b"half")  # what a SIGKILL leaves
    encoded.clear()
    result = cache("--center_crop", "--vae_batch_size", 1)
    assert "1 of 3 pictures cached before" in result.out
    assert len(encoded) == 2
    assert bit_equal(read(latents), undisturbed)
    assert not list(latents.glob(".*"))


def test_an_interruption_while_a_file_is_written_leaves_whole_files(
    cache: Callable[..., Result], latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, tensors: object, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latent_cache, "write_tensors", half)
        assert cache().code == 130
    assert read(latents) == {}
    assert "0 of 3 pictures cached before" in cache().out
    assert sorted(path.suffix for path in latents.iterdir()) == [".json", *[".safetensors"] * 3]


# Which pictures


def test_files_that_are_no_pictures_are_listed(cache: Callable[..., Result], pictures: Path) -> None:
    (pictures / "00.txt").write_text("a caption is no stranger")
    (pictures / "notes.pdf").write_text("%PDF")
    (pictures / ".cache").mkdir()
    save_pictures(pictures / "more", [(64, 64)], seed=3)
    result = cache("--center_crop")
    assert "3 pictures in" in result.out
    assert "3 other files left out" in result.out
    left_out = [line for line in result.out.splitlines() if line.startswith("left out: ")]
    assert left_out == ["left out: .cache, more, notes.pdf"]
    assert "wrote 1 crop of 1 picture" in cache("--center_crop", "--recursive").out


def test_identical_pictures_are_encoded_once(cache: Callable[..., Result], pictures: Path, encoded: list[Any]) -> None:
    shutil.copy(pictures / SQUARE, pictures / "copy.png")
    result = cache("--center_crop")
    assert "identical pictures, used once: 01.png, copy.png" in result.out
    assert "wrote 3 crops of 3 pictures" in result.out
    assert sum(map(len, encoded)) == 3


def test_broken_pictures_are_named_and_cost_the_others_nothing(
    cache: Callable[..., Result], pictures: Path, latents: Path, no_vae: Callable[[], None]
) -> None:
    whole = (pictures / WIDE).read_bytes()
    (pictures / WIDE).write_bytes(whole[: len(whole) // 2])
    result = cache("--center_crop")
    assert refused(result, f"{pictures / WIDE} does not decode (", "): remove it, or add --skip_broken to go on")
    assert f"broken: {pictures / WIDE} does not decode (" in result.out
    assert "wrote 2 crops of 2 pictures" in result.out
    (pictures / TALL).write_bytes(b"\x89PNG\r\n\x1a\n")
    result = cache("--center_crop")
    assert refused(result, "(and 1 more)")
    assert result.out.count("broken: ") == 2
    for name in (WIDE, TALL):
        (pictures / name).unlink()
    no_vae()
    result = cache("--center_crop")
    assert result.code == 0
    assert "1 of 1 picture cached before" in result.out
    assert len(read(latents)) == 2  # of the square picture, and of what the tall one was


def test_no_picture_that_decodes(cache: Callable[..., Result], pictures: Path, latents: Path) -> None:
    for name in (WIDE, SQUARE, TALL):
        (pictures / name).write_bytes(b"no picture at all" + name.encode())
    assert refused(cache("--skip_broken"), "no picture decodes: give another --instance_data_dir")
    assert read(latents) == {}


def test_skip_broken_goes_on(cache: Callable[..., Result], pictures: Path, encoded: list[Any], latents: Path) -> None:
    (pictures / SQUARE).write_bytes(b"no picture at all")
    result = cache("--skip_broken", "--center_crop")
    assert result.code == 0
    assert "error" not in result.err
    assert f"skipped: {pictures / SQUARE} does not decode (not a picture in a known format)" in result.out
    assert [name for batch in encoded for name, _ in batch] == [WIDE, TALL]
    assert len(read(latents)) == 2
    noted = json.loads((latents / "broken.json").read_text(encoding="utf-8"))
    assert noted == {hash_file(pictures / SQUARE): [str(pictures / SQUARE), "not a picture in a known format"]}


def test_what_is_skipped_is_noted_only_when_asked_and_while_it_is_so(
    cache: Callable[..., Result], pictures: Path, latents: Path
) -> None:
    whole = (pictures / SQUARE).read_bytes()
    (pictures / SQUARE).write_bytes(b"no picture at all")
    assert cache("--center_crop").code == 2
    assert not (latents / "broken.json").exists()
    assert cache("--center_crop", "--skip_broken").code == 0
    (pictures / SQUARE).write_bytes(whole)
    (pictures / WIDE).write_bytes(b"nor this")
    assert cache("--center_crop", "--skip_broken").code == 0
    names = {Path(path).name for path, _ in json.loads((latents / "broken.json").read_text()).values()}
    assert names == {SQUARE, WIDE}  # the earlier bytes may come back
    assert set(LatentCache(latents, None).broken()) == set(json.loads((latents / "broken.json").read_text()))


def test_broken_pictures_leave_no_bitmap_in_memory(
    cache: Callable[..., Result], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that is kept holds its traceback, and this the picture as far as it was decoded."""
    for number in range(8):
        save_pictures(pictures, [(64, 64)], seed=number + 1)
        (pictures / "00.png").rename(pictures / f"cut{number}.png")
        content = (pictures / f"cut{number}.png").read_bytes()
        (pictures / f"cut{number}.png").write_bytes(content[: len(content) // 2])
    opened: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(*args: Any, **more: Any) -> Any:
        picture = open_picture(*args, **more)
        opened.append(weakref.ref(picture))
        return picture

    def counted(self: LatentCache, broken: Any) -> None:
        alive.append(sum(picture() is not None for picture in opened))
        note_broken(self, broken)

    open_picture, note_broken = Image.open, LatentCache.note_broken
    monkeypatch.setattr(Image, "open", watched)
    monkeypatch.setattr(LatentCache, "note_broken", counted)
    gc.disable()
    try:
        result = cache("--skip_broken")
    finally:
        gc.enable()
    assert result.out.count("skipped: ") == 8
    assert (len(opened), alive) == (10, [0])


def test_what_was_done_is_saved(cache: Callable[..., Result], latents: Path, tiny_sd3: Path) -> None:
    result = cache("--num_crops", 2)
    saved = json.loads((latents / "run.json").read_text(encoding="utf-8"))
    assert saved["flags"]["num_crops"] == 2
    assert saved["flags"]["pretrained_model_name_or_path"] == str(tiny_sd3)
    assert [stage["name"] for stage in saved["stages"]] == ["encode pictures"]
    assert (saved["model"], saved["precision"], saved["resolution"]) == (str(tiny_sd3), "fp32", 64)
    assert (saved["plan"]["side_px"], saved["predicted_parts"], saved["predicted_bytes"]) == (None, {}, 0)
    assert f"wrote 5 crops of 3 pictures to {latents}" in result.out
    assert "next, with a prompt of your own: python compute_embeddings.py --pretrained_model_name_or" in result.out


def test_pictures_that_suit_the_resolution_ill_are_told(cache: Callable[..., Result], pictures: Path) -> None:
    assert "note: " not in cache().out
    Image.new("RGB", (7, 9), "red").save(pictures / "tiny.png")
    Image.new("RGB", (3000, 40), "blue").save(pictures / "panorama.png")
    for _ in range(2):  # in a finished cache as well
        result = cache()
        assert "note: 1 of 5 pictures are enlarged more than 2 times, tiny.png 9 times: a LoRA learns the" in result.out
        assert "note: of 1 of 5 pictures the crops see less than 50%, of panorama.png 4%: cut them to the" in result.out


# Made otherwise


@pytest.fixture(scope="module")
def other_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes as `tiny_sd3`, other weights."""
    return save_tiny_sd3(tmp_path_factory.mktemp("other"), seed=1, width=48)


@pytest.mark.parametrize("change", ["resolution", "precision", "model", "alpha"])
def test_a_cache_made_otherwise_stays_and_overwrite_replaces_it(
    cache: Callable[..., Result], latents: Path, tiny_sd3: Path, other_sd3: Path, change: str, encoded: list[Any]
) -> None:
    cache("--center_crop")
    before = {path.name: path.read_bytes() for path in latents.glob("*.safetensors")}
    encoded.clear()
    words, model, difference = {
        "resolution": (["--resolution", 32], tiny_sd3, "resolution 64, not 32"),
        "precision": (["--vae_precision", "fp16"], tiny_sd3, "precision fp32, not fp16"),
        "model": ([], other_sd3, f"model {tiny_sd3}, not {other_sd3}"),
        "alpha": (["--alpha_background", "mean"], tiny_sd3, "alpha_background white, not mean"),
    }[change]
    result = cache("--center_crop", *words, model=model)
    assert refused(result, f".safetensors was made with {difference}: add --overwrite to precompute_latents.py")
    assert encoded == []
    assert {path.name: path.read_bytes() for path in latents.glob("*.safetensors")} == before

    assert cache("--center_crop", *words, "--overwrite", model=model).code == 0
    assert sum(map(len, encoded)) == 3
    after = {path.name: path.read_bytes() for path in latents.glob("*.safetensors")}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    assert "3 of 3 pictures cached before" in cache("--center_crop", *words, model=model).out


def test_overwrite_keeps_what_fits(cache: Callable[..., Result], no_vae: Callable[[], None]) -> None:
    cache()
    no_vae()
    assert "3 of 3 pictures cached before" in cache("--overwrite").out


def test_overwrite_leaves_one_precision_in_the_cache(
    cache: Callable[..., Result], latents: Path, pictures: Path
) -> None:
    cache("--center_crop", "--vae_precision", "fp16")
    shutil.copy(latents / f"{hash_file(pictures / TALL)}.safetensors", latents / f"{'0' * 64}.safetensors")
    (latents / "someone-else-s.safetensors").write_bytes(b"not ours to delete")
    assert cache("--center_crop", "--vae_precision", "fp32", "--overwrite").code == 0
    # A picture that is no longer in the folder must not decide the precision of the next run.
    assert not (latents / f"{'0' * 64}.safetensors").exists()
    assert (latents / "someone-else-s.safetensors").exists()
    assert "3 of 3 pictures cached before; 64 px, VAE in fp32" in cache("--center_crop").out


def test_overwrite_replaces_the_others_of_a_broken_picture(
    cache: Callable[..., Result], latents: Path, pictures: Path
) -> None:
    cache()
    before = read(latents)
    (pictures / "broken.png").write_bytes(b"no picture at all")
    assert refused(cache("--vae_precision", "fp16", "--overwrite"), "broken.png does not decode")
    after = read(latents)
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensors in after.values() for tensor in tensors.values()} == {torch.float16}


def test_a_truncated_file_is_named_and_overwrite_replaces_it(
    cache: Callable[..., Result], latents: Path, pictures: Path, encoded: list[Any]
) -> None:
    cache("--center_crop")
    before = read(latents)
    path = latents / f"{hash_file(pictures / WIDE)}.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert refused(cache("--center_crop"), f"{path} is not a whole latent file", "delete it and run")
    encoded.clear()
    assert cache("--center_crop", "--overwrite").code == 0
    assert encoded == [[(WIDE, "64x64+16+0")]]
    torch.testing.assert_close(read(latents), before, rtol=1e-5, atol=1e-5)


# Numbers that are not finite


@pytest.mark.parametrize(
    ("precision", "remedy"), [("fp16", "type --vae_precision fp32 --overwrite"), ("fp32", "remove it")]
)
def test_a_posterior_that_is_not_finite_is_never_written(
    cache: Callable[..., Result],
    latents: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    remedy: str,
) -> None:
    encode = AutoencoderKL.encode

    def overflowing(self: AutoencoderKL, pixels: torch.Tensor) -> Any:
        output = encode(self, pixels)
        output.latent_dist.mean[-1, 5, 1, 1] = float("inf")
        return output

    monkeypatch.setattr(AutoencoderKL, "encode", overflowing)
    result = cache("--center_crop", "--vae_batch_size", 2, "--vae_precision", precision)
    assert refused(result, f"the VAE gives a NaN or infinity for {pictures / SQUARE} in ", remedy)
    assert list(read(latents)) == [hash_file(pictures / WIDE)]  # what came before is kept


def test_a_nan_in_a_file_stops_what_would_add_to_it(
    cache: Callable[..., Result], latents: Path, pictures: Path
) -> None:
    cache("--center_crop")
    path = latents / f"{hash_file(pictures / WIDE)}.safetensors"
    tensors = load_file(path)
    tensors["64x64+16+0.std"][0, 0, 0] = float("nan")
    write_again(path, tensors)
    assert refused(cache("--random_flip"), f"{path} holds a NaN or infinity: delete it and run")
