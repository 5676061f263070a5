"""Caching latents keeps host and device busy: decoded once, ahead, in threads; encoded in whole batches; read late."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import precompute_latents
from precompute_latents import LatentConfig, decode_ahead, one_late
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.stage_one import latent_cache
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.captions import instance_images
from sd3_lora.stage_one.crop_boxes import crop_boxes, crop_rgb, to_pixels
from sd3_lora.stage_one.images import open_rgb
from sd3_lora.stage_one.latent_cache import BrokenPicture, LatentCache
from sd3_lora.stage_one.vae_tiles import VaeTile

import pytest
import torch
from conftest import PROJECT, Result, save_pictures
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from small_transformer import needs_gpu

CENTER = LatentConfig(center_crop=True)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of a dozen square pictures."""
    save_pictures(tmp_path / "many", [(64, 64)] * 12)
    return tmp_path / "many"


@pytest.fixture
def run(script: Callable[..., Result], tiny_sd3: Path, many: Path, tmp_path: Path) -> Callable[..., Result]:
    """Runs the script on them, into the folder `latents`."""

    def call(*words: object) -> Result:
        shared = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", many, "--device", "cpu"]
        return script("precompute_latents", *shared, "--output_path", tmp_path / "latents", *words)

    return call


@pytest.fixture
def crops(many: Path, tiny_sd3: Path, tmp_path: Path) -> Callable[..., Any]:
    """`decode_ahead` of them, in batches and threads of so many."""
    images = instance_images(many, "a prompt").images
    files = ModelFiles(ModelConfig(str(tiny_sd3)))
    cache = LatentCache(tmp_path / "latents", files.provenance(["vae"], "fp32", 64), "white")

    def call(batch_size: int, threads: int, broken: list[BrokenPicture] | None = None) -> Any:
        return decode_ahead(
            images,
            CENTER,
            Buckets.square(cache.resolution),
            cache,
            batch_size,
            threads,
            [] if broken is None else broken,
        )

    return call


def test_a_batch_is_read_once_the_next_has_been_started() -> None:
    events: list[str] = []

    def started():
        for number in range(3):
            events.append(f"start {number}")
            yield number

    events.extend(f"read {number}" for number in one_late(started()))  # type: ignore[type-var]
    assert events == ["start 0", "start 1", "read 0", "start 2", "read 1", "read 2"]
    assert list(one_late([])) == []


