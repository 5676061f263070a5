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


def choose_tile(
    files: ModelFiles,
    task: Task,
    precision: str,
    height: int,
    width: int,
    budget: DeviceBudget | None,
    batch_size: int = 1,
    smaller_batch: bool = False,
) -> VaeTile:
    """The largest piece that fits the budget: whole pictures, a batch of fewer, one, then ever smaller tiles.

    Args:
        files: the model.
        task: encode or decode.
        precision: of the VAE: fp32, fp16 or bf16.
        height: of a picture in pixels.
        width: of a picture in pixels.
        budget: what may be used of the device; None for no limit.
        batch_size: pictures in one forward.
        smaller_batch: whether the batch may be smaller, too.

    Raises:
        UserError: not even the smallest tile fits.
    """
    weights = vae_weight_bytes(files, precision)

    def tile(side_px: int | None, batch: int) -> VaeTile:
        working = working_bytes(files, task, precision, height, width, side_px, batch)
        return VaeTile(side_px, batch, weights, working)

    batches = range(batch_size, 0, -1) if smaller_batch else [batch_size]
    candidates = [tile(None, batch) for batch in batches]
    candidates += [tile(side, batches[-1]) for side in SIDES_PX if side < max(height, width)]
    if budget is None:
        return candidates[0]
    for candidate in candidates:
        if weights + candidate.working_bytes <= budget.tensor_bytes:
            return candidate
    least = min(sum(candidate.predicted_parts(budget).values()) for candidate in candidates)
    raise too_small(f"the VAE in {precision}", least)


def vae_weight_bytes(files: ModelFiles, precision: str) -> int:
    """What the VAE's weights take on the device, from the shapes in its files' headers."""
    files.component("vae")  # downloaded now, if need be
    with TensorFiles(files.weight_files("vae")) as weights:
        return sum(DTYPES[precision].itemsize * shape.numel() for shape in weights.shapes().values())


def working_bytes(
    files: ModelFiles, task: Task, precision: str, height: int, width: int, side_px: int | None, batch_size: int
) -> int:
    """What a forward takes beside the weights.

    `WORKING_GIB[task] · (channels / 128) · batch · pixels / 1024²`, where `pixels` are those of a tile or of the whole
    picture, and `channels` those of the VAE's first level, 128 in SD3; in tiles, the pictures themselves beside it,
    `PICTURES_BESIDE_TILES · batch · 3 · height · width` numbers.
    """
    is_exact = DTYPES[precision] == torch.float32
    channels = files.read_config("vae")["block_out_channels"][0]
    per_pixel = WORKING_GIB[task][0 if is_exact else 1] * GIB / 1024**2 * channels / MEASURED_WIDTH
    if side_px is None:
        return math.ceil(batch_size * per_pixel * height * width)
    pictures = PICTURES_BESIDE_TILES * 3 * DTYPES[precision].itemsize * height * width
    return math.ceil(batch_size * (per_pixel * min(side_px, height) * min(side_px, width) + pictures))
