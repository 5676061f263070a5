"""A contact sheet: rows of pictures at one height, with headings and captions, in one picture. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import counted, write_atomically
from sd3_lora.drawing.config import PictureFormat
from sd3_lora.drawing.picture_metadata import encoded, read_settings

from PIL import Image, ImageDraw, ImageFont, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SHEET_NAME = "contact_sheet"  # of a run's own, which is no picture of another sheet
PAPER, INK, FAINT, FRAME = "#ffffff", "#202124", "#5f6368", "#dadce0"
MARGIN_PX, GAP_PX, ROW_GAP_PX, LINE_PX = 28, 16, 28, 18
TITLE_LINE_PX, HEADING_LINE_PX = 32, 22
CAPTION_LINES = 4
LEAST_WIDTH_PX = 480  # of the text, above few or narrow pictures
MOST_ROWS, MOST_COLUMNS, ALONE_COLUMNS = 40, 8, 5  # of a run's sheet; the last where each prompt has one picture
PICTURE_PX, ROW_PX = 224, 1568  # of a run's sheet: a picture's height, and its columns' widths in all

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """One line of the sheet.

    Attributes:
        heading: above it; none where it is empty.
        pictures: of one height.
        captions: one below each.
    """

    heading: str
    pictures: tuple[Image.Image, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class SheetPicture:
    """A picture of a run.

    Attributes:
        path: where it is.
        prompt: that it was drawn from.
        index: which picture of the prompt, from 0.
        variant: how it was drawn, where the same picture was drawn in several ways.
        thumbnail: `thumbnail_of` it, where it was at hand: to read a large picture again takes longer.
    """

    path: Path
    prompt: str
    index: int
    variant: str = ""
    thumbnail: Image.Image | None = None

    def at_height(self, height_px: int) -> Image.Image:
        """The picture, scaled."""
        if self.thumbnail is None:
            return load_picture(self.path, height_px)
        return _scaled(self.thumbnail, height_px)


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and below, but not in dot-folders, and no contact sheets of runs."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.stem != SHEET_NAME)
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def load_picture(path: Path, height_px: int) -> Image.Image:
    """A picture on paper, scaled to a height."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    on_paper = Image.new("RGBA", picture.size, PAPER)
    on_paper.alpha_composite(picture)
    return _scaled(on_paper.convert("RGB"), height_px)


def thumbnail_of(picture: Image.Image) -> Image.Image:
    """An RGB picture as large as a run's sheet shows it at most."""
    return _scaled(picture, PICTURE_PX)


def _scaled(picture: Image.Image, height_px: int) -> Image.Image:
    width_px = max(1, round(picture.width * height_px / picture.height))
    return picture.resize((width_px, height_px), Image.Resampling.LANCZOS)


def load_row(heading: str, folder: Path, height_px: int, most: int) -> Row:
    """The first `most` pictures of a folder, each with the prompt that is noted in it, else with its file's name.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = find_pictures(folder)
    if not paths:
        raise FileNotFoundError(f"there are no pictures in {folder}: give another folder")
    shown = paths[:most]
    captions = (str((read_settings(path) or {}).get("prompt", path.name)) for path in shown)
    hidden = len(paths) - len(shown)
    heading += f" (and {hidden} more)" if hidden else ""
    return Row(heading, tuple(load_picture(path, height_px) for path in shown), tuple(captions))


def rows_of_run(pictures: Sequence[SheetPicture]) -> tuple[list[Row], str]:
    """A run's pictures: a row for each prompt, in which those of one noise stand together; and what is left out.

    Where each prompt has one picture, several prompts share a row.
    """
    by_prompt = [list(group) for _, group in itertools.groupby(pictures, lambda picture: picture.prompt)]
    widest = max(map(len, by_prompt))
    if widest == 1:
        layout = [("", row, [picture.prompt for picture in row]) for row in _split(pictures, ALONE_COLUMNS)]
    else:
        variants = len({picture.variant for picture in pictures})
        columns = max(variants, MOST_COLUMNS // variants * variants)
        rows_of_prompts = ((group[0].prompt, row) for group in by_prompt for row in _split(group, columns))
        is_numbered = any(picture.index for picture in pictures)
        layout = [(prompt, row, [_caption(picture, is_numbered) for picture in row]) for prompt, row in rows_of_prompts]
    height_px = min(PICTURE_PX, ROW_PX // max(len(row) for _, row, _ in layout))
    rows = [
        Row(heading, tuple(picture.at_height(height_px) for picture in row), tuple(captions))
        for heading, row, captions in layout[:MOST_ROWS]
    ]
    hidden = sum(len(row) for _, row, _ in layout[MOST_ROWS:])
    return rows, f"and {counted(hidden, 'more picture')}" if hidden else ""


def _split(pictures: Sequence[SheetPicture], columns: int) -> list[Sequence[SheetPicture]]:
    return [pictures[start : start + columns] for start in range(0, len(pictures), columns)]


def _caption(picture: SheetPicture, is_numbered: bool) -> str:
    if not picture.variant:
        return picture.path.stem
    return f"{picture.index + 1}: {picture.variant}" if is_numbered else picture.variant


def wrap(text: str, font: _Font, width_px: int, most_lines: int = CAPTION_LINES) -> list[str]:
    """The text in lines of at most `width_px`; what so many lines do not hold ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], lines[most_lines - 1] + " …"]
    return lines