def test_every_picture_is_decoded_once(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def watched(path: Path, *args: Any) -> Any:
        opened.append(path.name)
        return open_rgb(path, *args)

    monkeypatch.setattr(precompute_latents, "open_rgb", watched)
    assert "wrote 12 crops of 12 pictures" in run().out
    assert sorted(opened) == [f"{index:02d}.png" for index in range(12)]


def test_as_many_are_decoded_at_a_time_as_there_are_threads(
    crops: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3)

    def waits_for_two_others(path: Path, *args: Any) -> Any:
        together.wait(timeout=20)
        return open_rgb(path, *args)

    monkeypatch.setattr(precompute_latents, "open_rgb", waits_for_two_others)
    assert [crop.image.path.name for crop in crops(1, 3)] == [f"{index:02d}.png" for index in range(12)]


def test_no_more_than_a_batch_and_one_a_thread_are_decoded_ahead(
    crops: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    submit = precompute_latents.ThreadPoolExecutor.submit

    def watched(self: Any, *args: Any) -> Any:
        asked.append(args)
        return submit(self, *args)

    monkeypatch.setattr(precompute_latents.ThreadPoolExecutor, "submit", watched)
    pictures = crops(3, 2)
    for taken in range(1, 13):
        next(pictures)
        assert len(asked) == min(12, taken + 2 + 3 - 1)


def test_giving_up_decodes_no_more(crops: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    released, opened = threading.Event(), []

    def waits(path: Path, *args: Any) -> Any:
        opened.append(path)
        if path.name != "00.png":
            released.wait(timeout=20)
        return open_rgb(path, *args)

    monkeypatch.setattr(precompute_latents, "open_rgb", waits)
    pictures = crops(8, 1)
    next(pictures)
    threading.Timer(0.2, released.set).start()
    pictures.close()
    assert len(opened) <= 2


def test_batches_are_whole_across_pictures(
    run: Callable[..., Result], many: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_pictures(many, [(96, 64)] * 3)  # three crops each; the other nine pictures have one
    sizes: list[int] = []
    encode = precompute_latents.encode

    def watched(compute: Any, crops: Any, device: Any) -> Any:
        sizes.append(len(crops))
        return encode(compute, crops, device)

    monkeypatch.setattr(precompute_latents, "encode", watched)
    assert "wrote 18 crops of 12 pictures" in run("--vae_batch_size", 4).out
    assert sizes == [4, 4, 4, 4, 2]
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 12


@pytest.mark.parametrize("which", [3, 12])
def test_a_file_that_cannot_be_written_stops_the_run(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: int
) -> None:
    save, calls = latent_cache.write_tensors, []

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) == which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args)

    monkeypatch.setattr(latent_cache, "write_tensors", full)
    result = run()
    assert result.code == 2
    assert "error: the disk is full" in result.err
    monkeypatch.setattr(latent_cache, "write_tensors", save)
    assert "12 of 12 pictures cached before" not in run().out  # that one is made now
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 12


def test_broken_pictures_are_counted_where_they_are_met(
    crops: Callable[..., Any], many: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("03.png", "07.png"):
        (many / name).write_bytes(b"no picture at all")
    broken: list[BrokenPicture] = []
    assert len(list(crops(2, 2, broken))) == 10
    assert [error.path.name for error in broken] == ["03.png", "07.png"]
    assert capsys.readouterr().out.count("broken: ") == 2


def test_broken_pictures_keep_no_bitmap(crops: Callable[..., Any], many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept exception would keep the frame that decoded, and with it the picture: 22.5 GB for a folder of such."""
    for path in many.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    opened, real = list[weakref.ref[Image.Image]](), Image.open

    def watched(*words: Any, **options: Any) -> Image.Image:
        picture = real(*words, **options)
        opened.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(Image, "open", watched)
    broken: list[BrokenPicture] = []
    assert list(crops(2, 2, broken)) == []
    gc.collect()
    assert len(opened) == len(broken) == 12
    assert [reference() for reference in opened] == [None] * 12


def test_a_batch_of_bytes_is_in_the_layout_of_tensor_cores() -> None:
    rgb = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    pixels = to_pixels(rgb)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, torch.stack([to_pixels(picture) for picture in rgb]))
    assert (pixels[1, 2, 3, 0], pixels.dtype) == (rgb[1, 3, 0, 2].float() / 127.5 - 1, torch.float32)


@torch.no_grad()
def test_float16_is_within_the_stated_tolerance() -> None:
    """On the bundled, trained VAE: docs/stages.md says 0.5 %."""
    paths = sorted((PROJECT / "examples" / "robot").glob("*.png"))[:2]
    rgb = [
        crop_rgb(picture, crop_boxes(*picture.size, PictureSize.square(128), 1, flip=False)[0])
        for picture in map(open_rgb, paths)
    ]
    pixels = to_pixels(torch.stack(rgb)).contiguous()
    found = {}
    for dtype in (torch.float32, torch.float16):
        posterior = AutoencoderKL.from_pretrained(MINIATURE / "vae", torch_dtype=dtype).encode(pixels.to(dtype))
        found[dtype] = posterior.latent_dist.mean.float(), posterior.latent_dist.std.float()
    for half, exact in zip(found[torch.float16], found[torch.float32], strict=True):
        assert 0 < (half - exact).norm() / exact.norm() < 0.005


@pytest.mark.parametrize("count", [15, 16])
def test_many_pictures_are_captured_on_a_gpu(
    count: int, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for CapturedCall, as there is no GPU: every batch goes through it."""
    captured: list[int] = []

    class Capturer:
        def __init__(self, compute: Any, device: torch.device, **_: object):
            assert device.type == "cuda"
            self.compute = compute

        def __call__(self, rgb: torch.Tensor) -> torch.Tensor:
            captured.append(len(rgb))
            return self.compute(rgb)

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    save_pictures(pictures, [(64, 64)] * count)
    images = instance_images(pictures, "a photo of sks", False, None).images
    files = ModelFiles(ModelConfig(str(tiny_sd3)))
    config = LatentConfig(resolution=64)
    cache = LatentCache(tmp_path, files.provenance(["vae"], "fp32", 64), "white")
    monkeypatch.setattr(precompute_latents, "CapturedCall", Capturer)
    load, encode = precompute_latents.load_vae, precompute_latents.encode
    monkeypatch.setattr(precompute_latents, "load_vae", lambda a, b, _, c: load(a, b, torch.device("cpu"), c))
    monkeypatch.setattr(precompute_latents, "encode", lambda a, b, _: encode(a, b, torch.device("cpu")))
    tile = VaeTile(None, 4, 0, 0)
    made, broken = precompute_latents.encode_missing(
        files, images, config, cache, torch.device("cuda"), tile, threads=2
    )
    assert (made, broken) == (count, [])
    assert captured == ([4, 4, 4, 4] if count == 16 else [])


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_gives_the_same_captured_and_not(
    precision: str, run: Callable[..., Result], many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of 5, of which the last has 2."""
    found = []
    for name, least in (("captured", 12), ("plain", 13)):
        monkeypatch.setattr(precompute_latents, "CAPTURE_FROM", least)
        words = ["--device", "cuda", "--vae_batch_size", 5, "--vae_precision", precision]
        said = run(*words, "--output_path", tmp_path / name)
        assert "wrote 12 crops" in said.out
        assert "not captured" not in said.out
        found.append({path.name: load_file(path) for path in sorted((tmp_path / name).glob("*.safetensors"))})
    captured, plain = found
    assert len(captured) == 12
    assert captured.keys() == plain.keys()
    for name, tensors in captured.items():
        assert all(torch.equal(tensor, plain[name][key]) for key, tensor in tensors.items())
