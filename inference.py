"""LoRA and prompts → PNGs.

Encode, free, denoise, free, decode: as in training, no two of the large models are ever in memory together. Where the
prompts are already in an embeddings file, no text encoder is loaded at all.

    python inference.py --lora sd3-dreambooth-lora --prompt "a photo of sks dog in a bucket"
"""

from __future__ import annotations

from sd3_lora.common.command_line import CommandLine
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig
from sd3_lora.common.placement_flags import BaseFlags
from sd3_lora.drawing.config import InferenceConfig

COMMAND_LINE = CommandLine(
    "inference.py",
    __doc__,
    (InferenceConfig, BaseFlags, ModelConfig, DeviceConfig, BudgetConfig),
)
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import (
    UserError,
    exit_code,
    read_text_lines,
    require_writable_folder,
)
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig
from sd3_lora.common.defaults import EXAMPLE_PROMPTS_FILE, LORA_FOLDER, say_miniature
from sd3_lora.common.devices import choose_device, choose_training_dtype, planned_device
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles, check_size, library_versions
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.placement_flags import BaseFlags
from sd3_lora.common.run_record import MOST_PROMPTS, RunFacts, RunRecord, RunResults
from sd3_lora.common.stage_report import StageReport, memory_stage
from sd3_lora.drawing.config import InferenceConfig
from sd3_lora.drawing.pictures import PicturePlan, plan_pictures
from sd3_lora.gpu.attention import attention_kernel, require_attention_kernel
from sd3_lora.gpu.budget import DeviceBudget, compared, open_budget, sentence
from sd3_lora.gpu.forecast import Phase
from sd3_lora.plan.memory_plan import Plan, plan_denoising
from sd3_lora.plan.step_memory import DenoisingShape
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.latent_cache import denormalize_latents
from sd3_lora.stage_one.text_encoder_plan import TextWork, choose_text_encoder_plan, describe_t5
from sd3_lora.stage_one.text_encoders import encode_prompts
from sd3_lora.stage_one.vae import load_vae
from sd3_lora.stage_one.vae_tiles import VaeWork, choose_tile, read_asked_tile
from sd3_lora.transformer.lora import LORA_FILE, check_lora_fits, find_lora, read_lora_record
from sd3_lora.transformer.placement import AskedPlacement, arrange

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from tqdm import tqdm


@dataclass(frozen=True)
class Lora:
    """A LoRA file with its strength and what its training noted."""

    path: Path
    scale: float
    record: dict[str, Any]

    def identity(self) -> str:
        """Of its bytes, for the settings in the picture."""
        return f"{hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]}@{self.scale:g}"


def find_loras(config: InferenceConfig, is_miniature: bool) -> list[Lora]:
    """The LoRAs that the flags name."""
    names = list(config.lora)
    if not names and is_miniature and (Path(LORA_FOLDER) / LORA_FILE).is_file():
        print(f"drawing with the LoRA in {LORA_FOLDER}")
        names = [LORA_FOLDER]
    paths = [find_lora(name) for name in names]
    scales = config.lora_scale or [1.0] * len(paths)
    return [Lora(path, scale, read_lora_record(path)) for path, scale in zip(paths, scales, strict=True)]


def find_prompts(config: InferenceConfig, loras: Sequence[Lora], is_miniature: bool) -> list[str]:
    """The prompts to draw: as given, else the examples' on the miniature, else each LoRA's trigger.

    Raises:
        UserError: there is none.
    """
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        prompts += read_text_lines(Path(config.prompts_file))
    elif not prompts and is_miniature:
        prompts = read_text_lines(EXAMPLE_PROMPTS_FILE)
    prompts = prompts or [lora.record["trigger"] for lora in loras if "trigger" in lora.record]
    if not prompts:
        raise UserError('nothing to draw: type --prompt "a photo of ..."')
    return prompts


Embeddings = dict[str, tuple[torch.Tensor, torch.Tensor]]


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
    prompts: Sequence[str],
    files: ModelFiles,
    config: InferenceConfig,
    length: int,
    device: torch.device,
    budget: DeviceBudget | None,
    reports: list[StageReport],
) -> Embeddings:
    """Every prompt's `(S, D)` and `(P,)` float16 embeddings, read or computed."""
    known = read_known(Path(config.data_df_path), prompts, files, config, length)
    missing = [prompt for prompt in prompts if prompt not in known]
    if not missing:
        print(f"all {len(prompts)} prompts are in {config.data_df_path}: no text encoder is loaded")
        return known
    work = TextWork(length, config.t5_precision, config.t5_stream, prompts=len(missing))
    plan = choose_text_encoder_plan(files, work, device, budget)
    print(f"{len(missing)} prompts to encode, T5 in {describe_t5(plan)}")
    prompt_embeds, pooled = encode_prompts(files, missing, plan, reports)
    return known | {prompt: pair for prompt, *pair in zip(missing, prompt_embeds, pooled, strict=True)}  # type: ignore[misc]


