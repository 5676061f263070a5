"""Draws scenes of the small world, thousands a second on a GPU, as tensors.

Shapes: N scenes, H = W = 128 pixels. Colours are float32 in [0, 1] until the last line, which maps them to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from world import COLOURS, PICTURE_PX, POSITIONS, SIZES, Scenes, WorldObject

MIPS = (56, 80, 112)  # px: the render from which each size is drawn, so that none shrinks by more than a fifth
TURN_DEGREES = 12.0
NUDGE_PX = 3.0
SIZE_JITTER = 0.05


class Renderer:
    """Draws scenes from the objects' renders, which it holds on a device.

    Args:
        objects: all objects of the world; scenes name them by index.
        renders: folder of the npm package's webp files. Without it only held-out objects can be drawn, from the
            renders bundled with the miniature.
        device: where to draw.
    """

    def __init__(self, objects: Sequence[WorldObject], renders: Path | None, device: torch.device | str):
        self.device = torch.device(device)
        self.mips = [torch.zeros(len(objects), 4, side, side) for side in MIPS]
        paths = [renders / f"{thing.render}.webp" if renders else thing.subject_path for thing in objects]
        with ThreadPoolExecutor() as pool:
            for index, pictures in enumerate(pool.map(_read_mips, paths)):
                for mip, picture in zip(self.mips, pictures, strict=False):
                    mip[index] = picture
        self.mips = [mip.half().to(self.device) for mip in self.mips]
        self.colours = torch.tensor(list(COLOURS.values()), device=self.device) / 255
        self.sides = torch.tensor(list(SIZES.values()), device=self.device, dtype=torch.float32)
        self.directions = torch.tensor(list(POSITIONS.values()), device=self.device, dtype=torch.float32)

    def __call__(self, scenes: Scenes) -> torch.Tensor:
        """Pictures `(N, 3, 128, 128)` in [-1, 1]."""
        scenes = scenes.to(self.device)
        picture = self._background(scenes)
        pair = scenes.second >= 0
        picture = self._place(picture, scenes, scenes.object, scenes.geometry[:, 0:4], pair, -1.0)
        if pair.any():
            picture[pair] = self._place(
                picture[pair], scenes[pair], scenes.second[pair], scenes.geometry[pair, 4:8], pair[pair], 1.0
            )
        return picture * 2 - 1

    def _background(self, scenes: Scenes) -> torch.Tensor:
        """The colour, and over it stripes, squares or dots of a lighter or darker shade of it; `(N, 3, H, W)`."""
        random = scenes.geometry[:, :, None, None]
        main = self.colours[scenes.colour] + (scenes.geometry[:, 8:9] - 0.5) * 0.04
        bright = main.mean(1, keepdim=True) > 0.68
        shade = torch.where(bright, main * 0.8, main + (1 - main) * 0.36)
        axis = torch.arange(PICTURE_PX, device=self.device, dtype=torch.float32) - PICTURE_PX / 2 + 0.5
        y, x = axis[None, :, None] - 8 * random[:, 9], axis[None, None, :] - 8 * random[:, 10]  # (N, H, 1), (N, 1, W)
        period = 18 + 8 * random[:, 11]
        # Stripes lean by 0, 45, 90 or 135 degrees.
        lean = (random[:, 9] * 4).floor() * (torch.pi / 4)
        stripes = _band((x * lean.cos() + y * lean.sin()) / period) * period / 2
        across, down = _band(x / (1.6 * period)), _band(y / (1.6 * period))
        squares = torch.sign(across * down) * across.abs().minimum(down.abs()) * 0.8 * period
        column, row = (x / period + 0.5) % 1 - 0.5, (y / period + 0.5) % 1 - 0.5
        dots = (0.27 - (column**2 + row**2).sqrt()) * period
        field = torch.stack([torch.full_like(stripes, -1), stripes, squares, dots], 1)  # (N, 4, H, W): > 0 is shade
        field = field.gather(1, scenes.pattern[:, None, None, None].expand(-1, 1, PICTURE_PX, PICTURE_PX))
        cover = (field + 0.5).clamp(0, 1)  # smooth over a pixel
        return main[:, :, None, None] * (1 - cover) + shade[:, :, None, None] * cover

    def _place(
        self,
        picture: torch.Tensor,
        scenes: Scenes,
        thing: torch.Tensor,
        random: torch.Tensor,
        pair: torch.Tensor,
        side: float,
    ) -> torch.Tensor:
        """Draws an object over `(N, 3, H, W)`; of a pair, on the left (-1) or right (1)."""
        random = random * 2 - 1
        extent = self.sides[scenes.size] * (1 + SIZE_JITTER * random[:, 0])
        direction = torch.where(pair[:, None], torch.tensor([side, 0.0], device=self.device), 0.0)
        direction = torch.where(pair[:, None], direction, self.directions[scenes.position])
        reach = (PICTURE_PX - self.sides[scenes.size]) / 2 - 2
        reach = torch.where(pair, 30.0, reach)
        centre = direction * reach[:, None] + NUDGE_PX * random[:, 1:3]
        angle = random[:, 3] * (TURN_DEGREES * torch.pi / 180)
        cos, sin = angle.cos() * PICTURE_PX / extent, angle.sin() * PICTURE_PX / extent
        offset = centre * 2 / PICTURE_PX
        transform = torch.stack(
            [
                torch.stack([cos, sin, -cos * offset[:, 0] - sin * offset[:, 1]], 1),
                torch.stack([-sin, cos, sin * offset[:, 0] - cos * offset[:, 1]], 1),
            ],
            1,
        )  # (N, 2, 3)
        grid = functional.affine_grid(transform, [len(scenes), 4, PICTURE_PX, PICTURE_PX], align_corners=False)
        drawn = torch.zeros(len(scenes), 4, PICTURE_PX, PICTURE_PX, device=self.device)
        for index, mip in enumerate(self.mips):
            rows = (scenes.size == index).nonzero()[:, 0]
            if len(rows):
                drawn[rows] = functional.grid_sample(mip[thing[rows]].float(), grid[rows], align_corners=False)
        return picture * (1 - drawn[:, 3:]) + drawn[:, :3]


def _read_mips(path: Path) -> list[torch.Tensor]:
    """The render in each of the sizes `MIPS`; none where there is no file."""
    if not path.is_file():
        return []
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    return [_premultiplied(picture, side) for side in MIPS]


def _premultiplied(picture: Image.Image, side: int) -> torch.Tensor:
    """The render `(4, side, side)` in [0, 1], its colours multiplied by its alpha; a tall one is made square."""
    square = Image.new("RGBA", (max(picture.size), max(picture.size)))
    square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
    pixels = np.asarray(square, dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    # A channel at a time: Pillow resizes floats only one by one.
    channels = [
        np.asarray(Image.fromarray(pixels[..., i]).resize((side, side), Image.Resampling.LANCZOS)) for i in range(4)
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 1)


def _band(phase: torch.Tensor) -> torch.Tensor:
    """A triangle wave of period 1 in [-0.5, 0.5], positive in the first half of each period."""
    return 0.5 - 2 * ((phase % 1) - 0.25).abs().minimum(1 - ((phase % 1) - 0.25).abs())
