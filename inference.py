"""LoRA and prompts → PNGs.

Encode, free, denoise, free, decode: as in training, no two of the large models are ever in memory together. Where the
prompts are already in an embeddings file, no text encoder is loaded at all; a LoRA that changes the CLIPs has its
prompts encoded anew by these two, and T5's part read.

    python inference.py --lora sd3-dreambooth-lora --prompt "a photo of sks dog in a bucket"
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import group_classes, groups_of
from sd3_lora.common.lean_imports import import_diffusers, import_pyarrow, start_driver
from sd3_lora.drawing.config import DrawingFlags

COMMAND_LINE = CommandLine(
    "inference.py",
    __doc__,
    group_classes(DrawingFlags),
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()
    start_driver()
    import_pyarrow()
    import_diffusers()

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, counted, exit_code
from sd3_lora.common.defaults import DEFAULT_SEQUENCE_LENGTH, EXAMPLE_PROMPTS_FILE, LORA_FOLDER, say_miniature
from sd3_lora.common.devices import choose_device, choose_training_dtype, make_deterministic, planned_device
from sd3_lora.common.disk_room import require_room
from sd3_lora.common.identifier_embedding import IdentifierEmbedding, stands_in
from sd3_lora.common.joined_embeddings import join_embeddings
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles, check_size, library_versions
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.placement_flags import is_on
from sd3_lora.common.progress import Progress
from sd3_lora.common.run_locks import writing_in
from sd3_lora.common.run_record import MOST_PROMPTS, RunFacts, RunRecord, RunResults
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.drawing.config import SCHEDULERS, SKIP_LAYER_DEFAULTS, InferenceConfig
from sd3_lora.drawing.contact_sheet import SheetPicture, draw_sheet, rows_of_run, save_sheet, thumbnail_of
from sd3_lora.drawing.identifiers import Identifiers, find_identifiers
from sd3_lora.drawing.picture_metadata import read_settings
from sd3_lora.drawing.pictures import FileStyle, PicturePlan, PictureWriter, plan_pictures
from sd3_lora.drawing.sampling import (
    Decoder,
    Embeddings,
    Sampler,
    SamplingSettings,
    SkipLayerGuidance,
    TransformerCall,
)
from sd3_lora.gpu.attention import attention_kernel, require_attention_kernel
from sd3_lora.gpu.budget import DeviceBudget, measured_peak, open_budget, within_memory
from sd3_lora.gpu.forecast import Forecast, Phase
from sd3_lora.plan.memory_plan import Plan, plan_beside, plan_denoising, plan_drawing
from sd3_lora.plan.step_execution import AskedExecution, StepExecution, choose_drawing_execution
from sd3_lora.plan.step_memory import DenoisingShape, image_tokens
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.prompts import read_prompts, with_subject
from sd3_lora.stage_one.text_encoder_plan import TextWork, choose_clip_plan, choose_text_encoder_plan, describe_t5
from sd3_lora.stage_one.vae import load_vae
from sd3_lora.stage_one.vae_tiles import AskedTile, VaeTile, VaeWork, choose_tile, read_asked_tile
from sd3_lora.transformer.clip_loras import ClipLoras
from sd3_lora.transformer.compiled import start_compile_workers
from sd3_lora.transformer.lora import LORA_FILE, has_adapter
from sd3_lora.transformer.lora_files import LoraFile, find_lora, read_lora_file, require_drawable
from sd3_lora.transformer.merged_weights import MergedLoras
from sd3_lora.transformer.placement import AskedPlacement, arrange

import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

WRITING_THREADS = 4


@dataclass(frozen=True)
class Variant:
    """One way to draw all pictures: with these strengths of the LoRAs, from the same noise as the others.

    Attributes:
        scales: one for each LoRA; None for the base alone.
        label: on the contact sheet; empty where there is one way.
        suffix: of the pictures' names, likewise; empty for the plain ones beside the base's.
        identifiers: whose embeddings the CLIPs read.
    """

    scales: tuple[float, ...] | None
    label: str = ""
    suffix: str = ""
    identifiers: tuple[IdentifierEmbedding, ...] = ()

    @property
    def is_base(self) -> bool:
        """Whether nothing but the base's own weights and words draws it."""
        return not any(self.scales or ()) and not self.identifiers

    def identity(self, loras: Sequence[LoraFile]) -> list[str]:
        """For the settings in the picture."""
        scales = zip(loras, self.scales or (), strict=self.scales is not None)
        of_loras = [f"{lora.identity()}@{scale:g}" for lora, scale in scales]
        return of_loras + [f"{identifier.word}={identifier.identity}" for identifier in self.identifiers]

    def readable(self, loras: Sequence[LoraFile]) -> str:
        """For other programs: the LoRAs' names and strengths."""
        scales = zip(loras, self.scales or (), strict=self.scales is not None)
        return ", ".join(f"{name_of(lora)}: {scale:g}" for lora, scale in scales)


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
        together: pictures that are denoised together, at the most.
        asked_tile: of the VAE, as asked for.
    """

    size: PictureSize
    latent_shape: tuple[int, int, int]
    length: int
    dtype: torch.dtype
    asked: AskedPlacement
    plan: Plan
    together: int
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


def find_loras(config: InferenceConfig, files: ModelFiles, is_miniature: bool) -> list[LoraFile]:
    """The LoRAs that the flags name, checked against the model's configuration before anything of it is loaded."""
    names = list(config.lora)
    if not names and is_miniature and (Path(LORA_FOLDER) / LORA_FILE).is_file():
        print(f"drawing with the LoRA in {LORA_FOLDER}")
        names = [LORA_FOLDER]
    found = [read_lora_file(find_lora(name), files.read_config("transformer"), files.read_config) for name in names]
    for file in found:
        if not file.has_effect and file.identifier is None:
            print(f"note: {file.path} changes nothing: its last matrix or its alpha is zero, as before any training")
    return found


