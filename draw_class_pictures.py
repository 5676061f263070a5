"""Class prompt → pictures of the subject's class, and their latents, for prior preservation.

Training runs this by itself where class pictures are missing. The prompt is embedded already, so no text encoder is
loaded; the latents are cached as they come from the transformer, and decoded only to be looked at.

    python draw_class_pictures.py --class_prompt "a photo of a dog" --class_data_dir dogs --num_class_images 100
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig
from sd3_lora.common.lean_imports import import_diffusers, import_pyarrow, start_driver
from sd3_lora.drawing.config import ClassDrawingConfig

COMMAND_LINE = CommandLine(
    "draw_class_pictures.py",
    __doc__,
    (ClassDrawingConfig, ModelConfig, DeviceConfig, BudgetConfig),
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_pyarrow()
    import_diffusers()

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, command, counted, exit_code
from sd3_lora.common.defaults import DEFAULT_SEQUENCE_LENGTH, say_miniature
from sd3_lora.common.devices import (
    DTYPES,
    ChosenDtype,
    choose_device,
    choose_training_dtype,
    make_deterministic,
    planned_device,
)
from sd3_lora.common.disk_room import require_room
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles, check_size, library_versions
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.progress import Progress
from sd3_lora.common.records import InstanceImage, LatentPosterior
from sd3_lora.common.run_locks import writing_in
from sd3_lora.common.run_record import RunFacts, RunRecord, RunResults, recorded_flags, recorded_results
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.drawing.class_pictures import WaitingLatents, missing_class_pictures, write_caption
from sd3_lora.drawing.pictures import PicturePlan
from sd3_lora.drawing.sampling import Embeddings, Sampler, SamplingSettings, decode
from sd3_lora.gpu.budget import BudgetTooSmall, DeviceBudget, compared, open_budget, within_memory
from sd3_lora.gpu.forecast import Forecast, Phase
from sd3_lora.plan.memory_plan import Plan, plan_denoising
from sd3_lora.plan.step_memory import DenoisingShape
from sd3_lora.stage_one.config import EmbeddingConfig, LatentConfig
from sd3_lora.stage_one.crop_boxes import crop_boxes
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.latent_cache import LatentCache, denormalize_latents, recorded_precision
from sd3_lora.stage_one.prompts import read_prompts
from sd3_lora.stage_one.vae import load_vae
from sd3_lora.stage_one.vae_tiles import VaeTile, VaeWork, choose_tile
from sd3_lora.transformer.placement import arrange

import torch
from diffusers import AutoencoderKL

VAE_PRECISION = "fp32"  # of the pictures to look at


def prompts_of(config: ClassDrawingConfig) -> list[str]:
    """What is drawn in turn: the prompts of the file, or the class prompt."""
    if config.class_prompts_file is not None:
        return read_prompts(Path(config.class_prompts_file))
    return [config.class_prompt or ""]


def read_embeddings(config: ClassDrawingConfig, files: ModelFiles) -> Embeddings:
    """The `(S, D)` and `(P,)` embeddings of the prompts to draw and of the empty one.

    Raises:
        UserError: the file is not there, is of another model, or lacks one of them.
    """
    path, prompts = Path(config.data_df_path), (*prompts_of(config), "")
    recorded = recorded_flags(path.with_suffix(".json"), EmbeddingConfig)  # it keeps the subject's pictures
    recorded |= {**files.config.flags(), "class_prompt": config.class_prompt, "output_path": path}
    if config.class_prompts_file is not None:
        recorded["class_prompts_file"] = config.class_prompts_file
    remedy = command("compute_embeddings.py", **recorded)
    with EmbeddingStore(path) as store:
        wanted = files.provenance(TEXT_COMPONENTS, store.provenance.precision, store.provenance.size)
        difference = store.provenance.difference(wanted, "max_sequence_length")
        if difference:
            raise UserError(f"{path} was made with {difference}: type `{remedy} --overwrite`")
        lacking = [prompt for prompt in prompts if prompt not in store]
        if lacking:
            raise UserError(f"{path} lacks {(lacking[0] or prompts[0])!r}: type `{remedy}`")
        return {row.prompt: (row.prompt_embeds, row.pooled_prompt_embeds) for row in store.read_all(prompts)}


def text_tokens_of(embeddings: Embeddings, files: ModelFiles) -> int:
    """The tokens of a prompt, by its embedding, or by default where a plan is made without one."""
    shapes = [prompt_embeds.shape for prompt_embeds, _ in embeddings.values()]
    return shapes[0][0] if shapes else files.clip_tokens() + DEFAULT_SEQUENCE_LENGTH


def plan_drawing(
    files: ModelFiles,
    config: ClassDrawingConfig,
    latent_size: tuple[int, int],
    text_tokens: int,
    dtype: torch.dtype,
    budget: DeviceBudget | None,
) -> tuple[Plan, int]:
    """Where the weights are, and how many pictures are denoised together: as many as asked for, or half until they fit.

    Raises:
        UserError: not even one picture fits the budget.
    """
    rows, count = sampling_of(config).rows, config.sample_batch_size
    while True:
        shape = DenoisingShape(count * rows, latent_size, text_tokens, dtype, 0)
        try:
            return plan_denoising(files, shape, budget), count
        except BudgetTooSmall:
            if count == 1:
                raise
            count //= 2


def sampling_of(config: ClassDrawingConfig) -> SamplingSettings:
    """How pictures are denoised."""
    return SamplingSettings(config.num_steps, config.guidance)


def size_of(config: ClassDrawingConfig, files: ModelFiles, resolution: int) -> PictureSize:
    """The pictures' size.

    Raises:
        UserError: the model cannot draw it.
    """
    size = PictureSize(config.width or resolution, config.height or resolution)
    vae_scale = files.latent_channels_and_scale()[1]
    for flag, side_px in (("height", size.height), ("width", size.width)):
        check_size(side_px, flag, files.read_config("transformer"), vae_scale)
    return size


def picture_settings(
    config: ClassDrawingConfig, files: ModelFiles, size: PictureSize, precision: str
) -> dict[str, Any]:
    """All that decides a picture's pixels beside its prompt and index; it is kept in the PNG."""
    return {
        "model": files.provenance(["transformer", "vae"], "", 0).identity,
        "scheduler": files.scheduler_hash(),
        "steps": config.num_steps,
        "guidance": config.guidance,
        "height": size.height,
        "width": size.width,
        "seed": config.seed,
        "precision": precision,
    }