@dataclass(frozen=True)
class _LaidOut:
    """A row with its text in lines."""

    row: Row
    heading: list[str]
    captions: list[list[str]]

    @property
    def heading_px(self) -> int:
        return HEADING_LINE_PX * len(self.heading) + 12 if self.heading else 0

    @property
    def height_px(self) -> int:
        return self.heading_px + self.row.pictures[0].height + 10 + LINE_PX * max(map(len, self.captions)) + ROW_GAP_PX


def draw_sheet(title: str, rows: Sequence[Row], subtitle: str = "") -> Image.Image:
    """The whole sheet: title, subtitle, and the rows below each other."""
    title_font, heading_font, font = (ImageFont.load_default(size) for size in (22, 16, 13))
    width = max(sum(picture.width + GAP_PX for picture in row.pictures) for row in rows) - GAP_PX
    width = max(width, LEAST_WIDTH_PX if title or subtitle or any(row.heading for row in rows) else 0)
    laid_out = [
        _LaidOut(
            row,
            wrap(row.heading, heading_font, width) if row.heading else [],
            [wrap(text, font, image.width) for image, text in zip(row.pictures, row.captions, strict=True)],
        )
        for row in rows
    ]
    texts = [(text, title_font, INK, TITLE_LINE_PX) for text in (wrap(title, title_font, width) if title else [])]
    texts += [(text, font, FAINT, LINE_PX) for text in (wrap(subtitle, font, width) if subtitle else [])]
    top = MARGIN_PX + sum(line_px for *_, line_px in texts) + (16 if texts else 0)
    height = top + sum(each.height_px for each in laid_out) - ROW_GAP_PX + MARGIN_PX
    sheet = Image.new("RGB", (width + 2 * MARGIN_PX, height), PAPER)
    draw, y = ImageDraw.Draw(sheet), MARGIN_PX
    for text, its_font, ink, line_px in texts:
        draw.text((MARGIN_PX, y), text, ink, its_font)
        y += line_px
    y = top
    for each in laid_out:
        _draw_row(sheet, each, y, heading_font, font)
        y += each.height_px
    return sheet


def _draw_row(sheet: Image.Image, laid_out: _LaidOut, top: int, heading_font: _Font, font: _Font) -> None:
    draw, x, picture_y = ImageDraw.Draw(sheet), MARGIN_PX, top + laid_out.heading_px
    for number, line in enumerate(laid_out.heading):
        draw.text((MARGIN_PX, top + HEADING_LINE_PX * number), line, INK, heading_font)
    for picture, caption in zip(laid_out.row.pictures, laid_out.captions, strict=True):
        sheet.paste(picture, (x, picture_y))
        draw.rectangle((x, picture_y, x + picture.width - 1, picture_y + picture.height - 1), outline=FRAME)
        for number, line in enumerate(caption):
            draw.text((x, picture_y + picture.height + 10 + LINE_PX * number), line, FAINT, font)
        x += picture.width + GAP_PX


def save_sheet(sheet: Image.Image, folder: Path, kind: PictureFormat) -> Path:
    """Writes a run's sheet in place of the last one, atomically; returns its path."""
    path = folder / f"{SHEET_NAME}.{kind}"
    write_atomically(path, encoded(sheet, kind))
    return path
