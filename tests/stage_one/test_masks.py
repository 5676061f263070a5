"""Masks: found by name, cropped exactly as their pictures are, and cached beside the latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.picture_size import PictureSize
from sd3_lora.stage_one.crop_boxes import crop_box_of, crop_boxes, crop_rgb
from sd3_lora.stage_one.image_files import list_images, picture_paths
from sd3_lora.stage_one.images import open_grey, open_rgb, upright_size
from sd3_lora.stage_one.masks import latent_mask

import numpy as np
import pytest
import torch
from conftest import Prepared, Result, save_pictures
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

SIZES = [(96, 64), (64, 64), (64, 90)]
Script = Callable[..., Result]


def grey_picture(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """A smooth random picture without colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert("RGB").save(path)
    return path


def save_masks(folder: Path, pictures: list[Path], name: str = "{}.png") -> list[Path]:
    """For each picture a mask of its size whose left part is white."""
    folder.mkdir(exist_ok=True)
    masks = []
    for picture in pictures:
        mask = np.zeros(Image.open(picture).size[::-1], np.uint8)
        mask[:, : mask.shape[1] // 3] = 255
        masks.append(folder / name.format(picture.stem))
        Image.fromarray(mask).save(masks[-1])
    return masks


@pytest.fixture
def stage(tiny_sd3: Path, tmp_path: Path, script: Script) -> Callable[..., Result]:
    """`stage(*words)` makes latents of `tmp_path / "pictures"` in `tmp_path / "latents"`."""
    shared = ["--pretrained_model_name_or_path", tiny_sd3, "--device", "cpu", "--output_path", tmp_path / "latents"]

    def call(*words: object) -> Result:
        return script("precompute_latents", *shared, "--instance_data_dir", tmp_path / "pictures", *words)

    return call


def masks_in(folder: Path) -> dict[str, torch.Tensor]:
    """`picture's name/variant` → mask, of a whole cache."""
    import json

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            name = json.loads(handle.metadata()["sd3_lora"])["source"]
        found |= {f"{name}/{k.removesuffix('.mask')}": v for k, v in load_file(path).items() if k.endswith(".mask")}
    return found


# Values and alignment


@pytest.mark.parametrize("size", [(96, 64), (64, 64), (50, 90), (640, 210)])
@pytest.mark.parametrize("crop", [PictureSize(64, 64), PictureSize(96, 48)], ids=str)
def test_a_picture_that_is_its_own_mask(tmp_path: Path, size: tuple[int, int], crop: PictureSize) -> None:
    """Each crop's mask is the mean over 8x8 of that crop's own pixels, mirrored where the crop is."""
    path = grey_picture(tmp_path / "a.png", size)
    for box in crop_boxes(*size, crop, 3, flip=True):
        pixels = crop_rgb(open_rgb(path), box)[..., 0].double() / 255  # (H, W)
        expected = torch.zeros(1, crop.height // 8, crop.width // 8, dtype=torch.float64)
        for row in range(crop.height // 8):
            for column in range(crop.width // 8):
                total = 0.0
                for y in range(8):
                    for x in range(8):
                        total += float(pixels[8 * row + y, 8 * column + x])
                expected[0, row, column] = total / 64
        mask = latent_mask(open_grey(path), box, "source", 8)
        assert (mask.variant, mask.source, mask.values.dtype) == (box.name, "source", torch.float16)
        torch.testing.assert_close(mask.values.double(), expected, atol=5e-4, rtol=0)
        assert crop_box_of(box.name, *size) == box


def test_twins_are_mirrored(tmp_path: Path) -> None:
    path = grey_picture(tmp_path / "a.png", (96, 64))
    boxes = crop_boxes(96, 64, PictureSize(64, 64), 3, flip=True)
    masks = [latent_mask(open_grey(path), box, "", 8).values for box in boxes]
    for plain, twin in zip(masks[::2], masks[1::2], strict=True):
        torch.testing.assert_close(twin, plain.flip(-1), atol=1e-3, rtol=0)
    assert not torch.equal(masks[0], masks[2])


def test_what_counts_as_grey(tmp_path: Path) -> None:
    """Colour, palette, one bit, 16 bits; what is transparent is black, and a turned file is upright."""
    values = np.array([[0, 100, 200, 255]] * 3, np.uint8)
    grey = Image.fromarray(values)
    clear = grey.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(values == 255, 0, 255).astype(np.uint8)))
    kinds = {
        "l.png": (grey, [0, 100, 200, 255]),
        "rgb.png": (grey.convert("RGB"), [0, 100, 200, 255]),
        "p.png": (grey.convert("P"), [0, 100, 200, 255]),
        "bit.png": (grey.point([0] * 128 + [255] * 128).convert("1"), [0, 0, 255, 255]),
        "deep.png": (Image.fromarray(values.astype(np.uint16) * 257), [0, 100, 200, 255]),
        "clear.png": (clear, [0, 100, 200, 0]),
    }
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name)
        opened = open_grey(tmp_path / name)
        assert (opened.mode, opened.size) == ("L", (4, 3)), name
        assert np.asarray(opened)[0].tolist() == expected, name
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert upright_size(tmp_path / "turned.jpg") == open_grey(tmp_path / "turned.jpg").size == (3, 4)
    grey.save(tmp_path / "turned.tif", exif=exif)
    assert upright_size(tmp_path / "turned.tif") == open_rgb(tmp_path / "turned.tif").size  # whatever the head says
    assert upright_size(tmp_path / "l.png") == (4, 3)


# The cache


def test_the_cache_holds_the_mask_of_each_variant(stage: Callable[..., Result], tmp_path: Path) -> None:
    """Of the picture's shape in buckets too: each picture is its own mask."""
    (tmp_path / "pictures").mkdir()
    pictures = [grey_picture(tmp_path / "pictures" / f"{i}.png", size, i) for i, size in enumerate(SIZES)]
    (tmp_path / "masks").mkdir()
    for path in pictures:
        Image.open(path).save(tmp_path / "masks" / f"{path.stem}.webp", lossless=True)
    buckets = ["--use_aspect_ratio_bucket", "--bucket_step", 16, "--bucket_max", 128]
    for words, count in (([], 3), (buckets, 2)):  # the square one is the same in both
        made = stage("--mask_data_dir", tmp_path / "masks", "--random_flip", *words)
        assert made.code == 0, made.err
        assert f"wrote the masks of {count} pictures" in made.out
    found = masks_in(tmp_path / "latents")
    shapes = {tuple(values.shape) for values in found.values()}
    assert (1, 8, 8) in shapes
    assert len(shapes) == 3
    assert {name.split("/")[0] for name in found} == {"0.png", "1.png", "2.png"}
    for name, values in found.items():
        picture, variant = name.split("/")
        image = open_rgb(tmp_path / "pictures" / picture)
        pixels = crop_rgb(image, crop_box_of(variant, *image.size))[..., 0].float() / 255
        expected = pixels.unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2))[None]
        torch.testing.assert_close(values.float(), expected, atol=5e-4, rtol=0)