def open_cache(files: ModelFiles, config: ClassDrawingConfig, resolution: int) -> LatentCache:
    """The latent cache, with the settings that `precompute_latents.py` has for it."""
    folder = Path(config.latents_path)
    recorded = recorded_flags(folder / "run.json", LatentConfig)
    background = recorded.get("alpha_background", LatentConfig.alpha_background)
    precision = recorded_precision(folder) or "fp32"
    return LatentCache(folder, files.provenance(["vae"], precision, resolution), background)


def denoise_all(
    sampler: Sampler,
    pictures: Sequence[PicturePlan],
    embeddings: Embeddings,
    settings: SamplingSettings,
    shape: tuple[int, int, int],
    together: int,
    waiting: WaitingLatents,
) -> None:
    """Denoises what does not wait to be decoded yet; each batch is on disk before the next begins."""
    batches = [pictures[start : start + together] for start in range(0, len(pictures), together)]
    # A batch is denoised as a whole: in another company a picture may differ in its last bit.
    missing = [batch for batch in batches if any(waiting.read(picture) is None for picture in batch)]
    for batch in Progress(missing, desc="denoising", unit="batch"):
        noise = torch.stack([picture.noise(shape) for picture in batch])
        latents = sampler.denoise(noise, [picture.prompt for picture in batch], embeddings, settings)
        for picture, latent in zip(batch, latents, strict=True):
            waiting.add(picture, latent)


