"""Contact sheets: which pictures share a row, and what is written above and below them."""

from __future__ import annotations

from pathlib import Path

from sd3_lora.drawing import contact_sheet
from sd3_lora.drawing.contact_sheet import (
    CAPTION_LINES,
    LEAST_WIDTH_PX,
    MARGIN_PX,
    SheetPicture,
    draw_sheet,
    find_pictures,
    load_row,
    rows_of_run,
    save_sheet,
    thumbnail_of,
    wrap,
)
from sd3_lora.drawing.picture_metadata import picture_file

import pytest
from PIL import Image, ImageFont


def run_of(folder: Path, prompts: int, images: int, variants: tuple[str, ...] = ("",)) -> list[SheetPicture]:
    pictures = []
    for prompt in range(prompts):
        for index in range(images):
            for variant in variants:
                path = folder / f"{prompt}_{index}{variant}.png"
                Image.new("RGB", (30, 20), (40 * prompt % 256, 40 * index % 256, 99)).save(path)
                pictures.append(SheetPicture(path, f"prompt {prompt}", index, variant))
    return pictures


def test_prompts_with_one_picture_each_share_rows(tmp_path: Path) -> None:
    rows, left_out = rows_of_run(run_of(tmp_path, prompts=7, images=1))
    assert [(row.heading, row.captions) for row in rows] == [
        ("", tuple(f"prompt {number}" for number in range(5))),
        ("", ("prompt 5", "prompt 6")),
    ]
    assert left_out == ""
    sheet = draw_sheet("title", rows, "subtitle")
    assert sheet.width > LEAST_WIDTH_PX
    assert sheet.width < 5 * 400 + 2 * MARGIN_PX


def test_each_prompt_has_a_row_where_it_has_several_pictures(tmp_path: Path) -> None:
    rows, _ = rows_of_run(run_of(tmp_path, prompts=2, images=3))
    assert [(row.heading, row.captions) for row in rows] == [
        (f"prompt {number}", tuple(f"{number}_{index}" for index in range(3))) for number in range(2)
    ]


def test_the_same_picture_in_several_ways_stands_side_by_side(tmp_path: Path) -> None:
    rows, _ = rows_of_run(run_of(tmp_path, prompts=2, images=1, variants=("base", "LoRA at 1")))
    assert [(row.heading, row.captions) for row in rows] == [
        (f"prompt {number}", ("base", "LoRA at 1")) for number in range(2)
    ]
    rows, _ = rows_of_run(run_of(tmp_path, prompts=1, images=3, variants=("a", "b", "c")))
    assert [row.captions for row in rows] == [  # eight would fit, and cut a comparison in two
        ("1: a", "1: b", "1: c", "2: a", "2: b", "2: c"),
        ("3: a", "3: b", "3: c"),
    ]


def test_a_thumbnail_stands_for_the_file(tmp_path: Path) -> None:
    drawn = Image.new("RGB", (900, 600), (1, 2, 3))
    for count in (1, 7):
        pictures = [SheetPicture(tmp_path / "none", "prompt", i, "", thumbnail_of(drawn)) for i in range(count)]
        (row,) = rows_of_run(pictures)[0]
        assert {picture.size for picture in row.pictures} == {(336, 224)}
    pictures = [SheetPicture(tmp_path / "none", "prompt", i, "", thumbnail_of(drawn)) for i in range(8)]
    (row,) = rows_of_run(pictures)[0]
    assert {picture.size for picture in row.pictures} == {(294, 196)}
    assert row.pictures[0].getpixel((5, 5)) == (1, 2, 3)


def test_what_is_left_out_of_a_large_run_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_sheet, "MOST_ROWS", 2)
    rows, left_out = rows_of_run(run_of(tmp_path, prompts=3, images=4))
    assert (len(rows), left_out) == (2, "and 4 more pictures")


def test_a_folders_captions_are_the_prompts_in_its_pictures(tmp_path: Path) -> None:
    """And the sheet of a run is none of its pictures."""
    settings = {"prompt": "a dog", "width": 8, "height": 8}
    for name in ("a.webp", "b.png"):
        kind = Path(name).suffix[1:]
        (tmp_path / name).write_bytes(picture_file(Image.new("RGB", (8, 8)), kind, settings))  # type: ignore[arg-type]
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    row = load_row("Drawn", tmp_path, 20, 5)
    assert row.captions == ("a dog", "a dog", "c.png")
    assert save_sheet(draw_sheet("", [row]), tmp_path, "webp") == tmp_path / "contact_sheet.webp"
    assert [path.name for path in find_pictures(tmp_path)] == ["a.webp", "b.png", "c.png"]


def test_long_text_is_wrapped_and_cut() -> None:
    font = ImageFont.load_default(13)
    lines = wrap("a photo of sks dog " * 20, font, 120)
    assert len(lines) == CAPTION_LINES
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 140 for line in lines)
    row = contact_sheet.Row("a long heading " * 40, (Image.new("RGB", (20, 20)),), ("caption",))
    assert draw_sheet("a long title " * 40, [row]).width == LEAST_WIDTH_PX + 2 * MARGIN_PX
