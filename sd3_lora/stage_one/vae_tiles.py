"""How large a piece of a picture the VAE takes at a time.

Beside its weights the VAE takes memory in proportion to the pixels that pass through it together: its widest feature
maps have a picture's own resolution. Where a whole picture does not fit, it goes in overlapping tiles, which diffusers
cuts and blends; their borders see less of the picture, so that the numbers differ a little from those of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sd3_lora.common.devices import DTYPES
from sd3_lora.common.memory import GIB
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.tensor_files import TensorFiles
from sd3_lora.gpu.budget import DeviceBudget, too_small

import torch
from diffusers import AutoencoderKL

Task = Literal["encode", "decode"]
# GiB for each 1024² pixels, cuDNN's workspaces included. By task: in float32, in float16 or bfloat16. torch's reserved
# peak less the weights was 2.69, 1.42, 3.69 and 1.81 for a whole picture on an H100, and up to a fifth more a pixel in
# tiles (`benchmarks/stages.py encoders decoders`).
WORKING_GIB = {"encode": (2.9, 1.6), "decode": (4.1, 2.2)}
MEASURED_WIDTH = 128  # channels of the full model's feature maps at a picture's own resolution
# A tile is 3/4 apart from the next: in all, tiles have 16/9 of a picture's pixels. They wait beside it and beside the
# rows that are put together of them.
PICTURES_BESIDE_TILES = 4
# All are multiples of 32, so that 3/4 and 1/4 of each are whole numbers of latents of 8 pixels.
SIDES_PX = (768, 512, 384, 256, 192, 128)


@dataclass(frozen=True)
class VaeTile:
    """What the VAE takes at a time, and the memory that this takes.

    Attributes:
        side_px: of a tile; None for the whole picture.
        batch_size: pictures in one forward.
        weight_bytes: of the VAE.
        working_bytes: of feature maps and workspaces.
    """

    side_px: int | None
    batch_size: int
    weight_bytes: int
    working_bytes: int

    def apply(self, vae: AutoencoderKL) -> None:
        """Has the VAE encode and decode in such tiles; does nothing for the whole picture."""
        if self.side_px is not None:
            vae.enable_tiling()
            vae.tile_sample_min_size = self.side_px
            vae.tile_latent_min_size = self.side_px // 2 ** (len(vae.config.block_out_channels) - 1)

    def predicted_parts(self, budget: DeviceBudget) -> dict[str, int]:
        """The parts of the peak, in bytes."""
        return {"CUDA": budget.context_bytes, "VAE": self.weight_bytes, "working memory": self.working_bytes}

    def describe(self) -> str:
        """In words: "1 picture at a time, in tiles of 512 px"."""
        pictures = "1 picture" if self.batch_size == 1 else f"{self.batch_size} pictures"
        return f"{pictures} at a time, " + ("whole" if self.side_px is None else f"in tiles of {self.side_px} px")


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


def choose_tile(files: ModelFiles, work: VaeWork, budget: DeviceBudget | None) -> VaeTile:
    """The largest piece that fits the budget: whole pictures, a batch of fewer, one, then ever smaller tiles.

    Args:
        files: the model.
        work: what is to be done.
        budget: what may be used of the device; None for no limit.

    Raises:
        UserError: not even the smallest tile fits.
    """
    weights = vae_weight_bytes(files, work.precision)

    def tile(side_px: int | None, batch_size: int) -> VaeTile:
        return VaeTile(side_px, batch_size, weights, working_bytes(files, work, side_px, batch_size))

    batches = range(work.batch_size, 0, -1) if work.may_shrink else [work.batch_size]
    candidates = [tile(None, batch) for batch in batches]
    candidates += [tile(side, batches[-1]) for side in SIDES_PX if side < work.size.longer_side]
    if budget is None:
        return candidates[0]
    for candidate in candidates:
        if weights + candidate.working_bytes <= budget.tensor_bytes:
            return candidate
    least = min(sum(candidate.predicted_parts(budget).values()) for candidate in candidates)
    raise too_small(f"the VAE in {work.precision}", least)


def vae_weight_bytes(files: ModelFiles, precision: str) -> int:
    """Bytes of the VAE's weights on the device, from the shapes in its files' headers."""
    files.component("vae")  # downloaded now, if need be
    with TensorFiles(files.weight_files("vae")) as weights:
        return sum(DTYPES[precision].itemsize * shape.numel() for shape in weights.shapes().values())


def working_bytes(files: ModelFiles, work: VaeWork, side_px: int | None, batch_size: int) -> int:
    """Bytes of a forward beside the weights.

    `WORKING_GIB[task] · (channels / 128) · batch · pixels / 1024²`, where `pixels` are those of a tile or of the whole
    picture, and `channels` those of the VAE's first level, 128 in SD3; in tiles, the pictures themselves beside it,
    `PICTURES_BESIDE_TILES · batch · 3 · height · width` numbers.

    Args:
        files: the model.
        work: what is to be done.
        side_px: of a tile; None for whole pictures.
        batch_size: pictures in one forward.
    """
    dtype, size = DTYPES[work.precision], work.size
    channels = files.read_config("vae")["block_out_channels"][0]
    per_pixel = WORKING_GIB[work.task][0 if dtype == torch.float32 else 1] * GIB / 1024**2 * channels / MEASURED_WIDTH
    if side_px is None:
        return math.ceil(batch_size * per_pixel * size.height * size.width)
    pictures = PICTURES_BESIDE_TILES * 3 * dtype.itemsize * size.pixels
    return math.ceil(batch_size * (per_pixel * min(side_px, size.height) * min(side_px, size.width) + pictures))
