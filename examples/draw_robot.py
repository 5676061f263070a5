"""Draws the example pictures of one subject: a robot on five backgrounds, in five places.

    python examples/draw_robot.py --render 1f916.webp

`README.md` says where the render comes from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SMOOTHING = 4  # shapes are drawn this many times larger and shrunk, so that their edges are smooth


def plain(size_px: tuple[int, int], colour: str, _other: str) -> Image.Image:
    """One colour."""
    return Image.new("RGB", size_px, colour)


def stripes(size_px: tuple[int, int], colour: str, other: str) -> Image.Image:
    """Slanted stripes."""
    large, draw = _large_canvas(size_px, colour)
    band, (width, height) = 28 * SMOOTHING, large.size
    for left in range(-height, width, 2 * band):
        draw.polygon([(left, height), (left + band, height), (left + band + height, 0), (left + height, 0)], fill=other)
    return large.resize(size_px, Image.Resampling.LANCZOS)


def checks(size_px: tuple[int, int], colour: str, other: str) -> Image.Image:
    """A chessboard."""
    board, draw = _large_canvas(size_px, colour)
    side, (width, height) = 32 * SMOOTHING, board.size
    for row in range(-(-height // side)):
        for column in range(row % 2, -(-width // side), 2):
            draw.rectangle(
                (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1),
                fill=other,
            )
    return board.resize(size_px, Image.Resampling.LANCZOS)


def dots(size_px: tuple[int, int], colour: str, other: str) -> Image.Image:
    """Dots, every second row shifted by half a step."""
    large, draw = _large_canvas(size_px, colour)
    step, radius = 32 * SMOOTHING, 7 * SMOOTHING
    for row in range(large.height // step + 2):
        for column in range(-1, large.width // step + 2):
            x, y = column * step + row % 2 * step // 2, row * step
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=other)
    return large.resize(size_px, Image.Resampling.LANCZOS)


def _large_canvas(size_px: tuple[int, int], colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    large = Image.new("RGB", (size_px[0] * SMOOTHING, size_px[1] * SMOOTHING), colour)
    return large, ImageDraw.Draw(large)


@dataclass(frozen=True)
class Scene:
    """One picture.

    Attributes:
        file_name: its ending decides the format.
        size_px: width, height.
        background: draws it from a size and two colours.
        colours: of the background.
        robot_px: side of the render, which has a transparent margin of a sixteenth.
        centre: of the robot, in fractions of width and height.
        angle: in degrees, counter-clockwise.
    """

    file_name: str
    size_px: tuple[int, int]
    background: Callable[[tuple[int, int], str, str], Image.Image]
    colours: tuple[str, str]
    robot_px: int
    centre: tuple[float, float]
    angle: float


# The miniature's colours, and a lighter shade of each for the patterns.
SCENES = (
    Scene("01.png", (256, 256), plain, ("#fcdc4c", "#fcdc4c"), 208, (0.50, 0.50), 0),
    Scene("02.jpg", (256, 256), stripes, ("#3064cc", "#7a9cde"), 184, (0.46, 0.62), 9),
    Scene("03.jpg", (256, 256), checks, ("#3e9e46", "#83c189"), 168, (0.66, 0.55), -12),
    Scene("04.png", (256, 256), dots, ("#7c46aa", "#ab89c9"), 144, (0.30, 0.50), -6),
    Scene("05.jpg", (256, 256), plain, ("#f898c0", "#f898c0"), 192, (0.56, 0.40), 11),
)


def draw_scene(scene: Scene, render: Image.Image) -> Image.Image:
    """The robot on its background.

    Args:
        scene: what to draw.
        render: the robot, RGBA, square.
    """
    picture = scene.background(scene.size_px, *scene.colours).convert("RGBA")
    # Turned before it is shrunk: the shrinking smooths the edges.
    robot = render.rotate(scene.angle, Image.Resampling.BICUBIC, expand=True)
    side = round(scene.robot_px * robot.width / render.width)
    robot = robot.resize((side, side), Image.Resampling.LANCZOS)
    left, top = (round(f * s - side / 2) for f, s in zip(scene.centre, scene.size_px, strict=True))

    layer = Image.new("RGBA", scene.size_px)
    layer.paste(robot, (left, top))
    picture.alpha_composite(layer)
    return picture.convert("RGB")


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the five pictures."""
    parser = argparse.ArgumentParser(description="Draw the example pictures of the robot.", allow_abbrev=False)
    parser.add_argument("--render", type=Path, required=True, help="The robot: assets/1f916.webp of the npm package.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).resolve().parent / "robot", help="Where to write them."
    )
    flags = parser.parse_args(argv)
    try:
        render = Image.open(flags.render).convert("RGBA")
    except OSError as error:
        print(f"error: cannot read {flags.render} as a picture ({error}): see examples/README.md", file=sys.stderr)
        return 2
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    for scene in SCENES:
        path = flags.output_dir / scene.file_name
        draw_scene(scene, render).save(path, **({"quality": 92} if path.suffix == ".jpg" else {"optimize": True}))
    print(f"{len(SCENES)} pictures in {flags.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
