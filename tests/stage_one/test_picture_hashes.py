"""A large folder's hashes are noted, and never believed of a file that may have changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.stage_one import picture_hashes
from sd3_lora.stage_one.captions import instance_images
from sd3_lora.stage_one.picture_hashes import NOTES_NAME, hash_pictures

import pytest
from conftest import PROMPT, Result, save_pictures


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return save_pictures(tmp_path / "pictures", [(8, 8), (9, 8), (10, 8)])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read; any folder is large, and any file has settled."""
    monkeypatch.setattr(picture_hashes, "NOTED_FROM_BYTES", 0)
    monkeypatch.setattr(picture_hashes, "_CLOCK_TICK_NS", -(10**12))
    names: list[str] = []
    hash_file = picture_hashes.hash_file

    def watched(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(picture_hashes, "hash_file", watched)
    return names


def expected(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_what_has_not_changed_is_not_read_again(paths: list[Path], tmp_path: Path, read: list[str]) -> None:
    notes = tmp_path / "latents" / NOTES_NAME
    assert hash_pictures(paths, notes) == expected(paths)
    assert sorted(read) == ["00.png", "01.png", "02.png"]
    read.clear()
    assert hash_pictures(paths, notes) == expected(paths)
    assert read == []
    save_pictures(tmp_path / "pictures", [(8, 8)] * 4, seed=1)
    paths.append(tmp_path / "pictures" / "03.png")
    assert hash_pictures(paths, notes) == expected(paths)
    assert sorted(read) == ["00.png", "01.png", "02.png", "03.png"]


def test_another_file_with_the_old_size_and_date_is_read(paths: list[Path], tmp_path: Path, read: list[str]) -> None:
    notes = tmp_path / NOTES_NAME
    hash_pictures(paths, notes)
    read.clear()
    before = paths[1].stat()
    paths[1].write_bytes(bytes(before.st_size))
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_pictures(paths, notes) == expected(paths)
    assert read == ["01.png"]


def test_a_file_that_is_just_being_written_is_not_noted(
    paths: list[Path], tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_hashes, "_CLOCK_TICK_NS", 10**12)
    notes = tmp_path / NOTES_NAME
    hash_pictures(paths, notes)
    hash_pictures(paths, notes)
    assert len(read) == 6
    assert json.loads(notes.read_text()) == {}


def test_a_small_folder_leaves_no_notes(
    paths: list[Path], tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_hashes, "NOTED_FROM_BYTES", sum(path.stat().st_size for path in paths) + 1)
    assert hash_pictures(paths, tmp_path / NOTES_NAME) == expected(paths)
    assert not (tmp_path / NOTES_NAME).exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": [1, 2]}', "null"])
def test_notes_that_are_not_whole_are_nothing(paths: list[Path], tmp_path: Path, read: list[str], content: str) -> None:
    (tmp_path / NOTES_NAME).write_text(content)
    assert hash_pictures(paths, tmp_path / NOTES_NAME) == expected(paths)
    assert hash_pictures(paths, tmp_path / NOTES_NAME) == expected(paths)
    assert len(read) == 3


def test_notes_that_cannot_be_written_are_done_without(paths: list[Path], tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    assert hash_pictures(paths, tmp_path / "file" / NOTES_NAME) == expected(paths)


def test_a_file_that_is_not_there(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        hash_pictures([*paths, tmp_path / "none.png"])


def test_stage_one_notes_what_training_believes(
    script: Callable[..., Result], tiny_sd3: Path, paths: list[Path], tmp_path: Path, read: list[str]
) -> None:
    flags = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", tmp_path / "pictures"]
    flags += ["--device", "cpu", "--output_path", tmp_path / "latents"]
    assert script("precompute_latents", *flags, "--plan").code == 0
    assert not (tmp_path / "latents").exists()
    assert script("precompute_latents", *flags).code == 0
    assert len(json.loads((tmp_path / "latents" / NOTES_NAME).read_text())) == 3
    read.clear()
    images = instance_images(tmp_path / "pictures", PROMPT, hashes_path=tmp_path / "latents" / NOTES_NAME).images
    assert [image.image_id for image in images] == expected(paths)
    assert "3 of 3 pictures cached before" in script("precompute_latents", *flags).out
    assert read == []
