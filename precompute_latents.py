"""Stage one, pictures: images → latents/.

Encodes every crop of every picture once with the VAE and keeps the posterior (its mean and standard deviation, not
one sample of it), so that training draws a fresh sample at every step without ever loading the VAE.

    python precompute_latents.py --instance_data_dir dog --resolution 1024
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig
from sd3_lora.common.lean_imports import import_diffusers, start_driver
from sd3_lora.stage_one.config import LatentConfig

COMMAND_LINE = CommandLine(
    "precompute_latents.py",
    __doc__,
    (LatentConfig, ModelConfig, DeviceConfig, BudgetConfig),
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_diffusers()

import itertools
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, counted, exit_code
from sd3_lora.common.defaults import (
    EMBEDDINGS_PATH,
    LATENTS_PATH,
    REFERENCE_CLASS_PROMPT,
    REFERENCE_PROMPT,
    say_miniature,
)
from sd3_lora.common.devices import DTYPES, make_deterministic, one_thread
from sd3_lora.common.disk_room import require_room
from sd3_lora.common.model_files import ModelFiles, library_versions
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.processes import Processes, in_processes, print_next
from sd3_lora.common.progress import Progress
from sd3_lora.common.records import InstanceImage, LatentPosterior
from sd3_lora.common.run_locks import require_unread, writing_in
from sd3_lora.common.run_record import RunFacts, RunRecord, RunResults, recorded_flags
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.gpu.budget import DeviceBudget, measured_peak, open_budget, sentence, within_memory
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.stage_one.augmentation import Augmentation
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.captions import class_images, require_apart
from sd3_lora.stage_one.concepts import Subject, concepts_of, read_subject
from sd3_lora.stage_one.config import EmbeddingConfig
from sd3_lora.stage_one.crop_boxes import CropBox, crop_box_of, crop_boxes, crop_rgb, size_notes, to_pixels
from sd3_lora.stage_one.data_sets import with_folder
from sd3_lora.stage_one.embedding_store import CLASS_CAPTION, EmbeddingStore, find_embeddings
from sd3_lora.stage_one.images import BrokenImage, open_rgb
from sd3_lora.stage_one.latent_cache import BrokenPicture, LatentCache, StaleLatents, recorded_precision
from sd3_lora.stage_one.masks import Mask, find_masks, latent_mask, require_right_masks
from sd3_lora.stage_one.picture_hashes import NOTES_NAME
from sd3_lora.stage_one.vae import load_vae
from sd3_lora.stage_one.vae_tiles import AskedTile, VaeTile, VaeWork, choose_tile, read_asked_tile

import torch
from diffusers import AutoencoderKL

MOST_THREADS = 16  # decode 100 photos of 12 megapixels a second, more than a GPU encodes
WRITES_AHEAD = 8  # pictures whose files wait to be written
CAPTURE_FROM = 16  # pictures: capturing the VAE takes as long as three of them, and saves a tenth of each
TILES_NOTE = (
    "note: at its borders a tile sees less of the picture, and the latents differ a little from those of the whole; "
    "--overwrite with {} will replace them"
)


@dataclass(frozen=True)
class Crop:
    """One crop of one picture, decoded.

    Attributes:
        image: the picture.
        picture_size: its width and height in pixels, upright.
        box: where the crop lies.
        rgb: `(H, W, 3)` uint8.
        siblings: how many crops of the picture are to be encoded.
    """

    image: InstanceImage
    picture_size: tuple[int, int]
    box: CropBox
    rgb: torch.Tensor
    siblings: int


def wanted_boxes(
    image: InstanceImage, size: tuple[int, int], config: LatentConfig, buckets: Buckets
) -> tuple[CropBox, ...]:
    """The crops of a picture that are asked for; those of the subject's are augmented on request.

    Args:
        image: the picture.
        size: its width and height in pixels, upright.
        config: which crops.
        buckets: their sizes.
    """
    boxes = crop_boxes(*size, buckets.size_for(*size), config.crops, config.random_flip)
    augmentation = Augmentation.of(config) if image.role == "instance" else None
    return (*boxes, *augmentation.boxes(image.image_id, boxes)) if augmentation else boxes


def decode(image: InstanceImage, config: LatentConfig, buckets: Buckets, cached: Sequence[str]) -> list[Crop]:
    """The picture's crops that the cache lacks.

    Args:
        image: the picture.
        config: which crops.
        buckets: their sizes.
        cached: the variants that the cache holds.

    Raises:
        BrokenImage: it does not decode.
    """
    picture = open_rgb(image.path, config.alpha_background)
    boxes = [box for box in wanted_boxes(image, picture.size, config, buckets) if box.name not in cached]
    return [Crop(image, picture.size, box, crop_rgb(picture, box), len(boxes)) for box in boxes]


def decode_ahead(
    images: Sequence[InstanceImage],
    config: LatentConfig,
    buckets: Buckets,
    cache: LatentCache,
    batch_size: int,
    threads: int,
    broken: list[BrokenPicture],
) -> Generator[Crop]:
    """Yields the missing crops, decoded some pictures ahead in threads (Pillow releases the lock).

    Args:
        images: the pictures that lack a crop.
        config: which crops.
        buckets: their sizes.
        cache: it is read, not written.
        batch_size: crops that are encoded together.
        threads: that decode.
        broken: pictures that do not decode are printed and added to it.
    """

    def decoded(image: InstanceImage) -> list[Crop] | BrokenPicture:
        try:
            return decode(image, config, buckets, cache.variants(image.image_id))
        except BrokenImage as error:  # its traceback holds the bitmap, and goes with it
            return BrokenPicture(image.image_id, error.path, error.reason)

    waiting, ahead = deque[Future](), threads + batch_size
    pool = ThreadPoolExecutor(threads)
    try:
        for index in Progress(range(len(images)), desc="pictures", leave=False):
            while len(waiting) < min(ahead, len(images) - index):
                waiting.append(pool.submit(decoded, images[index + len(waiting)]))
            crops = waiting.popleft().result()
            if isinstance(crops, BrokenPicture):
                broken.append(crops)
                Progress.write(sentence_of(crops, config))
            else:
                yield from crops
    finally:
        pool.shutdown(cancel_futures=True)


def of_one_size(crops: Iterable[Crop], batch_size: int) -> Iterator[list[Crop]]:
    """Yields the crops in batches of one size; the last one of each size may be smaller."""
    waiting = defaultdict[PictureSize, list[Crop]](list)
    for crop in crops:
        batch = waiting[crop.box.size]
        batch.append(crop)
        if len(batch) == batch_size:
            yield waiting.pop(crop.box.size)
    yield from waiting.values()


@dataclass(frozen=True)
class EncodedBatch:
    """The posteriors of some crops, on their way to the host.

    Attributes:
        crops: `B` of them.
        means: `(B, 16, H/8, W/8)` on the CPU, valid after `copied`.
        stds: likewise.
        copied: the CUDA event behind both copies; None on a CPU.
    """

    crops: Sequence[Crop]
    means: torch.Tensor
    stds: torch.Tensor
    copied: torch.cuda.Event | None

    def posteriors(self) -> Iterator[tuple[Crop, LatentPosterior]]:
        """Waits for the copies, and yields each crop with its posterior."""
        if self.copied is not None:
            self.copied.synchronize()
        for crop, mean, std in zip(self.crops, self.means, self.stds, strict=True):
            yield crop, LatentPosterior(crop.image.image_id, crop.box.name, mean, std)


def posterior_of(vae: AutoencoderKL, rgb: torch.Tensor) -> torch.Tensor:
    """The raw posterior: `(B, H, W, 3)` uint8 → its mean and its std, `(2, B, 16, H/8, W/8)`."""
    pixels = to_pixels(rgb)  # (B, 3, H, W), channels last in memory
    posterior = vae.encode((pixels if pixels.is_cuda else pixels.contiguous()).to(vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.std])


@torch.no_grad()
def encode(
    compute: Callable[[torch.Tensor], torch.Tensor], crops: Sequence[Crop], device: torch.device
) -> EncodedBatch:
    """Starts to encode some crops. On a GPU without a host–device synchronisation, unless the call is captured."""
    rgb = torch.stack([crop.rgb for crop in crops])
    if device.type == "cuda":
        rgb = rgb.pin_memory().to(device, non_blocking=True)
    means, stds = compute(rgb).to("cpu", non_blocking=True)  # into pinned memory, which `to` allocates
    return EncodedBatch(crops, means, stds, torch.cuda.current_stream().record_event() if rgb.is_cuda else None)


def one_late(batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
    """Yields each batch once the next has been started, so that the GPU computes while the host waits and writes."""
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


def encode_rest(
    files: ModelFiles,
    images: Sequence[InstanceImage],
    config: LatentConfig,
    cache: LatentCache,
    device: torch.device,
    tile: VaeTile,
    threads: int,
) -> tuple[int, list[BrokenPicture]]:
    """As `encode_missing`, of pictures of which an attempt that ended early has encoded some, which are counted."""
    rest = incomplete(images, config, Buckets.of(config, files), cache, set())
    left = {image.image_id for image in rest}
    done = sum(len(cache.variants(image.image_id)) for image in images if image.image_id not in left)
    count, broken = encode_missing(files, rest, config, cache, device, tile, threads)
    return done + count, broken


def encode_missing(
    files: ModelFiles,
    images: Sequence[InstanceImage],
    config: LatentConfig,
    cache: LatentCache,
    device: torch.device,
    tile: VaeTile,
    threads: int,
) -> tuple[int, list[BrokenPicture]]:
    """Encodes the crops that the cache lacks, and writes each picture's file once its crops are all there.

    Returns:
        How many crops, and the pictures that do not decode.
    """
    vae = load_vae(files, cache.wanted.precision, device, tile)
    compute: Callable[[torch.Tensor], torch.Tensor] = partial(posterior_of, vae)
    buckets = Buckets.of(config, files)
    if device.type == "cuda" and len(images) >= CAPTURE_FROM and len(buckets.sizes) == 1:
        compute = CapturedCall(compute, device, log=Progress.write)
    broken: list[BrokenPicture] = []
    crops = decode_ahead(images, config, buckets, cache, tile.batch_size, threads, broken)
    batches = of_one_size(crops, tile.batch_size)
    count, unwritten, writes = 0, defaultdict[str, list[LatentPosterior]](list), deque[Future]()
    with closing(crops), ThreadPoolExecutor(1) as writer:
        for batch in one_late(encode(compute, batch, device) for batch in batches):
            for crop, posterior in batch.posteriors():
                count += 1
                unwritten[posterior.image_id].append(posterior)
                if len(unwritten[posterior.image_id]) == crop.siblings:
                    posteriors = unwritten.pop(posterior.image_id)
                    writes.append(writer.submit(store, cache, crop, posteriors, tile.side_px))
            while len(writes) > WRITES_AHEAD:
                writes.popleft().result()
        for write in writes:
            write.result()
    return count, broken


@dataclass(frozen=True)
class CacheState:
    """What the cache holds of the pictures before anything is encoded.

    Attributes:
        pictures: how many there are.
        missing: the pictures of which the cache lacks a crop.
        discarded: the files that --overwrite deletes.
        tiled: how many of the pictures that are kept were encoded in tiles.
        otherwise_tiled: how many of them not as --vae_tile forces it.
    """

    pictures: int
    missing: list[InstanceImage]
    discarded: set[Path]
    tiled: int
    otherwise_tiled: int

    def sentences(self, cache: LatentCache, asked: AskedTile) -> list[str]:
        """What is cached, and a note where --vae_tile has no effect on it."""
        in_tiles = f" ({self.tiled} of them in tiles)" if self.tiled else ""
        lines = [
            f"{self.pictures - len(self.missing)} of {counted(self.pictures, 'picture')} cached before{in_tiles}; "
            f"{cache.resolution} px, VAE in {cache.wanted.precision}"
        ]
        if self.otherwise_tiled:
            lines.append(
                f"note: {self.otherwise_tiled} of {self.pictures} pictures were cached otherwise than --vae_tile "
                f"{asked}: add --overwrite to encode them again"
            )
        return lines


def inspect_cache(
    images: Sequence[InstanceImage],
    config: LatentConfig,
    buckets: Buckets,
    cache: LatentCache,
    asked: AskedTile,
    tile: VaeTile | None,
) -> CacheState:
    """What the cache holds of the pictures.

    Args:
        images: the pictures.
        config: which crops.
        buckets: their sizes.
        cache: to be read.
        asked: `--vae_tile`.
        tile: that will be used, under --overwrite; else None.

    Raises:
        UserError: a file that was made with other settings, or is not whole.
    """
    is_forced = asked != "auto"
    discarded = outdated(images, cache, tile, is_forced) if tile else set()
    missing = incomplete(images, config, buckets, cache, discarded)
    kept = [cache.look(image.image_id) for image in images if cache.path(image.image_id) not in discarded]
    cached = [picture for picture in kept if picture]
    forced_px = asked if isinstance(asked, int) else None
    return CacheState(
        pictures=len(images),
        missing=missing,
        discarded=discarded,
        tiled=sum(bool(picture.tiles) for picture in cached),
        otherwise_tiled=sum(is_forced and picture.has_other_tiles(forced_px) for picture in cached),
    )


def outdated(images: Sequence[InstanceImage], cache: LatentCache, tile: VaeTile, is_forced: bool) -> set[Path]:
    """The files that --overwrite deletes.

    - Made with other settings. Other pictures' files are among them, since a cache has one precision (see
      `recorded_precision`).
    - Of these pictures, and damaged.
    - Of these pictures, and encoded in smaller tiles; where the tile is forced, in any other tiles.
    """
    paths_of_images = {cache.path(image.image_id) for image in images}
    discarded = set()
    for path in cache.folder.glob("*.safetensors"):
        try:
            picture = cache.look(path.stem)
        except UserError as error:
            if path in paths_of_images or isinstance(error, StaleLatents):
                discarded.add(path)
            continue
        if path in paths_of_images and picture:
            is_outdated = picture.has_other_tiles if is_forced else picture.has_smaller_tiles
            if is_outdated(tile.side_px):
                discarded.add(path)
    return discarded


def incomplete(
    images: Sequence[InstanceImage],
    config: LatentConfig,
    buckets: Buckets,
    cache: LatentCache,
    discarded: set[Path],
) -> list[InstanceImage]:
    """The pictures of which the cache, without the discarded files, lacks a crop.

    Raises:
        UserError: a file that was made with other settings, or is not whole.
    """
    missing = []
    for image in Progress(images, desc="reading the cache", leave=False, disable=len(images) < 100):
        picture = None if cache.path(image.image_id) in discarded else cache.look(image.image_id)
        boxes = wanted_boxes(image, picture.size, config, buckets) if picture else ()
        if not picture or any(box.name not in picture.variants for box in boxes):
            missing.append(image)
    return missing


def outdated_masks(
    masks: Sequence[Mask], cache: LatentCache, missing: Sequence[InstanceImage], threads: int
) -> list[Mask]:
    """The masks that the cache lacks for a variant, or has of another file; they are decoded to see that they fit.

    Args:
        masks: of the pictures.
        cache: to be read.
        missing: the pictures whose latents are about to be made.
        threads: that decode.

    Raises:
        UserError: as `Mask.read`.
    """
    missing_ids = {image.image_id for image in missing}

    def is_cached(mask: Mask) -> bool:
        picture = cache.look(mask.image.image_id)
        return picture is not None and all(picture.masks.get(name) == mask.source for name in picture.variants)

    outdated = [mask for mask in masks if mask.image.image_id in missing_ids or not is_cached(mask)]
    require_right_masks(outdated, threads)
    return outdated


def cache_masks(masks: Sequence[Mask], cache: LatentCache, scale: int, threads: int) -> Iterator[str]:
    """Writes masks beside the posteriors of their pictures, for each variant; yields a line about it.

    Args:
        masks: to be written.
        cache: with the posteriors of all pictures that decode.
        scale: pixels in a latent pixel, along one side.
        threads: that decode.
    """

    def add(mask: Mask) -> bool:
        picture = cache.look(mask.image.image_id)
        if not picture:
            return False
        grey, boxes = mask.read(), (crop_box_of(name, *picture.size) for name in picture.variants)
        added = [latent_mask(grey, box, mask.source, scale) for box in boxes]
        cache.add(mask.image, picture.size, (), masks=added)
        return True

    with ThreadPoolExecutor(threads) as pool:
        written = sum(Progress(pool.map(add, masks), total=len(masks), desc="masks", leave=False))
    if masks:
        yield f"wrote the masks of {counted(written, 'picture')} to {cache.folder}"


def sentence_of(picture: BrokenPicture, config: LatentConfig) -> str:
    """The line that is printed about a broken picture."""
    return f"{'skipped' if config.skip_broken else 'broken'}: {picture}"


def require_whole(broken: Sequence[BrokenPicture], pictures: int, config: LatentConfig) -> None:
    """Refuses to go on with broken pictures. The other ones are cached by now, so nothing is lost.

    Raises:
        UserError: a broken picture, without --skip_broken; or all of them are broken.
    """
    if len(broken) == pictures:
        raise UserError("no picture decodes: give another --instance_data_dir")
    if broken and not config.skip_broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{others}: remove it, or add --skip_broken to go on without it")


def read_pictures(config: LatentConfig, is_plan: bool, processes: Processes) -> Subject:
    """The subject's pictures; prints how many, and which files are left out.

    Raises:
        UserError: as `concepts_of` and `read_subject`.
    """
    concepts = concepts_of(config)
    hashes_path = None if is_plan else Path(config.output_path) / NOTES_NAME
    subject = processes.from_rank_0(lambda: read_subject(concepts, config, hashes_path, need_prompts=False))
    print(*subject.sentences(about_prompts=False), sep="\n")
    return subject


def find_class_images(config: LatentConfig, images: Sequence[InstanceImage]) -> list[InstanceImage]:
    """The class pictures that are to be encoded beside those of the subject; prints how many.

    Raises:
        UserError: there are none in the folder, or one is among the subject's.
    """
    if config.class_data_dir is None:
        return []
    folder = Path(config.class_data_dir)
    others = class_images(folder, "", config.num_class_images)
    if not others:
        raise UserError(f"{folder} holds no class pictures: check the path, or leave out --class_data_dir")
    require_apart({image.image_id for image in images}, others)
    print(f"{counted(len(others), 'class picture')} in {folder}")
    return list(others)


def open_cache(files: ModelFiles, config: LatentConfig) -> LatentCache:
    """The cache of the model's resolution and the VAE's precision, both as asked for or by default."""
    folder, resolution = Path(config.output_path), files.resolution(config.resolution)
    precision = config.vae_precision or (None if config.overwrite else recorded_precision(folder)) or "fp32"
    augmentation = Augmentation.of(config)
    wanted, ranges = files.provenance(["vae"], precision, resolution), augmentation.ranges if augmentation else None
    return LatentCache(folder, wanted, config.alpha_background, ranges)


def gather_results(
    count: int, broken: Sequence[BrokenPicture], config: LatentConfig, processes: Processes
) -> tuple[int, list[BrokenPicture]]:
    """The number of crops and the broken pictures of all processes; prints those that only other processes know."""
    counts, broken_lists = zip(*processes.gather((count, broken)), strict=True)
    for picture in itertools.chain(*broken_lists[1:]):
        print(sentence_of(picture, config))
    return sum(counts), list(itertools.chain(*broken_lists))


def run(argv: Sequence[str] | None, processes: Processes) -> None:
    """The stage from top to bottom."""
    config, model, device_config, budget_config = COMMAND_LINE.parse(argv)
    if model.is_miniature:
        say_miniature("precompute_latents.py", config.instance_data_dir)
    config = processes.from_rank_0(lambda: with_folder(config, model.cache_dir))
    configs = (config, model, device_config, budget_config)
    device = processes.choose_device(device_config.device, model)
    if device_config.must_be_deterministic:
        make_deterministic()
    budget = open_budget(budget_config, device)
    if budget and not budget_config.plan:
        budget.cap()
    files = ModelFiles(model, budget_config.plan)
    asked_tile(config, Buckets.of(config, files), files)  # a side that cannot be is refused first
    subject = read_pictures(config, budget_config.plan, processes)
    lock = nullcontext() if budget_config.plan else writing_in(Path(config.output_path))
    with processes.holding(lock):
        encode_subject(configs, files, subject, device, budget, processes)


def encode_subject(
    configs: tuple[Any, ...],
    files: ModelFiles,
    subject: Subject,
    device: torch.device,
    budget: DeviceBudget | None,
    processes: Processes,
) -> None:
    """Encodes what the cache lacks of the pictures, and writes the masks; or plans that alone."""
    config, _, _, budget_config = configs
    cache, buckets = open_cache(files, config), Buckets.of(config, files)
    asked, work = asked_tile(config, buckets, files), vae_work(config, cache, buckets)
    images = list(subject.images)
    masks = processes.from_rank_0(lambda: find_masks(config, subject))
    others = processes.from_rank_0(lambda: find_class_images(config, images))
    pictures = [*images, *others]
    choose = partial(choose_for_all, files, work, budget, asked, processes)
    tile = choose() if config.overwrite or budget_config.plan else None
    replaced_by = tile if config.overwrite else None
    if files.is_known:
        state = CacheState(len(pictures), pictures, set(), 0, 0)
    else:
        state = processes.from_rank_0(lambda: inspect_cache(pictures, config, buckets, cache, asked, replaced_by))
        print(*state.sentences(cache, asked), sep="\n")
    threads = min(MOST_THREADS, processes.cpu_cores)
    if masks and not budget_config.plan:
        masks = processes.from_rank_0(lambda: outdated_masks(masks, cache, state.missing, threads))
    predicted: dict[str, int] = {}
    if state.missing or budget_config.plan:
        tile = tile or choose()
        predicted = predict(tile, work, asked, budget)
    if budget_config.plan:
        return
    size = bytes_to_write(files, config, cache, buckets, len(state.missing))
    require_room(cache.folder, size, "the latents take")
    discard(state, cache, processes)  # not before the tile that replaces them is known to fit
    count, broken, reports = 0, list[BrokenPicture](), list[StageReport]()
    if state.missing and tile:
        share, first = processes.share(state.missing), tile

        def encode_share(within: DeviceBudget | None) -> tuple[int, list[BrokenPicture], VaeTile]:
            tile = first if within is budget else choose_tile(files, work, within, asked)
            with memory_stage("encode pictures", device, reports), one_thread(device):
                return *encode_rest(files, share, config, cache, device, tile, threads), tile

        count, broken, tile = within_memory(encode_share, budget, reports)
    count, broken = gather_results(count, broken, config, processes)
    if not processes.is_rank_0:
        return
    cache = open_cache(files, config)  # which knows nothing yet of what other processes wrote
    for line in cache_masks(masks, cache, files.latent_channels_and_scale()[1], threads):
        print(line)
    measured = measured_peak(budget, reports, sum(predicted.values()) if state.missing else 0)
    results = RunResults(f"{counted(count, 'crop')} in {cache.folder}", reports, measured)
    RunRecord(configs, facts_of(files, cache, tile, predicted, processes)).save(cache.folder / "run.json", results)
    print(f"wrote {counted(count, 'crop')} of {counted(len(state.missing) - len(broken), 'picture')} to {cache.folder}")
    require_whole(broken, len(pictures), config)
    cache.note_broken(broken)
    print_sizes(pictures, cache, buckets, config)
    print_next(next_line(configs, images))


def bytes_to_write(files: ModelFiles, config: LatentConfig, cache: LatentCache, buckets: Buckets, pictures: int) -> int:
    """The bytes of so many pictures' posteriors, at the most."""
    channels, scale = files.latent_channels_and_scale()
    height, width = buckets.largest.latent(scale)
    crops = config.crops * (2 if config.random_flip else 1) * (1 + (config.num_augmented or 0))
    return pictures * crops * 2 * channels * height * width * DTYPES[cache.wanted.precision].itemsize


