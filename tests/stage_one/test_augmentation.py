"""Augmented variants: what they show, what they are called, and how the cache holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.picture_size import PictureSize
from sd3_lora.stage_one.augmentation import Augmentation
from sd3_lora.stage_one.crop_boxes import (
    CropBox,
    crop_box_of,
    crop_boxes,
    crop_picture,
    crop_rgb,
    number_of_variant,
    plain_variant,
    size_of_variant,
)
from sd3_lora.stage_one.images import open_grey, open_rgb
from sd3_lora.stage_one.masks import latent_mask

import numpy as np
import pytest
import torch
from conftest import Result, save_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

SIZES = [(96, 64), (64, 64), (64, 90)]


def turned(size: tuple[int, int], crop: PictureSize, degrees: float, flip: bool = False) -> CropBox:
    """The central crop of a picture, turned."""
    box = crop_boxes(*size, crop, 1, flip=True)[int(flip)]
    return CropBox(box.resized_width, box.resized_height, box.left, box.top, flip, crop, 1, degrees)


# What they show


@settings(derandomize=True, max_examples=80, deadline=None, database=None)
@given(
    width=st.integers(20, 300),
    height=st.integers(20, 300),
    crop=st.sampled_from([PictureSize(64, 64), PictureSize(96, 48), PictureSize(40, 88)]),
    degrees=st.floats(-45, 45),
)
def test_no_corner_is_empty(width: int, height: int, crop: PictureSize, degrees: float) -> None:
    """A white picture stays white all over, to the last pixel."""
    box = turned((width, height), crop, round(degrees, 2))
    pixels = crop_rgb(Image.new("RGB", (width, height), "white"), box)
    assert pixels.shape == (crop.height, crop.width, 3)
    assert int(pixels.min()) == 255


def test_the_turn_is_about_the_centre_and_counterclockwise() -> None:
    """A white disc a quarter to the right of the centre comes up by the angle, on a circle that is a little larger."""
    y, x = np.mgrid[:512, :512]
    disc = np.hypot(x - 383.5, y - 255.5) < 24
    picture = Image.fromarray((disc * 255).astype(np.uint8)).convert("RGB")
    for degrees, flip in ((10.0, False), (-10.0, False), (10.0, True)):
        box = turned((512, 512), PictureSize(256, 256), degrees, flip)
        seen = crop_rgb(picture, box)[..., 0].double()
        weights = seen / seen.sum()
        across = float((weights.sum(0) * torch.arange(256)).sum()) - 127.5
        up = 127.5 - float((weights.sum(1) * torch.arange(256)).sum())
        radius, cosine, sine = 64, np.cos(np.pi / 18), np.sin(np.pi / 18)
        scale = cosine + sine  # the square in the turned square
        assert across == pytest.approx((-1 if flip else 1) * scale * radius * cosine, abs=0.5)
        assert up == pytest.approx(np.sign(degrees) * scale * radius * sine, abs=0.5)


def test_a_twin_is_mirrored_exactly(tmp_path: Path) -> None:
    (path,) = save_pictures(tmp_path, [(96, 64)])
    picture, plain = open_rgb(path), crop_boxes(96, 64, PictureSize(64, 64), 1, flip=True)
    one, twin = Augmentation(1, 8.0, 0.3).boxes("id", plain)
    assert (one.degrees, one.brightness) == (twin.degrees, twin.brightness)
    assert torch.equal(crop_rgb(picture, twin), crop_rgb(picture, one).flip(1))


def test_brightness_multiplies_the_values(tmp_path: Path) -> None:
    """And no mask."""
    (path,) = save_pictures(tmp_path, [(64, 64)])
    picture, (plain,) = open_rgb(path), crop_boxes(64, 64, PictureSize(64, 64), 1, flip=False)
    for brightness in (0.8, 1.25):
        box = CropBox(64, 64, 0, 0, False, plain.size, 1, 0.0, brightness)
        expected = (crop_rgb(picture, plain).float() * brightness).clamp(0, 255)
        assert float((crop_rgb(picture, box).float() - expected).abs().max()) <= 1
        assert crop_picture(picture.convert("L"), box).tobytes() == picture.convert("L").tobytes()


def test_a_mask_is_turned_as_its_picture(tmp_path: Path) -> None:
    """A picture that is its own mask."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6), dtype=np.uint8)
    Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC).convert("RGB").save(tmp_path / "a.png")
    boxes = crop_boxes(120, 90, PictureSize(64, 64), 3, flip=True)
    for box in Augmentation(2, 20.0, 0.0).boxes("id", boxes):
        pixels = crop_rgb(open_rgb(tmp_path / "a.png"), box)[..., 0].float() / 255
        expected = pixels.unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2))[None]
        values = latent_mask(open_grey(tmp_path / "a.png"), box, "", 8).values
        torch.testing.assert_close(values.float(), expected, atol=5e-4, rtol=0)


