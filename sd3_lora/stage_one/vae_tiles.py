"""How much of a picture the VAE encodes or decodes at a time.

Beside its weights the VAE needs memory in proportion to the pixels of one forward: its widest feature maps have the
picture's own resolution. A picture that does not fit whole is cut into overlapping tiles, which diffusers blends. A
tile's border sees less of the picture, so the numbers differ a little from those of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sd3_lora.common.command_line import UserError, counted
from sd3_lora.common.devices import DTYPES
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.gpu.budget import DeviceBudget, too_small

import torch
from diffusers import AutoencoderKL

Task = Literal["encode", "decode"]
AskedTile = int | Literal["auto", "whole"]
# GiB for each 1024² pixels, cuDNN's workspaces included. By task: in float32, in float16 or bfloat16. torch's reserved
# peak less the weights was 2.69, 1.42, 3.69 and 1.81 for a whole picture on an H100, 3.56 to 3.69 for decoding on an
# H200, and up to a fifth more a pixel in tiles (`benchmarks/stages.py encoders decoders`).
WHOLE_WORKING_GIB = {"encode": (2.8, 1.5), "decode": (3.8, 1.9)}
TILE_WORKING_GIB = {"encode": (2.9, 1.6), "decode": (4.1, 2.2)}
MEASURED_WIDTH = 128  # channels of the full model's feature maps at a picture's own resolution
# Neighbouring tiles begin 3/4 of a side apart, so all tiles together have 16/9 of a picture's pixels. They stay on the
# device beside the picture and beside the rows that they are joined to.
PICTURES_BESIDE_TILES = 4
# Multiples of four latents of SD3's VAE, so that 3/4 and 1/4 of a side are whole numbers of latents.
SIDES_PX = (768, 512, 384, 256, 192, 128)


@dataclass(frozen=True)
class VaeTile:
    """What the VAE computes in one forward, and the memory for it.

    Attributes:
        side_px: of a tile, in pixels; None for the whole picture.
        batch_size: pictures in one forward.
        weight_bytes: of the VAE's weights.
        working_bytes: of feature maps and workspaces.
    """

    side_px: int | None
    batch_size: int
    weight_bytes: int
    working_bytes: int

    def apply(self, vae: AutoencoderKL) -> None:
        """Sets the VAE to encode and decode in such tiles; does nothing for the whole picture."""
        if self.side_px is not None:
            vae.enable_tiling()
            vae.tile_sample_min_size = self.side_px
            vae.tile_latent_min_size = self.side_px // 2 ** (len(vae.config.block_out_channels) - 1)

    def predicted_parts(self, budget: DeviceBudget) -> dict[str, int]:
        """Bytes of each part of the predicted peak."""
        return {"CUDA": budget.context_bytes, "VAE": self.weight_bytes, "working memory": self.working_bytes}

    def describe(self) -> str:
        """In words: "1 picture at a time, in tiles of 512 px"."""
        return f"{counted(self.batch_size, 'picture')} at a time, " + (
            "whole" if self.side_px is None else f"in tiles of {self.side_px} px"
        )


@dataclass(frozen=True)
class VaeWork:
    """What the VAE is to do.

    Attributes:
        task: encode or decode.
        precision: of the VAE: fp32, fp16 or bf16.
        size: of each picture.
        batch_size: pictures in one forward.
        may_shrink: whether the batch may be smaller.
    """

    task: Task
    precision: str
    size: PictureSize
    batch_size: int = 1
    may_shrink: bool = False


def read_asked_tile(flag: str, size: PictureSize, vae_scale: int) -> AskedTile:
    """What `--vae_tile` asks for; a tile as large as the picture is the whole picture.

    Args:
        flag: auto, whole, or the side of a tile in pixels.
        size: of a picture.
        vae_scale: pixels per latent.

    Raises:
        UserError: none of these, or a side of which a quarter is no whole number of latents.
    """
    if flag in ("auto", "whole"):
        return flag  # type: ignore[return-value]
    step = 4 * vae_scale  # a tile shares a quarter of itself with the next
    side_px = int(flag) if flag.isdecimal() else 0
    if side_px < step or side_px % step:
        typed = max(step, side_px // step * step) if flag.isdecimal() else "auto"
        raise UserError(f"--vae_tile {flag} is not auto, whole or a multiple of {step} pixels: type --vae_tile {typed}")
    return side_px if side_px < size.longer_side else "whole"


def choose_tile(files: ModelFiles, work: VaeWork, budget: DeviceBudget | None, asked: AskedTile = "auto") -> VaeTile:
    """The largest piece that fits the budget: whole pictures, a batch of fewer, one, then ever smaller tiles.

    Args:
        files: the model.
        work: what is to be done.
        budget: what may be used of the device; None for no limit.
        asked: the only tile to be considered; auto for all.

    Raises:
        UserError: what was asked for does not fit, or not even the smallest tile.
    """
    tiles = _candidates(files, work, asked)
    if budget is None:
        return tiles[0]
    tile = _first_fitting(tiles, budget)
    if tile is not None:
        return tile
    least = min(sum(tile.predicted_parts(budget).values()) for tile in tiles)
    if asked == "auto":
        raise too_small(f"the VAE in {work.precision}", least)
    error = too_small(f"--vae_tile {asked}: the VAE in {work.precision}", least)
    smaller = _first_fitting(_candidates(files, work, "auto"), budget)
    raise UserError(f"{error}, or --vae_tile {smaller.side_px or 'whole'}") if smaller else error


def smallest_tile(files: ModelFiles, work: VaeWork) -> VaeTile:
    """The piece that takes the least memory."""
    return min(_candidates(files, work, "auto"), key=lambda tile: tile.working_bytes)


def _candidates(files: ModelFiles, work: VaeWork, asked: AskedTile) -> list[VaeTile]:
    """The tiles to be considered, the largest first."""
    batch_sizes = range(work.batch_size, 0, -1) if work.may_shrink else [work.batch_size]
    if asked == "auto":
        pieces: list[tuple[int | None, int]] = [(None, batch_size) for batch_size in batch_sizes]
        pieces += [(side_px, batch_sizes[-1]) for side_px in SIDES_PX if side_px < work.size.longer_side]
    else:
        pieces = [(None if asked == "whole" else asked, batch_size) for batch_size in batch_sizes]
    weights = vae_weight_bytes(files, work.precision)
    return [VaeTile(*piece, weights, working_bytes(files, work, *piece)) for piece in pieces]


def _first_fitting(tiles: Sequence[VaeTile], budget: DeviceBudget) -> VaeTile | None:
    return next((tile for tile in tiles if tile.weight_bytes + tile.working_bytes <= budget.tensor_bytes), None)


def vae_weight_bytes(files: ModelFiles, precision: str) -> int:
    """Bytes of the VAE's weights on the device, from the shapes in its files' headers."""
    return sum(DTYPES[precision].itemsize * shape.numel() for shape in files.tensor_shapes("vae").values())


def working_bytes(files: ModelFiles, work: VaeWork, side_px: int | None, batch_size: int) -> int:
    """Bytes of a forward beside the weights.

    `GIB[task] · (channels / 128) · batch · pixels / 1024²`, with a table for tiles and one for whole pictures, whose
    pixels `pixels` are, and `channels` those of the VAE's first level, 128 in SD3; in tiles, the pictures themselves
    beside it, `PICTURES_BESIDE_TILES · batch · 3 · height · width` numbers.

    Args:
        files: the model.
        work: what is to be done.
        side_px: of a tile; None for whole pictures.
        batch_size: pictures in one forward.
    """
    dtype, size = DTYPES[work.precision], work.size
    channels = files.read_config("vae")["block_out_channels"][0]
    table = WHOLE_WORKING_GIB if side_px is None else TILE_WORKING_GIB
    per_pixel = table[work.task][0 if dtype == torch.float32 else 1] * GIB / 1024**2 * channels / MEASURED_WIDTH
    if side_px is None:
        return math.ceil(batch_size * per_pixel * size.height * size.width)
    pictures = PICTURES_BESIDE_TILES * 3 * dtype.itemsize * size.pixels
    return math.ceil(batch_size * (per_pixel * min(side_px, size.height) * min(side_px, size.width) + pictures))
