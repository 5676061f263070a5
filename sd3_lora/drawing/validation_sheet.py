"""One picture of a whole run: a row for each step at which pictures were drawn, a column for each prompt."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import write_atomically
from sd3_lora.drawing.contact_sheet import FAINT, FRAME, INK, LINE_PX, MARGIN_PX, PAPER, wrap
from sd3_lora.drawing.picture_metadata import encoded, read_settings

from PIL import Image, ImageDraw, ImageFont

GAP_PX, HEADER_GAP_PX, LABEL_GAP_PX = 12, 14, 20
PROMPT_LINES = 5
LARGEST_CELL_PX, SMALLEST_CELL_PX = 256, 128  # of a picture's longer side
USUAL_WIDTH_PX = 2400  # cells shrink rather than exceed it, down to the smallest
MOST_PX = 16383  # of a WebP's side
_STEP_FOLDER = re.compile(r"step_(\d+)$")

Column = tuple[str, int]  # a prompt and the index of one of its pictures


@dataclass(frozen=True)
class SheetRow:
    """The pictures of a step, by column."""

    step: int
    pictures: dict[Column, Image.Image]


class ValidationSheet:
    """`sheet.webp` in a folder of `step_NNNNNN` folders, made of the pictures in these.

    So a resumed run goes on with the sheet that it left.

    Args:
        folder: that holds the steps' folders.
        goes_on: whether the run was resumed; a new one shows no rows but its own.
    """

    def __init__(self, folder: Path, goes_on: bool = False):
        self.folder, self.path = folder, folder / "sheet.webp"
        self._goes_on, self._drawn = goes_on, set[int]()
        self._small: dict[tuple[Path, int], tuple[Column, Image.Image]] = {}  # by path and time of writing

    def write(self, step: int) -> None:
        """Makes the sheet anew, atomically, with the rows up to this step.

        Later ones are of a run that was resumed from an earlier checkpoint, which will draw them again.
        """
        self._drawn.add(step)
        rows = [row for row in self._read_rows() if row.step in self._drawn or (self._goes_on and row.step < step)]
        if not rows:
            return
        write_atomically(self.path, encoded(draw_sheet(rows), "webp"))

    def _read_rows(self) -> list[SheetRow]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        folders = {int(match[1]): path for path in paths if (match := _STEP_FOLDER.match(path.name))}
        rows = []
        for step, folder in sorted(folders.items()):
            pictures = dict(each for path in sorted(folder.glob("*.png")) if (each := self._read(path)))
            if pictures:
                rows.append(SheetRow(step, pictures))
        return rows

    def _read(self, path: Path) -> tuple[Column, Image.Image] | None:
        """A picture of this project, no larger than the sheet shows it; None for any other file."""
        key = path, path.stat().st_mtime_ns
        if key not in self._small:
            noted = read_settings(path)
            if noted is None or not {"prompt", "image_index"} <= noted.keys():
                return None
            column = str(noted["prompt"]), int(noted["image_index"])
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            picture.thumbnail((LARGEST_CELL_PX, LARGEST_CELL_PX), Image.Resampling.LANCZOS)
            self._small[key] = column, picture
        return self._small[key]


def draw_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """The whole sheet: the prompts of the last row first, from left to right.

    Where a WebP has no room for all rows, the first and the last stay, and as many of the others, evenly spread.

    Args:
        rows: at least one, by step.
    """
    columns = _columns(rows)
    cell = _cell_size(rows, len(columns))
    label_font, prompt_font = ImageFont.load_default(15), ImageFont.load_default(13)
    labels = [(f"step {row.step}", "" if row.step else "at the start") for row in rows]
    label_px = max(round(label_font.getlength(text)) for label in labels for text in label) + LABEL_GAP_PX
    left = MARGIN_PX + label_px
    xs = _places(columns, left, cell[0])
    groups = [(prompt, count, xs[start]) for prompt, start, count in _groups(columns)]
    texts = [
        wrap(prompt or "(empty)", prompt_font, count * (cell[0] + GAP_PX) - GAP_PX, PROMPT_LINES)
        for prompt, count, _ in groups
    ]
    most_lines = max(map(len, texts))
    top = MARGIN_PX + LINE_PX * most_lines + HEADER_GAP_PX
    most = max(2, (MOST_PX - top - MARGIN_PX + GAP_PX) // (cell[1] + GAP_PX))
    shown = _spread(len(rows), most)
    height = top + len(shown) * (cell[1] + GAP_PX) - GAP_PX + MARGIN_PX
    sheet = Image.new("RGB", (min(xs[-1] + cell[0] + MARGIN_PX, MOST_PX), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for (_, _, x), lines in zip(groups, texts, strict=True):
        for number, line in enumerate(lines, most_lines - len(lines)):
            draw.text((x, MARGIN_PX + LINE_PX * number), line, FAINT, prompt_font)
    for place, number in enumerate(shown):
        y = top + place * (cell[1] + GAP_PX)
        right, middle = left - LABEL_GAP_PX, y + cell[1] // 2
        draw.text((right, middle), labels[number][0], INK, label_font, anchor="rm")
        draw.text((right, middle + LINE_PX), labels[number][1], FAINT, prompt_font, anchor="rm")
        for x, column in zip(xs, columns, strict=True):
            _draw_cell(sheet, draw, rows[number].pictures.get(column), (x, y), cell)
    return sheet


def _draw_cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Image.Image | None,
    corner: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    """A picture in its frame, in the middle of its place; a word where there is none."""
    x, y = corner
    if picture is None:
        draw.text((x + cell[0] // 2, y + cell[1] // 2), "not drawn", FAINT, ImageFont.load_default(13), anchor="mm")
        return
    scale = min(cell[0] / picture.width, cell[1] / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    x, y = x + (cell[0] - size[0]) // 2, y + (cell[1] - size[1]) // 2
    sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, y))
    draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline=FRAME)


def _cell_size(rows: Sequence[SheetRow], columns: int) -> tuple[int, int]:
    """Width and height of a picture's place: of the shape of the last row's first picture."""
    first = next(iter(rows[-1].pictures.values()))
    room = (USUAL_WIDTH_PX - 2 * MARGIN_PX) // columns - GAP_PX
    longer = max(SMALLEST_CELL_PX, min(LARGEST_CELL_PX, room, max(SMALLEST_CELL_PX + 48, *first.size)))
    scale = longer / max(first.size)
    return round(first.width * scale), round(first.height * scale)


def _columns(rows: Sequence[SheetRow]) -> list[Column]:
    """Those of the last row first; the pictures of one prompt side by side."""
    columns = {column: None for row in reversed(rows) for column in row.pictures}
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in columns))}
    return sorted(columns, key=lambda column: (prompts[column[0]], column[1]))


def _groups(columns: Sequence[Column]) -> list[tuple[str, int, int]]:
    """Each prompt with its first column and the number of its columns."""
    counts = Counter(prompt for prompt, _ in columns)
    starts = itertools.accumulate(counts.values(), initial=0)
    return [(prompt, start, count) for (prompt, count), start in zip(counts.items(), starts, strict=False)]


def _places(columns: Sequence[Column], left: int, width: int) -> list[int]:
    """Where each column begins; where a prompt has several pictures, prompts stand further apart."""
    is_apart = len({prompt for prompt, _ in columns}) < len(columns)
    xs = [left]
    for before, column in itertools.pairwise(columns):
        apart = GAP_PX if is_apart and before[0] != column[0] else 0
        xs.append(xs[-1] + width + GAP_PX + apart)
    return xs


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the places from 0 to count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
