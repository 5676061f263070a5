"""Stage one, pictures: images → latents/.

Encodes every crop of every picture once with the VAE and keeps the posterior (its mean and standard deviation, not
one sample of it), so that training draws a fresh sample at every step without ever loading the VAE.

    python precompute_latents.py --instance_data_dir dog --resolution 1024
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sd3_lora.budget import BudgetConfig, compared, open_budget, sentence
from sd3_lora.captions import instance_images
from sd3_lora.command_line import UserError, command, exit_code, parse_flags, require_writable_folder, save_run
from sd3_lora.defaults import LATENTS_PATH, default_subject, say_miniature
from sd3_lora.devices import DTYPES, DeviceConfig, choose_device
from sd3_lora.images import BrokenImage, CropBox, crop_boxes, crop_pixels, open_rgb
from sd3_lora.latent_cache import LatentCache, StaleLatents, recorded_precision
from sd3_lora.memory import StageReport, memory_stage
from sd3_lora.model_files import ModelConfig, ModelFiles
from sd3_lora.records import InstanceImage, LatentPosterior
from sd3_lora.vae_tiles import VaeTile, choose_tile

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

DECODING_THREADS = 2


@dataclass(frozen=True)
class LatentConfig:
    """Which pictures, which crops of them, and where to write."""

    instance_data_dir: str | None = field(
        default=None,
        metadata={
            "aliases": ["--local_data_dir"],
            "help": "Folder of pictures. Default: the folder dog, or examples/robot.",
        },
    )
    instance_prompt: str | None = field(
        default=None, metadata={"help": "Only to check that identical pictures have the same caption."}
    )
    recursive: bool = field(default=False, metadata={"help": "Read pictures in subfolders too."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave out pictures that do not decode."})
    alpha_background: Literal["white", "mean"] = field(
        default="white", metadata={"help": "What shows through transparent pixels: white or the mean colour."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the square crops in pixels. Default: the model's own."}
    )
    center_crop: bool = field(default=False, metadata={"help": "One crop, from the centre: the same as --num_crops 1."})
    num_crops: int = field(
        default=3,
        metadata={"help": "Crops of a picture that is not square, evenly spread along its longer side."},
    )
    random_flip: bool = field(default=False, metadata={"help": "Cache the mirrored twin of each crop too."})
    vae_precision: Literal["fp32", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "Of the VAE and of the stored posteriors. Default: that of an existing cache, else fp32."},
    )
    vae_batch_size: int | None = field(
        default=None,
        metadata={"help": "Crops in one forward of the VAE. Default: as many as make one of 1024 pixels, and fit."},
    )
    output_path: str = field(default=LATENTS_PATH, metadata={"help": "The folder to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace files that were made with other settings."})

    def __post_init__(self) -> None:
        if self.num_crops < 1 or (self.vae_batch_size is not None and self.vae_batch_size < 1):
            raise ValueError("--num_crops and --vae_batch_size must be at least 1")

    def batch_size(self, resolution: int) -> int:
        """Crops in one forward, at the most: by default what takes as much as one of 1024 px, and no more than 16."""
        return self.vae_batch_size or max(1, min(16, (1024 // resolution) ** 2))

    @property
    def crops(self) -> int:
        """How many crops of a picture that is not square."""
        return 1 if self.center_crop else self.num_crops


@dataclass(frozen=True)
class Crop:
    """One crop of one picture, decoded: `pixels` is `(3, H, W)` float32 in [-1, 1]."""

    image: InstanceImage
    picture_size: tuple[int, int]
    box: CropBox
    pixels: torch.Tensor


def decode(image: InstanceImage, config: LatentConfig, resolution: int, cached: Sequence[str]) -> list[Crop]:
    """The picture's crops that the cache lacks."""
    picture = open_rgb(image.path, config.alpha_background)
    boxes = crop_boxes(*picture.size, resolution, config.crops, config.random_flip)
    return [Crop(image, picture.size, box, crop_pixels(picture, box)) for box in boxes if box.name not in cached]


