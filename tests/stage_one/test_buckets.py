"""Aspect-ratio buckets: which sizes there are, which one a picture gets, and what the model cannot take."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.stage_one.buckets import Buckets, bucket_sizes
from sd3_lora.stage_one.config import LatentConfig
from sd3_lora.stage_one.crop_boxes import crop_boxes, crop_rgb, size_notes, size_of_variant

import pytest
from conftest import Prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from training_runs import Script

# What sd-scripts makes of (512, 512), 256, 1024, 64; and by its rule of (64, 64), 32, 128, 16.
KOHYA_512 = (
    "256x832 256x896 256x960 256x1024 320x704 320x768 384x640 448x576 512x512 576x448 640x384 704x320 768x320 832x256 "
    "896x256 960x256 1024x256"
)
KOHYA_64 = "32x96 32x112 32x128 48x80 64x64 80x48 96x32 112x32 128x32"


def names(sizes: tuple[PictureSize, ...]) -> list[str]:
    return [str(size) for size in sizes]


def defined(resolution: int, least: int, most: int, step: int) -> set[tuple[int, int]]:
    """The sizes by their definition, searched for among all of them."""
    sides = range(least, most + 1, step)
    heights = [step * count for count in range(math.ceil(least / step), most // step + 1)]
    whole = set()
    for width in sides:
        fitting = [height for height in [*heights, most] if height >= least and width * height <= resolution**2]
        if fitting:
            height = max(fitting)
            whole |= {(width, height), (height, width)}
    return whole | {(resolution // step * step,) * 2}


def test_the_sizes_are_kohyas() -> None:
    assert names(bucket_sizes(512, 256, 1024, 64)) == KOHYA_512.split()
    assert names(bucket_sizes(64, 32, 128, 16)) == KOHYA_64.split()


@given(
    resolution=st.integers(4, 40).map(lambda n: 32 * n),
    step=st.sampled_from([16, 32, 64, 128]),
    least=st.integers(1, 5),
    most=st.integers(5, 30),
)
@settings(derandomize=True, max_examples=80, deadline=None, database=None)
def test_the_sizes_are_the_largest_of_each_width(resolution: int, step: int, least: int, most: int) -> None:
    sizes = bucket_sizes(resolution, least * step, most * step, step)
    found = {(size.width, size.height) for size in sizes}
    assert found == defined(resolution, least * step, most * step, step)
    assert found == {(height, width) for width, height in found}
    assert (resolution // step * step,) * 2 in found


def kohyas_choice(width: int, height: int, sizes: tuple[PictureSize, ...]) -> PictureSize:
    own = [size for size in sizes if (size.width, size.height) == (width, height)]
    errors = [abs(size.width / size.height - width / height) for size in sizes]
    return own[0] if own else sizes[errors.index(min(errors))]


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
@settings(derandomize=True, max_examples=200, deadline=None, database=None)
def test_a_picture_gets_the_nearest_ratio(width: int, height: int) -> None:
    buckets = Buckets(512, bucket_sizes(512, 256, 1024, 64), 64)
    size = buckets.size_for(width, height)
    assert size == kohyas_choice(width, height, buckets.sizes)
    small = Buckets(512, buckets.sizes, 64, upscales=False).size_for(width, height)
    if width >= size.width and height >= size.height:
        assert small == size
    else:
        assert small.width % 64 == small.height % 64 == 0
        assert small.pixels <= 512**2
        assert small.longer_side <= 1024
        if width >= 64 and height >= 64:
            assert small.width <= width
            assert small.height <= height


def test_ratios_are_compared_and_not_their_logarithms() -> None:
    """The mirrored picture does not always get the mirrored bucket."""
    buckets = Buckets(512, bucket_sizes(512, 256, 1024, 64), 64)
    wide, tall = buckets.size_for(1000, 880), buckets.size_for(880, 1000)
    assert (str(wide), str(tall)) == ("512x512", "448x576")


def test_nothing_is_enlarged_where_that_is_asked() -> None:
    sizes = bucket_sizes(512, 256, 1024, 64)
    kept, enlarged = (Buckets(512, sizes, 64, upscales) for upscales in (False, True))
    assert str(kept.size_for(300, 200)) == "256x192"
    assert str(enlarged.size_for(300, 200)) == "640x384"
    assert str(kept.size_for(3000, 2000)) == "640x384"
    assert str(kept.size_for(2000, 200)) == "1024x128"
    assert str(kept.size_for(30, 20)) == "64x64"  # smaller than a step
    assert kept.largest == PictureSize.square(512)
    assert (str(enlarged.largest), enlarged.longest_side) == ("512x512", 1024)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), num_crops=st.integers(1, 5))
@settings(derandomize=True, max_examples=100, deadline=None, database=None)
def test_a_crop_covers_its_size(width: int, height: int, num_crops: int) -> None:
    size = Buckets(512, bucket_sizes(512, 256, 1024, 64), 64).size_for(width, height)
    for box in crop_boxes(width, height, size, num_crops, flip=True):
        assert box.resized_width == size.width or box.resized_height == size.height
        assert 0 <= box.left <= box.resized_width - size.width
        assert 0 <= box.top <= box.resized_height - size.height
        assert size_of_variant(box.name) == size


def test_a_crops_pixels() -> None:
    box = crop_boxes(300, 120, PictureSize(64, 32), 1, flip=False)[0]
    assert (box.resized_width, box.resized_height, box.left, box.top) == (80, 32, 8, 0)
    assert crop_rgb(Image.new("RGB", (300, 120)), box).shape == (32, 64, 3)


def test_what_is_enlarged_and_hidden_is_measured_by_the_bucket() -> None:
    sizes = {"wide.png": (PictureSize(1000, 250), PictureSize(1024, 256))}
    assert size_notes(sizes, 1) == []
    square = {"wide.png": (PictureSize(1000, 250), PictureSize.square(512))}
    assert [line.split(": ")[0] for line in size_notes(square, 1)] == ["note"] * 2


# Flags


@pytest.fixture
def files(tiny_sd3: Path) -> ModelFiles:
    """Takes multiples of 16 px."""
    return ModelFiles(ModelConfig(str(tiny_sd3)))


def test_the_defaults_follow_the_resolution(files: ModelFiles) -> None:
    buckets = Buckets.of(LatentConfig(use_aspect_ratio_bucket=True), files)
    assert names(buckets.sizes) == KOHYA_64.split()
    assert (buckets.step, buckets.resolution) == (16, 64)
    assert Buckets.of(LatentConfig(), files) == Buckets.square(64)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--bucket_step", 24], "--bucket_step 24 does not fit this model at --resolution 64: it must be a multiple of "
         "16 and no more than the resolution: type --bucket_step 16"),
        (["--bucket_step", 128], "--bucket_step 128 does not fit this model"),
        (["--bucket_min", 40], "--bucket_min 40 is not a multiple of 16 (--bucket_step) up to the resolution of 64: "
         "type --bucket_min 32"),
        (["--bucket_min", 80], "type --bucket_min 64"),
        (["--bucket_max", 100], "--bucket_max 100 is not a multiple of 16 (--bucket_step)"),
        (["--bucket_max", 48], "type --bucket_max 64"),
        (["--bucket_max", 100000], "which this model takes: type --bucket_max "),
        (["--bucket_step", 0], "--bucket_step 0 must be at least 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["precompute_latents", "train_dreambooth_sd3_lora_miniature"])
def test_what_the_model_cannot_take_is_a_sentence(
    script: Script, prepared: Prepared, tmp_path: Path, flags: list[object], says: str, name: str
) -> None:
    words = ["--pretrained_model_name_or_path", prepared.model, "--use_aspect_ratio_bucket", *flags, "--device", "cpu"]
    words += ["--output_path" if name == "precompute_latents" else "--output_dir", tmp_path / "out"]
    result = script(name, *words, "--instance_data_dir", prepared.pictures)
    assert result.code == 2
    assert says in result.err
    assert not (tmp_path / "out").exists()


def test_bucket_flags_need_buckets(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    for flag in (["--bucket_step", 16], ["--bucket_min", 32], ["--bucket_max", 64], ["--bucket_no_upscale"]):
        result = script("precompute_latents", *flag, "--output_path", tmp_path / "out")
        assert result.code == 2
        assert f"{flag[0]} needs --use_aspect_ratio_bucket: add it" in result.err


# The cache


def encode(script: Script, prepared: Prepared, folder: Path, *words: object) -> str:
    shared = ["--pretrained_model_name_or_path", prepared.model, "--instance_data_dir", prepared.pictures]
    result = script("precompute_latents", *shared, "--device", "cpu", "--output_path", folder, *words)
    assert result.code == 0, result.err
    return result.out


def variants(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each file, its variants and the shapes of their latents."""
    return {
        path.name: {name: tuple(tensor.shape) for name, tensor in load_file(path).items() if name.endswith(".mean")}
        for path in sorted(folder.glob("*.safetensors"))
    }


