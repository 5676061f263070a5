"""What is dropped on the page: hostile names, files that are no pictures, too many, too large, many at once."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.projects import photos as photos_module
from sd3_lora.projects.names import safe_name
from sd3_lora.projects.photos import Photos, Upload
from sd3_lora.stage_one.image_files import list_images

import pytest
from conftest import save_pictures
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos(tmp_path / "project" / "photos", tmp_path / "project" / "crops")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "uploads", [(96, 64)])[0]


@given(st.text())
def test_no_name_leaves_its_folder(text: str) -> None:
    name = safe_name(text)
    assert not set(name) & set("/\\.:\0 \n")
    assert len(name) <= 41
    assert name.upper() not in ("CON", "NUL", "COM1")
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("typed", "name"),
    [("My dog!", "My-dog"), ("../../etc/passwd", "etc-passwd"), ("C:\\x", "C-x"), ("Käthe", "Käthe"), ("nul", "nul-"),
     ("..", ""), ("", ""), ("犬", "犬"), ("-rf", "rf"), ("a" * 99, "a" * 40)],
)  # fmt: skip
def test_a_name_is_made_safe(typed: str, name: str) -> None:
    assert safe_name(typed) == name


@pytest.mark.parametrize(
    ("name", "kept"),
    [("../x.png", "x.png"), ("..\\..\\x.png", "x.png"), ("/etc/x.PNG", "x.png"), (".png.png", "png.png"),
     ("dog of mine.png", "dog-of-mine.png"), ("….png", "photo.png"), ("con.png", "con-.png")],
)  # fmt: skip
def test_a_hostile_name_lies_in_the_folder(photos: Photos, picture: Path, name: str, kept: str) -> None:
    (path,), refused = photos.add([Upload(picture, name)])
    assert refused == []
    assert path == photos.folder / kept
    assert [each for each in photos.folder.parent.rglob("*") if each.is_file()] == [
        each for each in (photos.folder.parent / ".photos.lock", path) if each.exists()
    ]


def test_what_is_no_picture_is_refused_by_name(photos: Photos, picture: Path, tmp_path: Path) -> None:
    text, cut = tmp_path / "a.png", tmp_path / "b.png"
    text.write_text("<script>")
    cut.write_bytes(picture.read_bytes()[:200])
    uploads = [Upload(text, "a.png"), Upload(cut, "b.png"), Upload(picture, "c.svg"), Upload(picture, "d.png")]
    added, refused = photos.add([*uploads, Upload(tmp_path / "gone.png", "gone.png")])
    assert [path.name for path in added] == ["d.png"]
    assert refused[0] == "a.png does not decode (not a picture in a known format)"
    assert refused[1].startswith("b.png does not decode")
    assert refused[2] == "c.svg is not a picture: take .jpg, .png or .webp files"
    assert refused[3] == "gone.png did not arrive whole: drop it again"
    assert not any(str(tmp_path) in sentence for sentence in refused)


def test_what_is_too_large_or_one_too_many_is_refused(
    photos: Photos, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos_module, "MOST_PHOTOS", 2)
    three = save_pictures(tmp_path / "three", [(32, 32)] * 3)
    added, refused = photos.add([Upload(path, f"{number}.png") for number, path in enumerate(three)])
    assert len(added) == 2
    assert refused == ["2.png is one too many: a project holds 2 photos"]
    monkeypatch.setattr(photos_module, "MOST_MEGABYTES", 0)
    assert photos.add([Upload(picture, "large.png")]) == ([], ["large.png is larger than 0 MB: save it smaller"])


def test_fifty_at_once_are_all_there(photos: Photos, tmp_path: Path) -> None:
    """Of one name, as phones give them, and of several."""
    paths = save_pictures(tmp_path / "uploads", [(32, 32)] * 50)
    uploads = [Upload(path, f"image{number % 3}.png") for number, path in enumerate(paths)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda upload: photos.add([upload]), uploads))
    assert [refused for _, refused in results if refused] == []
    assert sorted(path.read_bytes() for path in photos.paths) == sorted(path.read_bytes() for path in paths)
    assert list_images(photos.folder).left_out == ()


def test_a_photo_that_is_there_is_not_added_again(photos: Photos, picture: Path) -> None:
    """As where a browser tells of one drop twice, at once or later; captions stay with the first."""
    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(lambda number: photos.add([Upload(picture, f"{number}.png")]), range(8)))
    assert sorted(len(paths) for paths, refused in added if not refused) == [0] * 7 + [1]
    assert len(photos.paths) == 1


def test_two_look_at_a_crop_at_once(photos: Photos, tmp_path: Path) -> None:
    """Both get it, and nothing unfinished is left."""
    paths = save_pictures(tmp_path / "uploads", [(300, 200)] * 4)
    photos.add([Upload(path, path.name) for path in paths])
    with ThreadPoolExecutor(8) as pool:
        crops = list(pool.map(lambda path: photos.crop(path, PictureSize.square(64)), photos.paths * 8))
    assert len(set(crops)) == 4
    assert sorted(path.name for path in crops[0].parent.iterdir()) == [f"0{number}.webp" for number in range(4)]


def test_two_pictures_never_share_a_caption(photos: Photos, picture: Path, tmp_path: Path) -> None:
    jpeg = tmp_path / "dog.jpg"
    Image.open(picture).save(jpeg)
    photos.add([Upload(picture, "dog.png"), Upload(jpeg, "Dog.jpg")])
    assert [path.name for path in photos.paths] == ["Dog-2.jpg", "dog.png"]


def test_captions_are_written_as_stage_one_reads_them(photos: Photos, picture: Path) -> None:
    photos.add([Upload(picture, "dog.png")])
    assert photos.caption("dog.png") == ""
    photos.write_caption("dog.png", " a photo of sks dog \n on a sofa ")
    assert (photos.folder / "dog.txt").read_text() == "a photo of sks dog on a sofa\n"
    assert photos.caption("dog.png") == "a photo of sks dog on a sofa"
    photos.write_caption("dog.png", " ")
    assert not (photos.folder / "dog.txt").exists()
    with pytest.raises(UserError, match="1001 letters"):
        photos.write_caption("dog.png", "a" * 1001)
    for name in ("../dog.png", "dog.txt", ""):
        with pytest.raises(UserError, match="there is no photo"):
            photos.write_caption(name, "no")


def test_a_removed_photo_takes_its_caption_and_crop_along(photos: Photos, picture: Path) -> None:
    other = save_pictures(picture.parent / "other", [(64, 96)], seed=1)[0]
    photos.add([Upload(picture, "dog.png"), Upload(other, "cat.png")])
    photos.write_caption("dog.png", "a dog")
    crops = [photos.crop(path, PictureSize.square(64)) for path in photos.paths]
    photos.remove("dog.png")
    assert [path.name for path in photos.folder.iterdir()] == ["cat.png"]
    assert [crop.name for crop in crops if crop.exists()] == ["cat.webp"]


def test_a_crop_is_that_of_stage_one(photos: Photos, tmp_path: Path) -> None:
    """The middle of a wide picture; and another one where the photo of that name is another."""
    wide = Image.new("RGB", (192, 64), "red")
    wide.paste((0, 0, 255), (64, 0, 128, 64))
    wide.save(tmp_path / "wide.png")
    photos.add([Upload(tmp_path / "wide.png", "wide.png")])
    shown = Image.open(photos.crop(photos.paths[0], PictureSize.square(64))).convert("RGB")
    assert shown.size == (64, 64)
    assert all(blue > 200 > 60 > red for red, _, blue in (shown.getpixel((x, 32)) for x in (4, 32, 60)))
    photos.remove("wide.png")
    shutil.copy(save_pictures(tmp_path / "others", [(64, 64)])[0], tmp_path / "other.png")
    photos.add([Upload(tmp_path / "other.png", "wide.png")])
    other = Image.open(photos.crop(photos.paths[0], PictureSize.square(64))).convert("RGB")
    assert other.tobytes() != shown.tobytes()