def keep(picture: PicturePlan, latents: torch.Tensor, png: bytes, vae_config: Any, cache: LatentCache) -> None:
    """Caches the latents under the PNG's hash, as a posterior without spread, and then writes the PNG.

    In this order a picture that is there has its latents, and the next run encodes none of them.
    """
    image = InstanceImage(hashlib.sha256(png).hexdigest(), picture.path, picture.prompt, "class")
    size = (picture.settings["width"], picture.settings["height"])
    (box,) = crop_boxes(*size, PictureSize(*size), num_crops=1, flip=False)
    mean = denormalize_latents(latents.float(), vae_config).to(DTYPES[cache.wanted.precision])
    cache.add(image, size, [LatentPosterior(image.image_id, box.name, mean, torch.zeros_like(mean))])
    picture.write(png)


def decode_all(
    vae: AutoencoderKL,
    pictures: Sequence[PicturePlan],
    waiting: WaitingLatents,
    cache: LatentCache,
    has_captions: bool,
) -> None:
    """Decodes one picture at a time and keeps it, behind its caption where it has one: none is ever without."""
    for picture in Progress(pictures, desc="decoding", unit="picture"):
        latents = waiting.read(picture)
        if latents is None:
            raise UserError(f"{waiting.folder} was changed meanwhile: type the same command again")
        if has_captions:
            write_caption(picture)
        keep(picture, latents, picture.file_bytes(decode(vae, latents)), vae.config, cache)
        waiting.remove(picture)


@dataclass(frozen=True)
class Sampling:
    """How the pictures are denoised: all that is decided before anything is loaded.

    Attributes:
        config: the flags.
        plan: where the weights are.
        together: pictures in a batch.
        latent_size: height and width of the latents.
        chosen: the transformer's dtype.
        device: that computes.
    """

    config: ClassDrawingConfig
    plan: Plan
    together: int
    latent_size: tuple[int, int]
    chosen: ChosenDtype
    device: torch.device


def draw(
    files: ModelFiles,
    sampling: Sampling,
    tile: VaeTile,
    pictures: Sequence[PicturePlan],
    embeddings: Embeddings,
    cache: LatentCache,
    reports: list[StageReport],
) -> None:
    """Denoise, free, decode."""
    waiting, device, dtype = WaitingLatents(cache.folder / "undecoded"), sampling.device, sampling.chosen.dtype
    if any(waiting.read(picture) is None for picture in pictures):
        with memory_stage(f"denoise ({sampling.chosen.name}), {sampling.together} at a time", device, reports):
            arranged = arrange(files, sampling.plan.placement, device, dtype, sampling.latent_size, lambda _: [])
            scheduler = files.read_scheduler_config()
            sampler = Sampler(arranged.transformer, scheduler, dtype_flag="--prior_generation_precision")
            shape = (files.latent_channels_and_scale()[0], *sampling.latent_size)
            settings = sampling_of(sampling.config)
            denoise_all(sampler, pictures, embeddings, settings, shape, sampling.together, waiting)
            del arranged, sampler
    with memory_stage(f"decode ({VAE_PRECISION})", device, reports):
        vae = load_vae(files, VAE_PRECISION, device, tile)
        decode_all(vae, pictures, waiting, cache, sampling.config.class_prompts_file is not None)
        del vae


def planned_within(
    files: ModelFiles, sampling: Sampling, embeddings: Embeddings, budget: DeviceBudget | None
) -> tuple[Sampling, VaeTile]:
    """How what is left is drawn within another budget.

    Raises:
        UserError: not even one picture fits it.
    """
    config, text_tokens = sampling.config, text_tokens_of(embeddings, files)
    plan, together = plan_drawing(files, config, sampling.latent_size, text_tokens, sampling.chosen.dtype, budget)
    size = size_of(config, files, files.resolution(config.resolution))
    tile = choose_tile(files, VaeWork("decode", VAE_PRECISION, size), budget)
    return replace(sampling, plan=plan, together=together), tile


