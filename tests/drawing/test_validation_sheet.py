"""The sheet of a run: steps down, prompts across."""

from __future__ import annotations

from pathlib import Path

from sd3_lora.drawing import validation_sheet
from sd3_lora.drawing.contact_sheet import wrap
from sd3_lora.drawing.pictures import PicturePlan
from sd3_lora.drawing.validation_sheet import GAP_PX, MARGIN_PX, SheetRow, ValidationSheet, draw_sheet

import pytest
from PIL import Image, ImageFont

RED, GREEN, BLUE = (200, 0, 0), (0, 160, 0), (0, 0, 200)


def plain(color: tuple[int, int, int], size: tuple[int, int] = (200, 200)) -> Image.Image:
    return Image.new("RGB", size, color)


def save(folder: Path, step: int, color: tuple[int, int, int], prompt: str = "a dog", index: int = 0) -> None:
    path = folder / f"step_{step:06d}" / f"{prompt.replace(' ', '-')}_{index:02d}.png"
    PicturePlan(prompt, index, path, {"prompt": prompt, "image_index": index}, False).save(plain(color))


def cells(sheet: Image.Image, rows: int, columns: int, cell: int) -> list[list[tuple[int, int, int]]]:
    """The colour in the middle of each cell, from the lower right corner on, where nothing but cells is."""
    right, bottom = sheet.width - MARGIN_PX, sheet.height - MARGIN_PX
    xs = [right - (columns - number) * (cell + GAP_PX) + GAP_PX + cell // 2 for number in range(columns)]
    ys = [bottom - (rows - number) * (cell + GAP_PX) + GAP_PX + cell // 2 for number in range(rows)]
    return [[sheet.getpixel((x, y)) for x in xs] for y in ys]  # type: ignore[misc]


def near(actual: list[list[tuple[int, int, int]]], expected: list[list[tuple[int, int, int]]]) -> bool:
    flat = [(a, e) for left, right in zip(actual, expected, strict=True) for a, e in zip(left, right, strict=True)]
    return all(abs(x - y) < 12 for a, e in flat for x, y in zip(a, e, strict=True))


def test_steps_go_down_and_prompts_across() -> None:
    rows = [
        SheetRow(0, {("a dog", 0): plain(RED), ("a cat", 0): plain(GREEN)}),
        SheetRow(20, {("a dog", 0): plain(GREEN), ("a cat", 0): plain(BLUE)}),
    ]
    assert near(cells(draw_sheet(rows), 2, 2, 200), [[RED, GREEN], [GREEN, BLUE]])


def test_it_grows_from_the_files(tmp_path: Path) -> None:
    """Other files are left out; and a picture that is drawn again replaces its older self."""
    sheet = ValidationSheet(tmp_path, goes_on=True)
    for step, color in ((0, RED), (20, GREEN), (40, BLUE)):
        save(tmp_path, step, color)
        (tmp_path / f"step_{step:06d}" / "notes.png").write_text("no picture")
        (tmp_path / "other").mkdir(exist_ok=True)
        sheet.write(step)
    with Image.open(sheet.path) as opened:
        assert near(cells(opened.convert("RGB"), 3, 1, 200), [[RED], [GREEN], [BLUE]])
    save(tmp_path, 20, BLUE)
    ValidationSheet(tmp_path, goes_on=True).write(20)  # resumed from step 10: the row of step 40 will come again
    with Image.open(sheet.path) as opened:
        assert near(cells(opened.convert("RGB"), 2, 1, 200), [[RED], [BLUE]])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_new_run_shows_its_own_rows_alone(tmp_path: Path) -> None:
    save(tmp_path, 10, RED)
    save(tmp_path, 20, BLUE)
    sheet = ValidationSheet(tmp_path)
    sheet.write(20)
    with Image.open(sheet.path) as opened:
        assert near(cells(opened.convert("RGB"), 1, 1, 200), [[BLUE]])


def test_without_a_picture_there_is_no_sheet(tmp_path: Path) -> None:
    ValidationSheet(tmp_path / "samples").write(0)
    assert not (tmp_path / "samples").exists()


def test_other_prompts_of_a_resumed_run() -> None:
    """The last row's columns come first; where a row has no picture there is none."""
    rows = [
        SheetRow(0, {("a dog", 0): plain(RED), ("a cat", 0): plain(RED)}),
        SheetRow(20, {("a cat", 0): plain(GREEN), ("a bird", 0): plain(BLUE)}),
    ]
    (upper, lower) = cells(draw_sheet(rows), 2, 3, 200)
    assert near([lower[:2]], [[GREEN, BLUE]])
    assert near([[upper[0], upper[2]]], [[RED, RED]])
    assert upper[1] not in (RED, GREEN, BLUE)


def test_the_pictures_of_a_prompt_stand_together() -> None:
    """Prompts stand further apart then; a row that lacks some changes no order."""
    rows = [
        SheetRow(0, {(prompt, index): plain(RED) for prompt in ("a dog", "a cat") for index in (0, 1)}),
        SheetRow(20, {("a dog", 0): plain(GREEN), ("a cat", 0): plain(BLUE)}),
    ]
    sheet = draw_sheet(rows)
    y = sheet.height - MARGIN_PX - 100
    right = sheet.width - MARGIN_PX
    xs = [right - 100, right - 300 - GAP_PX, right - 500 - 3 * GAP_PX, right - 700 - 4 * GAP_PX]
    lower, upper = ([sheet.getpixel((x, row)) for x in reversed(xs)] for row in (y, y - 200 - GAP_PX))
    assert upper == [RED] * 4
    assert (lower[0], lower[2]) == (GREEN, BLUE)
    assert {RED, GREEN, BLUE}.isdisjoint([lower[1], lower[3]])


def test_many_columns_are_small_and_many_rows_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = draw_sheet([SheetRow(0, {("a dog", index): plain(RED, (1024, 1024)) for index in range(12)})])
    assert wide.width < 2500
    monkeypatch.setattr(validation_sheet, "MOST_PX", 1100)
    tall = draw_sheet([SheetRow(step, {("a dog", 0): plain((step, 0, 0))}) for step in range(0, 200, 10)])
    assert tall.height <= 1100
    shown = [row[0][0] for row in cells(tall, 4, 1, 200)]
    assert shown == [0, 60, 130, 190]


def test_long_prompts_are_wrapped() -> None:
    font = ImageFont.load_default(13)
    assert wrap("a photo of a dog", font, 1000) == ["a photo of a dog"]
    lines = wrap("word " * 200, font, 200, 5)
    assert len(lines) == 5
    assert lines[-1].endswith(" …")
    assert all(font.getlength(line) <= 220 for line in lines)