# Which they are, and their names


def test_what_is_drawn() -> None:
    """By picture, crop and number; within the ranges, and all over them; more variants leave the first as they are."""
    boxes = crop_boxes(96, 64, PictureSize(64, 64), 3, flip=True)
    few, many = (Augmentation(count, 5.0, 0.1).boxes("id", boxes) for count in (2, 300))
    assert set(few) < set(many)
    assert few == Augmentation(2, 5.0, 0.1).boxes("id", boxes) != Augmentation(2, 5.0, 0.1).boxes("other", boxes)
    degrees, brightness = np.array([(box.degrees, box.brightness) for box in many]).T
    assert (degrees.min(), degrees.max()) == (pytest.approx(-5, abs=0.1), pytest.approx(5, abs=0.1))
    assert (brightness.min(), brightness.max()) == (0.9, 1.1)
    assert abs(degrees.mean()) < 0.3
    assert abs(brightness.mean() - 1) < 0.01
    assert abs(np.corrcoef(degrees, brightness)[0, 1]) < 0.1
    assert {box.degrees for box in Augmentation(9, 0.0, 0.1).boxes("id", boxes)} == {0}
    assert {box.brightness for box in Augmentation(9, 5.0, 0.0).boxes("id", boxes)} == {1}
    assert len({box.name for box in many}) == len(many) == 300 * len(boxes)


def test_names() -> None:
    size = PictureSize(512, 512)
    box = CropBox(512, 683, 0, 171, True, size, 2, -3.25, 1.08)
    assert box.name == "512x512+0+171@2:-3.25,1.08-flip"
    assert plain_variant(box.name) == "512x512+0+171-flip" == plain_variant("512x512+0+171-flip")
    assert (number_of_variant(box.name), number_of_variant("512x512+0+171-flip")) == (2, 0)
    assert size_of_variant(box.name) == size
    for each in (*crop_boxes(600, 800, size, 3, flip=True), box):
        assert crop_box_of(each.name, 600, 800) == each
    for each in Augmentation(3, 45.0, 0.9).boxes("id", crop_boxes(600, 800, size, 3, flip=True)):
        assert crop_box_of(each.name, 600, 800) == each


# The cache


@pytest.fixture
def stage(tiny_sd3: Path, tmp_path: Path, script: Callable[..., Result]) -> Callable[..., Result]:
    """`stage(*words)` makes latents of three pictures in `tmp_path / "latents"`."""
    save_pictures(tmp_path / "pictures", SIZES)
    shared = ["--pretrained_model_name_or_path", tiny_sd3, "--device", "cpu", "--output_path", tmp_path / "latents"]
    return lambda *words: script("precompute_latents", *shared, "--instance_data_dir", tmp_path / "pictures", *words)