def asked_tile(config: LatentConfig, buckets: Buckets, files: ModelFiles) -> AskedTile:
    """`--vae_tile`, checked.

    Raises:
        UserError: it cannot be.
    """
    longest = PictureSize.square(buckets.longest_side)
    return read_asked_tile(config.vae_tile, longest, files.latent_channels_and_scale()[1])


def vae_work(config: LatentConfig, cache: LatentCache, buckets: Buckets) -> VaeWork:
    """What the VAE is to do."""
    batch_size, may_shrink = config.batch_size(cache.resolution), config.vae_batch_size is None
    return VaeWork("encode", cache.wanted.precision, buckets.largest, batch_size, may_shrink=may_shrink)


def choose_for_all(
    files: ModelFiles, work: VaeWork, budget: DeviceBudget | None, asked: AskedTile, processes: Processes
) -> VaeTile:
    """The tile that fits the smallest GPU of all processes."""
    tiles = processes.gather(choose_tile(files, work, budget, asked))
    return min(tiles, key=lambda tile: tile.working_bytes)


def predict(tile: VaeTile, work: VaeWork, asked: AskedTile, budget: DeviceBudget | None) -> dict[str, int]:
    """The bytes that the VAE will take, by part; printed, with a note where it encodes tiles."""
    predicted = tile.predicted_parts(budget) if budget else {}
    if budget:
        print(f"VAE in {work.precision}, {tile.describe()}: {sentence(predicted)}")
    if tile.side_px is not None:
        print(TILES_NOTE.format("a larger --vram_budget_gib" if asked == "auto" else "--vae_tile whole"))
    return predicted


