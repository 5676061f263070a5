"""LoRA and prompts → PNGs.

Encode, free, denoise, free, decode: as in training, no two of the large models are ever in memory together. Where the
prompts are already in an embeddings file, no text encoder is loaded at all.

    python inference.py --lora sd3-dreambooth-lora --prompt "a photo of sks dog in a bucket"
"""

from __future__ import annotations

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.lean_imports import import_diffusers, import_pyarrow, start_driver
from sd3_lora.drawing.config import DrawingFlags

COMMAND_LINE = CommandLine(
    "inference.py",
    __doc__,
    tuple(DrawingFlags.classes()),
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_pyarrow()
    import_diffusers(without=("bitsandbytes",))

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, exit_code, require_writable_folder
from sd3_lora.common.defaults import DEFAULT_SEQUENCE_LENGTH, EXAMPLE_PROMPTS_FILE, LORA_FOLDER, say_miniature
from sd3_lora.common.devices import choose_device, choose_training_dtype, make_deterministic, planned_device
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles, check_size, library_versions
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.run_record import MOST_PROMPTS, RunFacts, RunRecord, RunResults
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.drawing.config import InferenceConfig
from sd3_lora.drawing.pictures import PicturePlan, plan_pictures
from sd3_lora.drawing.sampling import Embeddings, Sampler, SamplingSettings, decode
from sd3_lora.gpu.attention import attention_kernel, require_attention_kernel
from sd3_lora.gpu.budget import DeviceBudget, compared, open_budget
from sd3_lora.gpu.forecast import Phase
from sd3_lora.plan.memory_plan import Plan, plan_denoising
from sd3_lora.plan.step_memory import DenoisingShape
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.prompts import read_prompts
from sd3_lora.stage_one.text_encoder_plan import TextWork, choose_text_encoder_plan, describe_t5
from sd3_lora.stage_one.text_encoders import encode_prompts
from sd3_lora.stage_one.vae import load_vae
from sd3_lora.stage_one.vae_tiles import AskedTile, VaeTile, VaeWork, choose_tile, read_asked_tile
from sd3_lora.transformer.lora import LORA_FILE
from sd3_lora.transformer.lora_files import LoraFile, find_lora, read_lora_file, require_drawable
from sd3_lora.transformer.placement import AskedPlacement, arrange

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from tqdm import tqdm


@dataclass(frozen=True)
class Lora:
    """A LoRA file with its strength and what its training noted."""

    file: LoraFile
    scale: float

    @property
    def path(self) -> Path:
        """The file's."""
        return self.file.path

    @property
    def record(self) -> dict[str, Any]:
        """What this project's training noted."""
        return self.file.record

    def identity(self) -> str:
        """For the settings in the picture."""
        return f"{self.file.identity()}@{self.scale:g}"


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and what of the model is kept where: all that is decided before anything is loaded.

    Attributes:
        size: of the pictures.
        latent_shape: `(16, H/8, W/8)`.
        length: T5 tokens of a prompt.
        dtype: of the transformer.
        asked: what flags fix of where its weights are.
        plan: where they are.
        asked_tile: of the VAE, as asked for.
    """

    size: PictureSize
    latent_shape: tuple[int, int, int]
    length: int
    dtype: torch.dtype
    asked: AskedPlacement
    plan: Plan
    asked_tile: AskedTile


@dataclass(frozen=True)
class DeviceContext:
    """Where the stages run, within which budget, and what they took.

    Attributes:
        device: that computes.
        budget: of its memory; None on a CPU where none was asked for.
        precision: of the transformer: fp32, fp16 or bf16.
        reports: of the stages so far.
    """

    device: torch.device
    budget: DeviceBudget | None
    precision: str
    reports: list[StageReport] = field(default_factory=list)


def find_loras(config: InferenceConfig, files: ModelFiles, is_miniature: bool) -> list[Lora]:
    """The LoRAs that the flags name, checked against the model's configuration before anything of it is loaded."""
    names = list(config.lora)
    if not names and is_miniature and (Path(LORA_FOLDER) / LORA_FILE).is_file():
        print(f"drawing with the LoRA in {LORA_FOLDER}")
        names = [LORA_FOLDER]
    found = [read_lora_file(find_lora(name), files.read_config("transformer")) for name in names]
    for file in found:
        if not file.has_effect:
            print(f"note: {file.path} changes nothing: its last matrix or its alpha is zero, as before any training")
    scales = config.lora_scale or [1.0] * len(found)
    return [Lora(file, scale) for file, scale in zip(found, scales, strict=True)]


def find_prompts(config: InferenceConfig, loras: Sequence[Lora], is_miniature: bool) -> list[str]:
    """The prompts to draw: as given, else the examples' on the miniature, else each LoRA's trigger.

    Raises:
        UserError: there is none.
    """
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        prompts += read_prompts(Path(config.prompts_file))
    elif not prompts and is_miniature:
        prompts = read_prompts(EXAMPLE_PROMPTS_FILE)
    prompts = prompts or [lora.record["trigger"] for lora in loras if "trigger" in lora.record]
    if not prompts:
        raise UserError('nothing to draw: type --prompt "a photo of ..."')
    return prompts


def read_known(
    path: Path, prompts: Sequence[str], files: ModelFiles, config: InferenceConfig, length: int
) -> Embeddings:
    """The prompts' embeddings that the file has, if it was made for this model and length."""
    if not path.is_file():
        return {}
    with EmbeddingStore(path) as store:
        precision = config.t5_precision or store.provenance.precision
        if store.provenance.difference(files.provenance(TEXT_COMPONENTS, precision, length), "max_sequence_length"):
            return {}
        rows = store.read_all([prompt for prompt in prompts if prompt in store])
        return {row.prompt: (row.prompt_embeds, row.pooled_prompt_embeds) for row in rows}


def embed(
    prompts: Sequence[str], files: ModelFiles, config: InferenceConfig, length: int, context: DeviceContext
) -> Embeddings:
    """Every prompt's `(S, D)` and `(P,)` float16 embeddings, read or computed."""
    known = read_known(Path(config.data_df_path), prompts, files, config, length)
    missing = [prompt for prompt in prompts if prompt not in known]
    if not missing:
        print(f"all {len(prompts)} prompts are in {config.data_df_path}: no text encoder is loaded")
        return known
    work = TextWork(length, config.t5_precision, config.t5_stream, prompts=len(missing))
    plan = choose_text_encoder_plan(files, work, context.device, context.budget)
    print(f"{len(missing)} prompts to encode, T5 in {describe_t5(plan)}")
    prompt_embeds, pooled = encode_prompts(files, missing, plan, context.reports)
    return {**known, **dict(zip(missing, zip(prompt_embeds, pooled, strict=True), strict=True))}


def size_of(config: InferenceConfig, loras: Sequence[Lora], files: ModelFiles) -> PictureSize:
    """The picture's size: as given, else the resolution of the LoRA's training, else the model's."""
    trained = next((lora.record["resolution"] for lora in loras if "resolution" in lora.record), None)
    vae_scale = files.latent_channels_and_scale()[1]
    for flag in ("height", "width"):
        check_size(
            getattr(config, flag) or files.resolution(trained), flag, files.read_config("transformer"), vae_scale
        )
    default = files.resolution(trained)
    return PictureSize(config.width or default, config.height or default)


def plan_drawing(
    flags: DrawingFlags, files: ModelFiles, loras: Sequence[Lora], dtype: torch.dtype, budget: DeviceBudget | None
) -> Drawing:
    """What is drawn, and what of the model is kept where meanwhile.

    Raises:
        UserError: flags that cannot be obeyed, or a budget that nothing fits.
    """
    config, size = flags.drawing, size_of(flags.drawing, loras, files)
    trained_length = next((lora.record.get("max_sequence_length") for lora in loras if lora.record), None)
    length = config.max_sequence_length or trained_length or DEFAULT_SEQUENCE_LENGTH
    channels, vae_scale = files.latent_channels_and_scale()
    latent_size, sampling = size.latent(vae_scale), sampling_of(config)
    shape = DenoisingShape(
        config.batch_size * sampling.rows,
        latent_size,
        files.clip_tokens() + length,
        dtype,
        sum(lora.file.device_bytes for lora in loras),
    )
    blocks = files.read_config("transformer")["num_layers"]
    asked = AskedPlacement.of(flags.base, None, blocks)
    asked.check(blocks)
    plan = plan_denoising(files, shape, budget, asked)
    require_drawable([lora.file for lora in loras], [lora.scale for lora in loras], bool(plan.placement.streamed))
    asked_tile = read_asked_tile(config.vae_tile, size, vae_scale)
    return Drawing(size, (channels, *latent_size), length, dtype, asked, plan, asked_tile)


def sampling_of(config: InferenceConfig) -> SamplingSettings:
    """How pictures are denoised."""
    return SamplingSettings(config.num_steps, config.guidance, config.negative_prompt)


def picture_settings(
    config: InferenceConfig, drawing: Drawing, files: ModelFiles, loras: Sequence[Lora], precision: str
) -> dict[str, Any]:
    """All that decides a picture's pixels beside the model, its prompt and its index; it is kept in the PNG."""
    packed = drawing.plan.placement.precision
    return {
        "text_encoders": files.provenance(TEXT_COMPONENTS, "", 0).identity,
        "scheduler": files.scheduler_hash(),
        "lora": [lora.identity() for lora in loras],
        "negative_prompt": config.negative_prompt,
        "steps": config.num_steps,
        "guidance": config.guidance,
        "height": drawing.size.height,
        "width": drawing.size.width,
        "seed": config.seed,
        "max_sequence_length": drawing.length,
        "precision": precision + (f", base {packed}" if packed else ""),
        "vae_precision": config.vae_precision,
        **({} if drawing.asked_tile == "auto" else {"vae_tile": drawing.asked_tile}),
        **({"t5_precision": config.t5_precision} if config.t5_precision else {}),
        **({"attention_kernel": kernel} if (kernel := drawing.plan.placement.attention_kernel) else {}),
    }


def print_plans(plans: Sequence[PicturePlan], size: PictureSize) -> None:
    """Prints how many pictures there will be, how many are there, and where others keep their names."""
    before = sum(plan.is_drawn for plan in plans)
    print(f"{len(plans)} pictures of {size.width}×{size.height}, {before} of them drawn before")
    beside = [plan.path for plan in plans if plan.is_beside_another and not plan.is_drawn]
    if beside:
        print(f"{len(beside)} of them beside pictures of other settings, which are kept: the first is {beside[0]}")


def load_sampler(files: ModelFiles, drawing: Drawing, device: torch.device, loras: Sequence[Lora]) -> Sampler:
    """The transformer with its LoRAs, ready to denoise."""
    names = [f"lora_{index}" for index in range(len(loras))]

    def add_loras(transformer: SD3Transformer2DModel) -> list[torch.nn.Parameter]:
        for name, lora in zip(names, loras, strict=True):
            lora.file.attach(transformer, name)
        if names:
            transformer.set_adapters(names, [lora.scale for lora in loras])
        return []

    latent_size = (drawing.latent_shape[1], drawing.latent_shape[2])
    arranged = arrange(files, drawing.plan.placement, device, drawing.dtype, latent_size, add_loras)
    return Sampler(arranged.transformer, files.read_scheduler_config())


def denoise_all(
    sampler: Sampler, to_draw: Sequence[PicturePlan], embeddings: Embeddings, drawing: Drawing, config: InferenceConfig
) -> tuple[list[torch.Tensor], BaseException | None]:
    """Normalized latents `(16, H/8, W/8)` on the CPU, picture by picture; and the interruption or NaN that ended it.

    What was denoised by then is decoded all the same.
    """
    latents: list[torch.Tensor] = []
    try:
        for start in tqdm(range(0, len(to_draw), config.batch_size), desc="denoising", unit="batch"):
            batch = to_draw[start : start + config.batch_size]
            noise = torch.stack([picture.noise(drawing.latent_shape) for picture in batch])
            latents += sampler.denoise(noise, [picture.prompt for picture in batch], embeddings, sampling_of(config))
    except (KeyboardInterrupt, UserError) as error:
        if not latents:
            raise
        if isinstance(error, KeyboardInterrupt):
            print(f"\ninterrupted: the {len(latents)} pictures that are denoised will be decoded first")
        return latents, error
    return latents, None


def decode_and_save(vae: AutoencoderKL, plans: Sequence[PicturePlan], latents: Sequence[torch.Tensor]) -> None:
    """Decodes one picture at a time and writes it.

    Raises:
        UserError: pictures were NaN; all others are written.
    """
    errors = []
    for plan, latent in tqdm(list(zip(plans, latents, strict=True)), desc="decoding", unit="picture"):
        try:
            plan.save(decode(vae, latent))
        except UserError as error:
            errors.append(error)
    if errors:
        others = f" ({len(errors)} of {len(plans)} pictures)" if len(plans) > 1 else ""
        raise UserError(f"{errors[0]}{others}")


def draw(
    flags: DrawingFlags,
    files: ModelFiles,
    drawing: Drawing,
    tile: VaeTile,
    loras: Sequence[Lora],
    to_draw: Sequence[PicturePlan],
    context: DeviceContext,
) -> int:
    """Encode, free, denoise, free, decode; returns how many pictures were drawn, all unless it was interrupted."""
    config, device, reports = flags.drawing, context.device, context.reports
    for component in ("scheduler", "transformer", "vae"):  # here and whole before a text encoder computes
        files.component(component)
    wanted = list(dict.fromkeys([*(picture.prompt for picture in to_draw), config.negative_prompt]))
    embeddings = embed(wanted, files, config, drawing.length, context)

    kernel = attention_kernel(drawing.plan.placement.attention_kernel)
    with memory_stage(f"denoise ({context.precision})", device, reports), kernel:
        sampler = load_sampler(files, drawing, device, loras)
        latents, ended_by = denoise_all(sampler, to_draw, embeddings, drawing, config)
        del sampler

    with memory_stage(f"decode ({config.vae_precision})", device, reports):
        vae = load_vae(files, config.vae_precision, device, tile)
        decode_and_save(vae, to_draw[: len(latents)], latents)
        del vae
    if ended_by:
        print(f"drew {len(latents)} of {len(to_draw)} pictures")
        raise ended_by
    return len(latents)


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    flags = DrawingFlags(*COMMAND_LINE.parse(argv))
    config, is_plan = flags.drawing, flags.budget.plan
    if flags.model.is_miniature:
        say_miniature("inference.py")
    device = choose_device(flags.device.device)
    if flags.device.must_be_deterministic:
        make_deterministic()
    budget = open_budget(flags.budget, device)
    if budget and not is_plan:
        budget.cap()
    files = ModelFiles(flags.model)
    loras = find_loras(config, files, flags.model.is_miniature)
    prompts = find_prompts(config, loras, flags.model.is_miniature)
    outdir = Path(config.outdir)
    chosen = choose_training_dtype(config.mixed_precision, planned_device(flags.device.device, device, is_plan))
    drawing = plan_drawing(flags, files, loras, chosen.dtype, budget)
    head_width = files.read_config("transformer")["attention_head_dim"]
    if not is_plan:
        require_attention_kernel(drawing.plan.placement.attention_kernel, device, chosen.dtype, head_width)
        require_writable_folder(outdir)
    model = files.provenance(["transformer", "vae"], "", 0)
    settings = picture_settings(config, drawing, files, loras, chosen.name) | {"model": model.identity}
    plans = plan_pictures(outdir, prompts, config.num_images, settings, model.other_identities)
    to_draw = [picture for picture in plans if not picture.is_drawn]
    print_plans(plans, drawing.size)
    forecast, context = drawing.plan.forecast, DeviceContext(device, budget, chosen.name)
    if to_draw or is_plan:
        tile = choose_tile(files, VaeWork("decode", config.vae_precision, drawing.size), budget, drawing.asked_tile)
        if budget:
            decoding = Phase("decode", tile.predicted_parts(budget))
            forecast = replace(forecast, phases=(*forecast.phases, decoding))
            print(f"transformer in {chosen.name}, {drawing.plan.base_sentence()}: {forecast.phases[0].sentence()}")
            print(f"VAE in {config.vae_precision}, {tile.describe()}: {decoding.sentence()}")
        note = drawing.asked.without_effect(drawing.plan.placement)
        if note:
            print(note)
    if is_plan:
        return
    measured = 0
    if to_draw:
        draw(flags, files, drawing, tile, loras, to_draw, context)
    if budget and to_draw:  # of the last two stages: that of encoding is printed before
        measured = budget.used_bytes(context.reports[-2:])
        print(compared(forecast.peak_bytes, measured))
    facts = RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=chosen.name,
        plan=drawing.plan.to_dict(),
        predicted_parts=dict(forecast.largest.parts),
        prompts=tuple(prompts[:MOST_PROMPTS]),
        max_sequence_length=drawing.length,
        seed=config.seed,
    )
    results = RunResults(f"{len(to_draw)} pictures in {outdir}", context.reports, measured)
    RunRecord(flags.groups(), facts).save(outdir / "run.json", results)
    print(f"wrote {len(to_draw)} pictures to {outdir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "--mixed_precision fp16, --vae_precision fp16, --batch_size 1 or --t5_stream")


if __name__ == "__main__":
    sys.exit(main())