def plan_of(
    files: ModelFiles,
    config: InferenceConfig,
    base: BaseFlags,
    loras: Sequence[Lora],
    latent_size: tuple[int, int],
    text_tokens: int,
    dtype: torch.dtype,
    budget: DeviceBudget | None,
) -> Plan:
    """Where the transformer's weights are kept."""
    rows = config.batch_size * (2 if config.guidance > 1 else 1)
    lora_bytes = sum(lora.path.stat().st_size for lora in loras)
    shape = DenoisingShape(rows, latent_size, text_tokens, dtype, lora_bytes)
    blocks = files.read_config("transformer")["num_layers"]
    asked = AskedPlacement.of(base, None, blocks)
    asked.check(blocks)
    return plan_denoising(files, shape, budget, asked)


def load_denoiser(
    files: ModelFiles,
    plan: Plan,
    latent_size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[Lora],
) -> Any:
    """Diffusers' own pipeline with the transformer, the scheduler and the LoRAs, and nothing else."""
    from diffusers import StableDiffusion3Pipeline  # here, because its import takes a second that a rerun does not need

    names = [f"lora_{index}" for index in range(len(loras))]

    def add_loras(transformer: SD3Transformer2DModel) -> list[torch.nn.Parameter]:
        for lora in loras:
            check_lora_fits(lora.path, transformer)
        for name, lora in zip(names, loras, strict=True):
            transformer.load_lora_adapter(str(lora.path.parent), weight_name=lora.path.name, adapter_name=name)
        if names:
            transformer.set_adapters(names, [lora.scale for lora in loras])
        return []

    transformer = arrange(files, plan.placement, device, dtype, latent_size, add_loras).transformer
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(files.component("scheduler")),
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def denoise(
    pipeline: Any, plans: Sequence[PicturePlan], embeddings: Embeddings, config: InferenceConfig, shape: tuple[int, ...]
) -> list[torch.Tensor]:
    """The pictures' normalized latents `(16, H/8, W/8)` on the CPU.

    Raises:
        UserError: they are not finite.
    """
    latents: list[torch.Tensor] = []
    dtype, device = pipeline.transformer.dtype, pipeline.transformer.device
    for start in tqdm(range(0, len(plans), config.batch_size), desc="denoising", unit="batch"):
        batch = plans[start : start + config.batch_size]

        def stack(prompts: list[str]) -> list[torch.Tensor]:
            return [torch.stack(part).to(device, dtype) for part in zip(*(embeddings[p] for p in prompts), strict=True)]

        prompt_embeds, pooled = stack([plan.prompt for plan in batch])  # (B, S, D), (B, P)
        negative_embeds, negative_pooled = stack([config.negative_prompt] * len(batch))
        latents += pipeline(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative_embeds,
            negative_pooled_prompt_embeds=negative_pooled,
            latents=torch.stack([plan.noise(shape) for plan in batch]).to(device, dtype),
            num_inference_steps=config.num_steps,
            guidance_scale=config.guidance,
            height=8 * shape[1],
            width=8 * shape[2],
            output_type="latent",
        ).images.cpu()
        if not torch.isfinite(latents[-1]).all():
            raise UserError("the picture came out as NaN (it would be black): type --mixed_precision bf16, or no")
    return latents


@torch.no_grad()
def decode_and_save(vae: AutoencoderKL, plans: Sequence[PicturePlan], latents: Sequence[torch.Tensor]) -> None:
    """Decodes one picture at a time and writes it."""
    processor = VaeImageProcessor()
    for plan, latent in tqdm(list(zip(plans, latents, strict=True)), desc="decoding", unit="picture"):
        raw = denormalize_latents(latent[None].float(), vae.config)  # (1, 16, H/8, W/8)
        pixels = vae.decode(raw.to(vae.device, vae.dtype)).sample  # (1, 3, H, W) in [-1, 1]
        plan.save(processor.postprocess(pixels.float(), output_type="pil")[0])


