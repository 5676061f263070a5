"""Which prompt belongs to which picture."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import PictureFlags
from sd3_lora.stage_one.captions import CaptionRules, instance_images, label_of, read_captions, tag_orders, trigger_of
from sd3_lora.stage_one.image_files import hash_file

import pyarrow as pa
import pyarrow.parquet as pq
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
    (tmp_path / "dog.txt").write_bytes("\ufeff\r\n  sks dog in a café \r\n\r\n".encode())
    subject = instance_images(tmp_path, PROMPT)
    assert {image.path.name: image.prompt for image in subject.images} == {
        "dog.jpg": "sks dog in a café",
        "cat.png": PROMPT,
    }
    assert subject.left_out == ()
    assert read_captions(tmp_path, [dog, tmp_path / "cat.png"]) == {dog: ("sks dog in a café",)}


def test_an_upper_case_caption_file(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.TXT").write_text("sks dog")
    assert read_captions(tmp_path, [dog]) == {dog: ("sks dog",)}


def test_a_picture_called_txt_is_no_caption(tmp_path: Path, dog: Path) -> None:
    disguised = tmp_path / "dog.txt"
    disguised.write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    images = instance_images(tmp_path, PROMPT).images
    assert [(image.path, image.prompt) for image in images] == [(dog, PROMPT), (disguised, PROMPT)]


def test_a_caption_without_a_picture_is_left_out_by_name(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dgo.txt").write_text("sks dog")
    subject = instance_images(tmp_path, PROMPT)
    assert subject.left_out == (tmp_path / "dgo.txt",)
    assert subject.sentences(PROMPT) == [
        f"1 picture in {tmp_path}, 1 other file left out",
        "left out: dgo.txt",
        "note: no picture has the name of the caption dgo.txt",
    ]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_jsonl(tmp_path: Path, dog: Path, column: str) -> None:
    write_jsonl(tmp_path, {"file_name": "dog.jpg", column: "sks dog,\n running", "other": 1})
    assert read_captions(tmp_path, [dog]) == {dog: ("sks dog, running",)}


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_csv(tmp_path: Path, dog: Path, column: str) -> None:
    write_csv(tmp_path, f"\ufefffile_name,{column}", 'dog.jpg,"sks dog, running"')
    assert read_captions(tmp_path, [dog]) == {dog: ("sks dog, running",)}


def test_text_comes_before_caption_and_prompt(tmp_path: Path, dog: Path) -> None:
    write_jsonl(tmp_path, {"prompt": "c", "caption": "b", "text": "a", "file_name": "dog.jpg"})
    assert read_captions(tmp_path, [dog]) == {dog: ("a",)}


def test_metadata_of_subfolders(tmp_path: Path) -> None:
    inner, other = picture(tmp_path, "in/dog.jpg"), picture(tmp_path, "in/cat.jpg")
    write_jsonl(tmp_path, {"file_name": "in/dog.jpg", "text": "sks dog"})
    write_jsonl(tmp_path / "in", {"file_name": "cat.jpg", "text": "a cat"})
    images = instance_images(tmp_path, None, recursive=True).images
    assert [(image.path, image.prompt) for image in images] == [(other, "a cat"), (inner, "sks dog")]


def test_a_row_of_a_picture_that_was_left_out_is_no_error(tmp_path: Path, dog: Path) -> None:
    picture(tmp_path, "in/cat.jpg")
    write_jsonl(tmp_path, {"file_name": "in/cat.jpg", "text": "a cat"}, {"file_name": "dog.jpg", "text": "sks dog"})
    assert [image.prompt for image in instance_images(tmp_path, None).images] == ["sks dog"]


def test_both_spellings_of_an_umlaut_are_one_name(tmp_path: Path) -> None:
    path = picture(tmp_path, unicodedata.normalize("NFD", "hündin.jpg"))
    write_jsonl(tmp_path, {"file_name": unicodedata.normalize("NFC", "hündin.jpg"), "text": "sks dog"})
    assert read_captions(tmp_path, [path]) == {path: ("sks dog",)}


def test_the_same_caption_twice_is_fine_and_two_different_ones_are_not(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_text("sks dog")
    write_jsonl(tmp_path, {"file_name": "dog.jpg", "text": " sks dog"})
    assert read_captions(tmp_path, [dog]) == {dog: ("sks dog",)}
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
    images = instance_images(tmp_path, PROMPT).images
    assert [image.path for image in images] == sorted(paths)
    assert [image.image_id for image in images] == [hash_file(path) for path in sorted(paths)]
    assert {image.role for image in images} == {"instance"}


def test_identical_pictures_are_named_and_used_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jpg", "in/copy.jpg"):
        picture(tmp_path, name, "same" if name != "b.jpg" else None)
    images = instance_images(tmp_path, PROMPT, recursive=True).images
    assert [image.path.name for image in images] == ["a.jpg", "b.jpg"]
    assert capsys.readouterr().out == "identical pictures, used once: a.jpg, in/copy.jpg\n"


def test_identical_pictures_share_the_one_caption_there_is(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", "same")
    picture(tmp_path, "b.jpg", "same")
    (tmp_path / "b.txt").write_text("sks dog")
    for prompt in (None, "", PROMPT):
        images = instance_images(tmp_path, prompt).images
        assert [(image.path.name, image.prompt) for image in images] == [("a.jpg", "sks dog")]


def test_identical_pictures_with_different_captions_are_one_sentence(tmp_path: Path) -> None:
    for name, caption in (("a", "sks dog"), ("b", "another dog")):
        picture(tmp_path, f"{name}.jpg", "same")
        (tmp_path / f"{name}.txt").write_text(caption)
    with pytest.raises(UserError, match=r"a\.jpg and .*b\.jpg are the same picture .*'sks dog' and 'another dog'"):
        instance_images(tmp_path, PROMPT)


# Captions as other trainers write them


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("dog.jpg", "dog.caption"),
        ("dog.jpg", "dog.jpg.txt"),
        ("dog.jpg", "dog.jpg.caption"),
        ("DOG.JPG", "dog.txt"),
        ("dog.jpg", "DOG.TXT"),
        ("dog.v2.jpg", "dog.v2.txt"),
        (unicodedata.normalize("NFD", "hündin.jpg"), unicodedata.normalize("NFC", "hündin.txt")),
        (unicodedata.normalize("NFC", "hündin.jpg"), unicodedata.normalize("NFD", "Hündin.txt")),
    ],
)
def test_a_caption_under_another_spelling_of_the_picture_s_name(tmp_path: Path, image: str, caption: str) -> None:
    path = picture(tmp_path, image)
    (tmp_path / caption).write_text("sks dog")
    subject = instance_images(tmp_path, PROMPT)
    assert [(found.path, found.prompt) for found in subject.images] == [(path, "sks dog")]
    assert subject.left_out == ()


def test_the_exact_name_comes_before_another_spelling(tmp_path: Path) -> None:
    lower, upper = picture(tmp_path, "dog.jpg"), picture(tmp_path, "DOG.jpg")
    if lower.samefile(upper):
        pytest.skip("this file system does not tell case")
    (tmp_path / "dog.txt").write_text("a small dog")
    (tmp_path / "DOG.txt").write_text("a large dog")
    assert read_captions(tmp_path, [lower, upper]) == {lower: ("a small dog",), upper: ("a large dog",)}


def test_two_caption_files_that_differ_are_one_sentence(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_text("sks dog")
    (tmp_path / "dog.caption").write_text("another dog")
    with pytest.raises(UserError, match=r"dog\.jpg has two captions, 'another dog' in dog\.caption and 'sks dog' in"):
        read_captions(tmp_path, [dog])


def test_each_line_is_a_caption(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_text("sks dog\n\na small dog, running\nsks dog\n")
    assert read_captions(tmp_path, [dog]) == {dog: ("sks dog", "a small dog, running", "sks dog")}
    (image,) = instance_images(tmp_path, PROMPT).images
    assert image.prompts == ("a small dog, running", "sks dog")
    (tmp_path / "dog.txt").write_text("a small dog, running\nsks dog\n")
    assert instance_images(tmp_path, PROMPT).images == (image,)  # the order of lines changes nothing


def test_a_list_of_captions_in_metadata(tmp_path: Path, dog: Path) -> None:
    write_jsonl(tmp_path, {"file_name": "dog.jpg", "text": ["sks dog,\n running", "a dog"]})
    assert read_captions(tmp_path, [dog]) == {dog: ("sks dog, running", "a dog")}
    write_jsonl(tmp_path, {"file_name": "dog.jpg", "text": []})
    with pytest.raises(UserError, match="row 1 has no text in the column text"):
        read_captions(tmp_path, [dog])


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\f"])
def test_only_a_line_feed_ends_a_json_line(tmp_path: Path, dog: Path, separator: str) -> None:
    write_jsonl(tmp_path, json.dumps({"file_name": "dog.jpg", "text": f"a{separator}b"}, ensure_ascii=False))
    assert read_captions(tmp_path, [dog]) == {dog: ("a b",)}


def test_metadata_parquet(tmp_path: Path, dog: Path) -> None:
    rows = [{"file_name": "dog.jpg", "caption": "sks dog", "image": b"\0", "id": 7}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    subject = instance_images(tmp_path, PROMPT)
    assert [image.prompt for image in subject.images] == ["sks dog"]
    assert subject.left_out == ()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"metadata\.parquet is not a whole parquet file \("):
        read_captions(tmp_path, [dog])


def test_a_file_name_with_a_backslash(tmp_path: Path) -> None:
    path = picture(tmp_path, "in/Dog.jpg")
    write_jsonl(tmp_path, {"file_name": "in\\dog.jpg", "text": "sks dog"})
    assert read_captions(tmp_path, [path]) == {path: ("sks dog",)}


def test_utf_16_without_a_mark_is_named(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_bytes("sks dog".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"dog\.txt holds NUL bytes, as UTF-16 text does: save it again as UTF-8"):
        read_captions(tmp_path, [dog])


def test_all_bad_captions_are_named(tmp_path: Path, dog: Path) -> None:
    picture(tmp_path, "cat.png")
    (tmp_path / "dog.txt").write_text(" \n")
    (tmp_path / "cat.txt").write_bytes(b"caf\xe9")
    write_jsonl(tmp_path, "{", {"file_name": "dgo.jpg", "text": "sks dog"}, {"file_name": "dog.jpg"})
    with pytest.raises(UserError) as error:
        instance_images(tmp_path, PROMPT)
    first, *others = str(error.value).splitlines()
    assert first == "5 things are wrong with the captions:"
    for part, line in zip(("cat.txt is not", "dog.txt is empty", "row 1", "row 2", "row 3"), others, strict=True):
        assert part in line


def test_at_most_ten_are_named(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path, f"{number:02d}.png")
    with pytest.raises(UserError, match=r"00\.png, .*09\.png and 2 more have no caption: type --instance_prompt"):
        instance_images(tmp_path, None)
    for number in range(12):
        (tmp_path / f"{number:02d}.txt").touch()
    with pytest.raises(UserError, match="12 things are wrong") as error:
        instance_images(tmp_path, None)
    assert len(str(error.value).splitlines()) == 12  # with the first line and the last
    assert str(error.value).endswith("\n  and 2 more")


# Which prompt wins, and which draws the subject


def test_captions_come_before_the_instance_prompt_and_that_is_said(tmp_path: Path, dog: Path) -> None:
    picture(tmp_path, "cat.png")
    (tmp_path / "dog.txt").write_text("sks dog at sea")
    assert instance_images(tmp_path, PROMPT).sentences(PROMPT)[1:] == [
        f"note: 1 of 2 pictures have captions, which are trained on; --instance_prompt {PROMPT!r} is for the other 1"
    ]
    (tmp_path / "cat.txt").write_text("sks dog at home")
    subject = instance_images(tmp_path, PROMPT)
    said = f"note: 2 of 2 pictures have captions, which are trained on; --instance_prompt {PROMPT!r} is not"
    assert subject.sentences(PROMPT)[1:] == [said]
    assert subject.sentences(None)[1:] == []


def test_the_trigger_is_a_prompt_that_is_trained_on() -> None:
    assert trigger_of(["sks dog at sea", PROMPT], [PROMPT]) == PROMPT
    assert trigger_of(["sks dog at sea", "sks dog at home", "sks dog at sea"], [PROMPT]) == "sks dog at sea"
    captions = ["sks dog, running", "sks dog", "sks cat"]  # as many pictures each: the shortest, then the first
    assert trigger_of(captions, []) == trigger_of(captions[::-1], []) == "sks cat"


def rules(**flags: Any) -> CaptionRules:
    return CaptionRules.of(PictureFlags(**flags))


@pytest.mark.parametrize(
    ("flags", "caption", "prompts"),
    [
        ({"caption_prefix": "art of"}, "a dog", ("art of a dog",)),
        ({"caption_suffix": ", watercolour"}, "a dog", ("a dog, watercolour",)),
        ({"caption_suffix": "in watercolour"}, "a dog", ("a dog in watercolour",)),
        ({"trigger_word": "sks dog"}, "[trigger] and a [trigger]", ("sks dog and a sks dog",)),
        ({"trigger_word": "sks", "caption_prefix": "[trigger],"}, "running", ("sks, running",)),
        ({"shuffle_tags": 6}, "a, b", ("a, b", "b, a")),
        ({"shuffle_tags": 6, "keep_tags": 1}, "sks, a,b", ("sks, a,b", "sks, b, a")),
        (
            {"shuffle_tags": 2, "caption_prefix": "[trigger],", "trigger_word": "sks"},
            "b, a",
            ("sks, a, b", "sks, b, a"),
        ),
        ({"shuffle_tags": 4}, "no tags", ("no tags",)),
    ],
)
def test_how_a_caption_becomes_prompts(flags: dict[str, Any], caption: str, prompts: tuple[str, ...]) -> None:
    assert rules(**flags).prompts([caption]) == prompts


def test_a_trigger_without_its_word_is_one_sentence(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_text("[trigger] at sea")
    with pytest.raises(UserError, match=r"'\[trigger\] at sea' has \[trigger\]: .* --trigger_word 'sks dog'"):
        instance_images(tmp_path, PROMPT)
    (tmp_path / "dog.txt").unlink()
    with pytest.raises(UserError, match="--trigger_word"):
        instance_images(tmp_path, "a photo of [trigger]")
    (image,) = instance_images(tmp_path, "a photo of [trigger]", rules=rules(trigger_word="zwx")).images
    assert image.prompt == "a photo of zwx"


def test_orders_of_tags_are_distinct_always_the_same_and_begin_with_the_kept_ones() -> None:
    caption = "sks dog, sea, sand, sun"
    orders = tag_orders(caption, 4, kept=1)
    assert orders == tag_orders(caption, 4, kept=1)
    assert orders[0] == caption
    assert len(set(orders)) == 4
    assert all(order.startswith("sks dog, ") and set(order.split(", ")) == set(caption.split(", ")) for order in orders)
    assert len(tag_orders(caption, 100, kept=1)) == 6
    assert len(tag_orders("a, a, b", 100)) == 3
    assert orders[:3] == tag_orders(caption, 3, kept=1)  # more orders keep those that are embedded


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("sks dog.jpg", "sks dog"),
        ("sks_dog_01.jpg", "sks dog"),
        ("sks dog (12).png", "sks dog"),
        ("r2d2.png", "r2d2"),
        ("a dog-3.webp", "a dog"),
        ("01.png", ""),
    ],
)
def test_names_as_captions(name: str, label: str) -> None:
    assert label_of(Path(name)) == label


def test_names_come_before_captions_beside_on_request(tmp_path: Path) -> None:
    path = picture(tmp_path, "sks dog_1.jpg")
    path.with_suffix(".txt").write_text("not this")
    by_name = rules(use_filename_as_label=True)
    assert instance_images(tmp_path, PROMPT, rules=by_name).images[0].prompts == ("sks dog",)
    picture(tmp_path, "7.jpg")
    with pytest.raises(UserError, match=r"no caption is in the names of .*7\.jpg: rename them"):
        instance_images(tmp_path, PROMPT, rules=by_name)


def test_txt_alone_on_request(tmp_path: Path, dog: Path) -> None:
    (tmp_path / "dog.txt").write_text("sks dog")
    (tmp_path / "dog.caption").write_text("not this")
    by_txt = rules(use_txt_as_label=True)
    assert instance_images(tmp_path, None, rules=by_txt).images[0].prompts == ("sks dog",)
    picture(tmp_path, "cat.jpg")
    with pytest.raises(
        UserError, match=r"there is no \.txt beside .*cat\.jpg: write it, or leave out --use_txt_as_label"
    ):
        instance_images(tmp_path, PROMPT, rules=by_txt)