def name_of(lora: LoraFile) -> str:
    """By which the user knows a LoRA: its folder's name where that is all that names it."""
    return lora.path.resolve().parent.name if lora.path.name == LORA_FILE else lora.path.stem


def find_variants(config: InferenceConfig, loras: Sequence[LoraFile], identifiers: Identifiers) -> list[Variant]:
    """In which ways all pictures are drawn; one, unless flags ask for several. Says where LoRAs are added up.

    Raises:
        UserError: there is nothing to compare with the base.
    """
    if config.compare and not loras and not identifiers.asked:
        raise UserError("--compare draws with a LoRA and without: add --lora")
    scales = dict.fromkeys(config.lora_scale)
    is_sweep = len(loras) == 1 and len(scales) > 1
    if is_sweep:
        variants = [Variant((scale,), f"LoRA at {scale:g}", f"scale{scale:g}") for scale in scales]
    else:
        together = tuple(config.lora_scale) or (1.0,) * len(loras)
        variants = [Variant(together, with_all(together) if config.compare else "")]
        if len(loras) > 1:
            print(added_up(loras, variants[0]))
    variants = [replace(variant, identifiers=identifiers.used(variant.scales)) for variant in variants]
    variants = [replace(each, label=f"base ({each.label})") if is_sweep and each.is_base else each for each in variants]
    has_base = any(variant.is_base for variant in variants)
    if config.compare and has_base and not is_sweep:
        raise UserError("--compare has nothing beside the base, which a LoRA at 0 is: give another --lora_scale")
    return [Variant(None, "base", "base"), *variants] if config.compare and not has_base else variants


def with_all(scales: Sequence[float]) -> str:
    """A picture's label beside the base's."""
    what = "LoRAs" if len(scales) > 1 else "LoRA" if scales else "embedding"
    at = " and ".join(f"{scale:g}" for scale in scales)
    return f"with the {what}" + (f" at {at}" if any(scale != 1 for scale in scales) else "")


def added_up(loras: Sequence[LoraFile], variant: Variant) -> str:
    """What several LoRAs at once are, and how to see one beside the other instead."""
    return (
        f"{len(loras)} LoRAs added up in each picture ({variant.readable(loras)}); to see one beside the other, type "
        "the command once for each --lora, with one --outdir: seed and noise are the same"
    )


def find_prompts(config: InferenceConfig, records: Sequence[Mapping[str, Any]], is_miniature: bool) -> list[str]:
    """The prompts to draw: as given, else the examples' on the miniature, else each LoRA's trigger.

    Args:
        config: the flags.
        records: what training noted in the LoRAs and embeddings.
        is_miniature: whether the model is.

    Raises:
        UserError: there is none, or one lacks its subject.
    """
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        prompts += read_prompts(Path(config.prompts_file))
    elif not prompts and is_miniature:
        prompts = read_prompts(EXAMPLE_PROMPTS_FILE)
    prompts = prompts or list(dict.fromkeys(record["trigger"] for record in records if "trigger" in record))
    if not prompts:
        raise UserError('nothing to draw: type --prompt "a photo of ..."')
    return with_subject(prompts, config.subject)


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


def stored_precision(path: Path) -> str | None:
    """T5's in the embeddings file; None where there is none."""
    if not path.is_file():
        return None
    with EmbeddingStore(path) as store:
        return store.provenance.precision