def cached(tmp_path: Path) -> dict[str, list[str]]:
    """The variants of each picture."""
    found = {}
    for path in sorted((tmp_path / "latents").glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            source = json.loads(handle.metadata()["sd3_lora"])["source"]
        found[source] = sorted(name.removesuffix(".mean") for name in load_file(path) if name.endswith(".mean"))
    return found


def test_they_are_cached_beside_the_crops(stage: Callable[..., Result], tmp_path: Path) -> None:
    """Two of each crop, mirrored too; crops that were there are not encoded again, and a second run adds nothing."""
    assert stage("--random_flip").code == 0
    before = {path.name: load_file(path) for path in (tmp_path / "latents").glob("*.safetensors")}
    made = stage("--random_flip", "--num_augmented", 2)
    assert made.code == 0, made.err
    assert "wrote 28 crops of 3 pictures" in made.out  # 7 crops, twice mirrored or not, twice augmented
    for name, tensors in before.items():
        now = load_file(tmp_path / "latents" / name)
        assert all(torch.equal(now[key], values) for key, values in tensors.items())
        plain = {key.removesuffix(".mean") for key in tensors if key.endswith(".mean")}
        counts = [
            sum(plain_variant(v.removesuffix(".mean")) == each for v in now if v.endswith(".mean")) for each in plain
        ]
        assert set(counts) == {3}
    assert "wrote 0 crops" in stage("--random_flip", "--num_augmented", 2).out
    assert stage("--random_flip", "--num_augmented", 3).out.count("wrote 14 crops of 3 pictures") == 1


def test_the_latents_are_those_of_the_turned_picture(stage: Callable[..., Result], tmp_path: Path) -> None:
    """Encoded from the picture as `crop_rgb` turns it: a cache of those pictures alone has the same posteriors."""
    assert stage("--num_augmented", 1, "--rotation_degrees", 10, "--brightness_range", 0.2, "--center_crop").code == 0
    before = cached(tmp_path)
    picture, names = open_rgb(tmp_path / "pictures" / "01.png"), before["01.png"]
    (augmented,) = (name for name in names if number_of_variant(name))
    box = crop_box_of(augmented, *picture.size)
    assert 0 < abs(box.degrees) <= 10
    assert 0 < abs(box.brightness - 1) <= 0.2
    tensors = [load_file(path) for path in (tmp_path / "latents").glob("*.safetensors")]
    expected = next(each[f"{augmented}.mean"] for each in tensors if f"{augmented}.mean" in each)
    for path in (tmp_path / "pictures").iterdir():
        path.unlink()
    Image.fromarray(crop_rgb(picture, box).numpy()).save(tmp_path / "pictures" / "turned.png")
    assert stage("--center_crop").code == 0
    (alone,) = (each for path in (tmp_path / "latents").glob("*") if path.suffix == ".safetensors"
                for each in [load_file(path)] if len(each) == 2)  # fmt: skip
    torch.testing.assert_close(next(v for k, v in alone.items() if k.endswith(".mean")), expected, atol=1e-5, rtol=1e-5)


def test_masks_are_of_them_too(stage: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for path in (tmp_path / "pictures").glob("*.png"):
        Image.open(path).convert("L").save(tmp_path / "masks" / path.name)
    assert stage("--num_augmented", 2, "--mask_data_dir", tmp_path / "masks").code == 0
    for path in (tmp_path / "latents").glob("*.safetensors"):
        names = load_file(path).keys()
        assert {n.removesuffix(".mask") for n in names if n.endswith(".mask")} == {
            n.removesuffix(".mean") for n in names if n.endswith(".mean")
        }


def test_other_ranges_do_not_mix(stage: Callable[..., Result], tmp_path: Path) -> None:
    """Refused until --overwrite; a cache without any takes them, and gives plain crops whatever they are."""
    assert stage("--num_augmented", 1).code == 0
    before = cached(tmp_path)
    for words, says in (
        (["--rotation_degrees", 8], "was made with rotation_degrees 5, not 8: add --overwrite"),
        (["--brightness_range", 0.2], "was made with brightness_range 0.1, not 0.2: add --overwrite"),
    ):
        refused = stage("--num_augmented", 1, *words)
        assert refused.code == 2
        assert says in refused.err
    assert cached(tmp_path) == before
    assert stage().code == 0
    assert cached(tmp_path) == before
    assert stage("--num_augmented", 1, "--rotation_degrees", 8, "--overwrite").code == 0
    after = cached(tmp_path)
    assert after.keys() == before.keys()
    assert all(set(after[name]) != set(before[name]) for name in before)
    assert [len(names) for names in after.values()] == [len(names) for names in before.values()]


def test_class_pictures_are_not_augmented(stage: Callable[..., Result], tmp_path: Path) -> None:
    save_pictures(tmp_path / "class", [(64, 64)] * 2, seed=5)
    assert stage("--num_augmented", 2, "--class_data_dir", tmp_path / "class").code == 0
    counts = sorted(len(load_file(path)) // 2 for path in (tmp_path / "latents").glob("*.safetensors"))
    assert counts == [1, 1, 3, 9, 9]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--num_augmented", -1], "--num_augmented -1 must not be negative"),
        (["--rotation_degrees", 3], "--rotation_degrees needs --num_augmented: type for example --num_augmented 2"),
        (["--num_augmented", 2, "--rotation_degrees", 50], "--rotation_degrees 50 must be at least 0 and at most 45"),
        (["--num_augmented", 2, "--brightness_range", 1], "--brightness_range 1 must be at least 0 and less than 1"),
        (
            ["--num_augmented", 2, "--brightness_range", 0, "--rotation_degrees", 0],
            "--rotation_degrees 0 and --brightness_range 0 change nothing: leave one of them out",
        ),
    ],
)
def test_flags_that_cannot_be(stage: Callable[..., Result], tmp_path: Path, words: list[object], says: str) -> None:
    refused = stage(*words)
    assert (refused.code, says in refused.err) == (2, True), refused.err
    assert not list((tmp_path / "latents").glob("*"))
