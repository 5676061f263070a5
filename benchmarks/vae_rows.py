"""The rows of the stages benchmark that show the VAE alone, and what they share with the others."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from precompute_latents import LatentConfig, decode
from sd3_lora.common.memory import GIB, free_memory
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.crop_boxes import to_pixels
from sd3_lora.stage_one.vae_norms import spread_group_norms
from sd3_lora.stage_one.vae_tiles import VaeTile

import torch
from diffusers import AutoencoderKL
from photos import fabricate_photos

Pair = tuple[torch.Tensor, torch.Tensor]  # a mean and a standard deviation, or an embedding and a pooled one
Row = dict[str, Any]


def timed(device: torch.device, work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `work` gives, and the seconds until the device is done."""
    start = time.perf_counter()
    result = work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def distance(found: Sequence[Pair], expected: Sequence[Pair], names: tuple[str, str]) -> Row:
    """How far results are from each other: the furthest number, and the norm of the difference over the norm."""
    numbers: Row = {}
    for index, name in enumerate(names):
        mine, theirs = (torch.cat([pair[index].float().flatten() for pair in pairs]) for pairs in (found, expected))
        numbers[f"{name}_max"] = float(f"{(mine - theirs).abs().max():.3g}")
        numbers[f"{name}_relative"] = float(f"{(mine - theirs).norm() / theirs.norm():.3g}")
    return numbers


SPREAD = "norms spread"

ENCODERS = (  # dtype, channels last, batch, and what else; the first is the reference's
    (torch.float32, False, 1, ""),
    (torch.float32, True, 1, ""),
    (torch.float32, False, 1, SPREAD),
    (torch.float32, True, 1, SPREAD),
    (torch.float16, False, 1, ""),
    (torch.float16, True, 1, ""),
    (torch.float16, False, 1, SPREAD),
    (torch.float16, True, 1, SPREAD),
    (torch.float16, True, 4, SPREAD),
    (torch.bfloat16, True, 1, SPREAD),
    (torch.float16, True, 1, "compiled"),
)
DECODERS = (  # dtype, channels last, whether in tiles, and what else
    (torch.float32, False, False, ""),
    (torch.float32, True, False, ""),
    (torch.float32, True, False, SPREAD),
    (torch.float32, True, True, SPREAD),
    (torch.float16, False, False, ""),
    (torch.float16, True, False, SPREAD),
    (torch.float16, True, True, SPREAD),
)
ROUNDS = 5


def load_vae(arguments: argparse.Namespace, dtype: torch.dtype) -> AutoencoderKL:
    """The model's VAE on the device."""
    vae = AutoencoderKL.from_pretrained(arguments.model, subfolder="vae", torch_dtype=dtype)
    return vae.to(arguments.device)


@torch.no_grad()
def posteriors(vae: AutoencoderKL, pixels: torch.Tensor, batch: int) -> list[Pair]:
    """Of each picture the mean and the standard deviation, on the device."""
    pairs: list[Pair] = []
    for piece in pixels.split(batch):
        posterior = vae.encode(piece.to(vae.dtype)).latent_dist
        pairs += zip(posterior.mean, posterior.std, strict=True)
    return pairs


def repeated(
    device: torch.device, vae: AutoencoderKL, items: int, work: Callable[..., Any], *arguments: Any
) -> tuple[Any, Row]:
    """What some work of a VAE gives; how long it takes for each item, at first and then, and its memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found, first_s = timed(device, work, *arguments)
    seconds = statistics.median(timed(device, work, *arguments)[1] for _ in range(ROUNDS))
    row: Row = {"dtype": str(vae.dtype).removeprefix("torch."), "first_s": round(first_s, 2)}
    row |= {"ms_an_item": round(1000 * seconds / items, 2)}
    if device.type == "cuda":
        held_gib = sum(weight.nbytes for weight in vae.parameters()) / GIB
        row["beside_weights_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB - held_gib, 2)
    return found, row


def encoder_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds a picture in each setting, and how far its posteriors are from exact float32's, one at a time."""
    device = arguments.device
    photos = fabricate_photos(arguments.output_dir / "photos", 4, arguments.sizes[0])
    config = LatentConfig(center_crop=True)
    rgb = [
        decode(InstanceImage("", path, ""), config, Buckets.square(arguments.resolution), ())[0].rgb for path in photos
    ]
    pixels = to_pixels(torch.stack(rgb)).to(device)  # (4, 3, R, R)
    torch.backends.cudnn.allow_tf32 = False
    exact = posteriors(load_vae(arguments, torch.float32), pixels.contiguous(), 1)
    torch.backends.cudnn.allow_tf32 = True  # torch's default, for convolutions
    for dtype, channels_last, batch, extra in ENCODERS:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        vae = load_vae(arguments, dtype).to(memory_format=layout)
        laid_out = pixels.contiguous(memory_format=layout)
        if extra == SPREAD:
            spread_group_norms(vae)
        if extra == "compiled":
            vae.encoder = torch.compile(vae.encoder)
        found, row = repeated(device, vae, len(photos), posteriors, vae, laid_out, batch)
        row |= {"set": "encoders", "channels_last": channels_last, "batch": batch, "extra": extra}
        yield row | distance(found, exact, ("mean", "std"))
        del vae, found
        free_memory(device)


@torch.no_grad()
def decoder_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """The VAE's decoder alone: milliseconds a picture, and its memory, in each dtype and layout, whole and in tiles."""
    device, side = arguments.device, arguments.resolution
    for dtype, channels_last, tiled, extra in DECODERS:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        tile_px = side // 2 if tiled else None
        vae = load_vae(arguments, dtype).to(memory_format=layout)
        VaeTile(tile_px, 1, 0, 0).apply(vae)
        if extra == SPREAD:
            spread_group_norms(vae)
        latents = torch.randn(1, vae.config.latent_channels, side // 8, side // 8, device=device, dtype=dtype)
        _, row = repeated(device, vae, 1, vae.decode, latents)
        row |= {"set": "decoders", "channels_last": channels_last, "tile_px": tile_px, "extra": extra}
        yield row
        del vae
        free_memory(device)