def test_a_cache_holds_several_shapes(script: Script, prepared: Prepared, tmp_path: Path) -> None:
    """What it held before stays, to the bit; each shape's latents are those of its crop alone."""
    encode(script, prepared, tmp_path / "both")
    before = {path.name: load_file(path) for path in (tmp_path / "both").glob("*.safetensors")}
    encode(script, prepared, tmp_path / "both", "--use_aspect_ratio_bucket")
    encode(script, prepared, tmp_path / "alone", "--use_aspect_ratio_bucket", "--vae_batch_size", 1)
    both, alone = variants(tmp_path / "both"), variants(tmp_path / "alone")
    assert {shape for shapes in alone.values() for shape in shapes.values()} == {
        (16, 8, 8), (16, 6, 10), (16, 10, 6)
    }  # fmt: skip
    for name, tensors in before.items():
        after, own = load_file(tmp_path / "both" / name), load_file(tmp_path / "alone" / name)
        assert all((after[key] == tensor).all() for key, tensor in tensors.items())
        assert both[name].keys() == {key for key in tensors if key.endswith(".mean")} | alone[name].keys()
        for key, tensor in own.items():
            assert (after[key] - tensor).abs().max() <= 1e-4 * tensor.abs().max()
    shutil.copy(prepared.embeddings, tmp_path / "embeddings.parquet")
    out = encode(script, prepared, tmp_path / "both", "--use_aspect_ratio_bucket")
    assert "5 of 5 pictures cached before" in out
    assert "--use_aspect_ratio_bucket" in out.splitlines()[-1]