def test_masks_come_later_without_the_vae(
    stage: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache without masks gets them; a mask that is changed is made again, and only that; posteriors stay."""
    import precompute_latents

    pictures = save_pictures(tmp_path / "pictures", SIZES)
    masks = save_masks(tmp_path / "masks", pictures)
    assert stage().code == 0
    before = {path.name: load_file(path) for path in (tmp_path / "latents").glob("*.safetensors")}
    monkeypatch.setattr(precompute_latents, "load_vae", None)
    words = ["--mask_data_dir", tmp_path / "masks"]
    assert "wrote the masks of 3 pictures" in stage(*words).out
    first = masks_in(tmp_path / "latents")
    assert len(first) == 7  # crops
    assert "wrote the masks" not in stage(*words).out
    ImageOps.invert(Image.open(masks[1])).save(masks[1])
    assert "wrote the masks of 1 picture" in stage(*words).out
    second = masks_in(tmp_path / "latents")
    for name, values in second.items():
        changed = 1 - first[name] if name.startswith("01.png") else first[name]
        torch.testing.assert_close(values, changed, atol=2e-2, rtol=0)
    assert stage().code == 0  # without the flag they stay
    assert masks_in(tmp_path / "latents").keys() == second.keys()
    for path in (tmp_path / "latents").glob("*.safetensors"):
        tensors = load_file(path)
        assert all(torch.equal(tensors[name], values) for name, values in before[path.name].items())


def test_new_crops_get_masks_and_old_ones_keep_theirs(stage: Callable[..., Result], tmp_path: Path) -> None:
    save_masks(tmp_path / "masks", save_pictures(tmp_path / "pictures", SIZES[:1]))
    words = ["--mask_data_dir", tmp_path / "masks"]
    assert stage("--num_crops", 1, *words).code == 0
    first = masks_in(tmp_path / "latents")
    assert stage("--num_crops", 3).code == 0  # two more, without masks
    assert masks_in(tmp_path / "latents").keys() == first.keys()
    assert stage("--num_crops", 1, *words).code == 0  # of all that are there
    assert len(masks_in(tmp_path / "latents")) == 3


def test_the_alpha_is_a_mask(stage: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    alpha = np.zeros((64, 64), np.uint8)
    alpha[16:32, 8:40] = 255
    picture = Image.new("RGB", (64, 64), (10, 200, 30))
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "pictures" / "a.png")
    made = stage("--alpha_mask")
    assert made.code == 0, made.err
    (values,) = masks_in(tmp_path / "latents").values()
    expected = torch.zeros(1, 8, 8)
    expected[0, 2:4, 1:5] = 1
    assert torch.equal(values.float(), expected)
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "b.jpg")
    refused = stage("--alpha_mask")
    assert (refused.code, "b.jpg has no transparency that could be its mask" in refused.err) == (2, True)


def test_masks_beside_the_pictures(stage: Callable[..., Result], tmp_path: Path) -> None:
    """OneTrainer's: they are no pictures, whether they are used or not."""
    pictures = save_pictures(tmp_path / "pictures", SIZES[:2])
    save_masks(tmp_path / "pictures", pictures, "{}-masklabel.png")
    listing = list_images(tmp_path / "pictures")
    assert (listing.images, listing.left_out) == (tuple(pictures), ())
    made = stage("--mask_data_dir", tmp_path / "pictures")
    assert made.code == 0, made.err
    assert {name.split("/")[0] for name in masks_in(tmp_path / "latents")} == {"00.png", "01.png"}
    assert picture_paths(tmp_path / "pictures") == tuple(pictures)  # of class pictures
    alone = save_pictures(tmp_path / "alone", SIZES[:1])[0].rename(tmp_path / "alone" / "cat-masklabel.png")
    assert list_images(tmp_path / "alone").images == (alone,)  # no picture has that name: it is one


def test_masks_of_several_folders(stage: Callable[..., Result], tmp_path: Path) -> None:
    """Pictures of one name in two concepts: each has its own mask."""
    for name, seed in (("10_sks dog", 1), ("5_sks cat", 2)):
        pictures = save_pictures(tmp_path / "pictures" / name, SIZES[1:2], seed)
        (tmp_path / "masks").mkdir(exist_ok=True)
        (mask,) = save_masks(tmp_path / "masks" / name, pictures)
        if seed == 2:
            ImageOps.invert(Image.open(mask)).save(mask)
    made = stage("--mask_data_dir", tmp_path / "masks", "--repeats_from_folders")
    assert made.code == 0, made.err
    sums = sorted(
        float(values.float().mean())
        for path in (tmp_path / "latents").glob("*.safetensors")
        for name, values in load_file(path).items()
        if name.endswith(".mask")
    )
    assert sums == pytest.approx([21 / 64, 43 / 64], abs=0.01)


def test_masks_of_subfolders(stage: Callable[..., Result], tmp_path: Path) -> None:
    """In a folder within the pictures' too; a letter's case does not count."""
    pictures = save_pictures(tmp_path / "pictures" / "Sub", SIZES[:2])
    save_masks(tmp_path / "masks", pictures).clear()
    (tmp_path / "masks").rename(tmp_path / "sub")
    (tmp_path / "masks").mkdir()
    (tmp_path / "sub").rename(tmp_path / "masks" / "sub")
    made = stage("--mask_data_dir", tmp_path / "masks", "--recursive")
    assert made.code == 0, made.err
    assert len(masks_in(tmp_path / "latents")) == 4
    more = save_pictures(tmp_path / "pictures", SIZES[:1], seed=3)
    save_masks(tmp_path / "pictures" / "masks", more)
    made = stage("--mask_data_dir", tmp_path / "pictures" / "masks")
    assert made.code == 0, made.err
    assert "wrote the masks of 1 picture" in made.out


# Bad input


def _white(folder: Path, name: str, size: tuple[int, int] = (64, 64), value: int = 255) -> None:
    Image.new("L", size, value).save(folder / name)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda m: [p.unlink() for p in m.iterdir()] and m.rmdir(), "there is no folder {}: give the folder"),
    "empty": (lambda m: [p.unlink() for p in m.iterdir()], "{} holds no masks: put one into it for each picture"),
    "missing": (lambda m: (m / "01.png").unlink(), "{} has no mask of"),
    "alone": (lambda m: _white(m, "07.png"), "the mask {}/07.png has no picture: give it the name of its picture"),
    "two": (lambda m: _white(m, "01.webp"), "are both masks of"),
    "shape": (lambda m: _white(m, "01.png", (64, 32)), "the mask {}/01.png has 64x32 pixels, and 01.png 64x64"),
    "black": (lambda m: _white(m, "01.png", value=0), "the mask {}/01.png shows nothing of 01.png: paint white"),
    "broken": (lambda m: (m / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n"), "the mask {}/01.png does not decode"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mask_is_a_sentence(stage: Callable[..., Result], tmp_path: Path, kind: str) -> None:
    pictures = save_pictures(tmp_path / "pictures", SIZES)
    masks = tmp_path / "masks"
    save_masks(masks, pictures)
    spoil, sentence = BAD[kind]
    spoil(masks)
    refused = stage("--mask_data_dir", masks)
    assert refused.code == 2
    assert sentence.format(masks) in refused.err
    assert refused.err.count("error: ") == 1
    assert "Traceback" not in refused.err
    assert not list((tmp_path / "latents").glob("*.safetensors*"))


def test_all_faults_at_once(stage: Callable[..., Result], tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    save_masks(masks, save_pictures(tmp_path / "pictures", SIZES))
    _white(masks, "00.png", (5, 5))
    _white(masks, "01.png", value=0)
    refused = stage("--mask_data_dir", masks)
    assert "2 things are wrong with the masks" in refused.err


def test_two_sources_of_masks(stage: Callable[..., Result], tmp_path: Path) -> None:
    refused = stage("--mask_data_dir", tmp_path, "--alpha_mask")
    assert (refused.code, "--mask_data_dir and --alpha_mask exclude each other" in refused.err) == (2, True)


def test_a_broken_picture_needs_no_mask_that_fits(stage: Callable[..., Result], tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures", SIZES)
    save_masks(tmp_path / "masks", pictures)
    pictures[1].write_bytes(b"\x89PNG\r\n\x1a\n")
    made = stage("--mask_data_dir", tmp_path / "masks", "--skip_broken")
    assert made.code == 0, made.err
    assert "wrote the masks of 2 pictures" in made.out


def test_the_next_command_asks_for_the_masks(script: Script, private: Prepared, tmp_path: Path) -> None:
    save_masks(tmp_path / "masks", sorted(private.pictures.glob("*.png")))
    words = ["--pretrained_model_name_or_path", private.model, "--instance_data_dir", private.pictures]
    made = script("precompute_latents", *words, "--output_path", private.latents, "--mask_data_dir", tmp_path / "masks")
    assert made.code == 0, made.err
    assert "--masked_loss" in made.out.splitlines()[-1]