def prefetch(
    images: Sequence[InstanceImage], config: LatentConfig, resolution: int, cache: LatentCache, batch_size: int
) -> Iterator[list[Crop]]:
    """Each picture's missing crops, decoded a few pictures ahead in threads (Pillow releases the lock)."""

    def one(image: InstanceImage) -> list[Crop]:
        return decode(image, config, resolution, cache.variants(image.image_id))

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        ahead = 2 * batch_size
        futures = deque(pool.submit(one, image) for image in images[:ahead])
        for index in range(len(images)):
            crops = futures.popleft().result()
            if index + ahead < len(images):
                futures.append(pool.submit(one, images[index + ahead]))
            if crops:
                yield crops


def check_all_decode(images: Sequence[InstanceImage], config: LatentConfig) -> tuple[InstanceImage, ...]:
    """Decodes every picture once before the VAE is loaded, so that a broken one costs seconds and no half cache.

    Raises:
        UserError: a broken picture, without --skip_broken; or none left with it.
    """

    def one(image: InstanceImage) -> BrokenImage | None:
        try:
            open_rgb(image.path, config.alpha_background)
        except BrokenImage as error:
            return error
        return None

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        results = list(tqdm(pool.map(one, images), total=len(images), desc="checking", leave=False))
    broken = [error for error in results if error]
    if broken and not config.skip_broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{others}: remove it, or add --skip_broken to go on without it")
    for error in broken:
        print(f"skipped: {error}")
    whole = tuple(image for image, error in zip(images, results, strict=True) if not error)
    if not whole:
        raise UserError("no picture decodes: give another --instance_data_dir")
    return whole


@torch.no_grad()
def encode(vae: AutoencoderKL, crops: Sequence[Crop]) -> list[LatentPosterior]:
    """The raw posteriors of some crops.

    Raises:
        UserError: one is not finite, as an fp16 VAE may make it.
    """
    pixels = torch.stack([crop.pixels for crop in crops])  # (B, 3, H, W)
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    means, stds = posterior.mean.cpu(), posterior.std.cpu()  # (B, 16, H/8, W/8)
    for crop, mean, std in zip(crops, means, stds, strict=True):
        if not (mean.isfinite().all() and std.isfinite().all()):
            remedy = "remove it" if vae.dtype == torch.float32 else "type --vae_precision fp32 --overwrite"
            raise UserError(f"the VAE gives a NaN or infinity for {crop.image.path} in {vae.dtype}: {remedy}")
    return [
        LatentPosterior(crop.image.image_id, crop.box.name, mean, std)
        for crop, mean, std in zip(crops, means, stds, strict=True)
    ]


def encode_missing(
    files: ModelFiles,
    images: Sequence[InstanceImage],
    config: LatentConfig,
    resolution: int,
    cache: LatentCache,
    device: torch.device,
    tile: VaeTile,
) -> int:
    """Encodes what the cache lacks, picture by picture, each file written whole; returns how many crops."""
    vae = AutoencoderKL.from_pretrained(
        files.component("vae"),
        variant=files.config.variant,
        torch_dtype=DTYPES[cache.wanted.precision],
        use_safetensors=True,
    ).to(device)
    tile.apply(vae)
    count, batch_size = 0, tile.batch_size

    def encode_group(group: list[list[Crop]]) -> None:
        crops = [crop for picture in group for crop in picture]
        posteriors = []
        for start in range(0, len(crops), batch_size):
            posteriors += encode(vae, crops[start : start + batch_size])
        for picture in group:
            image, size = picture[0].image, picture[0].picture_size
            cache.add(image, size, [p for p in posteriors if p.image_id == image.image_id])

    group: list[list[Crop]] = []
    pictures = prefetch(images, config, resolution, cache, batch_size)
    for picture in tqdm(pictures, total=len(images), desc="pictures", leave=False):
        group.append(picture)
        count += len(picture)
        if sum(map(len, group)) >= batch_size:
            encode_group(group)
            group = []
    if group:
        encode_group(group)
    return count


def outdated(images: Sequence[InstanceImage], cache: LatentCache) -> set[Path]:
    """The files that --overwrite deletes: made with other settings, or of these pictures and not whole.

    Other pictures' files are among them, since a cache has one precision (see `recorded_precision`).
    """
    own = {cache.path(image.image_id) for image in images}
    found = set()
    for path in cache.folder.glob("*.safetensors"):
        try:
            cache.variants(path.stem)
        except UserError as error:
            if path in own or isinstance(error, StaleLatents):
                found.add(path)
    return found