def discard(state: CacheState, cache: LatentCache, processes: Processes) -> None:
    """Deletes the files that are to be replaced, before any process reads one.

    Raises:
        UserError: a run that goes on reads them.
    """
    if processes.is_rank_0 and state.discarded:
        require_unread(cache.folder)
        for path in state.discarded:
            cache.remove(path.stem)
    processes.gather(None)


def print_sizes(pictures: Sequence[InstanceImage], cache: LatentCache, buckets: Buckets, config: LatentConfig) -> None:
    """Prints which pictures are enlarged much, and of which the crops see little."""
    cached = ((image.path.name, cache.look(image.image_id)) for image in pictures)
    sizes = {name: (PictureSize(*it.size), buckets.size_for(*it.size)) for name, it in cached if it}
    for line in size_notes(sizes, config.crops):
        print(line)


def facts_of(
    files: ModelFiles, cache: LatentCache, tile: VaeTile | None, predicted: dict[str, int], processes: Processes
) -> RunFacts:
    """The run's inputs and settings, for `run.json`."""
    return RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=cache.wanted.precision,
        processes=processes.count,
        plan=asdict(tile) if tile else {},
        predicted_parts=predicted,
        resolution=cache.resolution,
    )


def next_line(configs: tuple[Any, ...], images: Sequence[InstanceImage]) -> str:
    """What to type next: the training command, or stage one's for the prompts where these pictures have none yet."""
    config, model, device, budget = configs
    shared = {**model.flags(), **config.picture_flags(), **device.flags(), **budget.flags()}
    beside_latents = sorted(Path(config.output_path).parent.glob("*.parquet"))
    usual = [Path(EMBEDDINGS_PATH)]  # latents in a folder of their own are another run's: so are the embeddings there
    places = [*usual, *beside_latents] if config.output_path == LATENTS_PATH else [*beside_latents, *usual]
    embeddings_path = find_embeddings(places, [image.image_id for image in images])
    if embeddings_path is None:
        own = {} if all(image.prompt for image in images) else {"instance_prompt": REFERENCE_PROMPT}
        if config.class_data_dir is not None and config.concepts_list is None:
            own["class_prompt"] = REFERENCE_CLASS_PROMPT
        whose = ("", ", with a prompt of your own", ", with prompts of your own")[len(own)]
        return f"next{whose}: " + command("compute_embeddings.py", **{**shared, **own})
    recorded = recorded_flags(embeddings_path.with_suffix(".json"), EmbeddingConfig)
    again = {**recorded, **{name: value for name, value in shared.items() if value}, "output_path": embeddings_path}
    prior = prior_flags(config, embeddings_path)
    if prior is None:
        again["class_prompt"] = REFERENCE_CLASS_PROMPT
        return "next, with a class prompt of your own: " + command("compute_embeddings.py", **again)
    captions = class_caption_flags(config, embeddings_path, recorded) if prior else {}
    if captions is None:
        again |= {"class_captions": True, "class_data_dir": config.class_data_dir}
        return "next: " + command("compute_embeddings.py", **again)
    flags = {
        "skip_broken": config.skip_broken,
        **config.crop_flags(),
        "num_crops": None if config.num_crops == LatentConfig.num_crops else config.num_crops,
        "random_flip": config.random_flip,
        "masked_loss": config.has_masks,
        "latents_path": None if config.output_path == LATENTS_PATH else config.output_path,
        "data_df_path": None if embeddings_path == Path(EMBEDDINGS_PATH) else embeddings_path,
        **prior,
        **captions,
    }
    return "next: " + command("train_dreambooth_sd3_lora_miniature.py", **shared, **flags)


