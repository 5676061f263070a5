"""Pictures on disk: which files count, and what colour a pixel has."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from io import BytesIO
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.stage_one.image_files import hash_file, list_images
from sd3_lora.stage_one.images import BrokenImage, open_rgb

import numpy as np
import pytest
from PIL import Image, ImageCms

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, bands: int = 3) -> np.ndarray:
    shape = (height, width, bands) if bands > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixel(path: Path, xy: tuple[int, int] = (0, 0), alpha_background: str = "white") -> tuple[int, ...]:
    image = open_rgb(path, alpha_background)
    assert image.mode == "RGB"
    return image.getpixel(xy)


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def heic(tmp_path: Path) -> Path:
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "phone.heic"
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 20, 20))).save(path, quality=95)
    return path


# --- listing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture = Image.new("RGB", (4, 4), RED)
    for name in ("b.JPG", "a.png", "c.webp"):
        saved(tmp_path, picture, name)
    (tmp_path / "photo").write_bytes(encoded(picture, "JPEG"))
    (tmp_path / "download.tmp").write_bytes(encoded(picture, "PNG"))
    (tmp_path / "scan").write_bytes(encoded(picture, "TIFF"))
    (tmp_path / "a.txt").write_text("a red square")
    (tmp_path / "metadata.jsonl").write_text("{}")
    (tmp_path / "readme.txt").write_text("BMW, the notes")
    (tmp_path / "video.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    (tmp_path / "raw.nef").write_bytes(encoded(picture, "TIFF"))
    saved(tmp_path, picture, "._a.png")
    for name in (".ipynb_checkpoints", "more"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name, picture, "d.png")
    return tmp_path


def names(folder: Path, paths: tuple[Path, ...]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_pictures_are_listed_by_extension_or_by_content_and_the_rest_is_left_out(folder: Path) -> None:
    listing = list_images(folder)
    assert names(folder, listing.images) == ["a.png", "b.JPG", "c.webp", "download.tmp", "photo", "scan"]
    assert names(folder, listing.left_out) == [
        "._a.png",
        ".ipynb_checkpoints",
        "more",
        "raw.nef",
        "readme.txt",
        "video.mp4",
    ]


def test_recursive_reads_subfolders_but_no_dot_folders(folder: Path) -> None:
    listing = list_images(folder, recursive=True)
    assert names(folder, listing.images)[-3:] == ["more/d.png", "photo", "scan"]
    assert ".ipynb_checkpoints" in names(folder, listing.left_out)
    assert "more" not in names(folder, listing.left_out)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_in_a_circle_ends(folder: Path) -> None:
    (folder / "more" / "back").symlink_to(folder, target_is_directory=True)
    listing = list_images(folder, recursive=True)
    assert "more/back" in names(folder, listing.left_out)
    assert names(folder, listing.images).count("a.png") == 1


@pytest.mark.parametrize(
    ("file_format", "head"),
    [
        ("JPEG", None),
        ("PNG", None),
        ("GIF", None),
        ("WEBP", None),
        ("BMP", None),
        ("TIFF", None),
        ("JPEG2000", None),
        (None, b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        (None, b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"),
        (None, b"\0\0\0\x20ftypavif\0\0\0\0avifmif1"),
    ],
)
def test_magic_numbers(tmp_path: Path, file_format: str | None, head: bytes | None) -> None:
    content = head or encoded(Image.new("RGB", (16, 16)), str(file_format))
    (tmp_path / "nameless").write_bytes(content)
    assert list_images(tmp_path).images == (tmp_path / "nameless",)


def test_a_folder_that_cannot_serve_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere.*--instance_data_dir"):
        list_images(tmp_path / "nowhere")
    picture = saved(tmp_path, Image.new("RGB", (4, 4)), "a.png")
    with pytest.raises(UserError, match=r"a\.png is a file, not a folder: type --instance_data_dir"):
        list_images(picture)


def test_a_folder_that_may_not_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot list .* \(Permission denied\)"):
        list_images(tmp_path)


def test_no_pictures_mentions_recursive_only_where_it_helps(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(UserError, match=r"holds no pictures: put \.jpg"):
        list_images(tmp_path)
    saved(inner, Image.new("RGB", (4, 4)), "a.png")
    with pytest.raises(UserError, match="holds no pictures: add --recursive"):
        list_images(tmp_path)


def test_hash_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"some bytes")
    assert hash_file(path) == hashlib.sha256(b"some bytes").hexdigest()
    with pytest.raises(UserError, match=r"cannot read .*gone\.jpg"):
        hash_file(tmp_path / "gone.jpg")


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.gif", "a.jp2", "a.ppm", "a.tga", "a.qoi"])
def test_red_stays_red(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    assert pixel(saved(tmp_path, Image.new("RGB", (16, 16), RED), name, **options)) == RED


@pytest.mark.parametrize("name", ["a.jpg", "a.jfif", "a.avif"])
def test_red_stays_nearly_red(tmp_path: Path, name: str) -> None:
    difference = np.subtract(pixel(saved(tmp_path, Image.new("RGB", (16, 16), RED), name)), RED)
    assert np.abs(difference).max() <= 4


def test_alpha_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (*RED, 128))
    path = saved(tmp_path, image, "a.png")
    assert [pixel(path, (x, 0)) for x in range(3)] == [RED, WHITE, (255, 127, 127)]


def test_alpha_over_the_mean_of_the_opaque_pixels(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (100, 0, 0, 255))
    image.putpixel((1, 0), (200, 40, 0, 255))
    image.putpixel((2, 0), (0, 0, 255, 0))
    path = saved(tmp_path, image, "a.png")
    assert pixel(path, (2, 0), "mean") == (150, 20, 0)
    assert pixel(path, (0, 0), "mean") == (100, 0, 0)
    assert pixel(saved(tmp_path, Image.new("RGBA", (2, 2)), "b.png"), (0, 0), "mean") == WHITE


def test_grey_with_alpha(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1), (90, 255))
    image.putpixel((1, 0), (90, 0))
    path = saved(tmp_path, image, "a.png")
    assert (pixel(path), pixel(path, (1, 0))) == ((90, 90, 90), WHITE)


@pytest.mark.parametrize(("name", "mode"), [("a.png", "P"), ("a.gif", "P"), ("a.tif", "PA")])
def test_palette_with_transparency(tmp_path: Path, name: str, mode: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    if mode == "PA":
        image = image.convert("PA")
        image.putpixel((1, 0), (1, 0))
        path = saved(tmp_path, image, name)
    else:
        path = saved(tmp_path, image, name, transparency=1)
    assert Image.open(path).mode == mode
    assert (pixel(path), pixel(path, (1, 0))) == (RED, WHITE)


def test_palette_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    path = saved(tmp_path, image, "a.png")
    assert (pixel(path), pixel(path, (1, 0))) == (RED, BLUE)


def test_one_bit_and_grey(tmp_path: Path) -> None:
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    path = saved(tmp_path, bits, "bits.png")
    assert (pixel(path), pixel(path, (1, 0))) == ((0, 0, 0), WHITE)
    assert pixel(saved(tmp_path, Image.new("L", (2, 2), 77), "grey.png")) == (77, 77, 77)


@pytest.mark.parametrize(
    ("name", "mode", "dtype", "white"),
    [
        ("a.png", "I;16", np.uint16, 65535),
        ("a.tif", "I;16", np.uint16, 65535),
        ("a.pgm", "I", np.uint16, 65535),
        ("b.tif", "I", np.int32, 65535),
        ("c.tif", "I", np.int32, 2_000_000),
        ("d.tif", "F", np.float32, 1),
        ("e.tif", "F", np.float32, 255),
        ("f.tif", "F", np.float32, 65535),
    ],
)
def test_deep_grey_is_scaled_and_not_clipped(tmp_path: Path, name: str, mode: str, dtype: type, white: int) -> None:
    values = np.array([[0, 128 / 255 * white, white]]).astype(dtype)
    path = saved(tmp_path, Image.fromarray(values), name)
    assert Image.open(path).mode == mode
    assert [pixel(path, (x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((2, 2), 10 * 257, np.uint16)), "a.png")
    assert pixel(path) == (10, 10, 10)


def test_the_transparent_value_of_a_16_bit_png(tmp_path: Path) -> None:
    values = np.array([[40000, 30000]], dtype=np.uint16)
    path = saved(tmp_path, Image.fromarray(values), "a.png", transparency=40000)
    assert [pixel(path, (x, 0))[0] for x in range(2)] == [255, round(30000 / 257)]


def test_a_picture_with_nan_is_broken(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.array([[0, np.nan]], np.float32)), "a.tif")
    with pytest.raises(BrokenImage, match="NaN"):
        open_rgb(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), name)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(np.subtract(pixel(path), RED)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = noise(5, 3)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_rgb(path)), upright)


def test_exif_that_does_not_parse_says_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (4, 2), RED), "a.png", exif=b"Exif\0\0no EXIF at all")
    assert open_rgb(path).size == (4, 2)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 3
    assert pixel(path) == RED


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_a_picture_that_is_cut_short_is_broken(tmp_path: Path, file_format: str, kept: float) -> None:
    content = encoded(Image.fromarray(noise(64, 64)), file_format)
    path = tmp_path / "cut.jpg"
    path.write_bytes(content[: int(kept * len(content))])
    assert list_images(tmp_path).images == (path,)
    with pytest.raises(BrokenImage, match=r"cut\.jpg does not decode \(.+\)") as caught:
        open_rgb(path)
    assert caught.value.path == path


@pytest.mark.parametrize("content", [b"a photo of sks dog", b"P3 is a model", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 64])
def test_what_is_no_picture_is_broken_under_a_picture_s_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "note.JPG"
    path.write_bytes(content)
    assert list_images(tmp_path).images == (path,)
    with pytest.raises(BrokenImage, match=r"note\.JPG does not decode"):
        open_rgb(path)


def test_a_picture_that_is_gone_is_broken(tmp_path: Path) -> None:
    with pytest.raises(BrokenImage, match=r"gone\.jpg does not decode \(No such file or directory\)"):
        open_rgb(tmp_path / "gone.jpg")


def test_formats_that_run_a_program_or_hide_layers_are_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.new("RGB", (4, 4)), "EPS"))
    with pytest.raises(BrokenImage, match="not a picture in a known format"):
        open_rgb(path)


def test_a_large_picture_is_fine_and_a_bomb_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    large = saved(tmp_path, Image.new("RGB", (12, 12), RED), "large.png")
    bomb = saved(tmp_path, Image.new("RGB", (15, 15), RED), "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixel(large) == RED
        with pytest.raises(BrokenImage, match="exceeds limit"):
            open_rgb(bomb)


def test_heic(tmp_path: Path) -> None:
    path = heic(tmp_path)
    assert open_rgb(path).size == (64, 48)
    assert np.abs(np.subtract(pixel(path), (200, 20, 20))).max() <= 6
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenImage):
        open_rgb(path)


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"])
def test_heic_without_its_library_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brands: bytes
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "phone.jpg"
    path.write_bytes(b"\0\0\0\x18ftyp" + brands)
    with pytest.raises(UserError, match=r"phone\.jpg is a HEIC picture: type `pip install pillow-heif`"):
        open_rgb(path)


@pytest.mark.parametrize("file_format", ["JPEG", "AVIF"])
def test_what_is_not_heic_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "phone.heic"
    path.write_bytes(encoded(Image.new("RGB", (16, 16), RED), file_format))
    assert open_rgb(path).size == (16, 16)


def swapped_primaries(description: bytes) -> bytes:
    """sRGB's profile with red and green exchanged, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for index in range(int.from_bytes(profile[128:132], "big")):
        entry = 132 + 12 * index
        tags[bytes(profile[entry : entry + 4])] = int.from_bytes(profile[entry + 4 : entry + 8], "big")
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red : red + 20], profile[green : green + 20] = profile[green : green + 20], profile[red : red + 20]
    return bytes(profile).replace("sRGB".encode("utf-16-be"), description.decode().encode("utf-16-be"))


def test_an_icc_profile_decides_what_the_numbers_mean(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.save(tmp_path / "swapped.png", icc_profile=swapped_primaries(b"test"))
    red.save(tmp_path / "srgb.png", icc_profile=swapped_primaries(b"sRGB"))  # by its name nothing to convert
    red.save(tmp_path / "broken.png", icc_profile=b"no profile")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "alpha.png", icc_profile=swapped_primaries(b"test"))
    converted = open_rgb(tmp_path / "swapped.png").getpixel((0, 0))
    assert all(abs(value - wanted) <= 2 for value, wanted in zip(converted, (0, 255, 0), strict=True))
    assert open_rgb(tmp_path / "srgb.png").getpixel((0, 0)) == (255, 0, 0)
    assert open_rgb(tmp_path / "broken.png").getpixel((0, 0)) == (255, 0, 0)
    assert open_rgb(tmp_path / "alpha.png").getpixel((0, 0)) == (255, 255, 255)