def draw_missing(
    configs: Sequence[Any],
    files: ModelFiles,
    sampling: Sampling,
    tile: VaeTile,
    embeddings: Embeddings,
    budget: DeviceBudget | None,
    forecast: Forecast,
) -> None:
    """Draws the pictures that the folder lacks, and writes the record of the run."""
    config, resolution, reports = sampling.config, files.resolution(sampling.config.resolution), list[StageReport]()
    folder, cache = Path(config.class_data_dir), open_cache(files, config, resolution)
    settings = picture_settings(config, files, size_of(config, files, resolution), sampling.chosen.name)
    prompts = prompts_of(config)
    pictures = missing_class_pictures(folder, prompts, config.num_class_images, settings)
    count, record_path = config.num_class_images, folder / "run.json"
    print(f"{counted(count, 'class picture')}, {count - len(pictures)} of them in {folder}")
    if not pictures and recorded_results(record_path) != {}:
        return  # else a run was killed that had drawn them all
    for component in ("scheduler", "transformer", "vae") if pictures else ():  # whole before anything is written
        files.component(component)
    facts = RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=sampling.chosen.name,
        plan=sampling.plan.to_dict(),
        predicted_parts=dict(forecast.largest.parts) if budget else {},
        prompts=tuple(prompts),
        resolution=resolution,
        seed=config.seed,
    )
    channels, height, width = files.latent_channels_and_scale()[0], *sampling.latent_size
    of_each = 3 * settings["height"] * settings["width"] + 12 * channels * height * width  # its pixels, and its latents
    require_room(folder, len(pictures) * of_each, "the class pictures take")
    record = RunRecord(configs, facts)
    record.save(record_path, None)
    WaitingLatents(cache.folder / "undecoded").remove_drawn(folder)

    def draw_rest(within: DeviceBudget | None) -> None:
        rest = [picture for picture in pictures if not picture.path.exists()]
        how = (sampling, tile) if within is budget else planned_within(files, sampling, embeddings, within)
        draw(files, *how, rest, embeddings, cache, reports)

    if pictures:
        within_memory(draw_rest, budget, reports)
    measured = budget.used_bytes(reports) if budget else 0
    if budget:
        print(compared(forecast.peak_bytes, measured))
    record.save(record_path, RunResults(f"{counted(len(pictures), 'class picture')} in {folder}", reports, measured))
    print(f"wrote {counted(len(pictures), 'class picture')} to {folder}, and their latents to {cache.folder}")


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    configs = COMMAND_LINE.parse(argv)
    config, model, device_config, budget_config = configs
    if model.is_miniature:
        say_miniature("draw_class_pictures.py")
    device = choose_device(device_config.device, model)
    if device_config.must_be_deterministic:
        make_deterministic()
    budget = open_budget(budget_config, device)
    if budget and not budget_config.plan:
        budget.cap()
    files = ModelFiles(model, budget_config.plan)
    resolution = files.resolution(config.resolution)
    asked = "no" if config.prior_generation_precision == "fp32" else config.prior_generation_precision
    chosen = choose_training_dtype(asked, planned_device(device_config.device, device, budget_config.plan))
    embeddings = {} if files.is_known else read_embeddings(config, files)
    text_tokens = text_tokens_of(embeddings, files)
    size = size_of(config, files, resolution)
    latent_size = size.latent(files.latent_channels_and_scale()[1])
    plan, together = plan_drawing(files, config, latent_size, text_tokens, chosen.dtype, budget)
    tile = choose_tile(files, VaeWork("decode", VAE_PRECISION, size), budget)
    forecast = plan.forecast
    if budget:
        decoding = Phase("decode", tile.predicted_parts(budget))
        print(f"transformer in {chosen.name}, {plan.base_sentence()}: {forecast.phases[0].sentence()}")
        print(f"VAE in {VAE_PRECISION}, {tile.describe()}: {decoding.sentence()}")
        forecast = replace(forecast, phases=(*forecast.phases, decoding))
    if budget_config.plan:
        return
    sampling = Sampling(config, plan, together, latent_size, chosen, device)
    with writing_in(Path(config.class_data_dir)), writing_in(Path(config.latents_path)):
        draw_missing(configs, files, sampling, tile, embeddings, budget, forecast)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "--sample_batch_size 1, --prior_generation_precision fp16 or a lower --resolution")


if __name__ == "__main__":
    sys.exit(main())
