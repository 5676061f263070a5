"""Crops: where they lie, what they are called, and their pixels."""

from __future__ import annotations

from sd3_lora.common.picture_size import PictureSize
from sd3_lora.stage_one.crop_boxes import CropBox, crop_boxes, crop_rgb, mirrored, pixels_of, to_pixels
from sd3_lora.stage_one.images import open_rgb

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

SIDES = st.integers(1, 90)
PROPERTY = settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def noise(width: int, height: int, bands: int = 3) -> np.ndarray:
    shape = (height, width, bands) if bands > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@PROPERTY
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    resolution=st.sampled_from([64, 512, 1024]),
    num_crops=st.integers(1, 7),
    flip=st.booleans(),
)
def test_crops_lie_inside_and_have_names_of_their_own(
    width: int, height: int, resolution: int, num_crops: int, flip: bool
) -> None:
    boxes = crop_boxes(width, height, PictureSize.square(resolution), num_crops, flip)
    for box in boxes:
        assert min(box.resized_width, box.resized_height) == resolution == box.size.longer_side
        assert 0 <= box.left <= box.resized_width - resolution
        assert 0 <= box.top <= box.resized_height - resolution
        exact = max(width, height) / min(width, height) * resolution
        assert abs(max(box.resized_width, box.resized_height) - exact) <= 0.5
    assert len({box.name for box in boxes}) == len(set(boxes)) == len(boxes)
    assert 1 <= len(boxes) <= num_crops * (1 + flip)
    assert crop_boxes(width, height, PictureSize.square(resolution), num_crops, flip) == boxes


@PROPERTY
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), num_crops=st.sampled_from([3, 5, 7, 9]))
def test_the_centre_crop_is_one_of_any_odd_number(width: int, height: int, num_crops: int) -> None:
    centre = crop_boxes(width, height, PictureSize.square(512), 1, flip=False)
    assert set(centre) <= set(crop_boxes(width, height, PictureSize.square(512), num_crops, flip=False))


def test_crops_are_spread_from_end_to_end() -> None:
    size = PictureSize.square(512)
    assert [box.left for box in crop_boxes(1600, 800, size, 3, flip=False)] == [0, 256, 512]
    assert [box.top for box in crop_boxes(800, 1600, size, 3, flip=False)] == [0, 256, 512]
    assert [box.left for box in crop_boxes(1600, 800, size, 5, flip=False)] == [
        0,
        128,
        256,
        384,
        512,
    ]
    assert [box.left for box in crop_boxes(1600, 800, size, 1, flip=False)] == [256]
    assert [box.name for box in crop_boxes(700, 700, size, 3, flip=True)] == [
        "512x512+0+0",
        "512x512+0+0-flip",
    ]


def test_names() -> None:
    box = CropBox(resized_width=512, resized_height=683, left=0, top=171, flip=False, size=PictureSize.square(512))
    assert box.name == "512x512+0+171"
    assert mirrored(box.name) == "512x512+0+171-flip" == mirrored(mirrored(box.name))
    assert crop_boxes(600, 800, PictureSize.square(512), 3, flip=True)[3].name == "512x512+0+85-flip"


@PROPERTY
@given(
    width=SIDES,
    height=SIDES,
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "I;16", "F", "I"]),
    num_crops=st.integers(1, 3),
)
def test_pixels_of_any_size_and_mode(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, mode: str, num_crops: int
) -> None:
    deep = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in deep:
        image = Image.fromarray((noise(width, height, 1).astype(np.int64) * 257).astype(deep[mode]))
    elif mode == "PA":
        image = Image.fromarray(noise(width, height)).convert("P").convert("PA")
    elif mode in ("RGBA", "LA", "CMYK"):
        image = Image.fromarray(noise(width, height, 2 if mode == "LA" else 4), mode)
    else:
        image = Image.fromarray(noise(width, height)).convert(mode)
    path = tmp_path_factory.mktemp("any") / "a.tif"
    image.save(path)
    picture = open_rgb(path)
    assert (picture.size, picture.mode) == ((width, height), "RGB")
    for box in crop_boxes(width, height, PictureSize.square(16), num_crops, flip=False):
        pixels = to_pixels(crop_rgb(picture, box))
        assert pixels.shape == (3, 16, 16)
        assert pixels.dtype == torch.float32
        assert -1 <= pixels.min() <= pixels.max() <= 1


@PROPERTY
@given(width=SIDES, height=SIDES, resolution=st.integers(1, 40), num_crops=st.integers(1, 4))
def test_a_flip_is_the_exact_mirror(width: int, height: int, resolution: int, num_crops: int) -> None:
    picture = Image.fromarray(noise(width, height))
    boxes = crop_boxes(width, height, PictureSize.square(resolution), num_crops, flip=True)
    assert len(boxes) % 2 == 0
    for plain, twin in zip(boxes[::2], boxes[1::2], strict=True):
        assert (plain.flip, twin.flip) == (False, True)
        assert torch.equal(to_pixels(crop_rgb(picture, twin)), to_pixels(crop_rgb(picture, plain)).flip(-1))


@PROPERTY
@given(width=SIDES, height=SIDES, resolution=st.integers(4, 40))
def test_a_crop_is_cut_from_the_resized_picture(width: int, height: int, resolution: int) -> None:
    # Pale noise: where an overshoot is clipped at 8 bits, the order of Pillow's two passes shows.
    picture = Image.fromarray(noise(width, height) // 8 + 112)
    for box in crop_boxes(width, height, PictureSize.square(resolution), 3, flip=False):
        whole = picture.resize((box.resized_width, box.resized_height), Image.Resampling.LANCZOS)
        part = whole.crop((box.left, box.top, box.left + resolution, box.top + resolution))
        expected = torch.from_numpy(np.array(part)).permute(2, 0, 1) / 127.5 - 1
        assert (to_pixels(crop_rgb(picture, box)) - expected).abs().max() < 2.01 / 127.5  # each pass rounds to 8 bits


def test_pixel_values() -> None:
    picture = Image.new("RGB", (8, 8), (255, 0, 51))
    pixels = to_pixels(crop_rgb(picture, crop_boxes(8, 8, PictureSize.square(4), 1, flip=False)[0]))
    assert torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1.0, 51 / 127.5 - 1]))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (1024, 1024), (2100, 2100)])
def test_pixels_are_those_that_numpy_gives(width: int, height: int) -> None:
    """The last is larger than what Pillow holds in one piece."""
    numbers = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(numbers.numpy())
    pixels = pixels_of(picture)
    picture.putpixel((0, 0), (0, 0, 0))  # they are a copy
    assert torch.equal(pixels, numbers)
    assert pixels.is_contiguous()


def test_pixels_do_not_go_through_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3_lora.stage_one.crop_boxes.np.array", None)
    assert pixels_of(Image.new("RGB", (64, 64), (1, 2, 3)))[3, 5].tolist() == [1, 2, 3]


def test_a_very_long_picture_costs_no_more_than_its_crop() -> None:
    picture = Image.fromarray(noise(30_000, 2))  # resized whole, 4 gigapixels
    boxes = crop_boxes(*picture.size, PictureSize.square(512), 3, flip=False)
    assert [to_pixels(crop_rgb(picture, box)).shape for box in boxes] == [(3, 512, 512)] * 3
