"""Stage one, pictures: images → latents/.

Encodes every crop of every picture once with the VAE and keeps the posterior (its mean and standard deviation, not
one sample of it), so that training draws a fresh sample at every step without ever loading the VAE.

    python precompute_latents.py --instance_data_dir dog --resolution 1024
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from sd3_lora.common.command_line import UserError, command, exit_code, parse_flags, require_writable_folder
from sd3_lora.common.defaults import LATENTS_PATH, default_subject, say_miniature
from sd3_lora.common.devices import DTYPES, DeviceConfig, one_thread
from sd3_lora.common.model_files import ModelConfig, ModelFiles, library_versions
from sd3_lora.common.processes import Processes, in_processes
from sd3_lora.common.records import InstanceImage, LatentPosterior
from sd3_lora.common.run_record import RunFacts, RunRecord, RunResults
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.gpu.budget import BudgetConfig, compared, open_budget, sentence
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.stage_one.captions import instance_images
from sd3_lora.stage_one.images import BrokenImage, CropBox, crop_boxes, crop_rgb, open_rgb, to_pixels
from sd3_lora.stage_one.latent_cache import LatentCache, StaleLatents, recorded_precision
from sd3_lora.stage_one.picture_hashes import NOTES_NAME
from sd3_lora.stage_one.vae_norms import arrange_vae
from sd3_lora.stage_one.vae_tiles import VaeTile, choose_tile

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

MOST_THREADS = 16  # decode 100 photos of 12 megapixels a second, more than a GPU encodes
WRITES_AHEAD = 8  # pictures whose files wait to be written
CAPTURE_FROM = 16  # pictures: to record the VAE takes as long as three of them, and saves a tenth of each
TILES_NOTE = (
    "note: at its borders a tile sees less of the picture, and the latents differ a little from those of the whole; "
    "--overwrite with a larger --vram_budget_gib will replace them"
)


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
    """One crop of one picture, decoded.

    Attributes:
        image: the picture.
        picture_size: its width and height in pixels, upright.
        box: where the crop lies.
        rgb: `(R, R, 3)` uint8.
        siblings: how many crops of the picture are to be encoded.
    """

    image: InstanceImage
    picture_size: tuple[int, int]
    box: CropBox
    rgb: torch.Tensor
    siblings: int


def decode(image: InstanceImage, config: LatentConfig, resolution: int, cached: Sequence[str]) -> list[Crop]:
    """The picture's crops that the cache lacks.

    Raises:
        BrokenImage: it does not decode.
    """
    picture = open_rgb(image.path, config.alpha_background)
    boxes = crop_boxes(*picture.size, resolution, config.crops, config.random_flip)
    boxes = tuple(box for box in boxes if box.name not in cached)
    return [Crop(image, picture.size, box, crop_rgb(picture, box), len(boxes)) for box in boxes]


def decode_ahead(
    images: Sequence[InstanceImage],
    config: LatentConfig,
    resolution: int,
    cache: LatentCache,
    batch_size: int,
    threads: int,
    broken: list[BrokenImage],
) -> Generator[Crop]:
    """The missing crops, decoded some pictures ahead in threads (Pillow releases the lock); names the broken ones."""

    def one(image: InstanceImage) -> list[Crop] | BrokenImage:
        try:
            return decode(image, config, resolution, cache.variants(image.image_id))
        except BrokenImage as error:
            return error

    waiting, ahead = deque[Future](), threads + batch_size
    pool = ThreadPoolExecutor(threads)
    try:
        for index in tqdm(range(len(images)), desc="pictures", leave=False):
            while len(waiting) < min(ahead, len(images) - index):
                waiting.append(pool.submit(one, images[index + len(waiting)]))
            decoded = waiting.popleft().result()
            if isinstance(decoded, BrokenImage):
                broken.append(decoded)
                tqdm.write(sentence_of(decoded, config))
            else:
                yield from decoded
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class EncodedBatch:
    """The posteriors of some crops, on their way to the host.

    Attributes:
        crops: `B` of them.
        means: `(B, 16, H/8, W/8)` on the CPU, valid once `arrived`.
        stds: likewise.
        arrived: recorded behind the copies; None on a CPU.
    """

    crops: Sequence[Crop]
    means: torch.Tensor
    stds: torch.Tensor
    arrived: torch.cuda.Event | None

    def posteriors(self) -> Iterator[tuple[Crop, LatentPosterior]]:
        """Waits for the copies, and gives each crop its own."""
        if self.arrived is not None:
            self.arrived.synchronize()
        for crop, mean, std in zip(self.crops, self.means, self.stds, strict=True):
            yield crop, LatentPosterior(crop.image.image_id, crop.box.name, mean, std)


def posterior_of(vae: AutoencoderKL, rgb: torch.Tensor) -> torch.Tensor:
    """The raw posterior: `(B, R, R, 3)` uint8 → its mean and its std, `(2, B, 16, R/8, R/8)`."""
    pixels = to_pixels(rgb)  # (B, 3, R, R), channels last in memory
    found = vae.encode((pixels if pixels.is_cuda else pixels.contiguous()).to(vae.dtype)).latent_dist
    return torch.stack([found.mean, found.std])


@torch.no_grad()
def encode(
    compute: Callable[[torch.Tensor], torch.Tensor], crops: Sequence[Crop], device: torch.device
) -> EncodedBatch:
    """Starts the posteriors of some crops; on a GPU nothing here waits for it, but the first time if it is recorded."""
    rgb = torch.stack([crop.rgb for crop in crops])
    if device.type == "cuda":
        rgb = rgb.pin_memory().to(device, non_blocking=True)
    means, stds = compute(rgb).to("cpu", non_blocking=True)  # into pinned memory, which `to` takes by itself
    return EncodedBatch(crops, means, stds, torch.cuda.current_stream().record_event() if rgb.is_cuda else None)


def one_late(batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
    """Each batch once the next has been started, so that the GPU works while the host waits and writes."""
    previous = None
    for batch in batches:
        if previous is not None:
            yield previous
        previous = batch
    if previous is not None:
        yield previous


def store(cache: LatentCache, crop: Crop, posteriors: Sequence[LatentPosterior], tile_px: int | None) -> None:
    """Writes a picture's file.

    Raises:
        UserError: a posterior is not finite, as an fp16 VAE may make it.
    """
    for posterior in posteriors:
        if not (posterior.mean.isfinite().all() and posterior.std.isfinite().all()):
            dtype = posterior.mean.dtype
            remedy = "remove it" if dtype == torch.float32 else "type --vae_precision fp32 --overwrite"
            raise UserError(f"the VAE gives a NaN or infinity for {crop.image.path} in {dtype}: {remedy}")
    cache.add(crop.image, crop.picture_size, posteriors, tile_px)


def load_vae(files: ModelFiles, precision: str, device: torch.device, tile: VaeTile) -> AutoencoderKL:
    """The VAE on its device, as the tile has it."""
    vae = AutoencoderKL.from_pretrained(
        files.component("vae"),
        variant=files.config.variant,
        torch_dtype=DTYPES[precision],
        use_safetensors=True,
    ).to(device)
    arrange_vae(vae)
    tile.apply(vae)
    return vae


def encode_missing(
    files: ModelFiles,
    images: Sequence[InstanceImage],
    config: LatentConfig,
    resolution: int,
    cache: LatentCache,
    device: torch.device,
    tile: VaeTile,
    threads: int,
) -> tuple[int, list[BrokenImage]]:
    """Encodes what the cache lacks, each picture's file written whole.

    Returns:
        How many crops, and the pictures that do not decode.
    """
    vae = load_vae(files, cache.wanted.precision, device, tile)
    compute: Callable[[torch.Tensor], torch.Tensor] = partial(posterior_of, vae)
    if device.type == "cuda" and len(images) >= CAPTURE_FROM:
        compute = CapturedCall(compute, device, say=tqdm.write)
    broken: list[BrokenImage] = []
    crops = decode_ahead(images, config, resolution, cache, tile.batch_size, threads, broken)
    batches = iter(lambda: list(itertools.islice(crops, tile.batch_size)), [])
    count, found, writes = 0, defaultdict[str, list[LatentPosterior]](list), deque[Future]()
    with closing(crops), ThreadPoolExecutor(1) as writer:
        for batch in one_late(encode(compute, batch, device) for batch in batches):
            for crop, posterior in batch.posteriors():
                count += 1
                found[posterior.image_id].append(posterior)
                if len(found[posterior.image_id]) == crop.siblings:
                    own = found.pop(posterior.image_id)
                    writes.append(writer.submit(store, cache, crop, own, tile.side_px))
            while len(writes) > WRITES_AHEAD:
                writes.popleft().result()
        for write in writes:
            write.result()
    return count, broken


def outdated(images: Sequence[InstanceImage], cache: LatentCache, tile: VaeTile) -> set[Path]:
    """The files that --overwrite deletes: made with other settings, or of these pictures and damaged or less whole.

    Other pictures' files are among them, since a cache has one precision (see `recorded_precision`).
    """
    own = {cache.path(image.image_id) for image in images}
    found = set()
    for path in cache.folder.glob("*.safetensors"):
        try:
            picture = cache.look(path.stem)
        except UserError as error:
            if path in own or isinstance(error, StaleLatents):
                found.add(path)
        else:
            if path in own and picture and picture.has_smaller_tiles(tile.side_px):
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
        found = None if cache.path(image.image_id) in discarded else cache.look(image.image_id)
        boxes = crop_boxes(*found.size, resolution, config.crops, config.random_flip) if found else ()
        if not found or any(box.name not in found.variants for box in boxes):
            missing.append(image)
    return missing


def sentence_of(error: BrokenImage, config: LatentConfig) -> str:
    """What becomes of a broken picture."""
    return f"{'skipped' if config.skip_broken else 'broken'}: {error}"


def require_whole(broken: Sequence[BrokenImage], pictures: int, config: LatentConfig) -> None:
    """Whether training can go on. The other pictures are cached by now: nothing is lost, and all broken ones are named.

    Raises:
        UserError: a broken picture, without --skip_broken; or no other.
    """
    if len(broken) == pictures:
        raise UserError("no picture decodes: give another --instance_data_dir")
    if broken and not config.skip_broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{others}: remove it, or add --skip_broken to go on without it")


def run(argv: Sequence[str] | None, processes: Processes) -> None:
    """The stage from top to bottom."""
    configs = parse_flags(
        (LatentConfig, ModelConfig, DeviceConfig, BudgetConfig), argv, "precompute_latents.py", __doc__.splitlines()[0]
    )
    config, model, device_config, budget_config = configs
    if model.is_miniature:
        say_miniature("precompute_latents.py")
    folder, instance_prompt = default_subject(config.instance_data_dir, config.instance_prompt)
    output_path = Path(config.output_path)
    device = processes.choose_device(device_config.device)
    budget = open_budget(budget_config, device)
    if budget and not budget_config.plan:
        budget.cap()
    files = ModelFiles(model)
    resolution = files.resolution(config.resolution)
    hashes_path = None if budget_config.plan else output_path / NOTES_NAME
    images, left_out = processes.from_first(
        lambda: instance_images(folder, instance_prompt or "", config.recursive, hashes_path)
    )
    if not budget_config.plan:
        require_writable_folder(output_path)
    print(f"{len(images)} pictures in {folder}" + (f", {len(left_out)} other files left out" if left_out else ""))
    for path in left_out:
        print(f"left out: {path}")

    precision = config.vae_precision or (None if config.overwrite else recorded_precision(output_path)) or "fp32"
    cache = LatentCache(output_path, files.provenance(["vae"], precision, resolution), config.alpha_background)

    def choose() -> VaeTile:
        batch_size, may_shrink = config.batch_size(resolution), config.vae_batch_size is None
        own = choose_tile(files, "encode", precision, resolution, resolution, budget, batch_size, may_shrink)
        return min(processes.gather(own), key=lambda tile: tile.working_bytes)  # what the smallest GPU holds

    tile = choose() if config.overwrite or budget_config.plan else None

    def look() -> tuple[list[InstanceImage], set[Path], int]:
        if not budget_config.plan:
            cache.remove_unfinished()
        discarded = outdated(images, cache, tile) if config.overwrite and tile else set()
        missing = incomplete(images, config, resolution, cache, discarded)
        kept = (image.image_id for image in images if cache.path(image.image_id) not in discarded)
        return missing, discarded, sum(bool(cache.tiles(image_id)) for image_id in kept)

    missing, discarded, tiled = processes.from_first(look)
    in_tiles = f" ({tiled} of them in tiles)" if tiled else ""
    print(
        f"{len(images) - len(missing)} of {len(images)} pictures cached before{in_tiles}; {resolution} px, VAE in "
        f"{precision}"
    )
    reports: list[StageReport] = []
    count, predicted = 0, {}
    if missing or budget_config.plan:
        tile = tile or choose()
        if budget:
            predicted = tile.predicted_parts(budget)
            print(f"VAE in {precision}, {tile.describe()}: {sentence(predicted)}")
        if tile.side_px is not None:
            print(TILES_NOTE)
    if budget_config.plan:
        return
    if processes.is_first:
        for path in discarded:  # not before what is to replace them is known to fit
            cache.remove(path.stem)
    processes.gather(None)  # nobody reads what is to be deleted
    broken: list[BrokenImage] = []
    if missing and tile:
        share, threads = processes.share(missing), min(MOST_THREADS, processes.cpu_cores)
        with memory_stage("encode pictures", device, reports), one_thread(device):
            count, broken = encode_missing(files, share, config, resolution, cache, device, tile, threads)
    counts, broken_lists = zip(*processes.gather((count, broken)), strict=True)
    if not processes.is_first:
        return
    for error in itertools.chain(*broken_lists[1:]):  # which those processes could not say
        print(sentence_of(error, config))
    count, broken = sum(counts), list(itertools.chain(*broken_lists))

    measured = budget.used_bytes(reports) if budget else 0
    if missing and budget:
        print(compared(sum(predicted.values()), measured))
    facts = RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=precision,
        processes=processes.count,
        plan=asdict(tile) if tile else {},
        predicted_parts=predicted,
        resolution=resolution,
    )
    results = RunResults(f"{count} crops in {output_path}", reports, measured)
    RunRecord(configs, facts).save(output_path / "run.json", results)
    print(f"wrote {count} crops of {len(missing) - len(broken)} pictures to {output_path}")
    require_whole(broken, len(images), config)
    after = {"instance_data_dir": config.instance_data_dir, "resolution": config.resolution}
    after["latents_path"] = None if config.output_path == LATENTS_PATH else config.output_path
    print("next: " + command("train_dreambooth_sd3_lora_miniature.py", **model.flags(), **after))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    smaller = "--vae_batch_size 1, --vae_precision fp16, a lower --vram_budget_gib or a lower --resolution"
    return exit_code(in_processes(run), argv, smaller)


if __name__ == "__main__":
    sys.exit(main())