def incomplete(
    images: Sequence[InstanceImage], config: LatentConfig, resolution: int, cache: LatentCache, discarded: set[Path]
) -> list[InstanceImage]:
    """The pictures of which the cache, but for the discarded files, lacks a crop.

    Raises:
        UserError: a file that was made with other settings, or is not whole.
    """
    missing = []
    for image in tqdm(images, desc="looking", leave=False, disable=len(images) < 100):
        cached = () if cache.path(image.image_id) in discarded else cache.variants(image.image_id)
        boxes: tuple[CropBox, ...] = ()
        if cached:
            boxes = crop_boxes(*cache.picture_size(image.image_id), resolution, config.crops, config.random_flip)
        if not cached or any(box.name not in cached for box in boxes):
            missing.append(image)
    return missing


def run(argv: Sequence[str] | None) -> None:
    """The stage from top to bottom."""
    configs = parse_flags(
        (LatentConfig, ModelConfig, DeviceConfig, BudgetConfig), argv, "precompute_latents.py", __doc__.splitlines()[0]
    )
    config, model, device_config, budget_config = configs
    if model.is_miniature:
        say_miniature("precompute_latents.py")
    folder, instance_prompt = default_subject(config.instance_data_dir, config.instance_prompt)
    output_path = Path(config.output_path)
    device = choose_device(device_config.device)
    budget = open_budget(budget_config, device)
    if budget and not budget_config.plan:
        budget.cap()
    files = ModelFiles(model)
    resolution = files.resolution(config.resolution)
    images, left_out = instance_images(folder, instance_prompt or "", config.recursive)
    if not budget_config.plan:
        require_writable_folder(output_path)
    print(f"{len(images)} pictures in {folder}" + (f", {len(left_out)} other files left out" if left_out else ""))
    for path in left_out:
        print(f"left out: {path}")

    precision = config.vae_precision or (None if config.overwrite else recorded_precision(output_path)) or "fp32"
    cache = LatentCache(output_path, files.provenance(["vae"], precision, resolution), config.alpha_background)
    if not budget_config.plan:
        cache.remove_unfinished()
    discarded = outdated(images, cache) if config.overwrite else set()
    missing = incomplete(images, config, resolution, cache, discarded)
    print(f"{len(images) - len(missing)} of {len(images)} pictures cached before; {resolution} px, VAE in {precision}")
    reports: list[StageReport] = []
    count, predicted = 0, {}
    if missing or budget_config.plan:
        batch_size, may_shrink = config.batch_size(resolution), config.vae_batch_size is None
        tile = choose_tile(files, "encode", precision, resolution, resolution, budget, batch_size, may_shrink)
        if budget:
            predicted = tile.predicted_parts(budget)
            print(f"VAE in {precision}, {tile.describe()}: {sentence(predicted)}")
    if budget_config.plan:
        return
    if missing:
        missing = check_all_decode(missing, config)
    for path in discarded:  # not before all that is to replace them is known to decode
        path.unlink()
    if missing:
        with memory_stage("encode pictures", device, reports):
            count = encode_missing(files, missing, config, resolution, cache, device, tile)

    measured = budget.used_bytes(reports) if budget else 0
    if missing and budget:
        print(compared(sum(predicted.values()), measured))
    save_run(
        output_path / "run.json",
        configs,
        reports,
        wrote=f"{count} crops in {output_path}",
        predicted_bytes=sum(predicted.values()),
        measured_bytes=measured,
    )
    print(f"wrote {count} crops of {len(missing)} pictures to {output_path}")
    after = {"instance_data_dir": config.instance_data_dir, "resolution": config.resolution}
    after["latents_path"] = None if config.output_path == LATENTS_PATH else config.output_path
    print("next: " + command("train_dreambooth_sd3_lora_miniature.py", **model.flags(), **after))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(
        run, argv, "--vae_batch_size 1, --vae_precision fp16, a lower --vram_budget_gib or a lower --resolution"
    )


if __name__ == "__main__":
    sys.exit(main())
