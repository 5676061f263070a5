"""Settings in PNG, JPEG and WebP, for this project and for other programs."""

from __future__ import annotations

import io
from pathlib import Path

from sd3_lora.drawing.config import PictureFormat
from sd3_lora.drawing.picture_metadata import parameters_text, picture_file, read_settings

import numpy as np
import pytest
from PIL import Image

SETTINGS = {
    "prompt": "ein grüner 🐕, dog",
    "negative_prompt": "blurry",
    "steps": 28,
    "sampler": "dpmpp_2m",
    "guidance": 7.0,
    "seed": 3,
    "width": 64,
    "height": 32,
    "skip_layer_guidance": {"layers": [7, 8], "scale": 2.8},
}
READABLE = {"Model": "sd3-medium", "Lora": "dog: 0.7, style: 0.5"}
PARAMETERS = (
    "ein grüner 🐕, dog\nNegative prompt: blurry\nSteps: 28, Sampler: DPM++ 2M, CFG scale: 7.0, Seed: 3, Size: 64x32, "
    'Model: sd3-medium, Lora: "dog: 0.7, style: 0.5"'
)
FORMATS: list[PictureFormat] = ["png", "jpg", "webp"]


def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 32 * 64 * 3).reshape(32, 64, 3)
    return Image.fromarray(ramp.astype(np.uint8))


@pytest.mark.parametrize("kind", FORMATS)
def test_settings_are_read_again(tmp_path: Path, kind: PictureFormat) -> None:
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(picture_file(picture(), kind, SETTINGS, READABLE))
    assert read_settings(path) == SETTINGS
    with Image.open(path) as opened:
        assert opened.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]
        difference = np.asarray(opened.convert("RGB")).astype(int) - np.asarray(picture())
    assert np.abs(difference).mean() < 3
    path.write_bytes(path.read_bytes()[:-40])
    assert read_settings(path) is None  # not whole


@pytest.mark.parametrize("kind", FORMATS)
def test_other_programs_read_the_parameters(kind: PictureFormat) -> None:
    """As AUTOMATIC1111's web interface does: a PNG's text, else EXIF's UserComment, by its character code."""
    with Image.open(io.BytesIO(picture_file(picture(), kind, SETTINGS, READABLE))) as opened:
        if kind == "png":
            assert opened.info["parameters"] == PARAMETERS
            return
        comment: bytes = opened.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == PARAMETERS
    assert parameters_text({**SETTINGS, "negative_prompt": ""}).count("\n") == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_of_another_program_has_no_settings(tmp_path: Path, kind: PictureFormat) -> None:
    path = tmp_path / f"picture.{kind}"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = b"Nikon\0"
    picture().save(path, exif=exif)
    assert read_settings(path) is None
    path.write_bytes(b"no picture")
    assert read_settings(path) is None
    assert read_settings(tmp_path / "missing.png") is None


@pytest.mark.parametrize("kind", FORMATS)
def test_a_prompt_longer_than_exif_costs_no_picture(tmp_path: Path, kind: PictureFormat) -> None:
    path = tmp_path / f"picture.{kind}"
    for length, is_read in ((20_000, True), (70_000, kind == "png")):
        settings = {**SETTINGS, "prompt": "ü" + "x" * length}
        path.write_bytes(picture_file(picture(), kind, settings, READABLE))
        assert read_settings(path) == (settings if is_read else None)
