"""Several concepts: lists in ShivamShrirao's form, and kohya's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import PictureFlags
from sd3_lora.stage_one.concepts import Concept, concepts_of, read_concepts_list, read_subject

import pytest


def picture(path: Path, content: str | None = None) -> Path:
    """A file with a picture's name; nothing here decodes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((content or path.as_posix()).encode())
    return path


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two folders with a picture each, in the working folder, and their list."""
    monkeypatch.chdir(tmp_path)
    picture(Path("dog/a.png"))
    picture(Path("cat/b.png"))
    return [
        {"instance_prompt": "sks dog", "class_prompt": "a dog", "instance_data_dir": "dog", "class_data_dir": "dogs"},
        {"instance_prompt": "zwx cat", "instance_data_dir": "cat", "repeats": 3},
    ]


def write(entries: object, path: Path = Path("concepts.json")) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8-sig")
    return path


def test_a_list(two: list[dict[str, Any]]) -> None:
    assert read_concepts_list(write(two), repeats=2) == (
        Concept(Path("dog"), "sks dog", 2, "a dog", Path("dogs")),
        Concept(Path("cat"), "zwx cat", 3),
    )
    flags = PictureFlags(concepts_list=str(write(two)))
    subject = read_subject(concepts_of(flags), flags)
    assert {image.path.as_posix(): (image.prompt, image.repeats) for image in subject.images} == {
        "dog/a.png": ("sks dog", 1),
        "cat/b.png": ("zwx cat", 3),
    }
    assert subject.instance_prompts == ("sks dog", "zwx cat")
    assert subject.class_prompts == ("a dog",)
    assert subject.sentences(about_prompts=True) == ["1 picture in dog", "1 picture in cat"]


def test_shivams_empty_class_is_none(two: list[dict[str, Any]]) -> None:
    two[0]["class_prompt"] = two[0]["class_data_dir"] = None
    assert read_concepts_list(write(two))[0] == Concept(Path("dog"), "sks dog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instance_prompt": ...}, r"concepts\.json, concept 1 has no instance_prompt: add it"),
        ({"instance_data_dir": ...}, "concept 1 has no instance_data_dir: add it"),
        ({"instance_prompt": " "}, "concept 1 has no text in instance_prompt: write it in double quotes"),
        ({"instance_data_dir": 7}, "concept 1 has no text in instance_data_dir"),
        ({"class_prompt": 7}, "concept 1 has no text in class_prompt"),
        ({"instance_data_dir": "dgo"}, "concept 1 names the folder dgo, which is not there: correct instance_data_dir"),
        ({"repeats": 0}, "concept 1 has repeats 0: write a number of at least 1"),
        ({"repeats": True}, "concept 1 has repeats True"),
        ({"repeat": 2}, "concept 1 has repeat, which is not known: take it out; there are instance_prompt, instance_d"),
    ],
)
def test_a_bad_concept_is_one_sentence(two: list[dict[str, Any]], change: dict[str, Any], message: str) -> None:
    two[0] = {key: value for key, value in {**two[0], **change}.items() if value is not ...}
    with pytest.raises(UserError, match=message) as error:
        read_concepts_list(write(two))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["[", "{}", "[]", "[1]", '"dog"'])
def test_what_is_no_list_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "concepts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"concepts\.json is not (JSON|a list of concepts)"):
        read_concepts_list(path)


def test_a_picture_in_two_concepts(two: list[dict[str, Any]]) -> None:
    picture(Path("cat/b.png"), "dog/a.png")
    flags = PictureFlags(concepts_list=str(write(two)))
    with pytest.raises(UserError, match=r"dog/a\.png and cat/b\.png are the same picture in two concepts"):
        read_subject(concepts_of(flags), flags)


def test_repeats_from_folders(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks dog/a.png")
    picture(tmp_path / "2_zwx_cat/b.png")
    (tmp_path / "2_zwx_cat/b.caption").write_text("zwx cat at sea")
    flags = PictureFlags(instance_data_dir=str(tmp_path), repeats_from_folders=True)
    subject = read_subject(concepts_of(flags), flags)
    assert [(image.prompt, image.repeats) for image in subject.images] == [("sks dog", 10), ("zwx cat at sea", 2)]
    assert subject.instance_prompts == ("sks dog", "zwx cat")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["dog/a.png"], "has no repeats in its name: rename it, for example to 10_dog"),
        (["0_dog/a.png"], "0_dog has no repeats in its name"),
        (["a.png"], "has no subfolder with repeats in its name, such as 10_sks dog: make one"),
        (["2_dog/a.png", "b.png"], r"has b\.png beside its subfolders: move its files into one of them"),
    ],
)
def test_other_folders_are_one_sentence(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        picture(tmp_path / name)
    with pytest.raises(UserError, match=message):
        concepts_of(PictureFlags(instance_data_dir=str(tmp_path), repeats_from_folders=True))


def test_a_trigger_word_that_stands_nowhere_is_told(two: list[dict[str, Any]]) -> None:
    flags = PictureFlags(instance_data_dir="dog", instance_prompt="a dog", trigger_word="zwx")
    note = "note: no prompt has --trigger_word 'zwx': write [trigger] where it is to stand"
    assert note in read_subject(concepts_of(flags), flags).sentences(about_prompts=True)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (
            {"instance_data_dir": "d", "concepts_list": "c.json"},
            "--instance_data_dir and --concepts_list exclude each other: type one of them",
        ),
        (
            {"concepts_list": "c.json", "dataset_name": "d"},
            "--concepts_list and --dataset_name exclude each other: type one of them",
        ),
        (
            {"concepts_list": "c.json", "instance_prompt": "a"},
            "--instance_prompt has no place beside --concepts_list, which says it of each concept: leave it out",
        ),
        (
            {"concepts_list": "c.json", "repeats_from_folders": True},
            "--repeats_from_folders has no place beside --concepts_list, which says it of each concept: leave it out",
        ),
        (
            {"dataset_name": "d", "repeats_from_folders": True},
            "--repeats_from_folders reads folders, and a data set has none: leave it out",
        ),
        ({"caption_column": "text"}, "--caption_column needs --dataset_name"),
    ],
)
def test_flags_that_exclude_each_other(flags: dict[str, Any], fault: str) -> None:
    assert list(PictureFlags(**flags).picture_faults()) == [fault]