def class_caption_flags(
    config: LatentConfig, embeddings_path: Path, recorded: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Training's flags of captions beside class pictures, none unless stage one embedded some; None where one lacks.

    Args:
        config: the flags of this run.
        embeddings_path: the embeddings.
        recorded: the flags with which they were made.
    """
    folders = [concept.class_folder for concept in concepts_of(config)] if config.concepts_list is not None else []
    folders.append(None if config.class_data_dir is None else Path(config.class_data_dir))
    with EmbeddingStore(embeddings_path) as store:
        if not (recorded.get("class_captions") or store.prompts_with_role(CLASS_CAPTION)):
            return {}
        images = (
            image for folder in dict.fromkeys(folders) if folder for image in class_images(folder, "", None, True)
        )
        if any(prompt and prompt not in store for image in images for prompt in image.prompts):
            return None
    return {"class_captions": True, "class_prompts_file": recorded.get("class_prompts_file")}


def prior_flags(config: LatentConfig, embeddings_path: Path) -> dict[str, Any] | None:
    """Training's flags of the class pictures, none where there are none; None where no class prompt is embedded."""
    if config.concepts_list is not None:
        concepts = concepts_of(config)
        folders = {concept.class_folder for concept in concepts}
        have_classes = all(
            concept.class_prompt is not None and concept.class_folder is not None for concept in concepts
        )
        if have_classes and (config.class_data_dir is None or Path(config.class_data_dir) in folders):
            return {"with_prior_preservation": True}
    if config.class_data_dir is None:
        return {}
    with EmbeddingStore(embeddings_path) as store:
        prompts = store.prompts_with_role("class")
    if not prompts:
        return None
    count = config.num_class_images
    return {
        "with_prior_preservation": True,
        "class_prompt": prompts[0],
        "class_data_dir": config.class_data_dir,
        "num_class_images": None if count == LatentConfig.num_class_images else count,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    smaller = "--vae_batch_size 1, --vae_precision fp16, a lower --vram_budget_gib or a lower --resolution"
    return exit_code(in_processes(run), argv, smaller)


if __name__ == "__main__":
    sys.exit(main())
