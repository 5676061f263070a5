"""Which prompt belongs to which picture."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.stage_one.captions import instance_images, read_captions
from sd3_lora.stage_one.images import hash_file

import pytest

PROMPT = "a photo of sks dog"


def picture(folder: Path, name: str, content: str | None = None) -> Path:
    """A file with a picture's name; nothing here decodes it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((content or name).encode())
    return path


def write_jsonl(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_csv(folder: Path, *lines: str) -> None:
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    return picture(tmp_path, "dog.jpg")


def test_a_caption_beside_the_picture(tmp_path: Path, dog: Path) -> None:
    picture(tmp_path, "cat.png")
    (tmp_path / "dog.txt").write_bytes("\ufeffsks dog,\r\n  in a café \r\n\r\n".encode())
    images, left_out = instance_images(tmp_path, PROMPT)
    assert {image.path.name: image.prompt for image in images} == {"dog.jpg": "sks dog, in a café", "cat.png": PROMPT}
    assert left_out == ()
    assert read_captions(tmp_path, [dog, tmp_path / "cat.png"]) == {dog: "sks dog, in a café"}


def test_an_upper_case_caption_file(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.TXT").write_text("sks dog")
    assert read_captions(tmp_path, [dog]) == {dog: "sks dog"}


def test_a_picture_called_txt_is_no_caption(tmp_path: Path, dog: Path) -> None:
    disguised = tmp_path / "dog.txt"
    disguised.write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    images, _ = instance_images(tmp_path, PROMPT)
    assert [(image.path, image.prompt) for image in images] == [(dog, PROMPT), (disguised, PROMPT)]


def test_a_caption_without_a_picture_is_left_out_by_name(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dgo.txt").write_text("sks dog")
    _, left_out = instance_images(tmp_path, PROMPT)
    assert left_out == (tmp_path / "dgo.txt",)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_jsonl(tmp_path: Path, dog: Path, column: str) -> None:
    write_jsonl(tmp_path, {"file_name": "dog.jpg", column: "sks dog,\n running", "other": 1})
    assert read_captions(tmp_path, [dog]) == {dog: "sks dog, running"}


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_csv(tmp_path: Path, dog: Path, column: str) -> None:
    write_csv(tmp_path, f"\ufefffile_name,{column}", 'dog.jpg,"sks dog, running"')
    assert read_captions(tmp_path, [dog]) == {dog: "sks dog, running"}


def test_text_comes_before_caption_and_prompt(tmp_path: Path, dog: Path) -> None:
    write_jsonl(tmp_path, {"prompt": "c", "caption": "b", "text": "a", "file_name": "dog.jpg"})
    assert read_captions(tmp_path, [dog]) == {dog: "a"}


def test_metadata_of_subfolders(tmp_path: Path) -> None:
    inner, other = picture(tmp_path, "in/dog.jpg"), picture(tmp_path, "in/cat.jpg")
    write_jsonl(tmp_path, {"file_name": "in/dog.jpg", "text": "sks dog"})
    write_jsonl(tmp_path / "in", {"file_name": "cat.jpg", "text": "a cat"})
    images, _ = instance_images(tmp_path, None, recursive=True)
    assert [(image.path, image.prompt) for image in images] == [(other, "a cat"), (inner, "sks dog")]


def test_a_row_of_a_picture_that_was_left_out_is_no_error(tmp_path: Path, dog: Path) -> None:
    picture(tmp_path, "in/cat.jpg")
    write_jsonl(tmp_path, {"file_name": "in/cat.jpg", "text": "a cat"}, {"file_name": "dog.jpg", "text": "sks dog"})
    assert [image.prompt for image in instance_images(tmp_path, None)[0]] == ["sks dog"]


def test_both_spellings_of_an_umlaut_are_one_name(tmp_path: Path) -> None:
    path = picture(tmp_path, unicodedata.normalize("NFD", "hündin.jpg"))
    write_jsonl(tmp_path, {"file_name": unicodedata.normalize("NFC", "hündin.jpg"), "text": "sks dog"})
    assert read_captions(tmp_path, [path]) == {path: "sks dog"}


def test_the_same_caption_twice_is_fine_and_two_different_ones_are_not(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_text("sks dog")
    write_jsonl(tmp_path, {"file_name": "dog.jpg", "text": " sks dog"})
    assert read_captions(tmp_path, [dog]) == {dog: "sks dog"}
    write_jsonl(tmp_path, {"file_name": "dog.jpg", "text": "another dog"})
    with pytest.raises(UserError, match=r"dog\.jpg has two captions, 'sks dog' in dog\.txt and 'another dog' in meta"):
        read_captions(tmp_path, [dog])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"file_name": "dog.jpg", "text": '], r"metadata\.jsonl, row 1 is not JSON"),
        (["{}", "[1]"], r"row 1 has no column file_name"),
        (["[1]"], r"row 1 is not of the form"),
        ([{"file_name": "dog.jpg", "description": "sks dog"}], "row 1 has no column text or caption or prompt"),
        ([{"file_name": "dog.jpg", "text": " "}], "row 1 has no text in the column text"),
        ([{"file_name": "dog.jpg", "text": None}], "row 1 has no text in the column text"),
        ([{"file_name": "dog.jpg", "text": 7}], "row 1 has no text in the column text"),
        ([{"file_name": "dgo.jpg", "text": "sks dog"}], r"row 1 names dgo\.jpg, which is not there"),
    ],
)
def test_malformed_jsonl_is_one_sentence(tmp_path: Path, dog: Path, rows: list[object], message: str) -> None:
    write_jsonl(tmp_path, *rows)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path, [dog])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file_name,text", "dog.jpg,sks dog, running"], "row 1 has more cells than the header: put double quotes"),
        (["file_name,text", 'dog.jpg,"sks dog'], r"metadata\.csv is not CSV after line 1"),
        (["file_name;text", "dog.jpg;sks dog"], "row 1 has no column file_name"),
        (["file_name,text", "dog.jpg"], "row 1 has no text in the column text"),
        (["file_name,text", "dgo.jpg,sks dog"], r"row 1 names dgo\.jpg, which is not there"),
    ],
)
def test_malformed_csv_is_one_sentence(tmp_path: Path, dog: Path, lines: list[str], message: str) -> None:
    write_csv(tmp_path, *lines)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path, [dog])