def embed(
    prompts: Sequence[str],
    files: ModelFiles,
    config: InferenceConfig,
    length: int,
    context: DeviceContext,
    without: str = "no text encoder",
) -> Embeddings:
    """Every prompt's `(S, D)` and `(P,)` float16 embeddings of the base, read or computed.

    `without` names what is not loaded where all are read.
    """
    known = read_known(Path(config.data_df_path), prompts, files, config, length)
    missing = [prompt for prompt in prompts if prompt not in known]
    if not missing:
        print(f"all {len(prompts)} prompts are in {config.data_df_path}: {without} is loaded")
        return known
    work = TextWork(length, config.t5_precision, config.t5_stream, prompts=len(missing))
    plan = choose_text_encoder_plan(files, work, context.device, context.budget)
    print(f"{counted(len(missing), 'prompt')} to encode, T5 in {describe_t5(plan)}")
    from sd3_lora.stage_one.text_encoders import encode_prompts  # imports all of transformers' encoders

    prompt_embeds, pooled = encode_prompts(files, missing, plan, context.reports)
    return {**known, **dict(zip(missing, zip(prompt_embeds, pooled, strict=True), strict=True))}


def embed_with(
    clip_loras: ClipLoras,
    base: Embeddings,
    files: ModelFiles,
    config: InferenceConfig,
    length: int,
    context: DeviceContext,
) -> Embeddings:
    """The prompts encoded anew by CLIPs with LoRAs in them; T5's part is that of `base`, which has every prompt."""
    prompts = list(base)
    work = TextWork(length, config.t5_precision, config.t5_stream, stored_precision(Path(config.data_df_path)))
    plan = choose_clip_plan(files, work, context.device, context.budget)
    what = "which the LoRA changes" if clip_loras.scaled else "which read the identifier's embedding"
    print(f"{counted(len(prompts), 'prompt')} to encode with the CLIPs, {what}")
    change, identifiers = clip_loras.merge_into, clip_loras.identifiers
    from sd3_lora.stage_one.text_encoders import encode_clips  # likewise

    clip_hidden, pooled = encode_clips(files, prompts, plan, context.reports, change, identifiers)
    t5_hidden = torch.stack([base[prompt][0][files.clip_tokens() :] for prompt in prompts])
    prompt_embeds = join_embeddings(clip_hidden, t5_hidden)
    return dict(zip(prompts, zip(prompt_embeds, pooled, strict=True), strict=True))


def embed_variants(
    variants: Sequence[Variant],
    loras: Sequence[LoraFile],
    prompts: Sequence[str],
    files: ModelFiles,
    config: InferenceConfig,
    length: int,
    context: DeviceContext,
) -> dict[Variant, Embeddings]:
    """Each variant's embeddings: the base's, unless its LoRAs change a CLIP."""
    changes = {}
    for variant in variants:
        read = (each for each in variant.identifiers if any(stands_in(each.word, prompt) for prompt in prompts))
        changes[variant] = ClipLoras.of(loras, variant.scales, tuple(read))
    without = "no T5" if any(changes.values()) else "no text encoder"
    base = embed(prompts, files, config, length, context, without)
    by_change = {ClipLoras().key: base}
    for change in changes.values():
        if change.key not in by_change:
            by_change[change.key] = embed_with(change, base, files, config, length, context)
    return {variant: by_change[change.key] for variant, change in changes.items()}


def records_of(loras: Sequence[LoraFile], variants: Sequence[Variant]) -> list[Mapping[str, Any]]:
    """What this project's training noted in LoRAs and in identifiers' embeddings, those of LoRAs first."""
    identifiers = dict.fromkeys(identifier for variant in variants for identifier in variant.identifiers)
    records = [*(lora.record for lora in loras), *(identifier.record for identifier in identifiers)]
    return [record for record in records if record]


def size_of(config: InferenceConfig, records: Sequence[Mapping[str, Any]], files: ModelFiles) -> PictureSize:
    """The picture's size: as given, else the resolution of the LoRA's training, else the model's."""
    trained = next((record["resolution"] for record in records if "resolution" in record), None)
    vae_scale = files.latent_channels_and_scale()[1]
    for flag in ("height", "width"):
        check_size(
            getattr(config, flag) or files.resolution(trained), flag, files.read_config("transformer"), vae_scale
        )
    default = files.resolution(trained)
    return PictureSize(config.width or default, config.height or default)


