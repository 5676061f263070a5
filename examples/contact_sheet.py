"""One PNG that shows folders of pictures at a glance: a row for each folder, a caption under each picture.

    python examples/contact_sheet.py --row "Photos" dog --row "Drawn" images --output_path contact_sheet.png

A picture's caption is the prompt that inference.py wrote into it, else its file name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
PAPER, INK, FAINT, FRAME = "#ffffff", "#202124", "#5f6368", "#dadce0"
MARGIN_PX, GAP_PX, ROW_GAP_PX, LINE_PX = 28, 16, 28, 18
CAPTION_LINES = 4


@dataclass(frozen=True)
class Row:
    """One line of the sheet."""

    heading: str
    pictures: tuple[Image.Image, ...]
    captions: tuple[str, ...]


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and below, but not in dot-folders."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def load_row(heading: str, folder: Path, height_px: int, most: int) -> Row:
    """The first `most` pictures of a folder, scaled to one height.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = find_pictures(folder)
    if not paths:
        raise FileNotFoundError(f"there are no pictures in {folder}: give another folder")
    pictures, captions = [], []
    for path in paths[:most]:
        with Image.open(path) as opened:
            captions.append(str(opened.info.get("prompt", path.name)))
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
        width_px = round(picture.width * height_px / picture.height)
        on_paper = Image.new("RGBA", picture.size, PAPER)
        on_paper.alpha_composite(picture)
        pictures.append(on_paper.convert("RGB").resize((width_px, height_px), Image.Resampling.LANCZOS))
    hidden = len(paths) - len(pictures)
    return Row(heading + (f" (and {hidden} more)" if hidden else ""), tuple(pictures), tuple(captions))


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """The text in lines of at most `width_px`; what `CAPTION_LINES` do not hold ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1] + " …"]
    return lines


def draw_sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """The whole sheet."""
    title_font, heading_font, font = (ImageFont.load_default(size) for size in (22, 16, 13))
    captions = [
        [wrap(text, font, picture.width) for picture, text in zip(row.pictures, row.captions, strict=True)]
        for row in rows
    ]
    heights = [
        34 + row.pictures[0].height + 10 + LINE_PX * max(map(len, lines)) + ROW_GAP_PX
        for row, lines in zip(rows, captions, strict=True)
    ]
    width = max(sum(picture.width + GAP_PX for picture in row.pictures) for row in rows) - GAP_PX
    width = max(
        width, *(round(heading_font.getlength(row.heading)) for row in rows), round(title_font.getlength(title))
    )
    top = MARGIN_PX + (44 if title else 0)
    sheet = Image.new("RGB", (width + 2 * MARGIN_PX, top + sum(heights) + MARGIN_PX - ROW_GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, MARGIN_PX), title, INK, title_font)
    y = top
    for row, lines, height in zip(rows, captions, heights, strict=True):
        draw.text((MARGIN_PX, y), row.heading, INK, heading_font)
        x, picture_y = MARGIN_PX, y + 34
        for picture, caption in zip(row.pictures, lines, strict=True):
            sheet.paste(picture, (x, picture_y))
            draw.rectangle((x, picture_y, x + picture.width - 1, picture_y + picture.height - 1), outline=FRAME)
            for number, line in enumerate(caption):
                draw.text((x, picture_y + picture.height + 10 + LINE_PX * number), line, FAINT, font)
            x += picture.width + GAP_PX
        y += height
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--row",
        nargs=2,
        action="append",
        required=True,
        metavar=("HEADING", "FOLDER"),
        help="One line of the sheet; may be repeated.",
    )
    parser.add_argument("--title", default="", help="Above all rows.")
    parser.add_argument("--picture_height", type=int, default=176, help="Of each picture, in pixels.")
    parser.add_argument("--most", type=int, default=6, help="Pictures in a row.")
    parser.add_argument("--output_path", default="contact_sheet.png", help="The PNG to write.")
    flags = parser.parse_args(argv)
    try:
        rows = [load_row(heading, Path(folder), flags.picture_height, flags.most) for heading, folder in flags.row]
        draw_sheet(flags.title, rows).save(flags.output_path)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {flags.output_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