def test_an_empty_caption_file_is_one_sentence(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"dog\.txt is empty"):
        read_captions(tmp_path, [dog])


def test_a_caption_file_in_another_encoding_is_one_sentence(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"dog\.txt is not UTF-8"):
        read_captions(tmp_path, [dog])


def test_neither_caption_nor_prompt_is_one_sentence(tmp_path: Path, dog: Path) -> None:
    with pytest.raises(UserError, match=r"dog\.jpg has no caption: type --instance_prompt .*dog\.txt"):
        instance_images(tmp_path, None)


def test_instance_images_are_sorted_and_known_by_their_bytes(tmp_path: Path) -> None:
    paths = [picture(tmp_path, name) for name in ("b.jpg", "c.jpg", "a.jpg")]
    images, _ = instance_images(tmp_path, PROMPT)
    assert [image.path for image in images] == sorted(paths)
    assert [image.image_id for image in images] == [hash_file(path) for path in sorted(paths)]
    assert {image.role for image in images} == {"instance"}


def test_identical_pictures_are_named_and_used_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jpg", "in/copy.jpg"):
        picture(tmp_path, name, "same" if name != "b.jpg" else None)
    images, _ = instance_images(tmp_path, PROMPT, recursive=True)
    assert [image.path.name for image in images] == ["a.jpg", "b.jpg"]
    assert capsys.readouterr().out == "identical pictures, used once: a.jpg, in/copy.jpg\n"


def test_identical_pictures_share_the_one_caption_there_is(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", "same")
    picture(tmp_path, "b.jpg", "same")
    (tmp_path / "b.txt").write_text("sks dog")
    for prompt in (None, "", PROMPT):
        images, _ = instance_images(tmp_path, prompt)
        assert [(image.path.name, image.prompt) for image in images] == [("a.jpg", "sks dog")]


def test_identical_pictures_with_different_captions_are_one_sentence(tmp_path: Path) -> None:
    for name, caption in (("a", "sks dog"), ("b", "another dog")):
        picture(tmp_path, f"{name}.jpg", "same")
        (tmp_path / f"{name}.txt").write_text(caption)
    with pytest.raises(UserError, match=r"a\.jpg and .*b\.jpg are the same picture .*'sks dog' and 'another dog'"):
        instance_images(tmp_path, PROMPT)
