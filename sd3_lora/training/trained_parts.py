"""What a command trains: the LoRA's kind and its layers, what of the CLIPs, or the whole transformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sd3_lora.common.model_files import ModelFiles
from sd3_lora.training.config import TrainingFlags
from sd3_lora.training.identifier_start import IdentifierStart
from sd3_lora.training.in_backward import whole_bytes
from sd3_lora.training.lora_flags import LoraFlags
from sd3_lora.training.trainables import TrainedGroup, require_patterns
from sd3_lora.transformer.base_weights import make_hollow
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import LoraKind, attach_lora, chosen_blocks, start_from, target_modules, trained_names
from sd3_lora.transformer.lora_files import LoraFile
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.trained_clips import ClipTraining, TrainedClips

import torch
from diffusers import SD3Transformer2DModel


def lora_kind(lora: LoraFlags) -> LoraKind:
    """How the LoRA is scaled and started, as the flags say."""
    return LoraKind(
        lora.use_rslora, lora.use_dora, lora.init_lora_weights, lora.ranks, lora.lora_type, lora.lokr_factor
    )


def lora_targets(lora: LoraFlags, transformer: SD3Transformer2DModel) -> list[str]:
    """The layers that the LoRA changes, as the flags say."""
    return target_modules(transformer, lora.layers, chosen_blocks(lora.blocks, len(transformer.transformer_blocks)))


def require_rates(flags: TrainingFlags, config: dict[str, Any]) -> None:
    """Checks that each pattern of --lr_pattern is of something that is trained.

    Raises:
        UserError: one is not.
    """
    if not flags.optimizer.rates:
        return
    lora, hollow = flags.lora, make_hollow(config, torch.float32)
    attach_lora(hollow, lora_targets(lora, hollow), lora.rank, lora.alpha, lora.lora_dropout, 0, lora_kind(lora))
    require_patterns(flags.optimizer.rates, trained_names(hollow))


def clip_training(
    flags: TrainingFlags, files: ModelFiles, seed: int = 0, vectors: int | None = None
) -> ClipTraining | None:
    """What is trained of the CLIPs, if anything is.

    Args:
        flags: of the run.
        files: the model.
        seed: of the run.
        vectors: of the identifier's embedding; None where it is planned before the tokenizers are read.
    """
    if not flags.trains_clips:
        return None
    configs = {name: files.read_config(name) for name in CLIPS}
    rank = flags.text.rank(flags.lora.rank) if flags.text.train_text_encoder else None
    if vectors is None:
        vectors = flags.identifier.vectors_at_most
    return ClipTraining(configs, rank, flags.lora.lora_dropout, seed, vectors)


def load_clips(
    trained: ClipTraining,
    files: ModelFiles,
    dtype: torch.dtype,
    start: LoraFile | None,
    identifier: IdentifierStart | None,
) -> TrainedClips:
    """The frozen CLIPs on the host, with a new LoRA, or one that begins as another, and the identifier's vectors."""
    from sd3_lora.stage_one.text_encoders import load_clip_in  # imports all of transformers' encoders

    clips = {name: load_clip_in(files, name, dtype) for name in CLIPS}
    vectors = identifier.vectors_of(clips) if identifier else None
    trained.attach(clips)
    for name, part in start.clips.items() if start and trained.rank is not None else ():
        start_from(clips[name], part.starts())
    return TrainedClips(clips, vectors)


def groups_of_clips(clips: TrainedClips, flags: TrainingFlags, pictures: int, steps: int) -> Iterator[TrainedGroup]:
    """What is trained of the CLIPs, in groups: their LoRA, and the identifier's vectors.

    Args:
        clips: that are trained.
        flags: of the run.
        pictures: of an optimizer step.
        steps: of the run.
    """
    lora = clips.lora_parameters()
    if lora:
        rate, decay, last = flags.text_encoder_rate(pictures), flags.text.weight_decay, flags.text.last_step(steps)
        yield TrainedGroup("CLIPs", flatten_parameters(lora), rate, lora, decay, last_step=last)
    if clips.identifier:
        vectors, rate = tuple(clips.identifier.parameters()), flags.identifier_rate(pictures)
        last = flags.identifier.last_step(steps)
        yield TrainedGroup("identifier", flatten_parameters(vectors), rate, vectors, 0.0, last_step=last)


def optimizer_bytes(flags: TrainingFlags, files: ModelFiles, dtype: torch.dtype, device: torch.device) -> int | None:
    """What training the whole transformer takes beside its weights; None where a LoRA is trained."""
    if not flags.trains_all:
        return None
    return whole_bytes(files.tensor_shapes("transformer"), dtype, flags.run.gradient_accumulation_steps, device)