def decide(
    flags: DrawingFlags,
    files: ModelFiles,
    loras: Sequence[LoraFile],
    variants: Sequence[Variant],
    most: int,
    dtype: torch.dtype,
    budget: DeviceBudget | None,
) -> Drawing:
    """What is drawn, and what of the model is kept where meanwhile.

    Args:
        flags: of the command.
        files: the model.
        loras: to draw with.
        variants: how.
        most: pictures of a variant.
        dtype: of the transformer.
        budget: to stay under.

    Raises:
        UserError: flags that cannot be obeyed, or a budget that nothing fits.
    """
    records = records_of(loras, variants)
    config, size = flags.drawing, size_of(flags.drawing, records, files)
    trained_length = next((record.get("max_sequence_length") for record in records), None)
    length = config.max_sequence_length or trained_length or DEFAULT_SEQUENCE_LENGTH
    channels, vae_scale = files.latent_channels_and_scale()
    latent_size, sampling = size.latent(vae_scale), sampling_of(config)
    shape = DenoisingShape(
        (config.batch_size or 1) * sampling.rows,
        latent_size,
        files.clip_tokens() + length,
        dtype,
        sum(lora.device_bytes for lora in loras),
        0 if config.unmerged else max((lora.merging_bytes for lora in loras), default=0),
        config.capture != "off",
    )
    blocks = files.read_config("transformer")["num_layers"]
    check_skipped_layers(config.skip_guidance_layers, blocks)
    asked = AskedPlacement.of(flags.base, None, blocks)
    asked.check(blocks)
    if config.batch_size is None and budget:
        plan, together = plan_drawing(files, shape, budget, asked, most)
    else:
        plan, together = plan_denoising(files, shape, budget, asked), config.batch_size or 1
    for variant in variants:
        if variant.scales is not None:
            require_drawable(loras, variant.scales, bool(plan.placement.streamed) and not plan.placement.merged)
    asked_tile = read_asked_tile(config.vae_tile, size, vae_scale)
    return Drawing(size, (channels, *latent_size), length, dtype, asked, plan, together, asked_tile)


def sampling_of(config: InferenceConfig) -> SamplingSettings:
    """How pictures are denoised."""
    skipping = None
    if config.skip_guidance_layers:
        given = {name: getattr(config, f"skip_layer_guidance_{name}") for name in SKIP_LAYER_DEFAULTS}
        given = {name: value for name, value in given.items() if value is not None}
        layers = tuple(sorted(set(config.skip_guidance_layers)))
        skipping = SkipLayerGuidance(layers, **{**SKIP_LAYER_DEFAULTS, **given})
    return SamplingSettings(
        config.num_steps, config.guidance, config.negative_prompt, config.scheduler, config.timestep_shift, skipping
    )


def check_skipped_layers(layers: Sequence[int], blocks: int) -> None:
    """Checks that the model has these blocks.

    Raises:
        UserError: it has not.
    """
    for layer in layers:
        if not 0 <= layer < blocks:
            raise UserError(f"--skip_guidance_layers {layer}: this model's blocks are 0 to {blocks - 1}")


def picture_settings(
    config: InferenceConfig, drawing: Drawing, files: ModelFiles, loras: Sequence[str], precision: str
) -> dict[str, Any]:
    """All that decides a picture's pixels beside the model, its prompt and its index; it is kept in the file."""
    packed, sampling = drawing.plan.placement.precision, sampling_of(config)
    return {
        "text_encoders": files.provenance(TEXT_COMPONENTS, "", 0).identity,
        "scheduler": files.scheduler_hash(),
        "lora": list(loras),
        "negative_prompt": config.negative_prompt,
        "steps": config.num_steps,
        "guidance": config.guidance,
        "height": drawing.size.height,
        "width": drawing.size.width,
        "seed": config.seed,
        "max_sequence_length": drawing.length,
        "precision": precision + (f", base {packed}" if packed else ""),
        "vae_precision": config.vae_precision,
        # Only where they are asked for: pictures of earlier builds do not note them.
        **({"sampler": sampling.scheduler} if sampling.scheduler != "euler" else {}),
        **({} if sampling.timestep_shift is None else {"timestep_shift": sampling.timestep_shift}),
        **({"skip_layer_guidance": sampling.skip_layers.to_dict()} if sampling.skip_layers else {}),
        **({} if drawing.asked_tile == "auto" else {"vae_tile": drawing.asked_tile}),
        **({"t5_precision": config.t5_precision} if config.t5_precision else {}),
        **({"attention_kernel": kernel} if (kernel := drawing.plan.placement.attention_kernel) else {}),
        **({"lora_merged": True} if loras and drawing.plan.placement.merged else {}),
    }


def print_plans(plans: Sequence[PicturePlan], size: PictureSize) -> None:
    """Prints how many pictures there will be, how many are there, and where others keep their names."""
    before = sum(plan.is_drawn for plan in plans)
    print(f"{counted(len(plans), 'picture')} of {size.width}×{size.height}, {before} of them drawn before")
    beside = [plan.path for plan in plans if plan.is_beside_another and not plan.is_drawn]
    if beside:
        print(f"{len(beside)} of them beside pictures of other settings, which are kept: the first is {beside[0]}")