def size_px(asked: int | None, flag: str, loras: Sequence[Lora], files: ModelFiles) -> int:
    """One side of the picture: as given, else the resolution of the LoRA's training, else the model's."""
    trained = next((lora.record["resolution"] for lora in loras if "resolution" in lora.record), None)
    size = asked or files.resolution(trained)
    check_size(size, flag, files.read_config("transformer"), files.latent_channels_and_scale()[1])
    return size


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    configs = COMMAND_LINE.parse(argv)
    config, base, model, device_config, budget_config = configs
    if model.is_miniature:
        say_miniature("inference.py")
    device = choose_device(device_config.device)
    budget = open_budget(budget_config, device)
    if budget and not budget_config.plan:
        budget.cap()
    files = ModelFiles(model)
    loras = find_loras(config, model.is_miniature)
    prompts = find_prompts(config, loras, model.is_miniature)
    outdir = Path(config.outdir)
    if not budget_config.plan:
        require_writable_folder(outdir)
    height, width = (size_px(getattr(config, flag), flag, loras, files) for flag in ("height", "width"))
    trained_length = next((lora.record.get("max_sequence_length") for lora in loras if lora.record), None)
    length = config.max_sequence_length or trained_length or 77
    planned = planned_device(device_config.device, device, budget_config.plan)
    chosen = choose_training_dtype(config.mixed_precision, planned)
    channels, vae_scale = files.latent_channels_and_scale()
    size = PictureSize(width, height)
    latent_size = size.latent(vae_scale)
    asked_tile = read_asked_tile(config.vae_tile, size, vae_scale)
    plan = plan_of(files, config, base, loras, latent_size, files.clip_tokens() + length, chosen.dtype, budget)
    settings = {
        "model": files.provenance(["transformer", "vae"], chosen.name, 0).identity,
        "lora": [lora.identity() for lora in loras],
        "negative_prompt": config.negative_prompt,
        "steps": config.num_steps,
        "guidance": config.guidance,
        "height": height,
        "width": width,
        "seed": config.seed,
        "max_sequence_length": length,
        "precision": chosen.name + (f", base {plan.placement.precision}" if plan.placement.precision else ""),
        "vae_precision": config.vae_precision,
        **({} if asked_tile == "auto" else {"vae_tile": asked_tile}),
    }
    plans = plan_pictures(outdir, prompts, config.num_images, settings)
    to_draw = [plan for plan in plans if not plan.is_drawn()]
    print(f"{len(plans)} pictures of {width}×{height}, {len(plans) - len(to_draw)} of them drawn before")
    if to_draw or budget_config.plan:
        tile = choose_tile(files, VaeWork("decode", config.vae_precision, size), budget, asked_tile)
        if budget:
            print(f"transformer in {chosen.name}, {plan.base_sentence()}: {plan.forecast.largest.sentence()}")
            print(f"VAE in {config.vae_precision}, {tile.describe()}: {sentence(tile.predicted_parts(budget))}")
    if budget_config.plan:
        return
    reports: list[StageReport] = []
    width_of_head = files.read_config("transformer")["attention_head_dim"]
    require_attention_kernel(plan.placement.attention_kernel, device, chosen.dtype, width_of_head, trains=False)
    if to_draw:
        wanted = list(dict.fromkeys([*(plan.prompt for plan in to_draw), config.negative_prompt]))
        embeddings = embed(wanted, files, config, length, device, budget, reports)

        with (
            memory_stage(f"denoise ({chosen.name})", device, reports),
            attention_kernel(plan.placement.attention_kernel),
        ):
            pipeline = load_denoiser(files, plan, latent_size, chosen.dtype, device, loras)
            latents = denoise(pipeline, to_draw, embeddings, config, (channels, *latent_size))
            del pipeline

        with memory_stage(f"decode ({config.vae_precision})", device, reports):
            vae = load_vae(files, config.vae_precision, device, tile)
            decode_and_save(vae, to_draw, latents)
            del vae

    forecast, measured = plan.forecast, 0
    if budget and to_draw:  # of the last two stages: that of encoding is printed before
        forecast = replace(forecast, phases=(*forecast.phases, Phase("decode", tile.predicted_parts(budget))))
        measured = budget.used_bytes(reports[-2:])
        print(compared(forecast.peak_bytes, measured))
    facts = RunFacts(
        model=files.name,
        revision=files.revision,
        versions=library_versions(),
        precision=chosen.name,
        plan=plan.to_dict(),
        predicted_parts=dict(forecast.largest.parts),
        prompts=tuple(prompts[:MOST_PROMPTS]),
        max_sequence_length=length,
        seed=config.seed,
    )
    results = RunResults(f"{len(to_draw)} pictures in {outdir}", reports, measured)
    RunRecord(configs, facts).save(outdir / "run.json", results)
    print(f"wrote {len(to_draw)} pictures to {outdir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return exit_code(run, argv, "--mixed_precision fp16, --vae_precision fp16, --batch_size 1 or --t5_stream")


if __name__ == "__main__":
    sys.exit(main())
