"""All that decides the numbers of a run, and so must not change when it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import groups_of
from sd3_lora.common.devices import DTYPES
from sd3_lora.common.model_files import TEXT_COMPONENTS, library_versions
from sd3_lora.common.run_record import MOST_PROMPTS, NotedPicture, RunFacts, RunIdentity, flag_defaults
from sd3_lora.stage_one.crop_boxes import number_of_variant
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.flow import load_noise_table
from sd3_lora.training.optimizer_flags import OptimizerConfig
from sd3_lora.training.run_changes import (
    BATCH,
    BRIGHTNESS,
    FIRST_LORA,
    MASKS,
    NOISE_LEVELS,
    PICTURES,
    PRECISION,
    PRIOR_PROMPTS,
    ROTATION,
    TEXT_ENCODERS,
    TRANSFORMER,
    VAE,
)
from sd3_lora.training.stage_one_request import StageOneRequest
from sd3_lora.transformer.lora_files import find_lora


def noted_pictures(data: TrainingData) -> list[NotedPicture]:
    """The pictures of a run, as its checkpoints note them."""
    return [
        NotedPicture(
            image.image_id,
            "" if image.path.suffix == ".safetensors" else image.path.name,
            image.prompt,
            data.variants[image.image_id],
            image.other_prompts,
            image.repeats,
        )
        for image in data.images
    ]


def _short_hash(values: Sequence[object]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _latents_identity(data: TrainingData) -> tuple[dict[str, Any], frozenset[str]]:
    """What made the subject's latents, and other names of the same VAE."""
    cached = data.cached("instance")
    one = max(cached, key=lambda picture: picture.made_with.tensors_hash or "")
    others = frozenset[str]().union(*(picture.made_with.other_identities for picture in cached))
    is_augmented = any(number_of_variant(name) for names in data.variants.values() for name in names)
    ranges = next((picture.ranges for picture in cached if picture.ranges and is_augmented), {})
    values = {
        VAE: one.made_with.identity,
        "--vae_precision": one.made_with.precision,
        "--alpha_background": one.alpha_background,
        ROTATION: ranges.get("rotation_degrees"),
        BRIGHTNESS: ranges.get("brightness_range"),
    }
    return values, others


def _lora_hash(name: str | None) -> str | None:
    """Of the file that training begins with; None without one, of a hub's, and where it is no longer there."""
    if name is None or not Path(name).expanduser().exists():
        return None
    try:
        return hashlib.sha256(find_lora(name, "--init_lora").read_bytes()).hexdigest()[:12]
    except (UserError, OSError):
        return None


def run_identity(
    flags: TrainingFlags, facts: RunFacts, request: StageOneRequest, data: TrainingData, kernels: str
) -> RunIdentity:
    """All that decides the numbers of a run, and so must not change when it is resumed."""
    pictures = noted_pictures(data)
    # Of class pictures the role counts too; of the subject's alone the hash is that of earlier builds.
    keys = [
        (*picture.key, image.role) if image.role == "class" else picture.key
        for picture, image in zip(pictures, data.images, strict=True)
    ]
    numbers = {
        **asdict(flags.lora),
        **flags.optimizer.identity(),
        **asdict(flags.average),
        **asdict(flags.flow),
        **asdict(flags.full),
    }
    transformer = request.files.provenance(["transformer"], "", 0)
    noise_table = load_noise_table(request.files.read_scheduler_config(), flags.flow.timestep_shift)
    latents, other_vaes = _latents_identity(data)
    # An artefact does not know which other commits have its weights. The model does, and open_data has compared them.
    of_model = {
        name: request.files.provenance(components, "", 0).other_identities
        for name, components in ((TEXT_ENCODERS, TEXT_COMPONENTS), (VAE, ["vae"]))
    }
    later = {
        TEXT_ENCODERS: data.text.identity,
        **latents,
        NOISE_LEVELS: noise_table.identity,
        FIRST_LORA: _lora_hash(flags.lora.init_lora),
    }
    values = {
        TRANSFORMER: transformer.identity,
        PICTURES: _short_hash(keys),
        "--resolution": facts.resolution,
        "--use_aspect_ratio_bucket": flags.data.use_aspect_ratio_bucket,
        "--max_sequence_length": facts.max_sequence_length,
        "--t5_precision": data.text.precision,
        "--caption_dropout": flags.data.caption_dropout,
        "--clip_l_dropout": flags.data.clip_l_dropout,
        "--clip_g_dropout": flags.data.clip_g_dropout,
        "--t5_dropout": flags.data.t5_dropout,
        "--masked_loss": flags.data.masked_loss,
        "--unmasked_weight": flags.data.unmasked_weight,
        MASKS: _short_hash(data.mask_sources) if data.mask_sources else None,
        **{f"--{name}": value for name, value in numbers.items()},
        **flags.text.identity(flags.text_encoder_rate(1), flags.lora.rank),
        **flags.identifier.identity(flags.identifier_rate(1)),
        **flags.prior.identity(),
        PRIOR_PROMPTS: list(data.prior_prompts) or None,
        "--lora_alpha": flags.lora.alpha,
        "--gradient_accumulation_steps": flags.run.gradient_accumulation_steps,
        BATCH: flags.run.train_batch_size * facts.processes,
        PRECISION: str(DTYPES[facts.precision]).removeprefix("torch."),
        "--base_precision": facts.plan["precision"] or "16bit",
        "--compile": kernels,
        "--attention_kernel": flags.base.attention_kernel,
        "--seed": facts.seed,
        **later,
    }
    defaults = flag_defaults(type(group) for group in groups_of(flags))
    defaults |= {f"--{name}": value for name, value in OptimizerConfig().identity().items()}
    defaults |= later  # of an earlier build's checkpoint it is not known
    synonyms = {
        TRANSFORMER: transformer.other_identities,
        TEXT_ENCODERS: data.text.other_identities | of_model[TEXT_ENCODERS],
        VAE: other_vaes | of_model[VAE],
        "--optimizer": flags.optimizer.earlier_spellings(),
    }
    return RunIdentity(values, defaults, synonyms, pictures)


def run_facts(request: StageOneRequest, data: TrainingData, precision: str, seed: int, processes: int) -> RunFacts:
    """The run's inputs and settings, known before its first step; its plan is added with each attempt."""
    prompts = data.prompts
    return RunFacts(
        model=request.files.name,
        revision=request.files.revision,
        versions=library_versions(),
        precision=precision,
        processes=processes,
        prompts=prompts[:MOST_PROMPTS],
        trigger=data.trigger(request.instance_prompt),
        resolution=request.resolution,
        max_sequence_length=data.text.size,
        seed=seed,
    )