@dataclass(frozen=True)
class Batch:
    """Pictures that are denoised together.

    Attributes:
        variant: of all of them.
        pictures: one or more.
    """

    variant: Variant
    pictures: Sequence[PicturePlan]

    @property
    def to_draw(self) -> list[PicturePlan]:
        """Those that are not there yet."""
        return [picture for picture in self.pictures if not picture.is_drawn]


def batches_of(by_variant: Mapping[Variant, Sequence[PicturePlan]], together: int, asked: int | None) -> list[Batch]:
    """The batches in which a picture is missing; as many as `asked` in each, or of much the same size without.

    One is denoised as a whole, whatever of it is there: in another company a picture may differ in its last bits, and a
    run that was interrupted is to draw what it would have drawn.
    """
    batches: list[Batch] = []
    for variant, pictures in by_variant.items():
        size = asked or -(-len(pictures) // max(1, -(-len(pictures) // together)))
        batches += [Batch(variant, pictures[start : start + size]) for start in range(0, len(pictures), size or 1)]
    return [batch for batch in batches if batch.to_draw]


def choose_execution(
    flags: DrawingFlags, files: ModelFiles, drawing: Drawing, batches: Sequence[Batch], device: torch.device
) -> StepExecution:
    """Whether the transformer is compiled, and whether it is captured as a CUDA graph.

    Raises:
        UserError: this run cannot have what was asked for.
    """
    config, place = flags.drawing, drawing.plan.placement
    sampling = sampling_of(config)
    tokens_a_row = (
        image_tokens(files.read_config("transformer"), drawing.latent_shape[1:]) + files.clip_tokens() + drawing.length
    )
    rows = sampling.rows * sum(len(batch.pictures) for batch in batches)
    calls_each = sampling.num_steps * (2 if sampling.scheduler == "heun" else 1)
    must_be_deterministic = flags.device.must_be_deterministic
    asked = AskedExecution(is_on(config.compile), is_on(config.capture), must_be_deterministic)
    several = not place.merged and len({batch.variant.scales for batch in batches}) > 1
    calls, tokens = calls_each * len(batches), calls_each * rows * tokens_a_row
    return choose_drawing_execution(asked, drawing.plan, device, calls, tokens, several)


def load_sampler(
    files: ModelFiles,
    drawing: Drawing,
    execution: StepExecution,
    batches: Sequence[Batch],
    sampling: SamplingSettings,
    device: torch.device,
    loras: Sequence[LoraFile],
) -> tuple[Sampler, Callable[[Variant], None]]:
    """The transformer, ready to denoise; and what gives its LoRAs a variant's strengths."""
    place, latent_size = drawing.plan.placement, drawing.latent_shape[1:]

    def add_loras(transformer: SD3Transformer2DModel) -> list[torch.nn.Parameter]:
        for index, lora in enumerate([] if place.merged else loras):
            lora.attach(transformer, f"lora_{index}")
        return []

    arranged = arrange(files, place, device, drawing.dtype, latent_size, add_loras, execution.compiled)
    sizes = {len(batch.pictures) for batch in batches}
    call = TransformerCall(
        arranged.transformer,
        execution.compiled,
        max(sizes) * sampling.rows,
        execution.captured,
        execution.must_capture,
        most_shapes=len(sizes) * (2 if sampling.skip_layers else 1),
    )
    sampler = Sampler(arranged.transformer, files.read_scheduler_config(), call=call)
    if place.merged:
        changed = arranged.streamed.forget if arranged.streamed else lambda: None
        merged = MergedLoras(arranged.transformer, loras, files.weight_files("transformer"), device, changed)
        return sampler, lambda variant: merged.use(variant.scales)

    def use(variant: Variant) -> None:
        use_variant(arranged.transformer, variant)
        call.release()

    return sampler, use


def use_variant(transformer: SD3Transformer2DModel, variant: Variant) -> None:
    """Gives LoRAs beside the weights their strengths, or leaves them out; what changes a CLIP alone is not there."""
    if not has_adapter(transformer):
        return
    from sd3_lora.transformer.added_layers import use_strengths  # imports PEFT

    names = {f"lora_{index}": scale for index, scale in enumerate(variant.scales or ())}
    attached = {name: scale for name, scale in names.items() if name in transformer.peft_config}
    use_strengths(transformer, None if variant.scales is None else attached)


def denoise_all(
    sampler: Sampler,
    use: Callable[[Variant], None],
    batches: Sequence[Batch],
    embeddings: Mapping[Variant, Embeddings],
    drawing: Drawing,
    sampling: SamplingSettings,
    finish: Callable[[Sequence[PicturePlan], Sequence[torch.Tensor]], None],
) -> tuple[int, BaseException | None]:
    """Denoises batch after batch; returns how many pictures were, and the interruption or NaN that ended it.

    Args:
        sampler: that denoises.
        use: gives its LoRAs a variant's strengths.
        batches: of pictures.
        embeddings: of their prompts, for each variant.
        drawing: what is drawn.
        sampling: how.
        finish: is given what is new of each batch, with its normalized latents `(16, H/8, W/8)` on the CPU.
    """
    count, used = 0, None
    try:
        for batch in Progress(batches, desc="denoising", unit="batch"):
            if batch.variant is not used:
                use(batch.variant)
                used = batch.variant
            noise = torch.stack([picture.noise(drawing.latent_shape) for picture in batch.pictures])
            prompts = [picture.prompt for picture in batch.pictures]
            latents = sampler.denoise(noise, prompts, embeddings[batch.variant], sampling)
            kept = [latent for picture, latent in zip(batch.pictures, latents, strict=True) if not picture.is_drawn]
            finish(batch.to_draw, kept)
            count += len(kept)
    except (KeyboardInterrupt, UserError) as error:
        if not count:
            raise
        return count, error
    return count, None


@dataclass(frozen=True)
class Drawn:
    """What a run has drawn.

    Attributes:
        thumbnails: small pictures for the contact sheet, by the file's path.
        execution: how the transformer was called in the end, for `run.json`.
    """

    thumbnails: Mapping[Path, Image.Image]
    execution: Mapping[str, Any]


def draw(
    flags: DrawingFlags,
    files: ModelFiles,
    drawing: Drawing,
    tile: VaeTile,
    loras: Sequence[LoraFile],
    by_variant: Mapping[Variant, Sequence[PicturePlan]],
    context: DeviceContext,
) -> Drawn:
    """Encode, free, denoise, free, decode.

    Where the VAE has room beside the transformer, each batch is decoded when it is denoised.
    """
    config, device, reports = flags.drawing, context.device, context.reports
    batches = batches_of(by_variant, drawing.together, config.batch_size)
    to_draw = [picture for batch in batches for picture in batch.to_draw]
    execution = choose_execution(flags, files, drawing, batches, device)
    for component in ("scheduler", "transformer", "vae"):  # here and whole before a text encoder computes
        files.component(component)
    prompts = [picture.prompt for batch in batches for picture in batch.pictures]
    wanted = list(dict.fromkeys([*prompts, config.negative_prompt]))
    embeddings = embed_variants(list(by_variant), loras, wanted, files, config, drawing.length, context)

    waiting: list[torch.Tensor] = []
    kernel = attention_kernel(drawing.plan.placement.attention_kernel)
    with PictureWriter(min(WRITING_THREADS, os.cpu_count() or 1), thumbnail_of) as writer:
        with memory_stage(f"denoise ({context.precision})", device, reports), kernel:
            start_compile_workers(execution.compiled, device)
            sampler, use = load_sampler(files, drawing, execution, batches, sampling_of(config), device, loras)
            decoder, finish = None, partial(keep, waiting)
            if decoding_beside(drawing.plan, tile, context.budget):
                decoder = Decoder(load_vae(files, config.vae_precision, device, tile), writer)
                finish = decoder.decode
            count, ended_by = denoise_all(sampler, use, batches, embeddings, drawing, sampling_of(config), finish)
            execution = execution.carried_out(sampler.call.captured)
            del sampler, use
        if device.type == "cuda":
            print(f"denoised with {execution.sentence()}")
        if decoder is None:
            if isinstance(ended_by, KeyboardInterrupt):
                print(f"\ninterrupted: the {count} pictures that are denoised will be decoded first")
            with memory_stage(f"decode ({config.vae_precision})", device, reports):
                decoder = Decoder(load_vae(files, config.vae_precision, device, tile), writer)
                bar = Progress(zip(to_draw, waiting, strict=False), total=count, desc="decoding", unit="picture")
                for picture, latents in bar:
                    decoder.decode([picture], [latents])
        decoder.raise_errors()
    if ended_by:
        print(f"drew {count} of {counted(len(to_draw), 'picture')}")
        raise ended_by
    return Drawn(writer.made, execution.to_dict())


def keep(waiting: list[torch.Tensor], _: Sequence[PicturePlan], latents: Sequence[torch.Tensor]) -> None:
    """Has latents wait until the VAE has room."""
    waiting.extend(latents)


def plan_variants(
    config: InferenceConfig,
    prompts: Sequence[str],
    drawing: Drawing,
    files: ModelFiles,
    loras: Sequence[LoraFile],
    variants: Sequence[Variant],
    precision: str,
) -> dict[Variant, list[PicturePlan]]:
    """Every picture of the run, drawn before or not."""
    model, text = files.provenance(["transformer", "vae"], "", 0), files.provenance(TEXT_COMPONENTS, "", 0)
    plans = {}
    for variant in variants:
        settings = picture_settings(config, drawing, files, variant.identity(loras), precision)
        names = {"Model": Path(files.name).name, "Lora": variant.readable(loras)}
        style = FileStyle(config.format, variant.suffix, {name: value for name, value in names.items() if value})
        plans[variant] = plan_pictures(
            Path(config.outdir),
            prompts,
            config.num_images,
            settings | {"model": model.identity},
            model.other_identities | text.other_identities,
            style,
        )
    return plans


def as_they_stand(plans: Sequence[PicturePlan]) -> list[PicturePlan]:
    """The same, with what an attempt has drawn that ended early."""
    return [replace(plan, is_drawn=plan.path.is_file() and read_settings(plan.path) == plan.settings) for plan in plans]


def with_precision(flags: DrawingFlags, plan: Plan) -> DrawingFlags:
    """The flags with the base's precision as it was planned, so that all pictures of a run have the same."""
    return replace(flags, base=replace(flags.base, base_precision=plan.placement.precision or "16bit"))


def decoding_beside(plan: Plan, tile: VaeTile, budget: DeviceBudget | None) -> Phase | None:
    """The phase in which pictures are decoded beside the transformer; None where there is no room for both."""
    return plan_beside(plan, tile.predicted_parts(budget), budget) if budget else None


def print_memory(
    drawing: Drawing, tile: VaeTile, precision: str, vae_precision: str, budget: DeviceBudget | None
) -> Forecast:
    """Prints what is kept where, and what that takes; returns the forecast of the whole run."""
    forecast = drawing.plan.forecast
    if budget:
        decoding = Phase("decode", tile.predicted_parts(budget))
        beside = decoding_beside(drawing.plan, tile, budget)
        forecast = replace(forecast, phases=(*forecast.phases, beside or decoding))
        loras = ", LoRA merged" if drawing.plan.placement.merged else ""
        together = f"{loras}, up to {drawing.together} at a time" if drawing.together > 1 else loras
        print(f"transformer in {precision}, {drawing.plan.base_sentence()}{together}: {forecast.phases[0].sentence()}")
        print(f"VAE in {vae_precision}, {tile.describe()}: {decoding.sentence()}")
    note = drawing.asked.without_effect(drawing.plan.placement)
    if note:
        print(note)
    return forecast


def write_sheet(
    config: InferenceConfig,
    plans: Mapping[Variant, Sequence[PicturePlan]],
    drawing: Drawing,
    files: ModelFiles,
    loras: Sequence[LoraFile],
    thumbnails: Mapping[Path, Image.Image],
) -> None:
    """A contact sheet of all pictures of the run: those of one prompt, or of one noise, side by side."""
    pictures = [
        SheetPicture(plan.path, plan.prompt, plan.image_index, variant.label, thumbnails.get(plan.path))
        for row in zip(*plans.values(), strict=True)
        for variant, plan in zip(plans, row, strict=True)
    ]
    sampling, size = sampling_of(config), f"{drawing.size.width} x {drawing.size.height} px"
    facts = [SCHEDULERS[sampling.scheduler], f"{sampling.num_steps} steps", f"guidance {sampling.guidance:g}"]
    facts += [f"shift {sampling.timestep_shift:g}"] if sampling.timestep_shift is not None else []
    facts += ["without blocks " + " ".join(map(str, sampling.skip_layers.layers))] if sampling.skip_layers else []
    facts += [f"seed {config.seed}", size, *([f"not: {config.negative_prompt}"] if config.negative_prompt else [])]
    title = " + ".join([Path(files.name).name, *map(name_of, loras)])
    rows, left_out = rows_of_run(pictures)
    sheet = draw_sheet(title, rows, ", ".join([*facts, *([left_out] if left_out else [])]))
    print(f"wrote {save_sheet(sheet, Path(config.outdir), config.format)}")


def draw_within_memory(
    flags: DrawingFlags,
    files: ModelFiles,
    drawing: Drawing,
    tile: VaeTile,
    loras: Sequence[LoraFile],
    plans: Mapping[Variant, Sequence[PicturePlan]],
    context: DeviceContext,
) -> Drawn:
    """Draws the pictures that are not there; where the device's memory runs out, the rest with a plan that takes less.

    Raises:
        UserError: no plan fits.
    """
    fixed, most = with_precision(flags, drawing.plan), max(map(len, plans.values()))
    dtype = choose_training_dtype(flags.drawing.mixed_precision, context.device).dtype

    def attempt(within: DeviceBudget | None) -> Drawn:
        if within is context.budget:
            return draw(flags, files, drawing, tile, loras, plans, context)
        less = decide(fixed, files, loras, list(plans), most, dtype, within)
        work = VaeWork("decode", flags.drawing.vae_precision, less.size)
        smaller = choose_tile(files, work, within, less.asked_tile)
        left = {variant: as_they_stand(each) for variant, each in plans.items()}
        return draw(fixed, files, less, smaller, loras, left, replace(context, budget=within))

    return within_memory(attempt, context.budget, context.reports)


def draw_what_is_missing(
    flags: DrawingFlags,
    files: ModelFiles,
    drawing: Drawing,
    loras: Sequence[LoraFile],
    variants: Sequence[Variant],
    prompts: Sequence[str],
    context: DeviceContext,
) -> None:
    """Draws the pictures that the output folder lacks, and writes the record and the contact sheet; or plans alone."""
    config, is_plan, outdir = flags.drawing, flags.budget.plan, Path(flags.drawing.outdir)
    known = files.is_known  # then nothing is known of the weights, by which pictures that are drawn already are found
    plans = {} if known else plan_variants(config, prompts, drawing, files, loras, variants, context.precision)
    count = sum(not plan.is_drawn for each in plans.values() for plan in each)
    if not known:
        print_plans([plan for each in plans.values() for plan in each], drawing.size)
    forecast, budget = drawing.plan.forecast, context.budget
    if count or is_plan:
        tile = choose_tile(files, VaeWork("decode", config.vae_precision, drawing.size), budget, drawing.asked_tile)
        forecast = print_memory(drawing, tile, context.precision, config.vae_precision, budget)
    if is_plan:
        return
    measured, drawn = 0, Drawn({}, {})
    require_room(outdir, 3 * count * drawing.size.width * drawing.size.height, "the pictures take")
    if count:
        drawn = draw_within_memory(flags, files, drawing, tile, loras, plans, context)
        last = [stage for stage in context.reports if stage.name.startswith(("denoise", "decode"))]
        measured = measured_peak(budget, last, forecast.peak_bytes)  # that of encoding is printed before
    facts = RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=context.precision,
        plan=drawing.plan.to_dict(),
        predicted_parts=dict(forecast.largest.parts),
        prompts=tuple(prompts[:MOST_PROMPTS]),
        max_sequence_length=drawing.length,
        seed=config.seed,
    )
    results = RunResults(
        f"{counted(count, 'picture')} in {outdir}", context.reports, measured, execution=drawn.execution or None
    )
    RunRecord(groups_of(flags), facts).save(outdir / "run.json", results)
    write_sheet(config, plans, drawing, files, loras, drawn.thumbnails)
    print(f"wrote {counted(count, 'picture')} to {outdir}")


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    flags = DrawingFlags(*COMMAND_LINE.parse(argv))
    config, is_plan = flags.drawing, flags.budget.plan
    if flags.model.is_miniature:
        say_miniature("inference.py")
    device = choose_device(flags.device.device, flags.model)
    if flags.device.must_be_deterministic:
        make_deterministic()
    budget = open_budget(flags.budget, device)
    if budget and not is_plan:
        budget.cap()
    files = ModelFiles(flags.model, is_plan)
    loras = find_loras(config, files, flags.model.is_miniature)
    identifiers = find_identifiers(config.identifier_embedding, loras, files)
    variants = find_variants(config, loras, identifiers)
    prompts = find_prompts(config, records_of(loras, variants), flags.model.is_miniature)
    identifiers.require_in(prompts)
    chosen = choose_training_dtype(config.mixed_precision, planned_device(flags.device.device, device, is_plan))
    most = len(prompts) * config.num_images
    drawing = decide(flags, files, loras, variants, most, chosen.dtype, budget)
    head_width = files.read_config("transformer")["attention_head_dim"]
    if not is_plan:
        require_attention_kernel(drawing.plan.placement.attention_kernel, device, chosen.dtype, head_width)
    context = DeviceContext(device, budget, chosen.name)
    with nullcontext() if is_plan else writing_in(Path(config.outdir)):
        draw_what_is_missing(flags, files, drawing, loras, variants, prompts, context)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "--mixed_precision fp16, --vae_precision fp16, --batch_size 1 or --t5_stream")


if __name__ == "__main__":
    sys.exit(main())
